"""The estimate's contraction against a loop over members, and its kernels against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import noise
from kernels import dispatch, es_update, noise_bits, tuning
from tests.kernels import harness

KINDS = ("gaussian", "rademacher")
BLOCKS = {"tpu": {"m": 512, "n": 128, "terms": 8}, "gpu": {}}


@pytest.mark.parametrize(
    ("blocks", "rows", "columns", "stacked", "rank"), [(5, 1, 1, 1, 2), (2, 3, 4, 2, 3), (1, 2, 2, 1, 1)]
)
def test_update_is_the_sum_over_members(blocks, rows, columns, stacked, rank):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(blocks, rows, columns)).astype(np.float32)
    left = rng.normal(size=(blocks, rows, stacked, rank, 5)).astype(np.float32)
    right = rng.normal(size=(blocks, columns, stacked, rank, 3)).astype(np.float32)
    expected = np.zeros((stacked, 5, 3))
    for g in range(blocks):
        for i in range(rows):
            for j in range(columns):
                for s in range(stacked):
                    expected[s] += (
                        float(weights[g, i, j]) * left[g, i, s].T.astype(float) @ right[g, j, s].astype(float)
                    )
    np.testing.assert_allclose(es_update.update(weights, left, right), expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weights \[G, P, Q\]"):
        es_update.update(np.ones((1, 2, 2)), np.ones((1, 2, 1, 1, 5)), np.ones((1, 3, 1, 1, 5)))


def _address(kind: str, ids, rank: int, size: int, role: int, layer: int = 0) -> noise_bits.Generated:
    key = jnp.array([11, 12, 13, 14], jnp.uint32)
    return noise_bits.Generated(key, jnp.asarray(ids, jnp.uint32), layer, role, kind, rank, size)


def _problem(kind: str, population, rank: int, m: int, n: int, layers: int = 1):
    """Weights and the addresses of both sides, one per layer."""
    blocks, rows, columns = population
    weights = jnp.asarray(np.random.default_rng(blocks).normal(size=population), jnp.float32)
    ids = lambda members: np.arange(blocks * members).reshape(blocks, members) * 3 + 1
    left = [_address(kind, ids(rows), rank, m, noise.LEFT, layer) for layer in range(layers)]
    right = [_address(kind, ids(columns), rank, n, noise.RIGHT, layer) for layer in range(layers)]
    return weights, left, right


@jax.jit
def _stored(addresses):
    return jnp.stack([a.array() for a in addresses], axis=2)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several tiles in every direction at sizes that are interpreted soon: 512 is what words are shared in."""
    monkeypatch.setattr(tuning, "blocks", lambda op, platform, default, kind, **_: default | BLOCKS[platform])


def _assert_close(kernel, got, weights, left, right, exact=False):
    """Within rounding: of every term in bf16 parts, where there are any, and of f32 sums, twice."""
    terms = weights.shape[0] * weights.shape[1] * weights.shape[2] * left.shape[3]
    product = {"pallas_tpu": 2.0**-23, "pallas_gpu": 2.0**-17 if exact else 2.0**-16 + 2.0**-17}[kernel]
    wide = [np.asarray(x, np.float64) for x in (weights, left, right)]
    expected = np.einsum("gij,giskm,gjskn->smn", *wide)
    bound = np.einsum("gij,giskm,gjskn->smn", *map(np.abs, wide)) * (product + terms * 2.0**-23)
    assert got.shape == expected.shape and got.dtype == jnp.float32
    assert (np.abs(np.asarray(got, np.float64) - expected) <= bound).all()
    assert np.abs(expected).max() > 100 * bound.max()  # the bound says something


@pytest.mark.usefixtures("small_blocks")
class TestKernels:
    @pytest.mark.parametrize("kernel", harness.KERNELS)
    @pytest.mark.parametrize(
        ("kind", "population", "rank", "m", "n", "layers"),
        [
            ("gaussian", (70, 1, 1), 1, 512, 130, 1),  # words shared on the left
            ("rademacher", (7, 1, 1), 3, 160, 130, 2),  # odd: a right factor that no word starts with
            ("gaussian", (2, 5, 3), 2, 130, 200, 1),  # crossed
            ("rademacher", (1, 9, 1), 2, 128, 128, 1),  # a block of one column
        ],
    )
    @pytest.mark.parametrize("made", [False, True], ids=["stored", "addresses"])
    def test_equals_the_sum_over_members(self, kernel, kind, population, rank, m, n, layers, made):
        if kernel == "pallas_gpu" and made and kind == "gaussian":
            pytest.skip("drawn before the kernel: the stored case")
        if not made and population in ((70, 1, 1), (1, 9, 1)):
            pytest.skip("stored factors share no words, and have no kind")
        weights, *addresses = _problem(kind, population, rank, m, n, layers)
        stored = [_stored(a) for a in addresses]
        update = jax.jit(functools.partial(es_update.update, implementation=kernel))
        got = harness.run(kernel, update, weights, *(addresses if made else stored))
        _assert_close(kernel, got, weights, *stored, exact=made and kind == "rademacher")

    @pytest.mark.parametrize(
        ("side", "kind", "rank", "size"),
        [
            ("left", "gaussian", 1, 1024),
            ("right", "gaussian", 3, 600),
            ("left", "rademacher", 3, 1056),
            ("right", "rademacher", 2, 131),
            ("right", "rademacher", 1, 4224),
        ],
    )
    def test_what_a_tile_makes_is_what_the_address_says(self, side, kind, rank, size):
        """With unit vectors for the other factor the result is the factor itself, to the bit."""
        ids = np.arange(5)[:, None] + 2**31
        factor = _address(kind, ids, rank, size, noise.LEFT if side == "left" else noise.RIGHT, layer=6)
        unit = jnp.eye(5 * rank).reshape(5, 1, 1, rank, 5 * rank)
        update = jax.jit(functools.partial(es_update.update, implementation="pallas_tpu"))
        sides = (factor, unit) if side == "left" else (unit, factor)
        got = harness.run("pallas_tpu", update, jnp.ones((5, 1, 1)), *sides)[0]
        np.testing.assert_array_equal(got.T if side == "left" else got, _stored([factor]).reshape(-1, size))

    @pytest.mark.parametrize("kernel", harness.KERNELS)
    def test_batches_are_one_call(self, kernel):
        """Outer axis: fitness alone. Inner: another seed and other identities too; the right factors are common."""
        _, (left,), right = _problem("gaussian", (3, 2, 2), 2, 60, 20)
        weights = jax.random.normal(jax.random.key(1), (2, 3, 3, 2, 2))
        keys = left.key + jnp.arange(3, dtype=jnp.uint32)[:, None]
        ids = left.ids + 5 * jnp.arange(3, dtype=jnp.uint32)[:, None, None]

        def one(implementation, weights, key, ids):
            mine = dataclasses.replace(left, key=key, ids=ids)
            return es_update.update(weights, mine, right, implementation=implementation)

        both = jax.vmap(jax.vmap(functools.partial(one, kernel)), (0, None, None))
        with dispatch.mode("interpret"):
            program = str(jax.make_jaxpr(both)(weights, keys, ids))
        assert program.count("pallas_call[") + program.count("mpmd_map[") == 1
        got = harness.run(kernel, jax.jit(both), weights, keys, ids)
        assert got.shape == (2, 3, 1, 60, 20)
        for a in range(2):
            for b in range(3):
                mine = dataclasses.replace(left, key=keys[b], ids=ids[b])
                _assert_close(kernel, got[a, b], weights[a, b], _stored([mine]), _stored(right))


@pytest.mark.parametrize("kernel", harness.KERNELS)
@pytest.mark.parametrize(
    ("size", "population"), [(4096, (2048, 1, 1)), (8192, (1, 64, 64))], ids=["independent", "crossed"]
)
@pytest.mark.parametrize("kind", ["stored", *KINDS])
def test_lowers_at_sizes_of_real_models(kernel, size, population, kind):
    if kernel == "pallas_gpu" and kind == "gaussian":
        pytest.skip("drawn before the kernel: the stored case")
    blocks, rows, columns = population
    shape = jax.ShapeDtypeStruct

    def factor(members, role):
        if kind == "stored":
            return shape((blocks, members, 1, 1, size), jnp.float32)
        key, ids = shape((4,), jnp.uint32), shape((blocks, members), jnp.uint32)
        return noise_bits.Generated(key, ids, 0, role, kind, 1, size)

    harness.lowered(
        kernel,
        functools.partial(es_update.update, implementation=kernel),
        shape(population, jnp.float32),
        factor(rows, noise.LEFT),
        factor(columns, noise.RIGHT),
    )


@pytest.mark.parametrize("kernel", harness.KERNELS)
def test_lowers_in_a_scan_over_generations(kernel):
    weights, (left,), (right,) = _problem("gaussian", (6, 1, 1), 2, 512, 1024)

    def generation(total, number):
        now = [dataclasses.replace(f, key=f.key.at[3].set(number)) for f in (left, right)]
        return total + es_update.update(weights, *now, implementation=kernel), None

    harness.lowered(
        kernel,
        lambda numbers: jax.lax.scan(generation, jnp.zeros((1, 512, 1024)), numbers)[0],
        jax.ShapeDtypeStruct((3,), jnp.uint32),
    )


@pytest.mark.parametrize(("kind", "rank"), [("gaussian", 1), ("rademacher", 3)])
def test_an_address_is_what_the_forward_pass_draws(kind, rank):
    leaf = noise.Leaf("layers/kernel", (2, 600, 40), jnp.float32, "sio")
    key = jnp.array([5, 2**31 + 9, leaf.hash, 77], jnp.uint32)
    ids = jnp.array([[4, 0], [9, 2**20]], jnp.uint32)
    requests = [(leaf, noise.LEFT), (leaf, noise.RIGHT)]
    drawn = jax.jit(lambda key: noise.draw(requests, key, ids, rank, kind))((key[0], key[1], key[3]))
    for (_, role), numbers, size in zip(requests, drawn, (40, 600), strict=True):
        address = [noise_bits.Generated(key, ids, layer, role, kind, rank, size) for layer in range(2)]
        np.testing.assert_array_equal(_stored(address), numbers)


class TestDispatch:
    def test_addresses_are_drawn_by_the_reference(self):
        weights, left, right = _problem("rademacher", (7, 1, 1), 3, 160, 130, layers=2)
        expected = es_update.update(weights, _stored(left), _stored(right), implementation="reference")
        np.testing.assert_array_equal(jax.jit(es_update.update)(weights, left, right), expected)
        alone = jax.jit(es_update.update)(weights, left[0], _stored(right)[:, :, :1])
        np.testing.assert_array_equal(alone, expected[:1])

    @pytest.mark.parametrize("kernel", harness.KERNELS)
    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU answers")
    def test_a_kernel_named_on_a_cpu(self, kernel):
        weights, left, right = _problem("gaussian", (2, 1, 1), 1, 8, 8)
        with pytest.raises(ValueError, match=f"es_update of .* cannot run as '{kernel}': the device is cpu"):
            es_update.update(weights, left, right, implementation=kernel)

    @pytest.mark.parametrize("kernel", harness.KERNELS)
    def test_what_no_kernel_serves(self, kernel):
        weights, left, right = _problem("gaussian", (2, 1, 1), 1, 8, 8)
        half = [x.astype(jnp.bfloat16) for x in (weights, _stored(left), _stored(right))]
        with dispatch.mode("lower"):
            with pytest.raises(ValueError, match="bfloat16 cannot run as .* it takes float32"):
                es_update.update(*half, implementation=kernel)
            with pytest.raises(ValueError, match="nothing to sum"):
                es_update.update(*(x[:0] for x in (weights, _stored(left), _stored(right))), implementation=kernel)

    def test_bad_addresses(self):
        weights, left, right = _problem("gaussian", (2, 3, 2), 2, 5, 7, layers=2)
        with pytest.raises(ValueError, match="all of one shape"):
            es_update.update(weights, [left[0], right[0]], right)
        with pytest.raises(ValueError, match="at least one"):
            es_update.update(weights, [], right)
        with pytest.raises(ValueError, match=r"weights \[G, P, Q\]"):
            es_update.update(weights, left[:1], right)
        with pytest.raises(ValueError, match=r"weights \[G, P, Q\]"):
            es_update.update(weights, dataclasses.replace(left[0], ids=left[0].ids[0]), right[0])
        with pytest.raises(ValueError, match="implementation is one of"):
            es_update.update(weights, left, right, implementation="fast")
