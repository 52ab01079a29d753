"""One token from logits: the distribution, every cut against a NumPy twin, and logits meant to break it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.rollout.sampling import GREEDY, Sampling, cut, invert, sample, uniforms
from tests.rl.rollout import naive

draw = jax.jit(sample, static_argnums=2)
LOGITS = np.random.default_rng(0).normal(size=(40, 13)).astype(np.float32) * 2
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7, top_k=3),
    Sampling(top_k=1),
    Sampling(top_k=99),
    Sampling(top_p=0.7),
    Sampling(temperature=0.8, top_p=1e-6),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(temperature=1.3, top_k=6, top_p=0.9, min_p=0.05),
    GREEDY,
]


def spread(n):
    """n numbers that fill (0, 1) evenly."""
    return ((np.arange(n) + 0.5) / n).astype(np.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_and_both_log_probs_equal_the_numpy_twin(settings):
    u = np.random.default_rng(1).random(len(LOGITS)).astype(np.float32)
    got = draw(jnp.asarray(LOGITS), jnp.asarray(u), settings)
    assert [x.dtype for x in got] == [jnp.int32, jnp.float32, jnp.float32]
    for row, (logits, number) in enumerate(zip(LOGITS, u, strict=True)):
        token, logp, full = naive.sample(logits, number, settings)
        assert int(got.token[row]) == token
        np.testing.assert_allclose([got.logp[row], got.logp_full[row]], [logp, full], atol=1e-5, rtol=0)


def test_cuts_by_hand():
    # p = 0.5, 0.25, 0.125, 0.125, twice the last, in an order that is not sorted
    logits = jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25]))
    kept = lambda **settings: np.isfinite(cut(logits, Sampling(**settings))).tolist()
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_k=3) == [True] * 4  # two tie for the third place
    assert kept(top_p=0.49) == kept(top_k=1) == kept(min_p=0.51) == [False, True, False, False]
    assert kept(top_p=0.51) == kept(top_p=0.74) == kept(min_p=0.49) == [False, True, False, True]
    assert kept(top_p=0.76) == kept(min_p=0.24) == [True] * 4
    # top_k first: of (0.5, 0.25) renormalised, 2/3 is enough for 0.6
    assert kept(top_k=2, top_p=0.6) == [False, True, False, False]
    # renormalised: 0.25 / 0.75 = 1/3
    drawn = draw(logits, jnp.float32(0.9), Sampling(top_k=2))
    assert int(drawn.token) == 3
    np.testing.assert_allclose([drawn.logp, drawn.logp_full], np.log([1 / 3, 1 / 4]), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [Sampling(), Sampling(temperature=0.7), Sampling(top_k=4), Sampling(top_p=0.8), Sampling(min_p=0.15)],
    ids=str,
)
def test_frequencies_are_the_probabilities(settings):
    """Chi-square of 20,000 draws with the numbers that requests get; 99.9 % quantiles of chi-square with 1 to 7 freedoms."""
    n, logits = 20_000, LOGITS[0, :8]
    u = jax.jit(uniforms)(jax.random.key(5), jnp.arange(n, dtype=jnp.uint32) // 100, jnp.arange(n) % 100)
    drawn = draw(jnp.broadcast_to(jnp.asarray(logits), (n, 8)), u, settings)
    counts = np.bincount(drawn.token, minlength=8)
    p = naive.probabilities(logits, settings)
    assert (counts[p == 0] == 0).all() and (p > 0).sum() > 1
    expected = n * p[p > 0]
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi < [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][(p > 0).sum() - 2]
    np.testing.assert_allclose(drawn.logp, np.log(p[drawn.token]), atol=1e-5)


def test_impossible_tokens_are_never_drawn_at_either_end():
    ends = jnp.array([0, 1e-30, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0], jnp.float32)
    rows = lambda logits: jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(ends), len(logits)))
    inf = np.inf
    drawn = draw(rows([-inf, 1, -inf, 2, 0, -inf, -inf]), ends, Sampling())
    assert drawn.token.tolist() == [1, 1, 1, 3, 4, 4]
    assert np.isfinite(drawn.logp).all()
    assert draw(rows([-200.0, 0, -200, 0, -200]), ends, Sampling()).token.tolist() == [1, 1, 1, 1, 3, 3]
    only = draw(rows([-inf, -inf, 7.0, -inf]), ends, Sampling(temperature=0.5, top_p=0.9))
    assert set(only.token.tolist()) == {2} and (only.logp == 0).all()


def test_a_running_sum_that_rounds_never_stops_on_an_impossible_token():
    """A parallel running sum in f32 also moves where a weight is 0: numbers that hit exactly these places."""
    rng = np.random.default_rng(3)
    weights = np.where(rng.random((64, 3000)) < 0.05, 10.0 ** rng.uniform(-8, 0, (64, 3000)), 0).astype(np.float32)
    running = np.asarray(jax.jit(functools.partial(jnp.cumsum, axis=-1))(weights))
    before = np.maximum.accumulate(running, 1)
    row, place = np.nonzero((weights[:, 1:] == 0) & (running[:, 1:] > before[:, :-1]))
    assert len(row) > 100  # else the test tests nothing
    edge = (before[row, place].astype(np.float64) + running[row, place + 1]) / 2 / before[row, -1]
    u = np.concatenate([edge * (1 + step * 2.0**-24) for step in range(-2, 9)] + [np.zeros(64), np.ones(64)])
    row = np.concatenate([np.tile(row, 11), np.arange(64), np.arange(64)])
    token = jax.jit(invert)(jnp.asarray(weights[row]), jnp.asarray(np.minimum(u, 1), jnp.float32))
    assert (weights[row, token] > 0).all()


@pytest.mark.parametrize("settings", [Sampling(), Sampling(temperature=0.6, top_k=50, top_p=0.95, min_p=0.01)], ids=str)
def test_a_vocabulary_of_152_thousand(settings):
    vocab = 151_936
    logits = np.random.default_rng(2).normal(size=vocab).astype(np.float32) * 1.5
    u = spread(16)
    drawn = draw(jnp.broadcast_to(jnp.asarray(logits), (16, vocab)), jnp.asarray(u), settings)
    p = naive.probabilities(logits, settings)
    edges = np.cumsum(p)
    for token, number, logp in zip(drawn.token.tolist(), u, drawn.logp, strict=True):
        assert p[token] > 0
        # sums of 152k terms in f32: the number lies within 1e-5 of the token's part of the unit interval
        assert edges[token] - p[token] - 1e-5 <= number <= edges[token] + 1e-5
        np.testing.assert_allclose(logp, np.log(p[token]), atol=1e-4)
    assert len(set(drawn.token.tolist())) > 3


def test_bf16_logits_count_in_f32():
    logits = jnp.asarray(LOGITS).astype(jnp.bfloat16)
    u = jnp.asarray(spread(len(LOGITS)))
    half, wide = (draw(x, u, Sampling(temperature=0.7, top_p=0.9)) for x in (logits, logits.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, half, wide)


def test_equal_logits_share_evenly_and_greedy_takes_the_first():
    flat = jnp.zeros((100, 5))
    drawn = draw(flat, jnp.asarray(spread(100)), Sampling())
    assert np.bincount(drawn.token).tolist() == [20] * 5
    np.testing.assert_allclose(drawn.logp, np.log(0.2), atol=1e-6)
    greedy = draw(jnp.array([[1.0, 3, 3, 2]]), jnp.array([0.99]), GREEDY)
    assert greedy.token.tolist() == [1] and greedy.logp.tolist() == [0.0]
    # softmax of (1, 3, 3, 2) at 3: 1 / (e^-2 + 2 + e^-1)
    np.testing.assert_allclose(greedy.logp_full, [-np.log(np.exp(-2) + 2 + np.exp(-1))], atol=1e-6)


def test_a_temperature_near_zero_is_greedy():
    drawn = draw(jnp.asarray(LOGITS * 1e3), jnp.asarray(spread(len(LOGITS))), Sampling(temperature=1e-6))
    assert drawn.token.tolist() == LOGITS.argmax(1).tolist()
    np.testing.assert_array_equal(drawn.logp, 0)
    assert np.isfinite(drawn.logp_full).all()


def test_extreme_logits_stay_finite():
    drawn = draw(jnp.array([[3e38, -3e38, 0.0]]), jnp.array([0.5]), Sampling(temperature=0.5))
    assert drawn.token.tolist() == [0] and drawn.logp.tolist() == [0.0]


def test_numbers_depend_on_key_request_and_position_alone():
    key = jax.random.key(7)
    uid, position = jnp.array([0, 1, 2**32 - 1, 2**31], jnp.uint32), jnp.array([1, 5, 0, 30])
    u = uniforms(key, uid, position)
    for i in range(4):  # alone, and written out
        bits = int(jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, uid[i]), position[i])))
        assert float(u[i]) == ((bits >> 9) + 0.5) / 2**23
    grid = uniforms(key, uid, position + jnp.arange(3)[:, None])
    assert grid.shape == (3, 4)
    np.testing.assert_array_equal(grid[0], u)
    np.testing.assert_array_equal(grid[:, ::-1], uniforms(key, uid[::-1], position[::-1] + jnp.arange(3)[:, None]))
    assert (
        len({*np.asarray(grid).ravel().tolist(), *np.asarray(uniforms(jax.random.key(8), uid, position)).tolist()})
        == 16
    )


def test_numbers_are_uniform_and_never_an_end():
    u = np.asarray(
        jax.jit(uniforms)(jax.random.key(1), jnp.arange(50, dtype=jnp.uint32)[:, None], jnp.arange(400)[None])
    )
    assert 0 < u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / u.size)
    counts = np.histogram(u, 16, (0, 1))[0]
    assert ((counts - u.size / 16) ** 2 / (u.size / 16)).sum() < 37.7  # 99.9 % of chi-square with 15 freedoms
    for axis in (0, 1):  # neighbours are unrelated: |r| < 4 / sqrt(n)
        a, b = np.take(u, range(49), axis), np.take(u, range(1, 50), axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "temperature must be .*; got -0.1"),
        ("temperature", float("nan"), "temperature must be .*; got nan"),
        ("temperature", float("inf"), "temperature must be .*; got inf"),
        ("temperature", 1e-12, "temperature must be .*; got 1e-12"),
        ("top_k", -1, "top_k must be .*; got -1"),
        ("top_k", 2.5, "top_k must be .*; got 2.5"),
        ("top_p", 0.0, "top_p must be .*; got 0.0"),
        ("top_p", 1.5, "top_p must be .*; got 1.5"),
        ("top_p", float("nan"), "top_p must be .*; got nan"),
        ("min_p", -0.1, "min_p must be .*; got -0.1"),
        ("min_p", 1.1, "min_p must be .*; got 1.1"),
    ],
)
def test_settings_out_of_range(field, value, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**{field: value})


def test_equal_settings_are_one_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, settings):
        traces.append(settings)
        return sample(x, jnp.float32(0.5), settings)

    for settings in (Sampling(top_k=2), Sampling(top_k=2), Sampling(top_k=3)):
        run(jnp.zeros(4), settings)
    assert len(traces) == 2
