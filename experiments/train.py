"""Trains a language model from verified reward, without backprop: the one loop, from prompts to update.

    python -m experiments.train --config=configs/countdown_eggroll.py --workdir=runs/countdown

The same command resumes. Every step: problems -> completions by every member of the population -> verdicts -> fitness ->
update. The model's mean parameters answer held-out problems greedily before the first step, every `eval_every` steps and at
the end, where `result.json` compares the first with the last and `plot.png` is drawn.
"""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

import eggroll
from experiments import build, plot
from rl import supervised, tasks
from rl.config import ConfigError
from rl.data import prompts as data
from rl.data.prompts import Prompts
from rl.models.language import LanguageModel, Params
from rl.models.load import load, save
from rl.models.presets import make, preset
from rl.models.tokenizer import Characters, Tokenizer
from rl.models.transformer import TransformerConfig
from rl.rewards.judge import fill_unjudged, judge, mean_reward, pass_at
from rl.rewards.pool import Pool, PoolError
from rl.rollout import engine
from rl.rollout.engine import Settings
from rl.rollout.generate import generate
from rl.rollout.sampling import GREEDY, Sampling
from rl.run import Run, RunError, launch
from rl.supervised import Examples
from rl.tasks.types import STATUSES, TaskError
from rl.types import FINISHES, Rollouts, Scored

METHODS = {"eggroll": "low-rank noise", "openes": "full-rank noise"}
SCORES = {"solved": "held-out problems solved in %", "reward": "mean reward on held-out problems"}
FITNESS = {"mean": lambda c: mean_reward, "pass_at": lambda c: functools.partial(pass_at, c.k)}


class Setup(NamedTuple):
    """What does not change during a run."""

    config: ml_collections.ConfigDict
    model: LanguageModel
    tokenizer: Tokenizer
    es: eggroll.Strategy
    settings: Settings  # of the engine, for training; evaluation is greedy
    train: Prompts
    test: Prompts
    lessons: Examples | None  # of the warm start
    pool: Pool
    key: jax.Array  # of all sampling


def train(config: ml_collections.ConfigDict, workdir: str | Path, tensorboard: bool = False) -> dict[str, Any]:
    """Runs or resumes a config in a folder; returns what `result.json` holds."""
    build.require(config, "task", "warm_start")
    build.check(config)
    try:
        task = tasks.make(config.task.name, **config.task.options.to_dict())
    except TaskError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.task.options do not fit task {config.task.name}: {error}") from error
    with Pool(task.verify, workers=config.reward.workers, deadline=config.reward.deadline) as pool:
        # All that can be wrong with a config comes before `run`, whose folder remembers it.
        setup, params = set_up(config, task, pool)
        run = Run(
            workdir, config, total_steps=config.steps, save_every=config.save_every, unit="tokens",
            show=("eval_solved", "eval_reward", "train_reward", "fitness_std"), logs=("samples.jsonl",),
            tensorboard=tensorboard,
        )  # fmt: skip
        with run:
            return loop(run, setup, warm_start(run, setup, params))


def loop(run: Run, setup: Setup, params: Params) -> dict[str, Any]:
    """Steps until the run is complete."""
    config, es = setup.config, setup.es
    draw, update = jax.jit(es.draw), jax.jit(es.update, donate_argnums=0)
    state = es.init(params, jax.random.fold_in(jax.random.key(config.seed), 1))
    run.say(plan(setup, state))
    before = evaluate(setup, state.params)
    run.say(f"before training, {len(setup.test)} held-out problems: {describe(before)}")
    state, after = run.restore(state), None
    while run.step < run.total_steps:
        step = run.step + 1
        problems = setup.train.take(data.rows(config.seed, run.step, config.prompts, len(setup.train)))
        requests = data.population_requests(
            problems, es.population.size, config.samples, config.budget, run.step, common=config.common_random_numbers
        )
        rollouts = generate(setup.model, setup.settings, draw(state), requests, setup.key, version=run.step)
        asked = np.tile(np.repeat(np.arange(len(problems)), config.samples), es.population.size)
        texts, scored = verdicts(setup, problems, asked, rollouts)
        state, metrics = update(state, fitness(config, es.population.size, scored))
        metrics |= measures(rollouts, scored)
        if step % config.eval_every == 0 or step == run.total_steps:
            after = evaluate(setup, state.params)
            metrics |= {f"eval_{name}": value for name, value in summary(after).items()}
        shown = range(min(config.log_samples, len(texts)))
        run.log("samples.jsonl", (sample(step, problems, asked, texts, rollouts, scored, row) for row in shown))
        run.record(state, metrics, work=int(rollouts.length.sum()))
    return finish(run, setup, before, evaluate(setup, state.params) if after is None else after)


# -- the parts of a step ---------------------------------------------------------------------------------------------


def verdicts(setup: Setup, problems: Prompts, asked: np.ndarray, rollouts: Rollouts) -> tuple[list[str], Scored]:
    """Texts and verdicts of every row; equal answers to one problem are judged once.

    Args:
        asked: [N], which of `problems` each row answers.
    """
    rows = np.column_stack([asked, np.where(rollouts.mask, rollouts.tokens, -1)])
    _, first, same = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    text = lambda row: data.completion_text(
        setup.tokenizer, problems.ids[asked[row]], rollouts.tokens[row, : rollouts.length[row]], setup.settings.stop
    )
    texts = [text(row) for row in first]
    scored = judge(setup.pool, texts, [problems.problems[asked[row]] for row in first])
    same = same.reshape(-1)
    return [texts[i] for i in same], scored.take(same)


def fitness(config: ml_collections.ConfigDict, members: int, scored: Scored) -> np.ndarray:
    """f32 [members, prompts], higher is better."""
    shape = (members, config.prompts, config.samples)
    scores = FITNESS[config.fitness](config)(scored.value.reshape(shape), scored.ok.reshape(shape))
    return fill_unjudged(scores).astype(np.float32)


def evaluate(setup: Setup, params: Params) -> Scored:
    """The parameters' greedy answers to the held-out problems."""
    requests = data.population_requests(setup.test, 0, 1, setup.config.budget, 0)
    settings = dataclasses.replace(setup.settings, sampling=GREEDY)
    rollouts = generate(setup.model, settings, params, requests, setup.key)
    return verdicts(setup, setup.test, np.arange(len(setup.test)), rollouts)[1]


def summary(scored: Scored) -> dict[str, float]:
    """Mean reward, share solved (reward 1), share without a verdict (which counts as reward 0) and every part's mean."""
    parts = {name: float(np.nanmean(part)) for name, part in scored.parts.items()}
    shares = {"solved": float((scored.value >= 1).mean()), "unjudged": float((~scored.ok).mean())}
    return {"reward": float(scored.value.mean())} | shares | parts


def describe(scored: Scored) -> str:
    """`summary` as text."""
    return ", ".join(f"{name} {value:.3f}" for name, value in summary(scored).items())


def measures(rollouts: Rollouts, scored: Scored) -> dict[str, float]:
    """Metrics of a step's completions."""
    ends = {f"{name}_share": float((rollouts.finish == code).mean()) for code, name in enumerate(FINISHES)}
    statuses = {f"reward_{status}": int((scored.status == status).sum()) for status in STATUSES if status != "ok"}
    rewards = {f"train_{name}": value for name, value in summary(scored).items()}
    surprise = -float(rollouts.logp_full[rollouts.mask].mean())
    return rewards | ends | statuses | {"length_mean": float(rollouts.length.mean()), "surprise": surprise}


def sample(step, problems: Prompts, asked, texts, rollouts: Rollouts, scored: Scored, row: int) -> dict[str, Any]:
    """One line of `samples.jsonl`."""
    problem = problems.problems[asked[row]]
    return {
        "step": step,
        "member": int(rollouts.member[row]),
        "problem": problem.id,
        "prompt": problem.prompt,
        "completion": texts[row],
        "finish": FINISHES[rollouts.finish[row]],
        "reward": float(scored.value[row]),
        "status": str(scored.status[row]),
        "parts": {name: float(part[row]) for name, part in scored.parts.items() if not np.isnan(part[row])},
    }


# -- before and after ------------------------------------------------------------------------------------------------


def set_up(config: ml_collections.ConfigDict, task: tasks.Task, pool: Pool) -> tuple[Setup, Params]:
    """Everything a run needs, and the parameters before the warm start; writes nothing.

    Raises:
        ConfigError: settings out of range, or that do not fit together, the task or the model.
    """
    build.choose("method", config.method, METHODS)
    try:
        model, params, tokenizer = language_model(config, task)
        es = build.strategy(config, model.rules)
        key = jax.random.key(config.seed)
        jax.eval_shape(es.init, params, key)
        one_prompt = np.zeros((1, config.samples))
        build.choose("score", config.score, SCORES)
        build.choose("fitness", config.fitness, FITNESS)(config)(one_prompt, one_prompt == 0)
        if config.samples > 1 and config.sampling.temperature == 0:
            raise ConfigError(
                f"greedy answers to one prompt are all equal; got config.samples = {config.samples} at temperature 0: use 1 "
                "sample, or a temperature above 0"
            )
        train = data.encode(task.problems("train", config.task.problems, config.seed), tokenizer)
        test = data.encode(task.problems("test", config.eval_problems, 0), tokenizer)
        learnt = lessons(config, task, tokenizer)
        ends = tuple(token for token in dict.fromkeys((tokenizer.eos, tokenizer.bos)) if token is not None)
        settings = Settings(
            length=max(train.longest, test.longest) + config.budget, stop=ends,
            sampling=Sampling(**config.sampling.to_dict()), **config.engine.to_dict(),
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    longest = max(settings.length, learnt[0].shape[1] if learnt else 0)
    if isinstance(model.config, TransformerConfig) and longest > model.config.max_length:
        raise ConfigError(
            f"prompts and answers must fit the model's {model.config.max_length} tokens; the longest prompt with its budget "
            f"has {settings.length}, the longest example of the warm start {longest}: lower config.budget, or choose shorter "
            "problems"
        )
    return Setup(config, model, tokenizer, es, settings, train, test, learnt, pool, jax.random.fold_in(key, 3)), params


def language_model(config: ml_collections.ConfigDict, task: tasks.Task) -> tuple[LanguageModel, Params, Tokenizer]:
    """The model of a config: from a checkpoint, or new with the task's alphabet.

    Raises:
        ValueError: neither a path nor an alphabet, a checkpoint without a tokenizer, or one that cannot be read.
        ImportError: a package to read it is not installed.
    """
    c = config.model
    if c.path:
        model, params, tokenizer = load(c.path, dtype=c.dtype, scan_layers=c.scan_layers)
        if tokenizer is None:
            raise ConfigError(f"a checkpoint to train needs its tokenizer.json; {c.path} has none")
        return model, params, tokenizer
    if task.alphabet is None:
        raise ConfigError(
            f"task {task.name} is ordinary text: give a model that reads it, --config.model.path=DIRECTORY (a preset has "
            "no tokenizer)"
        )
    tokenizer = Characters(task.alphabet)
    model = make(preset(c.preset, vocab=tokenizer.size, dtype=c.dtype, scan_layers=c.scan_layers))
    return model, model.init(jax.random.fold_in(jax.random.key(config.seed), 2)), tokenizer


def lessons(config: ml_collections.ConfigDict, task: tasks.Task, tokenizer: Tokenizer) -> Examples | None:
    """Solved problems for the warm start; None where there is none.

    Raises:
        ConfigError: a problem without a solution, or a tokenizer without an end token.
    """
    if not config.warm_start.steps:
        return None
    problems = task.problems("train", config.warm_start.examples, config.seed)
    unsolved = sum(not problem.solution for problem in problems)
    if unsolved or tokenizer.eos is None:
        raise ConfigError(
            f"a warm start needs solutions and an end token; task {task.name} has {unsolved} problems without solution, "
            f"the tokenizer's end token is {tokenizer.eos}: set config.warm_start.steps=0"
        )
    pairs = [data.split_solution(tokenizer, problem.prompt, problem.solution) for problem in problems]
    return supervised.examples(*zip(*pairs, strict=True), tokenizer.eos)


def warm_start(run: Run, setup: Setup, params: Params) -> Params:
    """Supervised training on solved problems, once per workdir: later sessions load what it made.

    Raises:
        RunError: it diverged, or what it made cannot be read.
    """
    c, folder = setup.config.warm_start, run.workdir / "warm_start"
    if setup.lessons is None:
        return params
    if not folder.is_dir():
        params = supervised.fit(
            setup.model, params, setup.lessons, steps=c.steps, batch=c.batch, learning_rate=c.learning_rate,
            seed=setup.config.seed,
            report=lambda step, loss: run.say(f"warm start: step {step}/{c.steps}, {loss:.3f} nats per token"),
        )  # fmt: skip
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise RunError(
                "the warm start ended in parameters that are not finite: lower config.warm_start.learning_rate"
            )
        unfinished = run.workdir / "warm_start.writing"
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished, setup.model, params, setup.tokenizer)
        unfinished.rename(folder)
    try:
        return load(folder, dtype=setup.config.model.dtype, scan_layers=setup.config.model.scan_layers)[1]
    except ValueError as error:
        raise RunError(f"{error}. Delete {folder}, and the same command makes it anew") from error


def plan(setup: Setup, state: eggroll.State) -> str:
    """What the run needs, before it takes it."""
    es = setup.es
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    c, mib, drawn = setup.config, 2**20, jax.eval_shape(es.draw, state)
    rows = es.population.size * c.prompts * c.samples
    weights = sum(x.size for x in jax.tree.leaves(state.params))
    return (
        f"{weights:,} parameters; {es.population.size} members x {c.prompts} prompts x {c.samples} samples = {rows:,} "
        f"completions a step in {setup.settings.slots} slots of {setup.settings.length} tokens\n"
        f"memory: state {size((state.params, state.master, state.opt_state)) / mib:.1f} MiB, noise "
        f"{size((drawn.lefts, drawn.rights)) / mib:.1f} MiB, cache {engine.cache_bytes(setup.model, setup.settings) / mib:.1f} "
        "MiB (config.engine.slots)"
    )


def finish(run: Run, setup: Setup, before: Scored, after: Scored) -> dict[str, Any]:
    """The result, with the paired difference on the same problems and its 95 % interval."""
    solved = [100.0 * (scored.value >= 1) for scored in (before, after)]
    gained = {"solved": solved, "reward": [before.value, after.value]}
    details = {f"unjudged_{when}": int((~s.ok).sum()) for when, s in (("before", before), ("after", after))}
    for name, (old, new) in gained.items():
        half = 1.96 * float(np.std(new - old)) / len(old) ** 0.5
        details |= {f"{name}_before": float(old.mean()), f"{name}_after": float(new.mean())}
        details |= {f"{name}_gain": float((new - old).mean()), f"{name}_gain_interval": half}
    score = setup.config.score
    return run.finish(
        SCORES[score], details[f"{score}_after"], before=details[f"{score}_before"], task=setup.config.task.name,
        method=setup.config.method, problems=len(solved[0]), **details,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    workdir, result = launch(train, argv, errors=(TaskError, PoolError))
    print(
        f"{result['task']}, {result['method']}, seed {result['seed']}: {result['solved_before']:.1f} % -> "
        f"{result['solved_after']:.1f} % of {result['problems']} held-out problems solved (gain {result['solved_gain']:.1f} +- "
        f"{result['solved_gain_interval']:.1f}), mean reward {result['reward_before']:.3f} -> {result['reward_after']:.3f}, "
        f"after {result['tokens']} tokens in {result['seconds']:.0f} s"
    )
    return plot.main([workdir, "--x=tokens", "--y=eval_reward"])


if __name__ == "__main__":
    raise SystemExit(main())
