"""Replay of judged groups: what is stored, for how long, and what is drawn. Numbers of arXiv 2506.05316 and 2507.06892."""

import itertools

import numpy as np
import pytest

from rl import slots
from rl.data import replay, selection
from rl.data.replay import Groups, Shape
from rl.data.selection import Pool
from rl.types import Rollouts, Scored

FOLDER = "rl.data.replay"
L = 4


def slot(name, **changes):
    return slots.bind(FOLDER, slots.block(FOLDER, name, **changes))


def groups(problems, value=(1, 0), step=0, ok=None, longest=L):
    """Groups whose tokens and log-probs tell problem and step."""
    n, value = len(problems), np.asarray(value, np.float32)
    value = np.tile(value, (n, 1)) if value.ndim == 1 else value
    shape = (*value.shape, longest)
    problems = np.asarray(problems, np.int32)
    length = np.full(value.shape, min(3, longest), np.int32)
    mask = np.arange(longest) < length[..., None]
    tokens = np.where(mask, problems[:, None, None] + 1, 0).astype(np.int32)
    logp = np.where(mask, -(problems[:, None, None] + 0.1 * step + 0.001), 0).astype(np.float32)
    ok = np.ones(value.shape, bool) if ok is None else np.asarray(ok)
    return Groups(problems, tokens, length, logp, np.full(shape, step, np.int32), value, ok)


def stored(state):
    """Problems in the buffer, oldest first."""
    order = np.argsort(state["stamp"], kind="stable")
    return state["groups"].problem[order[state["stamp"][order] >= 0]].tolist()


# -- groups ----------------------------------------------------------------------------------------------------------


def rollouts(rows, longest):
    tokens = np.arange(rows * longest, dtype=np.int32).reshape(rows, longest)
    return Rollouts(
        tokens, np.full(rows, longest, np.int32), -tokens.astype(np.float32) / 7, -tokens.astype(np.float32),
        tokens + 100, np.ones(rows, np.int8), np.full(rows, -1, np.int32),
    )  # fmt: skip


def test_groups_are_prompt_major():
    scored = Scored(np.array([1, 0, 0.5, 1, 0, 9]), np.array(["ok"] * 5 + ["timeout"]), {})
    made = Groups.make(np.array([8, 3]), rollouts(6, 2), scored)
    assert made.problem.tolist() == [8, 3] and made.size == 2
    assert made.tokens.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert made.version[1, 2].tolist() == [110, 111] and made.logp[1, 0, 1] == np.float32(-1)
    assert made.value.tolist() == [[1, 0, 0.5], [1, 0, 0]] and made.ok.tolist() == [[True] * 3, [True, True, False]]
    assert made.take(np.array([1])).problem.tolist() == [3]


def test_groups_that_do_not_fit_are_refused():
    scored = Scored(np.zeros(6), np.full(6, "ok"), {})
    with pytest.raises(ValueError, match="each of 4 problems, with one verdict each; got 6 answers, 6 verdicts"):
        Groups.make(np.arange(4), rollouts(6, 2), scored)
    with pytest.raises(ValueError, match="got 4 answers, 6 verdicts"):
        Groups.make(np.arange(2), rollouts(4, 2), scored)
    good = groups([1, 2])
    with pytest.raises(
        ValueError, match=r"logp must have shape \(2, 2, 4\), as tokens \(2, 2, 4\) say; got \(2, 2, 3\)"
    ):
        good._replace(logp=good.logp[..., :3]).check()
    bad = groups([1, 2])
    bad.logp[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match="logp of answers must be finite; 1 are not, first of problem 2"):
        bad.check()
    bad.logp[1, 0, 2:] = [-1, np.nan]  # padding may hold anything
    bad.check()
    bad.value[0, 0] = np.inf
    with pytest.raises(ValueError, match="value of answers must be finite"):
        bad.check()


@pytest.mark.parametrize(
    ("value", "ok", "expected"),
    [
        ([1, 0, 0], [1, 1, 1], True), ([0, 0, 0], [1, 1, 1], False), ([1, 1, 1], [1, 1, 1], False),
        ([1, 0, 0], [1, 0, 0], False), ([1, 0, 1], [1, 0, 1], False), ([0.3, 0.3, 0.3], [1, 1, 1], False),
        ([0, 0, 0], [0, 0, 0], False), ([-2, 5, 5], [1, 1, 0], True),
    ],
)  # fmt: skip
def test_informative_groups_are_those_whose_judged_rewards_differ(value, ok, expected):
    assert groups([0], value, ok=[np.array(ok, bool)]).informative.tolist() == [expected]


def test_a_batch_is_joined_fresh_first_and_padded():
    short, long = groups([5], longest=2), groups([6, 7], step=1)
    both = replay.join(short, long)
    assert both.problem.tolist() == [5, 6, 7] and both.tokens.shape == (3, 2, L)
    assert both.tokens[0, 0].tolist() == [6, 6, 0, 0] and both.logp[0, 0, 2:].tolist() == [0, 0]
    assert both.mask.sum(axis=2).tolist() == [[2, 2], [3, 3], [3, 3]]
    np.testing.assert_array_equal(both.logp[1:], long.logp)
    assert replay.join(short, None) is short
    with pytest.raises(ValueError, match="equally many samples; got 2 and 3"):
        replay.join(short, groups([1], (1, 0, 1)))


# -- no replay -------------------------------------------------------------------------------------------------------


def test_none_is_fresh_always():
    method = slot("none")
    state = method.init(Shape(4, 2, L, 0))
    assert method.apply(state, 3, 4) == (None, 4) and method.update(state, 3, groups([1])) == ({}, {})


@pytest.mark.parametrize(("name", "changes"), [("fifo", {"fresh": 1.0}), ("recent", {"replayed": 0.0})])
def test_a_replay_of_nothing_draws_nothing(name, changes):
    method = slot(name, **changes)
    state = method.init(Shape(4, 2, L, 0))
    for step in range(5):
        assert method.apply(state, step, 4) == (None, 4)
        state, _ = method.update(state, step, groups(range(4 * step, 4 * step + 4), step=step))


# -- first in, first out ---------------------------------------------------------------------------------------------


def filled(method, state, batches):
    for step, batch in enumerate(batches):
        state, metrics = method.update(state, step, batch)
    return state, metrics


def test_capacity_is_never_exceeded_and_the_oldest_leaves():
    method = slot("fifo", capacity=5)
    state = method.init(Shape(3, 2, L, 0))
    for step in range(6):
        state, metrics = method.update(state, step, groups([3 * step, 3 * step + 1, 3 * step + 2], step=step))
        assert stored(state) == list(range(max(0, 3 * step - 2), 3 * step + 3))
        assert metrics == {"replay_size": min(5.0, 3.0 * step + 3), "replay_stored": 3.0}


def test_degenerate_groups_are_never_stored():
    method = slot("fifo", capacity=5)
    value = np.array([[1, 1], [1, 0], [0, 0], [0, 1], [0.5, 0.5]], np.float32)
    state, metrics = filled(method, method.init(Shape(5, 2, L, 0)), [groups(range(5), value)])
    assert stored(state) == [1, 3] and metrics == {"replay_size": 2.0, "replay_stored": 2.0}


def test_a_problem_keeps_its_newest_group_and_goes_to_the_back():
    method = slot("fifo", capacity=4)
    batches = [groups([1, 2, 3]), groups([2], step=1), groups([4], step=2)]
    state, _ = filled(method, method.init(Shape(3, 2, L, 0)), batches)
    assert stored(state) == [1, 3, 2, 4]
    kept = state["groups"].take(np.flatnonzero(state["groups"].problem == 2))
    assert kept.size == 1 and kept.version[0, 0, 0] == 1 and kept.logp[0, 0, 0] == np.float32(-2.101)
    state, _ = method.update(state, 3, groups([5]))
    assert stored(state) == [3, 2, 4, 5]


def test_a_degenerate_newest_group_leaves_the_older_one():
    method = slot("fifo", capacity=3)
    state, _ = filled(method, method.init(Shape(3, 2, L, 0)), [groups([1]), groups([1], (0, 0), step=1)])
    assert stored(state) == [1] and state["groups"].version[state["stamp"] >= 0].max() == 0


@pytest.mark.parametrize("problems", [[1, 1], [1, 2, 1], [7, 8, 9, 10, 7], [1, 2, 3, 4, 5, 6]])
def test_one_insertion_equals_one_by_one(problems):
    method = slot("fifo", capacity=3)
    value = np.array([[i, -i - 1] for i in range(len(problems))], np.float32)
    batch = groups(problems, value)
    at_once, _ = method.update(method.init(Shape(6, 2, L, 0)), 0, batch)
    singly, _ = filled(
        method, method.init(Shape(6, 2, L, 0)), [batch.take(np.array([i])) for i in range(len(problems))]
    )
    assert stored(at_once) == stored(singly)
    order = lambda state: state["groups"].take(np.argsort(state["stamp"], kind="stable")[-len(stored(state)) :])
    for a, b in zip(order(at_once), order(singly), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("count", "fresh"), [(8, 4), (7, 4), (1, 1), (512, 256)])
def test_half_of_a_batch_is_replayed_as_far_as_there_is(count, fresh):
    method = slot("fifo", capacity=300)
    state = method.init(Shape(count, 2, L, 0))
    assert method.apply(state, 0, count) == (None, count)
    state, _ = method.update(state, 0, groups(range(3)))
    few = method.apply(state, 1, count)
    assert few.fresh == max(fresh, count - 3)
    state, _ = method.update(state, 1, groups(range(300)))
    drawn = method.apply(state, 2, count)
    assert drawn.fresh == fresh
    if drawn.groups:
        assert drawn.groups.size == count - fresh == len(set(drawn.groups.problem.tolist()))
        for i, problem in enumerate(drawn.groups.problem):
            assert (drawn.groups.tokens[i][drawn.groups.mask[i]] == problem + 1).all()


@pytest.mark.parametrize(("share", "count", "fresh"), [(0.55, 100, 55), (0.14, 50, 7), (0.1, 10, 1), (0.56, 100, 56)])
def test_fractions_that_f64_cannot_hold_round_as_numbers_do(share, count, fresh):
    method = slot("fifo", fresh=share, capacity=count)
    state, _ = method.update(method.init(Shape(count, 2, L, 0)), 0, groups(range(count)))
    assert method.apply(state, 1, count).fresh == fresh  # 0.55 * 100 is above 55 in f64


def test_draws_are_uniform_and_independent_of_the_step_before():
    method = slot("fifo", capacity=6)
    state, _ = method.update(method.init(Shape(6, 2, L, 1)), 0, groups(range(6)))
    pairs = [tuple(sorted(method.apply(state, step, 4).groups.problem.tolist())) for step in range(6000)]
    share = np.array([pairs.count(pair) for pair in itertools.combinations(range(6), 2)]) / 6000
    np.testing.assert_allclose(share, 1 / 15, atol=4 * np.sqrt(1 / 15 / 6000))


def test_sampled_completions_per_step():
    """sigma B G + K G / mu = 2048 + 1024 of 4096 a step with the published settings, after the first round."""
    B, G = 512, 8
    buffer, chooser = (
        slot("fifo", capacity=256),
        slots.bind("rl.data.selection", slots.block("rl.data.selection", "dots")),
    )
    state = buffer.init(Shape(B, G, 1, 0))
    chosen = chooser.init(Pool(2000, 0, lambda: np.random.default_rng(0).normal(size=(2000, 4))))
    sampled, random = [], np.random.default_rng(1)

    def measure(rows, samples):
        sampled[-1] += len(rows) * samples
        return random.integers(0, 2, (len(rows), samples)), np.ones((len(rows), samples), bool)

    for step in range(6):
        sampled.append(0)
        drawn = buffer.apply(state, step, B)
        chosen, rows, _ = selection.choose(chooser, chosen, step, drawn.fresh, measure)
        sampled[-1] += len(rows) * G
        fresh = groups(rows, random.integers(0, 2, (len(rows), G)), step, longest=1)
        assert replay.join(fresh, drawn.groups).size == B
        state, _ = buffer.update(state, step, fresh)
    assert sampled == [4096 + 2048, 2048, 4096, 2048, 4096, 2048]
    assert np.mean(sampled[2:]) == 3072


@pytest.mark.parametrize(
    ("name", "changes", "shape", "message"),
    [
        ("fifo", {"fresh": 0.0}, Shape(4, 2, L, 0), "fresh must be above 0 and at most 1 .no replay.; got 0.0"),
        ("fifo", {"fresh": 1.5}, Shape(4, 2, L, 0), "got 1.5"),
        ("fifo", {"capacity": 0}, Shape(4, 2, L, 0), "capacity of a replay buffer must be at least 1; got 0"),
        ("fifo", {}, Shape(4, 0, L, 0), "samples of a replay buffer must be at least 1; got 0"),
        ("recent", {"replayed": 1.0}, Shape(4, 2, L, 0), "at least 0 .no replay. and below 1; got 1.0"),
        ("recent", {"replayed": 0.9}, Shape(4, 2, L, 0), "at most 1 - 1/B; got 0.9 and B = 4 groups"),
        ("recent", {"window": 0}, Shape(4, 2, L, 0), "window must be at least 1 and until at least 0; got 0 and 0"),
        ("recent", {"until": -1}, Shape(4, 2, L, 0), "got 2 and -1"),
    ],
)
def test_settings_out_of_range_are_refused(name, changes, shape, message):
    with pytest.raises(ValueError, match=message):
        slot(name, **changes).init(shape)


@pytest.mark.parametrize("name", ["fifo", "recent"])
def test_groups_of_another_shape_are_refused(name):
    method = slot(name)
    state = method.init(Shape(4, 2, 3, 0))
    with pytest.raises(ValueError, match="holds groups of 2 samples; got groups of 3"):
        method.update(state, 0, groups([1], (1, 0, 1)))
    too_long = groups([1])
    too_long.length[:] = 4
    with pytest.raises(ValueError, match="at most 3 tokens; got 4"):
        method.update(state, 0, too_long)
    state, _ = method.update(state, 0, groups([1]))  # 4 columns, 3 tokens: cut
    assert state["groups"].tokens.shape[2] == 3
    bad = groups([1])
    bad.logp[:] = np.nan
    with pytest.raises(ValueError, match="logp of answers must be finite"):
        method.update(state, 1, bad)


# -- recent policies -------------------------------------------------------------------------------------------------


def run_recent(method, shape, steps):
    """Ages of what was drawn, per step."""
    state, ages, problem = method.init(shape), [], itertools.count()
    for step in range(steps):
        drawn = method.apply(state, step, shape.groups)
        age = [] if drawn.groups is None else (step - drawn.groups.version[:, 0, 0]).tolist()
        assert drawn.fresh + len(age) == shape.groups
        if drawn.groups is not None:
            assert len(set(drawn.groups.problem.tolist())) == len(age)
        ages.append(age)
        state, _ = method.update(state, step, groups([next(problem) for _ in range(drawn.fresh)], step=step))
    return ages, state


@pytest.mark.parametrize(("share", "window"), [(0.4, 2), (0.25, 1), (0.45, 3)])
def test_the_mixture_has_its_share_and_nothing_older_than_the_window(share, window):
    steps, batch = 1500, 6
    ages, _ = run_recent(slot("recent", replayed=share, window=window), Shape(batch, 2, L, 3), steps)
    flat = np.array([age for step in ages for age in step])
    assert len(flat) / (steps * batch) == pytest.approx(share, abs=0.01)
    assert flat.min() == 1 and flat.max() == window and ages[0] == []
    # Equally many groups per iteration, so every age equally often.
    counts = np.bincount(flat)[1:] / len(flat)
    np.testing.assert_allclose(counts, 1 / window, atol=0.05)
    sizes = {len(step) for step in ages[1:]}
    assert sizes <= {int(np.floor(share * batch)), int(np.ceil(share * batch))}


def test_recent_stores_every_group():
    method = slot("recent")
    state, metrics = method.update(method.init(Shape(4, 2, L, 0)), 0, groups([1, 2], (1, 1)))
    assert stored(state) == [1, 2] and metrics == {"replay_size": 2.0}
    with pytest.raises(ValueError, match="room for 6 more groups, B per iteration; got 7"):
        method.update(state, 1, groups(range(7)))


def test_after_the_reincarnation_all_is_fresh_and_the_buffer_empty():
    method = slot("recent", until=50)
    ages, state = run_recent(method, Shape(5, 2, L, 0), 60)
    assert [len(step) for step in ages] == [0] + [2] * 49 + [0] * 10
    assert stored(state) == [] and method.apply(state, 60, 5) == (None, 5)
    before = run_recent(method, Shape(5, 2, L, 0), 50)[1]  # the update of iteration 49 is the last one before it
    assert stored(before) == []


def test_a_buffer_that_was_not_fed_draws_less():
    method = slot("recent", replayed=0.8)
    state, _ = method.update(method.init(Shape(10, 2, L, 0)), 0, groups([1, 2]))
    assert method.apply(state, 1, 10).fresh == 8 and method.apply(state, 2, 10).fresh == 8
    assert method.apply(state, 3, 10) == (None, 10)  # too old
    assert method.apply(state, 0, 10) == (None, 10)  # this iteration's own
