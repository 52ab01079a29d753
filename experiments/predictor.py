"""Trains the predictor of difficulty that DOTS selects prompts by (`rl.data.selection.dots`) on what runs have measured.

    python -m experiments.predictor runs/uniform --out=predictor.safetensors
    python -m experiments.train --config=configs/dots.py:dots --workdir=runs/dots \\
        --config.selection.predictor=predictor.safetensors

A RUN is the --workdir of `experiments.train`, whatever its method: `judged.jsonl` has the mean reward of every prompt it asked,
step by step, which is how hard the prompt was for the policy of that step. Rewards must be within [0, 1]. All runs, and those
that use the predictor, must start from the same model, whose embeddings it reads.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.evaluate import run_config
from experiments.language import set_up, task_of, warmed
from rl.config import ConfigError
from rl.data.embedding import embed
from rl.data.selection import _predictor as predictor
from rl.run import RunError
from rl.tasks.types import TaskError


def measured(run: Path) -> tuple[np.ndarray, predictor.Logged]:
    """Embeddings f32 [Q, H] of the problems a run trains on, and their difficulty, 1 - mean reward, at every step.

    Raises:
        ConfigError: no run, or one that has measured nothing.
    """
    config, path = run_config(run), run / "judged.jsonl"
    setup, params = set_up(config, task_of(config), pool=None)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = [
        (line["step"], problem, 1 - reward)
        for line in lines
        for problem, reward in zip(line["problem"], line["reward"], strict=True)
        if reward is not None
    ]
    if not known:
        raise ConfigError(
            f"{path} holds the rewards that a predictor learns from, but has none: give a run that has steps"
        )
    step, row, difficulty = (np.array(column) for column in zip(*known, strict=True))
    return embed(setup.model, warmed(run, setup, params), setup.train.ids), predictor.Logged(step, row, difficulty)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.predictor", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", required=True, type=Path, help="the predictor, a safetensors file")
    parser.add_argument("--width", default=896, type=int, help="of its adapters")
    parser.add_argument("--epochs", default=20, type=int)
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)
    if options.width < 1 or options.epochs < 1:
        parser.error(f"--width and --epochs must be at least 1; got {options.width} and {options.epochs}")
    say = lambda epoch, loss: print(f"epoch {epoch + 1}/{options.epochs}: {loss:.4f} nats", file=sys.stderr)
    try:
        embedding, logged = zip(*map(measured, options.runs), strict=True)
        if len({x.shape[1] for x in embedding}) > 1:
            raise ConfigError(f"runs of one model have embeddings of one width; got {[x.shape[1] for x in embedding]}")
        joined = predictor.Logged(
            _through([x.checkpoint for x in logged], [x.checkpoint.max() + 1 for x in logged]),
            _through([x.row for x in logged], [len(x) for x in embedding]),
            np.concatenate([x.difficulty for x in logged]),
        )
        params = predictor.fit(
            np.concatenate(embedding), joined, width=options.width, epochs=options.epochs, seed=options.seed, report=say
        )
    except (ConfigError, RunError, TaskError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    predictor.save(options.out, params)
    print(f"{options.out}: {len(joined.row):,} measurements of {len(np.unique(joined.row))} problems")
    return 0


def _through(numbers: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Those of all runs, counted through."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.concatenate([x + start for x, start in zip(numbers, starts, strict=True)])


if __name__ == "__main__":
    raise SystemExit(main())
