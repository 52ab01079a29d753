"""Two processes of four devices are one of eight; processes that would not agree are refused."""

import json
import time

import numpy as np
import pytest

from rl import mesh as meshes
from tests.rl.processes import ends, start


def launch(count, seeds=(0, 0)):
    return ends(start(count, *(("tests.rl.two_processes", str(seed)) for seed in seeds[:count])))


def found(output):
    """The last line; those before are the transport's."""
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_two_processes_give_what_one_does():
    """Every design of evolution, in integers too, bit for bit, and every optimizer."""
    ((status, alone, errors),) = launch(1)
    assert status == 0, errors
    first, second = launch(2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    two, one = found(first[1]), found(alone)
    assert (one["processes"], two["processes"], one["devices"], two["devices"]) == (
        1,
        2,
        8,
        8,
    ) and "bits" not in second[1]
    assert two["bits"] == one["bits"] and len(one["bits"]) == 7
    assert two["steps"].keys() == one["steps"].keys() and len(one["steps"]) > 12
    for name, steps in one["steps"].items():  # sums of parts, in another order
        np.testing.assert_allclose(two["steps"][name], steps, rtol=1e-5, atol=1e-6, err_msg=name)
    assert "told ['0 ', '1 éé']" in first[2] and "told ['0 ', '1 éé']" in second[2]  # not of one length


def test_processes_that_do_not_agree_are_refused():
    for status, _, errors in launch(2, seeds=(0, 1)):
        assert status != 0 and "all processes must run one config" in errors and "processes [1] differ" in errors


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="missing: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
        meshes.connect()


@pytest.mark.slow
def test_processes_of_one_run_stop_in_one_step_and_go_on_after_one_is_lost(tmp_path):
    def begin(name, count):
        command = (
            "tests.rl.toy",
            "--config=tests/rl/toy_config.py:slow",
            f"--workdir={tmp_path / name}",
            "--config.steps=60",
        )
        return start(count, command)

    lines = lambda: (tmp_path / "two" / "metrics.jsonl").read_bytes().count(b"\n")

    def wait(running, more):
        deadline = time.monotonic() + 300
        while not (tmp_path / "two" / "metrics.jsonl").exists() or lines() < more:
            assert all(process.poll() is None for process in running) and time.monotonic() < deadline
            time.sleep(0.01)

    assert ends(begin("alone", 1))[0][0] == 0
    running = begin("two", 2)
    wait(running, 3)
    running[1].terminate()  # not the one that writes
    ended = ends(running)
    assert [status for status, *_ in ended] == [143, 143], ended
    newest = max(path.name for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert int(newest) == lines() < 60 and f"SIGTERM: saved step {lines()}" in ended[0][2]

    running = begin("two", 2)
    wait(running, lines() + 3)
    running[1].kill()
    (status, _, errors), _ = ends(running)
    assert status == 3 and "process 0 of 2 lost another one" in errors and "which resumes from the newest" in errors

    ended = ends(begin("two", 2))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "resumed" in ended[0][2] and "step 60/60" in ended[0][2] and "step " not in ended[1][2].replace("steps", "")
    for name in ("metrics.jsonl", "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
