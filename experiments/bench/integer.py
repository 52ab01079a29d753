"""The integer language model: int8 against the same model in f32, and a generation by population; see the package."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from eggroll import integer
from experiments.bench.harness import Row, row, timed_in_turn
from rl.models import egg, egg_float

ALPHA, CHUNK, STREAMS = 0.25, 256, 16


class Size(NamedTuple):
    """A model, and the bytes that a member reads."""

    layers: int = 2
    width: int = 64
    tokens: int = 100


def populations() -> list[tuple[Size, int]]:
    """2^6 to 2^16 members of the small model, and the published one."""
    return [(Size(), 2**n) for n in (6, 8, 10, 12, 14, 16)] + [(Size(6, 256, 20), 512)]


class Programs(NamedTuple):
    """One generation, compiled: functions without arguments, and the bytes that evaluating takes beside its arguments."""

    evaluate: Callable[[], Any]
    update: Callable[[], Any]
    temporary: int
    carried: int  # bytes between generations


def _text(size: Size) -> dict[str, jax.Array]:
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, (STREAMS, size.tokens + 1)), jnp.uint8)
    return {"inputs": text[:, :-1], "targets": text[:, 1:]}


def _programs(es: Any, state: Any, evaluate: Callable, args: tuple, carried: int) -> Programs:
    compiled = jax.jit(evaluate).lower(state, *args).compile()
    scores = compiled(state, *args)[0]
    update = jax.jit(es.update).lower(state, scores).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Programs(lambda: compiled(state, *args), lambda: update(state, scores), temporary, carried)


def int8(size: Size, population: eggroll.Population) -> Programs:
    """In integers."""
    config = egg.EggConfig(size.layers, size.width)
    es = integer.strategy(population=population, alpha=ALPHA, chunk=CHUNK)
    state = es.init(egg.init(config, jax.random.key(0)), jax.random.key(1))
    carry = es.carry(egg.state(config, 1))
    score = lambda weights, carry, rows: egg.log_likelihood(config, weights, carry, rows["inputs"], rows["targets"])
    evaluate = lambda state, carry, batch: es.evaluate(state, score, carry, batch)
    return _programs(es, state, evaluate, (carry, _text(size)), carry.nbytes)


def float32(size: Size, population: eggroll.Population) -> Programs:
    """The same model and members in f32, with `eggroll.strategy` and plain SGD."""
    config = egg.EggConfig(size.layers, size.width)
    es = eggroll.strategy(optax.sgd(1e-2), population=population, sigma=2.0**-4, chunk=CHUNK)
    params = egg_float.from_integers(egg.init(config, jax.random.key(0)))
    state = es.init(params, jax.random.key(1))
    carry = jnp.zeros((population.size, 1, 1, size.layers, size.width))
    member = np.arange(population.size) // 2 * STREAMS // population.directions

    def score(params, data):
        carry, inputs, targets = data
        return egg.log_likelihood(config, params, carry, inputs[None], targets[None], egg_float)

    def evaluate(state, carry, batch):
        rows = jax.tree.map(lambda x: x[member][:, None], batch)
        return es.evaluate(state, score, (carry, rows["inputs"], rows["targets"]), has_aux=True, per_member=True)

    return _programs(es, state, evaluate, (carry, _text(size)), carry.nbytes)


def case(repeats: int) -> Iterator[Row]:
    """Seconds of a generation in int8, pairs and crossed, and in f32; memory per member; the update's share."""
    for size, members in populations():
        sides: dict[str, Programs] = {
            "int8": int8(size, eggroll.antithetic(members)),
            "crossed": int8(size, eggroll.crossed(members, signs=2)),
            "float32": float32(size, eggroll.antithetic(members)),
        }
        parts = {
            f"{name}_{part}": getattr(side, part) for name, side in sides.items() for part in ("evaluate", "update")
        }
        turns = max(3, repeats // (1 + members // 2**12))
        seconds = timed_in_turn(parts, turns)
        whole = {name: seconds[f"{name}_evaluate"] + seconds[f"{name}_update"] for name in sides}
        setting = {"width": size.width, "layers": size.layers, "members": members, "tokens": size.tokens}
        per_member = {name: round((side.temporary + side.carried) / members) for name, side in sides.items()}
        rates = {name: round(members * size.tokens / s) for name, s in whole.items()}
        measured = functools.partial(row, setting, seconds=seconds, repeats=turns)
        yield measured("float32_over_int8", whole["float32"] / whole["int8"], tokens_per_second=rates)
        yield measured("pairs_over_crossed", whole["int8"] / whole["crossed"])
        yield measured("update_share", seconds["int8_update"] / whole["int8"])
        yield measured(
            "bytes_per_member_over_float32", per_member["int8"] / per_member["float32"], bytes_per_member=per_member
        )


CASES = {"egg": case}
