"""What the noise and the estimate are on average: seeded Monte-Carlo against closed forms, 5-sigma bands.

Closed forms for factor entries of kurtosis k (3 Gaussian, 2.8796 the generator's, 1 signs), rank r, E an m x n product:

    E_jk^4 = 3 + (k^2 - 3)/r          same row or column E_jk^2 E_jl^2 = 1 + (k - 1)/r
    rectangle E_jk E_jq E_lk E_lq = 1/r                other row and column E_jk^2 E_lq^2 = 1
    |E|^2 <E, G>^2 = [mn + 2 + (k^2 - 3 + (m + n - 2)(k - 1))/r] |G|^2

which for k = 3 are 3 + 6/r, 1 + 2/r and mn + 2 + 2(m + n + 1)/r, and for k = 1 are 3 - 2/r, 1 and mn + 2 - 2/r.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll

pytestmark = pytest.mark.optimised  # computes long

KURTOSIS = {"gaussian": 3 - (2 + 1 / 120) / (4 + 1 / 12) ** 2, "rademacher": 1.0}
FULL = (("", "full"),)


def raw(scores, population):
    """Shaping that leaves the scores alone."""
    return scores[:, 0], {}


def dense(weight):
    """The perturbed weight as an array, by a product that has a rule."""
    return jnp.eye(weight.shape[0]) @ weight


def estimates(score, params, count, *, rules=(), shaping=raw, **settings):
    """Independent ascent estimates at params, one per seed: a pytree of [count, ...]."""
    es = eggroll.strategy(optax.sgd(1.0), rules=rules, shaping=shaping, **settings)

    def one(seed):
        state = es.init(params, jax.random.key(seed))
        scores = es.evaluate(state, lambda p, _: score(p), jnp.zeros(1))
        return jax.tree.map(jnp.negative, es.estimate(state, scores).gradient)

    run = jax.jit(lambda seeds: jax.lax.map(one, seeds))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), run(jnp.arange(count)))


def perturbations(members, shape, rank, kind, rules=()):
    """E of independent members, float64 [members, m, n]."""
    es = eggroll.strategy(
        optax.sgd(1.0), population=eggroll.independent(members), rank=rank, sigma=1.0, noise=kind, rules=rules
    )
    state = es.init(jnp.zeros(shape), jax.random.key(0))
    run = jax.jit(lambda ids: jax.vmap(lambda member: es.member_params(state, member))(ids))
    return np.asarray(run(jnp.arange(members)), np.float64)


def assert_mean(samples, expected, tolerance):
    """The sample mean is within 5 standard errors of expected, and these are small enough to tell."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(ddof=1) / math.sqrt(len(samples))
    assert abs(samples.mean() - expected) <= 5 * error + 1e-6, (samples.mean(), expected, error)
    assert 5 * error < tolerance, f"too few samples to tell: 5 standard errors are {5 * error}"


def sample_moment(m, n, rank, kurtosis):
    """E |E|^2 <E, G>^2 / |G|^2."""
    return m * n + 2 + (kurtosis**2 - 3 + (m + n - 2) * (kurtosis - 1)) / rank


# ---- the noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KURTOSIS)
@pytest.mark.parametrize("rank", [1, 4])
def test_moments_of_a_perturbation(kind, rank):
    k = KURTOSIS[kind]
    e = perturbations(100_000, (6, 4), rank, kind)
    square = e**2
    assert_mean(e.mean(axis=(1, 2)), 0, 0.01)
    assert_mean(square.mean(axis=(1, 2)), 1, 0.02)
    assert_mean((e**3).mean(axis=(1, 2)), 0, 0.1)
    # 6/r apart from Gaussian noise, 0.7/r from Gaussian factors: the tolerance tells them apart at rank 1
    assert_mean((square**2).mean(axis=(1, 2)), 3 + (k**2 - 3) / rank, 0.6)
    rows, columns = square.sum(axis=2), square.sum(axis=1)
    same_row = (rows**2 - (square**2).sum(axis=2)).mean(axis=1) / (4 * 3)
    same_column = (columns**2 - (square**2).sum(axis=1)).mean(axis=1) / (6 * 5)
    assert_mean(same_row, 1 + (k - 1) / rank, 0.15)
    assert_mean(same_column, 1 + (k - 1) / rank, 0.15)
    assert_mean((square[:, :3, :2] * square[:, 3:, 2:]).mean(axis=(1, 2)), 1, 0.08)
    corners = e[:, :3, :2] * e[:, :3, 2:] * e[:, 3:, :2] * e[:, 3:, 2:]
    assert_mean(corners.mean(axis=(1, 2)), 1 / rank, 0.08)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", ["tanh", "sin", "sign"])
def test_bias_of_a_scalar_weight(name, rank):
    """E[x f(x)] of the drawn noise against exact integration over the generator's density (see test_rank_bias.py)."""
    exact = {
        ("tanh", 1): 0.4838,
        ("tanh", 4): 0.56628,
        ("sin", 1): 0.36173,
        ("sin", 4): 0.51955,
        ("sign", 1): 0.64279,
        ("sign", 4): 0.75379,
    }[name, rank]
    x = perturbations(200_000, (4, 4), rank, "gaussian")
    assert_mean((x * {"tanh": np.tanh, "sin": np.sin, "sign": np.sign}[name](x)).mean(axis=(1, 2)), exact, 0.01)


# ---- linear, quadratic and cubic objectives -------------------------------------------------------------------------

GRADIENT = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def linear(weight):
    """<GRADIENT, W>."""
    return jnp.sum(dense(weight) * GRADIENT)


@pytest.mark.parametrize("kind", KURTOSIS)
@pytest.mark.parametrize("rank", [1, 4])
def test_linear_objective_mean_and_second_moment(kind, rank):
    one = estimates(
        linear, jnp.zeros((6, 4)), 100_000, population=eggroll.independent(1), rank=rank, sigma=0.3, noise=kind
    )
    squared = float(jnp.sum(GRADIENT**2))
    assert_mean((one * np.asarray(GRADIENT)).sum(axis=(1, 2)) / squared, 1, 0.05)
    other = np.random.default_rng(1).normal(size=(6, 4))
    assert_mean((one * other).sum(axis=(1, 2)), float(np.sum(other * np.asarray(GRADIENT))), 1.0)
    expected = sample_moment(6, 4, rank, KURTOSIS[kind])
    assert_mean((one**2).sum(axis=(1, 2)) / squared, expected, 0.1 * expected)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("kind", KURTOSIS)
def test_quadratic_objective_is_unbiased_for_every_rank_and_sigma(rank, sigma, kind):
    rng = np.random.default_rng(2)
    curvature = jnp.asarray(rng.normal(size=(20, 20)) / 4, jnp.float32)
    start = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def quadratic(weight):
        w = dense(weight).ravel()
        return w @ curvature @ w + w[0]

    exact = np.asarray(jax.grad(quadratic)(start), np.float64)
    measured = estimates(quadratic, start, 2000, population=eggroll.antithetic(128), rank=rank, sigma=sigma, noise=kind)
    assert_mean((measured * exact).sum(axis=(1, 2)) / np.sum(exact**2), 1, 0.1)
    for _ in range(3):
        direction = rng.normal(size=(5, 4))
        direction /= np.linalg.norm(direction)
        assert_mean((measured * direction).sum(axis=(1, 2)), np.sum(direction * exact), 0.1 * np.linalg.norm(exact))


@pytest.mark.parametrize(("kind", "rank"), [("gaussian", 1), ("gaussian", 3), ("rademacher", 1), ("rademacher", 3)])
def test_cubic_bias(kind, rank):
    k, sigma = KURTOSIS[kind], 0.5
    settings = {"population": eggroll.antithetic(256), "rank": rank, "sigma": sigma, "noise": kind}
    corner = estimates(lambda w: dense(w)[0, 0] ** 3, jnp.zeros((4, 3)), 4000, **settings)
    assert_mean(corner[:, 0, 0] / sigma**2, 3 + (k**2 - 3) / rank, 0.6)
    assert_mean(corner[:, 1, 2] / sigma**2, 0, 0.6)
    norm = estimates(lambda w: dense(w)[0, 0] * jnp.sum(dense(w) ** 2), jnp.zeros((4, 3)), 2000, **settings)
    assert_mean(norm[:, 0, 0] / sigma**2, sample_moment(4, 3, rank, k), 2.5)
    assert_mean(norm[:, 3, 2] / sigma**2, 0, 1.5)


def test_cubic_bias_of_full_rank_noise():
    """sigma^2 (d + 2): the generator's own kurtosis is all that is left, d - 1 + k instead of d + 2."""
    settings = {"population": eggroll.antithetic(256), "sigma": 0.5, "rules": FULL}
    norm = estimates(lambda w: w[0, 0] * jnp.sum(w**2), jnp.zeros((4, 3)), 2000, **settings)
    assert_mean(norm[:, 0, 0] / 0.25, 12 - 1 + KURTOSIS["gaussian"], 0.5)


# ---- crossed populations --------------------------------------------------------------------------------------------


def centred_wishart(count, size, kurtosis):
    """c with E[C^2] = c I, C = A^T H A / (count - 1), H the centring matrix, A [count, size] of iid entries."""
    degrees = count - 1
    fourth = degrees**2 + 2 * degrees + (kurtosis - 3) * degrees**2 / count
    return ((size - 1) * degrees + fourth) / degrees**2


@pytest.mark.parametrize("kind", KURTOSIS)
def test_crossed_population_mean_and_second_moment_of_a_matrix(kind):
    """Centring costs one row and one column: P - 1 for P in the second moment (1 + (m+1)/P)(1 + (n+1)/Q) of Gaussians."""
    rows, columns, k = 8, 10, KURTOSIS[kind]
    measured = estimates(
        linear, jnp.zeros((6, 4)), 30_000, population=eggroll.crossed(80, rows=rows), sigma=0.3, noise=kind
    )
    squared = float(jnp.sum(GRADIENT**2))
    assert_mean((measured * np.asarray(GRADIENT)).sum(axis=(1, 2)) / squared, 1, 0.02)
    # the weight is [inputs 6, outputs 4]; rows carry the output factor
    expected = centred_wishart(rows, 4, k) * centred_wishart(columns, 6, k)
    assert_mean((measured**2).sum(axis=(1, 2)) / squared, expected, 0.1)


def test_the_centred_formula_tends_to_the_published_one():
    for count in (10**3, 10**5):
        assert centred_wishart(count, 7, 3) == pytest.approx(1 + 8 / count, abs=10 / count)
    assert centred_wishart(10, 7, 3) == pytest.approx(1 + 8 / 9, rel=1e-12)


@pytest.mark.parametrize("signs", [1, 2])
@pytest.mark.parametrize("blocks", [1, 4])
def test_crossed_blocks_and_signs(signs, blocks):
    """Blocks average independently, and both signs of a direction say the same about a linear objective."""
    rows, columns, k = 4, 6, KURTOSIS["gaussian"]
    population = eggroll.Population(blocks, rows, columns, signs)
    measured = estimates(linear, jnp.zeros((6, 4)), 20_000, population=population, sigma=0.3)
    squared = float(jnp.sum(GRADIENT**2))
    expected = 1 + (centred_wishart(rows, 4, k) * centred_wishart(columns, 6, k) - 1) / blocks
    assert_mean((measured * np.asarray(GRADIENT)).sum(axis=(1, 2)) / squared, 1, 0.05)
    assert_mean((measured**2).sum(axis=(1, 2)) / squared, expected, 0.4)


def test_crossed_population_second_moment_of_a_vector():
    """e_ij = u_i v_j entrywise, v of signs: C = (U^T H U / (P-1)) * (V^T H V / (Q-1)) entrywise."""
    rows, columns, size = 8, 10, 12
    gradient = jnp.asarray(np.random.default_rng(3).normal(size=size), jnp.float32)
    measured = estimates(
        lambda v: jnp.sum(v * gradient), jnp.zeros(size), 20_000, population=eggroll.crossed(80, rows=rows), sigma=0.3
    )

    def diagonal(count, kurtosis):
        return centred_wishart(count, 1, kurtosis)

    same = diagonal(rows, KURTOSIS["gaussian"]) * diagonal(columns, 1.0)
    other = 1 / ((rows - 1) * (columns - 1))
    squared = float(jnp.sum(gradient**2))
    assert_mean(measured @ np.asarray(gradient) / squared, 1, 0.02)
    assert_mean((measured**2).sum(axis=1) / squared, same + (size - 1) * other, 0.05)


def test_members_of_a_crossed_population_are_uncorrelated():
    es = eggroll.strategy(optax.sgd(1.0), population=eggroll.crossed(6, rows=2), sigma=1.0)

    def members(seed):
        state = es.init(jnp.zeros((3, 2)), jax.random.key(seed))
        return jax.vmap(lambda n: es.member_params(state, n))(jnp.arange(6))

    e = np.asarray(jax.jit(jax.vmap(members))(jnp.arange(50_000)), np.float64).reshape(-1, 36)
    covariance = e.T @ e / len(e)
    # entries of a covariance estimate: E[x^2 y^2] - E[xy]^2 is at most 8.3 on the diagonal and 2.9 off it
    assert np.abs(np.diag(covariance) - 1).max() < 5 * math.sqrt(8.3 / len(e))
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 5 * math.sqrt(2.9 / len(e))


# ---- consequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("population", "shaping", "law", "simulated"),
    [
        (eggroll.independent(256), eggroll.fitness.centred, (1 + 4096 / 256) ** -0.5, 0.235),
        (eggroll.antithetic(256), eggroll.fitness.centred, (1 + 4096 / 128) ** -0.5, 0.167),
        (eggroll.antithetic(256), eggroll.fitness.pair_sign, (1 + math.pi / 2 * 4096 / 128) ** -0.5, 0.140),
        (eggroll.crossed(256), eggroll.fitness.centred, None, None),
    ],
)
def test_cosine_law(population, shaping, law, simulated):
    """m = n = 64, N = 256, rank 1: the estimate's cosine with the gradient, mean of 120 seeds.

    For independent members: the law that ignores terms of order m + n (.2425, .174, .140), and a published simulation.
    """
    gradient = jnp.asarray(np.random.default_rng(4).normal(size=(64, 64)), jnp.float32)
    left, stretch, right = jnp.linalg.svd(gradient)

    def linear_64(weight):  # <G, W> as a sum over singular vectors, so no member's weight is formed
        return jnp.sum(stretch * jnp.sum((left.T @ weight) * right, axis=1))

    measured = estimates(linear_64, jnp.zeros((64, 64)), 120, population=population, sigma=0.1, shaping=shaping)
    norms = np.linalg.norm(measured.reshape(120, -1), axis=1) * np.linalg.norm(gradient)
    cosine = (measured * np.asarray(gradient)).sum(axis=(1, 2)) / norms
    if shaping is eggroll.fitness.pair_sign:
        assert_mean(cosine, law, 0.01)
    else:
        assert_mean(cosine, eggroll.predicted_cosine(population, 4096, shapes=[(64, 64)]), 0.01)
    if law is not None:
        assert abs(cosine.mean() - simulated) < 0.006
        assert abs(cosine.mean() - law) < 0.012


def test_high_rank_is_full_rank_noise():
    """Means equal; second moments mn + 2 + 2(m + n + 1)/r against mn + 2 (each with the generator's kurtosis)."""
    k, side, squared = KURTOSIS["gaussian"], 32, float(jnp.sum(GRADIENT**2))
    wide = jnp.pad(GRADIENT, ((0, side - 6), (0, side - 4)))  # rank 32 needs a 32 x 32 matrix

    def linear_wide(weight):
        return jnp.sum((jnp.eye(6, side) @ weight)[:, :4] * GRADIENT)

    settings = {"population": eggroll.independent(4), "sigma": 0.3}
    full = estimates(lambda w: jnp.sum(w * wide), jnp.zeros((side, side)), 4000, rules=FULL, **settings)
    high = estimates(linear_wide, jnp.zeros((side, side)), 4000, rank=side, **settings)
    for measured, moment in ((full, side**2 - 1 + k), (high, sample_moment(side, side, side, k))):
        assert_mean((measured * np.asarray(wide)).sum(axis=(1, 2)) / squared, 1, 0.08)
        assert_mean((measured**2).sum(axis=(1, 2)) / squared, (moment + 3) / 4, 20)


@pytest.mark.parametrize("form", ["lowrank", "full"])
def test_linearisation_error_grows_as_sigma_sqrt_d(form):
    """f = 1/2 sum x |x| at 0: gradient 0, smoothed gradient sigma E|e|^3 / 2 in every entry, norm ~ sigma sqrt(d)."""
    third = 1.5812  # E|a|^3 of the generator; a product of two independent entries has its square
    expected = third / 2 if form == "full" else third**2 / 2

    def objective(weight):
        x = weight if form == "full" else dense(weight)
        return jnp.sum(x * jnp.abs(x)) / 2

    rules = FULL if form == "full" else ()
    norms = {}
    for side, sigma in ((4, 0.5), (8, 0.05), (16, 0.5), (32, 0.05)):
        settings = {"population": eggroll.antithetic(512), "sigma": sigma, "rules": rules}
        entries = estimates(objective, jnp.zeros((side, side)), 64, **settings).mean(axis=(1, 2)) / sigma
        assert_mean(entries, expected, 0.25)
        norms[side] = side * entries.mean()  # per sigma
    points = [(sigma * side, sigma * norms[side]) for side in norms for sigma in (0.05, 0.5)]
    slope = np.polyfit(*np.log(np.array(points)).T, 1)[0]
    assert slope == pytest.approx(1, abs=0.03)
    # so with sigma = c / d it vanishes as d grows, and with sigma = c d^(-1/2 + 0.2) it does not
    for power, shrinks in ((-1.0, True), (-0.3, False)):
        errors = [side ** (2 * power) * norm for side, norm in norms.items()]
        assert all((b < a) == shrinks for a, b in zip(errors[:-1], errors[1:], strict=True))
