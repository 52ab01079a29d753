"""Recipes side by side, several seeds each: final scores, learning curves, one figure.

    python -m experiments.compare --workdir=runs/compare
    python -m experiments.compare --workdir=runs/recipes --out=experiments/results/recipes \\
        configs/control_{acrobot,mountaincar_continuous,minatar}.py configs/digits.py{,:backprop}

Runs every CONFIG[:variant] with seeds 0, 1, ... each as its own script would, one after the other unless `--jobs` says how
many side by side (each then has its share of the CPU cores to itself: small models make poor use of many); runs that are
complete are not repeated, unless the config has changed since: that is an error. Then writes OUT.json (what each run
scored, in how much work and time, and its curve) and OUT.png: one row of panels per config file, against work and against
seconds. Without arguments: EGGROLL, OpenES and PPO on CartPole and Pendulum, about 8 minutes on 2 CPU cores.

    --rows=gradient.staleness           a row of panels per value of this key of the config, not per config file
    --panels step:eval_reward step:ess  X:Y of the panels in a row; Y is in OUT.json, too
    --reach=0.9                         OUT.json has the step, work, completions and seconds at which each run came so far
    --budget seconds:120 tokens:1e6     OUT.json has what each run scored last before it had spent more than that
    CONFIG:variant@1                    one seed of this one, however many of the others
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from experiments import plot
from rl import config as config_lib

DEFAULT = tuple(
    f"configs/control_{env}.py{variant}"
    for env in ("cartpole", "pendulum")
    for variant in ("", ":eggroll_independent", ":eggroll_rank4", ":openes", ":ppo")
)
_METRICS = ("eval_return", "test_accuracy", "test_bits")  # of the mean parameters; a run has one of them
_LOWER_IS_BETTER = ("test_bits",)
_UNITS = ("env_steps", "examples", "tokens")
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
_NAMES = {"eggroll": "EGGROLL", "openes": "OpenES", "ppo": "PPO", "backprop": "backprop"}


class Finished(NamedTuple):
    """The runs of one CONFIG[:variant], a seed each."""

    config: str
    runs: list[plot.RunData]


def run(workdir: Path, config: str, seed: int) -> plot.RunData:
    """Runs one job unless it has its result.

    Raises:
      rl.config.ConfigError: the folder holds another config.
      subprocess.CalledProcessError: the job failed.
    """
    path, _, variant = config.partition(":")
    folder = workdir / "_".join(filter(None, (Path(path).stem, variant, str(seed))))
    if not (folder / "result.json").is_file():
        keys = config_lib.load(config)
        script = "control" if "env" in keys else "train" if "warm_start" in keys else "pretrain"
        flags = [f"--config={config}", f"--workdir={folder}", f"--config.seed={seed}"]
        print(f"{script} {' '.join(flags)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", f"experiments.{script}", *flags], check=True, stdout=sys.stderr)
    stored = json.loads((folder / "config.json").read_text())
    config_lib.check_same(stored, config_lib.resolved(config_lib.load(config, [f"seed={seed}"])), str(folder))
    return totalled(plot.read_run(folder))


def run_all(workdir: Path, configs: Sequence[str], seeds: int, jobs: int = 1) -> list[Finished]:
    """Runs every config with every seed, or as many as an `@` after it says, so many jobs at a time; see `run`. The first that
    fails keeps others from starting.
    """
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(_CORES[job::jobs])

    def pin() -> None:  # this thread, and what it starts
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, shares.get())

    with ThreadPoolExecutor(jobs, initializer=pin) as pool:
        wanted = [(config, int(own or seeds)) for config, _, own in (c.partition("@") for c in configs)]
        each = [(config, [pool.submit(run, workdir, config, seed) for seed in range(n)]) for config, n in wanted]
        try:
            return [Finished(config, [one.result() for one in runs]) for config, runs in each]
        finally:
            pool.shutdown(cancel_futures=True)


def totalled(data: plot.RunData) -> plot.RunData:
    """A run whose column `completions` counts from the start, as its units of work do."""
    each = data.columns.get("completions", {})
    total = dict(zip(sorted(each), itertools.accumulate(each[step] for step in sorted(each)), strict=True))
    return data._replace(columns=data.columns | ({"completions": total} if total else {}))


def name(settings: dict[str, Any]) -> str:
    """What a resolved, flat config is called: its method, and what tells variants of it apart."""
    method = settings["method"]
    title = _NAMES.get(method, method.replace("_", " "))
    if method == "integer":
        title = f"integers, {settings['es.population']}, {settings['es.members']} members, {settings['steps']} steps"
        noise = settings["es.noise"] if settings["es.noise"] != "gaussian" else ""
        momentum = f"momentum {settings['es.momentum']}" if settings["es.momentum"] else ""
        return ", ".join(filter(None, (title, noise, momentum, "faithful" if settings["es.faithful"] else "")))
    if method == "eggroll":
        title += f", {settings['es.population']}, rank {settings['es.rank']}"
    if settings.get("optimizer.name", "adam") != "adam":
        start = "optimizer.options."
        options = [f"{key.removeprefix(start)} {value}" for key, value in settings.items() if key.startswith(start)]
        other = " ".join([settings["optimizer.name"].replace("_", " "), *options])
        title = other if method == "backprop" else f"{title}, {other}"
    for key, usual in (("selection.name", "uniform"), ("replay.name", "none")):
        if settings.get(key, usual) != usual:
            title += f", {settings[key]} {key.partition('.')[0]}"
    if "model.preset" in settings:
        title += f", {Path(settings['model.path']).name or settings['model.preset']}"
    return title


def measured(data: plot.RunData) -> tuple[str, str]:
    """(metric of the mean parameters, unit of work) of a run; of a language model the metric that its config has as `score`."""
    known = [f"eval_{data.config['score']}"] if "score" in data.config else _METRICS
    metric, unit = (next(n for n in names if n in data.columns) for names in (known, _UNITS))
    return metric, unit


def reached(data: plot.RunData, least: float) -> dict[str, float] | None:
    """Where the mean parameters first scored so well: step, work, seconds; None if they never did."""
    metric, unit = measured(data)
    sign = -1 if metric in _LOWER_IS_BETTER else 1
    step = next((n for n, score in sorted(data.columns[metric].items()) if sign * score >= sign * least), None)
    known = [column for column in (unit, "completions", "seconds") if column in data.columns]
    return None if step is None else {"step": step} | {column: data.columns[column][step] for column in known}


def within(data: plot.RunData, column: str, most: float) -> float | None:
    """What the mean parameters scored at their last evaluation before the run had spent more; None if there was none.

    Raises:
      rl.config.ConfigError: the run ended before it had spent so much, or has no such column.
    """
    metric, _ = measured(data)
    spent = data.columns.get(column, {})
    if not spent or max(spent.values()) < most:
        total = f"{max(spent.values()):g} of it" if spent else "no such column"
        raise config_lib.ConfigError(f"--budget={column}:{most:g} must be spent by every run; {data.path} has {total}")
    scores = [score for step, score in sorted(data.columns[metric].items()) if spent[step] <= most]
    return scores[-1] if scores else None


def rows(
    finished: Finished,
    shown: Sequence[str] = (),
    reach: float | None = None,
    budgets: Sequence[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
    """Score, work, time and curve of each run, with these columns beside the usual ones."""
    out = []
    for data in finished.runs:
        metric, unit = measured(data)
        steps = sorted(data.columns[metric])
        columns = dict.fromkeys((unit, "seconds", metric, *(y for y in shown if y != "step")))
        curve = {column: [data.columns[column].get(step) for step in steps] for column in columns}
        result = json.loads((data.path / "result.json").read_text())
        far = {} if reach is None else {"reach": reach, "reached": reached(data, reach)}
        if budgets:
            far["within"] = {f"{x}:{most}": within(data, x, float(most)) for x, most in budgets}
        out.append({"config": finished.config, "name": name(data.config), **result, **far, "curve": curve})
    return out


def panels(group: Sequence[Finished], axes: Sequence[tuple[str, str]] = (), key: str = "") -> list[plot.Panel]:
    """The runs of one row, against work and against seconds unless `axes` says (x, y)."""
    first = group[0].runs[0]
    metric, unit = measured(first)
    title = str(next(first.config[name] for name in ("env", "task", "task.name") if name in first.config))
    if key:
        title += f", {key.rpartition('.')[2]} {first.config[key]}"
    return [
        plot.Panel(
            [plot.make_curve(f.runs, name(f.runs[0].config), x, y) for f in group],
            x,
            y,
            title,
            first.reference if y == metric else {},
        )
        for x, y in axes or ((unit, metric), ("seconds", metric))
    ]


def grouped(finished: Sequence[Finished], key: str = "") -> list[list[Finished]]:
    """The rows of panels: of one config file, or of one value of the key.

    Raises:
      rl.config.ConfigError: a config without the key.
    """
    out: dict[str, list[Finished]] = {}
    for one in finished:
        config = one.runs[0].config
        if key and key not in config:
            raise config_lib.ConfigError(
                f"--rows={key} must be a key of every config; {one.config} has none of that name"
            )
        out.setdefault(str(config[key]) if key else one.config.partition(":")[0], []).append(one)
    return list(out.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG[:variant][@seeds]", default=DEFAULT)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--out", default=Path("experiments/results/compare"), type=Path, help="without suffix")
    parser.add_argument("--seeds", default=3, type=int, help="how many")
    parser.add_argument("--jobs", default=1, type=int, help="how many runs side by side")
    parser.add_argument("--rows", default="", metavar="KEY", help="of the config: a row of panels per value")
    parser.add_argument("--panels", default=(), nargs="+", metavar="X:Y", type=_axes, help="columns of the metrics")
    parser.add_argument("--reach", default=None, type=float, metavar="SCORE", help="report where each run reached it")
    parser.add_argument(
        "--budget", default=(), nargs="+", metavar="X:MOST", type=_budget, help="report the score there"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    if not 1 <= options.jobs <= len(_CORES):
        parser.error(f"--jobs must be from 1 to the number of CPU cores, {len(_CORES)}; got {options.jobs}")
    configs = list(dict.fromkeys(options.configs))
    wrong = [c for c in configs if "@" in c and not c.partition("@")[2].strip("0").isdigit()]
    if wrong:
        parser.error(f"after an @ comes how many seeds, at least 1; got {', '.join(wrong)}")
    try:
        finished = run_all(options.workdir, configs, options.seeds, options.jobs)
        grid = [panels(group, options.panels, options.rows) for group in grouped(finished, options.rows)]
        shown = dict.fromkeys(column for axes in options.panels for column in axes)
        results = [row for f in finished for row in rows(f, shown, options.reach, options.budget)]
    except (config_lib.ConfigError, plot.PlotError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(map(json.dumps, results))
    options.out.with_suffix(".json").write_text(f"[\n{lines}\n]\n")
    plot.draw_grid(grid, options.out.with_suffix(".png"), (6 * len(grid[0]), 4 * len(grid)))
    return 0


def _axes(text: str) -> tuple[str, str]:
    x, separator, y = text.partition(":")
    if not (x and separator and y):
        raise argparse.ArgumentTypeError(f"a panel is X:Y, two columns of the metrics, not {text!r}")
    return x, y


def _budget(text: str) -> tuple[str, str]:
    column, _, most = text.partition(":")
    try:
        if column and float(most) > 0:
            return column, most
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a budget is X:MOST, a column of the metrics and a number above 0, not {text!r}")


if __name__ == "__main__":
    raise SystemExit(main())
