"""What `experiments.pretrain` learns: networks, data and scores, one function of the config per task."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from eggroll.integer import arithmetic as integers
from experiments.build import EVOLUTION_IN_INTEGERS
from rl.config import ConfigError
from rl.data import bytes as byte_data
from rl.data import streams
from rl.models import egg, egg_float
from rl.models.presets import make
from rl.models.transformer import TransformerConfig

Batch = Mapping[str, jax.Array]  # every array [B, ...]
Metrics = dict[str, jax.Array]
_EVALUATED = 32  # rows at a time
_SAMPLES = (4, 160)  # texts, bytes of each


class Task(NamedTuple):
    """What is learned; pure functions of the parameters."""

    params: Any
    train: Batch  # what minibatches are made from
    test: Batch  # held-out rows
    # (params, one row of a batch) -> scalar, higher is better; with `carry`, of rows of a batch together, (params, carry, rows)
    # -> (sum over rows and their units of work, carry)
    score: Callable[..., Any]
    batch: Callable[[Batch, jax.Array], Batch]  # (train, step) -> rows
    measure: "Measure"
    correct: Callable[[Any, Batch], jax.Array] | None = None  # (params, one row) -> bool, if a row has one right answer
    rules: tuple[tuple[str, str], ...] = ()  # of eggroll, where the parameters need some
    unit: tuple[str, int] = ("examples", 1)  # of work, and how many a row has
    about: Mapping[str, Any] = {}  # what else the result says of the data
    carry: Callable[[int], Any] | None = (
        None  # so many rows -> what they remember at first and hand on to the next step
    )
    sample: Callable[[Any, jax.Array], jax.Array] | None = (
        None  # (params, step) -> u8 [texts, bytes] that the model writes
    )


class Measure(NamedTuple):
    """How well unperturbed parameters do."""

    evaluate: Callable[[Task, Any], Metrics]
    metric: str  # the one of these that is the result
    words: str  # for that, in the unit of the result
    scale: float  # result = scale * metric


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


def byte_streams(config: ml_collections.ConfigDict) -> Task:
    """The next byte of text under the recurrent model `rl.models.egg`, in integers, or in f32 for backprop.

    The text is read as `config.batch` streams side by side, `config.tokens` bytes of each a step; what a row remembers goes on
    to the next step. The score is the sum of log2 p(byte | the bytes before it) in 1/16 bits.

    Raises:
      ConfigError: sizes that do not make a model, or streams that the text is too short for.
    """
    integer = config.method == EVOLUTION_IN_INTEGERS
    ops, dtype = (integers, jnp.int8) if integer else (egg_float, jnp.float32)
    try:
        corpus = byte_data.corpus(config.train_bytes, config.train_file, config.held_out_file)
        model = egg.EggConfig(**config.model.to_dict())
        train = streams.lay_out(corpus.train, config.batch, config.tokens)
        test = streams.lay_out(corpus.held_out, config.eval_streams, 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the task 'streams' does not fit its config or its text: {error}") from error
    params = egg.init(model, jax.random.fold_in(jax.random.key(config.seed), 2))
    reference = byte_data.reference_bits(corpus.train, test)

    def score(params: Any, carry: jax.Array, rows: Batch) -> tuple[jax.Array, jax.Array]:
        return egg.log_likelihood(model, params, carry, rows["inputs"], rows["targets"], ops)

    def batch(data: Batch, step: jax.Array) -> Batch:
        inputs, targets = streams.segment(data["streams"], step - 1, config.tokens)
        return {"inputs": inputs, "targets": targets}

    def evaluate(task: Task, params: Any) -> Metrics:
        likelihood = egg_float.of_integers if integer else None  # not the integer one, which rounds
        start, text = egg.state(model, 1, dtype), task.test["streams"][:, None]
        one = lambda row: egg.log_likelihood(model, params, start, row[:, :-1], row[:, 1:], ops, likelihood)[0]
        return {"test_bits": -jnp.mean(jax.vmap(one)(text)) / (integers.ONE * (test.shape[1] - 1))}

    def sample(params: Any, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 3), step)
        return egg.sample(model, params, key, *_SAMPLES)

    return Task(
        params if integer else egg_float.from_integers(params),
        {"streams": jnp.asarray(train)},
        {"streams": jnp.asarray(test)},
        score,
        batch,
        Measure(evaluate, "test_bits", "held-out bits per byte", 1.0),
        unit=("tokens", config.tokens),
        about={"corpus": corpus.facts, "reference_bits": reference},
        carry=lambda rows: egg.state(model, rows, dtype),
        sample=sample if integer else None,
    )


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


TASKS = {"digits": digits, "bytes": byte_text, "streams": byte_streams}
