"""The noise generator: known answers, an independent Python twin, moments, and bits frozen for good."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import noise_bits
from kernels.noise_bits import reference

KURTOSIS_EXCESS = -(16 / 8 + 1 / 120) / (16 / 4 + 1 / 12) ** 2


def threefry_by_hand(key, counter):
    """Threefry-4x32-20 on Python integers, written from the paper's figure."""
    mask = 2**32 - 1
    rotations = [(10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20)]
    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]]
    x = [(c + k) & mask for c, k in zip(counter, keys, strict=False)]
    turn = lambda v, bits: ((v << bits) | (v >> (32 - bits))) & mask
    for r in range(20):
        x[0] = (x[0] + x[1]) & mask
        x[1] = turn(x[1], rotations[r % 8][0]) ^ x[0]
        x[2] = (x[2] + x[3]) & mask
        x[3] = turn(x[3], rotations[r % 8][1]) ^ x[2]
        x[1], x[3] = x[3], x[1]
        if r % 4 == 3:
            x = [(v + keys[(i + r // 4 + 1) % 5]) & mask for i, v in enumerate(x)]
            x[3] = (x[3] + r // 4 + 1) & mask
    return x


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, [0x9C6CA96A, 0xE17EAE66, 0xFC10ECD4, 0x5256A7D8]),
        (0xFFFFFFFF, [0x2A881696, 0x57012287, 0xF6C7446E, 0xA16A6732]),
    ],
)
def test_known_answers(word, expected):
    assert [int(x) for x in reference.threefry4x32([word] * 4, [word] * 4)] == expected
    assert threefry_by_hand([word] * 4, [word] * 4) == expected


def test_words_are_addressed_as_documented():
    key, stream, count = (7, 0xDEADBEEF, 3, 2**31), (5, 6, 0xFFFFFFFF), 1100
    drawn = np.asarray(noise_bits.words(key, stream, count))
    for e in (0, 1, 127, 128, 300, 511, 512, 700, 1099):
        block = (e // 512) * 128 + e % 128
        assert drawn[e] == threefry_by_hand(list(key), [block, *stream])[(e // 128) % 4], e
    assert len(set(drawn.tolist())) == count


def test_a_longer_draw_starts_with_the_shorter_and_batches_are_streams():
    key = (1, 2, 3, 4)
    ids = jnp.arange(6, dtype=jnp.uint32)
    long = noise_bits.words(key, (ids, 0, 1), 700)
    np.testing.assert_array_equal(noise_bits.words(key, (ids, 0, 1), 130), long[:, :130])
    np.testing.assert_array_equal(noise_bits.words(key, (4, 0, 1), 700), long[4])
    vmapped = jax.vmap(lambda i: noise_bits.words(key, (i, 0, 1), 700))(ids[::-1])
    np.testing.assert_array_equal(vmapped, long[::-1])
    np.testing.assert_array_equal(
        jax.jit(lambda k: noise_bits.words(k, (ids, 0, 1), 700))(jnp.array(key, "uint32")), long
    )


def test_the_two_lowerings_agree():
    """The conditional that a CPU needs changes no bit."""
    key, stream = (9, 8, 7, 6), (jnp.arange(3, dtype=jnp.uint32), 2, 3)
    plain = jax.jit(lambda: reference._words(key, stream, 600))()
    np.testing.assert_array_equal(jax.jit(lambda: noise_bits.words(key, stream, 600))(), plain)


def test_golden_numbers():
    """Frozen: a change here breaks every checkpoint's noise."""
    words = noise_bits.words((0, 1, 2, 3), (4, 5, 6), 4)
    assert [f"{int(w):08x}" for w in words] == GOLDEN_WORDS
    assert [float(z) for z in noise_bits.gaussian(words)] == GOLDEN_GAUSSIAN
    assert noise_bits.signs(words[:1], 8).tolist() == GOLDEN_SIGNS


GOLDEN_WORDS = ["4ab9945f", "ec8f80a9", "c67dadce", "23706960"]
GOLDEN_GAUSSIAN = [0.039381373673677444, 0.9910255074501038, 1.078292965888977, -1.033477544784546]
GOLDEN_SIGNS = [-1.0, -1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("word", "z"),
    [  # popcount of the high half - 8, plus the fill (2s + 1) / 2^26 with s = (low half : 9 high bits) - 2^24
        (0x00000000, (-8 + (-(2.0**25) + 1) / 2**26)),
        (0xFFFFFFFF, (8 + (2.0**25 - 1) / 2**26)),
        (0x00FF8000, (0 + 3 / 2**26)),  # bits 31..23 of the word are 000000001, below the 16 low bits
        (0x00FF7FFF, (0 + (2 * (1 - 512) + 1) / 2**26)),
    ],
)
def test_gaussian_by_hand(word, z):
    deviation = np.sqrt(4 + (1 - 2.0**-50) / 12 + (2.0**-16 - 2.0**-25) / 2)
    got = float(noise_bits.gaussian(jnp.array([word], jnp.uint32))[0])
    np.testing.assert_allclose(got, z / deviation, rtol=3e-7)


def test_complementing_the_word_negates_the_gaussian():
    words = noise_bits.words((1, 2, 3, 4), (0, 0, 0), 1000)
    np.testing.assert_array_equal(noise_bits.gaussian(~words), -noise_bits.gaussian(words))


def test_signs_are_bits_in_order():
    bits = np.array([[0b1011, 0x80000000]], np.uint32)
    signs = np.asarray(noise_bits.signs(jnp.asarray(bits), 64))[0]
    expected = [-1, -1, 1, -1] + [1] * 28 + [1] * 31 + [-1]
    assert signs.tolist() == expected


def test_moments():
    n = 1 << 21
    z = np.asarray(noise_bits.gaussian(noise_bits.words((3, 1, 4, 1), (5, 9, 2), n)), np.float64)
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt((KURTOSIS_EXCESS + 2) / n)
    assert abs((z**4).mean() - 3 - KURTOSIS_EXCESS) < 5 * np.sqrt(96 / n)
    assert np.abs(z).max() <= 8.5 / np.sqrt(4 + 1 / 12)
    s = np.asarray(noise_bits.signs(noise_bits.words((3, 1, 4, 1), (5, 9, 2), n // 32), n))
    assert set(np.unique(s)) == {-1.0, 1.0}
    assert abs(s.mean()) < 5 / np.sqrt(n)


def test_bf16_keeps_a_gaussian():
    """Drawn in f32 and cast: thousands of distinct values, where a direct bf16 draw has 128."""
    n = 1 << 22
    z = noise_bits.gaussian(noise_bits.words((1, 0, 0, 0), (0, 0, 0), n)).astype(jnp.bfloat16)
    values = np.asarray(z).view(np.uint16)
    assert len(np.unique(values)) >= 4000
    assert abs(np.asarray(z).astype(np.float64).mean()) < 0.003
    assert values.dtype.itemsize == np.dtype(ml_dtypes.bfloat16).itemsize


@pytest.mark.slow
def test_no_two_addresses_share_words_and_neighbours_are_uncorrelated():
    generations, leaves, members = np.meshgrid(np.arange(100), np.arange(100), np.arange(100), indexing="ij")
    key = (0, 1, leaves.ravel().astype(np.uint32), generations.ravel().astype(np.uint32))
    stream = (members.ravel().astype(np.uint32), 0, 0)
    pairs = np.asarray(jax.jit(lambda k, s: noise_bits.words(k, s, 2))(key, stream)).astype(np.uint64)
    assert len(np.unique((pairs[:, 0] << np.uint64(32)) | pairs[:, 1])) == 10**6
    n = 1 << 16
    base = ((0, 1, 2, 3), (4, 5, 6))
    z = lambda key, stream: np.asarray(noise_bits.gaussian(noise_bits.words(key, stream, n)), np.float64)
    centre = z(*base)
    for which in range(2):
        for i in range(len(base[which])):
            moved = [list(part) for part in base]
            moved[which][i] += 1
            assert abs(np.corrcoef(centre, z(*moved))[0, 1]) < 5 / np.sqrt(n), (which, i)


def test_one_hash_word_per_four_bytes():
    """Packed signs need 1/32 of a word each, and nothing larger is hashed."""
    jaxpr = str(jax.make_jaxpr(lambda: noise_bits.signs(noise_bits.words((0, 0, 0, 0), (0, 0, 0), 32), 1024))())
    assert "u32[1024]" not in jaxpr


@pytest.mark.parametrize(
    ("key", "stream", "count", "message"),
    [
        ((0,) * 3, (0,) * 3, 4, "4 key words"),
        ((0,) * 4, (0,) * 3, 0, "count must be"),
        ((0,) * 4, (0,) * 3, 2**32, "count"),
    ],
)
def test_bad_addresses(key, stream, count, message):
    with pytest.raises(ValueError, match=message):
        noise_bits.words(key, stream, count)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    draw = lambda key: noise_bits.gaussian(noise_bits.words([key[i] for i in range(4)], (0, 1, 2), 4096))
    exported = jax.export.export(jax.jit(draw), platforms=[platform])(jax.ShapeDtypeStruct((4,), jnp.uint32))
    assert exported.platforms == (platform,)
    assert "stablehlo.popcnt" in exported.mlir_module()
