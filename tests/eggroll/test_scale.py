"""Learning-rate conventions, anchored decay and the cosine law, each against an independent computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import scale

CONVENTIONS = ("textbook", "paper", "hyperscale", "vllm")


def published_step(convention, rate, fitness, perturbations, sigma):
    """The parameter step each code base takes, written out with its own scaling of the factors."""
    n = len(fitness)
    if convention == "textbook":
        return rate / (n * sigma) * sum(f * e for f, e in zip(fitness, perturbations, strict=True))
    if convention == "paper":
        return rate / n * sum(f * e for f, e in zip(fitness, perturbations, strict=True))
    if convention == "hyperscale":  # factors carry sigma, the mean is multiplied by sqrt(N)
        return (
            rate * np.sqrt(n) * np.mean([f * (sigma * e) for f, e in zip(fitness, perturbations, strict=True)], axis=0)
        )
    # vllm: factors carry sigma, pairs are merged, the sum is divided by N sigma
    pairs = zip(fitness[::2], fitness[1::2], perturbations[::2], strict=True)
    return rate * sum((plus - minus) * (sigma * e) for plus, minus, e in pairs) / (n * sigma)


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("target", CONVENTIONS)
def test_converted_rates_take_the_same_step(source, target):
    rng = np.random.default_rng(0)
    sigma, members = 0.07, 10
    fitness = rng.normal(size=members)
    directions = rng.normal(size=(members // 2, 3, 2))
    perturbations = np.stack([directions, -directions], axis=1).reshape(members, 3, 2)
    rate = scale.convert_learning_rate(0.3, source=source, target=target, sigma=sigma, members=members)
    np.testing.assert_allclose(
        published_step(target, rate, fitness, perturbations, sigma),
        published_step(source, 0.3, fitness, perturbations, sigma),
        rtol=1e-12,
    )


def test_conversions_golden():
    # sigma 0.1, N 16: eta = lr_HS * 0.01 * 4, alpha = lr_HS * 0.1 * 4, eta = lr_vLLM * 0.1
    def convert(source, target):
        return scale.convert_learning_rate(1.0, source=source, target=target, sigma=0.1, members=16)

    assert convert("hyperscale", "textbook") == pytest.approx(0.04, rel=1e-12)
    assert convert("hyperscale", "paper") == pytest.approx(0.4, rel=1e-12)
    assert convert("vllm", "textbook") == pytest.approx(0.1, rel=1e-12)
    assert convert("textbook", "hyperscale") == pytest.approx(25.0, rel=1e-12)
    assert convert("vllm", "paper") == 1.0


def test_conversion_of_a_traced_sigma():
    rate = jax.jit(lambda s: scale.convert_learning_rate(2.0, source="hyperscale", target="paper", sigma=s, members=4))
    np.testing.assert_allclose(rate(0.5), 2.0)


def test_hyperscale_rate_is_the_size_of_a_noise_step_in_sigmas():
    """Fitness unrelated to the noise, unit variance: the root mean square step is lr * sigma whatever N is."""
    rng = np.random.default_rng(0)
    for members in (64, 256, 1024):
        noise, fitness = rng.normal(size=(members, 4000)), rng.normal(size=members)
        fitness = (fitness - fitness.mean()) / fitness.std()
        eta = scale.convert_learning_rate(0.3, source="hyperscale", target="textbook", sigma=0.05, members=members)
        step = eta / (members * 0.05) * fitness @ noise
        # 4000 entries: the relative standard deviation of the root mean square is sqrt(1 / 8000)
        assert abs(np.sqrt(np.mean(step**2)) / (0.3 * 0.05) - 1) < 5 / np.sqrt(8000)


def test_bad_conversions_are_refused():
    with pytest.raises(ValueError, match="'openai'; known: textbook, paper, hyperscale, vllm"):
        scale.convert_learning_rate(1.0, source="openai", target="paper", sigma=0.1, members=2)
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        scale.convert_learning_rate(1.0, source="paper", target="vllm", sigma=0.1, members=0)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        scale.convert_learning_rate(1.0, source="paper", target="vllm", sigma=0, members=2)


def test_anchored_decay_moves_toward_the_start():
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    tx = optax.chain(scale.anchored_weight_decay(0.5), optax.scale_by_learning_rate(0.1))
    state = tx.init(params)
    params = jax.tree.map(lambda p: p + 1.0, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    # -0.1 * 0.5 * (theta - theta_0) with theta - theta_0 = 1
    np.testing.assert_allclose(updates["w"], [-0.05, -0.05], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.05, rtol=1e-6)


def test_anchored_decay_is_adamw_for_an_anchor_at_zero():
    gradients = [jnp.array([0.3, -1.0]), jnp.array([-0.2, 0.7]), jnp.array([0.1, 0.1])]
    anchored = optax.chain(optax.scale_by_adam(), scale.anchored_weight_decay(0.1), optax.scale_by_learning_rate(0.01))
    adamw = optax.adamw(0.01, weight_decay=0.1)
    trajectories = []
    for tx in (anchored, adamw):
        params = jnp.zeros(2)
        state = tx.init(params)
        for gradient in gradients:
            updates, state = jax.jit(tx.update)(gradient, state, params)
            params = optax.apply_updates(params, updates)
        trajectories.append(params)
    assert np.all(np.abs(trajectories[0]) > 1e-3)
    np.testing.assert_allclose(*trajectories, rtol=1e-6)


def test_anchor_is_a_copy_that_survives_donation_and_a_low_precision_gradient():
    params = jnp.array([1.0, 2.0])
    tx = scale.anchored_weight_decay(1.0)
    state = tx.init(params)
    moved = jax.jit(lambda p: p + 1, donate_argnums=0)(params)
    updates, _ = tx.update(jnp.zeros(2, jnp.bfloat16), state, moved)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates.astype(jnp.float32), [1.0, 1.0])
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(updates, state)


def test_cosine_law_golden():
    # m = n = 64, N = 256: sqrt(256 / 4352) and sqrt(128 / 4224)
    assert scale.predicted_cosine(eggroll.independent(256), 4096) == pytest.approx(0.24254, abs=1e-5)
    assert scale.predicted_cosine(eggroll.antithetic(256), 4096) == pytest.approx(0.17408, abs=1e-5)


def test_cosine_of_one_matrix_is_the_cards_second_moment():
    m, n = 12, 20
    expected = (1 + (m + 1) / 7) * (1 + (n + 1) / 15)  # centring costs one of 8 rows and one of 16 columns
    predicted = scale.predicted_cosine(eggroll.crossed(128), m * n, shapes=[(m, n)])
    assert predicted == pytest.approx(expected**-0.5, rel=1e-12)
    for rank in (1, 4):
        one_sample = m * n + 2 + 2 * (m + n + 1) / rank
        expected = one_sample / 50 + 49 / 50
        predicted = scale.predicted_cosine(eggroll.independent(50), m * n, shapes=[(m, n)], rank=rank)
        assert predicted == pytest.approx(expected**-0.5, rel=1e-12)


def test_cosine_with_several_leaves_against_simulation():
    """Linear objective on two matrices and a bias, gradients of equal size, simulated in NumPy."""
    rng = np.random.default_rng(1)
    shapes, rows, columns, rank, blocks = [(6, 10), (4, 6)], 8, 8, 2, 2
    dimensions = 6 * 10 + 4 * 6 + 30
    moments = []
    for _ in range(1000):
        gradients = [rng.normal(size=s) for s in shapes] + [rng.normal(size=30)]
        noise = []
        for m, n in shapes:
            a, b = rng.normal(size=(blocks, rows, m, rank)), rng.normal(size=(blocks, columns, n, rank))
            noise.append(np.einsum("gimr,gjnr->gijmn", a, b).reshape(-1, m, n) / np.sqrt(rank))
        noise.append(rng.normal(size=(blocks * rows * columns, 30)))
        fitness = sum(e.reshape(len(e), -1) @ g.ravel() for e, g in zip(noise, gradients, strict=True))
        fitness = fitness.reshape(blocks, rows, columns)
        fitness = fitness - fitness.mean(axis=1, keepdims=True)
        fitness = (fitness - fitness.mean(axis=2, keepdims=True)).ravel()
        squared = (
            sum(np.sum(np.tensordot(fitness, e, 1) ** 2) for e in noise) / (blocks * (rows - 1) * (columns - 1)) ** 2
        )
        moments.append(squared / sum(np.sum(g**2) for g in gradients))
    population = eggroll.crossed(blocks * rows * columns, blocks=blocks)
    predicted = scale.predicted_cosine(population, dimensions, shapes=shapes, rank=rank) ** -2
    assert abs(np.mean(moments) - predicted) < 5 * np.std(moments) / np.sqrt(len(moments))
    assert np.std(moments) / np.sqrt(len(moments)) < 0.02 * predicted


def test_bad_cosine_arguments_are_refused():
    with pytest.raises(ValueError, match="got 10, matrices alone hold 12"):
        scale.predicted_cosine(eggroll.independent(4), 10, shapes=[(3, 4)])
    with pytest.raises(ValueError, match=r"rank 4, matrix \(3, 4\)"):
        scale.predicted_cosine(eggroll.independent(4), 12, shapes=[(3, 4)], rank=4)
