"""Evaluates a language model on a task's verified problems: greedy accuracy, pass@k and maj@k, each with its interval.

    python -m experiments.evaluate runs/countdown
    python -m experiments.evaluate runs/countdown --samples=64 --k=1,8,64 --temperature=0.7 --out=countdown.json
    python -m experiments.evaluate --model=Qwen/Qwen3-0.6B --config=configs/gsm8k_eggroll.py \\
        --config.task.options.path=DIRECTORY_OF_GSM8K_JSONL

A RUN is the --workdir of `experiments.train`, finished; task, budget and engine are those of its config. The problems are the
first of those it was evaluated on (`--split=train`: trained on). An answer that no verifier could judge counts as not solved,
and is counted. Intervals are 95 %, mean +- 1.96 standard errors over problems, whose samples are not independent of each
other; where all problems agree the half-width is 0, which of P problems says no more than "within 3 / P" (rule of three).
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import build
from experiments.language import Setup, set_up, task_of, verdicts
from rl import config as config_lib
from rl.config import ConfigError
from rl.data import prompts as data
from rl.data.prompts import Prompts
from rl.rewards.judge import pass_at
from rl.rewards.pool import Pool, PoolError
from rl.rollout.generate import generate
from rl.rollout.sampling import GREEDY, Sampling
from rl.tasks.types import STATUSES, Task, TaskError
from rl.types import FINISHES, Rollouts, Scored

_KEYS = ("task", "model", "warm_start", "budget", "score", "selection", "replay", "engine", "reward")
_USUAL = (1, 4, 8)  # k


class Answered(NamedTuple):
    """Judged completions, sample g of problem p in row p G + g."""

    texts: list[str]
    rollouts: Rollouts
    scored: Scored


def evaluate(
    config: ml_collections.ConfigDict,
    model: str | Path = "",
    *,
    split: str = "test",
    problems: int = 512,
    samples: int = 8,
    ks: Sequence[int] = _USUAL,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Answers problems greedily and by samples.

    Args:
        config: of a run, or any recipe for language models; `sampling.top_k`, `top_p` and `min_p` hold for the samples.
        model: checkpoint directory or name on the hub; `config.model.path` if empty.
        split: "test" or "train".
        problems: P.
        samples: G per problem.
        ks: sizes of the sets of samples that pass@k and maj@k speak of, 1 to G.
        temperature: of the samples.
        seed: of the samples.

    Returns:
        JSON values: the settings; `greedy` and `sampled`, each with `solved` (a share), `reward`, `length`, `finish`,
        `unjudged`; `pass_at` and `maj_at` by k, the latter None where the task's answers cannot be counted. An estimate is
        {"mean", "half"}, of a 95 % interval, None for a single problem.

    Raises:
        ConfigError: settings out of range, or that do not fit together, the task or the model.
        TaskError: an unknown task, option or value.
    """
    _check(samples, ks, temperature, problems, split)
    build.require(config, *_KEYS)
    path = str(model) or config.model.path
    if not path:
        raise ConfigError("a model to evaluate is a checkpoint, but config.model.path is empty: give --model=DIRECTORY")
    asked = ml_collections.ConfigDict(config.to_dict())
    asked.model.path, asked.warm_start.steps = path, 0
    asked.task.problems, asked.eval_problems = (problems, 1) if split == "train" else (1, problems)
    build.check(asked)
    task = task_of(asked)
    with Pool(task.verify, workers=asked.reward.workers, deadline=asked.reward.deadline) as pool:
        setup, params = set_up(asked, task, pool)
        prompts = setup.train if split == "train" else setup.test
        sampling = dataclasses.replace(setup.settings.sampling, temperature=temperature)
        key = jax.random.key(seed)
        greedy = answer(setup, params, prompts, 1, GREEDY, key)
        sampled = answer(setup, params, prompts, samples, sampling, key)
    return {
        "model": path, "task": task.name, "split": split, "problems": problems, "samples": samples, "budget": asked.budget,
        "seed": seed, "sampling": dataclasses.asdict(sampling), "interval": "95 %: mean +- 1.96 standard errors over problems",
        "greedy": describe(greedy, problems), "sampled": describe(sampled, problems), **at_k(task, sampled, problems, ks),
    }  # fmt: skip


def answer(setup: Setup, params, prompts: Prompts, samples: int, sampling: Sampling, key: jax.Array) -> Answered:
    """The model's answers to every prompt, judged."""
    requests = data.population_requests(prompts, 0, samples, setup.config.budget, 0)
    settings = dataclasses.replace(setup.settings, sampling=sampling, record_experts=False)
    rollouts = generate(setup.model, settings, params, requests, key)
    texts, scored = verdicts(setup, prompts, np.repeat(np.arange(len(prompts)), samples), rollouts)
    return Answered(texts, rollouts, scored)


def describe(answered: Answered, problems: int) -> dict[str, Any]:
    """Shares, rewards, lengths in tokens, why answers ended, and how many were not judged, by status."""
    _, rollouts, scored = answered
    by_problem = lambda x: estimate(x.reshape(problems, -1).mean(axis=1))
    length = rollouts.length
    return {
        "solved": by_problem(scored.value >= 1),
        "reward": by_problem(scored.value),
        "length": by_problem(length) | {"median": float(np.median(length)), "longest": int(length.max())},
        "finish": {name: float((rollouts.finish == code).mean()) for code, name in enumerate(FINISHES) if code},
        "unjudged": {status: int((scored.status == status).sum()) for status in STATUSES if status != "ok"},
    }


def at_k(task: Task, sampled: Answered, problems: int, ks: Sequence[int]) -> dict[str, Any]:
    """pass@k and maj@k."""
    solved = (sampled.scored.value >= 1).reshape(problems, -1)
    passed = {str(k): estimate(pass_at(k, solved, np.ones_like(solved))) for k in ks}
    if task.answer_of is None:
        return {"pass_at": passed, "maj_at": None}
    votes = np.array([task.answer_of(text) for text in sampled.texts], object).reshape(problems, -1)
    won = {str(k): estimate([majority_at(k, *row) for row in zip(votes, solved, strict=True)]) for k in ks}
    return {"pass_at": passed, "maj_at": won}


def majority_at(k: int, answers: Sequence[str | None], solved: Sequence[bool]) -> float:
    """Probability that the answer most frequent among k of the n samples solves the problem.

    Over all C(n, k) subsets, exact: the unbiased estimate that pass@k is of the same kind. Of t equally frequent answers each
    is taken with probability 1 / t. A sample without answer (None) has no vote; where nobody votes, nothing is solved.

    Args:
        k: 1 to n.
        answers: the final answer of each sample.
        solved: whether it is right; an answer is right where any sample with it was judged so.
    """
    counts = collections.Counter(answer for answer in answers if answer is not None)
    silent = len(answers) - counts.total()
    favourable = Fraction(0)
    for right in {a for a, won in zip(answers, solved, strict=True) if won and a is not None}:
        for votes in range(1, min(k, counts[right]) + 1):
            # ways[size, ties]: to take `size` of the others, where nobody has more than `votes` and `ties` have as many
            ways = {(size, 0): math.comb(silent, size) for size in range(min(silent, k - votes) + 1)}
            for other in counts.keys() - {right}:
                grown: collections.Counter[tuple[int, int]] = collections.Counter()
                for (size, ties), number in ways.items():
                    for more in range(min(counts[other], votes, k - votes - size) + 1):
                        grown[size + more, ties + (more == votes)] += number * math.comb(counts[other], more)
                ways = grown
            led = sum(Fraction(number, 1 + ties) for (size, ties), number in ways.items() if size == k - votes)
            favourable += math.comb(counts[right], votes) * led
    return float(favourable / math.comb(len(answers), k))


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over problems and half the width of its 95 % interval, 1.96 std (ddof 1) / sqrt(P)."""
    values = np.asarray(values, np.float64)
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(values.mean()), "half": half}


def table(report: dict[str, Any]) -> str:
    """The report as text, in %."""
    greedy, sampled = report["greedy"], report["sampled"]
    lines = [
        f"{report['task']}, {report['split']}: {report['problems']} problems, greedy and {report['samples']} samples at "
        f"temperature {report['sampling']['temperature']:g} ({report['interval']})",
        f"{'greedy':<8} {_percent(greedy['solved'])}",
        *(f"{f'pass@{k}':<8} {_percent(value)}" for k, value in report["pass_at"].items()),
    ]
    if report["maj_at"] is None:
        lines += [f"maj@k    none: task {report['task']} has no final answers to count"]
    else:
        lines += [f"{f'maj@{k}':<8} {_percent(value)}" for k, value in report["maj_at"].items()]
    for name, part in (("greedy", greedy), ("sampled", sampled)):
        unjudged = ", ".join(f"{count} {status}" for status, count in part["unjudged"].items() if count) or "none"
        lines += [
            f"{name}: mean reward {part['reward']['mean']:.3f}, {part['length']['mean']:.1f} tokens (longest "
            f"{part['length']['longest']}, {100 * part['finish']['length']:.1f} % cut off by the budget), unjudged: {unjudged}"
        ]
    return "\n".join(lines)


def _percent(value: dict[str, float | None]) -> str:
    half = "" if value["half"] is None else f" +- {100 * value['half']:.1f}"
    return f"{100 * value['mean']:5.1f}{half} %"


def run_config(run: Path) -> ml_collections.ConfigDict:
    """The config a run was started with.

    Raises:
        ConfigError: no run, or not one's config.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"a run is a folder with config.json, but {run} has none: give the --workdir of a job")
    try:
        return ml_collections.ConfigDict(_tuples(json.loads(path.read_text())))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the JSON object a job writes ({error})") from error


def _tuples(value: Any) -> Any:
    """JSON with tuples for its lists, as configs have them."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check(samples: int, ks: Sequence[int], temperature: float, problems: int, split: str) -> None:
    if split not in ("test", "train"):
        raise ConfigError(f"--split must be test or train; got {split!r}")
    for name, value in (("problems", problems), ("samples", samples)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1; got {value}")
    if not ks or not all(1 <= k <= samples for k in ks):
        raise ConfigError(
            f"every k of --k must be 1 to the number of samples, {samples}; got {tuple(ks)}: raise --samples"
        )
    try:
        Sampling(temperature=temperature)
    except ValueError as error:
        raise ConfigError(f"--temperature: {error}") from error
    if temperature == 0 and samples > 1:
        raise ConfigError(
            f"greedy answers to one prompt are all equal; got --samples={samples} at temperature 0: use 1 sample, or a "
            "temperature above 0"
        )


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a finished job's --workdir")
    parser.add_argument("--config", help="instead of RUN: FILE.py[:variant], with its --config.key=value")
    parser.add_argument("--model", default="", help="checkpoint directory or name on the hub; by default the RUN's")
    parser.add_argument("--split", default="test", help="test or train")
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8, help="per problem")
    parser.add_argument("--k", default=None, help=f"by default those of {','.join(map(str, _USUAL))} up to the samples")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--out", default=None, help="the JSON; by default evaluation.json in RUN, none without RUN")
    arguments, rest = parser.parse_known_args(argv)
    unknown = [argument for argument in rest if not argument.startswith("--config.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments, rest


def _inputs(arguments: argparse.Namespace, overrides: list[str]) -> tuple[ml_collections.ConfigDict, str]:
    """(config, model) of a command line."""
    if (arguments.run is None) == (arguments.config is None):
        raise ConfigError("give either RUN, a job's --workdir, or --config=FILE.py and --model=DIRECTORY")
    if arguments.config is not None:
        return config_lib.load(arguments.config, overrides), arguments.model
    if overrides:
        raise ConfigError(
            f"a RUN has its config, but got {overrides[0]}: give --config=FILE.py and --model=RUN/model instead"
        )
    run = Path(arguments.run)
    config = run_config(run)
    if not arguments.model and not (run / "model").is_dir():
        raise ConfigError(
            f"{run} has no folder model, which a job writes when it ends: resume it by the command that started it, or give "
            "--model=DIRECTORY"
        )
    return config, arguments.model or str(run / "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    arguments, overrides = _parse(argv)
    try:
        config, model = _inputs(arguments, overrides)
        report = evaluate(
            config, model, split=arguments.split, problems=arguments.problems, samples=arguments.samples,
            ks=_ks(arguments.k, arguments.samples), temperature=arguments.temperature, seed=arguments.seed,
        )  # fmt: skip
        print(table(report))
        if arguments.out or arguments.run:
            _write(Path(arguments.out or Path(arguments.run, "evaluation.json")), report)
    except (ConfigError, TaskError, PoolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _ks(text: str | None, samples: int) -> tuple[int, ...]:
    if text is None:
        return tuple(k for k in _USUAL if k <= samples)
    try:
        return tuple(sorted({int(k) for k in text.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--k must be whole numbers with commas between them, such as 1,4,8; got {text!r}") from error


def _write(path: Path, report: dict[str, Any]) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another --out") from error
    print(path)


if __name__ == "__main__":
    raise SystemExit(main())
