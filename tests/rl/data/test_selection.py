"""Uniform selection, and how a loop asks any selection for a step's problems."""

import numpy as np
import pytest

from rl import slots
from rl.data import selection
from rl.data.selection import EMPTY, Choice, Judged, Pool
from rl.slots import Slot

UNIFORM = slots.bind("rl.data.selection", slots.block("rl.data.selection", "uniform"))


def no_embedding():
    raise AssertionError("a uniform draw needs no embeddings")


def taken(seed, size, counts):
    state, rows = UNIFORM.init(Pool(size, seed, no_embedding)), []
    for step, count in enumerate(counts):
        state, choice = UNIFORM.apply(state, step, count)
        assert choice.rows.dtype == np.int32 and not len(choice.reference) and choice.samples == 0
        rows.append(choice.rows.tolist())
    return rows


@pytest.mark.parametrize(("count", "size"), [(4, 12), (5, 12), (7, 3), (1, 1)])
def test_every_problem_once_per_epoch_also_across_steps(count, size):
    epochs = np.reshape(
        np.concatenate(taken(7, size, [count] * (3 * size))), (-1, size)
    )  # whole epochs for every count
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    if size > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 1 and taken(8, size, [count]) != taken(7, size, [count])


def test_steps_of_any_size_leave_no_problem_out():
    flat = [row for rows in taken(3, 10, [8, 3, 1, 9, 4, 5, 7, 3]) for row in rows]  # 40 = 4 epochs
    epochs = np.reshape(flat, (4, 10))
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_pool_without_problems_is_refused():
    with pytest.raises(ValueError, match="at least one problem; got 0"):
        UNIFORM.init(Pool(0, 1, no_embedding))


def counting(rows=None):
    """A selection whose state lists the calls; it wants problems 7 and 8 measured before it answers."""

    def apply(state, step, count):
        ready = "update" in state
        choice = (
            Choice(np.arange(count if rows is None else rows), EMPTY, 0)
            if ready
            else Choice(EMPTY, np.array([7, 8]), 5)
        )
        return [*state, f"apply {step} {count}"], choice

    def update(state, judged):
        assert judged.reference and judged.rows.tolist() == [7, 8] and judged.value.shape == (2, 5)
        return [*state, "update"], {"seen": float(judged.value.sum())}

    return Slot("counting", None, apply, update)


def test_choose_measures_the_reference_set_in_between():
    asked = []

    def measure(rows, samples):
        asked.append((rows.tolist(), samples))
        return np.ones((len(rows), samples)), np.ones((len(rows), samples), bool)

    state, rows, metrics = selection.choose(counting(), [], 4, 3, measure)
    assert state == ["apply 4 3", "update", "apply 4 3"] and asked == [([7, 8], 5)]
    assert rows.tolist() == [0, 1, 2] and metrics == {"seen": 10.0}
    state, rows, metrics = selection.choose(counting(), state, 5, 2, measure)
    assert len(asked) == 1 and rows.tolist() == [0, 1] and metrics == {}


def test_choose_refuses_a_selection_that_returns_too_few():
    measure = lambda rows, samples: (np.ones((2, 5)), np.ones((2, 5), bool))
    with pytest.raises(ValueError, match="as many problems as asked for, 3; counting returned 0 in step 4"):
        selection.choose(counting(rows=0), [], 4, 3, measure)
    with pytest.raises(ValueError, match="at least one problem; got count 0"):
        selection.choose(counting(), [], 4, 0, measure)


def test_training_groups_teach_uniform_nothing():
    state = UNIFORM.init(Pool(5, 1, no_embedding))
    assert UNIFORM.update(state, Judged(0, np.arange(2), np.ones((2, 3)), np.ones((2, 3), bool))) == (state, {})
