"""Comparisons: every recipe and seed runs once, and what they scored is written down and drawn."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import compare, report
from rl import config as config_lib

CONFIGS = ["configs/control_pendulum.py", "configs/control_pendulum.py:ppo", "configs/digits.py:backprop"]


@pytest.fixture
def started(monkeypatch):
    """Commands that `compare` runs; each writes what a finished run leaves."""
    commands = []

    def run(command, **options):
        commands.append(command[2:4])
        config = command[3].removeprefix("--config=")
        folder = Path(next(c.partition("=")[2] for c in command if c.startswith("--workdir=")))
        seed = int(next(c.partition("=")[2] for c in command if c.startswith("--config.seed=")))
        folder.mkdir(parents=True)
        settings = config_lib.resolved(config_lib.load(config, [f"seed={seed}"]))
        unit, metric = ("env_steps", "eval_return") if "env" in settings else ("examples", "test_accuracy")
        metrics = [{"step": n, unit: 100 * n, metric: 10.0 * n + seed} for n in (1, 2)]
        timing = [{"step": n, "seconds": 1.5 * n} for n in (1, 2)]
        result = {"measure": "mean return", "score": 20.0 + seed, "seed": seed, "seconds": 3.0} | {
            key: settings[key] for key in ("env", "task", "method") if key in settings
        }
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "result.json").write_text(json.dumps(result))
        for name, rows in (("metrics", metrics), ("timing", timing)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(compare.subprocess, "run", run)
    return commands


def test_runs_once_and_writes_scores_curves_and_figure(started, tmp_path):
    arguments = [*CONFIGS, f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out' / 'pair'}", "--seeds=2"]
    compare.main(arguments)
    assert started == [
        [f"experiments.{script}", f"--config={config}"]
        for script, config in zip(("control", "control", "pretrain"), CONFIGS, strict=True)
        for _ in range(2)
    ]
    rows = json.loads((tmp_path / "out" / "pair.json").read_text())
    assert [(row["config"], row["seed"], row["score"]) for row in rows] == [
        (c, s, 20.0 + s) for c in CONFIGS for s in (0, 1)
    ]
    assert [row["name"] for row in rows[::2]] == ["EGGROLL, crossed, rank 1", "PPO", "backprop"]
    assert rows[1]["curve"] == {"env_steps": [100.0, 200.0], "seconds": [1.5, 3.0], "eval_return": [11.0, 21.0]}
    assert rows[-1]["curve"]["test_accuracy"] == [11.0, 21.0]
    assert (tmp_path / "out" / "pair.png").read_bytes().startswith(b"\x89PNG")
    compare.main(arguments)
    assert len(started) == 6  # nothing is run again


def test_rows_by_a_key_panels_by_columns_and_where_a_score_was_reached(tmp_path, monkeypatch):
    """Six finished runs written by hand: 3 steps, evaluated at 1 and 3, completions per step 8, 4, 4."""
    settings = {"task.name": "cipher", "model.preset": "micro-transformer", "model.path": "", "score": "reward"}

    def run(workdir, config, seed):
        method, k = config.split(":")[1].split("_")
        folder = tmp_path / f"{method}_{k}_{seed}"
        folder.mkdir()
        own = {"method": method, "gradient.staleness": int(k), "selection.name": "dots", "replay.name": "none"}
        (folder / "config.json").write_text(json.dumps(settings | own))
        (folder / "result.json").write_text(json.dumps({"score": 50.0, "seed": seed}))
        rows = [{"step": n, "tokens": 10 * n, "completions": 8 if n == 1 else 4, "ess": 1 / n} for n in (1, 2, 3)]
        rows[0]["eval_reward"], rows[2]["eval_reward"] = 0.25, 0.5 + seed / 4
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "timing.jsonl").write_text(
            "".join(json.dumps({"step": n, "seconds": 2 * n}) + "\n" for n in (1, 2, 3))
        )
        return compare.totalled(compare.plot.read_run(folder))

    monkeypatch.setattr(compare, "run", run)
    drawn = []
    monkeypatch.setattr(compare.plot, "draw_grid", lambda grid, out, size: drawn.append((grid, size)))
    configs = [f"configs/x.py:{name}" for name in ("grpo_0", "vcpo_0", "grpo_4")]
    common = [f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", "--seeds=2"]
    spent = ["--budget", "seconds:5", "tokens:30", "completions:7"]
    flags = ["--rows=gradient.staleness", "--reach=0.7", "--panels", "step:eval_reward", "completions:ess", *spent]
    assert compare.main([*configs, *common, *flags]) == 0
    ((first, second), size) = drawn[0]
    assert size == (12, 8)
    assert [(x, y, title) for _, x, y, title, _ in second] == [
        ("step", "eval_reward", "cipher, staleness 4"), ("completions", "ess", "cipher, staleness 4"),
    ]  # fmt: skip
    assert [curve.label for curve in first[0][0]] == [
        f"{m}, dots selection, micro-transformer" for m in ("grpo", "vcpo")
    ]
    assert first[1][0][0].x.tolist() == [8, 12, 16] and first[0][0][0].mean.tolist() == [0.25, 0.625]
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["curve"]["ess"] == [1.0, 1 / 3] and rows[0]["curve"]["completions"] == [8, 16]
    assert [row["reached"] for row in rows[:2]] == [None, {"step": 3, "tokens": 30, "completions": 16, "seconds": 6}]
    assert rows[1]["within"] == {"seconds:5": 0.25, "tokens:30": 0.75, "completions:7": None}


def test_panels_and_keys_that_do_not_exist(started, tmp_path, capsys):
    arguments = [CONFIGS[0], f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}", "--seeds=1"]
    assert compare.main([*arguments, "--rows=gradient.staleness"]) == 2
    assert "--rows=gradient.staleness must be a key of every config" in capsys.readouterr().err
    assert compare.main([*arguments, "--panels", "step:ess"]) == 2
    assert "has no column 'ess'" in capsys.readouterr().err
    assert compare.main([*arguments, "--budget", "seconds:4"]) == 2
    assert "--budget=seconds:4 must be spent by every run" in capsys.readouterr().err
    assert compare.main([*arguments, "--budget", "tokens:1"]) == 2
    assert "has no such column" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--panels", "ess"])
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--budget", "tokens:few"])
    errors = capsys.readouterr().err
    assert "a panel is X:Y" in errors and "a number above 0, not 'tokens:few'" in errors


def test_a_run_of_another_config_is_not_taken_for_this_one(started, tmp_path, capsys):
    arguments = [CONFIGS[0], f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}", "--seeds=1"]
    assert compare.main(arguments) == 0
    config = tmp_path / "runs" / "control_pendulum_0" / "config.json"
    config.write_text(config.read_text().replace('"sigma": 0.1', '"sigma": 0.3'))
    assert compare.main(arguments) == 2
    assert "es.sigma: stored 0.3, this command 0.1" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_that_fail_and_numbers_of_seeds_that_make_no_sense(tmp_path, capfd, monkeypatch):
    arguments = ["configs/digits.py:nope", f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    assert compare.main(arguments) == 2
    errors = capfd.readouterr().err
    assert "unknown variant 'nope'" in errors and not (tmp_path / "runs").exists()
    monkeypatch.setenv("EGGROLL_DATA", str(tmp_path))  # no stories260K there
    assert compare.main(["configs/stories_eggroll.py", *arguments[1:]]) == 2
    errors = capfd.readouterr().err
    assert "stories260K" in errors and "returned non-zero exit status 2" in errors
    assert not (tmp_path / "out.json").exists() and "Traceback" not in errors
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--seeds=0"])
    for jobs in (0, 1 + len(compare._CORES)):
        with pytest.raises(SystemExit):
            compare.main([*arguments, f"--jobs={jobs}"])
        assert f"from 1 to the number of CPU cores, {len(compare._CORES)}; got {jobs}" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell cores apart")
def test_jobs_side_by_side_have_cores_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_CORES", sorted(os.sched_getaffinity(0))[:2])
    together = threading.Barrier(len(compare._CORES), timeout=120)
    command = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]

    def run(workdir, config, seed):
        together.wait()
        return seed, set(map(int, subprocess.run(command, capture_output=True, check=True).stdout.split()))

    monkeypatch.setattr(compare, "run", run)
    before = os.sched_getaffinity(0)
    first, second = compare.run_all(tmp_path, ["a", "b"], len(compare._CORES), jobs=len(compare._CORES))
    for finished in (first, second):
        assert [seed for seed, _ in finished.runs] == list(range(len(compare._CORES)))
        assert sorted(core for _, cores in finished.runs for core in cores) == compare._CORES
    assert os.sched_getaffinity(0) == before


def test_after_a_job_that_fails_none_is_started(tmp_path, monkeypatch):
    started = []

    def run(workdir, config, seed):
        started.append((config, seed))
        time.sleep(0.05)  # a job is longer than it takes to cancel the others
        raise subprocess.CalledProcessError(2, config)

    monkeypatch.setattr(compare, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        compare.run_all(tmp_path, [str(n) for n in range(100)], 3)
    assert len(started) < 100


def test_the_readme_row_of_a_recipe_has_median_every_seed_and_time(started, tmp_path, monkeypatch):
    for name, config in zip(report.FILES, [CONFIGS[0], *CONFIGS[1:] * len(report.FILES)], strict=False):
        compare.main([config, f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / name}", "--seeds=3"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    first, second, _ = (line.strip("| ").split(" | ") for line in report.methods())
    score = "Pendulum-v1: mean return **21** (20, 21, 22)"
    assert first == ["EGGROLL, crossed, rank 1", "`eggroll/strategy.py`", f"`{CONFIGS[0]}`", score, "3 s"]
    assert second == ["PPO", "`rl/control/ppo.py`", f"`{CONFIGS[1]}`", score, "3 s"]


def test_the_default_is_every_method_on_both_environments():
    assert len(compare.DEFAULT) == 10 and len(set(compare.DEFAULT)) == 10
    assert all((report.ROOT / config.partition(":")[0]).is_file() for config in compare.DEFAULT)


def test_integer_runs_are_told_apart():
    named = lambda *changes: compare.name(
        config_lib.flatten(config_lib.resolved(config_lib.load("configs/egg_bytes.py", changes)))
    )
    assert named() == "integers, antithetic, 4096 members, 300 steps"
    assert named("es.noise=rademacher", "es.momentum=2").endswith("300 steps, rademacher, momentum 2")
    assert named("es.faithful=True", "es.members=64") == "integers, antithetic, 64 members, 300 steps, faithful"


def test_how_many_seeds_a_config_has_of_its_own(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compare, "run", lambda workdir, config, seed: ran.append((config, seed)))
    finished = compare.run_all(tmp_path, ["a.py:x@1", "b.py"], seeds=2)
    assert sorted(ran) == [("a.py:x", 0), ("b.py", 0), ("b.py", 1)]
    assert [f.config for f in finished] == ["a.py:x", "b.py"]


@pytest.mark.parametrize("wrong", ["a.py@0", "a.py@x", "a.py@"])
def test_seeds_that_are_none(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([wrong, f"--workdir={tmp_path}"])
    assert f"how many seeds, at least 1; got {wrong}" in capsys.readouterr().err
