"""What every script for language models shares: model, task and engine of a config, the warm start, verdicts."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import build
from rl import mesh as meshes
from rl import slots as slots_lib
from rl import supervised, tasks
from rl.config import ConfigError
from rl.data import prompts as data
from rl.data import replay, selection
from rl.data.prompts import Prompts
from rl.learners.types import Learner
from rl.models.language import LanguageModel, Params
from rl.models.load import load, save
from rl.models.presets import make, preset
from rl.models.tokenizer import Characters, Tokenizer
from rl.models.transformer import TransformerConfig
from rl.rewards.judge import judge
from rl.rewards.pool import Pool
from rl.rollout.engine import Settings
from rl.rollout.generate import generate
from rl.rollout.sampling import GREEDY, Sampling
from rl.run import Run, RunError
from rl.slots import Slot
from rl.supervised import Examples
from rl.tasks.types import TaskError
from rl.types import Rollouts, Scored

SCORES = {"solved": "held-out problems solved in %", "reward": "mean reward on held-out problems"}


class Setup(NamedTuple):
    """What does not change during a run."""

    config: ml_collections.ConfigDict
    model: LanguageModel
    tokenizer: Tokenizer
    learner: Learner
    selection: Slot
    replay: Slot
    settings: Settings  # of the engine, for training; evaluation is greedy
    train: Prompts
    test: Prompts
    lessons: Examples | None  # of the warm start
    pool: Pool
    key: jax.Array  # of all sampling


def set_up(config: ml_collections.ConfigDict, task: tasks.Task, pool: Pool) -> tuple[Setup, Params]:
    """Everything a run needs, and the parameters before the warm start; writes nothing.

    Raises:
        ConfigError: settings out of range, or that do not fit together, the task or the model.
    """
    try:
        build.choose("score", config.score, SCORES)
        model, params, tokenizer = language_model(config, task)
        train = data.encode(task.problems("train", config.task.problems, config.seed), tokenizer)
        test = data.encode(task.problems("test", config.eval_problems, 0), tokenizer)
        learnt = lessons(config, task, tokenizer)
        ends = tuple(token for token in dict.fromkeys((*tokenizer.ends, tokenizer.bos)) if token is not None)
        method = build.learner(config, model, train, ends)
        jax.eval_shape(method.init, params)
        if config.samples > 1 and config.sampling.temperature == 0:
            raise ConfigError(
                f"greedy answers to one prompt are all equal; got config.samples = {config.samples} at temperature 0: use 1 "
                "sample, or a temperature above 0"
            )
        slots = [slots_lib.bind(f"rl.data.{name}", config[name]) for name in ("selection", "replay")]
        blank = lambda: np.zeros((len(train), model.config.width))
        start_slots(config, *slots, len(train), blank)  # their own errors, before the run
        settings = Settings(
            length=max(train.longest, test.longest) + config.budget, stop=ends,
            sampling=Sampling(**config.sampling.to_dict()), record_experts=method.record_experts, mesh=build.mesh(config),
            **config.engine.to_dict(),
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
    key = jax.random.fold_in(jax.random.key(config.seed), 3)
    return Setup(config, model, tokenizer, method, *slots, settings, train, test, learnt, pool, key), params


def start_slots(config: ml_collections.ConfigDict, chosen: Slot, kept: Slot, pool: int, embed) -> tuple[Any, Any]:
    """First states of prompt selection and replay.

    Args:
        pool: how many training problems there are.
        embed: see `rl.data.selection.Pool`.

    Raises:
        ValueError: a key of theirs out of range.
    """
    shape = replay.Shape(config.prompts, config.samples, config.budget, config.seed)
    return chosen.init(selection.Pool(pool, config.seed, embed)), kept.init(shape)


def task_of(config: ml_collections.ConfigDict) -> tasks.Task:
    """The task of a config.

    Raises:
        TaskError: an unknown task, option or value.
        ConfigError: options of the wrong type or number.
    """
    try:
        return tasks.make(config.task.name, **config.task.options.to_dict())
    except TaskError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.task.options do not fit task {config.task.name}: {error}") from error


def export(folder: Path, setup: Setup, params: Params) -> None:
    """Writes parameters as a checkpoint in Hugging Face's layout, all of it or nothing.

    Of several processes, which all call this, the first writes, and all return when the folder is there.
    """
    params = meshes.on_host(params)
    if meshes.is_main():
        unfinished = folder.with_name(f"{folder.name}.writing")
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished, setup.model, params, setup.tokenizer)
        unfinished.rename(folder)
    meshes.agreed(0)


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
    if not meshes.agreed(folder.is_dir())[0]:
        params = supervised.fit(
            setup.model, params, setup.lessons, steps=c.steps, batch=c.batch, learning_rate=c.learning_rate,
            seed=setup.config.seed,
            report=lambda step, loss: run.say(f"warm start: step {step}/{c.steps}, {loss:.3f} nats per token"),
        )  # fmt: skip
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            raise RunError(
                "the warm start ended in parameters that are not finite: lower config.warm_start.learning_rate"
            )
        export(folder, setup, params)
    return warmed(run.workdir, setup, params)


def warmed(workdir: Path, setup: Setup, params: Params) -> Params:
    """What a run's warm start made, or the parameters before it where it has none.

    Raises:
        RunError: what it made cannot be read.
    """
    folder, c = workdir / "warm_start", setup.config.model
    if not folder.is_dir():
        return params
    try:
        return load(folder, dtype=c.dtype, scan_layers=c.scan_layers)[1]
    except ValueError as error:
        raise RunError(f"{error}. Delete {folder}, and the same command makes it anew") from error


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


def evaluate(setup: Setup, params: Params) -> Scored:
    """The parameters' greedy answers to the held-out problems."""
    requests = data.population_requests(setup.test, 0, 1, setup.config.budget, 0)
    settings = dataclasses.replace(setup.settings, sampling=GREEDY, record_experts=False)
    rollouts = generate(setup.model, settings, params, requests, setup.key)
    return verdicts(setup, setup.test, np.arange(len(setup.test)), rollouts)[1]
