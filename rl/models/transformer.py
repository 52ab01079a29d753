"""Llama, Qwen2, Qwen3 and Qwen3-MoE: one decoder for training, scoring, prefill and decoding, written for one sequence."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rl.models.attention import attend, attend_whole, store
from rl.models.dense import Dense
from rl.models.experts import Experts, check_forced
from rl.models.language import LanguageModel, check_segments, layer_class, segment_positions, stacked_rules
from rl.models.rope import Rope, rotate, rotation
from rl.types import Gather

_DTYPES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and variants.

    Attributes:
        vocab, layers, width: entries, count, residual size.
        hidden: size of the gated MLP silu(gate x) * up x.
        heads, kv_heads, head_dim: query heads share keys and values in groups of heads / kv_heads.
        max_length: context length in tokens that the model was made for (the scaled rotary embeddings read it).
        norm_epsilon: of every RMS norm.
        rope: the rotary embedding.
        qkv_bias, out_bias, mlp_bias: which projections have biases (Llama's attention_bias sets the first two).
        qk_norm: RMS norm of each head's queries and keys before rotation (Qwen3).
        tied: the head is the transposed embedding.
        experts, experts_per_token, expert_hidden: mixture of experts where experts > 0, top-k and size of each.
        normalise_experts: the chosen experts' weights are rescaled to sum to 1.
        dense_layers: layers that keep the plain MLP although experts > 0.
        scan_layers: parameters and cache stacked over layers and one traced layer; else a Python loop.
        remat: gradients make each layer's activations again instead of keeping them: a third more arithmetic, and memory of one
            layer (and of one residual per layer) instead of all. On a CPU only with `scan_layers`: XLA merges the second
            computation of an unrolled layer with the first.
        dtype: of parameters, activations and cache; norms, softmax and logits are at least f32.
    """

    vocab: int
    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int = 2048
    norm_epsilon: float = 1e-6
    rope: Rope = Rope()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_hidden: int = 0
    normalise_experts: bool = False
    dense_layers: tuple[int, ...] = ()
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding; got {self.head_dim}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {list(_DTYPES)}; got {self.dtype!r}")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token must be between 1 and the number of experts; got {self.experts_per_token} of "
                f"{self.experts}"
            )
        if self.scan_layers and self.experts and self.dense_layers:
            raise ValueError(
                f"layers to scan over must be alike; layers {list(self.dense_layers)} have no experts: set "
                "scan_layers=False"
            )

    def sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.experts > 0 and layer not in self.dense_layers


def build(config: TransformerConfig) -> LanguageModel:
    """The model of a configuration; use `rl.models.presets.make`, which returns the same object for equal ones."""
    module = Transformer(config)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(1, jnp.int32), method="whole")["params"])

    def routed(params, ids, cache=None, start=0, count=None, experts=None, segments=None, gather=None):
        count = len(ids) if count is None else count
        if segments is not None:
            check_segments(ids, segments, cache)
            _check_packable(config, len(ids))
        if experts is not None:
            check_forced(experts, config.experts, (config.layers, len(ids), config.experts_per_token))
        return Transformer(config, gather).apply({"params": params}, ids, cache, start, count, experts, segments)

    def forward(params, ids, cache=None, start=0, count=None, experts=None, segments=None, gather=None):
        if experts is not None and not config.experts:
            raise ValueError("experts can only be forced in a mixture of experts; this model has none: leave them out")
        return routed(params, ids, cache, start, count, experts, segments, gather)[:2]

    return LanguageModel(
        config=config,
        init=jax.jit(lambda key: module.init(key, jnp.zeros(1, jnp.int32), method="whole")["params"]),
        empty=functools.partial(_empty, config),
        forward=forward,
        routed=routed if config.experts else None,
        head=lambda params, hidden: module.apply({"params": params}, hidden, method="logits"),
        matrix=lambda params: params["embed"]["embedding"].T if config.tied else params["head"]["kernel"],
        rules=stacked_rules(shapes, {"experts_gate": "sio", "experts_up": "sio", "experts_down": "sio"}),
    )


def _check_packable(config: TransformerConfig, length: int) -> None:
    if config.rope.type == "dynamic" and length > config.max_length:
        raise ValueError(
            f"a packed row must fit the model's {config.max_length} tokens where the rotary embedding is 'dynamic', whose "
            f"frequencies depend on each sequence's length beyond that; got {length}: pack into shorter rows"
        )


def _empty(config: TransformerConfig, length: int):
    lead = (config.layers,) if config.scan_layers else ()
    zeros = lambda: jnp.zeros((*lead, config.kv_heads, config.head_dim, length), config.dtype)
    layers = [{"k": zeros(), "v": zeros()} for _ in range(1 if config.scan_layers else config.layers)]
    return layers[0] if config.scan_layers else tuple(layers)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head."""

    config: TransformerConfig
    gather: Gather | None = None

    def setup(self):
        """Makes the parts."""
        c = self.config
        self.embed = nn.Embed(c.vocab, c.width, c.dtype, c.dtype, embedding_init=nn.initializers.normal(0.02))
        if c.scan_layers:
            scanned = nn.scan(
                layer_class(Layer, c, self.gather), variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers,
                in_axes=(nn.broadcast, 0, 0), out_axes=0,
            )  # fmt: skip
            self.layers = scanned(c, c.experts > 0)
        else:
            self.layer = [layer_class(Layer, c, self.gather, f"layer_{i}")(c, c.sparse(i)) for i in range(c.layers)]
        self.norm = RMSNorm(c)
        if not c.tied:
            self.head = Kernel((c.width, c.vocab), c.dtype)

    def __call__(self, ids, cache, start, count, experts, segments=None):
        """(hidden [L, width], cache, experts [layers, L, k] or None); arguments as `LanguageModel.forward`."""
        c = self.config
        positions = start + jnp.arange(len(ids))
        inside, first = positions, None
        if segments is not None:
            inside = segment_positions(segments)
            first = positions - inside
        angles = rotation(c.rope, c.head_dim, c.max_length, inside, start + count)
        span = (angles, positions, start + count, first)
        x = self.embed(ids)
        if c.scan_layers:
            (x, cache), chosen = self.layers((x, cache), span, jnp.arange(c.layers), experts)
            return self.norm(x), cache, chosen
        past, chosen = [], []
        for i, layer in enumerate(self.layer):
            carry = (x, None if cache is None else cache[i])
            (x, updated), ids_chosen = layer(carry, span, None, None if experts is None else experts[i])
            past.append(updated)
            chosen.append(ids_chosen)
        absent = jnp.full((len(ids), c.experts_per_token), -1, jnp.int32)
        chosen = jnp.stack([absent if one is None else one for one in chosen]) if c.experts else None
        return self.norm(x), None if cache is None else tuple(past), chosen

    def logits(self, hidden):
        """[..., width] -> [..., vocab]; products accumulate in f32 or wider."""
        wide = jnp.promote_types(self.config.dtype, jnp.float32)
        if self.config.tied:
            return jnp.einsum("...d,vd->...v", hidden, self.embed.embedding, preferred_element_type=wide)
        return jnp.einsum("...d,dv->...v", hidden, self.head(), preferred_element_type=wide)

    def whole(self, ids):
        """Logits of a sequence, touching every parameter: what `init` traces."""
        return self.logits(self(ids, None, 0, len(ids), None)[0])


class Kernel(nn.Module):
    """A matrix used by more than one kind of product."""

    shape: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self):
        """The matrix."""
        return self.param("kernel", nn.initializers.lecun_normal(), self.shape, self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) * scale over the last axis, in f32 or wider."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        """[..., n] -> [..., n]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.config.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        unit = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.config.norm_epsilon)
        return (unit * scale).astype(x.dtype)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) or the mixture of experts."""

    config: TransformerConfig
    sparse: bool

    @nn.compact
    def __call__(self, carry, span, index, experts):
        """carry (x [L, width], cache) -> (carry, chosen experts [L, k] or None); index is this layer's row of a stacked
        cache."""
        c, (x, cache) = self.config, carry
        mixed, cache = Attention(c, name="attention")(RMSNorm(c, name="norm1")(x), span, index, cache)
        x = x + mixed
        normed = RMSNorm(c, name="norm2")(x)
        if not self.sparse:
            return (x + MLP(c, name="mlp")(normed), cache), None
        mixture = Experts(c.experts, c.experts_per_token, c.expert_hidden, c.normalise_experts, c.dtype, name="moe")
        out, chosen = mixture(normed, experts)
        return (x + out, cache), chosen


def dense(config: TransformerConfig, size: int, bias: bool, name: str, into_residual: bool = False) -> Dense:
    """[..., in] -> [..., size]; what adds to the residual stream starts smaller by sqrt(2 layers)."""
    variance = 1.0 / (2 * config.layers) if into_residual else 1.0
    start = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
    return Dense(size, bias, config.dtype, config.dtype, kernel_init=start, name=name)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        """[..., width] -> [..., width]."""
        c = self.config
        gate, up = (dense(c, c.hidden, c.mlp_bias, name)(x) for name in ("gate", "up"))
        return dense(c, c.width, c.mlp_bias, "down", into_residual=True)(nn.silu(gate) * up)


class Attention(nn.Module):
    """Causal grouped-query attention over the sequence itself or over a cache."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, span, index, cache):
        """x [L, width] -> ([L, width], cache); span is ((cos, sin), positions [L], start + count, first [L] or None)."""
        c, (angles, positions, filled, first) = self.config, span
        heads = lambda name, n: dense(c, n * c.head_dim, c.qkv_bias, name)(x).reshape(len(x), n, c.head_dim)
        q, k, v = heads("query", c.heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c, name="query_norm")(q), RMSNorm(c, name="key_norm")(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is None:
            out = attend_whole(q, k.transpose(1, 2, 0), v.transpose(1, 2, 0), filled, first)
        else:
            cache = {
                "k": store(cache["k"], k, index, positions, filled),
                "v": store(cache["v"], v, index, positions, filled),
            }
            k, v = (cache[name] if index is None else cache[name][index] for name in ("k", "v"))
            out = attend(q, k, v, positions, filled)
        return dense(c, c.width, c.out_bias, "out", into_residual=True)(out.reshape(len(x), -1)), cache
