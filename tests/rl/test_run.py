"""The harness: exact resume after kill -9 and SIGTERM, files, lock, errors, progress."""

import errno
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import checkpoint, progress
from rl import config as config_lib
from rl import workdir as files
from rl.checkpoint import disk, store
from rl.launch import launch
from rl.run import Run, RunError

ROOT = Path(__file__).parents[2]
CONFIG = "tests/rl/toy_config.py:slow"


def start(workdir, *more):
    command = [sys.executable, "-m", "tests.rl.toy", f"--config={CONFIG}", f"--workdir={workdir}", *more]
    # A process killed while it writes the shared compilation cache would leave half an entry there.
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_progress(process, path, lines):
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def final_state(workdir):
    """Every leaf of the newest checkpoint as bytes, read without the toy's own code."""
    newest = max(path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    leaves = json.loads((newest / "meta.json").read_text())["leaves"]
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(toy_state())}
    assert leaves.keys() == names
    state = checkpoint.restore(workdir / "checkpoints", toy_state()).state
    state["key"] = jax.random.key_data(state["key"])
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def toy_state():
    from tests.rl import toy

    return toy.initial(config_lib.load(str(ROOT / "tests/rl/toy_config.py")))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("toy") / "run"
    finish(start(workdir))
    return workdir


@pytest.mark.slow
def test_uninterrupted_run_writes_every_step_exactly(uninterrupted):
    metrics, timing = rows(uninterrupted / "metrics.jsonl"), rows(uninterrupted / "timing.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 101)) == [row["step"] for row in timing]
    assert [row["env_steps"] for row in metrics] == list(range(10, 1010, 10))
    assert all(float(np.float32(row["noise"])) == row["noise"] for row in metrics)
    assert all(set(row) == {"step", "env_steps", "fitness_mean", "noise"} for row in metrics)
    seconds = [row["seconds"] for row in timing]
    assert seconds == sorted(seconds) and seconds[-1] > 100 * 0.008
    assert sorted(path.name for path in (uninterrupted / "checkpoints").iterdir()) == ["0000000096", "0000000100"]
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["layers"] == [3, 4] and config["optimizer"] == {"b1": 0.9, "name": "adam"}


@pytest.mark.slow
def test_killed_three_times_ends_bit_equal(uninterrupted, tmp_path):
    workdir, rng = tmp_path / "run", random.Random(int(time.time()))
    metrics = workdir / "metrics.jsonl"
    survived = [0]
    for _ in range(3):
        process = start(workdir)
        # One row more than the last kill left: the process has restored, cut the file back and trained again.
        wait_for_progress(process, metrics, lines=survived[-1] + 1)
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        survived.append(metrics.read_bytes().count(b"\n"))
    assert survived[-1] < 100
    finish(start(workdir))
    assert metrics.read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert final_state(workdir) == final_state(uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143_and_resumes(uninterrupted, tmp_path):
    workdir, rare = tmp_path / "run", "--config.save_every=1000"
    process = start(workdir, rare)
    wait_for_progress(process, workdir / "metrics.jsonl", lines=5)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    steps = len(rows(workdir / "metrics.jsonl"))
    assert 5 <= steps < 100 and f"saved step {steps}" in errors
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [f"{steps:010d}"]
    assert f"at step {steps} of 100" in finish(start(workdir, rare))
    assert (workdir / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert final_state(workdir) == final_state(uninterrupted)


def small_run(workdir, steps=6, *, stop=None, config=None, metrics=None, **options):
    """Adds the step's number to a vector; returns the state and the closed run."""
    options = {"total_steps": steps, "save_every": 2} | options
    with Run(workdir, {"seed": 0} if config is None else config, **options) as run:
        state = run.restore({"x": jnp.zeros(3), "key": jax.random.key(0)})
        while run.step < (stop or run.total_steps):
            state = {**state, "x": state["x"] + (run.step + 1)}
            run.record(state, {"fitness_mean": state["x"][0]} | (metrics or {}))
    return state, run


def test_rows_hold_exact_values_and_strict_json(tmp_path):
    values = {
        "third": jnp.float32(1) / 3,
        "half_precision": jnp.bfloat16(0.1),
        "count": jnp.int32(7),
        "flag": np.bool_(True),
        "nothing": jnp.nan,
        "much": -jnp.inf,
    }
    small_run(tmp_path, 1, metrics=values)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == (
        '{"step": 1, "count": 7, "fitness_mean": 1.0, "flag": true, "half_precision": 0.10009765625, '
        '"much": "-inf", "nothing": "nan", "third": 0.3333333432674408}\n'
    )


def test_finished_run_is_left_as_it_is(tmp_path):
    first, _ = small_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    second, run = small_run(tmp_path)
    assert run.step == 6 and (tmp_path / "metrics.jsonl").read_bytes() == before
    np.testing.assert_array_equal(second["x"], first["x"])
    np.testing.assert_array_equal(first["x"], np.full(3, 21.0))


def test_damaged_newest_checkpoint_falls_back_counted(tmp_path, capfd):
    reference, _ = small_run(tmp_path / "a")
    small_run(tmp_path / "b", stop=5)
    newest = tmp_path / "b" / "checkpoints" / "0000000004"
    biggest = max((p for p in (newest / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(biggest, biggest.stat().st_size // 2)
    capfd.readouterr()
    state, run = small_run(tmp_path / "b")
    assert "warning: checkpoint 0000000004 is unusable" in capfd.readouterr().err
    assert run.fallbacks == 1
    assert [row.get("checkpoint_fallbacks", 0) for row in rows(tmp_path / "b" / "timing.jsonl")] == [0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(state["x"], reference["x"])
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "b" / "checkpoints" / "unusable-0000000004").is_dir()


def test_a_workdir_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"must be a folder, but .*file.* cannot be made one"):
            small_run(workdir)


def test_second_process_on_a_workdir_is_refused(tmp_path):
    with (
        Run(tmp_path, {}, total_steps=1, save_every=1),
        pytest.raises(RunError, match=f"in use by process {os.getpid()}"),
        Run(tmp_path, {}, total_steps=1, save_every=1),
    ):
        pass
    small_run(tmp_path, config={})  # the lock is free again


def test_other_config_is_refused_before_anything_changes(tmp_path):
    small_run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(config_lib.ConfigError, match=r"seed: stored 0, this command 1"):
        small_run(tmp_path, config={"seed": 1})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match="no config.json"):
        small_run(tmp_path, config={"seed": 1})


def test_other_state_is_refused_naming_every_leaf(tmp_path):
    small_run(tmp_path)
    run = Run(tmp_path, {"seed": 0}, total_steps=6, save_every=2)
    with run, pytest.raises(checkpoint.CheckpointError) as error:
        run.restore({"x": jnp.zeros(4), "y": jnp.zeros(1)})
    message = str(error.value)
    assert "['key']: in the checkpoint only" in message and "['y']: not in the checkpoint" in message
    assert "['x']: shape [3] in the checkpoint, [4] here" in message


def test_no_finite_member_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    small_run(tmp_path, stop=4)
    with pytest.raises(RunError, match=r"step 5: none of the members has a finite fitness"):
        small_run(tmp_path, metrics={"finite_members": jnp.int32(0)})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000000002", "0000000004"]
    state, run = small_run(tmp_path, metrics={"finite_members": jnp.int32(1)})
    assert run.step == 6
    np.testing.assert_array_equal(state["x"], np.full(3, 21.0))


def test_shortened_metrics_file_is_refused(tmp_path):
    small_run(tmp_path, stop=4)
    os.truncate(tmp_path / "metrics.jsonl", 10)
    with pytest.raises(RunError, match=r"needs \d+ bytes of .*metrics.jsonl, which has 10"):
        small_run(tmp_path)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"vector": jnp.zeros(3)}, r"vector has shape \(3,\)"),
        ({"step": 3}, r"taken; rename \['step'\]"),
        ({"env_steps": 3}, r"taken; rename \['env_steps'\]"),
    ],
)
def test_bad_metrics_are_refused(tmp_path, metrics, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, metrics=metrics)


def logged_run(workdir, stop=6, lines=1):
    """`lines` lines of a log per step; save_every=2."""
    with Run(workdir, {}, total_steps=6, save_every=2, logs=("samples.jsonl",)) as run:
        state = run.restore({"x": jnp.zeros(2)})
        while run.step < stop:
            step = run.step + 1
            run.log("samples.jsonl", ({"step": step, "text": "a\nb \u20ac", "row": row} for row in range(lines)))
            if step == stop < 6:
                return  # killed between the log and the step that it belongs to
            run.record(state, {})


def test_a_log_has_every_row_once_after_interruptions(tmp_path):
    logged_run(tmp_path / "whole", lines=2)
    whole = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert [(row["step"], row["row"]) for row in map(json.loads, whole.splitlines())] == [
        (step, row) for step in range(1, 7) for row in range(2)
    ]
    assert json.loads(whole.splitlines()[0])["text"] == "a\nb \u20ac"
    for stop in (1, 4, 4, 6):  # the last checkpoints: none, 2, 2
        logged_run(tmp_path / "broken", stop, lines=2)
        if stop == 4:
            assert len((tmp_path / "broken" / "samples.jsonl").read_bytes().splitlines()) == 8
    assert (tmp_path / "broken" / "samples.jsonl").read_bytes() == whole


def test_a_shortened_log_is_refused(tmp_path):
    logged_run(tmp_path, stop=5)
    os.truncate(tmp_path / "samples.jsonl", 10)
    with pytest.raises(RunError, match=r"step 4 needs \d+ bytes of .*samples.jsonl, which has 10"):
        logged_run(tmp_path)


def test_log_rows_are_strict_json(tmp_path):
    with Run(tmp_path, {}, total_steps=1, save_every=1, logs=("a.jsonl", "b.jsonl")) as run:
        run.restore({"x": jnp.zeros(2)})
        run.log("a.jsonl", [{"reward": float("nan"), "text": "\ud800"}])
        run.log("b.jsonl", [])
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.log("b.jsonl", [{"parts": {"deep": float("inf")}}])
        with pytest.raises(KeyError):
            run.log("c.jsonl", [{}])
    assert (tmp_path / "a.jsonl").read_text() == '{"reward": "nan", "text": "\\ud800"}\n'
    assert (tmp_path / "b.jsonl").read_bytes() == b""


def test_sigterm_before_the_first_step_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, Run(tmp_path, {"seed": 0}, total_steps=6, save_every=2):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("still running")
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert small_run(tmp_path)[1].step == 6


@pytest.mark.parametrize("name", ["total_steps", "save_every"])
def test_numbers_below_one_are_refused(tmp_path, name):
    with pytest.raises(RunError, match=f"{name} must be at least 1, not 0"):
        Run(tmp_path, {}, **{"total_steps": 1, "save_every": 1, name: 0})


def test_record_before_restore_is_refused(tmp_path):
    with Run(tmp_path, {}, total_steps=1, save_every=1) as run, pytest.raises(RunError, match="call run.restore"):
        run.record({}, {})


def test_tensorboard_events_on_request(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")
    small_run(tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"fitness_mean") == 6


class Screen(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


def test_progress_shows_rates_time_left_and_statistics(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    screen = Screen(tty=True)
    shown = progress.Progress(10, "env_steps", ("fitness_mean", "evaluated"), screen)
    shown.start(2, 2000)
    clock[0] += 4.0
    shown.update({"step": 4, "env_steps": 22000, "fitness_mean": 1.23456, "evaluated": 475.0, "other": 1})
    clock[0] += 4.0
    shown.update({"step": 6, "env_steps": 42000, "fitness_mean": 2.0})
    shown.close()
    first, second = screen.getvalue().removeprefix("\r").split("\r")
    assert first == "step 4/10  eta 0:12  0.5 steps/s  5000 env_steps/s  fitness_mean 1.235  evaluated 475"
    assert second.rstrip() == "step 6/10  eta 0:08  0.5 steps/s  5000 env_steps/s  fitness_mean 2  evaluated 475"
    assert second.endswith("\n")


def test_progress_in_a_log_is_one_line_every_few_seconds(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    log = Screen(tty=False)
    shown = progress.Progress(40, "tokens", (), log)
    shown.start(0, 0)
    for step in range(1, 41):
        clock[0] += 0.5
        shown.update({"step": step})
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["1/40", "11/40", "21/40", "31/40", "40/40"]


def test_a_step_that_donates_the_state_does_not_change_what_is_saved(tmp_path, monkeypatch):
    """The thread gets to the state when the next steps have long overwritten it."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    gate, write = threading.Event(), store.write
    monkeypatch.setattr(store, "write", lambda *arguments: (gate.wait(20), write(*arguments)))
    with Run(tmp_path, {}, total_steps=3, save_every=2) as run:
        state = run.restore({"x": jnp.ones(1000)})
        for number in (1, 2, 3):
            state = step(state)
            if number == 3:
                jax.block_until_ready(state)
                gate.set()
            run.record(state, {})
    found = checkpoint.restore(tmp_path / "checkpoints", {"x": jnp.zeros(1000)}, step=2)
    np.testing.assert_array_equal(found.state["x"], np.full(1000, 4.0))
    assert found.extra["metrics_bytes"] == len(b'{"step": 1}\n{"step": 2}\n')


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_commit", full)
        with pytest.raises(OSError, match="No space left"):
            small_run(tmp_path / "a")
        assert len(rows(tmp_path / "a" / "metrics.jsonl")) == 4  # that of step 2 failed; that of step 4 was not begun
    state, run = small_run(tmp_path / "a")
    assert run.step == 6 and float(state["x"][0]) == 21.0
    with monkeypatch.context() as patch:  # and where something else ends the run, it is said
        patch.setattr(store, "_commit", full)
        with pytest.raises(RunError, match="finite"):
            small_run(tmp_path / "b", save_every=1, metrics={"finite_members": jnp.int32(0)})
        with pytest.raises(KeyError), Run(tmp_path / "c", {}, total_steps=9, save_every=1) as run:
            run.record(run.restore({"x": jnp.zeros(1)}), {})
            said = []
            monkeypatch.setattr(run, "say", said.append)
            monkeypatch.setattr(run._progress, "say", said.append)
            raise KeyError
    (line,) = said
    told = r"No space left on device: the disk, or a quota, is full; step 1 takes 4 bytes and [\d,]+ were free; there is no"
    assert re.match(
        rf"warning: the last checkpoint was not written \(NoRoomError: \[Errno 28\] {told} checkpoint yet", line
    )


def toy_in_this_process(workdir):
    from tests.rl import toy

    launch(
        toy.train, ["toy", f"--config={ROOT / 'tests/rl/toy_config.py'}", f"--workdir={workdir}", "--config.steps=9"]
    )


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, capfd, what):
    toy_in_this_process(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        if what == "checkpoint":  # that of step 8
            write, place = disk.write_array, "writing-0000000008"
            patch.setattr(disk, "write_array", lambda path, x: full(path) if place in str(path) else write(path, x))
        else:
            line = files.json_line
            monkeypatch.setattr(
                files, "json_line", lambda row: full("metrics.jsonl") if row["step"] == 7 else line(row)
            )
        capfd.readouterr()
        toy_in_this_process(tmp_path / "run")
    monkeypatch.undo()
    (told,) = [line for line in capfd.readouterr().err.splitlines() if "rror" in line]
    assert ended.value.code == 2 and told.startswith("error: [Errno 28] No space left on device: '")
    assert told.endswith("the checkpoint of step 4 is intact: make room, and the same command resumes from it")
    assert ("step 8 takes" in told) == (what == "checkpoint") and ("metrics.jsonl'" in told) == (what == "metrics")
    toy_in_this_process(tmp_path / "run")
    assert "resumed" in capfd.readouterr().err
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_a_process_with_status_2(uninterrupted, tmp_path):
    process = start(tmp_path / "run")
    wait_for_progress(process, tmp_path / "run" / "metrics.jsonl", 9)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (600, 600))
    _, errors = process.communicate(timeout=300)
    told = errors.splitlines()[-1]
    assert (
        process.returncode == 2 and "Traceback" not in errors and told.startswith("error: [Errno 27] File too large: '")
    )
    assert f"{tmp_path}/run/" in told and "a file may have at most 600 bytes (ulimit -f)" in told
    finish(start(tmp_path / "run"))
    assert final_state(tmp_path / "run") == final_state(uninterrupted)


def test_the_best_by_a_metric_outlives_newer_ones(tmp_path):
    with Run(tmp_path, {}, total_steps=6, save_every=1, keep=checkpoint.Keep(1, best=1, metric="score")) as run:
        state = run.restore({"x": jnp.zeros(1)})
        for score in (1.0, 5.0, jnp.nan, 3.0, 4.0, 0.0):
            run.record(state, {"score": score})
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 6]
