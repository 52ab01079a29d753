"""RWKV-7 against a step-by-step NumPy twin and closed forms; chunks, padding and splits of a sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models import delta, rwkv7
from rl.models.presets import make
from tests.rl.models.tiny import close, forward, prepared, trees_close

LENGTH = 13


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(p, x, groups=1, epsilon=1e-5):
    parts = x.reshape(groups, -1)
    parts = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + epsilon)
    return parts.reshape(-1) * p["scale"] + p["bias"]


def rwkv_numpy(config, params, ids):
    """Logits [L, vocab] in f64, one token, one layer and one head at a time, written from the card's formulas."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layers = [p[f"layer_{i}"] for i in range(config.layers)]
    zeros = lambda: np.zeros(config.width)
    memory = [
        {"time": zeros(), "channel": zeros(), "M": np.zeros((config.heads, config.head_dim, config.head_dim))}
        for _ in layers
    ]
    out = []
    for token in ids:
        x = norm(p["norm0"], p["embed"]["embedding"][token])
        v_first = None
        for i, (layer, past) in enumerate(zip(layers, memory, strict=True)):
            normed = norm(layer["norm1"], x)
            added, v_first = time_mix(config, layer["time"], normed, past, v_first, i)
            x = x + added
            normed = norm(layer["norm2"], x)
            mixed = normed + (past["channel"] - normed) * layer["channel"]["x_k"]
            past["channel"] = normed
            x = x + np.maximum(mixed @ layer["channel"]["key"]["kernel"], 0) ** 2 @ layer["channel"]["value"]["kernel"]
        out.append(norm(p["norm"], x) @ p["head"]["kernel"])
    return np.array(out)


def time_mix(config, p, x, past, v_first, index):
    z = {name: x + (past["time"] - x) * p[f"x_{name}"] for name in "rwkvag"}
    past["time"] = x
    r, k, v = z["r"] @ p["receptance"]["kernel"], z["k"] @ p["key"]["kernel"], z["v"] @ p["value"]["kernel"]
    pre = p["w0"] + np.tanh(z["w"] @ p["w1"]) @ p["w2"]
    w = np.exp(-np.exp(-np.log1p(np.exp(-pre)) - 0.5))
    a = sigmoid(p["a0"] + z["a"] @ p["a1"] @ p["a2"])
    g = sigmoid(z["g"] @ p["g1"]) @ p["g2"]
    if index == 0:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(p["v0"] + z["v"] @ p["v1"] @ p["v2"])
    kk = k * p["k_k"]
    k = k * (1 + (a - 1) * p["k_a"])
    o, bonus = np.zeros_like(x), np.zeros_like(x)
    for h in range(config.heads):
        at = slice(h * config.head_dim, (h + 1) * config.head_dim)
        unit = kk[at] / max(np.linalg.norm(kk[at]), 1e-12)
        m = past["M"][h]
        m = m @ np.diag(w[at]) - np.outer(m @ unit, unit * a[at]) + np.outer(v[at], k[at])
        past["M"][h] = m
        o[at] = m @ r[at]
        bonus[at] = (r[at] * k[at] * p["r_k"][h]).sum() * v[at]
    o = norm(p["norm"], o, config.heads, 64e-5) + bonus
    return (o * g) @ p["output"]["kernel"], v_first


def test_whole_model_equals_a_numpy_twin():
    model, params, ids = prepared("rwkv7")
    expected = rwkv_numpy(model.config, params, np.asarray(ids))
    assert expected.std() > 0.3
    close(model.head(params, forward(model)(params, ids)[0]), expected)


def inputs(length, heads=2, size=5, decay=(0.55, 1.0), seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.normal(size=(length, heads, size)), jnp.float32)
    kk = draw()
    kk = kk / jnp.linalg.norm(kk, axis=-1, keepdims=True)
    a = jnp.asarray(rng.uniform(size=(length, heads, size)), jnp.float32)
    w = jnp.asarray(rng.uniform(*decay, size=(length, heads, size)), jnp.float32)
    state = jnp.asarray(rng.normal(size=(heads, size, size)), jnp.float32)
    return state, (draw(), w, draw(), draw(), kk, kk * a)


@jax.jit
def recurrent(state, pieces):
    return jax.lax.scan(lambda state, piece: delta.step(state, *piece), state, pieces)


@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (4, 4), (11, 1), (11, 4), (11, 16), (64, 32), (150, 64)])
def test_chunked_equals_recurrent(length, chunk):
    state, pieces = inputs(length)
    expected_state, expected = recurrent(state, pieces)
    final, o = jax.jit(delta.chunked, static_argnames="chunk")(state, *pieces, chunk=chunk)
    close(o, expected)
    close(final, expected_state)


def test_the_longest_chunk_survives_the_fastest_decay_in_value_and_gradient():
    """0.5455 to the power 64 is 1e-17; a gradient divides by its square, which must not become 0 in f32."""
    fastest = float(np.exp(-np.exp(-0.5)))
    state, pieces = inputs(delta.MAX_CHUNK, decay=(fastest, fastest + 1e-6))

    def loss(form, state, pieces):
        final, o = form(state, pieces)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(final)), (final, o)

    whole_chunk = lambda state, pieces: delta.chunked(state, *pieces, delta.MAX_CHUNK)
    run = jax.jit(jax.grad(loss, (1, 2), has_aux=True), static_argnums=0)
    gradients, values = run(whole_chunk, state, pieces)
    expected_gradients, expected = run(recurrent, state, pieces)
    trees_close(values, expected)
    trees_close(gradients, expected_gradients)


def test_two_tokens_in_closed_form():
    """a = 0: M = diag-decayed sum; M_2 r = (v_1 k_1^T diag(w_2) + v_2 k_2^T) r, by hand.

    k_1 = (1, 2), v_1 = (3, -1), w_2 = (0.5, 0.75), k_2 = (0, 1), v_2 = (2, 5), r_2 = (4, 8):
    k_1 w_2 r_2 = 1*0.5*4 + 2*0.75*8 = 14 and k_2 r_2 = 8, so o_2 = 14 (3, -1) + 8 (2, 5) = (58, 26); o_1 = (k_1 r_1) v_1.
    """
    one = lambda *rows: jnp.asarray(rows, jnp.float32)[:, None]
    r, w = one((1, 1), (4, 8)), one((0.9, 0.9), (0.5, 0.75))
    k, v, kk = one((1, 2), (0, 1)), one((3, -1), (2, 5)), one((0.6, 0.8), (1, 0))
    state, o = delta.chunked(jnp.zeros((1, 2, 2)), r, w, k, v, kk, jnp.zeros_like(kk), 2)
    close(o[:, 0], [[9, -3], [58, 26]], 1e-6)
    close(state[0], [[1.5, 6.5], [-0.5, 3.5]], 1e-6)  # 3 (.5, 1.5) + 2 (0, 1); -(.5, 1.5) + 5 (0, 1)
    # a = 1 along the stored unit key removes all of what it stored: M_1 = v_1 kk^T, then M_1 (I - kk kk^T) = 0
    unit = one((0.6, 0.8), (0.6, 0.8))
    off, still = jnp.array([1.0, 0.0])[:, None, None], jnp.ones_like(unit)
    state, o = delta.chunked(jnp.zeros((1, 2, 2)), r, still, unit * off, v * off, unit, unit * (1 - off), 2)
    close(o[1, 0], [0, 0], 1e-6)
    close(state, jnp.zeros((1, 2, 2)), 1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 32, 64])
def test_the_chunk_size_changes_no_number(chunk):
    model, params, ids = prepared("rwkv7")
    other = make(dataclasses.replace(model.config, chunk=chunk))
    assert model.config.chunk == 4
    hidden, state = forward(other)(params, ids, other.empty(0), 0, LENGTH)
    expected, expected_state = forward(model)(params, ids, model.empty(0), 0, LENGTH)
    close(hidden, expected)
    trees_close(state, expected_state)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_any_split_into_prefill_and_decode(scan_layers):
    """All splits run through one compiled shape: the pieces are padded."""
    model, params, ids = prepared("rwkv7", scan_layers)
    run = forward(model)
    whole, final = run(params, ids, model.empty(0), 0, LENGTH)
    for split in range(LENGTH + 1):
        first, state = run(params, ids, model.empty(0), 0, split)
        second, state = run(params, jnp.roll(ids, -split), state, split, LENGTH - split)
        close(jnp.concatenate([first[:split], second[: LENGTH - split]]), whole)
        trees_close(state, final)


def test_the_state_has_the_published_size_and_no_length():
    """L (2 C + C S) numbers in f32: 24 layers of 2048 channels in heads of 64 are 13 MB."""
    config = rwkv7.RWKV7Config(vocab=8, layers=24, width=2048, scan_layers=True, dtype="bfloat16")
    for length in (1, 10**9):
        state = jax.eval_shape(lambda length=length: rwkv7.empty(config, length))
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
        assert sum(x.size for x in jax.tree.leaves(state)) == 24 * (2 * 2048 + 2048 * 64)


@pytest.mark.slow
def test_a_key_of_zero_makes_no_nan():
    """|kk| has a floor, in the value and in the gradient."""
    model, params, ids = prepared("rwkv7")
    params = jax.tree.map(lambda x: x, params)
    for layer in ("layer_0", "layer_1"):
        params[layer]["time"]["k_k"] = jnp.zeros_like(params[layer]["time"]["k_k"])
    loss = lambda params: jnp.sum(model.forward(params, ids)[0] ** 2)
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
