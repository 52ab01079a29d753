"""Optimizers with little memory against AdamW: see the package."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.bench.harness import Row, row, timed_in_turn
from rl import optim
from rl.optim import groups

RATE, DECAY, DENSITY = 1e-4, 0.01, 0.25
VOCAB = 256
REFRESH = 200  # a step whose number is a multiple of every period in use


class Size(NamedTuple):
    """Of a transformer; rounds at most; whether there is time for what takes minutes in larger ones."""

    width: int
    layers: int
    rounds: int
    slow: bool


class Method(NamedTuple):
    """An optimizer as it is measured.

    Attributes:
        name: of the optimizer.
        tx: the transformation, for any tree of this width.
        settings: that the row names.
        refresh: how a step with one is timed: "turn", in turn with the others; "layer", once and on one layer; "", not.
        rounds: at most.
    """

    name: str
    tx: optax.GradientTransformation
    settings: dict[str, Any]
    refresh: str = ""
    rounds: int = 15


class Side(NamedTuple):
    """An optimizer with parameters and a state of its own, compiled.

    Attributes:
        step: () -> (parameters, arrays of the state).
        refresh: the same, with a refresh in it.
        state_bytes: of the state.
        temporary_bytes: of the compiled step beyond parameters, state and gradients.
    """

    step: Callable[[], Any]
    refresh: Callable[[], Any]
    state_bytes: int
    temporary_bytes: int


def _sizes() -> Iterator[Size]:
    yield Size(256, 4, 15, slow=True)
    yield Size(1024, 4, 5, slow=True)
    yield Size(2048, 4, 3, slow=False)


def random_tree(width: int, layers: int) -> dict[str, Any]:
    """Standard normal entries in the shapes of a transformer's parameters."""
    inner = 11 * width // 4
    mlp = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    attention = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    scale = {"scale": (width,)}
    kernels = lambda shapes: {name: {"kernel": shape} for name, shape in shapes.items()}
    layer = {"attention": kernels(attention), "mlp": kernels(mlp), "norm1": scale, "norm2": scale}
    tree = {f"layer_{i}": layer for i in range(layers)} | {"embed": {"embedding": (VOCAB, width)}, "norm": scale}
    shapes, kind = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return jax.tree.unflatten(kind, [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)])


def adamw() -> optax.GradientTransformation:
    """What the others are measured against."""
    return optax.adamw(RATE, weight_decay=DECAY)


def methods(size: Size) -> Iterator[Method]:
    """The optimizers of this size; a quarter of the memory, or a quarter of the rank, where there is such a setting."""

    def method(make, settings=None, refresh="", rounds=15, name="", **further):
        tx = make(RATE, weight_decay=DECAY, **settings or {}, **further)
        return Method(name or make.__name__, tx, settings or {}, refresh, rounds)

    layer = "layer" if size.slow else ""
    block = max(DENSITY, 1 / size.layers)  # one layer's
    yield method(optim.frugal, {"projection": "block", "density": block}, "turn")
    for projection, refresh in (("columns", "turn"), ("rows", "turn"), ("randk", layer)):
        yield method(optim.frugal, {"projection": projection, "density": DENSITY}, refresh)
    yield method(optim.frugal, {"density": 0.0})
    yield method(optim.galore, {"rank": size.width // 4}, layer)
    yield method(optim.badam, {"active": 1}, "turn")
    yield method(optim.fira, {"rank": size.width // 4}, layer)
    yield method(optim.ldadam, {"rank": 16})
    yield method(optim.apollo, {"rank": size.width // 4}, "turn")
    yield method(optim.apollo_mini, refresh="turn", name="apollo_mini")
    yield method(optim.adam_mini)
    yield method(optim.adam8bit)
    yield method(optax.lion)
    yield Method("adafactor", optax.adafactor(RATE, weight_decay_rate=DECAY), {})
    if size.slow:
        yield method(optax.contrib.muon, rounds=1, muon_weight_dimension_numbers=_linear)


def _linear(params):
    """Muon for weights of linear layers, as the others have it."""
    numbers = [
        optax.contrib.MuonDimensionNumbers() if groups.is_linear(*leaf) else None for leaf in groups.leaves(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), numbers)


def side(tx: optax.GradientTransformation, gradients) -> Side:
    """The jitted step, whose parameters and state are donated, after its first refresh.

    Raises:
        RuntimeError: the state takes other bytes than `rl.optim.report` says.
    """
    params = jax.tree.map(lambda x: 0.02 * x, gradients)
    state = tx.init(params)
    reported, allocated = optim.report(tx, params).total, sum(x.nbytes for x in jax.tree.leaves(state))
    if reported != allocated:
        raise RuntimeError(f"rl.optim.report says {reported} bytes of state, but {allocated} are allocated")
    paths, kind = jax.tree_util.tree_flatten_with_path(state)
    counters = [i for i, (path, _) in enumerate(paths) if path[-1] == jax.tree_util.GetAttrKey("count")]

    def update(params, leaves, gradients):
        updates, state = tx.update(gradients, jax.tree.unflatten(kind, leaves), params)
        return optax.apply_updates(params, updates), jax.tree.leaves(state)

    held = [params, jax.tree.leaves(_refreshed(state, params))]
    program = jax.jit(update, donate_argnums=(0, 1)).lower(*held, gradients).compile()

    def step(*count: int):
        for i in counters if count else ():
            held[1][i] = jnp.int32(*count)
        held[:] = program(*held, gradients)
        return held

    def refresh():
        return step(REFRESH)

    memory = program.memory_analysis()
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Side(step, refresh, reported, temporary)


def _refreshed(state, params):
    """The state after one step, with something like what a refresh stores: coordinates spread evenly, or random directions."""
    sizes = {path: leaf.size for path, leaf in groups.leaves(params)}

    def draw(path, x: Array) -> Array:
        if path[-1] == jax.tree_util.GetAttrKey("count"):
            return jnp.ones_like(x)
        if jax.tree_util.GetAttrKey("stored") not in path:
            return x
        key = jax.random.key(1)
        if x.dtype == jnp.int32:
            apart = sizes[path[-1].key] // x.size
            return jnp.arange(x.size, dtype=jnp.int32) * apart + jax.random.randint(key, x.shape, 0, apart)
        return jax.random.normal(key, x.shape, x.dtype) / math.sqrt(x.shape[0])

    return jax.tree_util.tree_map_with_path(draw, state)


def optimizer(repeats: int) -> Iterator[Row]:
    """Every optimizer against AdamW, side by side."""
    for size in _sizes():
        gradients = random_tree(size.width, size.layers)
        base = side(adamw(), gradients)
        for method in methods(size):
            yield _measured(size, method, base, side(method.tx, gradients), min(repeats, size.rounds, method.rounds))


def _measured(size: Size, method: Method, base: Side, own: Side, rounds: int) -> Row:
    name, ratio = method.name, lambda pair: round(pair[method.name] / pair["adamw"], 4)
    both = lambda field: {"adamw": getattr(base, field), name: getattr(own, field)}
    fns = {"adamw": base.step, name: own.step} | ({"refresh": own.refresh} if method.refresh == "turn" else {})
    timed = timed_in_turn(fns, rounds)
    seconds = {key: timed[key] for key in ("adamw", name)}
    state, temporary = both("state_bytes"), both("temporary_bytes")
    memory = {key: state[key] + temporary[key] for key in state}
    further = {"state_bytes": state, "temporary_bytes": temporary}
    further |= {"state_over_adamw": ratio(state), "memory_over_adamw": ratio(memory)}
    if method.refresh:
        one = method.refresh == "layer"
        pair = _refresh_of_a_layer(size, method) if one else {"adamw": seconds["adamw"], name: timed["refresh"]}
        rounded = {key: round(s, 6) for key, s in pair.items()}
        further |= {"refresh_layers": 1 if one else size.layers, "refresh_seconds": rounded}
        further |= {"refresh_over_adamw": ratio(pair)}
    setting = {"width": size.width, "layers": size.layers, "optimizer": name} | method.settings
    return row(setting, "step_over_adamw", ratio(seconds), seconds, rounds, **further)


def _refresh_of_a_layer(size: Size, method: Method) -> dict[str, float]:
    """Median seconds of AdamW on one layer, and seconds of one step with a refresh there."""
    gradients = random_tree(size.width, 1)
    seconds = timed_in_turn({"adamw": side(adamw(), gradients).step}, 5)
    own = side(method.tx, gradients)
    start = time.perf_counter()
    jax.block_until_ready(own.refresh())
    return seconds | {method.name: time.perf_counter() - start}


CASES = {"optimizer": optimizer}
