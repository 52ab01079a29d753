"""Several sequences in one row: each is as if it were alone, whatever stands beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models import attention
from rl.models.language import segment_positions
from rl.models.presets import make
from rl.models.rope import Rope
from tests.rl.models.tiny import ALL, SHAPES, VOCAB, close, prepared

# 5, 1, 7 and 2 tokens, and padding between and after; chunks of RWKV are 4 tokens long here
places = np.array([4, 4, 4, 4, 4, 0, 2, 2, 2, 2, 2, 2, 2, -1, 3, 3, -1, -1])
tokens = np.random.default_rng(5).integers(0, VOCAB, len(places)).astype(np.int32)
LAYOUTS = pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])


def packed(model):
    return jax.jit(lambda params, ids, segments: model.forward(params, ids, segments=segments)[0])


def alone(model):
    """A segment by itself, as [18, width] of which the first rows count."""
    run = jax.jit(lambda params, ids, count: model.forward(params, ids, None, 0, count)[0])

    def one(params, segment):
        own = tokens[places == segment]
        return run(params, np.pad(own, (0, len(tokens) - len(own))), len(own))[: len(own)]

    return one


@pytest.mark.parametrize(
    ("name", "scan_layers"), [(name, bool(i % 2)) for i, name in enumerate(ALL)], ids=lambda value: str(value)
)
def test_every_segment_is_what_it_is_alone(name, scan_layers):
    if name == "mixed" and scan_layers:
        pytest.skip("layers that differ are not scanned")
    with jax.enable_x64(True):
        model, params, _ = prepared(name, scan_layers, "float64")
        hidden = packed(model)(params, tokens, places)
        single = alone(model)
        for segment in (4, 0, 2, 3):
            close(hidden[places == segment], single(params, segment), 1e-12)


@pytest.mark.parametrize("name", ["qwen3", "moe", "rwkv7"])
def test_a_segment_sees_nothing_of_the_others_nor_of_padding(name):
    model, params, _ = prepared(name)
    run = packed(model)
    hidden = run(params, tokens, places)
    for segment in (4, 0, 2, 3):
        other = np.where(places == segment, tokens, (tokens + 1) % VOCAB)
        np.testing.assert_array_equal(run(params, other, places)[places == segment], hidden[places == segment])
    # and no gradient reaches them: tokens 0 .. 5 stand only in segments whose loss is not taken
    ids = np.where(places == 2, tokens % (VOCAB - 6) + 6, tokens % 6)
    loss = lambda params: jnp.sum(
        jnp.where(places[:, None] == 2, model.forward(params, ids, segments=places)[0], 0) ** 2
    )
    gradient = jax.jit(jax.grad(loss))(params)
    embedding = np.asarray(gradient["embed"]["embedding"])
    assert (embedding[:6] == 0).all() and (np.abs(embedding[ids[places == 2]]).max(axis=1) > 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "rwkv7"])
def test_gradients_are_the_sum_of_those_of_each_segment_alone(name):
    with jax.enable_x64(True):
        model, params, _ = prepared(name, dtype="float64")
        value = lambda real, hidden: jnp.sum(jnp.where(real[:, None], jnp.sin(3 * hidden), 0))
        together = lambda p: value(jnp.asarray(places >= 0), model.forward(p, tokens, segments=places)[0])
        lengths = jnp.array([5, 1, 7, 2])
        rows = jnp.stack([jnp.roll(jnp.asarray(tokens), -start) for start in (0, 5, 6, 14)])
        one = lambda p, row, n: value(jnp.arange(len(row)) < n, model.forward(p, row, None, 0, n)[0])
        apart = lambda p: jax.vmap(lambda row, n: one(p, row, n))(rows, lengths).sum()
        jax.tree.map(lambda a, b: close(a, b, 1e-11), *(jax.jit(jax.grad(f))(params) for f in (together, apart)))


@pytest.mark.parametrize("name", ["qwen3", "rwkv7"])
def test_rows_by_vmap_and_bf16(name):
    model, params, _ = prepared(name)
    rows, segments = jnp.stack([tokens, tokens[::-1]]), jnp.stack([places, places[::-1]])
    both = jax.jit(jax.vmap(lambda ids, segments: model.forward(params, ids, segments=segments)[0]))(rows, segments)
    close(both[1], packed(model)(params, rows[1], segments[1]))
    half, rounded, _ = prepared(name, dtype="bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    got, expected = packed(half)(rounded, tokens, places), packed(model)(wide, tokens, places)
    assert got.dtype == jnp.bfloat16
    gap = np.abs(np.asarray(got, np.float32) - np.asarray(expected))[places >= 0]
    assert 1e-5 < gap.mean() < 0.05 * np.abs(expected).mean() + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("block", [4, 5])
def test_blocks_of_queries_change_nothing(block, monkeypatch):
    monkeypatch.setattr(attention, "_CPU_BLOCK", block)
    monkeypatch.setattr(attention, "_BLOCK", block)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((18, 4, 6), (2, 6, 18), (2, 6, 18)))
    first = jnp.array([0, 0, 0, 0, 0, 5, 6, 6, 6, 6, 6, 6, 6, 13, 14, 14, 16, 16])
    for starts, count in ((np.zeros(18, int), 18), (np.zeros(18, int), 7), (first, 18)):

        def plain(q, k, v, starts=starts, count=count):
            """All scores at once."""
            keys = np.arange(18)
            seen = (keys <= keys[:, None]) & (keys >= np.asarray(starts)[:, None]) & (keys < count)
            scores = jnp.einsum("lgrd,gdt->grlt", q.reshape(18, 2, 2, 6), k) / np.sqrt(6)
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
            return jnp.einsum("grlt,gdt->lgrd", weights, v).reshape(18, 4, 6)

        blocks = lambda q, k, v, starts=starts, count=count: attention.attend_whole(q, k, v, count, jnp.asarray(starts))
        value = lambda f, count=count: lambda *parts: jnp.sum(jnp.sin(2 * f(*parts)[:count]))
        np.testing.assert_allclose(blocks(q, k, v)[:count], plain(q, k, v)[:count], atol=2e-6)
        for got, expected in zip(
            *(jax.jit(jax.grad(value(f), (0, 1, 2)))(q, k, v) for f in (blocks, plain)), strict=True
        ):
            np.testing.assert_allclose(got, expected, atol=5e-6)
        poisoned = v.at[..., count:].set(jnp.nan)
        np.testing.assert_array_equal(blocks(q, k, poisoned)[:count], blocks(q, k, v)[:count])


def test_positions_restart_in_every_segment():
    expected = [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 0, 1]
    np.testing.assert_array_equal(segment_positions(jnp.asarray(places)), expected)


@pytest.mark.parametrize("name", ["qwen3", "rwkv7"])
def test_bad_input(name):
    model, params, _ = prepared(name)
    with pytest.raises(ValueError, match=r"one number per token, \(18,\); got shape \(4,\)"):
        model.forward(params, tokens, segments=places[:4])
    with pytest.raises(ValueError, match="packed rows have no cache"):
        model.forward(params, tokens, model.empty(20), segments=places)


@pytest.mark.slow
def test_rows_beyond_a_dynamic_rotary_embedding_are_refused():
    config = dataclasses.replace(SHAPES["llama"], rope=Rope("dynamic", factor=2.0), max_length=18)
    model = make(config)
    params = model.init(jax.random.key(0))
    hidden = packed(model)(params, tokens, places)
    close(hidden[places == 2], alone(model)(params, 2))
    short = make(dataclasses.replace(config, max_length=17))
    with pytest.raises(ValueError, match="must fit the model's 17 tokens.*got 18"):
        short.forward(params, tokens, segments=places)
