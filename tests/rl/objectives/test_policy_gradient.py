"""Shapes of the objective at single tokens, where their gradients vanish, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives.policy_gradient import Credit, Objective, loss
from rl.objectives.weights import Weight

CLIP = Objective(low=0.2, high=0.28)
ONE = np.ones((1, 1), bool)


@functools.partial(jax.jit, static_argnums=0)
def run(objective, logp, entropy, credit):
    """(J, dJ/dlogp, everything)."""
    out, slope = (
        loss(objective, logp, entropy, credit),
        jax.grad(lambda x: -loss(objective, x, entropy, credit).numerator),
    )
    return -out.numerator, slope(logp), out


def token(objective, logp, advantage, proximal=0.0, behaviour=0.0):
    """(J, dJ/dlogp) of one token."""
    at = lambda x: np.full((1, 1), x, np.float32)
    value, slope, _ = run(objective, at(logp), at(0.0), Credit(ONE, at(advantage), at(behaviour), at(proximal)))
    return float(value), float(slope[0, 0])


@pytest.mark.parametrize(
    ("r", "a", "dual", "value"),
    [
        (1.25, 1, None, 1.25), (1.5, 1, None, 1.28), (0.5, 1, None, 0.5), (0.5, -1, None, -0.8), (1.5, -1, None, -1.5),
        (5, -1, None, -5), (5, -1, 3.0, -3), (5, 1, 3.0, 1.28), (2.9, -1, 3.0, -2.9),
    ],
)  # fmt: skip
def test_clip(r, a, dual, value):
    got, slope = token(Objective(low=0.2, high=0.28, dual=dual), np.log(r), a)
    assert got == pytest.approx(value, rel=1e-6)
    assert slope == (pytest.approx(r * a, rel=1e-6) if value == r * a else 0)


def test_where_the_clip_has_no_gradient():
    r = np.array([0.1, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2, 9])
    at = np.log(np.concatenate([r, r]))[None]
    advantage = np.repeat([1.0, -1.0, 0.0], len(r))[: at.size][None]
    credit = Credit(jnp.ones(at.shape, bool), jnp.asarray(advantage), jnp.zeros(at.shape), jnp.zeros(at.shape))
    for shape in ("clip", "gate"):
        chosen = Objective(shape=shape, low=0.2, high=0.28)
        _, slope, out = run(chosen, at, np.zeros(at.shape), credit)
        assert (np.array(slope)[0] == 0).tolist() == [x > 1.28 for x in r] + [x < 0.8 for x in r]
        assert out.metrics["clip_fraction"] == (2 + 1 + 3, 18)


def test_no_half_gradients_where_both_branches_are_equal():
    """A minimum of two equal numbers would share the gradient between them: with an empty window half of it is lost."""
    shut = Objective(low=0.0, high=0.0)
    assert token(shut, 0.0, 1.0) == (1, 1) and token(shut, 0.0, -1.0) == (-1, -1)


def test_decoupled_and_naive():
    """Behaviour 0.2, proximal 0.25, policy 0.35."""
    at = [np.log(x) for x in (0.35, 0.25, 0.2)]
    value = lambda objective, a: token(objective, at[0], a, at[1], at[2])[0]
    decoupled = Objective(low=0.2, high=0.2, weight=Weight())
    replay = Objective(centre="behaviour", low=0.2, high=0.2)
    naive = Objective(centre="behaviour", window="unit", low=0.2, high=0.2)
    assert value(decoupled, 1.0) == pytest.approx(1.5, rel=1e-6) and value(replay, 1.0) == pytest.approx(1.5, rel=1e-6)
    assert value(naive, 1.0) == pytest.approx(1.2, rel=1e-6)
    for chosen in (decoupled, replay, naive):
        assert value(chosen, -1.0) == pytest.approx(-1.75, rel=1e-6)


def test_decoupled_gradient_vanishes_by_the_proximal_ratio_alone():
    decoupled = Objective(low=0.2, high=0.2, weight=Weight())
    for behaviour in (-3.0, 0.0, 3.0):
        assert token(decoupled, np.log(1.25), 1.0, 0.0, behaviour)[1] == 0
        assert token(decoupled, np.log(1.15), 1.0, 0.0, behaviour)[1] == pytest.approx(
            1.15 * np.exp(-behaviour), rel=1e-5
        )
        value, slope = token(decoupled, 0.0, -2.0, 0.0, behaviour)  # first minibatch: J = b A, gradient b A
        assert value == slope == pytest.approx(-2 * np.exp(-behaviour), rel=1e-5)


@pytest.mark.parametrize(
    ("window", "low", "high"), [("additive", 1.8, 2.2), ("relative", 1.6, 2.4), ("unit", 0.8, 1.2)]
)
def test_windows_around_two(window, low, high):
    chosen = Objective(centre="behaviour", window=window, low=0.2, high=0.2)
    at = lambda r, a: token(chosen, np.log(r), a, np.log(2.0), 0.0)
    assert at(5.0, 1.0) == (pytest.approx(high, rel=1e-6), 0)
    assert at(0.1, -1.0) == (pytest.approx(-low, rel=1e-6), 0)
    for r, a in ((high - 0.01, 1.0), (low + 0.01, -1.0)):
        assert at(r, a)[1] == pytest.approx(r * a, rel=1e-5)


def test_additive_window_that_reaches_below_zero_never_clips_there():
    chosen = Objective(centre="behaviour", window="additive", low=0.2, high=0.2)
    assert token(chosen, np.log(1e-4), -1.0, np.log(0.1), 0.0)[1] == pytest.approx(-1e-4, rel=1e-5)
    assert token(chosen, np.log(0.31), 1.0, np.log(0.1), 0.0) == (pytest.approx(0.3, rel=1e-6), 0)


def test_dual_clip_of_replayed_samples_is_in_units_of_the_centre():
    chosen = Objective(centre="behaviour", low=0.2, high=0.2, dual=3.0)
    c = 10.0
    for u, value in ((0.5, -0.8), (1.0, -1.0), (2.9, -2.9), (5.0, -3.0)):
        assert token(chosen, np.log(c * u), -1.0, np.log(c), 0.0)[0] == pytest.approx(c * value, rel=1e-5)


@pytest.mark.parametrize(
    ("r", "low", "high", "slope"),
    [(7, None, 0.28, 1.28), (0.1, 0.2, 0.28, 0.8), (0.1, None, 0.28, 0.1), (1, None, 0.28, 1)],
)
def test_capped_weight_keeps_every_gradient(r, low, high, slope):
    got = token(Objective(shape="capped", low=low, high=high), np.log(r), 1.0)
    assert got[1] == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("a", [2.0, -3.0])
def test_sapo_slope(a):
    """dJ/dr = A sech^2(tau (r - 1) / 2): A at r = 1, symmetric about it; dJ/dlogp is r times that."""
    tau = 1.0 if a > 0 else 1.05
    slope = lambda r: token(Objective(shape="sapo"), np.log(r), a)[1] / r
    assert slope(1.0) == pytest.approx(a, rel=1e-6)
    for x in (0.3, 0.9):
        assert (
            slope(1 + x)
            == pytest.approx(slope(1 - x), rel=1e-4)
            == pytest.approx(a / np.cosh(tau * x / 2) ** 2, rel=1e-4)
        )


SEQUENCE = Objective(ratio="sequence", low=3e-4, high=4e-4, aggregation="sequence_mean")
LOG = np.float32([[0.002, -0.001, 0.0005, 0.0]])


def sequence(objective, log, advantage):
    mask, zero = np.array([[True] * 4 + [False]]), np.zeros((1, 5), np.float32)
    log, advantage = (np.pad(np.float32(x), ((0, 0), (0, 1)), constant_values=9) for x in (log, advantage))
    value, slope, out = run(objective, log, zero, Credit(mask, advantage, zero, zero))
    return float(value), np.array(slope)[0], out


def test_sequence_ratio():
    value, slope, out = sequence(SEQUENCE, LOG, np.ones((1, 4)))
    assert value == pytest.approx(1.0003750703, rel=1e-7) and out.metrics["clip_fraction"][0] == 0
    np.testing.assert_allclose(slope, [1.000375 / 4] * 4 + [0], rtol=1e-6)
    more = LOG + np.float32([[0.0002, 0, 0, 0]])  # mean 0.000425, above log(1.0004)
    value, slope, out = sequence(SEQUENCE, more, np.ones((1, 4)))
    assert value == pytest.approx(1.0004, rel=1e-7) and not slope.any() and out.metrics["clip_fraction"][0] == 4
    assert sequence(SEQUENCE, more, -np.ones((1, 4)))[1][:4].all()  # not on the other side


def test_tokens_of_a_sequence_ratio():
    tokens = Objective(ratio="sequence_token", low=3e-4, high=4e-4, aggregation="sequence_mean")
    for log in (LOG, LOG + np.float32(0.001), LOG - np.float32(0.001)):
        for a in (1.0, -2.0):
            plain, each = (sequence(o, log, np.full((1, 4), a)) for o in (SEQUENCE, tokens))
            assert plain[0] == each[0]
            np.testing.assert_allclose(each[1], plain[1], rtol=1e-6)
    # with advantages of its own, each token's gradient is its own
    a = np.array([[1.0, 2, -1, 0]])
    np.testing.assert_allclose(sequence(tokens, LOG, a)[1], [*(1.000375 / 4 * a[0]), 0], rtol=1e-5)
    np.testing.assert_allclose(sequence(SEQUENCE, LOG, a)[1], [1.000375 / 4 * a.mean()] * 4 + [0], rtol=1e-5)


def test_penalty_bonus_and_metrics():
    r = np.random.default_rng(0)
    logp, behaviour, proximal, reference, advantage, entropy = (
        jnp.asarray(-r.random((3, 4)), jnp.float32) for _ in range(6)
    )
    mask = jnp.arange(4) < jnp.array([[4], [2], [3]])
    credit = Credit(mask, advantage, behaviour, proximal, reference)
    chosen = Objective(low=0.2, high=0.2, kl=0.5, kl_estimator="k2", entropy=0.1)
    out, plain = (run(o, logp, entropy, credit)[2] for o in (chosen, Objective(low=0.2, high=0.2)))
    m = np.array(mask)
    kl, bonus = (np.array(reference - logp) ** 2 / 2)[m].sum(), np.array(entropy)[m].sum()
    assert out.numerator - plain.numerator == pytest.approx(0.5 * kl - 0.1 * bonus, rel=1e-4)
    assert plain.numerator == -plain.metrics["objective"][0] and plain.denominator == 9
    expected = {
        "objective": -plain.numerator, "entropy": bonus, "kl_behaviour": np.array(behaviour - logp)[m].sum(),
        "kl_reference": kl, "ratio": np.exp(np.array(logp - proximal))[m].sum(), "weight": 9, "weight_outside": 0,
        "sampler_gap": np.abs(np.array(proximal - behaviour))[m].sum(),
    }  # fmt: skip
    got = {name: float(out.metrics[name][0]) for name in expected}
    assert got == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)
    assert all(pair[1] == 9 for pair in out.metrics.values()) and set(out.metrics) == {*expected, "clip_fraction"}
    assert out.maxima["sampler_gap"] == np.abs(np.array(proximal - behaviour))[m].max()
    np.testing.assert_allclose(out.log_weight, np.where(m, np.array(logp - behaviour), 0).sum(1), rtol=1e-6)
    # the bonus and the penalty pull; the metrics do not
    slope = jax.jit(jax.grad(lambda e: loss(chosen, logp, e, credit).numerator))(entropy)
    np.testing.assert_allclose(slope, np.where(m, -0.1, 0), rtol=1e-6)
    watched = lambda x: sum(jax.tree.leaves(loss(chosen, x, x, credit)[2:]), jnp.zeros(())).sum()
    assert not jax.jit(jax.grad(watched))(logp).any()


def test_nothing_of_the_credit_is_differentiated():
    r = np.random.default_rng(0)
    x = [jnp.asarray(-r.random((2, 3)), jnp.float32) for _ in range(6)]
    mask = jnp.ones((2, 3), bool)
    chosen = Objective(shape="gate", low=0.1, high=0.1, weight=Weight(of="policy"), kl=0.1)

    def f(advantage, behaviour, proximal, reference, previous, share):
        return loss(
            chosen, x[5], x[5], Credit(mask, advantage, behaviour, proximal, reference, None, previous, share)
        ).numerator

    slopes = jax.jit(jax.grad(f, argnums=tuple(range(6))))(*x[:5], jnp.full(2, 0.5))
    assert not any(slope.any() for slope in slopes)


def test_two_anchors():
    r = np.random.default_rng(0)
    logp, reference, previous = (jnp.asarray(-r.random((2, 3)), jnp.float32) for _ in range(3))
    at = lambda share: Credit(
        jnp.ones((2, 3), bool),
        jnp.zeros((2, 3)),
        logp,
        None,
        reference,
        None,
        previous,
        jnp.asarray(share, jnp.float32),
    )
    anchored = Objective(kl=1.0, kl_estimator="k2")
    total = lambda share: -float(run(anchored, logp, logp, at(share))[0])
    d = [np.array(x - logp) ** 2 / 2 for x in (reference, previous)]
    assert total([1, 0]) == pytest.approx(d[0][0].sum() + d[1][1].sum(), rel=1e-5)
    assert total([0.5, 0.5]) == pytest.approx((d[0] + d[1]).sum() / 2, rel=1e-5)


@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32])
def test_types(given):
    x = jnp.full((2, 3), -1, given)
    _, slope, out = run(CLIP, x, x, Credit(jnp.ones((2, 3), bool), x, x))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out)) and slope.dtype == given


X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"behaviour": None}, "behaviour log-probabilities are missing"),
        ({"behaviour": X[:, :2]}, r"behaviour must be of the shape of logp, \(2, 3\); got \(2, 2\)"),
        ({"proximal": X[:1]}, r"proximal must be .* got \(1, 3\)"),
        ({"advantage": X[:, 0]}, r"advantage must be .* got \(2,\)"),
        ({"mask": X}, "mask must be bool; got float32"),
        ({"counted": np.ones(3, bool)}, "counted must have one entry per row, 2"),
        ({"previous": X, "reference": X}, "`share`"),
        ({"previous": X, "share": np.ones(2)}, "`reference`"),
    ],
)
def test_bad_credit(changes, words):
    with pytest.raises(ValueError, match=words):
        loss(CLIP, X, X, Credit(**{"mask": np.ones((2, 3), bool), "advantage": X, "behaviour": X, **changes}))


def test_bad_inputs():
    credit = Credit(np.ones((2, 3), bool), X, X)
    with pytest.raises(ValueError, match=r"logp must be \[rows, tokens\]; got shape \(3,\)"):
        loss(CLIP, X[0], X[0], credit)
    with pytest.raises(ValueError, match="entropy must be of the shape of logp"):
        loss(CLIP, X, X[0], credit)
    with pytest.raises(ValueError, match="coefficient of 0.1 needs reference"):
        loss(Objective(kl=0.1), X, X, credit)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": "word"}, "ratio must be one of token, .*; got 'word'"),
        ({"centre": "old"}, "centre must be one of proximal, behaviour; got 'old'"),
        ({"shape": "ppo"}, "shape must be one of score"),
        ({"window": "wide"}, "window must be one of relative"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1"),
        ({"aggregation": "sum"}, "aggregation must be one of token_mean"),
        ({"aggregation": "constant"}, "longest belongs to"),
        ({"longest": 5}, "longest belongs to"),
        ({"shape": "score", "low": 0.2}, "low belongs to the shapes clip, gate and capped; got 0.2 and 'score'"),
        ({"shape": "sapo", "high": 0.2}, "high belongs to the shapes"),
        ({"low": -0.1}, "half-width, at least 0; got -0.1"),
        ({"dual": 0.9}, "dual belongs to the shape clip and is above 1; got 0.9"),
        ({"dual": 3.0, "shape": "gate"}, "dual belongs to the shape clip"),
        ({"tau": (1.0, 0.0)}, "tau must be positive"),
        ({"centre": "behaviour", "weight": Weight()}, "count it twice"),
        ({"weight": Weight(of="policy")}, "take of='proximal'"),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Objective(**settings)


def test_an_entropy_without_a_coefficient_is_watched_and_nothing_else():
    at = lambda x: jnp.full((1, 2), x, jnp.float32)
    credit = Credit(jnp.ones((1, 2), bool), at(1.0), at(-1.0))
    one = lambda o: jax.grad(lambda e: loss(o, at(-1.0), e, credit).numerator)
    out = loss(Objective(low=0.2, high=0.2), at(-1.0), at(jnp.nan), credit)
    assert float(out.numerator) == -2.0 and np.isnan(float(out.metrics["entropy"][0]))
    assert one(Objective(low=0.2, high=0.2))(at(0.5)).tolist() == [[0.0, 0.0]]
    assert one(Objective(low=0.2, high=0.2, entropy=0.5))(at(0.5)).tolist() == [[-0.5, -0.5]]
