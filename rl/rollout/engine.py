"""The rollout engine: sequences in static slots, filled and emptied between jitted chunks of decode steps.

Pure functions of a `State`, compiled once per static shape: `admit` (prefill of prompts and insertion into free slots),
`decode` (up to k steps for every slot), `release`, `compact`. `rl.rollout.generate` is the host loop around them. Weights are
an argument of every call, plain parameters or a population's (`eggroll.Drawn`), so changing them costs nothing, and every
slot may decode another member in the same batch.

What is replaced to change the method: `sampling.Sampling` (what is drawn), `_step` (one token for every slot: where a draft
would be verified), the model's `empty` and `forward` (what the cache keeps), and `generate`'s `between` (which rows run).
"""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eggroll
from eggroll import sharding
from rl.mesh import SPREAD
from rl.models.experts import id_dtype
from rl.models.language import LanguageModel
from rl.rollout.sampling import Sample, Sampling, sample, uniforms

TRACES: collections.Counter[str] = collections.Counter()  # how often each function was traced, that is compiled


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static sizes.

    Attributes:
        slots: S, sequences at once.
        length: T, most tokens of a sequence, prompt and completion together.
        stop: token ids that end a completion.
        sampling: what is drawn from.
        chunk: k, most decode steps between two looks of the host.
        bucket: shortest prefill length; prompts are padded to it, to its double, and so on up to T.
        view: shortest cache length that a decode step reads; it doubles as sequences grow. 0: always T.
        tail: the last running rows are moved into half as many slots, again and again, down to this many; every number of
            slots is a program more to compile, which pays for long tails alone. 0: never.
        prefill_chunk: most tokens of a prompt in one forward pass; bounds prefill memory, which grows with its square.
        record_experts: whether the experts that every token used are returned (mixtures of experts only).
        mesh: of `rl.mesh`, over whose devices slots are divided; None: one device.
    """

    slots: int
    length: int
    stop: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    chunk: int = 16
    bucket: int = 16
    view: int = 128
    tail: int = 0
    prefill_chunk: int = 512
    record_experts: bool = False
    mesh: Mesh | None = None

    def __post_init__(self):
        whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
        for name in ("slots", "length", "chunk", "bucket", "view", "tail", "prefill_chunk"):
            if not whole(getattr(self, name)):
                raise ValueError(f"{name} must be a whole number; got {getattr(self, name)!r}")
        if not isinstance(self.record_experts, bool):
            raise ValueError(f"record_experts must be True or False; got {self.record_experts!r}")
        if not isinstance(self.stop, tuple) or not all(map(whole, self.stop)):
            raise ValueError(f"stop must be a tuple of token ids; got {self.stop!r}")
        for name in ("slots", "chunk", "bucket", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must hold a prompt and a completion, at least 2 tokens; got {self.length}")
        ways = 1 if self.mesh is None else sharding.count(self.mesh, SPREAD)
        if self.slots % ways or any(size % ways for size in self.sizes):
            raise ValueError(
                f"slots, and what a tail is compacted to, must divide over {ways} devices; got {self.sizes}: choose a multiple"
            )
        for name, nothing in (("view", "the whole cache"), ("tail", "no compaction")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 1, or 0 for {nothing}; got {getattr(self, name)}")

    @property
    def buckets(self) -> tuple[int, ...]:
        """Prefill lengths."""
        return doubling(self.bucket, self.length)

    @property
    def views(self) -> tuple[int, ...]:
        """Cache lengths that decode steps read."""
        return doubling(self.view, self.length) if self.view else (self.length,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of slots, falling: S and what a tail is compacted to."""
        sizes = [self.slots]
        while 0 < self.tail <= sizes[-1] // 2:
            sizes.append(sizes[-1] // 2)
        return tuple(sizes)

    @property
    def block(self) -> int:
        """Rows admitted in one call, an eighth of the slots: also what has to end before slots are refilled."""
        return max(1, self.slots // 8)

    @property
    def shared(self) -> tuple[int, ...]:
        """Numbers of prefilled sequences for one block of rows: all different, or few that many rows share."""
        return tuple(dict.fromkeys((max(1, self.block // 8), self.block)))


def doubling(start: int, end: int) -> tuple[int, ...]:
    """start, 2 start, 4 start, ..., the last one cut to `end`."""
    sizes = [min(start, end)]
    while sizes[-1] < end:
        sizes.append(min(2 * sizes[-1], end))
    return tuple(sizes)


class State(NamedTuple):
    """All slots; donated by every call.

    Attributes:
        cache: the model's, with a leading slot axis.
        token: i32 [S], the newest token, not yet in the cache.
        position: i32 [S], its position in the sequence.
        limit: i32 [S], position at which the budget is used up.
        active: bool [S].
        uid: u32 [S]; member: i32 [S]: as in `rl.types.Requests`.
    """

    cache: Any
    token: Array
    position: Array
    limit: Array
    active: Array
    uid: Array
    member: Array


class Chunk(NamedTuple):
    """What one call of `decode` wrote, for the host.

    Attributes:
        tokens: i32 [k, S]; logp, logp_full: f32 [k, S]. Slot s wrote the first count[s] entries of its column.
        count: i32 [S].
        active: bool [S], who goes on.
        experts: i8, i16 or i32 [k, S, layers, experts per token], of the token that each entry of `tokens` followed (the
            newest one is never read and has none), -1 in layers without; None where they are not recorded.
    """

    tokens: Array
    logp: Array
    logp_full: Array
    count: Array
    active: Array
    experts: Array | None


class Rows(NamedTuple):
    """Rows to admit, R of them, into slots; a slot of S means none (padding).

    Attributes:
        slot: i32 [R].
        source: i32 [R], which prefilled sequence each one continues: several may share one.
        token, position, limit: i32 [R]; uid: u32 [R]; member: i32 [R]: as in `State`.
    """

    slot: Array
    source: Array
    token: Array
    position: Array
    limit: Array
    uid: Array
    member: Array


def init(model: LanguageModel, settings: Settings) -> State:
    """Empty slots.

    Raises:
        ValueError: experts to record of a model without.
    """
    if settings.record_experts and model.routed is None:
        raise ValueError("record_experts needs a mixture of experts; this model has none: set record_experts=False")
    zeros = lambda dtype: jnp.zeros(settings.slots, dtype)
    empty = State(
        _empty(model, settings.slots, settings.length), zeros(jnp.int32), zeros(jnp.int32), zeros(jnp.int32), zeros(bool),
        zeros(jnp.uint32), zeros(jnp.int32) - 1,
    )  # fmt: skip
    if settings.mesh is None:
        return empty
    where = NamedSharding(settings.mesh, PartitionSpec(SPREAD))
    return jax.tree.map(lambda x: sharding.put(x, where), empty)


def cache_bytes(model: LanguageModel, settings: Settings) -> int:
    """Memory of the cache of all slots, exactly."""
    shapes = jax.eval_shape(lambda: _empty(model, settings.slots, settings.length))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def admit(
    model: LanguageModel, settings: Settings, weights, state: State, ids: Array, count: Array, member: Array, rows: Rows
) -> tuple[State, Array | None]:
    """Prefills sequences and puts rows that continue them into slots.

    Args:
        ids: i32 [B, bucket], the tokens before each row's newest one.
        count: i32 [B], how many of them there are; 0 for sequences of one token, and for padding.
        member: i32 [B], whose weights read them.
        rows: what goes where.

    Returns:
        (state, experts [B, bucket, layers, experts per token] of `ids` as in `Chunk`; None where they are not recorded).
    """
    TRACES["admit"] += 1
    cache, experts = _prefill(model, settings, weights, ids, count, member)
    drop = {"mode": "drop"}

    def insert(old, new, axis):
        # Beyond the bucket the slot keeps what it had: positions that are written before they are read.
        place = (rows.slot,) if axis is None else (rows.slot, *[slice(None)] * axis, slice(new.shape[1 + axis]))
        return old.at[place].set(new[rows.source], **drop)

    put = lambda old, new: old.at[rows.slot].set(new, **drop)
    state = State(
        jax.tree.map(insert, state.cache, cache, _length_axes(model)),
        put(state.token, rows.token),
        put(state.position, rows.position),
        put(state.limit, rows.limit),
        put(state.active, rows.position < rows.limit),
        put(state.uid, rows.uid),
        put(state.member, rows.member),
    )
    return _divided(settings, state), _everywhere(settings, experts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    model: LanguageModel, settings: Settings, view: int, weights, state: State, key: Array, enough: Array
) -> tuple[State, Chunk]:
    """Up to k tokens for every active slot; ends early when none is active or `enough` of them have ended.

    Args:
        view: static; every active position must stay below it for k steps.
        weights: parameters, or `eggroll.Drawn`.
        key: typed PRNG key of the run.
        enough: i32 scalar.
    """
    TRACES["decode"] += 1
    params, axes = eggroll.rows(weights, state.member)
    steps = jnp.arange(settings.chunk, dtype=jnp.int32)
    u = uniforms(key, state.uid, state.position + 1 + steps[:, None])  # [k, S], out of the loop
    started = jnp.sum(state.active)
    blank = lambda dtype, *shape: jnp.zeros((settings.chunk, state.token.shape[0], *shape), dtype)
    written = Sample(blank(jnp.int32), blank(jnp.float32), blank(jnp.float32)), None
    if settings.record_experts:
        c = model.config
        written = written[0], blank(id_dtype(c.experts), c.layers, c.experts_per_token)
    axes_of_length = _length_axes(model)
    cut = lambda x, axis: x if axis is None else jax.lax.slice_in_dim(x, 0, view, axis=1 + axis)
    whole, began = state.cache, state.position

    def going_on(carry):
        i, state, _ = carry
        active = jnp.sum(state.active)
        return (i < settings.chunk) & (active > 0) & (started - active < enough)

    def body(carry):
        i, state, written = carry
        state, *new = _step(model, settings, params, axes, state, u[i])
        return i + 1, state, jax.tree.map(lambda old, new: old.at[i].set(new), written, tuple(new))

    state = state._replace(cache=jax.tree.map(cut, whole, axes_of_length))
    _, state, (drawn, experts) = jax.lax.while_loop(going_on, body, (jnp.int32(0), state, written))
    back = lambda old, new, axis: new if axis is None else old.at[(slice(None),) * (1 + axis) + (slice(view),)].set(new)
    state = state._replace(cache=jax.tree.map(back, whole, state.cache, axes_of_length))
    chunk = Chunk(*drawn, state.position - began, state.active, experts)
    return _divided(settings, state), _everywhere(settings, chunk)


@functools.partial(jax.jit, donate_argnums=0)
def release(state: State, slots: Array) -> State:
    """Ends the rows in these slots (bool [S]); nothing else changes."""
    TRACES["release"] += 1
    return state._replace(active=state.active & ~slots)


@functools.partial(jax.jit, static_argnums=0)  # nothing to donate: every array changes its size
def compact(settings: Settings, state: State, slots: Array) -> State:
    """The state of fewer slots: i32 [S'], which ones, in their new order."""
    TRACES["compact"] += 1
    return _divided(settings, jax.tree.map(lambda x: x[slots], state))


def _divided(settings: Settings, state: State) -> State:
    """Slots over the devices of the mesh."""
    if settings.mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, NamedSharding(settings.mesh, PartitionSpec(SPREAD)))


def _everywhere(settings: Settings, tree):
    """Whole on every device: for the host of every process."""
    if settings.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(settings.mesh, PartitionSpec()))


def _step(model: LanguageModel, settings: Settings, params, axes, state: State, u: Array):
    """One token for every active slot, and the experts that read the token before it. Inactive slots write nothing: their
    rows of the batch are padding."""

    def one(params, token, cache, position, active):
        count = active.astype(jnp.int32)
        hidden, cache, experts = _forward(model, settings, params, token[None], cache, position, count)
        return model.head(params, hidden)[0], cache, None if experts is None else experts[0]

    run = lambda *args: eggroll.perturbed_call(one, *args)
    args = params, state.token, state.cache, state.position, state.active
    logits, cache, experts = jax.vmap(run, (axes, 0, 0, 0, 0))(*args)
    drawn = sample(logits, u, settings.sampling)
    position = state.position + state.active
    ended = functools.reduce(jnp.logical_or, [drawn.token == stop for stop in settings.stop], position >= state.limit)
    token = jnp.where(state.active, drawn.token, state.token)
    return state._replace(cache=cache, token=token, position=position, active=state.active & ~ended), drawn, experts


def _forward(model: LanguageModel, settings: Settings, params, ids: Array, cache, start: Array, count: Array):
    """(hidden [L, width], cache, experts [L, layers, k] or None where they are not recorded)."""
    if not settings.record_experts:
        return *model.forward(params, ids, cache, start, count), None
    hidden, cache, experts = model.routed(params, ids, cache, start, count)
    return hidden, cache, experts.swapaxes(0, 1).astype(id_dtype(model.config.experts))


def _prefill(model: LanguageModel, settings: Settings, weights, ids: Array, count: Array, member: Array):
    """The cache of each sequence after its first `count` tokens, and their experts."""
    params, axes = eggroll.rows(weights, member)
    length = ids.shape[1]
    size = min(settings.prefill_chunk, length)
    pieces = jnp.pad(ids, ((0, 0), (0, -length % size))).reshape(len(ids), -1, size).swapaxes(0, 1)

    def one(params, ids, cache, start, count):
        return _forward(model, settings, params, ids, cache, start, jnp.clip(count - start, 0, size))[1:]

    run = lambda *args: eggroll.perturbed_call(one, *args)

    def body(cache, piece):
        start, ids = piece
        return jax.vmap(run, (axes, 0, 0, None, 0))(params, ids, cache, start, count)

    starts = jnp.arange(len(pieces), dtype=jnp.int32) * size
    cache = _empty(model, len(ids), length)
    if len(pieces) == 1:
        return body(cache, (starts[0], pieces[0]))
    cache, experts = jax.lax.scan(body, cache, (starts, pieces))
    if experts is not None:  # [pieces, B, size, ...] -> [B, bucket, ...]
        experts = experts.swapaxes(0, 1).reshape(len(ids), -1, *experts.shape[3:])[:, :length]
    return cache, experts


def _empty(model: LanguageModel, slots: int, length: int):
    """Empty caches with a leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), model.empty(length))


@functools.cache
def _length_axes(model: LanguageModel):
    """Per leaf of a sequence's cache, the axis that grows with its length, or None."""
    short, long = (jax.eval_shape(lambda n=n: model.empty(n)) for n in (2, 3))
    axis = lambda a, b: next((i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), None)
    return jax.tree.map(axis, short, long)
