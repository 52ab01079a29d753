"""Training as a process of its own, killed at random moments and resumed by the same command."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.experiments.tiny_train import CONFIG, ROOT, final, save_start


@pytest.mark.slow
def test_killed_anywhere_ends_bit_equal(tmp_path):
    """kill -9 in the warm start and at random moments of training, then SIGTERM, then to the end."""
    rng = random.Random(int(time.time()))
    start = save_start(tmp_path / "start")
    # A cache of its own, which the first run fills: a process killed while it writes the shared one would leave half an entry.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def command(name):
        overrides = [
            f"--config.{o}" for o in (f"model.path={start}", "steps=40", "save_every=7", "warm_start.steps=200")
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={tmp_path / name}", *overrides],
            cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(process):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return out, errors

    def kill(process):
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    def lines():
        path = tmp_path / "killed" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(process, count):
        deadline = time.monotonic() + 300
        while lines() < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    out, _ = finish(command("whole"))
    assert "12 held-out problems solved (gain " in out and (tmp_path / "whole" / "plot.png").read_bytes()[1:4] == b"PNG"

    process = command("killed")
    assert any("warm start: step 100/200" in line for line in process.stderr)
    time.sleep(rng.uniform(0, 0.3))
    kill(process)
    assert not (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    process = command("killed")
    wait_for(process, lines() + 1)
    time.sleep(rng.uniform(0, 0.2))
    kill(process)
    assert lines() < 40
    process = command("killed")
    wait_for(process, lines() + 1)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and "SIGTERM: saved step" in errors
    _, errors = finish(command("killed"))
    assert "resumed" in errors and "warm start: step" not in errors
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
