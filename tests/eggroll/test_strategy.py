"""init / evaluate / estimate / update against loops over materialised members."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.estimate import direction_weights

POPULATIONS = {
    "independent": eggroll.independent(12),
    "antithetic": eggroll.antithetic(12),
    "crossed": eggroll.crossed(12),
    "blocks": eggroll.crossed(24, blocks=2),
    "signed blocks": eggroll.Population(2, 2, 3, 2),
}


FULL = (("", "full"),)


def network(p, x):
    return jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["o"]["w"] + p["o"]["b"]


def score(p, row):
    return -jnp.sum((network(p, row["x"]) - row["y"]) ** 2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def parameters(dtype=jnp.float32):
    shapes = {"a": {"w": (4, 8), "b": (8,)}, "o": {"w": (8, 3), "b": (3,)}}
    return jax.tree.map(lambda s: normal(sum(s), *s).astype(dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def rows(count=5, dtype=jnp.float32):
    return {"x": normal(3, count, 4).astype(dtype), "y": normal(4, count, 3).astype(dtype)}


def make(population="crossed", **settings):
    settings = {"sigma": 0.1, **settings}
    if isinstance(population, str):
        population = POPULATIONS[population]
    return eggroll.strategy(settings.pop("optimizer", optax.adam(1e-2)), population=population, **settings)


def members(es, state):
    """The parameters of all members, stacked."""
    return jax.vmap(es.member_params, (None, 0))(state, jnp.arange(es.population.size))


def evaluate(es, state, fn=score, batch=None, **options):
    return jax.jit(lambda s: es.evaluate(s, fn, rows() if batch is None else batch, **options))(state)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


MIXED = (("a/w", "oi"), ("b$", "frozen"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "rank", "rules"),
    [
        ("independent", 1, ()),
        ("antithetic", 2, ()),
        ("crossed", 2, MIXED),
        ("blocks", 1, FULL),
        ("signed blocks", 1, ()),
    ],
)
def test_scores_and_estimate_are_those_of_materialised_members(design, rank, rules):
    """Forward and update for every design, in f64: each member's scores, and -(1/(N sigma)) sum_n f_n E_n written out."""
    with jax.enable_x64(True):
        params, batch = parameters(jnp.float64), rows(dtype=jnp.float64)
        es = make(design, rank=rank, rules=rules)
        state = es.init(params, jax.random.key(1))

        @jax.jit
        def everything(state):
            scores, each = es.evaluate(state, score, batch), members(es, state)
            expected = jax.vmap(lambda p: jax.vmap(functools.partial(score, p))(batch))(each)
            return scores, expected, es.estimate(state, scores).gradient, es.shaping(scores, es.population)[0], each

        scores, expected, gradient, shaped, each = everything(state)
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)

    weights = np.asarray(shaped, np.float64).reshape(es.population.shape)
    if es.population.signs == 2:  # what both signs share cancels in the pair
        weights = weights - weights.mean(3, keepdims=True)
    if es.population.rows > 1:  # the interaction of rows and columns, unbiased
        for axis in (1, 2):
            count = weights.shape[axis]
            weights = (weights - weights.mean(axis, keepdims=True)) * count / (count - 1)
    sigma = float(np.float32(0.1))
    explicit = jax.tree.map(
        lambda e, p: -np.tensordot(weights.ravel(), (np.asarray(e) - np.asarray(p)) / sigma, 1) / (len(e) * sigma),
        each,
        params,
    )
    assert_trees_close(gradient, explicit, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "chunk", "per_member"),
    [
        ("antithetic", 8, False),
        ("signed blocks", 1, True),
    ],  # whole blocks, of which the last chunk has fewer; columns of a block
)
def test_chunks_change_nothing(design, chunk, per_member):
    es, batch, scores = make(design), rows(), normal(5, POPULATIONS[design].size, 5)
    if per_member:
        batch = jax.tree.map(lambda x: jnp.stack([x + n for n in range(es.population.size)]), batch)

    @functools.partial(jax.jit, static_argnums=0)
    def run(es, state):
        return es.evaluate(state, score, batch, per_member=per_member), es.estimate(state, scores).gradient

    state = es.init(parameters(), jax.random.key(0))
    (whole, step), (parts, step_in_parts) = run(es, state), run(dataclasses.replace(es, chunk=chunk), state)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert_trees_close(step_in_parts, step, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_rows_of_its_own_reach_each_member():
    es = make("crossed")
    state = es.init(parameters(), jax.random.key(0))
    own = {k: jnp.stack([v + n for n in range(12)]) for k, v in rows(2).items()}
    scores = evaluate(es, state, score, own, per_member=True)
    expected = jax.jit(lambda s: jax.vmap(jax.vmap(score, (None, 0)))(members(es, s), own))(state)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_aux_and_mean():
    es = make("antithetic")
    state = es.init(parameters(), jax.random.key(0))
    with_aux = lambda p, row: (score(p, row), {"out": network(p, row["x"])})
    scores, aux = evaluate(es, state, with_aux, has_aux=True)
    np.testing.assert_allclose(scores, evaluate(es, state), rtol=1e-6)
    np.testing.assert_allclose(-((aux["out"] - rows()["y"]) ** 2).sum(-1), scores, rtol=1e-5)
    mean, aux = es.evaluate_mean(state, with_aux, rows(), has_aux=True)
    np.testing.assert_array_equal(mean, jax.vmap(lambda r: score(state.params, r))(rows()))
    assert aux["out"].shape == (5, 3)


@pytest.mark.slow
def test_pairs_mirror_and_equal_pairs_update_nothing():
    es = make("antithetic", optimizer=optax.sgd(1.0), shaping=lambda s, p: (s[:, 0], {}))
    state = es.init(parameters(), jax.random.key(0))
    each = jax.jit(functools.partial(members, es))(state)
    for pairs, base in zip(jax.tree.leaves(each), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose((pairs[::2] + pairs[1::2]) / 2, np.broadcast_to(base, (6, *base.shape)), atol=1e-7)
    equal = jnp.repeat(jnp.arange(6.0), 2)[:, None]
    update = jax.jit(es.update)
    assert_trees_close(update(state, equal)[0].params, state.params, rtol=0)
    scores = normal(1, 12, 1)
    shifted = [update(state, scores + c)[0].params for c in (0.0, 8.0)]
    assert_trees_close(*shifted, rtol=1e-3, atol=1e-3)


def test_main_effects_of_a_crossed_population_update_nothing():
    population = eggroll.crossed(12)
    i, j, _ = population.coordinates(jnp.arange(12))
    f = normal(0, 12)
    weights = direction_weights(f, population)
    moved = direction_weights(f + 3.0 * jnp.sin(i) - jnp.exp(j / 2), population)
    np.testing.assert_allclose(moved, weights, atol=1e-5)
    np.testing.assert_allclose(weights.sum(1), 0, atol=1e-5)


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (2, 2)])
def test_rank_of_perturbation_and_update(rank, columns):
    population = eggroll.Population(3 if columns == 1 else 1, 1 if columns == 1 else 2, columns, 1)
    es = eggroll.strategy(
        optax.sgd(1.0), population=population, rank=rank, sigma=0.5, shaping=lambda s, p: (s[:, 0], {})
    )
    state = es.init(jnp.zeros((9, 11)), jax.random.key(0))
    for member in jax.jit(functools.partial(members, es))(state):
        assert np.linalg.matrix_rank(np.asarray(member), tol=1e-4) == rank
    gradient = np.asarray(jax.jit(es.estimate)(state, normal(0, population.size, 1)).gradient)
    # double centring leaves one direction of a 2 x 2 block
    assert np.linalg.matrix_rank(gradient, tol=1e-4) == (3 * rank if columns == 1 else rank)


@pytest.mark.slow
def test_noise_is_fresh_every_generation_unless_reused():
    es, reused = make(), make(reuse=3)
    state = es.init({"w": normal(0, 4, 8)}, jax.random.key(0))
    draws = lambda es: jax.jit(jax.vmap(lambda g: es.member_params(dataclasses.replace(state, generation=g), 3)["w"]))(
        jnp.arange(4)
    )
    fresh, kept = draws(es), draws(reused)
    assert np.abs(fresh[0] - fresh[1]).max() > 0.01
    np.testing.assert_array_equal(kept[0], kept[2])
    assert np.abs(kept[2] - kept[3]).max() > 0.01


def test_sigma_may_be_a_schedule_and_scales_the_perturbation():
    es = make(sigma=optax.exponential_decay(0.2, 1, 0.5))
    state = es.init(parameters(), jax.random.key(0))
    update = jax.jit(es.update)
    metrics = [
        update(dataclasses.replace(state, generation=jnp.int32(g)), jnp.zeros((12, 1)))[1]["sigma"] for g in (0, 2)
    ]
    np.testing.assert_allclose(metrics, [0.2, 0.05], rtol=1e-6)


@pytest.mark.slow
def test_update_is_the_optimizers_step_on_the_estimate():
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    es = make(optimizer=optimizer)
    state = es.init(parameters(), jax.random.key(0))
    opt_state, params = optimizer.init(state.params), state.params
    step = jax.jit(lambda s, f: (es.estimate(s, f).gradient, *es.update(s, f)))
    for seed in range(3):
        gradient, state, metrics = step(state, normal(seed, 12, 1))
        updates, opt_state = jax.jit(optimizer.update)(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_close(state.params, params, rtol=1e-6)
    assert int(state.generation) == 3
    rms = np.sqrt(sum(float((u**2).sum()) for u in jax.tree.leaves(updates)) / 67)
    np.testing.assert_allclose(metrics["update_rms"], rms, rtol=1e-5)


def test_half_precision_models_step_in_f32():
    """Steps below a bf16 ulp add up in the f32 copy; without it they would be lost."""
    es = make(optimizer=optax.sgd(1.0), shaping=lambda s, p: (s[:, 0], {}))
    state = es.init(parameters(jnp.bfloat16), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.master)} == {jnp.dtype("float32")}
    scores = jnp.linspace(-1e-4, 1e-4, 12)[:, None]
    step = jax.jit(lambda s, f: (es.estimate(s, f).gradient, *es.update(s, f)))
    assert {g.dtype for g in jax.tree.leaves(step(state, scores)[0])} == {jnp.dtype("float32")}
    before, total = state, jax.tree.map(jnp.zeros_like, state.master)
    for _ in range(4):
        gradient, state, _ = step(state, scores)
        total = jax.tree.map(jnp.add, total, gradient)
    moved = jax.tree.map(lambda a, b: b - a, state.master, before.master)
    assert_trees_close(moved, total, rtol=1e-2, atol=1e-6)
    assert_trees_close(jax.tree.map(lambda m: m.astype(jnp.bfloat16), state.master), state.params, rtol=0)
    scored = evaluate(es, state, lambda p, r: score(p, r).astype(jnp.float32), rows(dtype=jnp.bfloat16))
    assert scored.dtype == jnp.float32 and len(np.unique(np.asarray(scored))) > 30


def test_frozen_leaves_keep_their_value_and_have_no_optimizer_state():
    es = make(rules=(("^a/", "frozen"),))
    state = es.init(parameters(), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * 27 + 1
    after, _ = jax.jit(es.update)(state, normal(0, 12, 1))
    assert_trees_close(after.params["a"], state.params["a"], rtol=0)
    assert np.abs(np.asarray(after.params["o"]["w"] - state.params["o"]["w"])).min() > 1e-3
    assert_trees_close(es.member_params(state, 5)["a"], state.params["a"], rtol=0)


def test_compiles_once():
    es = make()
    state = es.init(parameters(), jax.random.key(0))
    step = jax.jit(lambda s, b: es.update(s, es.evaluate(s, score, b))[0])
    for _ in range(3):
        state = step(state, rows())
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make(sigma=0.0), "sigma must be positive"),
        (lambda: make(rank=0), "rank must be a whole number >= 1; got 0"),
        (lambda: make(noise="cauchy"), r"\('gaussian', 'rademacher'\); got 'cauchy'"),
        (lambda: make(rules=(("", "frozen"),)).init(parameters(), jax.random.key(0)), "all 4 are frozen"),
        (lambda: step_with(jnp.zeros((11, 1))), r"12 members; got shape \(11, 1\)"),
        (lambda: step_with(jnp.zeros((1, 2, 3))), "12 members"),
        (lambda: run_score(lambda p, r: r["x"]), r"one number per row.*got shape \(4,\)"),
        (lambda: run_score(score, {"x": jnp.zeros((2, 4)), "y": jnp.zeros((3, 3))}), "same leading axes"),
        (lambda: run_score(score, jnp.zeros(())), "same leading axes"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def step_with(scores):
    es = make()
    es.update(es.init(parameters(), jax.random.key(0)), scores)


def run_score(fn, batch=None):
    es = make()
    state = es.init(parameters(), jax.random.key(0))
    jax.eval_shape(lambda s: es.evaluate(s, fn, rows() if batch is None else batch), state)
