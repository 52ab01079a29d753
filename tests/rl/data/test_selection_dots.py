"""DOTS: which prompts are worth answering, and when it is measured. Numbers from arXiv 2506.05316 by hand."""

import itertools

import numpy as np
import pytest

from rl import slots
from rl.data import selection
from rl.data.selection import Judged, Pool, dots
from rl.objectives import advantages

FOLDER = "rl.data.selection"


def slot(**changes):
    return slots.bind(FOLDER, slots.block(FOLDER, "dots", **changes))


def random(seed=0):
    return np.random.default_rng(seed)


# -- why one half ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "expected"), [(0.5, 0.21875), (0.25, 0.1640625), (0.125, 0.0957031), (0, 0), (1, 0)])
def test_squared_advantage_is_largest_at_one_half(p, expected):
    """E[(r - mean)^2] = p (1 - p) (1 - 1/8) over all 2^8 groups; the expectation of what the loss multiplies."""
    groups = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    weight = np.prod(np.where(groups > 0, p, 1 - p), axis=1)
    squared = np.asarray(advantages.group_mean(groups, groups >= 0))[:, 0] ** 2
    assert weight @ squared == pytest.approx(expected, abs=1e-7)


# -- the draw --------------------------------------------------------------------------------------------------------


def first_places(difficulty, temperature, draws, target=0.5):
    r, d = random(), np.asarray(difficulty, np.float64)
    return np.array([dots.draw(r, d, target, temperature)[:2] for _ in range(draws)])


def test_first_place_has_the_published_weights():
    weights = [0.665221, 0.244721, 0.090028, 0.000030]  # softmax of 0, -1, -2, -10
    places = first_places([0.5, 0.501, 0.502, 0.51], 1e-3, 20000)
    share = np.bincount(places[:, 0], minlength=4) / len(places)
    np.testing.assert_allclose(share, weights, atol=4 * np.sqrt(0.25 / 20000))


def test_order_is_sequential_sampling_without_replacement():
    difficulty = np.array([0.5, 0.5005, 0.501, 0.4985])
    w = np.exp(-np.abs(difficulty - 0.5) / 1e-3)
    w /= w.sum()
    places = first_places(difficulty, 1e-3, 20000)
    for i, j in itertools.permutations(range(4), 2):
        expected = w[i] * w[j] / (1 - w[i])  # j among those that are left
        found = ((places == [i, j]).all(axis=1)).mean()
        assert found == pytest.approx(expected, abs=4 * np.sqrt(expected / 20000))


def test_limits_of_the_temperature():
    difficulty = np.array([0.9, 0.45, 0.05, 0.52, 0.3])
    for seed in range(20):  # cold: nearest to the target first, whatever the noise
        assert dots.draw(random(seed), difficulty, 0.5, 1e-9).tolist() == [3, 1, 4, 0, 2]
        assert dots.draw(random(seed), difficulty, 0.95, 1e-9).tolist() == [0, 3, 1, 4, 2]
    share = np.bincount(first_places(difficulty, 1e9, 10000)[:, 0]) / 10000
    np.testing.assert_allclose(share, 0.2, atol=4 * np.sqrt(0.16 / 10000))


@pytest.mark.parametrize("size", [1, 2, 50])
def test_no_problem_twice_in_a_draw(size):
    order = dots.draw(random(), random(1).random(size), 0.5, 1e-3)
    assert sorted(order.tolist()) == list(range(size)) and order.dtype == np.int32


# -- labels ----------------------------------------------------------------------------------------------------------


def test_difficulty_counts_judged_answers_alone():
    value = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], float)
    ok = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    label, known = dots.labels("success", value, ok)
    np.testing.assert_allclose(label[:2], [0.5, 1 / 3], rtol=1e-6)
    assert known.tolist() == [True, True, False]
    with pytest.raises(ValueError, match='needs rewards between 0 and 1; got 1.5: use measure="spread", target=1'):
        dots.labels("success", np.array([[0.0, 1.5]]), np.ones((1, 2), bool))
    # What nobody judged is never looked at.
    assert dots.labels("success", np.array([[0.0, np.nan]]), np.array([[True, False]]))[0][0] == 1


def test_spread_of_any_rewards_is_relative_to_the_largest():
    value = np.array([[3.0, 7.0], [5.0, 6.0], [2.0, 2.0], [9.0, -9.0]])
    ok = np.array([[1, 1], [1, 1], [1, 1], [1, 0]], bool)
    label, known = dots.labels("spread", value, ok)
    assert known.tolist() == [True, True, True, False]  # one answer has no spread
    np.testing.assert_allclose(label[:3], [1, 0.25, 0], atol=1e-6)


# -- rounds ----------------------------------------------------------------------------------------------------------


class Tutor:
    """Answers of a policy with a known success rate per problem, and what was asked of it."""

    def __init__(self, rate, seed=0):
        self.rate, self.random, self.asked = np.asarray(rate), random(seed), []

    def __call__(self, rows, samples):
        self.asked.append(rows)
        return (self.random.random((len(rows), samples)) < self.rate[rows, None]).astype(float), np.ones(
            (len(rows), samples), bool
        )


def clusters(per=40, width=8, seed=0):
    """Three kinds of prompts: never, half the time and always solved; embeddings say which kind, with noise."""
    kind = np.repeat([0, 1, 2], per)
    centres = random(seed).normal(size=(3, width))
    return kind, (5 + centres[kind] + 0.1 * random(seed + 1).normal(size=(3 * per, width))).astype(np.float32)


def test_prompts_of_middle_difficulty_are_found_from_a_few_measured_ones():
    kind, embedding = clusters()
    tutor = Tutor(np.array([0, 0.5, 1])[kind])
    method = slot(references=24, samples=8)
    state = method.init(Pool(len(kind), 3, lambda: embedding))
    state, rows, metrics = selection.choose(method, state, 0, 30, tutor)
    assert (kind[rows] == 1).mean() == 1 and len(set(rows.tolist())) == 30  # uniformly it would be one third
    assert metrics["selection_measured"] == 24 and metrics["selection_scale"] > 0
    np.testing.assert_allclose(metrics["selection_reference_difficulty"], 0.5, atol=0.25)
    predicted = [state["predicted"][kind == k].mean() for k in range(3)]
    np.testing.assert_allclose(predicted, [1, 0.5, 0], atol=0.12)


def test_other_targets_pick_other_prompts():
    kind, embedding = clusters()
    for target, wanted in ((1.0, 0), (0.0, 2)):  # difficulty 1: never solved
        method = slot(references=24, samples=8, target=target)
        state = method.init(Pool(len(kind), 3, lambda: embedding))
        rows = selection.choose(method, state, 0, 30, Tutor(np.array([0, 0.5, 1])[kind]))[1]
        assert (kind[rows] == wanted).all()


def test_members_of_a_population_are_compared_by_spread():
    """Rewards outside [0, 1]; columns are members. Kind 1 tells members apart, the others do not."""
    kind, embedding = clusters()
    method = slot(references=24, samples=2, measure="spread", target=1.0)

    def measure(rows, samples):
        members = np.linspace(-1, 1, 6) * samples
        return 10.0 * kind[rows, None] + np.where(kind[rows] == 1, 3.0, 0.1)[:, None] * members, np.ones(
            (len(rows), 6), bool
        )

    state = method.init(Pool(len(kind), 3, lambda: embedding))
    rows = selection.choose(method, state, 0, 30, measure)[1]
    assert (kind[rows] == 1).all()


@pytest.mark.parametrize("embedding", [np.zeros((60, 4)), np.full((60, 4), 3.7)])
def test_embeddings_that_say_nothing_give_a_uniform_draw(embedding):
    method = slot(references=16)
    state = method.init(Pool(60, 1, lambda: embedding))
    state, rows, metrics = selection.choose(method, state, 0, 60, Tutor(np.linspace(0, 1, 60)))
    assert metrics["selection_scale"] == 0 and np.ptp(state["predicted"]) < 1e-6
    assert sorted(rows.tolist()) == list(range(60)) and rows.tolist() != list(range(60))


def test_rounds_last_their_period_and_a_step_may_come_back_for_more():
    tutor = Tutor(np.full(40, 0.5))
    method = slot(references=10, samples=2, period=2)
    state = method.init(Pool(40, 5, lambda: random().normal(size=(40, 4))))
    seen = []
    for step, count in [(0, 8), (0, 4), (1, 6), (2, 8), (3, 8), (4, 8)]:
        state, rows, _ = selection.choose(method, state, step, count, tutor)
        seen.append(rows.tolist())
    assert len(tutor.asked) == 3  # steps 0, 2 and 4
    assert all(len(set(rows.tolist())) == 10 for rows in tutor.asked)
    assert len({tuple(rows) for rows in tutor.asked}) == 3  # drawn anew
    assert len(set(seen[0] + seen[1] + seen[2])) == 18  # one round, nobody twice
    assert len(set(seen[3] + seen[4])) == 16


def test_a_round_that_runs_out_is_followed_by_another():
    tutor = Tutor(np.full(10, 0.5))
    method = slot(references=4, samples=2, period=100)
    state = method.init(Pool(10, 5, lambda: random().normal(size=(10, 4))))
    for _ in range(3):
        state, rows, _ = selection.choose(method, state, 0, 4, tutor)
    assert len(tutor.asked) == 2 and len(set(rows.tolist())) == 4  # 4, 4, and only 2 are left
    with pytest.raises(ValueError, match="at most the pool's 10 problems; got count 11"):
        method.apply(state, 0, 11)


def test_a_pool_smaller_than_the_reference_set_is_measured_whole():
    tutor = Tutor(np.linspace(0, 1, 5))
    method = slot(references=256)
    selection.choose(method, method.init(Pool(5, 5, lambda: np.eye(5))), 0, 5, tutor)
    assert sorted(tutor.asked[0].tolist()) == [0, 1, 2, 3, 4]


def test_references_that_nobody_could_judge_leave_a_uniform_draw():
    method = slot(references=8, samples=2)
    state = method.init(Pool(20, 5, lambda: random().normal(size=(20, 4))))
    nobody = lambda rows, samples: (np.zeros((len(rows), samples)), np.zeros((len(rows), samples), bool))
    state, rows, metrics = selection.choose(method, state, 0, 20, nobody)
    assert metrics == {"selection_measured": 0.0, "selection_scale": 0.0}
    assert (state["predicted"] == 0.5).all() and sorted(rows.tolist()) == list(range(20))


def test_training_groups_report_how_well_they_were_predicted():
    method = slot(references=4)
    state = method.init(Pool(4, 5, lambda: np.eye(4))) | {"predicted": np.array([0.2, 0.4, 0.6, 0.8], np.float32)}
    value = np.array([[1.0, 1], [1, 0], [0, 0]])
    ok = np.array([[1, 1], [1, 1], [1, 0]], bool)
    same, metrics = method.update(state, Judged(0, np.array([0, 1, 3]), value, ok))
    assert same is state
    assert metrics["selection_predicted"] == pytest.approx(1.4 / 3)
    assert metrics["selection_difficulty"] == pytest.approx(0.5)
    # (0.2, 0.4, 0.8) against (0, 0.5, 1): covariance 0.3, variances 0.56/3 and 0.5 of three times
    assert metrics["selection_correlation"] == pytest.approx(0.3 / np.sqrt(0.56 / 3 * 0.5))
    flat = method.update(state, Judged(0, np.array([0, 1]), np.ones((2, 2)), np.ones((2, 2), bool)))[1]
    assert set(flat) == {"selection_predicted", "selection_difficulty"}
    assert method.update(state, Judged(0, np.array([0]), np.ones((1, 2)), np.zeros((1, 2), bool)))[1] == {}


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": 0}, "references of a selection by difficulty must be at least 1; got 0"),
        ({"samples": 0}, "samples of a selection"),
        ({"period": 0}, "period of a selection"),
        ({"measure": "reward"}, "measure must be one of .'success', 'spread'.; got 'reward'"),
        ({"measure": "spread", "samples": 1}, "at least 2 samples of each reference; got 1"),
        ({"temperature": 0.0}, "temperature must be positive and target between 0 and 1; got 0.0 and 0.5"),
        ({"target": 1.5}, "got 0.001 and 1.5"),
        ({"predictor": "nowhere.safetensors"}, "predictor must be a file written by"),
    ],
)
def test_keys_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        slot(**changes).init(Pool(4, 0, lambda: np.eye(4)))


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        (np.ones((3, 2)), r"finite and \[4, H\], one per problem; got \(3, 2\)"),
        (np.ones(4), r"got \(4,\)"),
        (np.array([[np.nan], [1], [1], [np.inf]]), "2 of them not finite"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embedding, message):
    with pytest.raises(ValueError, match=message):
        slot().init(Pool(4, 0, lambda: embedding))
