"""The one forward: with a cache, without, padded, stacked, in bf16, for every kind of model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.language import stack_layers, unstack_layers
from rl.models.presets import make, preset
from rl.models.rope import Rope
from rl.models.transformer import TransformerConfig

LENGTH, ROOM = 13, 20
_BASE = TransformerConfig(
    vocab=23, layers=3, width=24, hidden=40, heads=4, kv_heads=2, head_dim=6, max_length=64, scan_layers=False
)
SHAPES = {
    "llama": _BASE,
    "one-kv-head": dataclasses.replace(_BASE, kv_heads=1, tied=True),
    "all-heads": dataclasses.replace(_BASE, kv_heads=4, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": dataclasses.replace(_BASE, qkv_bias=True, rope=Rope("linear", factor=2.0)),
    "qwen3": dataclasses.replace(_BASE, qk_norm=True, tied=True, rope=Rope("yarn", factor=2.0, original_length=8)),
    "moe": dataclasses.replace(
        _BASE, qk_norm=True, experts=5, experts_per_token=2, expert_hidden=12, normalise_experts=True
    ),
    "rwkv7": preset("tiny-rwkv7", vocab=23, chunk=4),
}
MIXED = dataclasses.replace(SHAPES["moe"], dense_layers=(1,), normalise_experts=False)
ALL = SHAPES | {"mixed": MIXED}


def random_params(model, scale=0.3):
    """Every parameter away from its start, so that no bias is 0 and no scale 1."""
    params = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape).astype(x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def prepared(name, **changes):
    model = make(dataclasses.replace(ALL[name], **changes))
    return model, random_params(model), jax.random.randint(jax.random.key(2), (LENGTH,), 0, 23)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol, rtol=0)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", SHAPES)
def test_cached_decoding_equals_teacher_forcing_at_every_position(name, scan_layers):
    model, params, ids = prepared(name, scan_layers=scan_layers)
    whole = model.head(params, model.forward(params, ids)[0])
    assert np.abs(whole).max() > 0.5
    forward = jax.jit(model.forward)
    for prompt in (1, 5, 12):
        hidden, cache = forward(params, ids[:prompt], model.empty(ROOM), 0, prompt)
        rows = [hidden]
        for i in range(prompt, LENGTH):
            hidden, cache = forward(params, ids[i : i + 1], cache, i, 1)
            rows.append(hidden)
        close(model.head(params, jnp.concatenate(rows)), whole)
    # and in pieces of several tokens
    first, cache = forward(params, ids[:5], model.empty(ROOM), 0, 5)
    second, _ = forward(params, ids[5:], cache, 5, LENGTH - 5)
    close(model.head(params, jnp.concatenate([first, second])), whole)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", SHAPES)
def test_padding_leaves_no_trace(name, scan_layers):
    model, params, ids = prepared(name, scan_layers=scan_layers)
    padded = jnp.concatenate([ids[:7], jnp.full(6, 22)])
    forward = jax.jit(model.forward)
    exact, cache_exact = forward(params, ids[:7], model.empty(ROOM), 0, 7)
    rows, cache = forward(params, padded, model.empty(ROOM), 0, 7)
    close(rows[:7], exact, 2e-6)
    jax.tree.map(lambda a, b: close(a, b, 5e-6), cache, cache_exact)
    close(forward(params, padded, None, 0, 7)[0][:7], exact, 5e-6)
    # rows past the cache's end are dropped, not moved: the bucket of 13 does not fit behind position 12
    beyond, _ = forward(params, jnp.concatenate([ids[7:9], jnp.zeros(11, jnp.int32)]), cache, 7, 2)
    close(beyond[:2], forward(params, ids[7:9], cache_exact, 7, 2)[0])
    # nothing but padding changes nothing at all: a finished slot
    for tokens in (ids[:1], ids):
        jax.tree.map(np.testing.assert_array_equal, forward(params, tokens, cache, 7, 0)[1], cache)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "rwkv7"])
def test_nan_beyond_the_position_is_harmless(name, scan_layers):
    model, params, ids = prepared(name, scan_layers=scan_layers)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.empty(ROOM))
    clean, cache = model.forward(params, ids[:6], model.empty(ROOM), 0, 6)
    rows, bad = model.forward(params, jnp.concatenate([ids[:6], ids[:3]]), poisoned, 0, 6)
    close(rows[:6], clean, 1e-6)
    close(model.forward(params, ids[6:7], bad, 6, 1)[0], model.forward(params, ids[6:7], cache, 6, 1)[0], 1e-6)
    # a free slot decodes garbage, but finite garbage
    assert np.isfinite(np.asarray(model.forward(params, ids[:1], poisoned, 0, 0)[0])).all()


@pytest.mark.parametrize("name", SHAPES)
def test_stacked_layers_change_nothing(name):
    model, params, ids = prepared(name)
    scanned = make(dataclasses.replace(model.config, scan_layers=True))
    if name == "rwkv7":  # the stack needs value-mixing weights in layer 0: any
        stacked = random_params(scanned)
        params = unstack_layers(stacked)
        for letter in ("v0", "v1", "v2"):
            del params["layer_0"]["time"][letter]
    else:
        stacked = stack_layers(params)
        jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)
    assert jax.tree.structure(stacked) == jax.tree.structure(scanned.init(jax.random.key(0)))
    close(model.forward(params, ids)[0], scanned.forward(stacked, ids)[0], 5e-6)
    hidden, cache = model.forward(params, ids, model.empty(ROOM), 0, 9)
    same, stacked_cache = scanned.forward(stacked, ids, scanned.empty(ROOM), 0, 9)
    close(hidden[:9], same[:9], 5e-6)
    layer_major = jax.tree.map(lambda *xs: jnp.stack(xs), *cache)
    jax.tree.map(lambda a, b: close(a, b, 5e-6), layer_major, stacked_cache)


@pytest.mark.parametrize("name", ALL)
def test_bf16_is_f32_with_fewer_digits(name):
    model, params, ids = prepared(name)
    half = make(dataclasses.replace(model.config, dtype="bfloat16"))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    hidden, cache = half.forward(rounded, ids, half.empty(ROOM), 0, LENGTH)
    answer = half.head(rounded, hidden)
    assert hidden.dtype == jnp.bfloat16 and answer.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("float32" if name == "rwkv7" else "bfloat16")}
    forced = {}
    if half.routed:  # a router's tie may fall either way
        forced["experts"] = half.routed(rounded, ids)[2]
    logp = lambda x: np.asarray(jax.nn.log_softmax(x))
    expected = logp(model.head(wide, model.forward(wide, ids, **forced)[0]))
    gap = np.abs(logp(half.head(rounded, half.forward(rounded, ids, **forced)[0])) - expected)
    assert 1e-5 < gap.mean() < 0.05, gap.mean()


@pytest.mark.parametrize("name", SHAPES)
def test_batches_by_vmap_equal_single_sequences_at_their_own_positions(name):
    model, params, ids = prepared(name)
    lengths = jnp.array([1, 4, 7])
    batch = jnp.stack([ids, jnp.roll(ids, 1), jnp.roll(ids, 2)])
    caches = jax.vmap(lambda _: model.empty(ROOM))(lengths)
    fill = jax.jit(jax.vmap(lambda ids, cache, n: model.forward(params, ids, cache, 0, n)))
    step = jax.jit(jax.vmap(lambda token, cache, n: model.forward(params, token[None], cache, n, 1)))
    _, caches = fill(batch, caches, lengths)
    rows, _ = step(batch[jnp.arange(3), lengths], caches, lengths)
    for i, n in enumerate(lengths.tolist()):
        close(rows[i, 0], model.forward(params, batch[i, : n + 1])[0][n])


def test_gradients_are_finite_and_ignore_padding():
    for name in ALL:
        model, params, ids = prepared(name)

        def loss(params, ids, model=model):
            logp = jax.nn.log_softmax(model.head(params, model.forward(params, ids, None, 0, 8)[0]))
            return jnp.take_along_axis(logp[:7], ids[1:8, None], -1).sum()

        one = jax.grad(loss)(params, ids)
        other = jax.grad(loss)(params, ids.at[8:].set(0))
        jax.tree.map(lambda a, b: close(a, b, 1e-4), one, other)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(one))
        assert sum(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(one)) >= 0.9 * len(jax.tree.leaves(one))


# -- experts ---------------------------------------------------------------------------------------------------------


def experts_numpy(p, x, forced, k, normalise):
    """One token and one expert at a time."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    silu = lambda z: z / (1 + np.exp(-z))
    out, chosen = np.zeros_like(x), []
    for i, token in enumerate(x):
        logits = token @ p["router"]["kernel"]
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        ids = np.argsort(-probability, kind="stable")[:k] if forced is None else forced[i]
        weight = probability[ids] / (probability[ids].sum() if normalise else 1)
        for e, w in zip(ids, weight, strict=True):
            inner = silu(token @ p["experts_gate"][e]) * (token @ p["experts_up"][e])
            out[i] += w * (inner @ p["experts_down"][e])
        chosen.append(ids)
    return out, np.array(chosen)


@pytest.mark.parametrize("normalise", [False, True])
def test_experts_equal_a_loop_over_tokens(normalise):
    from rl.models.experts import Experts

    module = Experts(5, 2, 7, normalise, "float32")
    x = jax.random.normal(jax.random.key(0), (6, 4))
    params = module.init(jax.random.key(1), x)["params"]
    for forced in (None, np.array([[4, 0], [1, 2], [3, 3], [0, 1], [2, 4], [1, 0]])):
        answer, ids = module.apply({"params": params}, x, None if forced is None else jnp.asarray(forced))
        expected, chosen = experts_numpy(params, np.asarray(x, np.float64), forced, 2, normalise)
        np.testing.assert_array_equal(ids, chosen)
        close(answer, expected, 1e-5)


@pytest.mark.parametrize("name", ["moe", "mixed"])
def test_forced_experts_replay_and_change_the_result(name):
    model, params, ids = prepared(name)
    hidden, _, chosen = model.routed(params, ids)
    assert chosen.shape == (3, LENGTH, 2)
    dense = [i for i in range(3) if i in model.config.dense_layers]
    assert (chosen[dense] == -1).all() if dense else (chosen >= 0).all()
    close(model.forward(params, ids, experts=chosen)[0], hidden, 1e-6)
    # decoding with the ids of each position
    first, cache, _ = model.routed(params, ids[:5], model.empty(ROOM), 0, 5, chosen[:, :5])
    second, _, again = model.routed(params, ids[5:6], cache, 5, 1, chosen[:, 5:6])
    close(jnp.concatenate([first, second]), hidden[:6])
    np.testing.assert_array_equal(again, chosen[:, 5:6])
    other, _, used = model.routed(params, ids, experts=(chosen + 1) % 5)
    np.testing.assert_array_equal(used[0], (chosen[0] + 1) % 5)
    assert np.abs(other - hidden).max() > 1e-2


def test_experts_cannot_be_forced_where_there_are_none():
    for name in ("llama", "rwkv7"):
        model, params, ids = prepared(name)
        assert model.routed is None
        with pytest.raises(ValueError, match="this model has none"):
            model.forward(params, ids, experts=jnp.zeros((3, LENGTH, 2), jnp.int32))


# -- cost of a decode step -------------------------------------------------------------------------------------------


def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from shapes_in(inner.jaxpr)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_a_decode_step_makes_nothing_quadratic_in_the_cache(scan_layers):
    room = 97
    model, params, ids = prepared("qwen3", scan_layers=scan_layers)
    step = lambda cache, n: model.forward(params, ids[:1], cache, n, 1)
    seen = list(shapes_in(jax.make_jaxpr(step)(model.empty(room), 3).jaxpr))
    assert any(room in shape for shape in seen)
    assert not [shape for shape in seen if shape.count(room) > 1]


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_the_cache_is_updated_in_place(scan_layers):
    """A donated cache is the step's output, and the compiled decode loop copies no array of a cache's size."""
    model, params, ids = prepared("qwen3", scan_layers=scan_layers)

    def decode(cache, n):
        def step(carry, _):
            cache, n = carry
            hidden, cache = model.forward(params, ids[:1], cache, n, 1)
            return (cache, n + 1), hidden

        return jax.lax.scan(step, (cache, n), None, length=5)

    room = 1009
    cache = model.empty(room)
    compiled = jax.jit(decode, donate_argnums=0).lower(cache, 3).compile()
    memory = compiled.memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    text = compiled.as_text()
    copies = [line for line in text.splitlines() if " copy(" in line and f"{room},2,6]" in line.split(" copy(")[0]]
    layers = (3 if scan_layers else 1) * room * 2 * 6 * 4
    assert not [line for line in copies if scan_layers is False or f"[3,{room},2,6]" in line], copies
    assert memory.temp_size_in_bytes < 3 * layers + size, memory


def test_make_returns_one_object_per_configuration():
    assert make(SHAPES["llama"]) is make(dataclasses.replace(SHAPES["llama"]))
    assert hash(make(SHAPES["rwkv7"]).config)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: dataclasses.replace(_BASE, kv_heads=3), ValueError, "multiple of kv_heads; got 4 and 3"),
        (lambda: dataclasses.replace(_BASE, head_dim=5), ValueError, "even.*got 5"),
        (lambda: dataclasses.replace(_BASE, dtype="float16"), ValueError, "float16"),
        (lambda: dataclasses.replace(SHAPES["moe"], experts_per_token=6), ValueError, "got 6 of 5"),
        (lambda: dataclasses.replace(MIXED, scan_layers=True), ValueError, r"layers \[1\] have no experts"),
        (lambda: Rope("longrope"), ValueError, "'default', 'linear'.*got 'longrope'"),
        (lambda: preset("tiny-rwkv7", chunk=129), ValueError, "1 to 128.*got 129"),
        (lambda: preset("tiny-rwkv7", head_dim=7), ValueError, "multiple of head_dim; got 48 and 7"),
        (lambda: preset("tiny-rwkv7", dtype="int8"), ValueError, "int8"),
        (lambda: preset("gpt"), ValueError, "preset must be one of .*'tiny-moe'.*got 'gpt'"),
        (lambda: make({}), TypeError, "got dict"),
        (lambda: stack_layers({"layer_0": {"a": jnp.ones(1)}, "layer_1": {}}), ValueError, "layer_1 differs"),
    ],
)
def test_bad_settings(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()
