"""Evaluation and update of the integer strategy against the NumPy twin, and bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll import integer
from eggroll.integer import arithmetic, fitness, noise, threshold
from eggroll.noise import LEFT, RIGHT
from eggroll.population import Population
from rl.models import egg
from tests.eggroll.integer import twin
from tests.eggroll.integer.models import (
    assert_same,
    for_twin,
    numbers,
    random_params,
    random_text,
    small_params,
    small_score,
)

CONFIG = egg.EggConfig(layers=1, width=8, expansion=2)
DESIGNS = {
    "pairs": eggroll.antithetic(12),
    "crossed": eggroll.crossed(24, rows=3, signs=2),
    "blocks": eggroll.crossed(32, blocks=2, rows=2, signs=2),
}
SETTINGS = {"gaussian": {}, "rademacher": {"noise": "rademacher"}, "faithful": {"faithful": True}}


def score(weights, carry, rows):
    return egg.log_likelihood(CONFIG, weights, carry, rows["inputs"], rows["targets"])


def text(size, tokens=5):
    bytes_ = random_text(size, size, tokens + 1)
    return {"inputs": bytes_[:, :-1], "targets": bytes_[:, 1:]}


def make(population, **settings):
    return integer.strategy(population=population, **{"alpha": 0.3, **settings})


def row_of(population, member, size):
    """The first row that a member sees, from its coordinates: along columns in turn, each row of the grid begun one later, or
    where the one before left off if that is not where it began."""
    pair, groups = member // 2, min(size, population.directions)
    block, row, column = np.unravel_index(pair, population.shape[:3])
    turn = row if population.columns % groups == 0 else row * population.columns
    return int((block * groups // population.blocks + turn + column) % groups) * max(1, size // population.directions)


@pytest.mark.slow
@pytest.mark.parametrize(("design", "size"), [("pairs", 12), ("blocks", 2)])
def test_members_score_and_remember_as_the_twin_does(design, size):
    es, batch = make(DESIGNS[design]), text(size)
    state = es.init(random_params(CONFIG, 1), jax.random.key(5))
    carry = numbers(2, es.population.size, es.rows(size), CONFIG.layers, CONFIG.width)
    scores, after = jax.jit(lambda s, c, b: es.evaluate(s, score, c, b))(state, carry, batch)
    assert scores.dtype == jnp.int32 and scores.shape == (es.population.size,)
    one = jax.jit(es.member_params)
    for member in (0, 1, 5, es.population.size - 1):
        weights = for_twin(one(state, member))
        first = row_of(es.population, member, size)
        total = 0
        for i in range(es.rows(size)):
            inputs, targets = (np.asarray(batch[name][first + i]) for name in ("inputs", "targets"))
            value, remembered = twin.sequence(weights, np.asarray(carry[member, i]), inputs, targets, faithful=False)
            total += value
            assert_same(after[member, i], remembered)
        assert total == int(scores[member])


def test_rows_are_shared_equally_and_by_both_of_a_pair():
    """Every number of rows that divides the pairs, in grids of all kinds."""
    for grid in ((6, 1, 1), (1, 3, 4), (2, 2, 4), (1, 4, 8), (5, 3, 2), (6, 2, 3)):
        es = make(Population(*grid, signs=2))
        for size in (n for n in range(1, es.population.directions + 1) if es.population.directions % n == 0):
            first = es._first_rows(size)
            assert first.tolist() == [row_of(es.population, n, size) for n in range(es.population.size)]
            assert np.bincount(first).tolist() == [es.population.size // size] * size
            np.testing.assert_array_equal(first[::2], first[1::2])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_member_is_the_base_and_its_own_noise(setting):
    es = make(DESIGNS["pairs"], **SETTINGS[setting])
    state = es.init(small_params(3), jax.random.key(2))
    plan, ids = noise.plan(state.params), jnp.asarray([3], jnp.uint32)
    sides = lambda s: [noise.draw(plan, s.key, s.generation, ids, side, es.noise) for side in (LEFT, RIGHT)]
    (lefts, rights), one = jax.jit(sides)(state), jax.jit(es.member_params)
    plus, minus = one(state, 6), one(state, 7)
    used = lambda tree: jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, integer.Perturbed))
    for leaf, base, a, b, p, m in zip(
        plan, jax.tree.leaves(state.params), lefts, rights, used(plus), used(minus), strict=True
    ):
        for sign, weight in ((1, p), (-1, m)):
            if len(leaf.shape) == 1:
                assert_same(weight, twin.perturbed_vector(base, a[0], b[0], sign, 8))
            else:
                assert (int(weight.sign), weight.shift) == (sign, 8)
                np.testing.assert_array_equal(weight.left, a[0])
                np.testing.assert_array_equal(weight.right, b[0])


@functools.cache
def factors(es):
    """(key, generation) -> the factors of rows and of columns, of every leaf."""
    ids = {LEFT: es.population.row_ids().reshape(-1), RIGHT: es.population.column_ids().reshape(-1)}
    plan = noise.plan(small_params(0))
    return jax.jit(lambda *at: [noise.draw(plan, *at, ids[side], side, es.noise) for side in (LEFT, RIGHT)])


def directions(es, state, trits):
    """Z of every leaf by the twin, in flattening order."""
    blocks, rows, columns, _ = es.population.shape
    lefts, rights = factors(es)(state.key, state.generation)
    grid = np.asarray(trits).reshape(blocks, rows, columns)
    out = []
    for leaf, a, b in zip(jax.tree.leaves(state.params), lefts, rights, strict=True):
        each = twin.direction_crossed if leaf.ndim == 2 else twin.direction_vector_crossed
        a, b = (np.asarray(x).reshape(blocks, -1, x.shape[-1]) for x in (a, b))
        out.append(sum(each(grid[g], a[g], b[g]) for g in range(blocks)))
    return out


@pytest.mark.parametrize(
    ("design", "setting"),
    [("pairs", "gaussian"), ("crossed", "rademacher"), ("blocks", "gaussian"), ("pairs", "faithful")],
)
def test_updates_are_those_of_the_twin(design, setting):
    es = make(DESIGNS[design], **SETTINGS[setting])
    state = es.init(small_params(4), jax.random.key(1))
    scores = jnp.asarray(np.random.default_rng(0).integers(-9, 9, es.population.size), jnp.int32)
    after, metrics = jax.jit(es.update)(state, scores)
    trits = twin.fitness(np.asarray(scores).reshape(-1, 2))
    moved = 0
    for new, old, z in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(state.params), directions(es, state, trits), strict=True
    ):
        if setting == "faithful":
            expected = twin.update_released(old, z, es.population.directions, twin.released_threshold(0.3))
        else:
            expected = twin.update(old, z, es.limits[0])
        assert_same(new, expected)
        moved += int((np.asarray(old) != expected).sum())
    assert (int(metrics["moved"]), int(metrics["ties"])) == (moved, int((trits == 0).sum()))
    assert int(metrics["score_mean"]) == int(np.asarray(scores).sum()) // es.population.size
    assert int(after.generation) == 1


def test_momentum_is_that_of_the_twin():
    es = make(DESIGNS["pairs"], momentum=2)
    state, update = es.init(small_params(4), jax.random.key(1)), jax.jit(es.update)
    shift = threshold.momentum_shift(6, noise.second_moment("gaussian"))
    assert shift == 1  # sqrt(6) 255.8 = 627, which 2^1 brings to 2^8 .. 2^9
    expected = [np.zeros(x.shape, np.int64) for x in jax.tree.leaves(state.params)]
    for generation in range(3):
        scores = jnp.asarray(np.random.default_rng(generation).integers(-9, 9, 12), jnp.int32)
        sums = directions(es, state, twin.fitness(np.asarray(scores).reshape(-1, 2)))
        before, (state, metrics) = state, update(state, scores)
        expected = [twin.momentum(m, z, shift, 2) for m, z in zip(expected, sums, strict=True)]
        assert int(metrics["limit"]) == es.limits[generation]
        for m, want, new, old in zip(
            jax.tree.leaves(state.momentum),
            expected,
            jax.tree.leaves(state.params),
            jax.tree.leaves(before.params),
            strict=True,
        ):
            assert m.dtype == jnp.int16
            np.testing.assert_array_equal(m, want)
            assert_same(new, twin.update(old, want, es.limits[generation]))


@pytest.mark.slow
@pytest.mark.parametrize(("design", "chunk"), [("pairs", 10), ("blocks", 10)])
def test_chunks_change_nothing(design, chunk):
    population = DESIGNS[design]
    carry, batch = numbers(1, population.size, 1, 8), numbers(2, 2, 8)
    scores = jnp.asarray(np.random.default_rng(3).integers(-9, 9, population.size), jnp.int32)

    def generation(es):
        state = es.init(small_params(4), jax.random.key(1))
        return jax.jit(lambda s: (es.evaluate(s, small_score, carry, batch), es.update(s, scores)[0].params))(state)

    whole, parts = generation(make(population)), generation(make(population, chunk=chunk))
    assert len(np.unique(whole[0][0])) > population.size // 2
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_numbers_stay_in_the_format_at_its_ends():
    """Parameters at the ends that all move outwards: none becomes -128."""
    es = make(DESIGNS["pairs"], alpha=1.0)
    params = jax.tree.map(
        lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 2, 127, -127).astype(jnp.int8),
        small_params(0),
    )
    state = es.init(params, jax.random.key(0))
    update = jax.jit(es.update)
    for seed in range(4):
        scores = jnp.asarray(np.random.default_rng(seed).integers(-9, 9, 12), jnp.int32)
        state, metrics = update(state, scores)
    assert all(int(x.min()) >= -127 and int(x.max()) <= 127 for x in jax.tree.leaves(state.params))
    assert int(metrics["moved"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["gaussian", "rademacher", "momentum", "crossed", "faithful"])
def test_without_a_signal_the_share_that_moves_is_alpha(setting):
    """Random fitness, a matrix and a vector, 24 generations of each alpha: their mean within 4 of its own standard errors, and
    1 % of alpha.

    With the released noise the shares are those of 256 in place of its variance and of rounded thresholds. Sums of signs are
    multiples of 256, so of them the share that reaches a limit is a binomial's. A momentum's generations depend on each other.
    """
    settings = {"rademacher": {"noise": "rademacher"}, "momentum": {"momentum": 2}, "faithful": {"faithful": True}}
    population = eggroll.crossed(2048, signs=2) if setting == "crossed" else eggroll.antithetic(2048)
    # of 243.56 in place of 256, and of thresholds 29, 24, 18 and 10 sixteenths
    released = {0.0625: 0.0568, 0.125: 0.1149, 0.25: 0.2370, 0.5: 0.5112}
    es = make(population, alpha=np.repeat([*released], 24), **settings.get(setting, {}))
    state, moved = es.init({"v": jnp.zeros(64, jnp.int8), "w": jnp.zeros((128, 64), jnp.int8)}, jax.random.key(3)), []
    update = jax.jit(es.update)
    for seed in range(96):
        signs = np.random.default_rng(seed).choice([-1, 1], es.population.directions)
        scores = jnp.asarray(np.stack([signs, -signs], 1).reshape(-1), jnp.int32)
        before, (state, _) = state, update(state, scores)
        changed = jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).mean(), before.params, state.params)
        moved.append([changed["w"], changed["v"]])
    for first, alpha in zip(range(0, 96, 24), released, strict=True):
        expected = released[alpha] if setting == "faithful" else alpha
        if setting == "rademacher":
            ways = [math.comb(1024, k) for k in range(1025) if abs(2 * k - 1024) * 256 >= es.limits[first]]
            expected = sum(ways) / 2**1024
        shares = moved[first : first + 24]
        errors = np.std(shares, axis=0, ddof=1) / np.sqrt(24) * (2 if setting == "momentum" else 1)
        for share, error in zip(np.mean(shares, axis=0), errors, strict=True):
            assert abs(share - expected) < 4 * error + 0.01 * expected


@pytest.mark.parametrize("shift", [3, 5])
def test_the_noise_is_as_small_as_sigma_shift_says(shift):
    es = make(DESIGNS["pairs"], sigma_shift=shift)
    state, x = es.init(small_params(1), jax.random.key(5)), numbers(3, 1, 8)
    score = lambda weights, carry, x: (arithmetic.product(weights["head"], x).astype(jnp.int32).sum(), carry)
    scores, _ = jax.jit(lambda s: es.evaluate(s, score, es.carry(jnp.zeros(1)), x))(state)
    one = jax.jit(es.member_params)
    for member in (0, 3):
        weight = one(state, member)["head"]
        assert weight.shift == 4 + shift
        noisy = twin.perturbed_product(
            x[0], weight.base, weight.right, weight.left, int(weight.sign), weight.shift, twin.divisor(8, False)
        )
        assert int(scores[member]) == noisy.sum()


def test_thresholds_of_typed_in_levels():
    alphas = (0.0625, 0.125, 0.25, 0.5)
    thr = [29, 24, 18, 10]
    assert threshold.released_limits(alphas, 16).tolist() == [16 * 4 * t for t in thr]
    steps = threshold.schedule(4.0, 1000, 1000)
    typed = {0: 0, 1: 0, 10: 2, 50: 9, 100: 13, 200: 18, 300: 21, 500: 25, 700: 27, 999: 29}
    assert {t: int(threshold.released_limits([steps[t]], 1)[0]) // 16 for t in typed} == typed
    assert threshold.schedule(0.25, 1000, 5) == (0.25,) and len(steps) == 1000
    assert steps[0] == 1 and threshold.schedule(4.0, 10, 11)[10] == pytest.approx(2**-4)
    # 0.3174 is just above the share beyond one standard deviation, sqrt(100) 256
    assert threshold.limits([0.3174], 100, 256.0).tolist() == [2560]
    assert threshold.limits([1.0], 100, 256.0).tolist() == [0]
    # two standard deviations, of heavier tails: q + (8 - 6) 0.6 / 24
    assert threshold.limits([0.0455003], 100, 256.0, excess=0.6).tolist() == [math.ceil(2560 * 2.05)]
    # 2560 is 2^8 .. 2^9 after 3 bits, and grows to sqrt(4/3)
    limits = threshold.limits([0.3174], 100, 256.0, momentum=1)
    assert (limits[0], limits[-1]) == (320, int(np.ceil(320 * np.sqrt(4 / 3))))


@pytest.mark.parametrize(("faithful", "moved"), [(False, 0), (True, -1)])
def test_sums_of_zero(faithful, moved):
    es = make(DESIGNS["pairs"], alpha=1.0, faithful=faithful)  # a limit of 0
    state = es.init(random_params(CONFIG, 1), jax.random.key(0))
    after, _ = jax.jit(es.update)(state, jnp.zeros(es.population.size, jnp.int32))  # ties, everywhere
    for old, new in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(new, np.clip(np.asarray(old, np.int32) + moved, -127, 127))


def test_the_last_limit_stays():
    es = make(DESIGNS["pairs"], alpha=[1.0, 0.5, 0.25])
    state = es.init({"w": jnp.zeros((4, 4), jnp.int8)}, jax.random.key(0))
    found, update = [], jax.jit(es.update)
    for _ in range(5):
        state, metrics = update(state, jnp.arange(12, dtype=jnp.int32))
        found.append(int(metrics["limit"]))
    assert found == [*es.limits, es.limits[-1], es.limits[-1]] and len(es.limits) == 3


def test_what_a_batch_says_nothing_of_does_not_move():
    es = make(DESIGNS["pairs"], alpha=1.0)
    state = es.init({"w": jnp.zeros((6, 4), jnp.int8)}, jax.random.key(0))
    used = {"w": jnp.arange(6)[:, None] < 2}
    after, metrics = es.update(state, jnp.arange(12, dtype=jnp.int32) * jnp.asarray([1, 3] * 6), used)
    free, _ = es.update(state, jnp.arange(12, dtype=jnp.int32) * jnp.asarray([1, 3] * 6))
    np.testing.assert_array_equal(after.params["w"][:2], free.params["w"][:2])
    assert not after.params["w"][2:].any() and free.params["w"][2:].any()
    assert int(metrics["moved"]) == int((after.params["w"] != 0).sum())


def test_momentum_takes_no_noise_of_what_a_batch_says_nothing_of():
    es = make(DESIGNS["pairs"], alpha=1.0, momentum=2)
    state = es.init({"w": jnp.zeros((6, 4), jnp.int8)}, jax.random.key(0))
    scores = jnp.arange(12, dtype=jnp.int32) * jnp.asarray([1, 3] * 6)
    after, _ = es.update(state, scores, {"w": jnp.arange(6)[:, None] < 2})
    assert after.momentum["w"][:2].any(1).all() and not after.momentum["w"][2:].any()


def test_the_better_of_a_pair_is_found_among_all_integers():
    scores = jnp.asarray([[3, 2], [2, 3], [5, 5], [2**31 - 1, -(2**31)], [-(2**31), 2**31 - 1]], jnp.int32)
    assert fitness.signs(scores).tolist() == [1, -1, 0, 1, -1]


def test_small_alphas_have_limits():
    assert threshold.quantile(1e-17) == pytest.approx(8.5737, abs=1e-3)
    assert (
        make(DESIGNS["pairs"], alpha=np.array([0.5, 0.25])).limits == make(DESIGNS["pairs"], alpha=[0.5, 0.25]).limits
    )


@pytest.mark.parametrize("count", [1, 4, 6, 13])
def test_packed_fitness_comes_back(count):
    trits = jnp.asarray(np.random.default_rng(count).integers(-1, 2, count), jnp.int8)
    packed = fitness.pack(trits)
    assert packed.dtype == jnp.uint8 and packed.shape == (-(-count // 4),)
    np.testing.assert_array_equal(fitness.unpack(packed, count), trits)
    assert fitness.pack(jnp.asarray([-1, 0, 1, -1], jnp.int8)).tolist() == [0b00_10_01_00]


def test_large_scores_are_averaged_exactly():
    es = make(eggroll.antithetic(1 << 14))
    state = es.init({"w": jnp.zeros((2, 2), jnp.int8)}, jax.random.key(0))
    scores = np.random.default_rng(0).integers(-(10**6), 10**5, 1 << 14)
    _, metrics = es.update(state, jnp.asarray(scores, jnp.int32))
    assert int(metrics["score_mean"]) == int(scores.sum()) // len(scores)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"population": eggroll.independent(8)}, r"signs = 2, got 1; use eggroll.antithetic\(8\)"),
        ({"alpha": 0.0}, r"must be in \(0, 1\]; got 0.0"),
        ({"alpha": [0.5, 1.5]}, r"must be in \(0, 1\]; got 1.5"),
        ({"noise": "uniform"}, "gaussian, rademacher; got 'uniform'"),
        ({"sigma_shift": -1}, "sigma_shift must be a whole number from 0 to 27; got -1"),
        ({"momentum": 1.5}, "momentum must be a whole number from 0 to 6; got 1.5"),
        ({"alpha": []}, "one per generation; got none"),
        ({"population": eggroll.antithetic(1 << 21), "noise": "rademacher"}, r"at most 2\^20 members.* got 2097152"),
        ({"chunk": 1}, "at least one pair, 2 members; got 1"),
        (
            {"population": eggroll.antithetic(1 << 20)},
            "524288 pairs of gaussian noise could reach 2353528832 > 2147483647",
        ),
        ({"faithful": True, "momentum": 1}, "momentum 1"),
        ({"faithful": True, "noise": "rademacher"}, "rademacher noise"),
        ({"faithful": True, "population": DESIGNS["crossed"]}, "3 x 4 pairs"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**{"population": DESIGNS["pairs"], **settings})


def test_rows_that_do_not_fit_the_pairs():
    with pytest.raises(ValueError, match=r"got 5 rows and 6 pairs \(12 members\): choose for example 1 rows"):
        make(DESIGNS["pairs"]).rows(5)
    with pytest.raises(ValueError, match="got 0 rows"):
        make(DESIGNS["pairs"]).rows(0)


def test_scores_that_are_no_integers():
    es = make(DESIGNS["pairs"])
    state = es.init({"w": jnp.zeros((4, 4), jnp.int8)}, jax.random.key(0))
    with pytest.raises(ValueError, match=r"one int32; got float32\[\]"):
        jax.eval_shape(
            lambda s: es.evaluate(s, lambda w, c, r: (jnp.float32(1), c), jnp.zeros((12, 1)), jnp.zeros((1, 2))), state
        )
    with pytest.raises(TypeError, match="the key must be one typed key"):
        es.init({"w": jnp.zeros((4, 4), jnp.int8)}, jax.random.key(0, impl="rbg"))
