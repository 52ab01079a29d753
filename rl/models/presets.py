"""Models from configurations, and configurations by name."""

import dataclasses
import functools

import jax

from rl.models import rwkv7, transformer
from rl.models.language import LanguageModel
from rl.models.rope import Rope
from rl.models.rwkv7 import RWKV7Config
from rl.models.transformer import TransformerConfig

_QWEN3 = {
    "head_dim": 128,
    "max_length": 40960,
    "rope": Rope(theta=1e6),
    "qk_norm": True,
    "vocab": 151936,
    "dtype": "bfloat16",
}
PRESETS: dict[str, TransformerConfig | RWKV7Config] = {
    # Made here, for training from scratch on a CPU; the vocabulary is meant to be replaced by the tokenizer's.
    "tiny-transformer": TransformerConfig(
        vocab=64, layers=3, width=56, hidden=128, heads=4, kv_heads=2, head_dim=14, max_length=512, qk_norm=True, tied=True
    ),
    "micro-transformer": TransformerConfig(
        vocab=16, layers=2, width=32, hidden=64, heads=2, kv_heads=2, head_dim=16, max_length=64, qk_norm=True, tied=True
    ),
    "tiny-moe": TransformerConfig(
        vocab=64, layers=2, width=48, hidden=96, heads=4, kv_heads=2, head_dim=12, max_length=512, qk_norm=True, tied=True,
        experts=4, experts_per_token=2, expert_hidden=48, normalise_experts=True,
    ),
    "tiny-rwkv7": RWKV7Config(vocab=64, layers=3, width=48, head_dim=16, decay_rank=8, rate_rank=8, value_rank=8, gate_rank=8),
    "stories260K": TransformerConfig(
        vocab=512, layers=5, width=64, hidden=172, heads=8, kv_heads=4, head_dim=8, max_length=512, norm_epsilon=1e-5, tied=True
    ),
    "qwen3-0.6b": TransformerConfig(
        layers=28, width=1024, hidden=3072, heads=16, kv_heads=8, tied=True, scan_layers=True, **_QWEN3
    ),
    "qwen3-1.7b": TransformerConfig(
        layers=28, width=2048, hidden=6144, heads=16, kv_heads=8, tied=True, scan_layers=True, **_QWEN3
    ),
    "rwkv7-0.1b": RWKV7Config(
        vocab=65536, layers=12, width=768, decay_rank=64, rate_rank=64, value_rank=32, gate_rank=128, dtype="bfloat16"
    ),
}  # fmt: skip


def preset(name: str, **changes) -> TransformerConfig | RWKV7Config:
    """The configuration of this name, with fields replaced.

    Raises:
        ValueError: an unknown name (lists those there are).
        TypeError: an unknown field.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}; got {name!r}")
    return dataclasses.replace(PRESETS[name], **changes)


def make(config: TransformerConfig | RWKV7Config) -> LanguageModel:
    """The functions of a model; equal configurations give the same object, so nothing recompiles.

    Raises:
        TypeError: not a configuration.
        ValueError: an f64 model where JAX would silently compute in f32.
    """
    if not isinstance(config, TransformerConfig | RWKV7Config):
        raise TypeError(f"a model is made from a TransformerConfig or an RWKV7Config; got {type(config).__name__}")
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("a float64 model needs 64-bit JAX: set jax_enable_x64, or choose dtype 'float32'")
    return _built(config)


@functools.cache
def _built(config: TransformerConfig | RWKV7Config) -> LanguageModel:
    return rwkv7.build(config) if isinstance(config, RWKV7Config) else transformer.build(config)
