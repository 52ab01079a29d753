"""int8 noise: frozen bits, exact moments, addresses, and the released noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.integer import noise
from eggroll.noise import LEFT, RIGHT
from kernels import noise_bits
from tests.eggroll.integer import twin

PARAMS = {"a": jnp.zeros((5, 7), jnp.int8), "b": jnp.zeros(7, jnp.int8), "c": jnp.zeros((70, 5), jnp.int8)}
PLAN = noise.plan(PARAMS)

FROZEN = {
    "lefts": [
        [[-18, -6, -29, 25, 7], [-10, 3, -35, 1, -6]],
        [[17, -8, -19, -14, -16, -6, 4], [2, -1, 3, -2, -7, -23, -11]],
    ],
    "rights": [[10, 6, 29, -2, -13], [-6, -27, -20, 28, -10]],
}
FROZEN_SIGNS = [[-16, 16, -16, -16, -16]]


def draw(ids, side, generation=3, kind="gaussian", seed=0):
    ids = jnp.asarray(ids, jnp.uint32)
    return jitted(PLAN, jax.random.key(seed), jnp.int32(generation), ids, side, kind)


jitted = jax.jit(noise.draw, static_argnums=(0, 4, 5))


def test_numbers_are_those_of_the_twin_and_their_moments_exact():
    words = np.random.default_rng(0).integers(0, 2**32, 50000).astype(np.uint32)
    words[:4] = 0, 2**32 - 1, 0xFFFF, 0xFFFF0000
    ours = np.asarray(noise_bits.gaussian_int8(jnp.asarray(words)))
    assert ours.dtype == np.int8
    np.testing.assert_array_equal(ours, twin.gaussian_int8(words))
    np.testing.assert_array_equal(noise_bits.gaussian_int8(jnp.asarray(~words)), -ours)
    mean, second = twin.gaussian_moments()
    assert mean == 0 and noise.second_moment("gaussian") == float(second) == pytest.approx(255.8298, abs=1e-4)
    assert np.abs(ours).max() == noise.largest("gaussian")


def test_signs_are_those_of_the_floating_point_ones():
    words = jnp.asarray(np.random.default_rng(1).integers(0, 2**32, (3, 2)), jnp.uint32)
    ours = noise_bits.signs_int8(words, 50)
    assert ours.dtype == jnp.int8
    np.testing.assert_array_equal(ours, 16 * np.asarray(noise_bits.signs(words, 50)))
    assert noise.second_moment("rademacher") == 256 and noise.largest("rademacher") == 16


def test_bits_are_frozen():
    """Checkpoints are resumed and generations replayed with these numbers: they must never change."""
    lefts, rights = draw([0, 9], LEFT), draw([0, 9], RIGHT)
    assert [x.shape for x in lefts] == [(2, 5), (2, 7), (2, 70)] and [x.shape for x in rights] == [
        (2, 7),
        (2, 7),
        (2, 5),
    ]
    frozen = {"lefts": [np.asarray(x).tolist() for x in lefts[:2]], "rights": np.asarray(rights[2]).tolist()}
    assert frozen == FROZEN
    assert np.asarray(draw([1], LEFT, kind="rademacher")[0]).tolist() == FROZEN_SIGNS


def test_a_factor_depends_on_its_address_alone():
    together, alone = draw([4, 5, 6], LEFT), draw([[5]], LEFT)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[1], b[0, 0])
    for other in (draw([5], LEFT, generation=4), draw([5], LEFT, seed=1), draw([7], LEFT)):
        assert all((np.asarray(a[1]) != np.asarray(b[0])).any() for a, b in zip(together, other, strict=True))
    left, right = draw([5], LEFT)[1], draw([5], RIGHT)[1]
    assert (np.asarray(left) != np.asarray(right)).any()


def test_the_released_noise_is_its_table_of_normals():
    """Its slices against the table itself, of 2^30 numbers of which only the start is made."""
    key, length = jax.random.key(4), 1 << 16
    table = np.asarray((16 * jax.random.normal(key, (length,))).astype(jnp.int8))
    pairs = np.arange(1 << 14, dtype=np.uint32)
    ids = jnp.asarray(pairs)
    names = jax.random.split(jax.random.fold_in(key, 1), len(PLAN))
    lefts, rights = (noise.released(PLAN, key, jnp.int32(2), ids, side) for side in (LEFT, RIGHT))
    found = 0
    for i, leaf in enumerate(PLAN):
        word = int(jax.random.key_data(jax.random.fold_in(names[i], 2))[0])
        start = np.array([(word ^ twin.hash_start(int(t))) % 2**30 for t in pairs])
        size = sum(leaf.shape) if len(leaf.shape) == 2 else 2 * leaf.shape[0]
        for p in np.flatnonzero(start < length - size):
            piece = table[start[p] : start[p] + size]
            b = leaf.shape[-1]
            left, right = (piece[b:], piece[:b]) if len(leaf.shape) == 2 else (piece[::2], piece[1::2])
            np.testing.assert_array_equal(lefts[i][p], left)
            np.testing.assert_array_equal(rights[i][p], right)
            found += 1
    assert found  # of 2^14 pairs and 3 leaves about 3 start there


def test_every_number_of_the_released_noise():
    """The bounds against int8(16 normal) of many numbers; P(0) and E[x^2] as measured of the released code."""
    key = jax.random.key(0)
    bits = jax.random.bits(key, (1 << 20,))
    ours = noise.table_number(bits)
    numbers = np.asarray((16 * jax.random.normal(key, (1 << 20,))).astype(jnp.int8))
    np.testing.assert_array_equal(ours, numbers)
    assert (numbers == 0).mean() == pytest.approx(0.0498, abs=1e-3)
    assert (numbers.astype(float) ** 2).mean() == pytest.approx(243.6, abs=1.5)


def test_hashes_of_pairs():
    typed = [0, 73244475, 146488950, 219733425, 292977900, 366222375]
    assert np.asarray(noise.hashed(jnp.arange(6))).tolist() == typed


@pytest.mark.parametrize(
    ("leaf", "error", "words"),
    [
        (jnp.zeros((2, 2)), TypeError, "'w' is float32"),
        (jnp.zeros((2, 2, 2), jnp.int8), ValueError, r"'w' has shape \(2, 2, 2\)"),
        (jnp.zeros((), jnp.int8), ValueError, r"'w' has shape \(\)"),
        (jnp.zeros((0, 3), jnp.int8), ValueError, r"'w' has shape \(0, 3\)"),
    ],
)
def test_leaves_that_are_no_integer_parameters(leaf, error, words):
    with pytest.raises(error, match=words):
        noise.plan({"w": leaf})
