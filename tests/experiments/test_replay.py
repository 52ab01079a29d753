"""Replay: runs are rebuilt from their logs alone, and every reason why one cannot be is said."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import control, replay, train
from rl import config as config_lib
from rl import envs, generations
from rl.run import Run
from tests.experiments.tiny_train import config_of, save_start

ROOT = Path(__file__).parents[2]
TINY = ["max_steps=10", "eval_episodes=2", "eval_every=4", "save_every=2", "steps=4", "policy.hidden=(4,)"]


def control_config(*overrides, variant="eggroll"):
    return config_lib.load(f"{ROOT}/configs/control_pendulum.py:{variant}", [*TINY, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "pendulum"
    control.train(control_config("es.members=8"), run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def replayed(capsys, run, *arguments):
    """(exit status, what was printed, errors)"""
    capsys.readouterr()
    return replay.main([str(run), *arguments]), *capsys.readouterr()


def edit(run, change):
    """Rewrites the log's records [(generation, fitness and normalizer)], checksums included."""
    start = replay.start_of(run, replay.run_config(run))
    records = list(enumerate(generations.read(run / generations.NAME, start.like), 1))
    (run / generations.NAME).write_bytes(b"".join(generations.pack(*record) for record in change(records)))


def test_every_generation_of_control_is_the_one_that_was(finished, capsys):
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, out, _ = replayed(capsys, finished)
    # 16 bytes of frame, 8 members of 4, and 7 numbers of 4 of the normalizer
    assert code == 0 and "rebuilt step 4 of" in out and "76 a generation" in out and "bit for bit" in out
    assert replayed(capsys, finished, "--step=2")[0] == 0
    code, out, _ = replayed(capsys, finished, "--step=3")
    assert code == 0 and "not compared: there is no checkpoint of step 3; there is one of 2, 4" in out
    assert files == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    config = control_config("es.members=8")
    learner, start = control.make_learner(config, envs.make(config.env, 10)), replay.start_of(finished, config)
    state = learner.state
    for step in range(4):
        assert replay.difference(replay.rebuild(finished, start, step), state) == ""
        state, _ = learner.step(state)
    assert "rebuilt" in replay.difference(replay.rebuild(finished, start, 3), state)


def test_a_run_that_was_interrupted_logs_the_same(finished, tmp_path, monkeypatch):
    """Stopped after step 3, of which only the first two are in a checkpoint."""
    record = Run.record

    def until_three(run, *arguments, **options):
        record(run, *arguments, **options)
        if run.step == 3:
            raise KeyboardInterrupt

    config = control_config("es.members=8")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "record", until_three)
        control.train(config, tmp_path / "run")
    log = tmp_path / "run" / generations.NAME
    assert log.stat().st_size == 3 * 76
    control.train(config, tmp_path / "run")
    assert log.read_bytes() == (finished / generations.NAME).read_bytes()


def test_another_fitness_or_state_is_a_difference(run, capsys):
    def one_more(records):
        records[1][1].fitness[0] += 1
        return records

    edit(run, one_more)
    code, out, _ = replayed(capsys, run, "--step=4")
    assert (
        code == 1
        and "different: .es.params['params']['MLP_0']['Dense_0']['bias'][0]: " in out
        and "elements differ)" in out
    )


def test_what_cannot_be_rebuilt_is_one_error(run, tmp_path, capsys):
    def refused(run, *arguments):
        code, _, error = replayed(capsys, run, *arguments)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "holds 4 generations, so --step must be 0 to 4; got 5" in refused(run, "--step=5")
    assert "--step must be at least 0; got -1" in refused(run, "--step=-1")
    assert "a run is a folder with config.json" in refused(tmp_path)
    with Run(tmp_path / "ppo", control_config(variant="ppo"), total_steps=1, save_every=1):
        pass
    assert "only runs of evolution (eggroll or openes" in refused(tmp_path / "ppo")
    with Run(tmp_path / "other", {"width": 3}, total_steps=1, save_every=1):
        pass
    assert "has method none" in refused(tmp_path / "other")
    whole = (run / generations.NAME).read_bytes()
    (run / generations.NAME).write_bytes(whole[:100] + b"\0" + whole[101:])
    assert "record 2, byte 76: its CRC-32 differs" in refused(run)
    (run / generations.NAME).write_bytes(whole[76:])
    assert "generation 2 stands where 1 should" in refused(run)
    (run / generations.NAME).unlink()
    assert "cannot be read" in refused(run)
    (run / generations.NAME).write_bytes(whole)
    damaged = next((run / "checkpoints" / "0000000004" / "arrays").rglob(".zarray"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert "checkpoint 0000000004 is unusable" in refused(run, "--step=4") and damaged.is_file()


def test_a_language_model_is_rebuilt_from_its_warm_start(tmp_path, capsys):
    model = save_start(tmp_path / "start")
    config = config_of(model, "steps=3", "save_every=3", "warm_start.steps=5")
    train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / generations.NAME).stat().st_size == 3 * (16 + 8 * 4)
    code, out, _ = replayed(capsys, tmp_path / "run")
    assert code == 0 and "rebuilt step 3" in out and "6.0 a member" in out and "bit for bit" in out
    start = replay.start_of(tmp_path / "run", config)
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, _weights(tmp_path / "run", start)), strict=True)
    ]
    assert all(moved)
    shutil.rmtree(tmp_path / "run" / "warm_start")
    code, _, error = replayed(capsys, tmp_path / "run")
    assert code == 2 and "has no folder warm_start: put it back" in error


def _weights(run, start):
    return (replay.rebuild(run, start, step).params for step in (0, 3))
