"""The integer product against a loop over members in NumPy's int64; every comparison is of bits."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, int8_matmul
from kernels.int8_matmul import reference
from tests.kernels import harness

IMPLEMENTATIONS = ("reference", *harness.KERNELS)
SHIFT, DIVISOR = 8, 353  # sigma = 2^-4; 16 times the square root of 487, rounded down: no power of two

# leading axes of x, B, A and sign; in, out
LAYOUTS = {
    "one member": [(), (), (), (), 200, 150],
    "independent": [(35,), (35,), (35,), (35,), 130, 150],
    "independent, many": [(300,), (300,), (300,), (300,), 30, 20],
    "antithetic": [(12, 2), (12, 1), (12, 1), (1, 2), 256, 256],
    "crossed": [(5, 7), (1, 7), (5, 1), (1, 1), 200, 130],
    "crossed, factors of a tile in no block": [(2, 260), (2, 1), (1, 260), (1, 1), 30, 20],
    "one x for all": [(1,), (40,), (40,), (40,), 48, 40],
}


def numbers(rng, *shape):
    return jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)


def operands(rng, x, right, left, sign, k, n, rows):
    signs = jnp.asarray(rng.integers(-1, 2, sign), jnp.int32)
    return numbers(rng, *x, rows, k), numbers(rng, n, k), numbers(rng, *right, k), numbers(rng, *left, n), signs


def run(implementation, *args, shift=SHIFT, divisor=DIVISOR):
    fn = jax.jit(functools.partial(int8_matmul.matmul, shift=shift, divisor=divisor, implementation=implementation))
    return np.asarray(fn(*args) if implementation == "reference" else harness.run(implementation, fn, *args))


def twin(x, w, right, left, sign, *, shift=SHIFT, divisor=DIVISOR):
    """One member at a time, the formula as it is written."""
    lead = np.broadcast_shapes(x.shape[:-2], right.shape[:-1], left.shape[:-1], sign.shape)
    wide = [np.asarray(a, np.int64) for a in (x, w, right, left, sign)]
    spread = lambda a, own: np.broadcast_to(a, (*lead, *a.shape[a.ndim - own :]))
    x, right, left, sign = (spread(a, own) for a, own in zip((wide[0], *wide[2:]), (2, 1, 1, 0), strict=True))
    out = np.zeros((*lead, x.shape[-2], w.shape[0]), np.int64)
    for member in np.ndindex(*lead):
        noise = sign[member] * (x[member] @ right[member])[:, None] * left[member]
        assert np.abs(noise).max() < 2**31
        acc = x[member] @ wide[1].T + (noise >> shift)
        out[member] = np.clip(np.floor_divide(acc, divisor), -127, 127)
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_pair_is_asymmetric(implementation):
    """Worked by hand: W x = [800, -84]; x . B = 215; 215 A >> 8 = [7, -11] and -215 A >> 8 = [-8, 10]; then // 32."""
    x = jnp.array([[16, -8, 4, 9]], jnp.int8)
    w = jnp.array([[10, -20, 30, 40], [-5, 6, -7, 8]], jnp.int8)
    right, left = jnp.array([[3, -5, 7, 11]], jnp.int8), jnp.array([[9, -13]], jnp.int8)
    pair = lambda divisor: run(
        implementation, x[None], w, right, left, jnp.array([1, -1, 0], jnp.int8), shift=8, divisor=divisor
    )
    np.testing.assert_array_equal(pair(32)[:, 0], [[25, -3], [24, -3], [25, -3]])
    # [807, -95], [792, -74] and [800, -84] // 13; 793 = 13 61 is what a shift to zero gives
    np.testing.assert_array_equal(pair(13)[:, 0], [[62, -8], [60, -6], [61, -7]])


class TestAgainstTwin:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_layouts(self, implementation, layout):
        if implementation == "pallas_gpu" and list(LAYOUTS).index(layout) % 2:
            pytest.skip("the layout is the same code for both; its interpreter is slow")
        *axes, k, n = LAYOUTS[layout]
        members = int(np.prod(np.broadcast_shapes(*axes[:3])))
        rows = -(-{"pallas_tpu": 280}.get(implementation, 70) // members)  # more than one tile of rows
        args = operands(np.random.default_rng(0), *axes, k, n, rows)
        got, want = run(implementation, *args), twin(*args)
        assert got.dtype == np.int8
        np.testing.assert_array_equal(got, want)
        assert len(np.unique(want)) > 100  # not all clipped

    @pytest.mark.parametrize("seed", range(3))
    def test_random_shapes(self, seed):
        rng = np.random.default_rng(seed)
        p, q, rows, k, n = (int(rng.integers(1, high)) for high in (5, 5, 4, 300, 80))
        shift, divisor = int(rng.integers(0, 12)), int(rng.choice([1, 2, 7, 64, 88, 256, 353, 4096]))
        axes = [[(p, q)[i] if rng.random() < 0.7 else 1 for i in range(2)] for _ in range(4)]
        args = operands(rng, *axes, k, n, rows)
        want = twin(*args, shift=shift, divisor=divisor)
        np.testing.assert_array_equal(run("reference", *args, shift=shift, divisor=divisor), want)

    @pytest.mark.parametrize(
        ("k", "shift", "divisor"), [(1048, 8, 250_000), (1048, 31, 200_000), (1040, 0, reference.MAX_DIVISOR)]
    )
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_largest_sums(self, implementation, k, shift, divisor):
        if implementation == "pallas_gpu" and shift == 31:
            pytest.skip("one of its slow interpreter's two ends is enough")
        signs = np.array(list(np.ndindex(2, 2, 2))) * 2 - 1  # of B, A and the member
        ends = lambda s, size: jnp.asarray(127 * s[:, None].repeat(size, 1), jnp.int8)
        x, w = jnp.full((8, 1, k), 127, jnp.int8), ends(np.array([1, -1]), k)
        args = (x, w, ends(signs[:, 0], k), ends(signs[:, 1], 2), jnp.asarray(signs[:, 2]))
        want = twin(*args, shift=shift, divisor=divisor)
        np.testing.assert_array_equal(run(implementation, *args, shift=shift, divisor=divisor), want)
        # 16 129 k, more or less 2 048 383 k >> shift
        extremes = {8: [34, 101, -102, -35], 31: [84, 84, -85, -85], 0: [-127, 127, -127, 127]}[shift]
        np.testing.assert_array_equal(want[[0, 1], 0].T.reshape(-1), extremes)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_minus_128_is_a_number_like_any_other(self, implementation):
        full = lambda *shape: jnp.full(shape, -128, jnp.int8)
        args = (full(2, 1, 1016), full(3, 1016), full(2, 1016), full(2, 3), jnp.array([1, -1], jnp.int8))
        got = run(implementation, *args, shift=0, divisor=1)
        np.testing.assert_array_equal(got[:, 0], [[-127] * 3, [127] * 3])  # not -128
        np.testing.assert_array_equal(got, twin(*args, shift=0, divisor=1))


@pytest.mark.parametrize("divisor", [1, 2, 3, 88, 256, 353, 512, 1_000_003, reference.MAX_DIVISOR])
def test_division_rounds_down_and_clips_for_any_sum(divisor):
    rng = np.random.default_rng(divisor)
    edges = np.arange(-129, 130)[:, None] * divisor + np.arange(-2, 3)
    sums = [-(2**31), 2**31 - 1, *np.clip(edges.ravel(), -(2**31), 2**31 - 1), *rng.integers(-(2**31), 2**31, 1000)]
    sums = np.array(sums, np.int32)
    got = jax.jit(reference.finish, static_argnums=(3, 4))(sums, jnp.int32(0), jnp.int32(0), 0, divisor)
    np.testing.assert_array_equal(got, np.clip(np.floor_divide(sums, np.int64(divisor)), -127, 127))


class TestBatching:
    def crossed(self, implementation):
        """The forward pass of one member, mapped: A over the first axis and B over the second."""
        fn = functools.partial(int8_matmul.matmul, shift=SHIFT, divisor=DIVISOR, implementation=implementation)
        inner = jax.vmap(fn, in_axes=(0, None, 0, None, None))
        return jax.vmap(inner, in_axes=(0, None, None, 0, None))

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_nested_vmap_equals_loop(self, implementation):
        rng = np.random.default_rng(1)
        x, w, right, left = numbers(rng, 5, 7, 2, 40), numbers(rng, 30, 40), numbers(rng, 7, 40), numbers(rng, 5, 30)
        fn, one = jax.jit(self.crossed(implementation)), jnp.int32(1)
        args = (x, w, right, left, one)
        got = fn(*args) if implementation == "reference" else harness.run(implementation, fn, *args)
        assert got.shape == (5, 7, 2, 30)
        for i, j in np.ndindex(5, 7):
            np.testing.assert_array_equal(got[i, j], twin(x[i, j], w, right[j], left[i], np.int32(1)))

    @pytest.mark.parametrize("kernel", harness.KERNELS)
    def test_nested_vmap_is_one_call(self, kernel):
        shapes = [(32, 64, 1, 256), (1024, 256), (64, 256), (32, 1024)]
        args = [jax.ShapeDtypeStruct(s, jnp.int8) for s in shapes]
        call = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "mosaic_gpu"}[kernel]
        text = harness.lowered(kernel, self.crossed(kernel), *args, jax.ShapeDtypeStruct((), jnp.int8))
        assert sum("custom_call" in line and f"@{call}" in line for line in text.splitlines()) == 1


class TestLowering:
    """Models of 256 and 64 wide, 32 768 members in pairs, one token each, scanned over layers."""

    @pytest.mark.parametrize("width", [256, 64])
    @pytest.mark.parametrize("kernel", harness.KERNELS)
    def test_layers(self, kernel, width):
        pairs, wide = 16384, 4 * width

        def layers(x, *stacked):
            def step(x, layer):
                sign = jnp.array([[1, -1]], jnp.int8)
                for w, right, left in (layer[:3], layer[3:]):
                    divisor = 16 * int(w.shape[1] ** 0.5)
                    x = int8_matmul.matmul(x, w, right, left, sign, shift=8, divisor=divisor, implementation=kernel)
                return x, None

            return jax.lax.scan(step, x, stacked)[0]

        shapes = [(pairs, 2, 1, width)]
        for out, into in ((wide, width), (width, wide)):
            shapes += [(6, out, into), (6, pairs, 1, into), (6, pairs, 1, out)]
        harness.lowered(kernel, layers, *(jax.ShapeDtypeStruct(s, jnp.int8) for s in shapes))

    def test_gpu_multiplies_in_int8(self):
        fn = functools.partial(int8_matmul.matmul, shift=8, divisor=256, implementation="pallas_gpu")
        shapes = [(128, 1, 256), (1024, 256), (128, 256), (128, 1024), (128,)]
        text = harness.lowered("pallas_gpu", fn, *(jax.ShapeDtypeStruct(s, jnp.int8) for s in shapes))
        assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in text


class TestBadInput:
    def call(self, *shapes, dtypes=("int8",) * 5, **kw):
        kw = {"shift": 8, "divisor": 64} | kw
        shapes = shapes or [(3, 2, 16), (8, 16), (3, 16), (3, 8), (3,)]
        args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        return jax.eval_shape(functools.partial(int8_matmul.matmul, **kw), *args)

    def test_good(self):
        out = self.call()
        assert (out.shape, out.dtype) == ((3, 2, 8), jnp.int8)

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ([(3, 2, 16), (8, 16), (16,), (3, 8), (3,)], "as many member axes"),
            ([(16,), (8, 16), (16,), (8,), ()], "as many member axes"),
            ([(3, 2, 16), (1, 8, 16), (3, 16), (3, 8), (3,)], "as many member axes"),
            ([(3, 2, 16), (16, 8), (3, 16), (3, 8), (3,)], r"needs x \[.., 8\]"),
            ([(3, 2, 16), (8, 16), (3, 8), (3, 16), (3,)], "needs x"),
            ([(3, 2, 16), (8, 16), (2, 16), (3, 8), (3,)], "must broadcast"),
            ([(3, 2, 0), (8, 0), (3, 0), (3, 8), (3,)], "in must be at least 1"),
        ],
    )
    def test_shapes(self, shapes, message):
        with pytest.raises(ValueError, match=message):
            self.call(*shapes)

    @pytest.mark.parametrize("wrong", range(5))
    def test_types(self, wrong):
        dtypes = ["int8"] * 5
        dtypes[wrong] = "float32" if wrong % 2 == 0 else "uint8"
        with pytest.raises(ValueError, match=f"takes int8 x, w, right and left.*{dtypes[wrong]}"):
            self.call(dtypes=dtypes)

    @pytest.mark.parametrize(
        ("kw", "message"),
        [
            ({"shift": -1}, "shift"),
            ({"shift": 32}, "shift"),
            ({"divisor": 0}, "divisor"),
            ({"divisor": -16}, "divisor"),
            ({"divisor": reference.MAX_DIVISOR + 1}, "divisor"),
        ],
    )
    def test_static(self, kw, message):
        with pytest.raises(ValueError, match=message):
            self.call(**kw)

    @pytest.mark.parametrize(("k", "shift"), [(1048, 8), (1048, 1), (1040, 0)])
    def test_sums_that_could_overflow(self, k, shift):
        shapes = lambda k: [(3, 2, k), (8, k), (3, k), (3, 8), (3,)]
        assert self.call(*shapes(k), shift=shift).shape == (3, 2, 8)
        with pytest.raises(ValueError, match=f"in = {k + 1}.* > 2147483647"):
            self.call(*shapes(k + 1), shift=shift)


class TestDispatch:
    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="a device may have a kernel")
    def test_on_a_cpu(self):
        args = operands(np.random.default_rng(0), (3,), (3,), (3,), (3,), 16, 8, 2)
        fn = functools.partial(int8_matmul.matmul, *args, shift=SHIFT, divisor=16)
        np.testing.assert_array_equal(fn(), fn(implementation="reference"))
        text = jax.jit(lambda: fn()).lower().as_text()
        assert "custom_call" not in text
        for kernel in harness.KERNELS:
            with pytest.raises(ValueError, match="int8_matmul of .* cannot run as .*the device is cpu"):
                fn(implementation=kernel)

    @pytest.mark.parametrize(("kind", "served"), [("TPU v4", False), ("TPU v5 lite", True), ("TPU v5p", True)])
    def test_tpus_without_int8(self, monkeypatch, kind, served):
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
        args = operands(np.random.default_rng(0), (3,), (3,), (3,), (3,), 16, 8, 2)
        fn = functools.partial(int8_matmul.matmul, *args, shift=8, divisor=64, implementation="pallas_tpu")
        with dispatch.mode("interpret"):
            if served:
                assert fn().shape == (3, 2, 8)
            else:
                with pytest.raises(ValueError, match="TPU v4 has no int8 products"):
                    fn()
