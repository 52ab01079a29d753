"""The host loop around the engine: refills free slots, decodes a chunk, takes in what was written, asks what next."""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.experts import id_dtype
from rl.models.language import LanguageModel
from rl.rollout import engine
from rl.rollout.check import check, check_members
from rl.rollout.engine import Rows, Settings
from rl.types import ABORTED, LENGTH, STOPPED, Requests, Rollouts


class Progress(NamedTuple):
    """What `between` is told after every chunk; rows are numbered as requested, later submissions after them.

    Attributes:
        ended: rows that ended in this chunk.
        running: rows in slots.
        waiting: rows not started.
        rollouts: all rows as far as they are; read only.
        chunks: decode calls so far.
    """

    ended: np.ndarray
    running: np.ndarray
    waiting: np.ndarray
    rollouts: Rollouts
    chunks: int


class Orders(NamedTuple):
    """What `between` may ask for; the default changes nothing.

    Attributes:
        weights, version: what decodes from now on.
        refresh: whether the caches of running rows are rebuilt under the weights of now (else they keep what older weights
            wrote).
        abort: rows to interrupt; they keep what they have and can go on later as `Requests.done`.
        submit: further rows.
        stop: interrupt everything and return.
    """

    weights: Any = None
    version: int | None = None
    refresh: bool = False
    abort: np.ndarray | tuple[int, ...] = ()
    submit: Requests | None = None
    stop: bool = False


def generate(
    model: LanguageModel,
    settings: Settings,
    weights,
    requests: Requests,
    key: jax.Array,
    *,
    version: int = 0,
    between: Callable[[Progress], Orders | None] | None = None,
) -> Rollouts:
    """Completes every request.

    Args:
        weights: parameters, or a population's (`eggroll.Strategy.draw`).
        key: of the run; with it, `uid` and the weights, a row's completion is determined, whatever else runs.
        version: recorded for every token.
        between: called after every chunk, and once where nothing is left to run; may swap weights, abort, submit and stop.

    Returns:
        `Rollouts`, one row per request, in their order, then those submitted later. Recorded experts are what was used when
        the next token was drawn: what a later refresh or resumption reads again does not replace them, it fills gaps.

    Raises:
        ValueError: an empty prompt, one that does not fit with its budget, ids beyond the vocabulary, members the weights do
            not have, `done` beyond its budget: names the rows. Orders about members or rows there are not.
    """
    check(model, settings, weights, requests)
    loop = _Loop(model, settings, weights, version, key, requests, compacting=between is None)
    while True:
        loop.refill()
        ended = loop.decode() if loop.running.size else np.zeros(0, np.int64)
        orders = between and between(loop.progress(ended))
        if orders:
            loop.check(orders)
            loop.obey(orders)
            if orders.stop:
                break
        if not (loop.running.size or loop.waiting):
            break
    return loop.rollouts


def warm_up(model: LanguageModel, settings: Settings, weights, *, stream: TextIO | None = None) -> dict[str, float]:
    """Compiles every static shape that `generate` can need, and prints which and how long each took.

    Args:
        stream: where the list goes; standard error if None.

    Returns:
        Seconds per shape.
    """
    state, key = engine.init(model, settings), jax.random.key(0)
    seconds, stream = {}, stream or sys.stderr

    def timed(name, call):
        start = time.perf_counter()
        out = jax.block_until_ready(call())
        seconds[name] = time.perf_counter() - start
        print(f"compiled {name} in {seconds[name]:.1f} s", file=stream, flush=True)
        return out

    decode = lambda view, state: engine.decode(model, settings, view, weights, state, key, jnp.int32(1))[0]
    for view in settings.views:
        state = timed(f"decode, cache {view}", lambda state=state, view=view: decode(view, state))
    zeros = np.zeros(settings.block, np.int32)
    rows = Rows(zeros + settings.slots, zeros, zeros, zeros, zeros, zeros.astype(np.uint32), zeros)
    for bucket in settings.buckets:
        for b in settings.shared:
            ids, none = np.zeros((b, bucket), np.int32), np.zeros(b, np.int32)
            call = lambda state=state, a=(ids, none, none - 1, rows): engine.admit(model, settings, weights, state, *a)
            state = timed(f"admit, {b} prompts of {bucket}", call)[0]
    state = timed("release", lambda state=state: engine.release(state, np.zeros(settings.slots, bool)))
    sizes = settings.sizes
    for i, size in enumerate(sizes):
        if i:
            state = engine.init(model, dataclasses.replace(settings, slots=size))
            for view in settings.views:
                state = timed(f"decode, cache {view}, {size} slots", lambda state=state, view=view: decode(view, state))
        for fewer in sizes[i + 1 :]:
            kept = np.arange(fewer, dtype=np.int32)
            timed(
                f"compact, {size} to {fewer} slots",
                lambda state=state, kept=kept: engine.compact(settings, state, kept),
            )
    return seconds


class _Loop:
    """Host side of a running engine: which row is in which slot, and what every row has so far."""

    def __init__(self, model, settings: Settings, weights, version: int, key, requests: Requests, compacting: bool):
        self.model, self.settings, self.weights, self.version, self.key = model, settings, weights, version, key
        self.compacting, self.chunks = compacting, 0
        self.state = engine.init(model, settings)
        self.row = np.full(settings.slots, -1)  # row of each slot
        self.requests, self.rollouts = requests, _begun(requests, model, settings)
        self.prefilled: list[tuple[np.ndarray, np.ndarray, np.ndarray, jax.Array]] = []  # experts yet to be taken in
        self.waiting = collections.deque(_unfinished(self.rollouts))

    @property
    def running(self) -> np.ndarray:
        """Rows in slots."""
        return self.row[self.row >= 0]

    def progress(self, ended: np.ndarray) -> Progress:
        return Progress(ended, self.running, np.fromiter(self.waiting, np.int64), self.rollouts, self.chunks)

    def refill(self) -> None:
        """Admits waiting rows to free slots, one call per prefill length."""
        free = np.flatnonzero(self.row < 0)[: len(self.waiting)]
        if not free.size:
            return
        rows = np.array([self.waiting.popleft() for _ in free])
        self.row[free] = rows
        self._admit(rows, free)

    def _admit(self, rows: np.ndarray, slots: np.ndarray) -> None:
        counts = self.requests.prompt_length[rows] + self.rollouts.length[rows] - 1
        buckets = np.array(self.settings.buckets)
        fitting = buckets[np.searchsorted(buckets, counts)]
        for bucket in np.unique(fitting):
            mine = np.flatnonzero(fitting == bucket)
            for some in np.split(mine, range(self.settings.block, len(mine), self.settings.block)):
                self._admit_block(rows[some], slots[some], counts[some], int(bucket))

    def _admit_block(self, rows: np.ndarray, slots: np.ndarray, counts: np.ndarray, bucket: int) -> None:
        ids = np.stack([self._sequence(row, bucket + 1) for row in rows])
        newest = ids[np.arange(len(rows)), counts]
        ids[np.arange(bucket + 1) >= counts[:, None]] = 0
        member, position = self.requests.member[rows], counts.astype(np.int32)
        # Rows with one member and one sequence share its prefill.
        whole = np.column_stack([ids[:, :bucket], counts, member])
        _, first, source = np.unique(whole, axis=0, return_index=True, return_inverse=True)
        limit = self.requests.prompt_length[rows] - 1 + self.requests.budget[rows]
        r, b = self.settings.block, next(b for b in self.settings.shared if b >= len(first))
        table = Rows(slots, source.reshape(-1), newest, position, limit, self.requests.uid[rows], member)
        fill = lambda x, n, value, dtype: np.concatenate([x, np.full((n - len(x), *x.shape[1:]), value)]).astype(dtype)
        padded = Rows(fill(slots, r, self.row.size, np.int32), *(fill(x, r, 0, _dtype(x)) for x in table[1:]))
        self.state, experts = engine.admit(
            self.model, self.settings, self.weights, self.state, fill(ids[first, :bucket], b, 0, np.int32),
            fill(counts[first], b, 0, np.int32), fill(member[first], b, -1, np.int32), padded,
        )  # fmt: skip
        if experts is not None:
            self.prefilled.append((rows, counts, source.reshape(-1), experts))

    def _sequence(self, row: int, length: int) -> np.ndarray:
        """Prompt and completion so far, cut or padded to `length`."""
        out = np.zeros(length, np.int32)
        n, m = self.requests.prompt_length[row], self.rollouts.length[row]
        out[:n], out[n : n + m] = self.requests.prompt[row, :n], self.rollouts.tokens[row, :m]
        return out

    def decode(self) -> np.ndarray:
        """One chunk; returns the rows that ended in it."""
        if self.compacting and not self.waiting:
            self._compact()
        slots = np.flatnonzero(self.row >= 0)
        rows = self.row[slots]
        position = self.requests.prompt_length[rows] - 1 + self.rollouts.length[rows]
        furthest = min(int(position.max()) + self.settings.chunk, self.settings.length)
        view = next(v for v in self.settings.views if v >= furthest)
        enough = self.settings.block if self.waiting else self.row.size + 1
        self.state, chunk = engine.decode(
            self.model, self.settings, view, self.weights, self.state, self.key, np.int32(enough)
        )
        self.chunks += 1
        chunk, prefilled = jax.device_get((chunk, self.prefilled))
        self.prefilled = []
        for some, counts, source, experts in prefilled:
            self._record(some, np.zeros_like(counts), counts, experts[source].swapaxes(0, 1))
        if chunk.experts is not None:
            self._record(rows, position, chunk.count[slots], chunk.experts[:, slots])
        return self._take_in(chunk, slots, rows)

    def _record(self, rows: np.ndarray, start: np.ndarray, count: np.ndarray, experts: np.ndarray) -> None:
        """Takes in the experts [W, R, ...] of `count` tokens of each row from its position `start` on, where there are none."""
        step, kept = np.arange(len(experts))[:, None], self.rollouts.experts
        there = step < count
        row, position = np.broadcast_to(rows, there.shape)[there], (start + step)[there]
        gap = self.requests.prompt.shape[1] - self.requests.prompt_length[row]  # between a prompt and its completion
        column = np.where(position < self.requests.prompt_length[row], position, position + gap)
        before = kept[row, column]
        kept[row, column] = np.where(before < 0, experts[there], before)

    def _take_in(self, chunk: engine.Chunk, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        done, count = self.rollouts, chunk.count[slots]
        step = np.arange(self.settings.chunk)[:, None]
        there = step < count
        at = (np.broadcast_to(rows, there.shape)[there], (done.length[rows] + step)[there])
        for kept, new in ((done.tokens, chunk.tokens), (done.logp, chunk.logp), (done.logp_full, chunk.logp_full)):
            kept[at] = new[:, slots][there]
        done.version[at] = self.version
        done.length[rows] += count
        over = ~chunk.active[slots]
        ended = rows[over]
        last = done.tokens[ended, done.length[ended] - 1]
        done.finish[ended] = np.where(np.isin(last, self.settings.stop), STOPPED, LENGTH)
        self.row[slots[over]] = -1
        return ended

    def _compact(self) -> None:
        """Halves the slots, as often as the running rows allow."""
        size = min(size for size in self.settings.sizes if self.running.size <= size <= self.row.size)
        if size < self.row.size:
            slots = np.argsort(self.row < 0, kind="stable")[:size]
            self.state, self.row = engine.compact(self.settings, self.state, slots.astype(np.int32)), self.row[slots]

    def check(self, orders: Orders) -> None:
        """Orders that name members or rows there are not."""
        weights, n = self.weights if orders.weights is None else orders.weights, len(self.requests)
        going = np.array([*self.running, *self.waiting], np.int64)
        check_members(weights, self.requests.member[going], going)
        if orders.submit is not None:
            check(self.model, self.settings, weights, orders.submit)
            n += len(orders.submit)
        abort = np.asarray(orders.abort)
        if abort.size and (abort.dtype.kind not in "iu" or abort.min() < 0 or abort.max() >= n):
            raise ValueError(f"rows to abort are whole numbers, 0 to {n - 1}; got {abort.tolist()}")

    def obey(self, orders: Orders) -> None:
        if orders.weights is not None:
            self.weights = orders.weights
        if orders.version is not None:
            self.version = orders.version
        if orders.submit is not None:
            before = len(self.requests)
            self.requests = _joined(self.requests, orders.submit)
            begun = _begun(orders.submit, self.model, self.settings)
            self.rollouts = Rollouts.join([self.rollouts, begun])
            self.waiting.extend(row for row in _unfinished(self.rollouts) if row >= before)
        gone = np.isin(self.row, np.asarray(orders.abort, np.int64)) & (self.row >= 0)
        if gone.any():
            self.state = engine.release(self.state, gone)
            self.row[gone] = -1
        dropped = set(map(int, orders.abort))
        self.waiting = collections.deque(row for row in self.waiting if row not in dropped)
        if orders.refresh:
            slots = np.flatnonzero(self.row >= 0)
            if slots.size:
                self._admit(self.row[slots], slots)


def _begun(requests: Requests, model: LanguageModel, settings: Settings) -> Rollouts:
    """Rollouts with room for every budget, holding what was done before."""
    out, before = Rollouts.empty(requests.member, int(requests.budget.max(initial=1))), requests.done
    if settings.record_experts:
        c, columns = model.config, requests.prompt.shape[1]
        shape = (len(out), columns + out.tokens.shape[1], c.layers, c.experts_per_token)
        out = dataclasses.replace(out, experts=np.full(shape, -1, id_dtype(c.experts)))
        if before is not None and before.experts is not None:
            there, old = before.mask, before.experts.shape[1] - before.tokens.shape[1]
            width = min(columns, old)
            out.experts[:, :width] = before.experts[:, :width]
            out.experts[:, columns:][np.nonzero(there)] = before.experts[:, old:][there]
    if before is not None:
        there = before.mask
        for name in ("tokens", "logp", "logp_full", "version"):
            target, source = getattr(out, name), getattr(before, name)
            target[np.nonzero(there)] = source[there]
        out.length[:] = before.length
        spent = np.where(before.length < requests.budget, ABORTED, LENGTH)  # the budget may have grown since
        out.finish[:] = np.where(before.finish == STOPPED, STOPPED, spent)
    return out


def _unfinished(rollouts: Rollouts) -> list[int]:
    return np.flatnonzero(rollouts.finish == ABORTED).tolist()


def _joined(a: Requests, b: Requests) -> Requests:
    """The rows of both, padded to the longer prompt, without what was done before."""
    width = max(a.prompt.shape[1], b.prompt.shape[1])
    prompt = np.concatenate([np.pad(x.prompt, ((0, 0), (0, width - x.prompt.shape[1]))) for x in (a, b)])
    names = ("prompt_length", "budget", "uid", "member")
    return Requests(prompt, *(np.concatenate([getattr(a, name), getattr(b, name)]) for name in names))


def _dtype(x: np.ndarray):
    return np.uint32 if x.dtype == np.uint32 else np.int32
