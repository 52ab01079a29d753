"""Draws runs: `python -m experiments.plot RUN [RUN...] [--x=step|<unit>|seconds] [--y=name] [--out=file.png]`.

Reads `config.json`, `metrics.jsonl` and `timing.jsonl` of finished or running jobs. Runs whose configs differ in `seed`
alone are one curve: the mean, with a band from the smallest to the largest. Several curves share the axes; the legend
names the keys in which their configs differ, or their folders where that would be long. A line a running job has not
finished writing is left out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rl import config as config_lib

_MOST_KEYS = 3  # of a config, in a label
# The first that a run has is drawn.
_PREFERRED = ("eval_return", "test_accuracy", "test_bits", "return_mean", "fitness_mean")


class PlotError(ValueError):
    """Runs that cannot be drawn as asked."""


class RunData(NamedTuple):
    """One working directory, read."""

    path: Path
    config: dict[str, Any]  # flat: dotted key to value
    columns: dict[str, dict[int, float]]  # name to {step: value}; metrics, timing, and at the last step the result
    reference: dict[str, float] = {}  # what others score, by name: lines in the figure of the preferred metric


class Curve(NamedTuple):
    """Runs that differ in the seed alone, on a common x."""

    label: str
    x: np.ndarray  # [points]
    mean: np.ndarray  # [points]
    low: np.ndarray  # [points] smallest over runs
    high: np.ndarray  # [points] largest over runs
    runs: int


def read_run(path: str | Path) -> RunData:
    """Reads a working directory.

    Raises:
      PlotError: it has no `config.json` or no complete row of metrics, or a file that a job did not write.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise PlotError(f"a run is a folder with config.json, but {path} has none: give the --workdir of a job")
    try:
        config = config_lib.flatten(json.loads((path / "config.json").read_text()))
    except (ValueError, AttributeError) as error:
        raise PlotError(f"{path / 'config.json'} is not the JSON object a job writes ({error})") from error
    metrics, timing = _read_rows(path / "metrics.jsonl"), _read_rows(path / "timing.jsonl")
    if not metrics:
        raise PlotError(f"{path} has no complete row of metrics yet: wait for its first step")
    columns: dict[str, dict[int, float]] = {}
    for rows in (metrics, timing):
        for step, row in rows.items():
            for key, value in row.items():
                columns.setdefault(key, {})[step] = value
    result = _read_result(path / "result.json")
    for key, value in result.items():
        if key not in columns and isinstance(value, int | float):
            columns[key] = {max(metrics): value}
    return RunData(path, config, columns, result.get("reference_bits", {}))


def _read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def group_runs(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Groups runs whose configs agree in everything but `seed`, in order of first appearance."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if k != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def labels(groups: Sequence[Sequence[RunData]]) -> list[str]:
    """One label per group: the keys that all configs have and in which they differ, if up to three of them tell every
    group from the others; else the name of the group's first folder, or its whole path where names repeat."""
    configs, paths = [group[0].config for group in groups], [group[0].path for group in groups]
    keys = sorted(set.intersection(*({*config} for config in configs)) - {"seed"})
    differing = [key for key in keys if len({json.dumps(config[key]) for config in configs}) > 1]
    by_key = [", ".join(f"{key.split('.')[-1]}={config[key]}" for key in differing) for config in configs]
    if len(groups) > 1 and len(differing) <= _MOST_KEYS and len({*by_key}) == len(groups):
        return by_key
    names = [path.resolve().name for path in paths]
    return names if len({*names}) == len(names) else [str(path) for path in paths]


def make_curve(group: Sequence[RunData], label: str, x: str, y: str) -> Curve:
    """Mean, minimum and maximum over runs at the steps that all of them have reached.

    Args:
      group: runs that differ in the seed alone.
      label: text for the legend.
      x: `step`, or a column such as `env_steps` or `seconds` (averaged over the runs).
      y: a metric; rows without it are left out.

    Returns:
      A `Curve` sorted by step. Non-finite values are kept: they leave gaps.

    Raises:
      PlotError: a run has no such column, or the runs share no step.
    """
    for run in group:
        for name in (x, y):
            if name not in run.columns:
                raise PlotError(f"{run.path} has no column {name!r}; it has: {', '.join(sorted(run.columns))}")
    steps = sorted(set.intersection(*({*run.columns[x]} & {*run.columns[y]} for run in group)))
    if not steps:
        raise PlotError(f"the runs of {label} share no step with {y!r}: wait until each of them has one")
    x_rp, y_rp = (np.array([[run.columns[name][step] for step in steps] for run in group]) for name in (x, y))
    return Curve(label, x_rp.mean(0), y_rp.mean(0), y_rp.min(0), y_rp.max(0), len(group))


class Panel(NamedTuple):
    """One pair of axes."""

    curves: Sequence[Curve]
    x: str
    y: str
    title: str = ""
    levels: Mapping[str, float] = {}  # horizontal lines, by name


def default_metric(runs: Sequence[RunData]) -> str:
    """The metric drawn without `--y`: the first preferred one that every run has, else the first common metric."""
    common = set.intersection(*({*run.columns} for run in runs))
    for name in _PREFERRED:
        if name in common:
            return name
    rest = sorted(common - {"step", "seconds", "steps_per_second", "checkpoint_fallbacks"})
    if not rest:
        raise PlotError("the runs have no metric in common: draw them one by one")
    return rest[0]


def draw(panel: Panel, out: str | Path) -> None:
    """Writes a PNG with every curve and its band."""
    draw_grid([[panel]], out, (7, 4.5))


def draw_grid(panels: Sequence[Sequence[Panel]], out: str | Path, size) -> None:
    """Writes a PNG of rows of panels; size is (width, height) in inches.

    Raises:
      PlotError: matplotlib is missing, or `out` cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("figures need matplotlib: pip install 'eggroll-jax[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(panels), len(panels[0]), figsize=size, layout="constrained", squeeze=False)
    for row, row_axes in zip(panels, grid, strict=True):
        for (curves, x, y, title, levels), axes in zip(row, row_axes, strict=True):
            for curve in curves:
                label = f"{curve.label} ({curve.runs} seeds)" if curve.runs > 1 else curve.label
                marker = "o" if len(curve.x) == 1 else None  # a line needs two points to be seen
                (line,) = axes.plot(curve.x, curve.mean, label=label, linewidth=1.5, marker=marker)
                if curve.runs > 1 and len(curve.x) == 1:
                    axes.vlines(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.5)
                elif curve.runs > 1:
                    axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
            for name, level in levels.items():
                axes.axhline(level, color="gray", linestyle="--", linewidth=1)
                axes.annotate(
                    name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize="small"
                )
            axes.set(xlabel={"seconds": "wall-clock seconds"}.get(x, x.replace("_", " ")), ylabel=y.replace("_", " "))
            axes.set_title(title)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150, format="png")
    except OSError as error:
        raise PlotError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    finally:
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plot", description="Draws finished or running jobs as a PNG."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a job's --workdir")
    parser.add_argument("--x", default="step", help="step, seconds, or a unit of work such as env_steps")
    parser.add_argument("--y", default=None, help="the metric; by default the first usual one")
    parser.add_argument("--out", default=None, help="the PNG; by default plot.png in the first RUN")
    arguments = parser.parse_args(argv)
    try:
        runs = [read_run(run) for run in {Path(run).resolve(): run for run in arguments.runs}.values()]
        y = arguments.y or default_metric(runs)
        groups = group_runs(runs)
        curves = [make_curve(g, label, arguments.x, y) for g, label in zip(groups, labels(groups), strict=True)]
        out = Path(arguments.out or runs[0].path / "plot.png")
        draw(Panel(curves, arguments.x, y, levels=runs[0].reference if y == "test_bits" else {}), out)
    except PlotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for curve in curves:
        print(f"{curve.label}: {y} {curve.mean[-1]:.6g} at {arguments.x} {curve.x[-1]:.6g}, runs {curve.runs}")
    print(out)
    return 0


def _read_rows(path: Path) -> dict[int, dict[str, float]]:
    """The complete rows of a file that may still be written to, by step."""
    if not path.is_file():
        return {}
    complete = path.read_bytes().rpartition(b"\n")[0]
    rows = {}
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            row = {key: float(value) for key, value in json.loads(line).items()}
            rows[int(row["step"])] = row
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PlotError(
                f"{path} line {number} is not a row of numbers with a step ({type(error).__name__}: {error}): the file "
                "was changed by something else"
            ) from error
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
