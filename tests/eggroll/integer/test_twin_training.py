"""The twin's loss, update and noise against typed-in integers, exact decimals and fractions."""

import decimal
import math
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from tests.eggroll.integer import twin

EXACT = decimal.Context(prec=60)


def same(actual, expected):
    np.testing.assert_array_equal(actual, expected)


def draws(rng, *shape):
    return rng.integers(-127, 128, shape)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_exp2():
    assert twin.EXP2[:10] == (16, 16, 17, 18, 19, 19, 20, 21, 22, 23)
    assert (twin.EXP2[128], twin.EXP2[254], twin.EXP2[255], sum(twin.EXP2)) == (4096, 961_548, 1_004_119, 23_683_421)
    for i, value in enumerate(twin.EXP2):
        assert value == int(EXACT.power(2, EXACT.divide(Decimal(i), 16)) * 16)
        assert value**16 <= 2 ** (64 + i) < (value + 1) ** 16
    assert 256 * twin.EXP2[255] == 257_054_464 < 2**28


def test_log2_at_every_threshold():
    """Outputs change at 16 * 2^(v/16) only, v of -64 to 383: each with its neighbours."""
    sizes = {
        floor_ + near for v in range(-64, 384) for floor_ in [int(16 * 2 ** (v / 16))] for near in (-2, -1, 0, 1, 2)
    }
    sizes = {k for k in sizes if 1 <= k < 2**28} | {2**28 - 1}
    log_2 = EXACT.ln(Decimal(2))
    for k in sizes:
        if k & (k - 1) == 0:
            assert twin.log2(k) == 16 * (k.bit_length() - 1 - 4)
            continue
        exact = EXACT.divide(EXACT.ln(EXACT.divide(Decimal(k), 16)), log_2) * 16
        assert abs(exact - exact.to_integral_value()) > Decimal("1e-30")  # so 60 digits decide the truncation
        assert twin.log2(k) == int(exact)
        assert twin.log2(k) == int(16 * math.log2(k / 16))  # doubles are good enough to build a table
    assert (twin.log2(1), twin.log2(15), twin.log2(16), twin.log2(17)) == (-64, -1, 0, 1)
    assert (twin.log2(256 * 16), twin.log2(256 * twin.EXP2[255])) == (128, 382)  # all that 256 logits can reach


def test_log_likelihood():
    flat_logits, peak, half = np.zeros(256, np.int8), np.zeros(256, np.int8), np.zeros(256, np.int8)
    peak[7], half[7] = 127, 64
    assert {twin.log_likelihood(flat_logits, target) for target in range(256)} == {-128}
    assert (twin.log_likelihood(peak, 7), twin.log_likelihood(peak, 8)) == (-16, -143)
    assert (twin.log_likelihood(half, 7), twin.log_likelihood(half, 8)) == (-65, -129)


def test_equal_logits_cost_8_bits_only_at_multiples_of_16():
    """Truncated tables: elsewhere the 256 equal probabilities sum to more than 1."""
    costs = {level: twin.log_likelihood(np.full(256, level), 0) for level in range(-127, 128)}
    assert {level for level, cost in costs.items() if cost == -128} == set(range(-112, 113, 16))
    assert {level for level, cost in costs.items() if cost == -126} == {-123}  # EXP2[5] = 19 for 19.87
    assert set(costs.values()) == {-126, -127, -128}


# ---- fitness and update ---------------------------------------------------------------------------------------------


def test_fitness_and_directions():
    same(twin.fitness(np.array([[-5, -9], [-9, -5], [-7, -7]], np.int32)), [1, -1, 0])
    lefts, rights = [[1, 2], [3, -4]], [[5, 0, -1], [2, 2, 2]]
    same(twin.direction([1, -1], lefts, rights), [[5 - 6, -6, -1 - 6], [10 + 8, 8, -2 + 8]])
    rng = np.random.default_rng(4)
    scores, a, b = rng.integers(-1, 2, (5, 6)), draws(rng, 5, 3).astype(np.int8), draws(rng, 6, 4).astype(np.int8)
    same(twin.direction_crossed(scores, a, b), a.astype(int).T @ scores @ b.astype(int))
    same(twin.direction_crossed(np.diag(scores[0, :5]), a, b[:5]), twin.direction(scores[0, :5], a, b[:5]))
    same(twin.direction_vector(scores[0, :5], b[:5], b[:5]), scores[0, :5] @ b[:5].astype(int) ** 2)
    same(twin.direction_vector_crossed(scores, b[:5], b), ((scores @ b.astype(int)) * b[:5]).sum(0))


def test_updates():
    w, z = np.array([0, 0, 0, 0, 0, 127, -127], np.int8), np.array([99, 100, -100, -99, 0, 500, -500])
    same(twin.update(w, z, 100), [0, 1, -1, 0, 0, 127, -127])
    same(twin.update(w, z, 0), [1, 1, -1, -1, 0, 127, -127])
    same(twin.update_released(w, z, 1, 0), [1, 1, -1, -1, -1, 127, -127])  # z = 0 moves down
    z = np.array([1439, 1440, -1440, -1439])  # 18 * int(sqrt(26)) * 256 / 16 = 1440
    same(twin.update_released([0] * 4, z, 26, 18), [0, 1, -1, 0])
    same(twin.update([0] * 4, z, 18 * math.isqrt(26) * 16), [0, 1, -1, 0])


def test_thresholds_and_their_schedule():
    assert [twin.released_threshold(alpha) for alpha in (0.0625, 0.125, 0.25, 0.5, 1)] == [29, 24, 18, 10, 0]
    steps = (0, 1, 10, 50, 100, 200, 300, 500, 700, 999)
    assert [twin.released_threshold(twin.alpha_at(4, t)) for t in steps] == [0, 0, 2, 9, 13, 18, 21, 25, 27, 29]
    assert (twin.alpha_at(0.25, 700), twin.alpha_at(4, 1000), twin.alpha_at(3, 5, 10)) == (0.25, 1 / 16, 1 / 4.5)


def test_momentum():
    same(twin.momentum([100, -100, 7, -7, 0], [0] * 5, 0, 3), [87, -87, 6, -6, 0])
    same(twin.momentum([0] * 6, [5, 6, 7, -5, -6, -7], 2, 3), [1, 2, 2, -1, -1, -2])  # 1.25 1.5 1.75; halves go up
    same(twin.momentum([32767, -32767], [40000, -40000], 0, 15), [32767, -32767])


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_gaussian_int8():
    middle = (0b1111_1111 << 16) + 32768  # count 0, v = 1
    words = np.array([0, 2**32 - 1, middle, middle - 1, 0xFFFF, 0xFFFF0000], np.uint32)
    same(twin.gaussian_int8(words), [-67, 67, 0, 0, -59, 59])
    words = np.random.default_rng(5).integers(0, 2**32, 20_000, np.uint32)
    values = twin.gaussian_int8(words)
    for word, value in zip(words[:3000].tolist(), values[:3000].tolist(), strict=True):
        count = (word >> 16).bit_count() - 8 + Fraction((word & 0xFFFF) - 32768, 65536) + Fraction(1, 131072)
        assert abs(count * Fraction(131072 * 1013, 2**24) - value) < Fraction(1, 2)  # nearest; a tie cannot occur
    same(twin.gaussian_int8(~words), -values)
    assert abs(np.mean(values**2) - 255.83) < 5 * 350 / math.sqrt(len(values))


def test_gaussian_moments():
    mean, second = twin.gaussian_moments()
    assert (mean, second) == (0, Fraction(68_673_777_299, 2**28))
    # again without drawing a word: for each count of ones v is 2u + 1, u in a range of 2^16, and the value is at most k
    # exactly when 1013 v < 2^24 (k + 1/2)
    moments = [0, 0]
    for ones in range(17):
        low = (ones - 8) * 65536 - 32768
        below = [math.ceil((Fraction(2**24 * (2 * k + 1), 2 * 1013) - 1) / 2) for k in range(-69, 69)]
        up_to = [min(max(u, low), low + 65536) for u in below]
        for k, (less, here) in enumerate(zip(up_to[:-1], up_to[1:], strict=True), start=-68):
            moments = [m + math.comb(16, ones) * (here - less) * k**n for n, m in enumerate(moments, start=1)]
    assert (mean, second) == tuple(Fraction(m, 2**32) for m in moments)


def test_hash_start():
    expected = [0, 73_244_475, 146_488_950, 219_733_425, 292_977_900, 366_222_375]
    assert [twin.hash_start(tid) for tid in range(6)] == expected
    assert twin.hash_start(65536) == 65537 * 73_244_475 % 2**32
    assert twin.hash_start(1 << 20) == ((1 << 20) + 16) * 73_244_475 % 2**32


def share_that_moves(thr, second):
    """Chance that |Z| * 16 >= thr sqrt(P) 256 when Z has variance P second^2 and nothing is learned."""
    return 2 * NormalDist().cdf(-thr / 16 * 256 / second)


@pytest.mark.parametrize("noise", ["int8", "released"])
def test_share_that_moves_by_chance(noise):
    rng = np.random.default_rng(6)
    if noise == "int8":
        draw = lambda *shape: twin.gaussian_int8(rng.integers(0, 2**32, shape, np.uint32))
        second, expected = float(twin.gaussian_moments()[1]), (0.0699, 0.1336, 0.2606, 0.5320)
    else:
        draw = lambda *shape: (16 * rng.standard_normal(shape)).astype(np.int8)
        second, expected = 243.563, (0.0564, 0.1143, 0.2363, 0.5106)
    z = twin.direction(rng.choice([-1, 1], 1024), draw(1024, 128), draw(1024, 128))
    for thr, share in zip((29, 24, 18, 10), expected, strict=True):
        assert share_that_moves(thr, second) == pytest.approx(share, abs=1e-3)
        moved = np.mean(twin.update_released(np.zeros_like(z), z, 1024, thr) != 0)
        assert abs(moved - share) < 4 * math.sqrt(share * (1 - share) / z.size)


def test_truncation_shrinks_the_released_noise():
    """int8(16 n) towards zero, n standard normal: E[x^2] = 243.56 and P(0) = 4.98 %; rounded it would be 256.08."""
    cdf = NormalDist().cdf
    moment = lambda low, high: sum(2 * k * k * (cdf((k + high) / 16) - cdf((k - low) / 16)) for k in range(1, 128))
    assert moment(0, 1) == pytest.approx(243.563, abs=1e-3)
    assert moment(0.5, 0.5) == pytest.approx(256 + 1 / 12, abs=1e-3)
    assert 2 * cdf(1 / 16) - 1 == pytest.approx(0.0498, abs=1e-4)
