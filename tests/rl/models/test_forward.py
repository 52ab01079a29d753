"""The one forward: with a cache, without, padded, stacked, in bf16 and f64, for every kind of model."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.language import stack_layers, unstack_layers
from rl.models.presets import make, preset
from rl.models.rope import Rope
from tests.rl.models.tiny import MIXED, SHAPES, VOCAB, close, forward, prepared, trees_close

LENGTH, ROOM = 13, 20
_COPIES = re.compile(r"\[([\d,]*)\]\S* copy\(")
LAYOUTS = pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])


@pytest.mark.parametrize(
    ("name", "scan_layers"), [*((name, True) for name in SHAPES), ("moe", False), ("rwkv7", False)]
)
def test_cached_decoding_equals_teacher_forcing_at_every_position(name, scan_layers):
    model, params, ids = prepared(name, scan_layers)
    run = forward(model)
    whole, none = run(params, ids)
    assert none is None and np.abs(model.head(params, whole)).max() > 0.5
    for prompt in (1, 5, 12):
        hidden, cache = run(params, ids, model.empty(ROOM), 0, prompt)
        rows = [hidden[:prompt]]
        for i in range(prompt, LENGTH):
            hidden, cache = run(params, ids[i : i + 1], cache, i, 1)
            rows.append(hidden)
        close(jnp.concatenate(rows), whole)
    # and a second piece of several tokens, padded
    _, cache = run(params, ids, model.empty(ROOM), 0, 5)
    second, _ = run(params, jnp.roll(ids, -5), cache, 5, LENGTH - 5)
    close(second[: LENGTH - 5], whole[5:])


@LAYOUTS
@pytest.mark.parametrize("name", SHAPES)
def test_padding_leaves_no_trace(name, scan_layers):
    model, params, ids = prepared(name, scan_layers)
    run = forward(model)
    other = ids.at[7:].set((ids[7:] + 1) % VOCAB)
    rows, cache = run(params, ids, model.empty(ROOM), 0, 7)
    same, cache_same = run(params, other, model.empty(ROOM), 0, 7)
    np.testing.assert_array_equal(rows[:7], same[:7])
    jax.tree.map(np.testing.assert_array_equal, cache, cache_same)
    close(rows[:7], run(params, ids)[0][:7])
    # rows past the cache's end are dropped, not moved: 13 entries from position 19 on, of a cache of 20
    _, nearly = run(params, ids, cache, 7, 12)
    last, _ = run(params, ids, nearly, 19, 1)
    close(last[:1], run(params, ids[:1], nearly, 19, 1)[0])
    # nothing but padding changes nothing at all: a finished slot
    for tokens in (ids[:1], ids):
        jax.tree.map(np.testing.assert_array_equal, run(params, tokens, cache, 7, 0)[1], cache)


@LAYOUTS
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_nan_beyond_the_position_is_harmless(name, scan_layers):
    model, params, ids = prepared(name, scan_layers)
    run = forward(model)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), model.empty(ROOM))
    clean, cache = run(params, ids, model.empty(ROOM), 0, 6)
    rows, bad = run(params, ids, poisoned, 0, 6)
    np.testing.assert_array_equal(rows[:6], clean[:6])
    np.testing.assert_array_equal(run(params, ids[6:7], bad, 6, 1)[0], run(params, ids[6:7], cache, 6, 1)[0])
    # a free slot decodes garbage, but finite garbage
    assert np.isfinite(run(params, ids[:1], poisoned, 0, 0)[0]).all()


@pytest.mark.parametrize("name", SHAPES)
def test_stacked_layers_change_nothing(name):
    scanned, stacked, ids = prepared(name, scan_layers=True)
    model = prepared(name)[0]
    params = unstack_layers(stacked)
    if name == "rwkv7":  # the stack has value-mixing weights in layer 0, which nothing depends on
        for letter in ("v0", "v1", "v2"):
            del params["layer_0"]["time"][letter]
    else:
        jax.tree.map(np.testing.assert_array_equal, stack_layers(params), stacked)
    assert jax.tree.structure(params) == jax.tree.structure(prepared(name)[1])
    close(forward(model)(params, ids)[0], forward(scanned)(stacked, ids)[0])
    hidden, cache = forward(model)(params, ids, model.empty(ROOM), 0, 9)
    same, stacked_cache = forward(scanned)(stacked, ids, scanned.empty(ROOM), 0, 9)
    close(hidden[:9], same[:9])
    trees_close(jax.tree.map(lambda *xs: jnp.stack(xs), *cache), stacked_cache)


@pytest.mark.parametrize(("name", "scan_layers"), [("qwen3", False), ("moe", True), ("rwkv7", True)])
def test_bf16_is_f32_with_fewer_digits(name, scan_layers):
    half, rounded, ids = prepared(name, scan_layers, "bfloat16")
    model = prepared(name, scan_layers)[0]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    forced = {"experts": half.routed(rounded, ids)[2]} if half.routed else {}  # a router's tie may fall either way
    hidden, cache = forward(half)(rounded, ids, half.empty(ROOM), 0, LENGTH, **forced)
    answer = half.head(rounded, hidden)
    assert hidden.dtype == jnp.bfloat16 and answer.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("float32" if name == "rwkv7" else "bfloat16")}
    logp = lambda x: np.asarray(jax.nn.log_softmax(x))
    gap = np.abs(logp(answer) - logp(model.head(wide, forward(model)(wide, ids, **forced)[0])))
    assert 1e-5 < gap.mean() < 0.05, gap.mean()


@pytest.mark.parametrize("name", ["qwen3", "rwkv7"])
def test_f64_decodes_to_f64_digits_and_needs_x64(name):
    config = dataclasses.replace(SHAPES[name], dtype="float64")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        make(config)
    with jax.enable_x64(True):
        model, params, ids = prepared(name, dtype="float64")
        run = forward(model)
        whole, _ = run(params, ids)
        assert whole.dtype == jnp.float64 and model.head(params, whole).dtype == jnp.float64
        _, cache = run(params, ids, model.empty(ROOM), 0, 9)
        # rotations are f32, the same ones in both
        close(run(params, ids[9:10], cache, 9, 1)[0][0], whole[9], 1e-13)


@pytest.mark.parametrize("name", ["qwen3", "moe", "rwkv7"])
def test_batches_by_vmap_equal_single_sequences_at_their_own_positions(name):
    model, params, ids = prepared(name)
    lengths = jnp.array([1, 4, 7])
    batch = jnp.stack([ids, jnp.roll(ids, 1), jnp.roll(ids, 2)])
    caches = jax.tree.map(lambda x: jnp.stack([x] * 3), model.empty(ROOM))
    _, caches = jax.jit(jax.vmap(lambda ids, cache, n: model.forward(params, ids, cache, 0, n)))(batch, caches, lengths)
    step = jax.jit(jax.vmap(lambda token, cache, n: model.forward(params, token[None], cache, n, 1)))
    rows, _ = step(batch[jnp.arange(3), lengths], caches, lengths)
    for i, n in enumerate(lengths.tolist()):
        close(rows[i, 0], forward(model)(params, batch[i])[0][n])


@pytest.mark.parametrize(("name", "scan_layers"), [("qwen3", False), ("moe", True), ("rwkv7", False), ("rwkv7", True)])
def test_gradients_are_finite_and_ignore_padding(name, scan_layers):
    model, params, ids = prepared(name, scan_layers)

    def loss(params, ids):
        logp = jax.nn.log_softmax(model.head(params, model.forward(params, ids, None, 0, 8)[0]))
        return jnp.take_along_axis(logp[:7], ids[1:8, None], -1).sum()

    grad = jax.jit(jax.grad(loss))
    one, other = grad(params, ids), grad(params, ids.at[8:].set(0))
    trees_close(one, other, 1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one))
    assert sum(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(one)) >= 0.9 * len(jax.tree.leaves(one))


@pytest.mark.parametrize("name", ["qwen3", "rwkv7"])
def test_an_untrained_model_starts_near_uniform_and_with_small_additions(name):
    model = make(dataclasses.replace(SHAPES[name], width=48))
    params = model.init(jax.random.key(0))
    logits = model.head(params, forward(model)(params, jnp.arange(LENGTH))[0])
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1)
    assert (entropy > (0.99 if name == "qwen3" else 0.7) * np.log(VOCAB)).all(), entropy
    out, query = (
        (("attention", "out"), ("attention", "query")) if name == "qwen3" else (("time", "output"), ("time", "key"))
    )
    spread = lambda path: (
        np.asarray(params["layer_0"][path[0]][path[1]]["kernel"]).std()
        * np.sqrt(params["layer_0"][path[0]][path[1]]["kernel"].shape[0])
    )
    np.testing.assert_allclose([spread(query), spread(out)], [1.0, 0.5], rtol=0.1)  # 1 / sqrt(2 layers) of 2


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
    routed = jax.jit(model.routed)
    hidden, _, chosen = routed(params, ids)
    chosen = np.asarray(chosen)
    assert chosen.shape == (model.config.layers, LENGTH, 2)
    assert [bool((rows == -1).all()) for rows in chosen] == [not model.config.sparse(i) for i in range(len(chosen))]
    close(forward(model)(params, ids, experts=chosen)[0], hidden, 1e-6)
    # decoding with the ids of each position
    first, cache, _ = routed(params, ids, model.empty(ROOM), 0, 5, chosen)
    second, _, again = routed(params, ids[5:6], cache, 5, 1, chosen[:, 5:6])
    close(jnp.concatenate([first[:5], second]), hidden[:6])
    np.testing.assert_array_equal(again, chosen[:, 5:6])
    other, _, used = routed(params, ids, experts=(chosen + 1) % 5)
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


@LAYOUTS
def test_a_decode_step_makes_nothing_quadratic_in_the_cache(scan_layers):
    room = 97
    model, params, ids = prepared("qwen3", scan_layers)
    step = lambda cache, n: model.forward(params, ids[:1], cache, n, 1)
    seen = list(shapes_in(jax.make_jaxpr(step)(model.empty(room), 3).jaxpr))
    assert any(room in shape for shape in seen)
    assert not [shape for shape in seen if shape.count(room) > 1]


@pytest.mark.optimised
@LAYOUTS
def test_the_cache_is_updated_in_place(scan_layers):
    """A donated cache is the step's output, and a compiled decode step copies at most half of it, scanned none."""
    model, params, ids = prepared("qwen3", scan_layers)

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
    copied = [math.prod(map(int, shape.split(","))) for shape in _COPIES.findall(compiled.as_text()) if shape]
    large = sum(elements for elements in copied if elements >= room)
    assert large == 0 if scan_layers else large <= size / 4 / 2, copied
    assert memory.temp_size_in_bytes < size, memory


def test_make_returns_one_object_per_configuration():
    assert make(SHAPES["llama"]) is make(dataclasses.replace(SHAPES["llama"]))
    assert hash(make(SHAPES["rwkv7"]).config)


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: dataclasses.replace(SHAPES["llama"], kv_heads=3), ValueError, "multiple of kv_heads; got 4 and 3"),
        (lambda: dataclasses.replace(SHAPES["llama"], head_dim=5), ValueError, "even.*got 5"),
        (lambda: dataclasses.replace(SHAPES["llama"], dtype="float16"), ValueError, "float16"),
        (lambda: dataclasses.replace(SHAPES["moe"], experts_per_token=6), ValueError, "got 6 of 5"),
        (lambda: dataclasses.replace(MIXED, scan_layers=True), ValueError, r"layers \[1\] have no experts"),
        (lambda: Rope("longrope"), ValueError, "'default', 'linear'.*got 'longrope'"),
        (lambda: preset("tiny-rwkv7", chunk=65), ValueError, "1 to 64.*got 65"),
        (lambda: preset("tiny-rwkv7", head_dim=7), ValueError, "multiple of head_dim; got 48 and 7"),
        (lambda: preset("tiny-rwkv7", dtype="int8"), ValueError, "int8"),
        (lambda: preset("gpt"), ValueError, "preset must be one of .*'tiny-moe'.*got 'gpt'"),
        (lambda: make({}), TypeError, "got dict"),
        (lambda: stack_layers({"layer_0": {"a": jnp.ones(1)}, "layer_1": {}}), ValueError, "layer_1 differs"),
        (lambda: stack_layers({"norm": {}}), ValueError, r"no 'layer_0'.*\['norm'\]"),
    ],
)
def test_bad_settings(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()
