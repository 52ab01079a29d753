"""The operations of integer models: typed-in numbers, and the NumPy twin bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.integer import Perturbed, arithmetic
from tests.eggroll.integer import twin
from tests.eggroll.integer.models import assert_same


def int8(*values):
    return jnp.asarray(values, jnp.int8)


def some(rng, *shape):
    return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)


def test_products_of_typed_in_numbers():
    w, x = jnp.asarray([[10, -20, 30, 40], [-5, 6, -7, 8]], jnp.int8), int8(16, -8, 4, 9)[None]
    assert arithmetic.divisor(4) == 32
    np.testing.assert_array_equal(arithmetic.product(w, x), [[25, -3]])
    right, left = int8(3, -5, 7, 11), int8(9, -13)
    for sign, expected in ((1, [25, -3]), (-1, [24, -3])):
        np.testing.assert_array_equal(arithmetic.product(Perturbed(w, left, right, jnp.int32(sign), 8), x), [expected])


@pytest.mark.parametrize("inputs", [4, 7, 64, 200, 512, 1024])
@pytest.mark.parametrize("faithful", [False, True])
def test_products_are_those_of_the_twin_at_any_width(inputs, faithful):
    rng = np.random.default_rng(inputs)
    w, x, left, right = some(rng, 9, inputs), some(rng, 5, inputs), some(rng, 9), some(rng, inputs)
    divisor = twin.divisor(inputs, faithful)
    assert arithmetic.divisor(inputs, faithful) == divisor
    assert_same(arithmetic.product(w, x, faithful), twin.product(x, w, divisor))
    for sign in (1, -1):
        ours = arithmetic.product(Perturbed(w, left, right, jnp.int32(sign), 8), x, faithful)
        assert_same(ours, twin.perturbed_product(x, w, right, left, sign, 8, divisor))


def test_the_norm_of_typed_in_numbers():
    weight = int8(16, 16, 16, 16)
    np.testing.assert_array_equal(arithmetic.norm(int8(16, -32, 64, 0), weight), [9, -19, 36, 0])
    np.testing.assert_array_equal(arithmetic.norm(int8(1, 0, 0, 0), weight), [16, 0, 0, 0])  # a mean of 0 counts as 1
    np.testing.assert_array_equal(arithmetic.norm(int8(0, 0, 0, 0), weight), [0, 0, 0, 0])


def test_the_norm_divides_exactly_for_every_numerator_and_mean():
    """Rows of width 2: a number, and what brings the mean of magnitudes to each of 1 to 127."""
    values = np.arange(-127, 128)
    x = np.concatenate([[[v, 2 * m - abs(v)] for v in values if 0 <= 2 * m - abs(v) <= 127] for m in range(1, 128)])
    weight = np.stack([values, values], 1)
    x, weight = (a.reshape(-1, 2) for a in np.broadcast_arrays(x[:, None], weight))
    ours = jax.jit(jax.vmap(arithmetic.norm))(jnp.asarray(x, jnp.int8), jnp.asarray(weight, jnp.int8))
    mean = np.abs(x).sum(1, keepdims=True) // 2
    assert sorted(set(mean.ravel().tolist())) == list(range(1, 128))
    assert_same(ours, np.clip(x * weight // mean, -127, 127))


@pytest.mark.parametrize("width", [1, 3, 16, 100])
def test_norms_are_those_of_the_twin(width):
    rng = np.random.default_rng(width)
    x, weight = some(rng, 50, width), some(rng, width)
    x = x.at[:10].set(x[:10] // 64)
    assert_same(arithmetic.norm(x, weight), twin.norm(x, weight))


def test_the_gate_of_typed_in_numbers():
    gate, old = int8(-127, -64, 0, 64, 127), int8(100, 100, 100, -100, -100)
    np.testing.assert_array_equal(arithmetic.gated(gate, old), [0, 24, 49, -75, -100])
    np.testing.assert_array_equal(arithmetic.blend(gate, old, int8(-50, -50, -50, 50, 50)), [100, 63, 25, 11, 48])


def test_the_gate_never_leaves_the_format():
    """All gates, and the corners of old and new."""
    gate = jnp.arange(-127, 128, dtype=jnp.int8)
    for old in (-127, -1, 0, 1, 126, 127):
        for new in (-127, -126, 0, 50, 127):
            full = lambda v: jnp.full(gate.shape, v, jnp.int8)
            expected = old + twin.gated(gate, np.int64(new - old))
            assert_same(arithmetic.blend(gate, full(old), full(new)), expected)


def test_powers_and_logarithms_of_two():
    powers = np.asarray(jax.jit(arithmetic.exp2)(jnp.arange(256)))
    assert powers[:10].tolist() == [16, 16, 17, 18, 19, 19, 20, 21, 22, 23]
    assert (powers[128], powers[254], powers[255], powers.sum()) == (4096, 961548, 1004119, 23683421)
    np.testing.assert_array_equal(powers, twin.EXP2)
    bounds = [next(k for k in range(int(2 ** (j / 16)), 2**31) if k**16 >= 2**j) for j in range(64, 448)]
    near = sorted({k + d for k in bounds for d in (-1, 0, 1) if k + d >= 16} | {256 * 1004119, 2**31 - 1})
    expected = [twin.log2(k) for k in near]
    np.testing.assert_array_equal(jax.jit(arithmetic.log2)(jnp.asarray(near, jnp.int32)), expected)


def test_the_loss_of_typed_in_numbers():
    loss = lambda logits, target: int(arithmetic.log_likelihood(jnp.asarray(logits, jnp.int8), jnp.asarray(target)))
    assert loss([0] * 256, 17) == -128
    one = lambda value: [value] + [0] * 255
    assert (loss(one(127), 0), loss(one(127), 5), loss(one(64), 0), loss(one(64), 5)) == (-16, -143, -65, -129)


def test_losses_are_those_of_the_twin():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(
        np.clip(rng.standard_normal((60, 256)) * rng.choice([1, 20, 100], (60, 1)), -127, 127), jnp.int8
    )
    target = jnp.asarray(rng.integers(0, 256, 60), jnp.uint8)
    expected = [twin.log_likelihood(row, int(t)) for row, t in zip(np.asarray(logits), target, strict=True)]
    np.testing.assert_array_equal(arithmetic.log_likelihood(logits, target), expected)


def test_embeddings_and_vectors_of_members_are_those_of_the_twin():
    rng = np.random.default_rng(1)
    table, left, right = some(rng, 11, 6), some(rng, 11), some(rng, 6)
    tokens = jnp.asarray([0, 3, 10, 3])
    np.testing.assert_array_equal(arithmetic.row(table, tokens), np.asarray(table)[np.asarray(tokens)])
    for sign in (1, -1):
        ours = arithmetic.row(Perturbed(table, left, right, jnp.int32(sign), 7), tokens)
        assert_same(ours, [twin.perturbed_row(table, left, right, sign, 7, int(t)) for t in tokens])
        ours = arithmetic.vector(table[0], right, table[1], jnp.int32(sign), 7)
        assert_same(ours, twin.perturbed_vector(table[0], right, table[1], sign, 7))
