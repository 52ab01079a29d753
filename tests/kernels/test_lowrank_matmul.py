"""Products with perturbed weights: contractions against einsum, kernels against perturbations written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import lowrank_matmul
from kernels.lowrank_matmul import layout
from kernels.noise_bits import Generated
from tests.kernels.harness import KERNELS, lowered, run


@pytest.mark.parametrize(
    ("labels", "factor_labels", "out", "spec"),
    [
        ([0, 1], [1], [0], "ab,b->a"),  # rank 1: a dot product a row
        ([0], [2], [0, 2], "a,c->ac"),  # an outer product
        ([0, 1], [1, 2], [0, 2], "ab,bc->ac"),
        ([0, 1], [0, 1], [], "ab,ab->"),
        ([0, 1], [2, 1], [2, 0], "ab,cb->ca"),
        ([0, 1], [0], [1, 0], "ab,a->ba"),  # nothing summed: a scaled transpose
        ([0, 1], [2], [2, 0], "ab,c->ca"),  # a label of x alone is summed too
    ],
)
def test_contract(labels, factor_labels, out, spec):
    sizes = (3, 4, 5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[sizes[i] for i in labels]).astype(np.float32)
    f = rng.normal(size=[sizes[i] for i in factor_labels]).astype(np.float32)
    got = lowrank_matmul.contract(jnp.asarray(x), labels, jnp.asarray(f), factor_labels, out)
    np.testing.assert_allclose(got, np.einsum(spec, x.astype(float), f.astype(float)), rtol=1e-5, atol=1e-5)


def test_half_precision_accumulates_in_f32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    got = lowrank_matmul.contract(x, [0, 1], jnp.ones(4096, jnp.bfloat16), [1], [0])
    assert got.dtype == jnp.float32
    assert float(got[0]) == 4096.0  # a bf16 accumulator would stop at 256


# name -> leading axes of x, right, left and scale
LAYOUTS = {
    "one": ((), (), (), ()),
    "independent": ((70,), (70,), (70,), (70,)),
    "antithetic": ((40, 2), (40, 1), (40, 1), (1, 2)),
    "crossed": ((1, 9, 16), (1, 1, 16), (1, 9, 1), (1, 1, 1)),
    "crossed the other way": ((2, 9, 16), (2, 9, 1), (2, 1, 16), (1, 1, 1)),  # as of a transposed weight
    "shared input": ((1, 1), (1, 20), (5, 1), (5, 20)),
}
DTYPE = {"pallas_tpu": jnp.float32, "pallas_gpu": jnp.bfloat16}


def operands(name, rows, k, n, rank, dtype, kind=None):
    """x, w, right, left, scale; factors stored, or of this kind of noise."""
    of_x, of_right, of_left, of_scale = LAYOUTS[name]
    rng = np.random.default_rng(2)
    normal = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.normal(size=shape), dtype)
    x, w = normal(*of_x, rows, k, dtype=dtype), jnp.asarray(rng.normal(size=(k, n)) / math.sqrt(k), dtype)
    right, left = normal(*of_right, rank, k), normal(*of_left, rank, n)
    if kind:
        ids = lambda lead: 3 + jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
        key = jnp.array([1, 2, 3, 4], jnp.uint32)
        right = Generated(key, ids(of_right), 5, 1, kind, rank, k)
        left = Generated(key, ids(of_left), 5, 0, kind, rank, n)
    return x, w, right, left, jnp.asarray(rng.choice([-0.1, 0.1], of_scale), jnp.float32)


@jax.jit
def drawn(factors):
    return factors.array()


def written_out(x, w, right, left, scale):
    """x (W + scale B A^T), a member's whole weight at a time, in f64."""
    wide = lambda a: np.asarray(drawn(a) if isinstance(a, Generated) else a, np.float64)
    x, w, right, left, scale = map(wide, (x, w, right, left, scale))
    return x @ (w + scale[..., None, None] * (np.swapaxes(right, -1, -2) @ left))


def tolerance(dtype, factors, width):
    """Of sums of `width` terms of size one / sqrt(width), and of a result in `dtype`; in bf16 factors and coefficients too."""
    if dtype == jnp.float32:
        return {"rtol": 1e-5, "atol": 1e-5}
    return {"rtol": 2.0**-7, "atol": 0.1 * math.sqrt(width) * 2.0**-8 * factors}


@pytest.mark.parametrize("kernel", KERNELS)
class TestKernels:
    @pytest.mark.parametrize(
        ("name", "rows", "k", "n", "rank"),
        [
            ("one", 300, 200, 300, 2),
            ("independent", 1, 130, 140, 1),
            ("antithetic", 1, 130, 129, 1),
            ("crossed", 4, 65, 96, 4),
            ("crossed the other way", 1, 128, 40, 2),
            ("shared input", 2, 96, 128, 1),
            ("independent", 2, 32, 48, 16),
        ],
    )
    def test_stored_factors(self, kernel, name, rows, k, n, rank):
        if kernel == "pallas_gpu" and name not in ("one", "antithetic", "crossed the other way"):
            pytest.skip("the layout is the same code for both; its interpreter is slow")
        self.compare(kernel, DTYPE[kernel], name, rows, k, n, rank)

    def test_half_precision(self, kernel):
        self.compare(kernel, jnp.bfloat16, "antithetic", 2, 200, 300, 2)

    def compare(self, kernel, dtype, name, rows, k, n, rank):
        args = operands(name, rows, k, n, rank, dtype)
        got = run(kernel, functools.partial(lowrank_matmul.matmul, implementation=kernel), *args)
        assert got.dtype == dtype
        want, (x, w) = written_out(*args), (np.asarray(a, np.float64) for a in args[:2])
        assert np.abs(want - x @ w).max() > 0.2  # the perturbation is there to be seen
        np.testing.assert_allclose(np.asarray(got, np.float64), want, **tolerance(dtype, 4 * rank, k))

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "n"), [("gaussian", 150), ("rademacher", 256)])
    def test_factors_made_in_the_tile(self, kernel, kind, n):
        dtype = DTYPE[kernel]
        args = operands("crossed", 1, 64, n, 2, dtype, kind)
        got = run(kernel, functools.partial(lowrank_matmul.matmul, implementation=kernel), *args)
        np.testing.assert_allclose(np.asarray(got, np.float64), written_out(*args), **tolerance(dtype, 8, 64))

    @pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
    def test_the_bits_of_a_tile(self, kernel, kind):
        """W = 0, x = B = e_1, one factor a member: the result is the left factor itself, bit for bit."""
        dtype = DTYPE[kernel]
        _, _, _, left, _ = operands("independent", 1, 8, 300, 1, dtype, kind)
        one = np.zeros((70, 1, 8), np.float32)
        one[:, :, 0] = 1
        args = (jnp.asarray(one, dtype), jnp.zeros((8, 300), dtype), jnp.asarray(one), left, jnp.ones(70))
        got = run(kernel, functools.partial(lowrank_matmul.matmul, implementation=kernel), *args)
        np.testing.assert_array_equal(got[:, 0], drawn(left)[:, 0].astype(dtype))

    def test_vmap_is_one_call(self, kernel):
        """Members of a crossed population by two vmaps: one kernel, whose result is that of leading axes."""
        x, w, right, left, scale = operands("crossed", 1, 64, 96, 1, DTYPE[kernel])
        member = functools.partial(lowrank_matmul.matmul, implementation=kernel)
        columns = jax.vmap(member, (0, None, 0, None, None))
        rows = jax.vmap(columns, (0, None, None, 0, None))
        args = (x[0], w, right[0, 0], left[0, :, 0], scale[0, 0, 0])
        got = run(kernel, rows, *args)
        np.testing.assert_array_equal(got, run(kernel, member, x, w, right, left, scale)[0])
        programs = lowered(kernel, rows, *args), lowered(kernel, member, x, w, right, left, scale)
        for what in ("stablehlo.while", "custom_call"):
            assert len({program.count(what) for program in programs}) == 1

    def test_lowers_at_the_shapes_of_models(self, kernel):
        shape, dtype = jax.ShapeDtypeStruct, jnp.bfloat16
        member = functools.partial(lowrank_matmul.matmul, implementation=kernel)
        for k, n in ((4096, 14336), (1024, 3072)):
            w = shape((k, n), dtype)
            for lead, of_right, of_left in (((32, 32), (1, 32), (32, 1)), ((1024,), (1024,), (1024,))):
                factors = shape((*of_right, 1, k), jnp.float32), shape((*of_left, 1, n), jnp.float32)
                one = shape((1,) * len(lead), jnp.float32)
                lowered(kernel, member, shape((*lead, 1, k), dtype), w, *factors, one)

    def test_lowers_inside_a_loop_over_layers(self, kernel):
        x, w, right, left, scale = operands("crossed", 1, 64, 64, 1, DTYPE[kernel])
        stack = lambda a: jnp.stack([a, a])

        def forward(x, w, right, left):
            layer = lambda x, p: (lowrank_matmul.matmul(x, *p, scale, implementation=kernel), None)
            return jax.lax.scan(layer, x, (w, right, left))[0]

        lowered(kernel, forward, x, stack(w), stack(right), stack(left))


@pytest.mark.parametrize(("tile", "lead", "of_left", "rows", "block"), [
    (128, (128,), (128,), 1, 128),  # a factor a row
    (128, (64, 2), (64, 1), 1, 64),  # a factor a pair
    (64, (4, 32), (4, 1), 2, 16),  # one factor a tile: the smallest block
    (64, (4, 32), (1, 32), 4, 16),  # two tiles a row of members, 16 factors each
    (64, (8, 24), (1, 24), 1, 32),  # 24 factors in all
    (64, (8, 80), (1, 80), 1, 0),  # tiles that wrap round: no block
])  # fmt: skip
def test_blocks_of_factors(tile, lead, of_left, rows, block):
    owners = layout._owners(lead, of_left, rows)
    assert len(owners) == math.prod(lead) * rows
    assert layout._block(owners, tile) == block


def test_wide_corrections_take_smaller_tiles():
    x, _, right, left, scale = operands("independent", 2, 8, 16, 16, jnp.float32)
    laid = layout.in_rows(x, right, left, scale, 256)
    assert laid.tile == 128  # 128 factors of rank 16 would be 2,048 columns
    assert laid.d.shape == (256, 64 * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.ones((7, 5))}, r"needs x \[.., 7\]"),
        ({"w": jnp.ones((8, 5), jnp.bfloat16)}, "of one type; got float32 and bfloat16"),
        ({"right": jnp.ones((3, 0, 8)), "left": jnp.ones((3, 0, 5))}, "rank must be at least 1; got 0"),
        ({"scale": jnp.ones(())}, "as many member axes each"),
        ({"scale": jnp.ones(4)}, "[Ii]ncompatible shapes"),
    ],
)
def test_bad_input(change, message):
    good = {"x": jnp.ones((3, 2, 8)), "w": jnp.ones((8, 5)), "right": jnp.ones((3, 1, 8)), "left": jnp.ones((3, 1, 5))}
    with pytest.raises(ValueError, match=message):
        lowrank_matmul.matmul(**(good | {"scale": jnp.ones(3)} | change))


def test_a_named_kernel_says_why_it_cannot_serve():
    args = operands("independent", 1, 16, 16, 1, jnp.float32)
    with pytest.raises(ValueError, match=r"lowrank_matmul of .* cannot run as 'pallas_tpu': the device is cpu"):
        lowrank_matmul.matmul(*args, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="it takes bfloat16"):
        run("pallas_gpu", functools.partial(lowrank_matmul.matmul, implementation="pallas_gpu"), *args)
    x, w, right, left, scale = operands("one", 20, 32, 32, 17, jnp.bfloat16)
    with pytest.raises(ValueError, match="ranks go up to 16"):
        run(
            "pallas_gpu",
            functools.partial(lowrank_matmul.matmul, implementation="pallas_gpu"),
            x,
            w,
            right,
            left,
            scale,
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_reference(name):
    args = operands(name, 2, 24, 40, 2, jnp.float32, "rademacher" if name == "crossed" else None)
    np.testing.assert_allclose(jax.jit(lowrank_matmul.matmul)(*args), written_out(*args), rtol=1e-5, atol=1e-5)


def test_what_members_share_is_multiplied_once():
    """Rows that all members have in common go by the reference, which a kernel could only repeat."""
    args = operands("shared input", 2, 96, 128, 1, jnp.float32)
    product = functools.partial(lowrank_matmul.matmul, implementation="pallas_tpu")
    assert "pallas_call" not in run("pallas_tpu", lambda: str(jax.make_jaxpr(product)(*args)))


def test_nothing_to_compute_is_the_reference_or_an_error():
    x, w, right, left, scale = operands("independent", 0, 24, 40, 2, jnp.float32)
    assert lowrank_matmul.matmul(x, w, right, left, scale).shape == (70, 0, 40)
    with pytest.raises(ValueError, match="there is nothing to compute"):
        run(
            "pallas_tpu",
            functools.partial(lowrank_matmul.matmul, implementation="pallas_tpu"),
            x,
            w,
            right,
            left,
            scale,
        )


def test_gradients_are_those_of_the_reference():
    x, w, right, left, scale = operands("crossed", 2, 24, 40, 2, jnp.float32)
    loss = lambda name: lambda *args: jnp.sum(jnp.sin(lowrank_matmul.matmul(*args, scale, implementation=name)))
    gradient = lambda name: jax.jit(jax.grad(loss(name), argnums=(0, 1, 2, 3)))(x, w, right, left)
    got = run("pallas_tpu", lambda: gradient("pallas_tpu"))
    for a, b in zip(got, gradient("reference"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "pallas_tpu"])
def test_a_batched_weight_is_a_loop(name):
    x, w, right, left, scale = operands("one", 2, 24, 40, 2, jnp.float32)
    each = jax.vmap(functools.partial(lowrank_matmul.matmul, implementation=name), (None, 0, None, None, None))
    got = run("pallas_tpu", each, x, jnp.stack([w, 2 * w]), right, left, scale)
    want = [written_out(x, v, right, left, scale) for v in (w, 2 * w)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
