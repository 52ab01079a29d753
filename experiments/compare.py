"""Recipes side by side, several seeds each: final scores, learning curves, one figure.

    python -m experiments.compare --workdir=runs/compare
    python -m experiments.compare --workdir=runs/recipes --out=experiments/results/recipes \\
        configs/control_{acrobot,mountaincar_continuous,minatar}.py configs/digits.py{,:backprop}

Runs every CONFIG[:variant] with seeds 0, 1, ... one command after the other, each as its own script would; runs that are
complete are not repeated, unless the config has changed since: that is an error. Then writes OUT.json (what each run
scored, in how much work and time, and its curve) and OUT.png: one row of panels per config file, against work and against
seconds. Without arguments: EGGROLL, OpenES and PPO on CartPole and Pendulum, about 8 minutes on 2 CPU cores.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import plot
from rl import config as config_lib

DEFAULT = tuple(
    f"configs/control_{env}.py{variant}"
    for env in ("cartpole", "pendulum")
    for variant in ("", ":eggroll_independent", ":eggroll_rank4", ":openes", ":ppo")
)
_METRICS = ("eval_return", "test_accuracy", "eval_reward")  # of the mean parameters; a run has one of them
_UNITS = ("env_steps", "examples", "tokens")


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
    return plot.read_run(folder)


def name(settings: dict[str, Any]) -> str:
    """What a resolved, flat config is called: its method and, of evolution, what tells variants apart."""
    known = {"eggroll": "EGGROLL", "openes": "OpenES", "ppo": "PPO", "backprop": "backprop"}
    title = known.get(settings["method"], settings["method"].replace("_", " "))
    if settings["method"] == "eggroll":
        title += f", {settings['es.population']}, rank {settings['es.rank']}"
    if "model.preset" in settings:
        title += f", {Path(settings['model.path']).name or settings['model.preset']}"
    return title


def rows(finished: Finished) -> list[dict[str, Any]]:
    """Score, work, time and curve of each run."""
    out = []
    for data in finished.runs:
        metric, unit = (next(n for n in names if n in data.columns) for names in (_METRICS, _UNITS))
        steps = sorted(data.columns[metric])
        curve = {column: [data.columns[column][step] for step in steps] for column in (unit, "seconds", metric)}
        result = json.loads((data.path / "result.json").read_text())
        out.append({"config": finished.config, "name": name(data.config), **result, "curve": curve})
    return out


def panels(group: Sequence[Finished]) -> list[tuple[list[plot.Curve], str, str, str]]:
    """The variants of one config file, against work and against seconds."""
    first = group[0].runs[0]
    metric, unit = (next(n for n in names if n in first.columns) for names in (_METRICS, _UNITS))
    title = str(next(first.config[key] for key in ("env", "task", "task.name") if key in first.config))
    return [
        ([plot.make_curve(f.runs, name(f.runs[0].config), x, metric) for f in group], x, metric, title)
        for x in (unit, "seconds")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG[:variant]", default=DEFAULT)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--out", default=Path("experiments/results/compare"), type=Path, help="without suffix")
    parser.add_argument("--seeds", default=3, type=int, help="how many")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {options.seeds}")
    configs = dict.fromkeys(options.configs)
    try:
        finished = [Finished(c, [run(options.workdir, c, seed) for seed in range(options.seeds)]) for c in configs]
    except (config_lib.ConfigError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = dict.fromkeys(config.partition(":")[0] for config in configs)
    grid = [panels([f for f in finished if f.config.partition(":")[0] == file]) for file in files]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for f in finished for row in rows(f))
    options.out.with_suffix(".json").write_text(f"[\n{lines}\n]\n")
    plot.draw_grid(grid, options.out.with_suffix(".png"), (12, 4 * len(grid)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
