"""Advantages: published numbers, invariances, what is left out, and exact zeros."""

import itertools

import numpy as np
import pytest

from rl.objectives import advantages as adv

TWO = np.array([[1.0, 0, 1, 0], [1, 1, 1, 0]])
OK = np.ones((2, 4), bool)
MASK = np.ones((8, 3), bool)  # equal lengths
GROUPED = [name for name in adv.ADVANTAGES if name not in adv.ALONE]


def one(rule, rewards, **settings):
    rewards = np.array([rewards], float)
    return np.array(rule(rewards, np.ones(rewards.shape, bool), **settings))[0]


@pytest.mark.parametrize(
    ("rule", "rewards", "values"),
    [
        (adv.group_std, [1, 0, 1, 0], [0.866025, -0.866025, 0.866025, -0.866025]),
        (adv.group_mean, [1, 0, 1, 0], [0.5, -0.5, 0.5, -0.5]),
        (adv.leave_one_out, [1, 0, 1, 0], [0.666667, -0.666667, 0.666667, -0.666667]),
        (adv.minimum_variance, [1, 0, 1, 0], [1.0, -1, 1, -1]),
        (adv.group_std, [1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        (adv.group_mean, [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        (adv.leave_one_out, [1, 0, 0, 0], [1, -0.333333, -0.333333, -0.333333]),
    ],
)
def test_one_group(rule, rewards, values):
    np.testing.assert_allclose(one(rule, rewards), values, rtol=4e-6)


def test_population_std():
    np.testing.assert_allclose(one(adv.group_std, [1, 0, 1, 0], ddof=0, delta=0.0), [1, -1, 1, -1], rtol=1e-6)


def test_two_groups():
    got = np.array(adv.whitened_group_mean(TWO, OK, MASK))
    np.testing.assert_allclose(got[:, 0], [1.069045, -1.069045] * 2 + [0.534522] * 3 + [-1.603567], rtol=4e-6)
    assert (got == got[:, :1]).all()
    got = np.array(adv.batch_std(TWO, OK, delta=0.0)).ravel()
    np.testing.assert_allclose(got, [1.032796, -1.032796] * 2 + [0.516398] * 3 + [-1.549193], rtol=2e-6)


def test_whitened_returns_by_loops():
    r = np.random.default_rng(0)
    rewards, kl = r.normal(size=(2, 3)), r.normal(size=(6, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [1] * 5, [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0] * 5], bool)
    ok = np.array([[True, True, False], [True, True, True]])
    returns = np.zeros((6, 5))
    for i in range(6):
        tokens = [t for t in range(5) if mask[i, t] and ok.ravel()[i]]
        step = {t: -0.1 * kl[i, t] + (rewards.ravel()[i] if t == tokens[-1] else 0) for t in tokens}
        for k, t in enumerate(tokens):
            returns[i, t] = sum(0.9**j * step[s] for j, s in enumerate(tokens[k:]))
    there = mask & ok.ravel()[:, None]
    expected = np.where(there, (returns - returns[there].mean()) / returns[there].std(), 0)
    noise = np.where(mask, kl, np.nan)  # masked estimates may be anything
    got = adv.whitened_returns(rewards, ok, mask, kl=noise, coefficient=0.1, discount=0.9)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_length_weighted():
    rewards, lengths = np.array([[1.0, 0, 1, 0]]), np.array([[1, 3, 2, 4]])
    got = np.array(adv.length_weighted(rewards, np.ones((1, 4), bool), lengths))[0]
    np.testing.assert_allclose(got, np.array([1, 0, 1, 0]) - 0.3, rtol=1e-6)
    mask = np.arange(4) < lengths.reshape(4, 1)
    np.testing.assert_allclose(adv.ADVANTAGES["length_weighted"](rewards, np.ones((1, 4), bool), mask)[:, 0], got)


@pytest.mark.parametrize("name", list(adv.ADVANTAGES))
def test_equal_rewards_teach_nothing(name):
    """Exactly 0, also for a number whose f32 mean of seven is another number."""
    rewards = np.full((2, 7), 0.1)
    got = np.array(adv.ADVANTAGES[name](rewards, np.ones((2, 7), bool), np.ones((14, 3), bool)))
    assert got.shape == (14, 3) and got.dtype == np.float32
    assert (got == (np.float32(0.1) if name == "reward" else 0)).all()


@pytest.mark.parametrize("name", list(adv.ADVANTAGES))
def test_unjudged_rows_are_not_there(name):
    """They get 0, and the others what they would get without them."""
    r = np.random.default_rng(1)
    rewards, ok = r.normal(size=(2, 4)), np.ones((2, 4), bool)
    ok[:, 1] = False
    rewards[:, 1] = np.nan
    mask = np.arange(5) < r.integers(1, 6, 8)[:, None]
    mask[3] = False  # a judged row without tokens
    got = np.array(adv.ADVANTAGES[name](rewards, ok, mask))
    keep = ok.ravel()
    alone = np.array(adv.ADVANTAGES[name](rewards[ok].reshape(2, 3), np.ones((2, 3), bool), mask[keep]))
    np.testing.assert_allclose(got[keep], alone, rtol=1e-5)
    assert (got[~keep] == 0).all() and (got[~mask] == 0).all() and np.abs(alone).max() > 0.1


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_one(name):
    with pytest.raises(ValueError, match=f"'{name}' compares .* at least 2; got 1"):
        adv.check(name, 1)
    adv.check(name, 2)
    # one judged sample in a group of several, or none: nothing to compare with, so nothing, and never NaN
    ok = np.array([[False, True, False], [False] * 3])
    assert not np.array(adv.ADVANTAGES[name](np.array([[5.0, 3, 1]] * 2), ok, np.ones((6, 2), bool))).any()


def test_names():
    for name in adv.ALONE:
        adv.check(name, 1)
    with pytest.raises(ValueError, match="one of reward, group_std, .*; got 'gae'"):
        adv.check("gae", 4)


@pytest.mark.parametrize("name", GROUPED)
def test_a_constant_per_group_changes_nothing(name):
    r = np.random.default_rng(2)
    rewards, mask = r.integers(0, 3, (2, 4)).astype(float), np.arange(5) < r.integers(1, 6, 8)[:, None]
    settings = {"success": 1.0} if name == "adora" else {}
    plain = adv.ADVANTAGES[name](rewards, OK, mask, **settings)
    if name == "adora":  # a threshold on the reward moves along
        np.testing.assert_allclose(
            adv.ADVANTAGES[name](rewards + 5, OK, mask, success=6.0), plain, rtol=1e-5, atol=1e-6
        )
        return
    shift = np.full((2, 1), 7.0) if name == "batch_std" else np.array([[7.0], [-3]])  # its std is of the whole batch
    np.testing.assert_allclose(adv.ADVANTAGES[name](rewards + shift, OK, mask), plain, rtol=1e-5, atol=1e-6)


def test_scale():
    scaled = lambda rule, **settings: np.array(rule(10 * TWO, OK, **settings)) / np.array(rule(TWO, OK, **settings))
    np.testing.assert_allclose(scaled(adv.group_std, delta=0.0), 1, rtol=1e-6)
    np.testing.assert_allclose(scaled(adv.group_mean), 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("p", "value"), [(0.5, 0.21875), (0.25, 0.1640625), (0.125, 0.0957031), (0.0, 0.0), (1.0, 0.0)]
)
def test_signal_of_a_prompt(p, value):
    """E (r_i - mean)^2 = p (1 - p) (1 - 1/G) over every group of 8 binary rewards: largest at p = 0.5."""
    groups = np.array(list(itertools.product((0.0, 1.0), repeat=8)))
    chance = p ** groups.sum(1) * (1 - p) ** (8 - groups.sum(1))
    squares = np.array(adv.group_mean(groups, np.ones(groups.shape, bool))) ** 2
    assert chance @ squares[:, 0] == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize(
    ("length", "value"), [(16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (21000, -1), (1, 0)]
)
def test_overlong(length, value):
    assert adv.overlong_penalty(np.array([length]), 20480, 4096)[0] == value


@pytest.mark.parametrize("cache", [0, 11])
def test_overlong_refused(cache):
    with pytest.raises(ValueError, match=f"1 <= cache <= hard; got cache {cache} and hard 10"):
        adv.overlong_penalty(np.array([1]), 10, cache)


def adora(rewards, lengths, **settings):
    rewards, lengths = np.array([rewards], float), np.array([lengths])
    return float(adv.adora_weight(rewards, np.ones(rewards.shape, bool), lengths, success=1.01, **settings)[0])


@pytest.mark.parametrize(
    ("rewards", "lengths", "settings", "value"),
    [
        ([3, 0, 3, 0], [100, 50, 80, 70], {}, 1.0),  # 100 > 60
        ([3, 0, 3, 0], [50, 100, 40, 90], {}, 0.1),  # 50 < 95
        ([3, 0, 3, 0], [60, 50, 40, 70], {}, 0.1),  # equal
        ([3, 0, 3, 0], [1000, 4060, 900, 800], {"longest_failure": 4054}, 1.0),  # 4060 is a truncation: 1000 > 800
        ([3, 0, 3, 0], [1000, 4060, 900, 800], {}, 0.1),  # 1000 < 2430
        ([0, 1, 0, 1], [1, 2, 3, 4], {}, 0.1),  # no success
        ([0, 1, 0, 1], [1, 2, 3, 4], {"empty": "vision"}, 1.0),
        ([3, 3, 3, 3], [1, 2, 3, 4], {}, 1.0),  # no failure
        ([3, 3, 3, 3], [1, 2, 3, 4], {"empty": "vision"}, 0.1),
        ([3, 0, 3, 0], [9, 10, 8, 12], {"longest_failure": 10, "empty": "language"}, 1.0),  # no failure left
        ([3, 0, 3, 0], [9, 10, 8, 12], {"longest_failure": 10, "empty": "vision"}, 0.1),
        ([0, 0, 0, 0], [9, 10, 8, 12], {"longest_failure": 1, "empty": "vision"}, 1.0),  # neither: no success decides
    ],
)
def test_adora_weight(rewards, lengths, settings, value):
    assert adora(rewards, lengths, **settings) == pytest.approx(value)
    order = [2, 0, 3, 1]
    assert adora([rewards[i] for i in order], [lengths[i] for i in order], **settings) == pytest.approx(value)


def test_adora_scales_whole_groups():
    rewards = np.array([[3.0, 0, 3, 0], [3, 0, 3, 0]])
    lengths = np.array([10, 5, 8, 7, 5, 10, 4, 9])
    mask = np.arange(12) < lengths[:, None]
    base = np.array(adv.ADVANTAGES["group_std"](rewards, OK, mask))
    got = np.array(adv.ADVANTAGES["adora"](rewards, OK, mask, success=1.01))
    np.testing.assert_allclose(got[:4], base[:4])
    np.testing.assert_allclose(got[4:], 0.1 * base[4:], rtol=1e-6)
    assert abs(got[:, 0].reshape(2, 4).sum(1)).max() < 1e-6 and (np.sign(got) == np.sign(base)).all()
    np.testing.assert_array_equal(adv.ADVANTAGES["adora"](rewards, OK, mask, success=1.01, attenuation=1.0), base)
    # lengths are of counted tokens: a hole (a tool's answer) in the long success makes it short
    mask[0, :6] = False
    np.testing.assert_allclose(adv.ADVANTAGES["adora"](rewards, OK, mask, success=1.01)[0, 9], base[0, 9], rtol=1e-6)
    mask[2, :5] = False  # now 4 and 3 against a mean of 6
    np.testing.assert_allclose(
        adv.ADVANTAGES["adora"](rewards, OK, mask, success=1.01)[0, 9], 0.1 * base[0, 9], rtol=1e-6
    )


@pytest.mark.parametrize("base", ["group_mean", "leave_one_out", "reward", "whitened_returns"])
def test_adora_scales_any_rule(base):
    rewards, ok, mask = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1]]), np.ones((2, 4), bool), np.ones((8, 6), bool)
    mask[0, 3:] = mask[2, 3:] = False  # the successes of the first group are shorter than its failures
    got = adv.ADVANTAGES["adora"](rewards, ok, mask, base=base, success=0.5, attenuation=0.25)
    weight = np.repeat([0.25, 0.25], 4)[:, None]  # in the second, all are as long: not longer
    np.testing.assert_allclose(got, weight * adv.ADVANTAGES[base](rewards, ok, mask), rtol=1e-6)
    mask[:, :] = True
    mask[1, 3:] = mask[3, 3:] = False  # and now longer
    got = adv.ADVANTAGES["adora"](rewards, ok, mask, base=base, success=0.5, attenuation=0.25)
    weight = np.repeat([1, 0.25], 4)[:, None]
    np.testing.assert_allclose(got, weight * adv.ADVANTAGES[base](rewards, ok, mask), rtol=1e-6)


def test_options_that_a_rule_does_not_have_are_refused():
    adv.check("adora", 2, {"base": "group_mean", "success": 0.5, "longest_failure": None})
    for options, message in (
        ({"base": "best"}, "advantage 'adora' does not take the options {'base': 'best'}"),
        ({"empt": "both"}, "does not take the options .* unexpected keyword argument 'empt'"),
        ({"empty": "both"}, "empty must be 'language' or 'vision'"),
    ):
        with pytest.raises(ValueError, match=message):
            adv.check("adora", 2, options)


def test_adora_refused():
    with pytest.raises(ValueError, match="'language' or 'vision'.*got 'both'"):
        adora([1], [1], empty="both")
