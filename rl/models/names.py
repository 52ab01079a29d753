"""Which tensors of a released checkpoint each parameter is made of."""

import re
from typing import NamedTuple

import jax

from rl.models.language import LanguageModel, Params, layer_names
from rl.models.rwkv7 import RWKV7Config

_PART = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# Modules of one layer, and of the model around them.
_TRANSFORMER = {
    "norm1": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "norm2": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "moe/router": "mlp.gate",
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
_EXPERTS = {"experts_gate": "gate_proj", "experts_up": "up_proj", "experts_down": "down_proj"}
_RWKV = {
    "norm1": "ln1",
    "norm2": "ln2",
    "time/norm": "att.ln_x",
    **{f"time/{name}": f"att.{name}" for name in ("receptance", "key", "value", "output")},
    **{f"channel/{name}": f"ffn.{name}" for name in ("key", "value")},
    "embed": "emb",
    "norm0": "blocks.0.ln0",
    "norm": "ln_out",
    "head": "head",
}
_RWKV_GROUPS = {"time": "att", "channel": "ffn"}
# Present in some released files and used by nothing.
_UNUSED_TRANSFORMER = re.compile(r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
_UNUSED_RWKV = re.compile(r"^blocks\.0\.att\.v[012]$")


class Source(NamedTuple):
    """Where one parameter of a model with unstacked layers comes from.

    Attributes:
        path: its keys.
        names: its tensor, or one per expert, stacked in this order.
        shape: of each tensor in the file.
        transposed: whether the file holds [out, in].
        part: shape of each tensor here.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    part: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the parameter has an axis over experts in front."""
        return self.path[-1] in _EXPERTS

    @property
    def whole(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return (len(self.names), *self.part) if self.stacked else self.part


def sources(model: LanguageModel) -> list[Source]:
    """The sources of every parameter of a model with scan_layers=False."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    of = _rwkv if isinstance(model.config, RWKV7Config) else _transformer
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    return [of(tuple(key.key for key in path), leaf.shape) for path, leaf in flat]


def unused(config, name: str) -> bool:
    """Whether a tensor that no parameter needs is a known leftover."""
    pattern = _UNUSED_RWKV if isinstance(config, RWKV7Config) else _UNUSED_TRANSFORMER
    return pattern.match(name) is not None


def lookup(params: Params, path: tuple[str, ...]):
    """The entry at a path, or None."""
    for key in path:
        if not isinstance(params, dict) or key not in params:
            return None
        params = params[key]
    return params


def nested(entries: dict[tuple[str, ...], object]) -> Params:
    """The nested dict of paths and leaves."""
    out: Params = {}
    for path, leaf in entries.items():
        inner = out
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return out


def _split(path: tuple[str, ...], prefix: str) -> tuple[str, tuple[str, ...]]:
    """(the layer's prefix in the file, the path inside the layer)."""
    if layer_names({path[0]: None}):
        return f"{prefix}.{path[0].split('_')[1]}.", path[1:]
    return "", path


def _transformer(path: tuple[str, ...], shape: tuple[int, ...]) -> Source:
    prefix, inner = _split(path, "model.layers")
    if inner[-1] in _EXPERTS:
        names = tuple(f"{prefix}mlp.experts.{e}.{_EXPERTS[inner[-1]]}.weight" for e in range(shape[0]))
        return Source(path, names, shape[:0:-1], True, shape[1:])
    name = f"{prefix}{_TRANSFORMER['/'.join(inner[:-1])]}.{_PART[inner[-1]]}"
    transposed = inner[-1] == "kernel"
    return Source(path, (name,), shape[::-1] if transposed else shape, transposed, shape)


def _rwkv(path: tuple[str, ...], shape: tuple[int, ...]) -> Source:
    prefix, inner = _split(path, "blocks")
    if inner[-1] in _PART:
        name = f"{prefix}{_RWKV['/'.join(inner[:-1])]}.{_PART[inner[-1]]}"
        transposed = inner[-1] == "kernel"
        return Source(path, (name,), shape[::-1] if transposed else shape, transposed, shape)
    stored = (1, 1, *shape) if len(shape) == 1 else shape
    return Source(path, (f"{prefix}{_RWKV_GROUPS[inner[0]]}.{inner[-1]}",), stored, False, shape)
