"""Attention of one token: values by hand, a NumPy twin in f64, every length, entries that are never used, and the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, tuning
from kernels.decode_attention import attend, reference
from tests.kernels import harness

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
    rng = np.random.default_rng((heads, size))
    q, k, v = (rng.normal(size=s) for s in ((heads, size), (groups, size, room), (groups, size, room)))
    return jnp.asarray(2 * q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


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


def poisoned(x, lengths):
    """x [slots, ..., T] with NaN from each slot's length on."""
    beyond = np.arange(x.shape[-1]) >= np.asarray(lengths)[:, None]
    return jnp.asarray(np.where(beyond[:, None, None], np.nan, np.asarray(x, np.float32)), x.dtype)


def rounding(dtype, v):
    """What the weights, each rounded to the type of v, and the result, rounded once, can be off by; in f32, sums of a thousand
    terms and an exponential of scores up to 30."""
    return (
        float(jnp.finfo(dtype).eps) * np.nanmax(np.abs(np.asarray(v, np.float32))) * (1 if dtype == "bfloat16" else 32)
    )


# kernel, type, heads, key-value heads, head size, room, lengths, blocks: several blocks of positions, the last one whole or
# not, and in the first case several of heads; lengths are the ends, and a block's edge and its neighbours
CASES = [
    ("pallas_tpu", "float32", 4, 4, 128, 260, (0, 1, 127, 128, 129, 260), {"t": 128, "bytes": 2 * 128 * 128 * 4}),
    ("pallas_tpu", "bfloat16", 8, 4, 80, 300, (256, 257, 7, 300), {"t": 128}),
    ("pallas_tpu", "bfloat16", 16, 2, 64, 256, (256, 0, 255, 128), {"t": 128}),
    ("pallas_tpu", "bfloat16", 2, 2, 64, 520, (513, 520), {}),
    ("pallas_tpu", "float32", 3, 1, 7, 5, (0, 1, 4, 5), {}),
    ("pallas_gpu", "bfloat16", 4, 2, 64, 256, (0, 63, 65, 256), {}),
    ("pallas_gpu", "bfloat16", 18, 2, 128, 128, (128, 64), {}),
    ("pallas_gpu", "bfloat16", 1, 1, 128, 64, (1, 64), {}),
]
# heads, key-value heads, head size, room, slots
MODELS = {
    "Llama-3 8B": (32, 8, 128, 4096, 64),
    "Qwen3-0.6B": (16, 8, 128, 4096, 64),
    "Llama-3.2 1B": (32, 8, 64, 8192, 128),
}
NAMES = [("pallas_tpu", "float32"), ("pallas_tpu", "bfloat16"), ("pallas_gpu", "bfloat16")]


class TestKernels:
    @pytest.mark.parametrize(("kernel", "dtype", "heads", "groups", "size", "room", "lengths", "blocks"), CASES)
    def test_every_slot_equals_the_twin_and_nothing_beyond_its_length_counts(
        self, kernel, dtype, heads, groups, size, room, lengths, blocks
    ):
        one = (np.asarray(x, np.float32) for x in operands(heads, groups, size, dtype, room))
        q, k, v = (jnp.asarray(np.stack([(1 - i / 8) * x for i in range(len(lengths))]), dtype) for x in one)
        fn = jax.jit(jax.vmap(functools.partial(attend, implementation=kernel)))
        with tuning.trying(blocks):
            got = harness.run(kernel, fn, q, poisoned(k, lengths), poisoned(v, lengths), jnp.array(lengths))
        assert got.shape == q.shape and got.dtype == dtype
        for i, length in enumerate(lengths):
            expected = numpy_twin(q[i], k[i], v[i], length)
            np.testing.assert_allclose(np.asarray(got[i], np.float64), expected, rtol=0, atol=rounding(dtype, v))
            assert length or (np.asarray(got[i], np.float32) == 0).all()

    @pytest.mark.parametrize(
        ("kernel", "dtype", "axes"),
        [
            ("pallas_tpu", "float32", ((0, 0, 0, None), (1, None, None, 0))),
            ("pallas_tpu", "bfloat16", ((0, 0, 0, 0), (0, 0, 0, 0))),
            ("pallas_tpu", "bfloat16", ((0, None, None, None), (0, 0, 0, 0))),
            ("pallas_gpu", "bfloat16", ((0, None, None, None), (0, 0, 0, 0))),
            ("pallas_gpu", "bfloat16", ((0, 0, 0, None), (1, None, None, 0))),
        ],
    )
    def test_members_and_slots_with_their_own_cache_or_a_shared_one(self, kernel, dtype, axes):
        members, slots, lengths = 2, 3, jnp.array([3, 0, 65])
        shapes = [(4, 64), (2, 64, 128), (2, 64, 128), ()]
        rng = np.random.default_rng(0)
        args = []
        for i, shape in enumerate(shapes):
            for axis, size in ((axes[1][i], slots), (axes[0][i], members)):
                shape = shape if axis is None else (*shape[:axis], size, *shape[axis:])
            drawn = jnp.asarray(rng.normal(size=shape), dtype)
            args.append(drawn if i < 3 else jnp.broadcast_to(lengths, shape))
        nested = lambda name: jax.vmap(jax.vmap(functools.partial(attend, implementation=name), axes[1]), axes[0])
        got = harness.run(kernel, jax.jit(nested(kernel)), *args)
        expected = jax.jit(nested("reference"))(*args)
        assert got.shape == (members, slots, 4, 64)
        # two results that are each off by what the twin allows
        tolerance = 2 * rounding(dtype, args[2])
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=0, atol=tolerance
        )

    @pytest.mark.parametrize(("kernel", "dtype"), NAMES[1:])
    def test_tokens_after_one_another_read_what_was_written(self, kernel, dtype):
        slots, room, start = 2, 64, jnp.array([0, 40])
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(3, slots, 2, 64)), dtype) for _ in range(3))
        filled = poisoned(jnp.asarray(rng.normal(size=(slots, 2, 64, room)), dtype), start)

        def run(name):
            def step(carry, token):
                caches, lengths = carry
                q, *rows = token
                put = jax.vmap(lambda cache, row, n: cache.at[:, :, n].set(row))
                caches = [put(cache, row, lengths) for cache, row in zip(caches, rows, strict=True)]
                out = jax.vmap(functools.partial(attend, implementation=name))(q, *caches, lengths + 1)
                return (caches, lengths + 1), out

            return jax.jit(lambda q, k, v: jax.lax.scan(step, ([filled] * 2, start), (q, k, v))[1])

        got = np.asarray(harness.run(kernel, run(kernel), q, k, v), np.float32)
        expected = np.asarray(run("reference")(q, k, v), np.float32)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2 * rounding(dtype, v))
        assert len(np.unique(got[:, 0, 0, 0])) == 3

    @pytest.mark.parametrize("kernel", harness.KERNELS)
    @pytest.mark.parametrize("model", MODELS)
    def test_lowers_at_the_shapes_of_a_model_as_one_call(self, kernel, model):
        heads, groups, size, room, slots = MODELS[model]
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
        cache = shape(2, slots, groups, size, room)
        step = jax.vmap(jax.vmap(functools.partial(attend, implementation=kernel)))

        def fn(q, k, v, lengths):
            return jax.lax.scan(lambda n, _: (n + 1, step(q, k, v, n)), lengths, length=2)

        lengths = jax.ShapeDtypeStruct((2, slots), jnp.int32)
        module = harness.lowered(kernel, fn, shape(2, slots, heads, size), cache, cache, lengths)
        assert module.count("custom_call @") == 1
        # the cache is read where it lies: nothing makes another array of its size
        made = [line for line in module.splitlines() if f"{groups}x{size}x{room}xbf16>" in line.rsplit("->", 1)[-1]]
        assert all("reshape" in line or "func" in line or "while" in line or "return" in line for line in made), made

    def test_lowers_where_the_cache_is_shared_without_a_copy(self):
        cache = jax.ShapeDtypeStruct((8, 128, 4096), jnp.bfloat16)
        fn = jax.vmap(functools.partial(attend, implementation="pallas_tpu"), (0, None, None, 0))
        shape = jax.ShapeDtypeStruct((64, 32, 128), jnp.bfloat16)
        module = harness.lowered("pallas_tpu", fn, shape, cache, cache, jax.ShapeDtypeStruct((64,), jnp.int32))
        assert "64x8x128x4096" not in module and "1x8x128x4096" in module

    @pytest.mark.parametrize(
        ("kernel", "dtype", "q", "k", "reason"),
        [
            ("pallas_tpu", "float16", (4, 64), (2, 64, 64), "bfloat16, float32"),
            ("pallas_tpu", "bfloat16", (4, 640), (2, 640, 64), "up to 512"),
            ("pallas_gpu", "float32", (4, 64), (2, 64, 64), "one type of bfloat16"),
            ("pallas_gpu", "bfloat16", (4, 80), (2, 80, 64), "64 or 128; got 80|64 or 128"),
            ("pallas_gpu", "bfloat16", (4, 64), (2, 64, 100), "multiple of that; got 100"),
            ("pallas_gpu", "bfloat16", (65, 64), (1, 64, 64), "got 65"),
        ],
    )
    def test_what_a_kernel_cannot_serve_is_refused_with_the_reason(self, kernel, dtype, q, k, reason):
        q, k = jnp.zeros(q, dtype), jnp.zeros(k, dtype)
        with pytest.raises(ValueError, match=reason), dispatch.mode("lower"):
            attend(q, k, k, 1, implementation=kernel)

    def test_types_that_differ_are_refused_by_kernels_alone(self):
        q, k, v = operands(4, 2, 64)
        with pytest.raises(ValueError, match="one type"), dispatch.mode("interpret"):
            attend(q, k.astype("bfloat16"), v, 1, implementation="pallas_tpu")
        assert attend(q, k.astype("bfloat16"), v, 1).dtype == jnp.float32

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU chooses")
    def test_a_cpu_runs_the_reference_and_refuses_a_named_kernel(self):
        args = (*operands(4, 2, 64), 3)
        np.testing.assert_array_equal(attend(*args), reference.attend(*args))
        gradient = jax.grad(lambda q: attend(q, *args[1:]).sum())(args[0])
        np.testing.assert_array_equal(gradient, jax.grad(lambda q: reference.attend(q, *args[1:]).sum())(args[0]))
        for kernel in harness.KERNELS:
            with pytest.raises(ValueError, match=f"cannot run as '{kernel}': the device is cpu"):
                attend(*args, implementation=kernel)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((4, 8), (2, 8, 5), (2, 8, 6)),
        ((4, 8), (3, 8, 5), (3, 8, 5)),
        ((4, 8), (2, 7, 5), (2, 7, 5)),
        ((1, 4, 8), (2, 8, 5), (2, 8, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v):
    with pytest.raises(ValueError, match="H a multiple of G; got"):
        attend(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), 1)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_reference():
    q, k, v = operands(4, 2, 8)
    loss = lambda name: lambda *operands: jnp.sum(jnp.sin(attend(*operands, 7, implementation=name)))
    gradient = lambda name: jax.jit(jax.grad(loss(name), argnums=(0, 1, 2)))
    got = harness.run("pallas_tpu", gradient("pallas_tpu"), q, k, v)
    for a, b in zip(got, gradient("reference")(q, k, v), strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
