"""Tiny models of every kind with seeded weights, and their forward compiled once per test process."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.presets import make, preset
from rl.models.rope import Rope
from rl.models.transformer import TransformerConfig

VOCAB = 23
_BASE = TransformerConfig(
    vocab=VOCAB, layers=2, width=24, hidden=40, heads=4, kv_heads=2, head_dim=6, max_length=64, scan_layers=False
)
SHAPES = {
    "llama": _BASE,
    "one-kv-head": dataclasses.replace(_BASE, kv_heads=1, tied=True, qkv_bias=True, rope=Rope("linear", factor=2.0)),
    "all-heads": dataclasses.replace(_BASE, kv_heads=4, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen3": dataclasses.replace(_BASE, qk_norm=True, tied=True, rope=Rope("yarn", factor=2.0, original_length=8)),
    "moe": dataclasses.replace(
        _BASE, qk_norm=True, experts=5, experts_per_token=2, expert_hidden=12, normalise_experts=True
    ),
    "rwkv7": preset("tiny-rwkv7", vocab=VOCAB, layers=2, width=24, head_dim=8, chunk=4),
}
MIXED = dataclasses.replace(SHAPES["moe"], layers=3, dense_layers=(1,), normalise_experts=False)
ALL = SHAPES | {"mixed": MIXED}


def weight(path, shape, scale=1.0):
    """Seeded by the path: scales near 1, vectors near 0, matrices that keep sizes; no bias is 0 and no scale 1."""
    name = "/".join(key.key for key in path)
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if name.endswith("scale"):
        return 1 + 0.2 * scale * x
    vector = len(shape) - name.startswith("layers/") < 2
    return scale * (0.3 * x if vector else x / np.sqrt(shape[-2]))


def random_params(model, scale=1.0):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaf = lambda path, x: jnp.asarray(weight(path, x.shape, scale), x.dtype)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def prepared(name, scan_layers=False, dtype="float32"):
    """(model, params, ids [13])."""
    model = make(dataclasses.replace(ALL[name], scan_layers=scan_layers, dtype=dtype))
    return model, random_params(model), jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, 13))


@functools.cache
def forward(model):
    """Compiled once per shape; start and count may be numbers."""
    return jax.jit(model.forward)


def close(a, b, tolerance=1e-5):
    """Equal to a tolerance relative to the largest number, or absolute where that is below 1."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)


def trees_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: close(x, y, tolerance), a, b)
