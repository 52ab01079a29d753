"""RWKV-7 (arXiv 2503.14456): a recurrent language model, one state matrix per head instead of a cache of keys and values."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rl.models import delta
from rl.models.dense import Dense
from rl.models.language import LanguageModel, check_segments, layer_class, segment_starts, stacked_rules
from rl.types import Gather

_DTYPES = ("float32", "bfloat16", "float64")
_NORM_EPSILON = 1e-5
_HEAD_NORM_EPSILON = 64e-5
_FASTEST_DECAY = math.exp(-0.5)


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    """Sizes.

    Attributes:
        vocab, layers, width: entries, count, residual size C.
        head_dim: S; there are width / head_dim heads.
        hidden: of the channel mix; None is 4 width.
        decay_rank, rate_rank, value_rank, gate_rank: inner sizes of the low-rank maps that make w, a, the v mixture and g.
        chunk: tokens per chunk of the parallel form, at most 64; changes no number beyond rounding.
        scan_layers: parameters and state stacked over layers and one traced layer; else a Python loop. Stacked, layer 0 has
            value-mixing parameters that nothing depends on.
        remat: gradients make each layer's activations again instead of keeping them; on a CPU only with `scan_layers`.
        dtype: of parameters and activations; state, norms, decay and logits are at least f32.
    """

    vocab: int
    layers: int
    width: int
    head_dim: int = 64
    hidden: int | None = None
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    chunk: int = 32
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.width % self.head_dim:
            raise ValueError(f"width must be a multiple of head_dim; got {self.width} and {self.head_dim}")
        if not 1 <= self.chunk <= delta.MAX_CHUNK:
            raise ValueError(f"chunk must be 1 to {delta.MAX_CHUNK} (longer ones overflow f32); got {self.chunk}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {list(_DTYPES)}; got {self.dtype!r}")

    @property
    def heads(self) -> int:
        """H."""
        return self.width // self.head_dim

    @property
    def wide(self):
        """f32, or f64 for an f64 model."""
        return jnp.promote_types(self.dtype, jnp.float32)


def build(config: RWKV7Config) -> LanguageModel:
    """The model of a configuration; use `rl.models.presets.make`, which returns the same object for equal ones."""
    module = RWKV7(config)
    start_up = lambda key: module.init(key, jnp.zeros(1, jnp.int32), method="whole")["params"]

    def forward(params, ids, cache=None, start=0, count=None, experts=None, segments=None, gather=None):
        del start  # the state knows what came before
        if segments is not None:
            check_segments(ids, segments, cache)
        if experts is not None:
            raise ValueError("experts can only be forced in a mixture of experts; this model has none: leave them out")
        state = empty(config, 0) if cache is None else cache
        count = len(ids) if count is None else count
        hidden, state = RWKV7(config, gather).apply({"params": params}, ids, state, count, segments)
        return hidden, None if cache is None else state

    return LanguageModel(
        config=config,
        init=jax.jit(start_up),
        empty=functools.partial(empty, config),
        forward=forward,
        routed=None,
        head=lambda params, hidden: module.apply({"params": params}, hidden, method="logits"),
        matrix=lambda params: params["head"]["kernel"],
        rules=stacked_rules(jax.eval_shape(start_up, jax.random.key(0)), {"r_k": "full"}),
    )


def empty(config: RWKV7Config, length: int):
    """The state before the first token; `length` means nothing here."""
    del length
    lead = (config.layers,) if config.scan_layers else ()
    make = lambda: {
        "time_shift": jnp.zeros((*lead, config.width), config.wide),
        "channel_shift": jnp.zeros((*lead, config.width), config.wide),
        "state": jnp.zeros((*lead, config.heads, config.head_dim, config.head_dim), config.wide),
    }
    return make() if config.scan_layers else tuple(make() for _ in range(config.layers))


class RWKV7(nn.Module):
    """Embedding and its norm, layers, final norm and head."""

    config: RWKV7Config
    gather: Gather | None = None

    def setup(self):
        """Makes the parts."""
        c = self.config
        self.embed = nn.Embed(c.vocab, c.width, c.dtype, c.dtype, embedding_init=nn.initializers.normal(0.02))
        self.norm0, self.norm = LayerNorm(c), LayerNorm(c)
        if c.scan_layers:
            scanned = nn.scan(
                layer_class(Layer, c, self.gather), variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers,
                in_axes=(0, 0, nn.broadcast, nn.broadcast), out_axes=0,
            )  # fmt: skip
            self.layers = scanned(c, mixes_values=True)
        else:
            self.layer = [
                layer_class(Layer, c, self.gather, f"layer_{i}")(c, mixes_values=i > 0) for i in range(c.layers)
            ]
        self.head = Head(c)

    def __call__(self, ids, cache, count, segments=None):
        """(hidden [L, width], state after `count` tokens)."""
        c = self.config
        x = self.norm0(self.embed(ids))
        carry = (x, jnp.zeros_like(x))
        if c.scan_layers:
            carry, cache = self.layers(carry, cache, jnp.arange(c.layers) == 0, count, segments)
            return self.norm(carry[0]), cache
        past = []
        for i, layer in enumerate(self.layer):
            carry, state = layer(carry, cache[i], i == 0, count, segments)
            past.append(state)
        return self.norm(carry[0]), tuple(past)

    def logits(self, hidden):
        """[..., width] -> [..., vocab]; products accumulate in f32 or wider."""
        return self.head(hidden)

    def whole(self, ids):
        """Logits of a sequence, touching every parameter: what `init` traces."""
        return self.logits(self(ids, empty(self.config, 0), len(ids))[0])


class Head(nn.Module):
    """hidden kernel, [..., width] -> [..., vocab]."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, hidden):
        """[..., width] -> [..., vocab]."""
        c = self.config
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (c.width, c.vocab), c.dtype)
        return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=c.wide)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * scale + bias over each of `groups` parts of the last axis, in f32 or wider."""

    config: RWKV7Config
    groups: int = 1
    epsilon: float = _NORM_EPSILON

    @nn.compact
    def __call__(self, x):
        """[..., n] -> [..., n]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.config.dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.config.dtype)
        parts = x.astype(self.config.wide).reshape(*x.shape[:-1], self.groups, -1)
        centred = parts - jnp.mean(parts, -1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + self.epsilon)
        return (unit.reshape(x.shape) * scale + bias).astype(x.dtype)


class Layer(nn.Module):
    """x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    config: RWKV7Config
    mixes_values: bool

    @nn.compact
    def __call__(self, carry, past, first, count, segments=None):
        """carry (x [L, width], layer 0's values [L, width]); past: this layer's state; first: whether this is layer 0."""
        c, (x, v_first) = self.config, carry
        normed = LayerNorm(c, name="norm1")(x)
        before, time_shift = shift(normed, past["time_shift"], count, segments)
        mixed, v_first, state = TimeMix(c, self.mixes_values, name="time")(
            normed, before, v_first, past["state"], first, count, segments
        )
        x = x + mixed
        normed = LayerNorm(c, name="norm2")(x)
        before, channel_shift = shift(normed, past["channel_shift"], count, segments)
        x = x + ChannelMix(c, name="channel")(normed, before)
        return (x, v_first), {"time_shift": time_shift, "channel_shift": channel_shift, "state": state}


def shift(x: Array, carried: Array, count: Array | int, segments: Array | None) -> tuple[Array, Array]:
    """(the previous token's x [L, C], the x to carry: of token count - 1, or as it was where count is 0).

    The first token of a segment has zeros before it.
    """
    line = jnp.concatenate([carried.astype(x.dtype)[None], x])
    before = line[:-1] if segments is None else jnp.where(segment_starts(segments)[:, None], 0, line[:-1])
    return before, jax.lax.dynamic_index_in_dim(line, count, keepdims=False).astype(carried.dtype)


def dense(config: RWKV7Config, size: int, name: str, into_residual: bool = False) -> Dense:
    """[..., in] -> [..., size], no bias; what adds to the residual stream starts smaller by sqrt(2 layers)."""
    variance = 1.0 / (2 * config.layers) if into_residual else 1.0
    start = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
    return Dense(size, False, config.dtype, config.dtype, kernel_init=start, name=name)


class ChannelMix(nn.Module):
    """value(relu(key(x + (x_before - x) mu))^2)."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, x, before):
        """x and the previous token's x, [L, width] -> [L, width]."""
        c = self.config
        mu = self.param("x_k", nn.initializers.constant(0.5), (c.width,), c.dtype)
        inner = jnp.square(nn.relu(dense(c, c.hidden or 4 * c.width, "key")(x + (before - x) * mu)))
        return dense(c, c.width, "value", into_residual=True)(inner)


class TimeMix(nn.Module):
    """The recurrence with its data-dependent decay, removal rate, value mixture and gate."""

    config: RWKV7Config
    mixes_values: bool

    def _vector(self, name: str, value: float):
        return self.param(name, nn.initializers.constant(value), (self.config.width,), self.config.dtype)

    def _low_rank(self, x, letter: str, rank: int, inner=lambda h: h):
        """inner(x first) second, starting at 0."""
        c = self.config
        first = self.param(f"{letter}1", nn.initializers.zeros, (c.width, rank), c.dtype)
        second = self.param(f"{letter}2", nn.initializers.normal(0.1 / math.sqrt(rank)), (rank, c.width), c.dtype)
        return inner(x @ first) @ second

    @nn.compact
    def __call__(self, x, before, v_first, state, first, count, segments=None):
        """Returns ([L, width], layer 0's values [L, width], state after `count` tokens)."""
        c = self.config
        mixed = {z: x + (before - x) * self._vector(f"x_{z}", 0.5) for z in "rwkvag"}
        r, k, v = (dense(c, c.width, name)(mixed[name[0]]) for name in ("receptance", "key", "value"))
        offset = self.param("w0", _initial_decay, (c.width,), c.dtype)
        pre = (offset + self._low_rank(mixed["w"], "w", c.decay_rank, jnp.tanh)).astype(c.wide)
        w = jnp.exp(-_FASTEST_DECAY * nn.sigmoid(pre))
        a = nn.sigmoid(self._vector("a0", 0.0) + self._low_rank(mixed["a"], "a", c.rate_rank))
        g = self._low_rank(mixed["g"], "g", c.gate_rank, nn.sigmoid)
        v_first = jnp.where(first, v, v_first)
        if self.mixes_values:  # in layer 0 v_first is v, so this changes nothing there
            v = v + (v_first - v) * nn.sigmoid(self._vector("v0", 1.0) + self._low_rank(mixed["v"], "v", c.value_rank))
        heads = lambda z: z.reshape(len(x), c.heads, c.head_dim).astype(c.wide)
        kk = heads(k * self._vector("k_k", 0.85))
        kk = kk * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(kk), -1, keepdims=True), 1e-24))  # |kk| at least 1e-12
        k = heads(k * (1 + (a - 1) * self._vector("k_a", 1.0)))
        r, v, b, w = heads(r), heads(v), kk * heads(a), heads(w)
        o, state = _mix(c, state, r, w, k, v, kk, b, count, segments)
        o = LayerNorm(c, c.heads, _HEAD_NORM_EPSILON, name="norm")(o.reshape(len(x), c.width))
        r_k = self.param("r_k", nn.initializers.zeros, (c.heads, c.head_dim), c.dtype)
        o = o + (jnp.sum(r * k * r_k, -1, keepdims=True) * v).reshape(len(x), c.width)
        return dense(c, c.width, "output", into_residual=True)(o.astype(x.dtype) * g), v_first, state


def _initial_decay(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Pre-activations of decays from slow to fast over the channels."""
    del key
    return jnp.linspace(-6.0, -1.0, *shape).astype(dtype)


def _mix(config: RWKV7Config, state, r, w, k, v, kk, b, count, segments) -> tuple[Array, Array]:
    """The recurrence over L tokens of which `count` are real: padding decays by 1, removes and adds nothing."""
    real = (jnp.arange(len(r)) < count)[:, None, None]
    w, k, b = jnp.where(real, w, 1), jnp.where(real, k, 0), jnp.where(real, b, 0)
    if len(r) == 1:
        state, o = delta.step(state, r[0], w[0], k[0], v[0], kk[0], b[0])
        return o[None], state
    state, o = delta.chunked(state, r, w, k, v, kk, b, config.chunk, segments)
    return o, state
