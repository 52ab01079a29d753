"""Presets against published sizes; nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import pytest

from rl.models.presets import PRESETS, make, preset


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def rwkv7_parameters(width, layers, vocab, decay, rate, value, gate):
    """The paper's own count: 2 D V + 4 D + L D (12 D + 2 (d_w + d_a + d_v + d_g) + 19) - (2 D d_v + D)."""
    layer = width * (12 * width + 2 * (decay + rate + value + gate) + 19)
    return 2 * width * vocab + 4 * width + layers * layer - (2 * width * value + width)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stories260K", 260_032),
        # embedding 151936 w; per layer q and o 2 w 2048, k and v 2 w 1024, MLP 3 w 3 w, norms 2 w + 2 * 128; final norm w
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("rwkv7-0.1b", 191_034_624),
    ],
)
def test_parameter_counts(name, expected):
    model = make(preset(name))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert count(shapes) == expected
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(model.config.dtype)}
    c = model.config
    if name.startswith("qwen3"):
        layer = 2 * c.width * 2048 + 2 * c.width * 1024 + 9 * c.width**2 + 2 * c.width + 256
        assert expected == 151_936 * c.width + 28 * layer + c.width
    if name.startswith("rwkv7"):
        ranks = (c.decay_rank, c.rate_rank, c.value_rank, c.gate_rank)
        assert expected == rwkv7_parameters(c.width, c.layers, c.vocab, *ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-0.6b", "rwkv7-0.1b"])
def test_published_sizes_run_in_both_layouts(name):
    """Traced, not run: one cached step of the published size, layers scanned and not."""
    for scan_layers in (False, True):
        model = make(preset(name, scan_layers=scan_layers))
        params = jax.eval_shape(model.init, jax.random.key(0))
        cache = jax.eval_shape(lambda model=model: model.empty(128))
        hidden, new = jax.eval_shape(model.forward, params, jax.ShapeDtypeStruct((1,), jnp.int32), cache, 5, 1)
        assert (hidden.shape, hidden.dtype) == ((1, model.config.width), jnp.bfloat16)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
        logits = jax.eval_shape(model.head, params, hidden)
        assert (logits.shape, logits.dtype) == ((1, model.config.vocab), jnp.float32)


@pytest.mark.slow
def test_every_preset_can_be_changed_and_made():
    for name in PRESETS:
        assert make(preset(name, vocab=8)).config.vocab == 8
    with pytest.raises(TypeError, match="depth"):
        preset("tiny-rwkv7", depth=3)
