"""Supervised training without backprop, and with it for comparison, on the same network, data and optimizer.

    python -m experiments.pretrain --config=configs/digits.py --workdir=runs/digits
    python -m experiments.pretrain --config=configs/digits.py:backprop --workdir=runs/digits_backprop
    python -m experiments.pretrain --config=configs/pretrain_bytes_adamw.py --workdir=runs/bytes_adamw

The task gives the network, the arrays and a score per example; the method turns scores into an update. All methods and
optimizers see the same minibatches: they depend on the seed and the step alone.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from experiments import build, plot
from rl.config import ConfigError
from rl.data import bytes as byte_data
from rl.launch import launch
from rl.learners.types import tree_bytes
from rl.models.presets import make
from rl.models.transformer import TransformerConfig
from rl.run import Run

Batch = Mapping[str, jax.Array]  # every array [B, ...]
Metrics = dict[str, jax.Array]
Step = Callable[[Any, Batch], tuple[Any, Metrics]]
_EVALUATED = 32  # rows at a time


class Task(NamedTuple):
    """What is learned; pure functions of the parameters."""

    params: Any
    train: Batch  # what minibatches are made from
    test: Batch  # held-out rows
    score: Callable[[Any, Batch], jax.Array]  # (params, one row of a batch) -> scalar, higher is better
    batch: Callable[[Batch, jax.Array], Batch]  # (train, step) -> rows
    measure: "Measure"
    correct: Callable[[Any, Batch], jax.Array] | None = None  # (params, one row) -> bool, if a row has one right answer
    rules: tuple[tuple[str, str], ...] = ()  # of eggroll, where the parameters need some
    unit: tuple[str, int] = ("examples", 1)  # of work, and how many a row has
    about: Mapping[str, Any] = {}  # what else the result says of the data


class Measure(NamedTuple):
    """How well unperturbed parameters do."""

    evaluate: Callable[[Task, Any], Metrics]
    metric: str  # the one of these that is the result
    words: str  # for that, in the unit of the result
    scale: float  # result = scale * metric


class BackpropState(NamedTuple):
    """What backprop carries from step to step."""

    params: Any
    opt_state: optax.OptState


class MLP(nnx.Module):
    """Fully connected ReLU network, He-initialised."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs) -> None:
        """Layers from `widths[0]` inputs to `widths[-1]` outputs."""
        init = nnx.initializers.he_normal()
        self.layers = nnx.List(
            [nnx.Linear(m, n, kernel_init=init, rngs=rngs) for m, n in zip(widths[:-1], widths[1:], strict=True)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., widths[0]] -> [..., widths[-1]]."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def digits(config: ml_collections.ConfigDict) -> Task:
    """Handwritten digits bundled with scikit-learn: 1,797 images of 8 x 8 pixels, 10 classes.

    The split is stratified and always the same, 1,437 images to train on and 360 to test on; pixels are scaled to
    [0, 1]. The score is log p(label | image), so its mean is minus the cross-entropy in nats.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ConfigError("config.task = 'digits' needs scikit-learn: pip install 'eggroll-jax[digits]'") from error

    images, labels = load_digits(return_X_y=True)
    train_test = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int32), test_size=360, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, train_test)
    widths = (64, *(config.width,) * config.hidden_layers, 10)
    graph, params = nnx.split(MLP(widths, nnx.Rngs(config.seed)))

    def logits(params: Any, row: Batch) -> jax.Array:
        return nnx.merge(graph, params)(row["image"])

    def score(params: Any, row: Batch) -> jax.Array:
        return jax.nn.log_softmax(logits(params, row))[row["label"]]

    def correct(params: Any, row: Batch) -> jax.Array:
        return jnp.argmax(logits(params, row)) == row["label"]

    train = {"image": train_images, "label": train_labels}
    return Task(
        params,
        train,
        {"image": test_images, "label": test_labels},
        score,
        lambda data, step: minibatch(data, config.seed, step, config.batch),
        Measure(accuracies, "test_accuracy", "test accuracy in %", 100.0),
        correct,
    )


def byte_text(config: ml_collections.ConfigDict) -> Task:
    """The next byte of Python source (`rl.data.bytes.standard_library`) under a transformer.

    A row is a window of `config.window` + 1 bytes, anywhere in the training text; the score is the mean over all but the first
    of log p(byte | bytes of the window before it) in nats.

    Raises:
      ConfigError: sizes that do not make a transformer, or windows that the text is too short for.
    """
    try:
        corpus = byte_data.standard_library(config.train_bytes)
        model = make(TransformerConfig(vocab=256, max_length=config.window, **config.model.to_dict()))
        test = byte_data.spread(corpus.held_out, config.eval_windows, config.window + 1)
        byte_data.spread(corpus.train, 1, config.window + 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the task 'bytes' does not fit its config or its text: {error}") from error

    def score(params: Any, row: Batch) -> jax.Array:
        seen, following = row["bytes"][:-1].astype(jnp.int32), row["bytes"][1:].astype(jnp.int32)
        hidden, _ = model.forward(params, seen)
        logp = jax.nn.log_softmax(model.head(params, hidden))
        return jnp.mean(jnp.take_along_axis(logp, following[:, None], axis=1))

    def batch(data: Batch, step: jax.Array) -> Batch:
        return {"bytes": byte_data.windows(data["bytes"], config.seed, step, config.batch, config.window + 1)}

    return Task(
        model.init(jax.random.fold_in(jax.random.key(config.seed), 2)),
        {"bytes": jnp.asarray(corpus.train)},
        {"bytes": jnp.asarray(test)},
        score,
        batch,
        Measure(bits, "test_bits", "held-out bits per byte", 1.0),
        rules=model.rules,
        unit=("tokens", config.window),
        about={"corpus": corpus.facts},
    )


def eggroll_method(config: ml_collections.ConfigDict, task: Task) -> tuple[Any, Step]:
    """Low-rank evolution strategy: a member's fitness is its mean score over the minibatch."""
    es = build.strategy(config, task.rules)

    def step(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        return es.update(state, es.evaluate(state, task.score, batch))

    return es.init(task.params, jax.random.key(config.seed)), step


def backprop_method(config: ml_collections.ConfigDict, task: Task) -> tuple[BackpropState, Step]:
    """Gradient of the mean score over the minibatch.

    Raises:
      ConfigError: an optimizer that cannot take these parameters.
    """
    tx = build.optimizer(config)
    try:
        opt_state = tx.init(task.params)
    except ValueError as error:
        raise ConfigError(f"config.optimizer does not fit the model: {error}") from error

    def step(state: BackpropState, batch: Batch) -> tuple[BackpropState, Metrics]:
        def loss(params: Any) -> jax.Array:
            return -jnp.mean(jax.vmap(task.score, in_axes=(None, 0))(params, batch))

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        metrics = {"fitness_mean": -value, "gradient_norm": optax.tree.norm(gradient)}
        return BackpropState(optax.apply_updates(state.params, updates), opt_state), metrics

    return BackpropState(task.params, opt_state), step


TASKS = {"digits": digits, "bytes": byte_text}
METHODS = {"eggroll": eggroll_method, "backprop": backprop_method}


def minibatch(data: Batch, seed: int, step: jax.Array, size: int) -> Batch:
    """`size` rows drawn with replacement; a pure function of (seed, step)."""
    rows = next(iter(data.values())).shape[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    index = jax.random.randint(key, (size,), 0, rows)
    return {name: array[index] for name, array in data.items()}


def accuracy(task: Task, params: Any, data: Batch) -> jax.Array:
    """Fraction of rows that the unperturbed parameters get right."""
    return jnp.mean(jax.vmap(task.correct, in_axes=(None, 0))(params, data).astype(jnp.float32))


def accuracies(task: Task, params: Any) -> Metrics:
    """`accuracy` on both parts of the data."""
    return {"train_accuracy": accuracy(task, params, task.train), "test_accuracy": accuracy(task, params, task.test)}


def bits(task: Task, params: Any) -> Metrics:
    """Minus the mean score of the held-out rows, in bits; lower is better."""
    score = jax.lax.map(functools.partial(task.score, params), task.test, batch_size=_EVALUATED)
    return {"test_bits": -jnp.mean(score) / math.log(2)}


def train(config: ml_collections.ConfigDict, workdir: str, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, resuming what `workdir` holds; returns what `result.json` holds, the score being the task's measure."""
    build.require(config, "task", "method")
    build.check(config)
    task = build.choose("task", config.task, TASKS)(config)
    state, method_step = build.choose("method", config.method, METHODS)(config, task)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, train: Batch, number: jax.Array) -> tuple[Any, Metrics]:
        return method_step(state, task.batch(train, number))

    evaluate = jax.jit(functools.partial(task.measure.evaluate, task))
    measure, (unit, per_row) = task.measure, task.unit
    run = Run(
        workdir,
        config,
        total_steps=config.steps,
        save_every=config.save_every,
        unit=unit,
        show=("fitness_mean", measure.metric),
        tensorboard=tensorboard,
    )
    with run:
        state = run.restore(state)
        facts = {"optimizer_bytes": tree_bytes(state.opt_state), **task.about}
        for name, fact in facts.items():
            run.say(f"{name}: {fact}")
        while run.step < run.total_steps:
            number = run.step + 1
            state, metrics = step(state, task.train, np.int32(number))
            if number % config.eval_every == 0 or number == run.total_steps:
                metrics |= evaluate(state.params)
            run.record(state, metrics, work=config.batch * per_row)
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
