"""Attention of one token: values by hand, a NumPy twin in f64, every length, and entries that are never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.decode_attention import attend, reference

ROOM = 11
jitted = jax.jit(attend)


def numpy_twin(q, k, v, length):
    """One head and one entry at a time, in f64; q [H, D], k and v [G, D, T]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for head in range(len(q)):
        group = head // (len(q) // len(k))
        if length:
            z = np.array([q[head] @ k[group, :, t] for t in range(length)]) / np.sqrt(q.shape[1])
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            out[head] = sum(p[t] * v[group, :, t] for t in range(length))
    return out


def operands(heads, groups, size, dtype="float32", room=ROOM):
    keys = jax.random.split(jax.random.key(heads * size), 3)
    shapes = ((heads, size), (groups, size, room), (groups, size, room))
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    return 2 * q, k, v


def test_values_by_hand():
    # D = 4, so scores are q k / 2 = (0, ln 3): weights 1/4 and 3/4 of the values (4, 8) -> 7; the third entry is not read
    q = jnp.array([[2 * np.log(3.0), 0, 0, 0], [0, 0, 0, 0]], jnp.float32)
    k = jnp.array([[[0.0, 1, 9], [5, 5, 5], [1, 2, 3], [0, 0, 0]]])
    v = jnp.array([[[4.0, 8, 99], [0, 0, 0], [1, 1, 1], [-4, 4, 0]]])
    np.testing.assert_allclose(attend(q, k, v, 2), [[7, 0, 1, 2], [6, 0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, 1), [[4, 0, 1, -4]] * 2, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "groups", "size"),
    [
        (1, 1, 1),
        (4, 2, 6),
        (4, 4, reference._UNROLLED),
        (6, 2, reference._UNROLLED + 1),
        (8, 1, 2 * reference._UNROLLED),
    ],
)
def test_every_length_equals_the_twin_and_nothing_beyond_is_read(heads, groups, size):
    q, k, v = operands(heads, groups, size)
    for length in (0, 1, 2, ROOM - 1, ROOM):
        expected = numpy_twin(q, k, v, length)
        beyond = np.arange(ROOM) >= length
        for poison in (np.nan, np.inf, -np.inf):
            poisoned = (np.where(beyond, np.float32(poison), x) for x in (k, v))
            got = jitted(q, *poisoned, length)
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)
        assert length or (expected == 0).all()


def test_large_scores_do_not_overflow():
    q, k, v = operands(2, 1, 4)
    np.testing.assert_allclose(attend(1e4 * q, 1e4 * k, v, 7), numpy_twin(1e4 * q, 1e4 * k, v, 7), atol=1e-5)


@pytest.mark.parametrize("size", [8, 2 * reference._UNROLLED])
def test_bf16_has_scores_in_f32(size):
    q, k, v = operands(4, 2, size, "bfloat16", room=64)
    got = jitted(q, k, v, 60)
    assert got.dtype == jnp.bfloat16
    # the weights and the result are rounded to 8 bits; scores of about 8 rounded so would be wrong by 3 %
    error = np.abs(np.asarray(got, np.float64) - numpy_twin(q, k, v, 60)).max()
    assert error < 2**-7, error


def test_slots_of_different_lengths_under_vmap_do_not_touch_each_other():
    q, k, v = operands(4, 2, 6)
    lengths = np.array([0, 1, 5, ROOM])
    stack = lambda x: jnp.stack([x * (i + 1) for i in range(len(lengths))])
    batch = [stack(x) for x in (q, k, v)]
    got = jax.jit(jax.vmap(attend))(*batch, jnp.asarray(lengths))
    expected = [numpy_twin(*(x[i] for x in batch), n) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    hurt = [x.at[2].set(jnp.nan) for x in batch]
    kept = jax.jit(jax.vmap(attend))(*hurt, jnp.asarray(lengths))
    np.testing.assert_array_equal(np.delete(kept, 2, 0), np.delete(got, 2, 0))
