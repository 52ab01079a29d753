"""Small problems with a known optimum, and the published toy recipe in full with its reference numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll

POPULATIONS = {
    "independent": eggroll.independent(256),
    "antithetic": eggroll.antithetic(256),
    "crossed": eggroll.crossed(256),
    "blocks": eggroll.crossed(256, blocks=4),
}


def bowl():
    """Parameters at 0, their optimum, and a score that is quadratic in the distance to it."""
    rng = np.random.default_rng(0)
    optimum = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in (("w", (8, 6)), ("b", 6))}
    # scores are averaged over the 8 rows, so with orthogonal rows of length sqrt(8) the curvature is 2 everywhere
    inputs = jnp.asarray(math.sqrt(8) * np.linalg.qr(rng.normal(size=(8, 8)))[0], jnp.float32)

    def score(params, row):
        return -jnp.sum((row @ (params["w"] - optimum["w"])) ** 2) - jnp.sum((params["b"] - optimum["b"]) ** 2)

    return jax.tree.map(jnp.zeros_like, optimum), optimum, score, inputs


def distance(params, optimum):
    parts = zip(jax.tree.leaves(params), jax.tree.leaves(optimum), strict=True)
    return float(jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in parts)))


def generations(es, params, score, batch, count):
    """The state after `count` generations and the metrics of each."""

    def generation(state, _):
        return es.update(state, es.evaluate(state, score, batch))

    run = jax.jit(lambda state: jax.lax.scan(generation, state, length=count))
    return run(es.init(params, jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("design", "rank", "noise", "rules"),
    [
        ("independent", 1, "gaussian", ()),
        ("antithetic", 1, "rademacher", ()),
        ("crossed", 4, "gaussian", ()),
        ("blocks", 1, "gaussian", (("", "full"),)),
    ],
    ids=["independent", "signs", "rank4", "full"],
)
def test_unscaled_fitness_converges_to_the_optimum(design, rank, noise, rules):
    """Plain gradient ascent with steps that shrink with the gradient: the distance falls geometrically."""
    params, optimum, score, inputs = bowl()
    es = eggroll.strategy(
        optax.sgd(0.1),
        population=POPULATIONS[design],
        rank=rank,
        sigma=0.01,
        noise=noise,
        rules=rules,
        shaping=eggroll.fitness.centred,
    )
    state, _ = generations(es, params, score, inputs, 120)
    assert distance(state.params, optimum) < 0.01 * distance(params, optimum)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shaping", "rate"),
    [(eggroll.fitness.centred_rank, 0.15), (eggroll.fitness.per_group(std="group"), 0.05)],
    ids=["centred_rank", "per_group"],
)
def test_normalised_fitness_converges_with_a_decaying_rate(shaping, rate):
    params, optimum, score, inputs = bowl()
    tx = optax.sgd(optax.linear_schedule(rate, 0.0, 300))
    es = eggroll.strategy(tx, population=eggroll.antithetic(256), sigma=0.05, shaping=shaping)
    state, metrics = generations(es, params, score, inputs, 300)
    assert distance(state.params, optimum) < 0.05 * distance(params, optimum)
    assert metrics["finite_members"][-1] == 256


@pytest.mark.slow
def test_a_nan_member_is_survived_and_counted():
    params, optimum, score, inputs = bowl()

    def fragile(p, row):  # half of the members at the start, fewer as b[0] rises to its optimum, 1.8
        return jnp.where(p["b"][0] < 0, jnp.nan, score(p, row))

    es = eggroll.strategy(optax.sgd(0.05), population=eggroll.independent(64), sigma=0.05)
    state, metrics = generations(es, params, fragile, inputs, 20)
    finite = metrics["finite_members"]
    assert 16 < finite[0] < 48 and finite[-1] > finite[0]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.params))
    assert distance(state.params, optimum) < 0.9 * distance(params, optimum)


@pytest.mark.slow
def test_always_two():
    """Source: the smoke test of HyperscaleES; its rank 8 fits the inner matrix only, the outer ones get full noise."""
    rng = np.random.default_rng(0)
    sizes = (3, 16, 16, 1)
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    params = [{"w": jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32), "b": jnp.zeros(s[1])} for s in shapes]

    def score(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return -jnp.sum((x @ params[-1]["w"] + params[-1]["b"] - 2) ** 2)

    es = eggroll.strategy(
        optax.adamw(0.03),
        population=eggroll.antithetic(64),
        rank=8,
        sigma=0.2,
        rules=(("[02]/w", "full"),),
    )
    inputs = jnp.asarray(rng.normal(size=(2, 16, 3)), jnp.float32)
    validation = jax.jit(lambda s: es.evaluate_mean(s, score, inputs[1]).mean())
    generation = lambda state, _: (es.update(state, es.evaluate(state, score, inputs[0]))[0], None)
    ten = jax.jit(lambda state: jax.lax.scan(generation, state, length=10)[0])
    start = lambda seed: es.init(params, jax.random.key(seed))
    before = float(validation(start(0)))
    after = [ten(start(seed)) for seed in range(3)]
    assert before < -3 and np.median([float(validation(state)) for state in after]) > 0.3 * before
    longer = after[0]
    for _ in range(5):
        longer = ten(longer)
    assert float(validation(longer)) > 0.05 * before


# ---- y = x^2 + x + 1 ------------------------------------------------------------------------------------------------

EPOCHS, THREADS, PER_POINT, POINTS = 1000, 4096, 128, 1024


def normalised_relu(h):
    centred = h - h.mean(-1, keepdims=True)
    return jax.nn.relu(centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5))


def predict(params, x):
    for layer in params[:-1]:
        x = normalised_relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def parabola_error(seed, reuse=1):
    """Test error after the whole recipe: 128 adjacent members share a data point, 32 points per epoch, in turn."""
    rng = np.random.default_rng(seed)
    shapes = ((1, 64), (64, 64), (64, 64), (64, 1))
    params = [{"w": jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32), "b": jnp.zeros(s[1])} for s in shapes]
    x = jnp.asarray(rng.uniform(-10, 10, (2, POINTS, 1)), jnp.float32)
    y = x**2 + x + 1

    def sigma(epoch):
        return 1 - jnp.maximum(epoch - 1, 0) / EPOCHS

    def learning_rate(epoch):
        falling = 1 - epoch / EPOCHS
        convention = {"source": "hyperscale", "target": "textbook", "members": THREADS}
        return eggroll.convert_learning_rate(falling, sigma=sigma(epoch), **convention)

    es = eggroll.strategy(
        optax.sgd(learning_rate),
        population=eggroll.antithetic(THREADS),
        sigma=sigma,
        reuse=reuse,
        shaping=eggroll.fitness.per_group(std="global"),
    )

    def score(params, row):
        return -jnp.sum((predict(params, row["x"]) - row["y"]) ** 2)

    def epoch(state, t):
        points = (t * (THREADS // PER_POINT) + jnp.arange(THREADS) // PER_POINT) % POINTS
        rows = {"x": x[0, points][:, None], "y": y[0, points][:, None]}
        return es.update(state, es.evaluate(state, score, rows, per_member=True), groups=PER_POINT)

    train = jax.jit(lambda state: jax.lax.scan(epoch, state, jnp.arange(EPOCHS))[0])
    state = train(es.init(params, jax.random.key(seed)))
    return float(jnp.mean((predict(state.params, x[1]) - y[1]) ** 2))


@pytest.mark.slow
@pytest.mark.optimised
def test_parabola_reaches_the_reference_error():
    """Target variance 923, best straight line 890. An independent replica of the recipe ends at 1.54, 1.76 and 3.08 for
    three seeds and at 9.1 with noise that never changes; this code at 1.37, 2.75, 1.83 and at 6.8.
    """
    error = parabola_error(0)
    assert error < 4
    assert parabola_error(0, reuse=EPOCHS) > 1.5 * error
