"""Members in any order and number: `draw` and `rows` against materialised parameters, with the base weights unbatched."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll

POPULATIONS = {
    "independent": eggroll.independent(6),
    "antithetic": eggroll.antithetic(6),
    "crossed": eggroll.crossed(6),
    "blocks": eggroll.crossed(12, blocks=2, rows=3),
    "signed blocks": eggroll.Population(2, 2, 3, 2),
}
SHAPES = {"w": (5, 7), "b": (7,), "stack": (2, 7, 3), "frozen": (3, 3), "table": (11, 5)}
RULES = (("stack", "sio"), ("frozen", "frozen"))


def parameters(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def network(p, token):
    x = jnp.tanh(p["table"][token] @ p["w"] + p["b"])
    return (x @ p["stack"][0] + x @ p["stack"][1]) @ p["frozen"]


def prepared(name="crossed", dtype=jnp.float32, **settings):
    settings = {"sigma": 0.2, "rules": RULES, **settings}
    es = eggroll.strategy(optax.sgd(0.1), population=POPULATIONS[name], **settings)
    return es, es.init(parameters(dtype), jax.random.key(4))


@jax.jit
def run(weights, members, tokens):
    params, axes = eggroll.rows(weights, members)
    one = lambda params, token: eggroll.perturbed_call(network, params, token)
    return jax.vmap(one, (axes, 0))(params, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "noise"),
    [
        ("independent", 1, "gaussian"), ("antithetic", 2, "gaussian"), ("crossed", 2, "rademacher"),
        ("signed blocks", 2, "gaussian"),
    ],
)  # fmt: skip
def test_rows_of_any_members_equal_their_materialised_parameters(name, rank, noise):
    es, state = prepared(name, rank=rank, noise=noise)
    n = es.population.size
    members = np.random.default_rng(1).permutation([*range(n), -1, -1, 0, n - 1])
    tokens = np.arange(len(members)) % 11
    drawn = jax.jit(es.draw)(state)
    got = run(drawn, jnp.asarray(members), jnp.asarray(tokens))

    @jax.jit
    def materialised(state, members, tokens):
        stacked = jax.vmap(es.member_params, (None, 0))(state, jnp.arange(n))
        with_mean = jax.tree.map(lambda each, mean: jnp.concatenate([each, mean[None]]), stacked, state.params)
        return jax.vmap(network)(jax.tree.map(lambda x: x[members], with_mean), tokens)

    np.testing.assert_allclose(got, materialised(state, members, tokens), atol=2e-5, rtol=0)
    at_one = run(drawn, jnp.asarray(members), jnp.full(len(members), 3))
    assert len(np.unique(np.round(np.asarray(at_one)[:, 0], 5))) == n + 1


def test_the_mean_is_exactly_the_mean():
    es, state = prepared()
    tokens = jnp.arange(4)
    drawn = jax.jit(es.draw)(state)
    got = run(drawn, jnp.array([-1, 2, -1, 5]), tokens)
    plain = run(state.params, jnp.array([-1, -1, -1, -1]), tokens)
    np.testing.assert_allclose(got[::2], plain[::2], atol=1e-6, rtol=0)
    assert np.abs(got[1::2] - plain[1::2]).min() > 1e-3
    # noise of weight 0 adds nothing, however large
    huge = dataclasses.replace(drawn, lefts=jax.tree.map(lambda x: x * 1e30, drawn.lefts))
    np.testing.assert_allclose(run(huge, jnp.full(4, -1), tokens), plain, atol=1e-6, rtol=0)


def test_antithetic_members_average_to_the_mean_and_generations_differ():
    es, state = prepared("antithetic")
    weight = jax.jit(lambda drawn, n: drawn.member(n)["w"].resolve())
    draw = jax.jit(es.draw)
    drawn = draw(state)
    # factors times the sign: E and -E
    np.testing.assert_allclose(weight(drawn, 2) + weight(drawn, 3), 2 * np.asarray(state.params["w"]), atol=1e-6)
    later = draw(dataclasses.replace(state, generation=state.generation + 1))
    assert np.abs(weight(later, 0) - weight(drawn, 0)).max() > 0.05


@pytest.mark.optimised
def test_base_weights_have_no_axis_over_rows():
    es, state = prepared()
    drawn = es.draw(state)
    params, axes = eggroll.rows(drawn, jnp.arange(6))
    assert axes["frozen"] is None and params["frozen"].shape == (3, 3)
    assert axes["b"] == 0 and params["b"].shape == (6, 7)
    for name in ("w", "stack", "table"):
        assert params[name].base.shape == SHAPES[name] and axes[name].base is None
        assert params[name].left.shape[0] == params[name].right.shape[0] == 6
    text = run.lower(drawn, jnp.arange(64), jnp.arange(64)).compile().as_text()
    largest = max(np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text))
    assert largest < 64 * 5 * 7  # rows times the smallest perturbed matrix
    plain, none = eggroll.rows(state.params, jnp.arange(6))
    assert plain is state.params and none is None


def test_memory_is_that_of_the_factors():
    es, state = prepared("blocks", rank=2)  # 2 blocks of 3 x 2: 6 rows and 4 columns
    drawn = jax.eval_shape(es.draw, state)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    # rows: outputs of w, of both stacked matrices and of the table, times rank; columns: inputs; and a vector for b in each
    assert size(drawn.lefts) == 6 * (2 * (7 + 2 * 3 + 5) + 7)
    assert size(drawn.rights) == 4 * (2 * (5 + 2 * 7 + 11) + 7)


def test_drawn_crosses_jit_and_tree_operations():
    es, state = prepared(dtype=jnp.bfloat16)
    draw = jax.jit(es.draw)
    drawn = draw(state)
    again = jax.tree.map(lambda x: x, drawn)
    assert isinstance(again, eggroll.Drawn) and again.population is es.population
    assert jax.tree.structure(again) == jax.tree.structure(jax.jit(lambda d: d)(drawn))
    got = run(drawn, jnp.array([0, 5, -1]), jnp.arange(3))
    assert got.dtype == jnp.bfloat16 and np.isfinite(np.asarray(got, np.float32)).all()
    traces = []
    count = jax.jit(lambda d: traces.append(1) or d.params["w"].sum())
    for generation in (0, 1, 2):
        count(draw(dataclasses.replace(state, generation=jnp.int32(generation))))
    assert len(traces) == 1
