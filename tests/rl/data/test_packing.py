"""Packing by hand-worked cases and by properties: nothing lost, nothing split, nothing beside its place."""

import dataclasses

import numpy as np
import pytest

from rl.data import packing
from rl.data.packing import Shape, micro_batches, pack


def test_longest_first_into_the_fullest_row_that_fits():
    # 7 opens row 0 (3 free), 5 opens row 1 (5 free), 4 goes beside the 5 (1 free), 3 beside the 7 (0 free), the first 2 opens
    # row 2 (8 free), the second joins it; 1 goes into the fullest, row 1
    layout = pack(np.array([2, 7, 4, 1, 3, 5, 2]), 10)
    np.testing.assert_array_equal(layout.row, [2, 0, 1, 1, 0, 1, 2])
    np.testing.assert_array_equal(layout.offset, [0, 0, 5, 9, 7, 0, 2])
    assert layout.rows == 3
    # two per row: 7 3, 5 4, 2 2, 1
    limited = pack(np.array([2, 7, 4, 1, 3, 5, 2]), 10, per_row=2)
    np.testing.assert_array_equal(limited.row, [2, 0, 1, 3, 0, 1, 2])
    assert pack(np.array([3, 3]), 4, rows=5).rows == 5 and pack(np.zeros(0, int), 4).rows == 0


def test_rows_hold_every_token_once_and_are_nearly_full():
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = rng.integers(1, 50, rng.integers(1, 200))
        layout = pack(lengths, 64)
        taken = np.zeros((layout.rows, 64), int)
        for row, offset, length in zip(layout.row, layout.offset, lengths, strict=True):
            taken[row, offset : offset + length] += 1
        assert taken.sum() == lengths.sum() and taken.max() == 1 and taken.any(axis=1).all()
        assert (
            layout.rows <= 11 / 9 * np.ceil(lengths.sum() / 64) + 1
        )  # holds for these; the theorem is about the optimum
        again = pack(lengths, 64)
        np.testing.assert_array_equal(layout.row, again.row)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 9, 12], {}, r"1 to 8 tokens.*never split; sequence 1 has 9 \(2 such\)"),
        ([3, 0], {}, "sequence 1 has 0"),
        ([5, 5, 5], {"rows": 2}, "3 sequences of 15 tokens must fit 2 rows of 8; they need 3"),
        ([1, 1, 1], {"rows": 1, "per_row": 2}, "they need 2"),
    ],
)
def test_what_does_not_fit_is_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths), 8, **options)


def rows(n, seed=0, longest_prompt=6, longest=9):
    """n prompts and completions; token j of sequence i is 100 i + j, so that every token says where it belongs."""
    rng = np.random.default_rng(seed)
    prompt_length = rng.integers(1, longest_prompt + 1, n).astype(np.int32)
    length = rng.integers(0, longest + 1, n).astype(np.int32)
    at = 100 * np.arange(n, dtype=np.int32)[:, None]
    prompt = np.where(
        np.arange(longest_prompt) < prompt_length[:, None], at + np.arange(longest_prompt, dtype=np.int32), -7
    )
    tokens = at + prompt_length[:, None] + np.arange(longest, dtype=np.int32)
    return prompt, prompt_length, np.where(np.arange(longest) < length[:, None], tokens, -7), length


@pytest.mark.parametrize("shape", [Shape(15, 1, 1, 9), Shape(15, 2, 3, 9), Shape(40, 3, 8, 12)])
@pytest.mark.parametrize("n", [1, 2, 23])
def test_micro_batches_hold_every_sequence_whole(shape, n):
    prompt, prompt_length, tokens, length = rows(n)
    batch = micro_batches(prompt, prompt_length, tokens, length, shape)
    count = -(-n // shape.rows)
    assert batch.ids.shape == batch.segments.shape == (count, shape.rows, shape.capacity)
    assert batch.source.shape == (count, shape.rows * shape.per_row)
    assert sorted(batch.source[batch.source >= 0]) == list(range(n))
    for m, s in np.argwhere(batch.source >= 0):
        i = batch.source[m, s]
        row, start = batch.row[m, s], batch.offset[m, s]
        whole = 100 * i + np.arange(prompt_length[i] + length[i])
        np.testing.assert_array_equal(batch.ids[m, row, start : start + len(whole)], whole)
        assert (batch.segments[m, row, start : start + len(whole)] == s).all()
        assert (batch.segments[m] == s).sum() == len(whole)
        assert (batch.prompt_length[m, s], batch.length[m, s]) == (prompt_length[i], length[i])
    assert (batch.ids[batch.segments < 0] == 0).all()
    # those in use come first and are in use; a micro-batch fills its places from the front
    in_use = (batch.source >= 0).any(axis=1)
    assert in_use[: batch.used].all() and not in_use[batch.used :].any()
    assert (np.diff((batch.source >= 0).astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(batch.gathered(batch.spread(length)), length)


def test_packing_saves_micro_batches():
    prompt, prompt_length, tokens, length = rows(64)
    alone = micro_batches(prompt, prompt_length, tokens, length, Shape(15, 2, 1, 9))
    shared = micro_batches(prompt, prompt_length, tokens, length, Shape(15, 2, 4, 9))
    assert alone.used == 32 and shared.used <= -(-(prompt_length + length).sum() // 30) + 4


def test_experts_go_where_their_tokens_go():
    prompt, prompt_length, tokens, length = rows(7)
    whole = np.concatenate([prompt, tokens], axis=1)  # the experts of a token: its own number, by layer and place
    experts = (10 * whole[..., None, None] + 2 * np.arange(3)[:, None] + np.arange(2)).astype(np.int32)
    batch = micro_batches(prompt, prompt_length, tokens, length, Shape(15, 2, 3, 9), experts=experts)
    assert batch.experts.shape == (4, 2, 3, 15, 2)
    expected = 10 * batch.ids[:, :, None, :, None] + 2 * np.arange(3)[:, None, None] + np.arange(2)
    real = np.broadcast_to(batch.segments[:, :, None, :, None] >= 0, expected.shape)
    np.testing.assert_array_equal(batch.experts, np.where(real, expected, -1))


def test_the_shape_of_micro_batches():
    assert packing.shape(96, 20, 12) == Shape(32, 3, 4, 12)
    assert packing.shape(96, 20, 12, capacity=48, per_row=2) == Shape(48, 2, 2, 12)
    assert Shape(48, 2, 2, 12).sequences == 4
    with pytest.raises(ValueError, match=r"20 \+ 12 tokens; got a capacity of 31"):
        packing.shape(96, 20, 12, capacity=31)
    with pytest.raises(ValueError, match="at least one row of 32 tokens; got 31"):
        packing.shape(31, 20, 12)
    with pytest.raises(ValueError, match="per_row of a micro-batch must be at least 1; got 0"):
        packing.shape(96, 20, 12, per_row=0)


def test_rows_that_do_not_belong_together_are_refused():
    prompt, prompt_length, tokens, length = rows(5)
    shape = Shape(15, 2, 3, 9)
    with pytest.raises(ValueError, match="length must have one row per prompt, 5; got 4"):
        micro_batches(prompt, prompt_length, tokens, length[:4], shape)
    with pytest.raises(ValueError, match="completions at most 5; got 2 and 9"):
        micro_batches(prompt, prompt_length, tokens, np.full(5, 9, np.int32), Shape(15, 2, 3, 5))
    with pytest.raises(ValueError, match="at least 1 token"):
        micro_batches(prompt, 0 * prompt_length, tokens, length, shape)


def credited(**changes):
    prompt, prompt_length, tokens, length = rows(5, seed=1)
    batch = micro_batches(prompt, prompt_length, tokens, length, Shape(15, 2, 3, 12))
    mask = np.arange(tokens.shape[1]) < length[:, None]
    values = {
        "mask": mask,
        "advantage": np.arange(5.0),
        "behaviour": 10.0 * np.arange(5)[:, None] + np.arange(9),
    } | changes
    return batch, length, batch.credit(**values)


def test_credit_is_spread_over_the_micro_batches():
    batch, length, full = credited(share=np.arange(5) / 8)
    assert full.mask.shape == full.advantage.shape == full.behaviour.shape == (*batch.source.shape, 12)
    assert full.proximal is None and full.reference is None and full.previous is None
    for m, s in np.ndindex(batch.source.shape):
        i = batch.source[m, s]
        assert full.counted[m, s] == (i >= 0) and full.mask[m, s].sum() == (length[i] if i >= 0 else 0)
        if i >= 0:
            np.testing.assert_array_equal(full.advantage[m, s, :9], np.full(9, i))
            np.testing.assert_array_equal(full.behaviour[m, s, :9], 10 * i + np.arange(9))
            assert full.share[m, s] == i / 8
    assert {x.dtype for x in (full.advantage, full.behaviour, full.share)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"behaviour": np.zeros((5, 8))},
            r"behaviour must have one number per completion token, \(5, 9\); got \(5, 8\)",
        ),
        ({"behaviour": None}, r"behaviour must have one number per completion token, \(5, 9\); got \(\)"),
        ({"reference": np.zeros((4, 9))}, r"reference must have.*got \(4, 9\)"),
        ({"advantage": np.zeros(4)}, r"advantage must have.*got \(4,\)"),
        ({"mask": np.ones((5, 9), bool)}, "False after its last token"),
        ({"counted": np.ones(4, bool)}, "one row per sequence, 5; got 4"),
    ],
)
def test_credit_of_another_shape_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        credited(**changes)


def test_a_batch_is_a_pytree_without_credit_too():
    import jax

    batch, _, full = credited()
    assert len(jax.tree.leaves(batch)) == 8 and len(jax.tree.leaves(full)) == 12
    assert jax.tree.map(lambda x: x, full).longest == 12
    assert dataclasses.replace(full, proximal=full.behaviour).proximal is full.behaviour
