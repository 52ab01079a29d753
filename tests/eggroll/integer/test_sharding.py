"""Members over devices, bit for bit, what is sent, and programs without floats."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import eggroll
from eggroll import integer
from rl.models import egg
from tests.eggroll.integer.models import numbers, random_params, random_text, small_params, small_score
from tests.eggroll.test_sharding import sent

CONFIG = egg.EggConfig(layers=1, width=8, expansion=2)
DESIGNS = {
    "pairs": (eggroll.antithetic(128), {"momentum": 2}),
    "released": (eggroll.antithetic(128), {"faithful": True}),
    "crossed": (eggroll.crossed(128, rows=8, signs=2), {"noise": "rademacher"}),
    "blocks": (eggroll.crossed(128, blocks=2, rows=8, signs=2), {}),
}
_FLOAT = re.compile(r"\b(bf16|f16|f32|f64|f8\w+)\[")


def egg_score(weights, carry, rows):
    return egg.log_likelihood(CONFIG, weights, carry, rows[:, :-1], rows[:, 1:])


@functools.cache
def programs(design, count):
    """(strategy, state, carry, batch, compiled evaluation, compiled update) on so many devices; None: without a mesh.

    Of a language model for pairs, of one product for the others.
    """
    mesh = None if count is None else Mesh(np.array(jax.devices()[:count]), ("members",))
    population, settings = DESIGNS[design]
    es = integer.strategy(population=population, alpha=0.5, mesh=mesh, chunk=16, **settings)
    if design == "pairs":
        score, params, one, batch = egg_score, random_params(CONFIG, 0), egg.state(CONFIG, 1), random_text(3, 4, 4)
    else:
        score, params, one, batch = small_score, small_params(0), numbers(1, 1, 8), numbers(2, 4, 8)
    state, carry = es.init(params, jax.random.key(1)), es.carry(one)
    evaluate = jax.jit(lambda s, c, b: es.evaluate(s, score, c, b)).lower(state, carry, batch).compile()
    update = jax.jit(es.update).lower(state, evaluate(state, carry, batch)[0]).compile()
    return es, state, carry, batch, evaluate, update


@functools.cache
def run(design, count):
    """What two generations end with."""
    _, state, carry, batch, evaluate, update = programs(design, count)
    for _ in range(2):
        scores, carry = evaluate(state, carry, batch)
        state, metrics = update(state, scores)
    key = jax.random.key_data(state.key)
    return jax.tree.map(np.asarray, (state.params, state.momentum, key, scores, carry, metrics))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "count"), [("pairs", 8), ("crossed", 8), ("crossed", 2), ("crossed", 1), ("blocks", 4)]
)
def test_no_bit_depends_on_the_number_of_devices(design, count):
    expected = run(design, None)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(expected[4]))
    jax.tree.map(np.testing.assert_array_equal, run(design, count), expected)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["pairs", "crossed"])
def test_one_bit_per_member_is_sent(design):
    es, _, carry, _, evaluate, update = programs(design, 8)
    assert sent(evaluate) == []
    kinds = sent(update)
    gathered = [size for kind, size in kinds if kind == "all-gather"]
    assert gathered == [es.population.size // 8]  # bytes: two bits a pair
    assert all(kind in ("all-gather", "all-reduce") for kind, _ in kinds)
    assert sum(size for kind, size in kinds if kind == "all-reduce") <= 8  # of the mean score
    assert {s.data.shape[0] for s in carry.addressable_shards} == {es.population.size // 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "count"),
    [("pairs", None), ("crossed", None), ("blocks", None), ("pairs", 8), ("crossed", 8), ("released", None)],
)
def test_no_float_is_in_the_compiled_programs(design, count):
    *_, evaluate, update = programs(design, count)
    for program in (evaluate, update):
        assert not _FLOAT.findall(program.as_text())


def test_floats_would_be_found():
    text = jax.jit(lambda x: (x * 1.5).astype(jnp.int8)).lower(jnp.zeros(3, jnp.int8)).compile().as_text()
    assert _FLOAT.findall(text)


def test_populations_that_do_not_divide_over_the_devices():
    mesh = Mesh(np.array(jax.devices()[:8]), ("members",))
    with pytest.raises(ValueError, match="6 x 1 x 1 over 8"):
        integer.strategy(population=eggroll.antithetic(12), alpha=0.5, mesh=mesh)
    with pytest.raises(ValueError, match="1 x 6 x 4 pairs over 8 devices"):  # rows by 2, columns by 4
        integer.strategy(population=eggroll.crossed(48, rows=6, signs=2), alpha=0.5, mesh=mesh)
