"""Tables that cross a stage: padding, rows by number, and what is refused."""

import dataclasses

import numpy as np
import pytest

from rl.types import ABORTED, LENGTH, Requests, Rollouts, Scored, pad


def test_padding():
    ids, length = pad([[5, 6, 7], [8], []])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]] and length.tolist() == [3, 1, 0]
    assert ids.dtype == length.dtype == np.int32
    ids, length = pad([])
    assert ids.shape == (0, 1) and length.shape == (0,)
    assert pad([[]])[0].tolist() == [[0]]
    assert pad([np.array([1, 2]), (3,)])[0].tolist() == [[1, 2], [3, 0]]
    assert pad([[2**31 - 1, -(2**31)]])[0].tolist() == [[2**31 - 1, -(2**31)]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 2.5]], "tokens must be whole numbers of 32 bits; got float64 like 1.0"),
        (["12"], "tokens must be whole numbers of 32 bits; got <U1 like '1'"),
        ([[True]], "tokens must be whole numbers of 32 bits; got bool"),
        ([[1], [2**31]], "tokens must be -2147483648 to 2147483647; got 1 to 2147483648"),
        ([[2**70]], "tokens must be whole numbers of 32 bits; got object"),
    ],
)
def test_tokens_that_are_no_ids(rows, words):
    with pytest.raises(ValueError, match=words):
        pad(rows)


def test_made_requests():
    asked = Requests.make([[1, 2], [3]], 7)
    assert asked.budget.tolist() == [7, 7] and asked.uid.tolist() == [0, 1] and asked.member.tolist() == [-1, -1]
    asked = Requests.make([[1, 2], [3]], np.array([7, 8]), uid=[2**32 - 1, 0], member=np.array([4, 5], np.int64))
    assert (asked.uid.dtype, asked.member.dtype, asked.budget.dtype) == (np.uint32, np.int32, np.int32)
    assert asked.uid.tolist() == [2**32 - 1, 0] and asked.member.tolist() == [4, 5] and asked.budget.tolist() == [7, 8]
    asked.budget[0] = 1  # a copy of its own
    assert len(asked) == 2 and len(Requests.make([], 4)) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 2**31}, "budget must be .* to 2147483647; got 2147483648"),
        ({"budget": np.array([1, 2**40])}, "budget must be .* to 2147483647; got 1 to 1099511627776"),
        ({"budget": 2.0}, "budget must be whole numbers of 32 bits; got float64 like 2.0"),
        ({"budget": None}, "budget must be whole numbers of 32 bits; got object like None"),
        ({"uid": [-1, 0]}, "uid must be 0 to 4294967295; got -1 to 0"),
        ({"uid": [0, 2**32]}, "uid must be 0 to 4294967295; got 0 to 4294967296"),
        ({"uid": [0, 1, 2]}, r"uid must be one number or one per row, 2; got shape \(3,\)"),
        ({"member": [[0], [1]]}, r"member must be one number or one per row, 2; got shape \(2, 1\)"),
        ({"member": "all"}, "member must be whole numbers of 32 bits; got <U3 like 'all'"),
    ],
)
def test_columns_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        Requests.make([[1, 2], [3]], **{"budget": 7, **settings})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("uid", np.arange(2), "uid must be a NumPy array of uint32; got an array of int64"),
        ("prompt", np.zeros((2, 3)), "prompt must be a NumPy array of int32; got an array of float64"),
        ("prompt", [[1], [2]], "prompt must be a NumPy array of int32; got list"),
        ("prompt", np.zeros(2, np.int32), r"prompt must be \[rows, longest prompt\]; got shape \(2,\)"),
        ("budget", np.zeros((2, 1), np.int32), r"budget must have one entry per row, 2; got shape \(2, 1\)"),
        ("member", np.zeros(3, np.int32), r"member must have one entry per row, 2; got shape \(3,\)"),
        ("prompt_length", np.array([1, 9], np.int32), "prompt_length must be at most 2, the columns of prompt; got 9"),
        ("done", Rollouts.empty(np.zeros(3), 4), "done must have one row per request, 2; got 3"),
    ],
)
def test_requests_put_together_by_hand_are_checked(name, value, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(Requests.make([[1, 2], [3]], 7), **{name: value})


def test_rows_are_taken_with_what_was_done():
    done = dataclasses.replace(
        Rollouts.empty(np.array([3, 4, 5]), 2),
        tokens=np.array([[1, 2], [3, 0], [0, 0]], np.int32),
        length=np.array([2, 1, 0], np.int32),
        finish=np.array([LENGTH, ABORTED, ABORTED], np.int8),
    )
    asked = dataclasses.replace(Requests.make([[1, 2], [3], [4]], [2, 5, 6], member=[3, 4, 5]), done=done)
    some = asked.take(np.array([2, 0, 0]))
    assert some.prompt.tolist() == [[4, 0], [1, 2], [1, 2]] and some.uid.tolist() == [2, 0, 0]
    assert some.done.tokens.tolist() == [[0, 0], [1, 2], [1, 2]] and some.done.finish.tolist() == [
        ABORTED,
        LENGTH,
        LENGTH,
    ]
    assert done.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert some.done.mask.tolist() == [[False, False], [True, True], [True, True]]
    masked = asked.take(np.array([True, False, True]))
    assert masked.budget.tolist() == [2, 6] and masked.done.member.tolist() == [3, 5]


def test_an_empty_table_of_rollouts():
    empty = Rollouts.empty(np.array([1, -1]), 3)
    assert len(empty) == 2 and not empty.mask.any() and empty.tokens.shape == empty.logp.shape == (2, 3)
    assert (empty.finish == ABORTED).all() and empty.member.tolist() == [1, -1]
    assert empty.experts is None
    names = [field.name for field in dataclasses.fields(empty) if field.name != "experts"]
    dtypes = {name: str(getattr(empty, name).dtype) for name in names}
    assert dtypes == {
        "tokens": "int32", "length": "int32", "logp": "float32", "logp_full": "float32", "version": "int32",
        "finish": "int8", "member": "int32",
    }  # fmt: skip


def test_scored_rows():
    scored = Scored(np.array([1.0, 0, 0.5]), np.array(["ok", "timeout", "ok"]), {"length": np.array([3.0, np.nan, 4])})
    assert scored.ok.tolist() == [True, False, True]
    some = scored.take(np.array([2, 1]))
    assert some.value.tolist() == [0.5, 0] and some.ok.tolist() == [True, False]
    np.testing.assert_array_equal(some.parts["length"], [4, np.nan])
