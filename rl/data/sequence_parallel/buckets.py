"""Lengths rounded up to few values, and batches cut into micro-batches: both exact, both by tokens alone."""

from collections.abc import Sequence

import numpy as np


def boundaries(lengths: Sequence[int], count: int) -> np.ndarray:
    """At most `count` values b_1 < b_2 < ..., the longest length last, such that rounding up to them adds the fewest tokens.

    Dynamic program over the m distinct lengths u: pad[k, j], the least padding of the shortest j of them in k buckets, is
    min_i pad[k - 1, i] + sum_{i < l <= j} n_l (u_j - u_l), in O(count m^2).

    Args:
        lengths: [n] tokens, at least one sequence.
        count: at least 1.

    Returns:
        i64, ascending.
    """
    if count < 1 or not len(lengths):
        raise ValueError(
            f"there must be sequences and at least 1 bucket; got {len(lengths)} sequences and {count} buckets"
        )
    distinct, times = np.unique(np.asarray(lengths, np.int64), return_counts=True)
    m = len(distinct)
    n_until, tokens_until = (np.concatenate([[0], np.cumsum(x)]) for x in (times, times * distinct))
    # [i, j]: lengths i..j, both included, in a bucket of length u_j
    padding = distinct * (n_until[1:] - n_until[:-1, None]) - (tokens_until[1:] - tokens_until[:-1, None])
    padding = np.where(np.arange(m)[:, None] <= np.arange(m), padding, np.inf)
    least, starts = padding[0], []
    for _ in range(min(count, m) - 1):
        before = np.concatenate([[np.inf], least[:-1]])  # of everything shorter than length i
        total = before[:, None] + padding
        starts.append(np.where(total.min(axis=0) < least, total.argmin(axis=0), 0))
        least = np.minimum(least, total.min(axis=0))
    ends, end = [], m - 1
    for start in reversed(starts):
        ends.append(end)
        end = start[end] - 1
        if end < 0:
            break
    else:
        ends.append(end)
    return distinct[ends[::-1]]


def bucketed(lengths: Sequence[int], room: int, *, count: int = 16) -> np.ndarray:
    """Lengths rounded up to `boundaries`, which also bounds how many shapes are compiled.

    There are `count` buckets, or as many more as it takes until the rounded tokens are at most (tokens + room) / 2, so that
    no more than half of the free memory is lost.

    Args:
        lengths: [n] tokens.
        room: tokens that all devices hold together.
        count: buckets to begin with.

    Returns:
        i64 [n].

    Raises:
        ValueError: more tokens than there is room for.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.sum() > room:
        raise ValueError(
            f"a micro-batch may hold at most the {room} tokens that the devices have room for; got {lengths.sum()}: split it"
        )
    while True:
        edges = boundaries(lengths, count)
        rounded = edges[np.searchsorted(edges, lengths)]
        if 2 * rounded.sum() <= lengths.sum() + room:
            return rounded
        count += 1


def split(lengths: Sequence[int], parts: int) -> list[np.ndarray]:
    """Sequences, longest first, cut into at most so many runs, the largest of which has the fewest tokens possible.

    Sequences of like length stay together: only the first micro-batches need large groups. The least bound that so many runs
    can keep is found by bisection; filling up to it, run after run, keeps it.

    Returns:
        indices of each run.
    """
    if parts < 1:
        raise ValueError(f"a batch must be cut into at least 1 micro-batch; got {parts}")
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    until = np.cumsum(lengths[order])
    low, high = int(lengths.max(initial=0)), int(lengths.sum())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(until, middle)) < parts else (middle + 1, high)
    return np.split(order, _runs(until, low))


def _runs(until: np.ndarray, bound: int) -> list[int]:
    """Where runs of at most `bound` tokens end, the last one apart."""
    ends, done = [], 0
    while len(until) and done + bound < until[-1]:
        ends.append(int(np.searchsorted(until, done + bound, side="right")))
        done = int(until[ends[-1] - 1])
    return ends


def deal(lengths: Sequence[int], parts: int) -> list[np.ndarray]:
    """Sequences, longest first, each to the part with the fewest tokens: parts of mixed lengths, which fill groups better.

    Returns:
        indices of each part that is not empty.
    """
    if parts < 1:
        raise ValueError(f"a batch must be cut into at least 1 micro-batch; got {parts}")
    lengths = np.asarray(lengths, np.int64)
    tokens, part = np.zeros(parts, np.int64), np.empty(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        part[i] = tokens.argmin()
        tokens[part[i]] += lengths[i]
    return [np.flatnonzero(part == k) for k in np.unique(part)]
