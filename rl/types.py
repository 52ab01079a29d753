"""What crosses a stage: prompts to the engine, completions to the rewards, scores to the estimate. Host arrays, one row each.

N rows, P tokens of the longest prompt, L tokens of the longest completion; arrays are padded on the right with 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

Gather = Callable[[str, Any], Any]  # puts parameters together, see `rl.models.language.LanguageModel`
ABORTED, STOPPED, LENGTH = 0, 1, 2  # why a row ended: it did not (interrupted), a stop token, its budget
FINISHES = ("aborted", "stopped", "length")


@dataclasses.dataclass(frozen=True)
class Requests:
    """Completions to generate.

    Attributes:
        prompt: i32 [N, P].
        prompt_length: i32 [N], tokens, at least 1.
        budget: i32 [N], most tokens to generate, those in `done` included, at least 1.
        uid: u32 [N], names the randomness of a row: rows with equal uid, weights and prompt get equal completions.
        member: i32 [N], the population member that answers; -1: the unperturbed mean.
        done: what was generated before, when a row goes on from an interruption.
    """

    prompt: np.ndarray
    prompt_length: np.ndarray
    budget: np.ndarray
    uid: np.ndarray
    member: np.ndarray
    done: "Rollouts | None" = None

    def __post_init__(self):
        for name in ("prompt", "prompt_length", "budget", "uid", "member"):
            x, dtype = getattr(self, name), np.uint32 if name == "uid" else np.int32
            if not isinstance(x, np.ndarray) or x.dtype != dtype:
                kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
                raise ValueError(
                    f"{name} must be a NumPy array of {dtype.__name__}; got {kind}: Requests.make converts"
                )
        if self.prompt.ndim != 2:
            raise ValueError(f"prompt must be [rows, longest prompt]; got shape {self.prompt.shape}")
        n, width = self.prompt.shape
        for name in ("prompt_length", "budget", "uid", "member"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"{name} must have one entry per row, {n}; got shape {getattr(self, name).shape}")
        if self.prompt_length.max(initial=0) > width:
            raise ValueError(
                f"prompt_length must be at most {width}, the columns of prompt; got {self.prompt_length.max()}"
            )
        if self.done is not None and len(self.done) != n:
            raise ValueError(f"done must have one row per request, {n}; got {len(self.done)}")

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def make(
        cls,
        prompts: Sequence[Sequence[int]],
        budget: int | np.ndarray,
        *,
        uid: np.ndarray | None = None,
        member: int | np.ndarray = -1,
    ) -> Self:
        """Requests for token lists; uid counts the rows if None.

        Raises:
            ValueError: tokens or columns that are not whole numbers of 32 bits, or not one per row.
        """
        n = len(prompts)
        prompt, length = pad(prompts)

        def column(name, value, dtype):
            value = _whole(name, value, dtype)
            if value.shape not in ((), (n,)):
                raise ValueError(f"{name} must be one number or one per row, {n}; got shape {value.shape}")
            return np.array(np.broadcast_to(value, (n,)))

        uid = column("uid", np.arange(n) if uid is None else uid, np.uint32)
        return cls(prompt, length, column("budget", budget, np.int32), uid, column("member", member, np.int32))

    def take(self, rows: np.ndarray) -> Self:
        """Some rows, in the order given."""
        return _take(self, rows)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions.

    Attributes:
        tokens: i32 [N, L].
        length: i32 [N], tokens generated.
        logp: f32 [N, L], log-probability of each token under the distribution that was sampled (the behaviour policy).
        logp_full: f32 [N, L], under the softmax of the logits, without temperature and cuts.
        version: i32 [N, L], policy version that wrote each token.
        finish: i8 [N], `ABORTED`, `STOPPED` (the last token is a stop token) or `LENGTH`.
        member: i32 [N], as requested.
        experts: i8, i16 or i32 [N, P + L, layers, experts per token], which experts read each token of the prompts, padded to
            P, and of the completions, when the token after it was drawn; None where they were not recorded. -1: nothing
            recorded, that is in padding, at the newest token of a row, which nothing has read, and in layers without experts.
    """

    tokens: np.ndarray
    length: np.ndarray
    logp: np.ndarray
    logp_full: np.ndarray
    version: np.ndarray
    finish: np.ndarray
    member: np.ndarray
    experts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> np.ndarray:
        """bool [N, L], where there are tokens."""
        return np.arange(self.tokens.shape[1]) < self.length[:, None]

    def take(self, rows: np.ndarray) -> Self:
        """Some rows, in the order given."""
        return _take(self, rows)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All rows of several tables, one after the other, padded to the widest.

        Raises:
            ValueError: experts recorded in some tables only: routing replay would silently be off in the others.
        """
        recorded = [part.experts is not None for part in parts]
        if any(recorded) != all(recorded):
            raise ValueError(f"tables to join must all have recorded experts, or none of them; got {recorded}")
        longest = max(part.tokens.shape[1] for part in parts)
        wide = lambda x, columns, padding: np.concatenate(
            [x, np.full((len(x), columns - x.shape[1], *x.shape[2:]), padding, x.dtype)], axis=1
        )

        def column(name: str):
            columns = [getattr(part, name) for part in parts]
            if name == "experts":  # of prompts and of completions, each padded
                halves = [
                    np.split(x, [x.shape[1] - part.tokens.shape[1]], 1) for x, part in zip(columns, parts, strict=True)
                ]
                prompts = max(prompt.shape[1] for prompt, _ in halves)
                columns = [np.concatenate([wide(a, prompts, -1), wide(b, longest, -1)], 1) for a, b in halves]
            elif columns[0].ndim == 2:
                columns = [wide(x, longest, 0) for x in columns]
            return np.concatenate(columns)

        names = [field.name for field in dataclasses.fields(cls) if field.name != "experts" or all(recorded)]
        return cls(**{name: column(name) for name in names})

    @classmethod
    def empty(cls, member: np.ndarray, longest: int) -> Self:
        """N rows without tokens yet, with room for `longest`."""
        n = len(member)
        zeros = lambda dtype, *shape: np.zeros((n, *shape), dtype)
        return cls(
            zeros(np.int32, longest), zeros(np.int32), zeros(np.float32, longest), zeros(np.float32, longest),
            zeros(np.int32, longest), np.full(n, ABORTED, np.int8), np.asarray(member, np.int32),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the verifiers said.

    Attributes:
        value: f64 [N], the reward, higher is better; 0 where the status is not "ok".
        status: str [N], "ok", "timeout", "error" or "unscorable", separate from the value.
        parts: name -> f64 [N], named parts of the reward, NaN where a row has none.
    """

    value: np.ndarray
    status: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def ok(self) -> np.ndarray:
        """bool [N], whether the verifier judged the row at all."""
        return self.status == "ok"

    def take(self, rows: np.ndarray) -> Self:
        """Some rows, in the order given."""
        return Scored(self.value[rows], self.status[rows], {name: part[rows] for name, part in self.parts.items()})

    @classmethod
    def join(cls, tables: Sequence[Self]) -> Self:
        """All rows of several tables, one after the other; a part that a table lacks is NaN there."""
        names = dict.fromkeys(name for table in tables for name in table.parts)
        part = lambda table, name: table.parts.get(name, np.full(len(table.value), np.nan))
        return cls(
            np.concatenate([table.value for table in tables]), np.concatenate([table.status for table in tables]),
            {name: np.concatenate([part(table, name) for table in tables]) for name in names},
        )  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, meta_fields=("longest",), data_fields=(
    "ids", "segments", "used", "source", "row", "offset", "prompt_length", "length", "mask", "advantage", "behaviour",
    "proximal", "reference", "previous", "share", "counted", "experts",
))  # fmt: skip
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """What a gradient is made from: N sequences in M micro-batches of R packed rows of C tokens and up to n sequences each.

    Made by `rl.data.packing.micro_batches`; `spread` and `gathered` go between the N rows and the micro-batches.

    Attributes:
        ids: i32 [M, R, C], 0 in padding.
        segments: i32 [M, R, C], the place in 0 .. n - 1 of each token's sequence; -1 in padding.
        used: i32, micro-batches that hold anything; the others are never looked at.
        source: i32 [M, n], which of the N sequences sits there; -1: none.
        row, offset: i32 [M, n], row and column of each sequence's first token.
        prompt_length, length: i32 [M, n], tokens of prompt and completion; 0 where there is none.
        longest: L, columns of everything per completion token.
        mask: bool [M, n, L], tokens that count, as advantage.
        advantage: f32 [M, n, L].
        behaviour: f32 [M, n, L], log-probability of each token when it was sampled.
        proximal: f32 [M, n, L], log-probability under the policy the update starts from; None: under the policy itself.
        reference, previous: f32 [M, n, L], log-probability under policies to stay close to, or None.
        share: f32 [M, n], of the reference beside `previous`, or None.
        counted: bool [M, n], whether a sequence counts in means over sequences.
        experts: integers [M, R, layers, C, k], forced in a mixture of experts; -1: the router decides; None: always.
    """

    ids: np.ndarray
    segments: np.ndarray
    used: np.ndarray
    source: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    prompt_length: np.ndarray
    length: np.ndarray
    longest: int
    mask: np.ndarray | None = None
    advantage: np.ndarray | None = None
    behaviour: np.ndarray | None = None
    proximal: np.ndarray | None = None
    reference: np.ndarray | None = None
    previous: np.ndarray | None = None
    share: np.ndarray | None = None
    counted: np.ndarray | None = None
    experts: np.ndarray | None = None

    def spread(self, x: np.ndarray) -> np.ndarray:
        """[N, ...] -> [M, n, ...], 0 where there is no sequence."""
        x = np.asarray(x)
        if len(x) != (self.source >= 0).sum():
            raise ValueError(f"there must be one row per sequence, {(self.source >= 0).sum()}; got {len(x)}")
        out = np.zeros((*self.source.shape, *x.shape[1:]), x.dtype)
        out[self.source >= 0] = x[self.source[self.source >= 0]]
        return out

    def gathered(self, x: np.ndarray) -> np.ndarray:
        """[M, n, ...] -> [N, ...], the inverse of `spread`."""
        real = self.source >= 0
        out = np.empty((int(real.sum()), *x.shape[2:]), x.dtype)
        out[self.source[real]] = np.asarray(x)[real]
        return out

    def credit(
        self, mask: np.ndarray, advantage: np.ndarray, behaviour: np.ndarray, *,
        proximal: np.ndarray | None = None, reference: np.ndarray | None = None, previous: np.ndarray | None = None,
        share: np.ndarray | None = None, counted: np.ndarray | None = None,
    ) -> Self:  # fmt: skip
        """With what the N completions are worth: all [N, L'], share and counted (None: all) [N], advantage either.

        Raises:
            ValueError: something missing, of another shape, or a mask that is not False after each completion.
        """
        mask, tokens = np.asarray(mask, bool), self.gathered(self.length)
        if mask.ndim != 2 or len(mask) != len(tokens) or (mask & (np.arange(mask.shape[1]) >= tokens[:, None])).any():
            raise ValueError(
                f"mask must have a row for each of {len(tokens)} completions and be False after its last token; got shape "
                f"{mask.shape}"
            )
        advantage = np.asarray(advantage)
        if advantage.shape == mask.shape[:1]:
            advantage = np.broadcast_to(advantage[:, None], mask.shape)

        def column(name, x):
            if np.shape(x) != mask.shape:
                raise ValueError(f"{name} must have one number per completion token, {mask.shape}; got {np.shape(x)}")
            x = np.asarray(x)[:, : self.longest]
            return self.spread(np.pad(x, ((0, 0), (0, self.longest - x.shape[1]))))

        numbers = {"advantage": advantage, "behaviour": behaviour}
        optional = {"proximal": proximal, "reference": reference, "previous": previous}
        numbers |= {name: x for name, x in optional.items() if x is not None}
        rows = {"counted": np.ones(len(mask), bool) if counted is None else np.asarray(counted, bool)}
        if share is not None:
            rows["share"] = np.asarray(share, np.float32)
        return dataclasses.replace(
            self, mask=column("mask", mask), **{name: column(name, x).astype(np.float32) for name, x in numbers.items()},
            **{name: self.spread(x) for name, x in rows.items()},
        )  # fmt: skip


def pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists -> (i32 [N, longest] padded with 0, i32 [N] lengths)."""
    length = np.fromiter(map(len, rows), np.int32, len(rows))
    out = np.zeros((len(rows), max(1, int(length.max(initial=0)))), np.int32)
    out[np.arange(out.shape[1]) < length[:, None]] = _whole(
        "tokens", [token for row in rows for token in row], np.int32
    )
    return out, length


def _whole(name: str, value, dtype) -> np.ndarray:
    """The array in this integer type, unless that would change a number."""
    wide, limits = np.asarray(value), np.iinfo(dtype)
    if wide.size and wide.dtype.kind not in "iu":
        example = wide.ravel().tolist()[0]
        raise ValueError(f"{name} must be whole numbers of {limits.bits} bits; got {wide.dtype} like {example!r}")
    if wide.size and not limits.min <= wide.min() <= wide.max() <= limits.max:
        raise ValueError(f"{name} must be {limits.min} to {limits.max}; got {wide.min()} to {wide.max()}")
    return wide.astype(dtype)


def _take(table, rows: np.ndarray):
    pick = lambda x: x if x is None else (x.take(rows) if isinstance(x, Rollouts) else x[rows])
    return type(table)(**{field.name: pick(getattr(table, field.name)) for field in dataclasses.fields(table)})
