"""Supervised training without backprop, and with it for comparison, on the same network, data and optimizer.

    python -m experiments.pretrain --config=configs/digits.py --workdir=runs/digits
    python -m experiments.pretrain --config=configs/digits.py:backprop --workdir=runs/digits_backprop

The task gives the network, the arrays and a score per example; the method turns scores into an update. All methods see
the same minibatches: they depend on the seed and the step alone.
"""

import functools
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
from rl.run import Run, launch

Batch = Mapping[str, jax.Array]  # every array [B, ...]
Metrics = dict[str, jax.Array]
Step = Callable[[Any, Batch], tuple[Any, Metrics]]


class Task(NamedTuple):
    """What is learned; pure functions of the parameters."""

    params: Any
    train: Batch
    test: Batch
    score: Callable[[Any, Batch], jax.Array]  # (params, one row of a batch) -> scalar, higher is better
    correct: Callable[[Any, Batch], jax.Array]  # (params, one row) -> bool


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
    return Task(params, train, {"image": test_images, "label": test_labels}, score, correct)


def eggroll_method(config: ml_collections.ConfigDict, task: Task) -> tuple[Any, Step]:
    """Low-rank evolution strategy: a member's fitness is its mean score over the minibatch."""
    es = build.strategy(config)

    def step(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        return es.update(state, es.evaluate(state, task.score, batch))

    return es.init(task.params, jax.random.key(config.seed)), step


def backprop_method(config: ml_collections.ConfigDict, task: Task) -> tuple[BackpropState, Step]:
    """Gradient of the mean score over the minibatch."""
    tx = build.optimizer(config)

    def step(state: BackpropState, batch: Batch) -> tuple[BackpropState, Metrics]:
        def loss(params: Any) -> jax.Array:
            return -jnp.mean(jax.vmap(task.score, in_axes=(None, 0))(params, batch))

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        metrics = {"fitness_mean": -value, "gradient_norm": optax.tree.norm(gradient)}
        return BackpropState(optax.apply_updates(state.params, updates), opt_state), metrics

    return BackpropState(task.params, tx.init(task.params)), step


TASKS = {"digits": digits}
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


def train(config: ml_collections.ConfigDict, workdir: str, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, resuming what `workdir` holds; returns what `result.json` holds, the score being the test accuracy."""
    build.require(config, "task", "method")
    build.check(config)
    task = build.choose("task", config.task, TASKS)(config)
    state, method_step = build.choose("method", config.method, METHODS)(config, task)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, number: jax.Array) -> tuple[Any, Metrics]:
        return method_step(state, minibatch(task.train, config.seed, number, config.batch))

    @jax.jit
    def evaluate(params: Any) -> Metrics:
        return {
            "train_accuracy": accuracy(task, params, task.train),
            "test_accuracy": accuracy(task, params, task.test),
        }

    run = Run(
        workdir,
        config,
        total_steps=config.steps,
        save_every=config.save_every,
        unit="examples",
        show=("fitness_mean", "test_accuracy"),
        tensorboard=tensorboard,
    )
    with run:
        state = run.restore(state)
        while run.step < run.total_steps:
            number = run.step + 1
            state, metrics = step(state, np.int32(number))
            if number % config.eval_every == 0 or number == run.total_steps:
                metrics |= evaluate(state.params)
            run.record(state, metrics, work=config.batch)
        accuracies = {name: 100 * float(value) for name, value in evaluate(state.params).items()}
        return run.finish(
            "test accuracy in %",
            accuracies["test_accuracy"],
            task=config.task,
            method=config.method,
            train_accuracy=accuracies["train_accuracy"],
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    workdir, result = launch(train, argv)
    print(
        f"{result['task']}, {result['method']}, seed {result['seed']}: {result['measure']} {result['score']:.2f} after "
        f"{result['examples']} examples in {result['seconds']:.1f} s"
    )
    plot.main([workdir, "--x=examples", "--y=test_accuracy"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
