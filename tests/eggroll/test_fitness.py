"""Shaping against typed-in values and against NumPy loops that share no code with it."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll import fitness

NAN, INF = np.nan, np.inf
PER_GROUP = {std: fitness.per_group(std=std) for std in ("global", "group", None)}
SHAPERS = {
    "zscore": fitness.zscore,
    "centred": fitness.centred,
    "centred_rank": fitness.centred_rank,
    "global": PER_GROUP["global"],
    "group": PER_GROUP["group"],
    "pair_sign": fitness.pair_sign,
}
PROPERTY = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames="groups")
def run_static(shaper, scores, population, groups):
    return shaper(scores, population, groups=groups)


@functools.partial(jax.jit, static_argnums=(0, 2))
def run_arrays(shaper, scores, population, context):
    return shaper(scores, population, **context)


def run(shaper, scores, population, context):
    if isinstance(context.get("groups"), int):
        return run_static(shaper, scores, population, groups=context["groups"])
    return run_arrays(shaper, scores, population, context)


def shape(shaper, scores, population=None, **context):
    scores = np.asarray(scores, np.float32)
    population = population or eggroll.independent(len(scores))
    shaped, metrics = run(shaper, scores, population, context)
    assert shaped.shape == (len(scores),) and shaped.dtype == jnp.float32
    return np.asarray(shaped), {name: value.item() for name, value in metrics.items()}


# ---- NumPy twins: loops in float64 ----------------------------------------------------------------------------------


def twin_fill(scores, ids):
    filled = np.array(scores, np.float64)
    for group in np.unique(ids):
        inside = ids == group
        finite = inside & np.isfinite(scores)
        worst = min(scores[finite]) if finite.any() else 0.0
        filled[inside & ~np.isfinite(scores)] = worst
    return filled


def twin_per_group(scores, ids, std):
    filled = twin_fill(scores, ids)
    usable = np.array([[np.isfinite(scores[ids == i]).any() for i in row] for row in ids])
    overall = np.sqrt(np.var(filled[usable]) + 1e-5) if usable.any() else 1.0
    shaped, dead = np.zeros_like(filled), 0
    for group in np.unique(ids):
        inside = ids == group
        values = filled[inside]
        scale = {"global": overall, "group": np.sqrt(np.var(values) + 1e-5), None: 1.0}[std]
        shaped[inside] = (values - np.mean(values)) / scale
        dead += np.ptp(values) == 0
    return shaped.mean(axis=1), dead


def twin_zscore(scores):
    filled = twin_fill(scores, np.broadcast_to(np.arange(scores.shape[1]), scores.shape))
    member = filled.mean(axis=1)
    return (member - member.mean()) / np.sqrt(member.var() + 1e-5)


def twin_value(row):
    return np.mean(row, dtype=np.float64) if np.all(np.isfinite(row)) else -INF


def twin_rank(scores):
    values = [twin_value(row) for row in scores]
    n = len(values)
    ranks = [sum(u < v for u in values) + (sum(u == v for u in values) - 1) / 2 for v in values]
    return np.array(ranks) / max(n - 1, 1) - 0.5 if n > 1 else np.zeros(1)


def twin_pair_sign(scores):
    shaped = []
    for plus, minus in zip(scores[::2], scores[1::2], strict=True):
        plus, minus = twin_value(plus), twin_value(minus)
        sign = 1.0 if plus > minus else -1.0 if plus < minus else 0.0
        shaped += [sign, -sign]
    return np.array(shaped)


# Multiples of 1/8 have exact sums, so float32 and float64 see the same ties.
element = st.one_of(
    st.integers(-80, 80).map(lambda k: k / 8), st.sampled_from([NAN, INF, -INF]), st.sampled_from([1.0, 2.0])
)
score_arrays = st.sampled_from([(2, 1), (12, 3)]).flatmap(
    lambda size: arrays.arrays(np.float32, size, elements=element)
)


@pytest.mark.slow
@PROPERTY
@hypothesis.given(score_arrays)
def test_zscore_rank_and_sign_equal_their_twins(scores):
    pairs = eggroll.antithetic(len(scores))
    np.testing.assert_allclose(shape(fitness.zscore, scores)[0], twin_zscore(scores), atol=3e-4)
    np.testing.assert_allclose(shape(fitness.centred_rank, scores)[0], twin_rank(scores), atol=1e-6)
    np.testing.assert_array_equal(shape(fitness.pair_sign, scores, pairs)[0], twin_pair_sign(scores))


@pytest.mark.slow
@PROPERTY
@hypothesis.given(score_arrays, st.sampled_from(["global", "group", None]), st.data())
def test_per_group_equals_its_twin(scores, std, data):
    ids = data.draw(arrays.arrays(np.int32, scores.shape, elements=st.integers(-2, 3)))
    expected, dead = twin_per_group(scores, ids, std)
    shaped, metrics = shape(PER_GROUP[std], scores, groups=ids)
    np.testing.assert_allclose(shaped, expected, atol=3e-4)
    assert metrics["dead_groups"] == dead


@pytest.mark.slow
@PROPERTY
@hypothesis.given(score_arrays, st.sampled_from(["global", "group", None]))
def test_columns_and_block_sizes_are_special_cases_of_ids(scores, std):
    shaper = PER_GROUP[std]
    columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    pairs = np.arange(len(scores)) // 2
    np.testing.assert_allclose(shape(shaper, scores)[0], shape(shaper, scores, groups=columns)[0], atol=1e-5)
    blocks, by_size = shape(shaper, scores, groups=2)
    by_id, metrics = shape(shaper, scores, groups=pairs)
    np.testing.assert_allclose(blocks, by_id, atol=1e-5)
    np.testing.assert_equal(metrics, by_size)
    expected, dead = twin_per_group(scores, pairs[:, None] * scores.shape[1] + columns, std)
    np.testing.assert_allclose(blocks, expected, atol=3e-4)
    assert by_size["dead_groups"] == dead


@PROPERTY
@hypothesis.given(score_arrays)
def test_metrics_are_of_the_finite_raw_scores(scores):
    _, metrics = shape(fitness.zscore, scores)
    finite = scores[np.isfinite(scores)].astype(np.float64)
    expected = [f(finite) for f in (np.mean, np.std, np.min, np.max)] if finite.size else [NAN] * 4
    measured = [metrics[f"fitness_{name}"] for name in ("mean", "std", "min", "max")]
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-5)
    assert metrics["finite_members"] == np.isfinite(scores).all(axis=1).sum()


# ---- typed-in values ------------------------------------------------------------------------------------------------


def test_zscore_golden():
    # mean 4, variance (9 + 4 + 1 + 36) / 4 = 12.5
    shaped, metrics = shape(fitness.zscore, [1, 2, 3, 10])
    np.testing.assert_allclose(shaped, np.array([-3, -2, -1, 6]) / np.sqrt(12.50001), rtol=1e-6)
    assert abs(shaped.mean()) < 1e-7 and abs(shaped.var() - 1) < 1e-5
    assert metrics == {
        "fitness_mean": 4.0,
        "fitness_std": pytest.approx(3.5355339, rel=1e-6),
        "fitness_min": 1.0,
        "fitness_max": 10.0,
        "finite_members": 4,
        "dead_groups": 0,
    }


def test_zscore_averages_evaluations_first():
    # member means 2 and 4: mean 3, variance 1
    shaped, _ = shape(fitness.zscore, [[1, 3], [5, 3]])
    np.testing.assert_allclose(shaped, np.array([-1, 1]) / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_group_golden():
    # groups [1, 2] and [3, 10] centred: -.5 .5 -3.5 3.5; the variance of all four raw scores is 12.5
    shaped, _ = shape(fitness.per_group(), [1, 2, 3, 10], groups=2)
    np.testing.assert_allclose(shaped, [-0.1414213, 0.1414213, -0.9899491, 0.9899491], rtol=1e-6)
    # with the group's own deviation, .5 and 3.5, both groups weigh the same
    shaped, _ = shape(fitness.per_group(std="group"), [1, 2, 3, 10], groups=2)
    np.testing.assert_allclose(shaped, [-0.99998, 0.99998, -0.9999996, 0.9999996], rtol=1e-6)
    shaped, _ = shape(fitness.centred, [1, 2, 3, 10], groups=2)
    np.testing.assert_array_equal(shaped, [-0.5, 0.5, -3.5, 3.5])


def test_group_golden_two_prompts_for_all_members():
    # columns 0 2 and 10 30: centred -1 1 and -10 10, averaged -5.5 5.5; variance of 0 2 10 30 is 140.75
    scores = [[0, 10], [2, 30]]
    np.testing.assert_allclose(shape(fitness.per_group(), scores)[0], np.array([-5.5, 5.5]) / np.sqrt(140.75001))
    np.testing.assert_array_equal(shape(fitness.centred, scores)[0], [-5.5, 5.5])


def test_centred_rank_golden():
    np.testing.assert_array_equal(shape(fitness.centred_rank, [3, 1, 2])[0], [0.5, -0.5, 0])
    # ties share the average rank: the two 1s have ranks 0 and 1, so 0.5 / 3 - 0.5
    np.testing.assert_allclose(shape(fitness.centred_rank, [1, 5, 1, 2])[0], [-1 / 3, 0.5, -1 / 3, 1 / 6], rtol=1e-6)
    np.testing.assert_array_equal(shape(fitness.centred_rank, [7.0])[0], [0])


def test_pair_sign_golden():
    shaped, metrics = shape(fitness.pair_sign, [3, 1, 2, 2, 0, 5], eggroll.antithetic(6))
    np.testing.assert_array_equal(shaped, [1, -1, 0, 0, -1, 1])
    assert metrics["dead_groups"] == 1


def test_baseline_golden():
    # deviations of the columns: 1 and 2; advantages (0, 2) / 1 and (1, 5) / 2, averaged
    scores = [[4, 7], [6, 11]]
    shaped, metrics = shape(fitness.baseline, scores, baseline=jnp.array([4.0, 6.0]))
    np.testing.assert_allclose(shaped, [0.25, 2.25], rtol=1e-6)
    assert metrics["dead_groups"] == 0
    # a column without spread and one whose baseline is NaN are dead, not huge
    dead = [[4, 7, 1], [6, 7, 2]]
    shaped, metrics = shape(fitness.baseline, dead, baseline=np.array([4.0, 6.0, NAN], np.float32))
    np.testing.assert_allclose(shaped, [0, 2 / 3], rtol=1e-6)
    assert metrics["dead_groups"] == 2


# ---- degenerate input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPERS)
@pytest.mark.parametrize("value", [0.1, -1e30, NAN, INF])
@pytest.mark.parametrize("evaluations", [1, 3])
def test_equal_scores_give_exact_zeros(name, value, evaluations):
    scores = np.full((1000, evaluations), value, np.float32) * np.arange(1, evaluations + 1, dtype=np.float32)
    shaped, metrics = shape(SHAPERS[name], scores, eggroll.antithetic(1000))
    np.testing.assert_array_equal(shaped, 0)
    assert metrics["dead_groups"] == (500 if name == "pair_sign" else evaluations)
    assert metrics["finite_members"] == (1000 if np.isfinite(value) else 0)
    assert np.isfinite(metrics["fitness_mean"]) == np.isfinite(value)


@pytest.mark.parametrize("name", SHAPERS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e38])
def test_one_bad_score_is_worst_and_counted(name, bad):
    shaped, metrics = shape(SHAPERS[name], [3, bad, 1, 2], eggroll.antithetic(4))
    assert np.isfinite(shaped).all() and metrics["finite_members"] == 3
    assert shaped[1] == shaped.min() < shaped[0]
    assert metrics["fitness_max"] == 3 and metrics["fitness_mean"] == 2
    expected = {
        "zscore": np.array([5, -3, -3, 1]) / 4 / np.sqrt(11 / 16 + 1e-5),
        "centred_rank": [0.5, -0.5, -1 / 6, 1 / 6],
    }
    if name in expected:
        np.testing.assert_allclose(shaped, expected[name], rtol=1e-5)


def test_a_group_without_finite_scores_does_not_touch_the_others():
    alone, _ = shape(fitness.per_group(), [[1001.0], [1002.0]])
    shaped, metrics = shape(fitness.per_group(), [[1001.0, NAN], [1002.0, NAN]])
    np.testing.assert_allclose(shaped, alone / 2, rtol=1e-6)
    assert metrics["dead_groups"] == 1 and metrics["finite_members"] == 0


@pytest.mark.parametrize("name", ["zscore", "global", "group", "centred"])
def test_scores_whose_squares_overflow(name):
    scores = np.array([1, 2, 3, -1e30], np.float32)
    shaped, metrics = shape(SHAPERS[name], scores)
    reference = scores.astype(np.float64) - scores.astype(np.float64).mean()
    if name != "centred":
        reference /= reference.std()
    np.testing.assert_allclose(shaped, reference, rtol=1e-5)
    assert metrics["fitness_std"] == pytest.approx(np.std(scores.astype(np.float64)), rel=1e-5)


@pytest.mark.parametrize("name", SHAPERS)
def test_large_offset_costs_no_precision(name):
    rng = np.random.default_rng(0)
    scores = rng.integers(-50, 50, (64, 2)).astype(np.float32)
    pairs = eggroll.antithetic(64)
    # the scale of "global" is the deviation of all raw scores, so only a common offset leaves it alone
    moved = scores + np.array([1, 1 if name == "global" else -1], np.float32) * 2**17
    np.testing.assert_allclose(shape(SHAPERS[name], moved, pairs)[0], shape(SHAPERS[name], scores, pairs)[0], atol=1e-5)


@pytest.mark.parametrize("name", SHAPERS)
def test_jit_and_integer_scores(name):
    pairs = eggroll.antithetic(8)
    scores = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    eager, metrics = SHAPERS[name](scores, pairs)
    jitted, _ = shape(SHAPERS[name], scores, pairs)
    assert eager.dtype == jnp.float32 and all(m.shape == () for m in metrics.values())
    np.testing.assert_allclose(jitted, eager, rtol=1e-6)


@pytest.mark.parametrize("name", SHAPERS)
def test_bad_scores_are_refused(name):
    pairs = eggroll.antithetic(4)
    for wrong in (np.zeros(3), np.zeros((5, 4)), np.zeros((4, 1, 1)), np.zeros((4, 0)), np.float32(1)):
        with pytest.raises(ValueError, match=r"one row per member, \[4, E\]"):
            SHAPERS[name](np.asarray(wrong, np.float32), pairs)
    for low in (jnp.bfloat16, jnp.float16):
        with pytest.raises(ValueError, match="at least float32, got"):
            SHAPERS[name](jnp.zeros(4, low), pairs)
    with pytest.raises(ValueError, match="must be real"):
        SHAPERS[name](jnp.zeros(4, jnp.complex64), pairs)


def test_bad_groups_and_names_are_refused():
    with pytest.raises(ValueError, match="std must be 'global', 'group' or None, got 'prompt'"):
        fitness.per_group(std="prompt")
    four = np.zeros(4, np.float32)
    for size in (3, 0, -2, 8):
        with pytest.raises(ValueError, match=f"groups={size}, members=4"):
            shape(fitness.per_group(), four, groups=size)
    for groups in (np.zeros(3, int), np.zeros((1, 4), int), np.zeros(4)):
        with pytest.raises(ValueError, match="a group size or integers of shape"):
            shape(fitness.per_group(), four, groups=groups)
    with pytest.raises(ValueError, match="signs=1; use one with signs=2"):
        shape(fitness.pair_sign, four)
    with pytest.raises(ValueError, match=r"expected shape \(1,\), got \(2,\); pass baseline=es.evaluate_mean"):
        shape(fitness.baseline, four, baseline=np.zeros(2))
