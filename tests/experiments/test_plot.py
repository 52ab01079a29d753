"""Plots: reading running jobs, grouping seeds, the numbers that are drawn, the PNG."""

import json
import sys

import numpy as np
import pytest

from experiments import plot


def write_run(path, config, values, seconds=1.0, tail=""):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"step": i + 1, "env_steps": 10 * (i + 1), "fitness_mean": v} for i, v in enumerate(values)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    timing = [{"step": row["step"], "seconds": seconds * row["step"]} for row in rows]
    (path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    return path


@pytest.fixture
def paths(tmp_path):
    return [
        write_run(tmp_path / "a0", {"seed": 0, "opt": {"lr": 0.1}, "env": "x"}, [1.0, 2.0, 6.0], seconds=1.0),
        write_run(tmp_path / "b0", {"seed": 0, "opt": {"lr": 0.5}, "env": "x"}, [0.0, 0.5]),
        write_run(tmp_path / "a1", {"seed": 1, "opt": {"lr": 0.1}, "env": "x"}, [3.0, 4.0], seconds=3.0),
    ]


def test_seeds_share_a_curve_and_the_label_says_what_differs(paths):
    groups = plot.group_runs([plot.read_run(path) for path in paths])
    assert [[run.path.name for run in group] for group in groups] == [["a0", "a1"], ["b0"]]
    assert plot.labels(groups) == ["lr=0.1", "lr=0.5"]
    assert plot.labels(groups[:1]) == ["a0"]


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        # Keys that only one of them has say little, and there are many of them.
        (
            [{"method": "eggroll", "es": {"rank": 1}}, {"method": "ppo", "ppo": {"clip": 0.2}}],
            "method=eggroll|method=ppo",
        ),
        # Nothing that both have differs.
        ([{"es": {"rank": 1}}, {"ppo": {"clip": 0.2}}], "r0|r1"),
        # Two of the three would have the same label.
        ([{"m": 1}, {"m": 1, "x": 1}, {"m": 2}], "r0|r1|r2"),
        ([dict.fromkeys("abc", 0), dict.fromkeys("abc", 1)], "a=0, b=0, c=0|a=1, b=1, c=1"),
        ([dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 1)], "r0|r1"),
    ],
)
def test_labels_stay_short_and_different(tmp_path, configs, expected):
    runs = [write_run(tmp_path / f"r{i}", {"seed": i, **config}, [1.0]) for i, config in enumerate(configs)]
    assert plot.labels(plot.group_runs([plot.read_run(run) for run in runs])) == expected.split("|")


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name / "run", dict.fromkeys("abcd", name), [1.0]) for name in ("one", "two")]
    groups = plot.group_runs([plot.read_run(run) for run in runs])
    assert plot.labels(groups) == [str(run) for run in runs]


def test_curve_is_mean_and_range_over_common_steps(paths):
    group = [plot.read_run(paths[0]), plot.read_run(paths[2])]
    curve = plot.make_curve(group, "a", "env_steps", "fitness_mean")
    np.testing.assert_array_equal(curve.x, [10.0, 20.0])
    np.testing.assert_array_equal(curve.mean, [2.0, 3.0])
    np.testing.assert_array_equal(curve.low, [1.0, 2.0])
    np.testing.assert_array_equal(curve.high, [3.0, 4.0])
    np.testing.assert_array_equal(plot.make_curve(group, "a", "seconds", "fitness_mean").x, [2.0, 4.0])
    assert curve.runs == 2


def test_unfinished_last_line_is_left_out_and_nan_is_read(tmp_path):
    path = write_run(tmp_path / "r", {"seed": 0}, [1.0, "nan"], tail='{"step": 3, "fitness_me')
    column = plot.read_run(path).columns["fitness_mean"]
    assert column[1] == 1.0 and np.isnan(column[2]) and set(column) == {1, 2}


def test_metric_drawn_by_default():
    def run(*names):
        return plot.RunData(None, {}, {name: {1: 0.0} for name in ("step", "seconds", *names)})

    assert plot.default_metric([run("loss", "fitness_mean", "eval_return"), run("fitness_mean")]) == "fitness_mean"
    assert plot.default_metric([run("loss", "accuracy")]) == "accuracy"
    with pytest.raises(plot.PlotError, match="no metric in common"):
        plot.default_metric([run("loss"), run("accuracy")])


def test_command_writes_a_png_and_prints_the_last_values(paths, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="extra plot is not installed")
    out = tmp_path / "sub" / "p.png"
    assert plot.main([*map(str, paths), "--x=seconds", "--y=fitness_mean", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "lr=0.1: fitness_mean 3 at seconds 4, runs 2" in printed
    assert "lr=0.5: fitness_mean 0.5 at seconds 2, runs 1" in printed
    header = out.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") == 1050
    assert plot.main([str(paths[0])]) == 0 and (paths[0] / "plot.png").is_file()
    capsys.readouterr()
    assert plot.main([str(paths[0]), f"{paths[0]}/"]) == 0
    assert "at step 3, runs 1\n" in capsys.readouterr().out  # the same folder twice is not two seeds


def test_a_run_with_one_point_can_be_seen(paths, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="extra plot is not installed")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    one = write_run(tmp_path / "one", {"seed": 0}, [1.0])
    for run, marker in ((one, "o"), (paths[0], "None")):
        assert plot.main([str(run)]) == 0
        (line,) = pyplot.gcf().axes[0].lines
        assert line.get_marker() == marker


def test_figures_that_cannot_be_drawn_or_written(paths, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="extra plot is not installed")
    (tmp_path / "file").touch()
    assert plot.main([str(paths[0]), f"--out={tmp_path / 'file' / 'plot.png'}"]) == 2
    assert "plot.png cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(paths[0])]) == 2
    assert "pip install 'eggroll-jax[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--y=loss"], "no column 'loss'; it has: env_steps, fitness_mean"), (["--x=tokens"], "no column 'tokens'")],
)
def test_unknown_columns_are_refused(paths, capsys, arguments, message):
    assert plot.main([str(paths[0]), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_no_runs_are_refused(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert "has none" in capsys.readouterr().err
    empty = write_run(tmp_path / "r", {"seed": 0}, [], tail='{"step"')
    assert plot.main([str(empty)]) == 2
    assert "no complete row of metrics yet" in capsys.readouterr().err
    (empty / "timing.jsonl").write_text('{"step": 1, "seconds": 2.0}\n')
    assert plot.main([str(empty)]) == 2
    assert "no complete row of metrics yet" in capsys.readouterr().err
    for line in ("broken", "[1]", '{"loss": 1}', '{"step": 1, "loss": "low"}', '{"step": 1, "loss": null}'):
        (empty / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        assert plot.main([str(empty)]) == 2
        assert "metrics.jsonl line 2 is not a row of numbers with a step" in capsys.readouterr().err
    for content in ('{"seed"', "[1]"):
        (empty / "config.json").write_text(content)
        assert plot.main([str(empty)]) == 2
        assert "config.json is not the JSON object a job writes" in capsys.readouterr().err
