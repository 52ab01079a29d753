"""Sequences side by side in rows of equal length, rows in micro-batches of equal shape: how an update is computed, not what.

N sequences of at most C tokens go into rows of C tokens, R rows make a micro-batch, and a micro-batch holds at most
n = R * per_row sequences. All of that is fixed by the settings, so that nothing recompiles from step to step; only the number
of micro-batches in use varies, and it is data (`TrainBatch.used`).

A row of C tokens costs attention C^2 / 2 whatever is in it, so C belongs near the longest sequence: in a row twice as long half
of the attention is between tokens that may not see each other. Host NumPy throughout.
"""

import dataclasses

import jax
import numpy as np

from rl.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each of N sequences sits.

    Attributes:
        row: i32 [N].
        offset: i32 [N], of its first token in the row.
        rows: how many rows there are.
        capacity: tokens of a row.
    """

    row: np.ndarray
    offset: np.ndarray
    rows: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of micro-batches.

    Attributes:
        capacity: C, tokens of a row, at least the longest sequence.
        rows: R, rows of a micro-batch: R C is the tokens per micro-batch.
        per_row: most sequences of a row.
        longest: L, columns of completions.
    """

    capacity: int
    rows: int
    per_row: int
    longest: int

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} of a micro-batch must be at least 1; got {value}")

    @property
    def sequences(self) -> int:
        """n, most sequences of a micro-batch."""
        return self.rows * self.per_row


def shape(tokens: int, longest_prompt: int, longest: int, *, capacity: int | None = None, per_row: int = 4) -> Shape:
    """The micro-batches of at most `tokens` tokens.

    Args:
        tokens: per micro-batch, padding included.
        longest_prompt, longest: tokens of the longest prompt and of the longest completion there can be.
        capacity: tokens of a row; None is the shortest that holds every sequence.
        per_row: most sequences of a row.

    Raises:
        ValueError: rows too short for the longest sequence, or too few tokens for one row.
    """
    needed = longest_prompt + longest
    capacity = needed if capacity is None else capacity
    if capacity < needed:
        raise ValueError(
            f"rows must hold the longest sequence, {longest_prompt} + {longest} tokens; got a capacity of {capacity}: raise it"
        )
    if tokens < capacity:
        raise ValueError(
            f"a micro-batch must hold at least one row of {capacity} tokens; got {tokens} tokens per micro-batch: raise them"
        )
    return Shape(capacity, tokens // capacity, per_row, longest)


def pack(lengths: np.ndarray, capacity: int, *, rows: int | None = None, per_row: int | None = None) -> Layout:
    """Longest first, each sequence into the fullest row that still holds it, else into a new one; ties go to the lower index.

    Best fit decreasing: at most 11/9 of the fewest rows possible, plus one (Johnson 1973), where `per_row` does not bind.

    Args:
        lengths: [N] tokens.
        capacity: tokens of a row.
        rows: how many there may be; None: as many as it takes.
        per_row: most sequences of a row; None: any number.

    Raises:
        ValueError: lengths below 1 or beyond the capacity, or more rows than there may be.
    """
    lengths = np.asarray(lengths)
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if wrong.size:
        raise ValueError(
            f"sequences to pack must have 1 to {capacity} tokens, the capacity of a row, and are never split; sequence "
            f"{wrong[0]} has {lengths[wrong[0]]} ({wrong.size} such): raise the capacity"
        )
    row, offset = np.zeros((2, len(lengths)), np.int32)
    room = np.zeros(len(lengths), np.int64)  # tokens free, of every row opened so far
    places = np.full(len(lengths), per_row or len(lengths))
    opened = 0
    for i in np.argsort(-lengths, kind="stable"):
        fits = np.flatnonzero((room[:opened] >= lengths[i]) & (places[:opened] > 0))
        if fits.size:
            at = fits[np.argmin(room[fits])]
        else:
            at, room[opened] = opened, capacity
            opened += 1
        row[i], offset[i] = at, capacity - room[at]
        room[at] -= lengths[i]
        places[at] -= 1
    if rows is not None and opened > rows:
        raise ValueError(
            f"{len(lengths)} sequences of {lengths.sum()} tokens must fit {rows} rows of {capacity}; they need {opened}: raise "
            "the number of rows or their capacity"
        )
    return Layout(row, offset, opened if rows is None else rows, capacity)


def micro_batches(
    prompt: np.ndarray,
    prompt_length: np.ndarray,
    tokens: np.ndarray,
    length: np.ndarray,
    shape: Shape,
    *,
    experts: np.ndarray | None = None,
) -> TrainBatch:
    """Prompts and their completions as micro-batches; what they are worth comes from `TrainBatch.credit`.

    There is room for ceil(N / R) micro-batches, which is what sequences as long as the rows need, so that shapes depend on N
    and the settings alone.

    Args:
        prompt, prompt_length: i32 [N, P], [N].
        tokens, length: i32 [N, L'], [N]; columns beyond the longest completion of the settings must be padding.
        shape: static sizes.
        experts: [N, P + L', layers, k], the experts of every token, prompts padded to P as here; None: none are forced.

    Raises:
        ValueError: a completion longer than the settings', rows of other number, an empty prompt, or one of `pack`'s.
    """
    n = len(prompt)
    for name, x in (("prompt_length", prompt_length), ("tokens", tokens), ("length", length), ("experts", experts)):
        if x is not None and len(x) != n:
            raise ValueError(f"{name} must have one row per prompt, {n}; got {len(x)}")
    if n and (prompt_length.min() < 1 or length.max() > shape.longest):
        raise ValueError(
            f"prompts must have at least 1 token and completions at most {shape.longest}; got {prompt_length.min()} and "
            f"{length.max()}"
        )
    layout = pack(prompt_length + length, shape.capacity, per_row=shape.per_row)
    count, size = max(1, -(-n // shape.rows)), shape.sequences
    micro = layout.row // shape.rows
    # place of a sequence among those of its micro-batch: in the order of rows, then of offsets
    order = np.lexsort((layout.offset, layout.row))
    first = np.searchsorted(micro[order], np.arange(count))
    place = np.empty(n, np.int64)
    place[order] = np.arange(n) - first[micro[order]]
    source = np.full((count, size), -1, np.int32)
    source[micro, place] = np.arange(n)
    ids, segments = _tokens(prompt, prompt_length, tokens, length, layout, place, (count, shape.rows, shape.capacity))
    columns = {
        "row": layout.row % shape.rows, "offset": layout.offset, "prompt_length": prompt_length, "length": length,
    }  # fmt: skip
    batch = TrainBatch(
        ids=ids, segments=segments, used=np.int32(-(-layout.rows // shape.rows)), source=source, longest=shape.longest,
        experts=None if experts is None else _experts(experts, prompt_length, length, prompt.shape[1], layout, ids.shape),
        **dict.fromkeys(columns, source),
    )  # fmt: skip
    return dataclasses.replace(batch, **{name: batch.spread(x).astype(np.int32) for name, x in columns.items()})


def shapes(shape: Shape, experts: tuple[int, int, np.dtype] | None = None) -> TrainBatch:
    """Shapes and dtypes of one micro-batch, to trace or compile for.

    Args:
        experts: (layers, experts per token, dtype of their ids) where experts are forced.
    """
    array = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)
    tokens, places = (shape.rows, shape.capacity), (shape.sequences,)
    columns = {name: array(np.int32, *places) for name in ("source", "row", "offset", "prompt_length", "length")}
    number = array(np.float32, *places, shape.longest)
    return TrainBatch(
        ids=array(np.int32, *tokens), segments=array(np.int32, *tokens), used=array(np.int32),
        longest=shape.longest, mask=array(np.bool_, *places, shape.longest), counted=array(np.bool_, *places),
        advantage=number, behaviour=number, proximal=number, reference=number,
        experts=experts and array(experts[2], shape.rows, experts[0], shape.capacity, experts[1]), **columns,
    )  # fmt: skip


def _tokens(prompt, prompt_length, tokens, length, layout: Layout, place, shape) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments) [M, R, C]; segments are numbered by the sequence's place in its micro-batch."""
    flat_ids = np.zeros(np.prod(shape), np.int32)
    flat_segments = np.full(np.prod(shape), -1, np.int32)
    for x, count, start in ((prompt, prompt_length, 0), (tokens, length, prompt_length)):
        real = np.arange(x.shape[1]) < count[:, None]
        at = (layout.row * layout.capacity + layout.offset + start)[:, None] + np.arange(x.shape[1])
        flat_ids[at[real]] = x[real]
        flat_segments[at[real]] = np.broadcast_to(place[:, None], x.shape)[real]
    return flat_ids.reshape(shape), flat_segments.reshape(shape)


def _experts(experts, prompt_length, length, prompt_columns: int, layout: Layout, shape) -> np.ndarray:
    """[N, P + L', layers, k] -> [M, R, layers, C, k], -1 (the router decides) in padding."""
    layers, k = experts.shape[2:]
    flat = np.full((np.prod(shape), layers, k), -1, experts.dtype)
    for part, count, start in (
        (experts[:, :prompt_columns], prompt_length, 0),
        (experts[:, prompt_columns:], length, prompt_length),
    ):
        real = np.arange(part.shape[1]) < count[:, None]
        at = (layout.row * layout.capacity + layout.offset + start)[:, None] + np.arange(part.shape[1])
        flat[at[real]] = part[real]
    return flat.reshape(*shape, layers, k).transpose(0, 1, 3, 2, 4)
