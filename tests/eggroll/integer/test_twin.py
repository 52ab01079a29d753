"""The twin's forward pass against typed-in integers, exact floors of fractions, and a second derivation in scalars."""

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from tests.eggroll.integer import twin

SHIFT = 8  # 4 + the default noise shift of 4
EXACT = decimal.Context(prec=60)


def floor(numerator, denominator):
    return math.floor(Fraction(int(numerator), int(denominator)))


def bound(value):
    return max(-127, min(127, value))


def draws(rng, *shape):
    return rng.integers(-127, 128, shape)


def same(actual, expected):
    np.testing.assert_array_equal(actual, expected)


# ---- one use of one weight ------------------------------------------------------------------------------------------

W = np.array([[10, -20, 30, 40], [-5, 6, -7, 8]], np.int8)
X = np.array([16, -8, 4, 9], np.int8)


def test_clip_keeps_minus_128_out_and_refuses_floats():
    same(twin.clip([-500, -128, -127, 0, 127, 128]), [-127, -127, -127, 0, 127, 127])
    with pytest.raises(AssertionError, match="whole numbers"):
        twin.clip([1.0])


def test_divisors():
    assert [twin.divisor(n) for n in (4, 16, 64, 256, 1024)] == [32, 64, 128, 256, 512]
    assert [twin.divisor(n, faithful=False) for n in (4, 16, 64, 256, 1024)] == [32, 64, 128, 256, 512]
    assert [twin.divisor(n) for n in (2, 3, 8, 512)] == [16, 16, 32, 352]
    assert [twin.divisor(n, faithful=False) for n in (2, 3, 8, 512)] == [23, 28, 45, 362]
    for n in range(1, 3000):  # nearest: d - 1/2 < 16 sqrt(n) < d + 1/2
        d = twin.divisor(n, faithful=False)
        assert (2 * d - 1) ** 2 < 1024 * n < (2 * d + 1) ** 2


def test_product_and_the_asymmetric_pair():
    same(W.astype(int) @ X, [800, -84])
    same(twin.product(X, W, 32), [25, -3])
    right, left = np.array([3, -5, 7, 11], np.int8), np.array([9, -13], np.int8)
    same(twin.perturbed_product(X, W, right, left, 1, SHIFT, 32), [25, -3])  # (800 + 7, -84 - 11) // 32
    same(twin.perturbed_product(X, W, right, left, -1, SHIFT, 32), [24, -3])  # (800 - 8, -84 + 10) // 32
    same(twin.perturbed_product(X, W, right, left, 1, SHIFT, 1), [127, -95])
    same(twin.perturbed_product(X, W, right, left, -1, SHIFT, 1), [127, -74])
    same(twin.product(-X, W, 32), [-25, 2])  # f(-x) is not -f(x)


def test_products_are_exact_floors_of_python_integers():
    rng = np.random.default_rng(0)
    for rows, columns, scale in ((5, 7, 32), (3, 16, 64), (2, 3, 27)):
        w, left, right, x = draws(rng, rows, columns), draws(rng, rows), draws(rng, columns), draws(rng, 4, columns)
        for sign in (1, -1):
            actual = twin.perturbed_product(x.astype(np.int8), w, right, left, sign, SHIFT, scale)
            for k, i in np.ndindex(4, rows):
                inside = sum(int(a) * int(b) for a, b in zip(x[k], right, strict=True))
                noise = floor(sign * inside * int(left[i]), 2**SHIFT)
                exact = sum(int(a) * int(b) for a, b in zip(x[k], w[i], strict=True))
                assert actual[k, i] == bound(floor(exact + noise, scale))
        same(twin.perturbed_product(x, w, right, 0 * left, 1, SHIFT, scale), twin.product(x, w, scale))


def test_sums_must_fit_int32():
    edge = np.full(1024, 127)
    assert twin.perturbed_product(edge, edge[None], edge, edge[:1], 1, SHIFT, 512) == 127  # 127^3 * 1024 fits
    with pytest.raises(AssertionError, match="int32"):
        twin.perturbed_product(np.full(2048, 127), np.zeros((1, 2048), int), np.full(2048, 127), [127], 1, SHIFT, 720)


def test_perturbed_row_and_vector():
    emb, left, right = np.array([[0, 0, 0], [10, -20, 127]], np.int8), [99, -7], [50, 60, -100]
    same(twin.perturbed_row(emb, left, right, 1, SHIFT, 1), [8, -22, 127])  # -350, -420, 700 >> 8 = -2, -2, 2
    same(twin.perturbed_row(emb, left, right, -1, SHIFT, 1), [11, -19, 124])  # 350, 420, -700 >> 8 = 1, 1, -3
    w, n1, n2 = np.array([16, 16, 0, 127], np.int8), [20, -20, 1, 100], [30, 30, -1, 100]
    same(twin.perturbed_vector(w, n1, n2, 1, SHIFT), [18, 13, -1, 127])  # 600, -600, -1, 10000 >> 8 = 2, -3, -1, 39
    same(twin.perturbed_vector(w, n1, n2, -1, SHIFT), [13, 18, 0, 87])  # -600, 600, 1, -10000 >> 8 = -3, 2, 0, -40


# ---- the model ------------------------------------------------------------------------------------------------------


def test_norm():
    same(twin.norm([16, -32, 64, 0], [16] * 4), [9, -19, 36, 0])  # s = 112 // 4 = 28; -512 / 28 = -18.3
    same(twin.norm([1, -1, 1, 0], [16] * 4), [16, -16, 16, 0])  # s = 0 counts as 1
    same(twin.norm([0, 0, 0, 0], [16] * 4), [0, 0, 0, 0])
    same(twin.norm([127, 0, 0, -127], [-127] * 4), [-127, 0, 0, 127])
    rng = np.random.default_rng(1)
    for scale in (1, 3, 20, 127):
        x, w = rng.integers(-scale, scale + 1, (60, 6)), draws(rng, 60, 6)
        for row, weight in zip(x, w, strict=True):
            s = max(1, floor(abs(row).sum(), 6))
            same(twin.norm(row, weight), [bound(floor(a * b, s)) for a, b in zip(row, weight, strict=True)])


GATE, STATE = np.array([-127, -64, 0, 64, 127], np.int8), np.array([100, 100, 100, -100, -100], np.int8)


def gru(**changed):
    weights = {name: np.zeros((5, 5), np.int8) for name in ("Wf", "Uf", "Wh", "Uh")}
    return weights | {"bf": GATE, "bh": np.zeros(5, np.int8)} | changed


def test_recurrent_gates():
    same(twin.gated(GATE, STATE), [0, 24, 49, -75, -100])
    candidate = np.array([-50, -50, -50, 50, 50], np.int8)
    x = np.full(5, 77)
    same(twin.recurrent(gru(bh=candidate), x, STATE), [100, 63, 25, 11, 48])
    # Uh = 32 I makes the candidate the gated past: 63 (24 - 100), 127 (49 - 100), 191 (-75 + 100) >> 8 = -19, -26, 18
    same(twin.recurrent(gru(Uh=32 * np.eye(5, dtype=int)), x, STATE), [100, 81, 74, -82, -100])


def test_each_product_in_the_gate_is_clipped_before_the_sum():
    weights = gru(Wf=127 * np.ones((5, 5), int), Uf=-32 * np.eye(5, dtype=int), bf=np.zeros(5, int))
    # Wf x // 32 = 1984 is 127 before -h is added: f = 27, not 127; gated(27, -100) = 154 * -100 >> 8 = -61
    same(twin.recurrent(weights, [100] * 5, [100] * 5), [39] * 5)


def test_the_new_state_needs_no_clip_and_int8_wraps_to_it():
    h, c = np.meshgrid(np.arange(-127, 128), np.arange(-127, 128))
    for f in (-127, -126, -64, -1, 0, 1, 64, 126, 127):
        new = h + twin.gated(f, c - h)
        assert np.all((new >= np.minimum(h, c)) & (new <= np.maximum(h, c)))
        same(h.astype(np.int8) + twin.gated(f, c - h).astype(np.int8), new)


def flat(tree, path=""):
    if isinstance(tree, dict | list):
        for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(part, f"{path}/{name}")
    else:
        yield path, tree


def noise_like(rng, weights):
    """(left, right) for every array: [rows], [columns] of a matrix; both [k] of a vector."""
    if isinstance(weights, dict):
        return {name: noise_like(rng, part) for name, part in weights.items()}
    if isinstance(weights, list):
        return [noise_like(rng, part) for part in weights]
    return draws(rng, weights.shape[0]), draws(rng, weights.shape[-1])


def scalar_token(weights, factors, sign, state, byte, faithful):
    """A second derivation of `token`: Python integers, lists and fractions, one sum at a time."""
    ws = {path: w.tolist() for path, w in flat(weights)}
    noise = {}
    for path in ws:  # walk to the pair of factors of each array
        at = factors
        for part in path.split("/")[1:]:
            at = at[int(part) if part.isdigit() else part]
        noise[path] = [side.tolist() for side in at]

    def dense(path, x):
        w, (left, right) = ws[path], noise[path]
        root = EXACT.sqrt(Decimal(len(x)))
        scale = 16 * int(root) if faithful else int((16 * root).to_integral_value(decimal.ROUND_HALF_EVEN))
        inside = sum(right[j] * x[j] for j in range(len(x)))
        total = [
            sum(row[j] * x[j] for j in range(len(x))) + floor(sign * a * inside, 256)
            for row, a in zip(w, left, strict=True)
        ]
        return [bound(floor(t, scale)) for t in total]

    def vector(path):
        return [bound(v + floor(sign * a * b, 256)) for v, a, b in zip(ws[path], *noise[path], strict=True)]

    def norm(path, x):
        s = max(1, sum(map(abs, x)) // len(x))
        return [bound(floor(a * b, s)) for a, b in zip(x, vector(path), strict=True)]

    add = lambda *terms: [bound(sum(t)) for t in zip(*terms, strict=True)]
    left, right = noise["/embed"]
    x = [bound(v + floor(sign * left[byte] * b, 256)) for v, b in zip(ws["/embed"][byte], right, strict=True)]
    new = []
    for layer, h in enumerate(state.tolist()):
        at = f"/blocks/{layer}"
        h = [0] * len(h) if byte == 0 else h
        a = norm(f"{at}/norm_1", x)
        f = add(dense(f"{at}/gru/Wf", a), dense(f"{at}/gru/Uf", h), vector(f"{at}/gru/bf"))
        past = [floor((g + 127) * v, 256) for g, v in zip(f, h, strict=True)]
        c = add(dense(f"{at}/gru/Wh", a), dense(f"{at}/gru/Uh", past), vector(f"{at}/gru/bh"))
        h = [v + floor((g + 127) * (u - v), 256) for g, u, v in zip(f, c, h, strict=True)]
        x = add(x, h)
        x = add(x, dense(f"{at}/mlp/down", dense(f"{at}/mlp/up", norm(f"{at}/norm_2", x))))
        new.append(h)
    return dense("/head", norm("/norm", x)), new


@pytest.mark.parametrize(("width", "faithful"), [(4, True), (8, True), (8, False)])
def test_token_against_scalar_arithmetic(width, faithful):
    rng = np.random.default_rng(width)
    weights = twin.initial(rng, width, 2, vocabulary=9)
    weights["blocks"][1]["gru"]["bf"] = draws(rng, width).astype(np.int8)  # biases that are not 0
    weights["blocks"][0]["gru"]["bh"] = draws(rng, width).astype(np.int8)
    factors, nothing = noise_like(rng, weights), noise_like(rng, weights)
    for _, side in flat(nothing):
        for part in side:
            part[:] = 0
    start, last = draws(rng, 2, width), []
    for sign, used in ((1, factors), (-1, factors), (1, nothing)):
        state, perturbed = start, twin.member(weights, used, sign, SHIFT)
        for byte in (3, 8, 0, 5, 5, 1):
            expected_logits, expected_state = scalar_token(weights, used, sign, state, byte, faithful)
            logits, state = twin.token(perturbed, state, byte, faithful)
            same(logits, expected_logits)
            same(state, expected_state)
        last.append(tuple(logits))
    assert len(set(last)) == 3  # the members differ
    some = {"embed": factors["embed"], "blocks": [None, None], "norm": None, "head": None}
    for tree in (weights, twin.member(weights, None, 1, SHIFT), twin.member(weights, nothing, -1, SHIFT)):
        assert twin.sequence(tree, start, (3, 8), (8, 0))[0] == twin.sequence(weights, start, (3, 8), (8, 0))[0]
    one = twin.token(twin.member(weights, some, 1, SHIFT), start, 3)[0]
    row = weights["embed"].copy()
    row[3] = twin.perturbed_row(row, *factors["embed"], 1, SHIFT, 3)
    same(one, twin.token(weights | {"embed": row}, start, 3)[0])


def test_a_sequence_sums_its_likelihoods_and_forgets_at_document_starts():
    rng = np.random.default_rng(2)
    weights = twin.initial(rng, 4, 2)
    state = first = draws(rng, 2, 4)
    expected = 0
    for byte, target in ((65, 0), (0, 66), (66, 67)):
        logits, state = twin.token(weights, state, byte)
        expected += twin.log_likelihood(logits, target)
    total, last = twin.sequence(weights, first, [65, 0, 66], [0, 66, 67])
    assert total == expected
    same(last, state)
    same(last, twin.sequence(weights, draws(rng, 2, 4), [0, 66], [66, 67])[1])  # whatever came before the 0
    assert np.any(twin.sequence(weights, first, [66], [67])[1] != twin.sequence(weights, -first, [66], [67])[1])


def test_initial_weights():
    weights = twin.initial(np.random.default_rng(0), 256, 6)
    leaves = [w for _, w in flat(weights)]
    assert sum(w.size for w in leaves) == 4_856_064 == 513 * 256 + 6 * (4 * 256 + 12 * 256**2)
    assert {w.dtype for w in leaves} == {np.dtype(np.int8)}
    second = np.mean(np.concatenate([w.ravel() for w in leaves if w.ndim == 2]).astype(float) ** 2)
    assert abs(second - 256 - 1 / 12) < 5 * 362 / math.sqrt(4_850_000)  # rounded; truncated it would be 243.6
    assert np.all(weights["norm"] == 16) and not weights["blocks"][5]["gru"]["bf"].any()


def test_saturated_weights_never_leave_the_range():
    rng = np.random.default_rng(3)
    weights = twin.initial(rng, 16, 2)
    for _, w in flat(weights):
        w[...] = rng.choice([-127, 127], w.shape)
    perturbed = twin.member(weights, noise_like(rng, weights), -1, SHIFT)
    state = rng.choice([-127, 127], (2, 16))
    for byte in rng.integers(1, 256, 40):
        logits, state = twin.token(perturbed, state, byte)
        assert abs(state).max() <= 127 and abs(logits).max() <= 127


@pytest.mark.parametrize(
    ("width", "layers", "residual", "state_size"),
    [(16, 1, 23, 11), pytest.param(64, 2, 31, 11.5, marks=pytest.mark.slow)],
)
def test_random_weights_lose_half_a_bit(width, layers, residual, state_size):
    """8 + (20.2 / 16)^2 ln(2) / 2 - 1/32 = 8.52 bits: logits of standard deviation 20.2, the log's truncation."""
    bits, logits, xs, states = [], [], [], []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        weights = twin.initial(rng, width, layers)
        for stream, data in enumerate(rng.integers(1, 256, (8, 201))):
            state = np.zeros((layers, width), np.int8)
            for byte, target in zip(data[:-1], data[1:], strict=True):
                if stream == 0:
                    xs.append(twin.residual(weights, state, byte)[0])
                out, state = twin.token(weights, state, byte)
                bits.append(-twin.log_likelihood(out, target) / 16)
                logits.append(out)
                states.append(state)
    assert 8.50 <= np.mean(bits) <= 8.53
    assert abs(np.std(logits) - 20.2) < 0.4
    assert abs(np.mean(np.abs(xs)) - residual) < 1.5
    assert abs(np.mean(np.abs(states)) - state_size) < 0.6
