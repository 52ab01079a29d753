"""Checks the numbers of a config, and builds optimizers, strategies and learners from its blocks (`configs/base.py`)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

import eggroll
from eggroll import integer
from rl import mesh as meshes
from rl import optim
from rl.config import ConfigError, flatten
from rl.data import packing
from rl.data.prompts import Prompts
from rl.learners import evolution, gradient
from rl.learners.types import Learner
from rl.models.language import LanguageModel
from rl.models.presets import make
from rl.objectives.policy_gradient import Objective
from rl.objectives.presets import PRESETS
from rl.objectives.weights import Weight
from rl.rewards.judge import mean_reward, pass_at

EVOLUTION_IN_INTEGERS = "integer"
EVOLUTION = {"eggroll": "low-rank noise", "openes": "full-rank noise"}
FITNESS = {"mean": lambda c: mean_reward, "pass_at": lambda c: functools.partial(pass_at, c.k)}

_OPTAX = (
    optax.adam,
    optax.adamw,
    optax.sgd,
    optax.sign_sgd,
    optax.lion,
    optax.adafactor,
    optax.sm3,
    optax.contrib.muon,
)
_OURS = (
    *(optim.frugal, optim.galore, optim.badam, optim.fira, optim.ldadam, optim.apollo, optim.apollo_mini),
    *(optim.adam_mini, optim.adam8bit),
)
OPTIMIZERS = {make.__name__: make for make in (*_OPTAX, *_OURS)}
SCHEDULES = {
    "constant": lambda c, steps: optax.constant_schedule(c.learning_rate),
    "exponential": lambda c, steps: optax.exponential_decay(c.learning_rate, 1, c.decay),
    "cosine": lambda c, steps: optax.cosine_decay_schedule(c.learning_rate, steps),
    "warmup_cosine": lambda c, steps: optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, round(c.warmup * steps), steps
    ),
}
POPULATIONS = {
    "crossed": lambda c: eggroll.crossed(c.members, blocks=c.blocks),
    "antithetic": lambda c: eggroll.antithetic(c.members),
    "independent": lambda c: eggroll.independent(c.members),
}
SHAPINGS = {
    "zscore": eggroll.fitness.zscore,
    "centred_rank": eggroll.fitness.centred_rank,
    "pair_sign": eggroll.fitness.pair_sign,
}

_COUNTS = (
    *("steps", "save_every", "eval_every", "eval_episodes", "episodes", "batch", "width", "hidden"),
    *("members", "envs", "epochs", "minibatches", "layers", "heads", "kv_heads", "head_dim", "eval_windows"),
    *("problems", "eval_problems", "examples", "prompts", "samples", "budget", "slots", "workers"),
)
_POSITIVE = ("learning_rate", "decay", "sigma", "sigma_decay", "alpha")
_LEAST = {"seed": 0, "warm_start.steps": 0, "log_samples": 0, "refills": 0, "gradient.max_grad_norm": 0, "window": 1}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the numbers that mean the same in every block, before anything is built or written.

    Raises:
      ConfigError: a count below 1, a number below 0 that must not be, a rate, scale or decay that is not positive, or a share
        that is none; names the key.
    """
    for key, value in flatten(config.to_dict()).items():
        if key.startswith("task.options."):
            continue  # a task checks its own
        name = key.rpartition(".")[2]
        smallest = min(value, default=1) if isinstance(value, tuple) else value
        least = _LEAST.get(key, 1 if name in _COUNTS else None)
        if least is not None and smallest < least:
            raise ConfigError(f"config.{key} must be at least {least}, not {value}")
        if name in _POSITIVE and value <= 0:
            raise ConfigError(f"config.{key} must be greater than 0, not {value}")
        if name == "warmup" and not 0 <= value < 1:
            raise ConfigError(f"config.{key} must be at least 0 and below 1, a share of the steps, not {value}")


def require(config: ml_collections.ConfigDict, *keys: str) -> None:
    """Checks that a config is of the kind that a script runs.

    Raises:
      ConfigError: a key is missing; names it.
    """
    missing = [key for key in keys if key not in config]
    if missing:
        raise ConfigError(
            f"this script needs a config with the keys {', '.join(keys)}, but this one has no {', '.join(missing)}: "
            "run it by the command in the config's docstring"
        )


def choose(key: str, name: str, known: Mapping[str, Any]) -> Any:
    """The named entry of a table.

    Raises:
      ConfigError: an unknown name; lists the known ones.
    """
    if name not in known:
        raise ConfigError(f"unknown {key} {name!r}; known: {', '.join(known)}")
    return known[name]


def optimizer(config: ml_collections.ConfigDict, updates: int = 1) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer` for a run of `config.steps` steps of so many updates, which its schedule counts."""
    c = config.optimizer
    schedule = choose("optimizer.schedule", c.schedule, SCHEDULES)(c, config.steps)
    by_step = schedule if updates == 1 else lambda count: schedule(count / updates)
    make = choose("optimizer.name", c.name, OPTIMIZERS)
    try:
        return make(by_step, **c.options.to_dict())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optimizer.options do not fit {c.name}: {error}") from error


def mesh(config: ml_collections.ConfigDict) -> Mesh | None:
    """The devices of `config.mesh`; None: one.

    Raises:
      ConfigError: sizes that do not multiply to the number of devices; several processes on one device each.
    """
    try:
        devices = meshes.make(config.mesh.to_dict())
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    if devices is None and jax.process_count() > 1:
        raise ConfigError(
            f"several processes divide one run over all their devices; got {jax.process_count()} processes with "
            f"{jax.device_count()} devices and sizes of config.mesh that are all 1: set one to -1 (what is left)"
        )
    return devices


def strategy(
    config: ml_collections.ConfigDict, rules: tuple[tuple[str, str], ...] = (), devices: Mesh | None = None
) -> eggroll.Strategy:
    """The evolution strategy of `config.es` with the optimizer of `config.optimizer`; method openes: full-rank noise.

    Raises:
      ConfigError: an unknown name, or settings that do not fit together.
    """
    c = config.es
    rules = (("", "full"),) if config.method == "openes" else (*((pattern, "full") for pattern in c.full), *rules)
    rules = (*((pattern, "frozen") for pattern in c.frozen), *rules)  # the first that fits decides
    try:
        return eggroll.strategy(
            optimizer(config),
            population=choose("es.population", c.population, POPULATIONS)(c),
            rank=c.rank,
            sigma=optax.exponential_decay(c.sigma, 1, c.sigma_decay),
            noise=c.noise,
            rules=rules,
            shaping=choose("es.shaping", c.shaping, SHAPINGS),
            chunk=c.chunk or None,
            **({} if devices is None else {"mesh": devices, "axes": meshes.SPREAD, "layout": meshes.LAYOUT}),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def integer_strategy(config: ml_collections.ConfigDict) -> integer.Strategy:
    """The integer evolution strategy of `config.es` (`configs/egg_bytes.py`) on the devices of `config.mesh`.

    Raises:
      ConfigError: an unknown name, or settings that do not fit together.
    """
    c, devices = config.es, mesh(config)
    populations = {
        "antithetic": lambda: eggroll.antithetic(c.members),
        "crossed": lambda: eggroll.crossed(c.members, blocks=c.blocks, signs=2),
    }
    if c.population == "antithetic" and c.blocks != 1:
        raise ConfigError(
            f"config.es.blocks is of crossed populations; antithetic ones have none, got {c.blocks}: leave it 1"
        )
    try:
        return integer.strategy(
            population=choose("es.population", c.population, populations)(),
            alpha=integer.threshold.schedule(c.alpha, c.alpha_decay, config.steps),
            sigma_shift=c.sigma_shift,
            noise=c.noise,
            momentum=c.momentum,
            faithful=c.faithful,
            chunk=c.chunk or None,
            mesh=devices,  # all of its axes: nothing else is there to divide
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def learner(config: ml_collections.ConfigDict, model: LanguageModel, train: Prompts, stop: tuple[int, ...]) -> Learner:
    """What a config's method is to the loop for language models.

    Args:
      train: the training problems.
      stop: tokens that end an answer.

    Raises:
      ConfigError: an unknown name, or settings that do not fit together.
    """
    choose("method", config.method, EVOLUTION | PRESETS)
    block = "es" if config.method in EVOLUTION else "gradient"
    if block not in config:
        raise ConfigError(
            f"method {config.method} reads config.{block}, which this config does not have: start from a config of that kind, "
            "such as configs/countdown_eggroll.py or configs/countdown_grpo.py"
        )
    if config.method in EVOLUTION:
        return _evolution(config, model)
    try:
        return _gradient(config, model, train, stop)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _evolution(config: ml_collections.ConfigDict, model: LanguageModel) -> Learner:
    fitness = choose("fitness", config.fitness, FITNESS)(config)
    fitness(np.zeros((1, config.samples)), np.zeros((1, config.samples), bool))  # its own errors, before the run
    if config.refills or config.replay.name != "none":
        raise ConfigError(
            "evolution asks every member the same prompts once and learns from this generation alone; got config.refills = "
            f"{config.refills} and config.replay.name = {config.replay.name!r}: set them to 0 and 'none'"
        )
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return evolution.learner(
        strategy(config, model.rules, mesh(config)), fitness, key, common=config.common_random_numbers
    )


def _gradient(config: ml_collections.ConfigDict, model: LanguageModel, train: Prompts, stop) -> Learner:
    c = config.gradient.to_dict()
    weight, tokens, clip = c["objective"].pop("weight"), c.pop("tokens"), c.pop("max_grad_norm")
    objective = Objective(**c.pop("objective"), weight=weight and Weight(**weight))
    options, adapters = tuple(c.pop("advantage_options").items()), c.pop("lora")
    if c.pop("remat"):
        if jax.default_backend() == "cpu" and not model.config.scan_layers:
            raise ConfigError(
                "on a CPU the compiler undoes remat unless layers are scanned; got config.gradient.remat = True and "
                "config.model.scan_layers = False: set both or neither"
            )
        model = make(dataclasses.replace(model.config, remat=True))
    settings = gradient.Settings(
        objective, advantage_options=options, temperature=config.sampling.temperature,
        lora=gradient.Lora(**adapters) if adapters["rank"] else None, **c,
    )  # fmt: skip
    if config.sampling.top_k or config.sampling.top_p < 1 or config.sampling.min_p:
        raise ConfigError(
            "policy gradients need samples of the policy itself; got sampling with top_k, top_p or min_p: set 0, 1.0 and 0.0"
        )
    if settings.routing == "r3" and config.replay.name != "none":
        raise ConfigError(
            "replayed groups do not keep the experts that sampled them, which routing 'r3' would force; got config.replay.name "
            f"= {config.replay.name!r}: set it to 'none', or config.gradient.routing to 'r2'"
        )
    if config.replay.name == "recent" and config.replay.until != settings.reincarnation:
        raise ConfigError(
            "policy reincarnation ends the mixture of recent policies in the step that renews the reference; got "
            f"config.replay.until = {config.replay.until} and config.gradient.reincarnation = {settings.reincarnation}: set "
            "both to one step, or to 0"
        )
    shape = packing.shape(tokens, train.longest, config.budget)
    tx = optimizer(config, settings.minibatches * settings.epochs)
    tx = optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx
    made = gradient.learner(model, tx, settings, shape, train.ids, config.samples, config.seed, stop, mesh(config))
    if config.prompts % settings.minibatches:
        raise ConfigError(
            f"a step's prompts must divide into minibatches; got config.prompts = {config.prompts} and "
            f"config.gradient.minibatches = {settings.minibatches}"
        )
    return made
