"""Supervised training without backprop, and with it for comparison, on the same network, data and optimizer.

    python -m experiments.pretrain --config=configs/digits.py --workdir=runs/digits
    python -m experiments.pretrain --config=configs/digits.py:backprop --workdir=runs/digits_backprop
    python -m experiments.pretrain --config=configs/pretrain_bytes_adamw.py --workdir=runs/bytes_adamw
    python -m experiments.pretrain --config=configs/egg_bytes.py --workdir=runs/egg

The task (`experiments.pretrain_tasks`) gives the network, the arrays and a score; the method turns scores into an update. All
methods and optimizers see the same minibatches: they depend on the seed and the step alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from eggroll import integer
from experiments import build, plot
from experiments.pretrain_tasks import TASKS, Batch, Metrics, Task
from rl.config import ConfigError
from rl.launch import launch
from rl.learners.types import tree_bytes
from rl.run import Run

Step = Callable[[Any, Batch], tuple[Any, Metrics]]
_MOST_BITS = 382  # 1/16 bits that a byte can cost in integers


class Method(NamedTuple):
    """How scores become updates."""

    state: Any  # at step 0, with `params` and `opt_state`
    step: Step  # (state, batch) -> (state, metrics)
    readable: Callable[[Metrics], Metrics] = lambda metrics: metrics  # what is recorded of them


class BackpropState(NamedTuple):
    """What backprop carries from step to step."""

    params: Any
    opt_state: optax.OptState
    carry: Any = None  # what rows remember


class IntegerState(NamedTuple):
    """What evolution in integers carries from step to step."""

    es: integer.State
    carry: Any  # what members remember, [N, ...]

    @property
    def params(self) -> Any:
        """int8."""
        return self.es.params

    @property
    def opt_state(self) -> Any:
        """int16 momentum, or None."""
        return self.es.momentum


def eggroll_method(config: ml_collections.ConfigDict, task: Task) -> Method:
    """Low-rank evolution strategy: a member's fitness is its mean score over the minibatch."""
    if task.carry is not None:
        raise ConfigError(
            f"config.method = {config.method!r} evolves models without memory; use 'integer' or 'backprop'"
        )
    es = build.strategy(config, task.rules)

    def step(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        return es.update(state, es.evaluate(state, task.score, batch))

    return Method(es.init(task.params, jax.random.key(config.seed)), step)


def integer_method(config: ml_collections.ConfigDict, task: Task) -> Method:
    """Evolution in integers: members carry what their rows remember; the compiled step has no float."""
    if task.carry is None:
        raise ConfigError(
            f"config.method = {config.method!r} needs an integer task, 'streams'; got task {config.task!r}"
        )
    build.require(config, "es", "mesh", "tokens")
    if config.es.faithful != config.model.faithful:
        raise ConfigError(
            f"config.es.faithful and config.model.faithful go together; got {config.es.faithful} and {config.model.faithful}"
        )
    es = build.integer_strategy(config)
    try:
        rows = es.rows(config.batch)
    except ValueError as error:
        raise ConfigError(f"config.batch does not fit the population of config.es: {error}") from error
    most = config.tokens * rows * _MOST_BITS
    if most >= 2**31 or most * es.population.size >= 2**41:  # of one, of the sum for their mean
        raise ConfigError(
            f"scores of {config.tokens} tokens x {rows} rows of {es.population.size} members could overflow: use fewer tokens "
            "or rows (config.batch)"
        )
    unit = integer.arithmetic.ONE * config.tokens * rows
    size = sum(x.size for x in jax.tree.leaves(task.params))

    def step(state: IntegerState, batch: Batch) -> tuple[IntegerState, Metrics]:
        scores, carry = es.evaluate(state.es, task.score, state.carry, batch)
        used = None if config.es.faithful else _used(state.params, batch)
        after, metrics = es.update(state.es, scores, used)
        return IntegerState(after, carry), metrics

    def readable(metrics: Metrics) -> Metrics:
        share = {"fitness_mean": metrics["score_mean"] / unit, "moved_share": metrics["moved"] / size}
        return share | {"ties": metrics["ties"], "limit": metrics["limit"]}

    state = IntegerState(es.init(task.params, jax.random.key(config.seed)), es.carry(task.carry(rows)))
    return Method(state, step, jax.jit(readable))


def _used(params: Any, batch: Batch) -> Any:
    """Which parameters a batch tells anything of: of the embedding, those of the bytes that it has."""
    used = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, bool), params)
    seen = jnp.zeros(params["embed"].shape[0], bool).at[batch["inputs"].reshape(-1)].set(True)
    return used | {"embed": seen[:, None]}


def backprop_method(config: ml_collections.ConfigDict, task: Task) -> Method:
    """Gradient of the mean score over the minibatch; where rows remember, through one step, not into the one before.

    Raises:
      ConfigError: an optimizer that cannot take these parameters.
    """
    build.require(config, "optimizer")
    if task.carry is not None and config.model.faithful:
        raise ConfigError("config.model.faithful is of integers: f32 divides by exact roots")
    tx = build.optimizer(config)
    try:
        opt_state = tx.init(task.params)
    except ValueError as error:
        raise ConfigError(f"config.optimizer does not fit the model: {error}") from error

    def loss(params: Any, carry: Any, batch: Batch) -> tuple[jax.Array, Any]:
        if carry is None:
            return -jnp.mean(jax.vmap(task.score, in_axes=(None, 0))(params, batch)), None
        total, carry = task.score(params, carry, batch)
        return -total / (integer.arithmetic.ONE * config.batch * config.tokens), carry

    def step(state: BackpropState, batch: Batch) -> tuple[BackpropState, Metrics]:
        (value, carry), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, state.carry, batch)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        metrics = {"fitness_mean": -value, "gradient_norm": optax.tree.norm(gradient)}
        return BackpropState(optax.apply_updates(state.params, updates), opt_state, carry), metrics

    carry = None if task.carry is None else task.carry(config.batch)
    return Method(BackpropState(task.params, opt_state, carry), step)


METHODS = {"eggroll": eggroll_method, build.EVOLUTION_IN_INTEGERS: integer_method, "backprop": backprop_method}


def train_step(method: Method, task: Task) -> Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]:
    """The compiled step: (state, which is donated, the task's arrays, number of the step) -> (state, metrics)."""
    return jax.jit(lambda state, train, number: method.step(state, task.batch(train, number)), donate_argnums=0)


def train(config: ml_collections.ConfigDict, workdir: str, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, resuming what `workdir` holds; returns what `result.json` holds, the score being the task's measure."""
    build.require(config, "task", "method")
    build.check(config)
    task = build.choose("task", config.task, TASKS)(config)
    method = build.choose("method", config.method, METHODS)(config, task)
    state, step = method.state, train_step(method, task)
    evaluate = jax.jit(functools.partial(task.measure.evaluate, task))
    sample = None if task.sample is None else jax.jit(task.sample)
    measure, (unit, per_row) = task.measure, task.unit
    run = Run(
        workdir,
        config,
        total_steps=config.steps,
        save_every=config.save_every,
        unit=unit,
        show=("fitness_mean", measure.metric),
        logs=() if sample is None else ("samples.jsonl",),
        data=task.about,
        tensorboard=tensorboard,
    )

    def texts(params: Any, number: int) -> list[str]:
        drawn = np.asarray(sample(params, np.int32(number)))
        return [bytes(row).decode("utf-8", "backslashreplace") for row in drawn]

    with run:
        state = run.restore(state)
        facts = {"optimizer_bytes": tree_bytes(state.opt_state), **task.about}
        for name, fact in facts.items():
            run.say(f"{name}: {fact}")
        while run.step < run.total_steps:
            number = run.step + 1
            state, metrics = step(state, task.train, np.int32(number))
            metrics = method.readable(metrics)
            if number % config.eval_every == 0 or number == run.total_steps:
                metrics |= evaluate(state.params)
                if sample is not None:
                    run.log("samples.jsonl", [{"step": number, "texts": texts(state.params, number)}])
            run.record(state, metrics, work=config.batch * per_row)
        if sample is not None:
            run.say(f"a sample: {texts(state.params, run.step)[0]!r}")
        values = {name: measure.scale * float(value) for name, value in evaluate(state.params).items()}
        score = values.pop(measure.metric)
        return run.finish(measure.words, score, task=config.task, method=config.method, **values, **facts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    workdir, result = launch(train, argv)
    unit = next(unit for unit in ("examples", "tokens") if unit in result)
    print(
        f"{result['task']}, {result['method']}, seed {result['seed']}: {result['measure']} {result['score']:.4g} after "
        f"{result[unit]} {unit} in {result['seconds']:.1f} s"
    )
    plot.main([workdir, f"--x={unit}"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
