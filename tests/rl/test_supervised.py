"""Supervised training: which tokens count, the loss against NumPy, the order of examples, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import supervised
from rl.models.presets import make
from rl.models.transformer import TransformerConfig

MODEL = make(
    TransformerConfig(
        vocab=7, layers=1, width=16, hidden=16, heads=2, kv_heads=1, head_dim=8, max_length=16, scan_layers=False
    )
)
LOSS = jax.jit(functools.partial(supervised.loss, MODEL))
PROMPTS, SOLUTIONS = [[1, 2], [3], [1, 1, 1]], [[4, 5], [], [6]]


@functools.cache
def params(seed=0):
    return MODEL.init(jax.random.key(seed))


def test_examples_by_hand():
    ids, length, prompt_length = supervised.examples(PROMPTS, SOLUTIONS, end=0)
    assert ids.tolist() == [[1, 2, 4, 5, 0], [3, 0, 0, 0, 0], [1, 1, 1, 6, 0]] and ids.dtype == np.int32
    assert length.tolist() == [5, 2, 5] and prompt_length.tolist() == [2, 1, 3]
    for wrong in ([], [[1], []]):
        with pytest.raises(ValueError, match=f"a prompt of at least one token; {len(wrong)} examples"):
            supervised.examples(wrong, [[2]] * len(wrong), end=0)
    with pytest.raises(ValueError, match="shorter|longer"):
        supervised.examples([[1], [2]], [[2]], end=0)


@pytest.mark.slow
def test_loss_is_the_mean_over_the_tokens_after_the_prompts():
    batch = supervised.examples(PROMPTS, SOLUTIONS, end=0)
    logp = []
    for prompt, solution in zip(PROMPTS, SOLUTIONS, strict=True):
        sequence = [*prompt, *solution, 0]
        hidden, _ = MODEL.forward(params(), jnp.array(sequence))
        logits = np.asarray(MODEL.head(params(), hidden), np.float64)
        for place in range(len(prompt), len(sequence)):
            row = logits[place - 1]
            logp.append(row[sequence[place]] - row.max() - np.log(np.exp(row - row.max()).sum()))
    assert len(logp) == 3 + 1 + 2
    np.testing.assert_allclose(LOSS(params(), *batch), -np.mean(logp), rtol=1e-5)
    # What lies in the padding changes nothing.
    ids, length, prompt_length = batch
    filled = np.where(np.arange(ids.shape[1]) < length[:, None], ids, 6)
    assert LOSS(params(), filled, length, prompt_length) == LOSS(params(), *batch)


def test_one_step_lowers_the_loss():
    batch = supervised.examples(PROMPTS, SOLUTIONS, end=0)
    optimizer = optax.sgd(0.1)
    copy = jax.tree.map(jnp.array, params())
    after, _, before = supervised.step(MODEL, optimizer, copy, optimizer.init(copy), batch)
    np.testing.assert_allclose(before, LOSS(params(), *batch), rtol=1e-6)
    assert float(LOSS(after, *batch)) < float(before) - 1e-3


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (7, 3), (3, 8), (1, 1)])
def test_every_row_once_per_epoch(size, batch):
    batches = list(supervised._batches(size, batch, 3 * size, seed=5))
    assert [len(rows) for rows in batches] == [batch] * (3 * size)
    epochs = np.concatenate(batches).reshape(-1, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    again = list(supervised._batches(size, batch, 3 * size, seed=5))
    np.testing.assert_array_equal(batches, again)
    if size > 3:
        other = list(supervised._batches(size, batch, 3 * size, seed=6))
        assert not np.array_equal(batches, other)


def fitted(seed=0, steps=60):
    reports = []
    out = supervised.fit(
        MODEL, params(), supervised.examples(PROMPTS, SOLUTIONS, end=0), steps=steps, batch=2, learning_rate=0.03, seed=seed,
        report=lambda step, loss: reports.append((step, loss)),
    )  # fmt: skip
    return out, reports


def test_it_learns_the_examples_and_leaves_its_input_alone():
    before = jax.tree.map(np.array, params())
    out, reports = fitted()
    assert [step for step, _ in reports] == list(range(6, 61, 6))
    assert all(isinstance(loss, float) for _, loss in reports)
    final = float(LOSS(out, *supervised.examples(PROMPTS, SOLUTIONS, end=0)))
    assert final < 0.05 < reports[0][1]
    for old, kept in zip(jax.tree.leaves(before), jax.tree.leaves(params()), strict=True):
        np.testing.assert_array_equal(old, kept)


def test_the_result_is_a_function_of_the_seed():
    leaves = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]  # noqa: E731
    assert leaves(fitted(1, 5)[0]) == leaves(fitted(1, 5)[0]) != leaves(fitted(2, 5)[0])
