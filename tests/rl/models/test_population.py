"""Every kind of model evolves unmodified: members share one product per weight, and none is ever formed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from rl.models.presets import make
from tests.rl.models.tiny import MIXED, SHAPES, VOCAB, random_params

KINDS = {
    "llama": dataclasses.replace(SHAPES["llama"], mlp_bias=True, qkv_bias=True, out_bias=True),
    "qwen3": SHAPES["qwen3"],
    "moe": SHAPES["moe"],
    "rwkv7": SHAPES["rwkv7"],
}
CASES = [(name, name != "qwen3") for name in KINDS]
ROWS = np.random.default_rng(5).integers(0, VOCAB, (2, 7))


def score(model, params, ids):
    """Mean log-prob of the row, read through a cache: five tokens at once, then one."""
    first, cache = model.forward(params, ids[:5], model.empty(8), 0, 5)
    second, _ = model.forward(params, ids[5:6], cache, 5, 1)
    logp = jax.nn.log_softmax(model.head(params, jnp.concatenate([first, second])))
    return jnp.mean(jnp.take_along_axis(logp, ids[1:, None], -1))


def prepared(config, population=None, **settings):
    model = make(config)
    population = eggroll.crossed(8) if population is None else population
    es = eggroll.strategy(optax.sgd(0.1), population=population, sigma=0.02, rules=model.rules, **settings)
    return model, es, es.init(random_params(model, 0.5), jax.random.key(3)), functools.partial(score, model)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scan_layers"), CASES, ids=[f"{n}-{'scan' if s else 'loop'}" for n, s in CASES])
def test_members_equal_their_materialised_parameters_and_form_no_weight(name, scan_layers):
    model, es, state, fitness = prepared(dataclasses.replace(KINDS[name], scan_layers=scan_layers))
    uses = es.uses(state, fitness, jnp.asarray(ROWS[0]))
    assert uses and not [use for use in uses if use[2]]
    # every leaf of the model is perturbed, the matrices as factors
    plan = es._plan(state.params)
    factors = {leaf.path for leaf in plan if leaf.low_rank}
    assert {path for path, _, _ in uses} >= factors
    matrices = [leaf for leaf in plan if leaf.path.endswith(("kernel", "embedding"))]
    assert matrices and all(leaf.low_rank for leaf in matrices)
    scores = jax.jit(functools.partial(es.evaluate, score=fitness))(state, batch=jnp.asarray(ROWS))
    alone = jax.jit(
        lambda state, n: jax.vmap(functools.partial(fitness, es.member_params(state, n)))(jnp.asarray(ROWS))
    )
    expected = np.stack([alone(state, n) for n in range(8)])
    assert expected.std(0).min() > 1e-3
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_forced_experts_and_layers_without_experts_evolve_too():
    model, es, state, _ = prepared(dataclasses.replace(MIXED, layers=2, dense_layers=(0,)))
    forced = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 7, 2)))
    fitness = lambda params, ids: jnp.mean(model.head(params, model.forward(params, ids, experts=forced)[0]) ** 2)
    assert not [use for use in es.uses(state, fitness, jnp.asarray(ROWS[0])) if use[2]]
    scores = jax.jit(functools.partial(es.evaluate, score=fitness))(state, batch=jnp.asarray(ROWS[:1]))
    expected = jax.jit(lambda n: fitness(es.member_params(state, n), jnp.asarray(ROWS[0])))
    np.testing.assert_allclose(scores[:, 0], [expected(n) for n in range(8)], rtol=1e-5)


@pytest.mark.slow
def test_bf16_members():
    model, es, state, _ = prepared(dataclasses.replace(KINDS["qwen3"], dtype="bfloat16", scan_layers=True))
    fitness = lambda params, ids: model.head(params, model.forward(params, ids)[0]).mean()
    assert not [use for use in es.uses(state, fitness, jnp.asarray(ROWS[0])) if use[2]]
    scores = jax.jit(functools.partial(es.evaluate, score=fitness))(state, batch=jnp.asarray(ROWS))
    assert np.isfinite(scores).all() and np.asarray(scores).std() > 0
    assert {x.dtype for x in jax.tree.leaves(es.member_params(state, 0))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["moe", "rwkv7"])
def test_rules_name_exactly_what_is_no_plain_matrix(name):
    """A stack over layers or experts is a stack; vectors stacked over layers are perturbed in full."""
    model = make(dataclasses.replace(KINDS[name], scan_layers=True))
    forms = {pattern.removeprefix("(^|/)").removesuffix("$"): form for pattern, form in model.rules}
    if name == "moe":
        assert forms["layers/moe/experts_up"] == "ssio" and forms["layers/attention/query/kernel"] == "sio"
    else:
        assert forms["layers/time/receptance/kernel"] == "sio" and forms["layers/time/r_k"] == "full"
    assert forms["layers/norm1/scale"] == "full" and "embed/embedding" not in forms
