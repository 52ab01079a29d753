"""The engine's parts: what is aliased and never copied, free slots, early ends, and settings."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from rl.models.presets import make
from rl.rollout import engine
from rl.rollout.engine import Rows, Settings, doubling
from rl.rollout.sampling import GREEDY
from tests.rl.models.tiny import SHAPES, random_params

SLOTS, T, CHUNK = 4, 16, 3
KINDS = {
    "llama": SHAPES["llama"],
    "qwen3-scan": dataclasses.replace(SHAPES["qwen3"], scan_layers=True),
    "moe": dataclasses.replace(SHAPES["moe"], layers=1),
    "rwkv7": dataclasses.replace(SHAPES["rwkv7"], layers=1),
}
SETTINGS = Settings(slots=SLOTS, length=T, chunk=CHUNK, bucket=8, view=0)
KEY = jax.random.key(2)


@functools.cache
def prepared(kind):
    model = make(KINDS[kind])
    return model, random_params(model, 0.7)


def rows(*entries, slots=SLOTS):
    """(slot, source, token, position, limit, uid) each; mean weights."""
    columns = [np.array(column, np.int32) for column in zip(*entries, strict=True)]
    columns[5] = columns[5].astype(np.uint32)
    return Rows(*columns, np.full(len(entries), -1, np.int32))


def admitted(kind, state=None, entries=((0, 0, 5, 4, 12, 7), (2, 1, 6, 7, 15, 8))):
    """Two sequences of 4 and 7 tokens, in slots 0 and 2."""
    model, params = prepared(kind)
    state = engine.init(model, SETTINGS) if state is None else state
    ids = np.random.default_rng(0).integers(0, 23, (2, 8)).astype(np.int32)
    none = np.full(2, -1, np.int32)
    return engine.admit(model, SETTINGS, params, state, ids, np.array([4, 7], np.int32), none, rows(*entries))[0]


def decode(kind, state, enough=9):
    model, params = prepared(kind)
    return engine.decode(model, SETTINGS, T, params, state, KEY, np.int32(enough))


def poisoned(state, slots):
    """Everything in these slots is as bad as it can be."""
    mask = np.isin(np.arange(SLOTS), slots)

    def hurt(x):
        wide = mask.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(wide, jnp.nan, x)

    bad = lambda x, value: jnp.where(mask, jnp.asarray(value, x.dtype), x)
    return state._replace(
        cache=jax.tree.map(hurt, state.cache), token=bad(state.token, 22), position=bad(state.position, T - 1),
        limit=bad(state.limit, 10**6), uid=bad(state.uid, 9),
    )  # fmt: skip


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_free_slots_full_of_nan_change_nothing_and_are_not_written(kind):
    clean, chunk = decode(kind, admitted(kind))
    assert chunk.count.tolist() == [CHUNK, 0, CHUNK, 0] and np.isfinite(np.asarray(chunk.logp)[:, [0, 2]]).all()
    hurt = poisoned(admitted(kind), [1, 3])
    before = jax.tree.map(np.asarray, hurt)  # before it is donated
    after, got = decode(kind, hurt)
    used = lambda chunk: jax.tree.map(lambda x: np.asarray(x)[..., [0, 2]], chunk)
    equal(used(got), used(chunk))
    for slots, expected in (([0, 2], clean), ([1, 3], before)):
        equal(jax.tree.map(lambda x, s=slots: x[np.array(s)], (after.cache, after.token, after.position)),
              jax.tree.map(lambda x, s=slots: x[np.array(s)], (expected.cache, expected.token, expected.position)))  # fmt: skip
    # rows put into slots that hold NaN beyond their prefill
    others = ((1, 0, 5, 4, 12, 7), (3, 1, 6, 7, 15, 8))
    _, moved = decode(kind, admitted(kind, poisoned(engine.init(prepared(kind)[0], SETTINGS), [0, 1, 2, 3]), others))
    columns = lambda chunk, slots: jax.tree.map(lambda x: np.asarray(x)[..., slots], chunk)
    equal(columns(moved, [1, 3]), columns(chunk, [0, 2]))


def test_padding_rows_go_nowhere():
    state = admitted("llama")
    before = jax.tree.map(np.asarray, state)
    nowhere = ((SLOTS, 0, 9, 3, 8, 1), (SLOTS, 1, 9, 3, 8, 1))
    equal(admitted("llama", state, nowhere), before)


def test_one_prefill_for_several_slots():
    entries = ((3, 1, 6, 7, 15, 8), (0, 1, 6, 7, 15, 8), (1, 1, 6, 7, 15, 9), (2, 1, 6, 7, 15, 8))
    _, chunk = decode("llama", admitted("llama", entries=entries))
    tokens, alone = np.asarray(chunk.tokens), np.asarray(decode("llama", admitted("llama"))[1].tokens)
    assert tokens[:, 0].tolist() == tokens[:, 2].tolist() == tokens[:, 3].tolist() == alone[:, 2].tolist()
    assert tokens[:, 1].tolist() != tokens[:, 0].tolist()  # another request


def test_decoding_ends_early():
    limits = ((0, 0, 5, 4, 5, 7), (2, 1, 6, 7, 15, 8))  # slot 0 has one token left
    _, chunk = decode("llama", admitted("llama", entries=limits), enough=1)
    assert chunk.count.tolist() == [1, 0, 1, 0] and chunk.active.tolist() == [False, False, True, False]
    state, chunk = decode("llama", admitted("llama", entries=limits), enough=2)
    assert chunk.count.tolist() == [1, 0, 3, 0] and state.position.tolist() == [5, 0, 10, 0]
    state, chunk = decode("llama", engine.release(state, np.array([False, True, True, False])))
    assert chunk.count.tolist() == [0] * SLOTS and not chunk.active.any()


def test_released_and_compacted_slots():
    state = admitted("llama")
    before = jax.tree.map(np.asarray, state)
    state = engine.release(state, np.array([True, True, False, False]))
    assert state.active.tolist() == [False, False, True, False]
    equal(state._replace(active=before.active), before)
    small = engine.compact(SETTINGS, state, np.array([2, 1], np.int32))
    equal(small, jax.tree.map(lambda x: np.asarray(x)[[2, 1]], state))
    tokens = decode("llama", admitted("llama"))[1].tokens
    equal(decode("llama", small)[1].tokens[:, 0], tokens[:, 2])


# -- compiled programs -----------------------------------------------------------------------------------------------


def lowered(kind, view=T, weights=None, settings=SETTINGS):
    model, params = prepared(kind)
    state = jax.eval_shape(lambda: engine.init(model, settings))
    weights = params if weights is None else weights
    return engine.decode.lower(model, settings, view, weights, state, KEY, np.int32(1)).compile()


def shapes(text):
    """Element counts of every array in a compiled program."""
    return [math.prod(map(int, dims.split(","))) for dims in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)]


def loops(text):
    """Text of every computation that a while loop of this program runs, with the ones it calls."""
    parts = {m[1]: m[0] for m in re.finditer(r"^%?(\S+) \(.*?^\}", text, re.M | re.S)}
    found, todo = {}, re.findall(r"body=%?([\w.\-]+)", text)
    while todo:
        name = todo.pop()
        if name in parts and name not in found:
            found[name] = parts[name]
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", parts[name])
    return "\n".join(found.values())


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["llama", "qwen3-scan", "rwkv7"])
def test_the_cache_is_updated_in_place(kind):
    model, params = prepared(kind)
    size = engine.cache_bytes(model, SETTINGS)
    compiled = lowered(kind)
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    state = jax.eval_shape(lambda: engine.init(model, SETTINGS))
    ids, two = np.zeros((2, 8), np.int32), np.zeros(2, np.int32)
    entries = rows((0, 0, 5, 4, 12, 7), (2, 1, 6, 7, 15, 8))
    admit = engine.admit.lower(model, SETTINGS, params, state, ids, two, two, entries).compile()
    assert admit.memory_analysis().alias_size_in_bytes >= size
    release = engine.release.lower(state, np.zeros(SLOTS, bool)).compile()
    assert release.memory_analysis().alias_size_in_bytes >= size
    # donated buffers are gone, so nothing can be read from them by mistake
    live = engine.init(model, SETTINGS)
    decode(kind, live)
    assert all(x.is_deleted() for x in jax.tree.leaves(live.cache))


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["llama", "qwen3-scan"])
def test_no_step_copies_the_cache(kind):
    model, _ = prepared(kind)
    leaf = jax.tree.leaves(jax.eval_shape(lambda: engine.init(model, SETTINGS)).cache)[0]
    dims = ",".join(map(str, leaf.shape))
    body = loops(lowered(kind).as_text())
    assert f"f32[{dims}]" in body  # the loop carries it
    copies = [line for line in body.splitlines() if re.search(rf"= f32\[{dims}\]\S* (copy|copy-start)\(", line)]
    assert not copies


@pytest.mark.optimised
def test_no_member_has_a_weight_of_its_own():
    model, params = prepared("llama")
    settings = dataclasses.replace(SETTINGS, slots=96, length=4, bucket=4)
    es = eggroll.strategy(optax.sgd(0.1), population=eggroll.crossed(96), sigma=0.1, rules=model.rules)
    drawn = jax.jit(es.draw)(es.init(params, jax.random.key(0)))
    smallest = 96 * 24 * 12  # slots times the smallest matrix, a key's kernel
    assert max(shapes(lowered("llama", 4, drawn, settings).as_text())) < smallest
    # the same program with materialised members has such arrays, so they would have been seen
    members = jax.vmap(lambda n: n * jnp.ones((24, 12)))(jnp.arange(96.0))
    run = jax.jit(lambda members, x: jnp.einsum("smn,sm->sn", members, x))
    assert max(shapes(run.lower(members, jnp.ones((96, 24))).compile().as_text())) >= smallest


def test_bytes_of_the_cache():
    # keys and values, layers x slots x kv heads x head dim x length x 4 bytes
    assert engine.cache_bytes(prepared("llama")[0], SETTINGS) == 2 * 2 * 4 * 2 * 6 * 16 * 4
    assert engine.cache_bytes(prepared("qwen3-scan")[0], SETTINGS) == 2 * 2 * 4 * 2 * 6 * 16 * 4
    half = make(dataclasses.replace(KINDS["llama"], dtype="bfloat16"))
    assert engine.cache_bytes(half, SETTINGS) == 2 * 2 * 4 * 2 * 6 * 16 * 2
    # two shifts of the width and 3 heads of 8 x 8, whatever the length
    longer = dataclasses.replace(SETTINGS, length=500)
    assert engine.cache_bytes(prepared("rwkv7")[0], longer) == 4 * (2 * 24 + 3 * 8 * 8) * 4


# -- settings --------------------------------------------------------------------------------------------------------


def test_sizes_double():
    assert doubling(4, 32) == (4, 8, 16, 32) and doubling(5, 32) == (5, 10, 20, 32)
    assert doubling(64, 32) == (32,) and doubling(1, 1) == (1,) and doubling(31, 32) == (31, 32)
    settings = Settings(slots=64, length=100, bucket=16, view=32)
    assert settings.buckets == (16, 32, 64, 100) and settings.views == (32, 64, 100)
    assert dataclasses.replace(settings, view=0).views == (100,)
    assert settings.block == 8 and settings.shared == (1, 8)
    assert Settings(slots=1, length=2).block == 1 and Settings(slots=1, length=2).shared == (1,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": 0}, "slots must be at least 1; got 0"),
        ({"slots": 2.0}, "slots must be a whole number; got 2.0"),
        ({"slots": True}, "slots must be a whole number; got True"),
        ({"length": 1}, "length must hold a prompt and a completion, at least 2 tokens; got 1"),
        ({"length": None}, "length must be a whole number; got None"),
        ({"chunk": 0}, "chunk must be at least 1; got 0"),
        ({"bucket": -1}, "bucket must be at least 1; got -1"),
        ({"view": -1}, "view must be at least 1, or 0 for the whole cache; got -1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1; got 0"),
        ({"stop": 3}, "stop must be a tuple of token ids; got 3"),
        ({"stop": [3]}, r"stop must be a tuple of token ids; got \[3\]"),
        ({"stop": ("</s>",)}, r"stop must be a tuple of token ids; got \('</s>',\)"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        Settings(**{"slots": 4, "length": 16, "sampling": GREEDY, **changes})
