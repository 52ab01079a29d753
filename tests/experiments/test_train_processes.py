"""Language models learn in two processes of four devices what they learn in one of eight, a loss included."""

import signal
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import build
from rl.config import ConfigError
from tests.experiments.tiny_train import CONFIG, config_of, final, rows, save_start
from tests.rl.processes import ends, start


def begin(folder, name, count, variant, *overrides):
    overrides = [f"--config.{o}" for o in (f"model.path={folder / 'start'}", *overrides)]
    return start(count, ("experiments.train", f"--config={CONFIG}:{variant}", f"--workdir={folder / name}", *overrides))


def finish(running):
    ended = ends(running)
    assert [status for status, *_ in ended] == [0] * len(ended), ended
    return ended


def test_processes_that_would_all_do_the_same_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = config_of("none")
    with pytest.raises(ConfigError, match="got 2 processes with 8 devices and sizes of config.mesh that are all 1"):
        build.mesh(config)
    config.mesh.data = -1
    assert build.mesh(config).shape["data"] == 8


@pytest.mark.slow
def test_evolution_ends_with_the_bits_of_one_process_after_a_loss(tmp_path):
    save_start(tmp_path / "start")
    sizes = ("mesh.population=-1", "steps=24", "save_every=4", "eval_every=24", "warm_start.steps=10")
    run = lambda name, count: begin(tmp_path, name, count, "", *sizes)
    metrics = tmp_path / "two" / "metrics.jsonl"
    lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait(running, more):
        deadline = time.monotonic() + 300
        while lines() < more:
            assert all(process.poll() is None for process in running) and time.monotonic() < deadline
            time.sleep(0.01)

    finish(run("alone", 1))
    running = run("two", 2)
    wait(running, 5)
    running[0].kill()  # the one that writes
    _, (status, _, errors) = ends(running)
    # by an exchange that fails, or, where it waits for a device of its own that does, by the runtime
    says = {3: "process 1 of 2 lost another one", -signal.SIGABRT: "most likely indicates that another task died"}
    assert status in says and says[status] in errors and lines() < 24

    (_, output, errors), (_, silent, _) = finish(run("two", 2))
    assert "resumed" in errors and "warm start: step" not in errors
    assert "12 held-out problems solved" in output and "solved" not in silent
    (*_, leaves), (*_, expected) = final(tmp_path / "two"), final(tmp_path / "alone")
    crc32 = lambda leaf: [block["crc32"] for block in leaf["blocks"]]
    assert {name: crc32(leaf) for name, leaf in leaves.items()} == {
        name: crc32(leaf) for name, leaf in expected.items()
    }
    names = ("metrics.jsonl", "samples.jsonl", "judged.jsonl", "generations.bin")
    for name in (*names, "warm_start/model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.slow
def test_policy_gradients_end_as_in_one_process(tmp_path):
    """With sequences and parameters over devices of both: sums over processes are added in another order."""
    save_start(tmp_path / "start")
    for name, count in (("alone", 1), ("two", 2)):
        finish(
            begin(
                tmp_path,
                name,
                count,
                "grpo",
                "mesh.data=2",
                "mesh.fsdp=4",
                "steps=3",
                "eval_every=3",
                "warm_start.steps=0",
            )
        )
    alone, two = tmp_path / "alone", tmp_path / "two"
    for name in ("samples.jsonl", "judged.jsonl"):
        assert (two / name).read_bytes() == (alone / name).read_bytes()
    for expected, found in zip(rows(alone / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert any(row["gradient_norm"] > 0.1 for row in rows(two / "metrics.jsonl"))
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (alone, two))
    begun = load_file(tmp_path / "start" / "model.safetensors")
    assert found.keys() == expected.keys() == begun.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=1e-5)
        assert np.abs(x - begun[name]).max() > 1e-3
