"""EGGROLL, OpenES and PPO side by side: return against environment steps and against seconds.

    python -m experiments.compare --workdir=runs/compare --out=experiments/results/compare

Runs every variant of `ENVIRONMENTS` with every seed, one command after the other (about 10 minutes on 2 CPU cores), each as
`python -m experiments.control` would; runs that are complete are not repeated. Then writes OUT.json (final returns and the
curves) and OUT.png.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import plot

ENVIRONMENTS = ("cartpole", "pendulum")
VARIANTS = {
    "eggroll": "EGGROLL crossed, rank 1",
    "eggroll_independent": "EGGROLL independent, rank 1",
    "eggroll_rank4": "EGGROLL crossed, rank 4",
    "openes": "OpenES",
    "ppo": "PPO",
}
METRIC = "eval_return"


def run(workdir: Path, environment: str, variant: str, seed: int) -> Path:
    """Runs one job unless it has its result; returns its folder."""
    folder = workdir / f"{environment}_{variant}_{seed}"
    if not (folder / "result.json").is_file():
        config = f"--config=configs/control_{environment}.py:{variant}"
        command = [sys.executable, "-m", "experiments.control", config, f"--workdir={folder}", f"--config.seed={seed}"]
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def summary(runs: Sequence[plot.RunData]) -> list[dict]:
    """Final return, work and time of each run, and its curve."""
    rows = []
    for data in runs:
        result = json.loads((data.path / "result.json").read_text())
        steps = sorted(data.columns[METRIC])
        curve = {name: [data.columns[name][step] for step in steps] for name in ("env_steps", "seconds", METRIC)}
        rows.append({"run": data.path.name, **result, "curve": curve})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--out", default=Path("experiments/results/compare"), type=Path, help="without suffix")
    parser.add_argument("--seeds", default=3, type=int, help="how many")
    options = parser.parse_args(argv)
    panels, rows = [], []
    for environment in ENVIRONMENTS:
        groups = [
            [plot.read_run(run(options.workdir, environment, variant, seed)) for seed in range(options.seeds)]
            for variant in VARIANTS
        ]
        rows += summary([data for group in groups for data in group])
        title = groups[0][0].config["env"]
        panel = lambda x, groups=groups, title=title: (
            [plot.make_curve(g, label, x, METRIC) for g, label in zip(groups, VARIANTS.values(), strict=True)], x, METRIC, title,
        )  # fmt: skip
        panels.append([panel("env_steps"), panel("seconds")])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps({"command": "python -m experiments.compare", "runs": rows}) + "\n")
    plot.draw_grid(panels, options.out.with_suffix(".png"), (12, 8))


if __name__ == "__main__":
    main()
