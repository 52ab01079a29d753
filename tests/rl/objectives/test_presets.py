"""Every preset against its formula in plain loops, and what holds for all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives.advantages import ADVANTAGES, check
from rl.objectives.policy_gradient import Credit, loss
from rl.objectives.presets import PRESETS
from tests.rl.objectives.twin import twin

N, L = 6, 7
LENGTH = np.array([7, 3, 5, 0, 1, 6])
MASK = np.arange(L) < LENGTH[:, None]
MASK[0, 2] = False  # a hole: a tool's answer
EVERY = pytest.mark.parametrize("name", list(PRESETS))


def objective(name, **changes):
    changes = {"longest": 9, **changes} if name == "dr_grpo" else changes
    return dataclasses.replace(PRESETS[name].objective, **changes)


def sample(seed=0, spread=0.5):
    """Log-probabilities of four policies that differ, and advantages of both signs."""
    r = np.random.default_rng(seed)
    behaviour = -r.gamma(1.0, size=(N, L))
    proximal, logp = (behaviour + s * r.normal(size=(N, L)) for s in (spread, 1.5 * spread))
    reference = behaviour + 1.5 * r.normal(size=(N, L))
    advantage = r.normal(size=(N, L))
    if spread == 0:
        proximal = logp = behaviour
    names = ("logp", "proximal", "behaviour", "reference", "advantage")
    return dict(zip(names, np.float32([logp, proximal, behaviour, reference, advantage]), strict=True))


@functools.partial(jax.jit, static_argnums=0)
def run(objective, logp, credit):
    """(J, dJ/dlogp, everything)."""

    def value(logp):
        out = loss(objective, logp, jnp.ones_like(logp), credit)
        return -out.numerator, out

    (_, out), slope = jax.value_and_grad(value, has_aux=True)(logp)
    share = 1 / jnp.maximum(out.denominator, 1)
    return -out.numerator * share, slope * share, out


def credit(data, mask=MASK, **changes):
    fields = {k: v for k, v in data.items() if k != "logp"}
    # always an array, so that one program serves most tests of a preset
    return Credit(**{"mask": mask, "counted": np.ones(len(mask), bool), **fields, **changes})


@EVERY
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_loops(name, seed):
    data = sample(seed, 0.002 if name == "gspo" else 0.5)
    if name == "gspo":  # sequences on all sides of a window of a few 1e-4
        data["logp"] += np.float32([[1e-3], [-1e-3], [0], [0], [1e-4], [3e-3]])
    advantage = np.where(MASK, data["advantage"], 0)
    if name == "gspo":
        advantage[:] = np.linspace(-1, 1.2, N)[:, None]
    value, slope, out = run(objective(name), data["logp"], credit({**data, "advantage": np.float32(advantage)}))
    wide = {k: np.float64(v) for k, v in data.items()}
    expected, gradient = twin(name, **{**wide, "advantage": np.float64(np.float32(advantage))}, mask=MASK, longest=9)
    assert value == pytest.approx(expected, rel=2e-5, abs=2e-6)
    np.testing.assert_allclose(slope, gradient, rtol=2e-4, atol=2e-6)
    window = objective(name).shape in ("clip", "gate", "capped")
    fraction = float(np.divide(*out.metrics["clip_fraction"]))
    assert fraction > 0 if window and name != "cispo" else fraction < 0.1


@EVERY
def test_masked_entries_may_hold_anything(name):
    """Bit-identical value, gradient and metrics, and a gradient of exactly 0 there."""
    data = sample()
    plain = run(objective(name), data["logp"], credit(data))
    dirt = np.resize(np.float32([np.nan, np.inf, -np.inf, 1e30, -1e30]), (N, L))
    dirty = {k: np.where(MASK, v, dirt) for k, v in data.items()}
    got = run(objective(name), dirty["logp"], credit(dirty))
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    assert (np.array(got[1])[~MASK] == 0).all() and np.isfinite(got[0])
    assert np.abs(np.array(got[1])[MASK]).max() > 0


def test_masked_entries_may_hold_anything_without_a_compiler():
    """XLA turns a product with a mask into a choice, which hides a NaN times 0; op by op nothing is hidden."""
    data, dirt = sample(), np.float32(np.nan)
    dirty = {k: np.where(MASK, v, dirt) for k, v in data.items()}
    with jax.disable_jit():
        plain, got = (run(objective("minirl"), x["logp"], credit(x)) for x in (data, dirty))
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    assert np.isfinite(got[1]).all()


@EVERY
def test_on_policy(name):
    """Ratio and weights are exactly 1, nothing is clipped, KL to the sampler 0, and what the methods share is the gradient."""
    data = sample(spread=0)
    chosen = objective(name, kl=0.0)
    _, slope, out = run(chosen, data["logp"], credit(data, proximal=None))
    mean = {key: float(np.divide(*pair)) for key, pair in out.metrics.items()}
    assert mean["ratio"] == mean["weight"] == out.maxima["ratio"] == out.maxima["weight"] == 1
    assert mean["clip_fraction"] == mean["kl_behaviour"] == mean["sampler_gap"] == out.maxima["sampler_gap"] == 0
    assert not np.array(out.log_weight).any()
    if name == "gspo":  # its ratio moves with every token: constant advantages, or their mean
        expected = np.where(MASK, np.where(MASK, data["advantage"], 0).sum(1, keepdims=True), 0)
        expected = expected / np.maximum(MASK.sum(1, keepdims=True), 1) ** 2 / N
    else:
        one = {"token_mean": 1 / MASK.sum(), "sequence_sum": 1 / N, "constant": 1 / (9 * N)}
        each = one.get(chosen.aggregation, 1 / (N * np.maximum(MASK.sum(1, keepdims=True), 1)))
        expected = np.where(MASK, data["advantage"] * each, 0)
    np.testing.assert_allclose(slope, expected, rtol=2e-6, atol=1e-8)
    np.testing.assert_array_equal(run(chosen, data["logp"], credit(data))[1], slope)  # given or implied, the same


@EVERY
def test_micro_batches_padding_and_order(name):
    data, chosen = sample(), objective(name)
    value, slope, out = run(chosen, data["logp"], credit(data))
    total, gradient, below, above = 0.0, np.zeros((N, L)), 0.0, 0.0
    for rows in (np.array([0, 3, 1]), np.array([2, 4, 5])):  # the rest of a micro-batch is rows that do not exist
        place = np.concatenate([rows, np.zeros(N - len(rows), int)])
        part, counted = {k: v[place] for k, v in data.items()}, np.arange(N) < len(rows)
        _, g, piece = run(chosen, part["logp"], credit(part, MASK[place], counted=counted))
        gradient[rows] = np.array(g)[: len(rows)] * max(float(piece.denominator), 1)
        total, below, above = total + piece.numerator, below + piece.denominator, above + piece.metrics["objective"][0]
    assert -total / below == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(gradient / below, slope, rtol=1e-5, atol=1e-8)
    assert above == pytest.approx(float(out.metrics["objective"][0]), rel=1e-5)
    # rows that do not exist, and more columns
    wide = {k: np.pad(v, ((0, 2), (0, 3)), constant_values=np.nan) for k, v in data.items()}
    counted = np.arange(N + 2) < N
    mask = np.pad(MASK, ((0, 2), (0, 3)), constant_values=True)
    mask[:N, L:] = False
    v, g, o = run(chosen, wide["logp"], credit(wide, mask, counted=counted))
    assert v == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(g[:N, :L], slope, rtol=1e-5, atol=1e-8)
    assert not np.array(g[N:]).any() and not np.array(o.log_weight[N:]).any()


@EVERY
@pytest.mark.parametrize("size", [1e3, -1e3, 88.0])
def test_far_apart(name, size):
    """Log-ratios beyond what an exponential of f32 holds: finite value, gradient and metrics."""
    data = sample()
    data["logp"] = data["logp"] + np.float32(size) * np.resize(np.float32([1, -1, 0]), (N, L))
    for moved in (data, {**data, "proximal": data["behaviour"] + np.float32(size)}):
        got = run(objective(name), moved["logp"], credit(moved))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@EVERY
def test_nothing_counts(name):
    data = sample()
    value, slope, out = run(objective(name), data["logp"], credit(data, np.zeros((N, L), bool)))
    assert value == 0 and not np.array(slope).any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


@EVERY
def test_named_advantage_fits(name):
    check(PRESETS[name].advantage, 2)
    rewards = np.array([[1.0, 0, 1], [0, 0, 1]])
    advantage = np.array(ADVANTAGES[PRESETS[name].advantage](rewards, np.ones((2, 3), bool), MASK))
    assert advantage.shape == (N, L) and (advantage[~MASK] == 0).all() and np.isfinite(advantage).all()


def test_replay_of_fresh_samples_is_plain_clipping():
    """Bit for bit: with c = 1 the replay objectives are PPO's."""
    data = sample()
    data["behaviour"] = data["proximal"]
    plain = run(objective("dapo", high=0.2), data["logp"], credit(data))
    for name in ("dots_rr", "remix", "decoupled_ppo", "tis", "mis"):
        changes = {"kl": 0.0} if name == "remix" else {"high": 0.2} if name in ("tis", "mis") else {}
        got = run(objective(name, **changes), data["logp"], credit(data))
        for a, b in zip(got[:2], plain[:2], strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_forms_of_decoupled_ppo():
    """clip(q, c (1 - e), c (1 + e)) with c outside is c times clip(u, 1 - e, 1 + e) with the weight c."""
    data = sample()
    a = run(objective("dots_rr"), data["logp"], credit(data))
    b = run(
        objective("decoupled_ppo", weight=dataclasses.replace(objective("decoupled_ppo").weight, cap=None)),
        data["logp"],
        credit(data),
    )
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-8)


def test_minirl_gate_is_the_gradient_of_a_clip():
    """Sampler = proximal and no cap: the gradient of summed PPO, another value."""
    data = sample()
    data["behaviour"] = data["proximal"]
    weight = dataclasses.replace(objective("minirl").weight, cap=None)
    gate = run(objective("minirl", weight=weight), data["logp"], credit(data))
    clip = run(objective("dapo", low=0.2, high=0.27, aggregation="sequence_sum"), data["logp"], credit(data))
    np.testing.assert_allclose(gate[1], clip[1], rtol=1e-5, atol=1e-8)
    assert abs(gate[0] - clip[0]) > 0.1


def test_minirl_gate_looks_at_staleness_only():
    data = sample()
    data["proximal"] = data["logp"]
    data["behaviour"] = data["logp"] - np.float32(np.linspace(-8, 8, N * L).reshape(N, L))
    _, slope, out = run(objective("minirl"), data["logp"], credit(data))
    assert out.metrics["clip_fraction"][0] == 0
    w = np.minimum(np.exp(np.float64(data["logp"]) - data["behaviour"]), 5)
    np.testing.assert_allclose(slope, np.where(MASK, w * data["advantage"] / N, 0), rtol=1e-5)


def test_remix_first_pass():
    """At theta = theta_k every ratio is the centre of its window, however old the sample."""
    data = sample(spread=1.5)
    data["proximal"] = data["logp"]
    _, slope, out = run(objective("remix", kl=0.0), data["logp"], credit(data))
    c = np.exp(np.float64(data["logp"]) - data["behaviour"])
    assert out.metrics["clip_fraction"][0] == 0 and c[MASK].max() > 5
    np.testing.assert_allclose(slope, np.where(MASK, c * data["advantage"] / MASK.sum(), 0), rtol=1e-5)
    # and it is the plain step where nothing is old and no KL is asked for
    fresh = {**data, "behaviour": data["proximal"]}
    np.testing.assert_array_equal(
        run(objective("remix", kl=0.0), data["logp"], credit(fresh))[1],
        run(objective("ppo"), data["logp"], credit(fresh))[1],
    )


def test_vcpo_on_policy_is_reinforce_with_the_group_mean():
    data = sample(spread=0)
    rewards = np.array([[1.0, 0, 0], [0, 2, 1]])
    advantage = np.array(ADVANTAGES["minimum_variance"](rewards, np.ones((2, 3), bool), MASK))
    expected = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    np.testing.assert_allclose(advantage, np.where(MASK, expected.reshape(6, 1), 0), rtol=1e-6)
    _, slope, _ = run(objective("vcpo"), data["logp"], credit({**data, "advantage": advantage}))
    each = N * np.maximum(MASK.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(slope, np.where(MASK, expected.reshape(6, 1) / each, 0), rtol=1e-6)
