"""Which devices work on which sequences: the slowest group of every micro-batch as fast as can be found in milliseconds.

Of a micro-batch, all layouts are bounded from below at once, the most promising are filled longest sequence first, and the best
of those are improved by moving and exchanging sequences. The bound is kept: it says how far from the optimum an answer can be.
FlexSP (arXiv 2412.01523) solves the exact problem, a mixed-integer program, instead; it is the oracle of the tests.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl.data.sequence_parallel.buckets import deal, split
from rl.data.sequence_parallel.cost import Profile, sequence_seconds

_FILLED = 1_000  # layouts x sequences at once
_BISECTIONS, _IMPROVED, _SPLITS = 3, 3, 5
_CLOSE = 1.001  # an answer so near its bound is not searched further


@dataclasses.dataclass(frozen=True)
class Groups:
    """A micro-batch: devices in groups, sequences in groups.

    Attributes:
        sequence: i64 [n], which of the batch these are.
        group: i64 [n], where each one is.
        degree: i64 [G], devices of each group, descending: group g has those from sum(degree[:g]) on. Groups may be empty.
        seconds: M, of the slowest group.
        bound: no assignment takes fewer seconds with the layouts that were allowed.
    """

    sequence: np.ndarray
    group: np.ndarray
    degree: np.ndarray
    seconds: float
    bound: float


# seconds of the slowest group, degree of each group (where it is in `_Micro.degrees`), group of each sequence
_Way = tuple[float, np.ndarray, np.ndarray]


class _Micro(NamedTuple):
    """A micro-batch to solve: seconds [n, D], lengths [n], degrees [D], C, layouts [K, D], and `_bounds` of them [K]."""

    seconds: np.ndarray
    lengths: np.ndarray
    degrees: np.ndarray
    capacity: int
    layouts: np.ndarray
    bounds: np.ndarray


def plan(lengths: Sequence[int], profile: Profile, capacity: int, layouts: np.ndarray) -> tuple[Groups, ...]:
    """A batch as micro-batches, each divided over the devices; the sum of their seconds is the step's.

    The batch is cut into the fewest micro-batches that memory allows, and one to four more, of like lengths and of mixed
    lengths; the fastest is kept.

    Args:
        lengths: [n] tokens, known before the step.
        profile: costs.
        capacity: C, tokens that a device holds.
        layouts: to choose from; see `rl.data.sequence_parallel.layouts`.

    Returns:
        the micro-batches; every sequence is in one of them.

    Raises:
        ValueError: a sequence that no group can hold.
    """
    lengths, degrees = _checked(lengths, profile, capacity, layouts)
    best, fastest, tried = (), np.inf, 0
    fewest = -(-int(lengths.sum()) // (capacity * int(layouts[0] @ degrees)))
    for parts in range(max(1, fewest), len(lengths) + 1):
        # as many micro-batches as sequences always fit: then none has more tokens than the longest sequence
        fits = False
        for cut in (split, deal):
            runs = cut(lengths, parts)
            micros = [_micro(lengths[run], profile, degrees, capacity, layouts) for run in runs]
            found = _solve_all(micros, fastest - profile.constant * len(runs))
            fits |= found is not None
            if found:
                best = tuple(_groups(profile, *way) for way in zip(runs, micros, found, strict=True))
                fastest = sum(groups.seconds for groups in best)
        tried += fits
        if tried == _SPLITS:
            break
    return best


def solve(lengths: Sequence[int], profile: Profile, capacity: int, layouts: np.ndarray) -> Groups:
    """One micro-batch divided over the devices; see `plan`.

    Raises:
        ValueError: a sequence that no group can hold, or no division found that memory allows.
    """
    lengths, degrees = _checked(lengths, profile, capacity, layouts)
    micro = _micro(lengths, profile, degrees, capacity, layouts)
    found = _solve(micro)
    if found is None:
        raise ValueError(
            f"the sequences of a micro-batch must fit {int(layouts[0] @ degrees)} devices of {capacity} tokens; got "
            f"{len(lengths)} sequences of {lengths.sum()} tokens and found no way: make several micro-batches of them (`plan`)"
        )
    return _groups(profile, np.arange(len(lengths)), micro, found)


def _groups(profile: Profile, sequence: np.ndarray, micro: _Micro, found: _Way) -> Groups:
    slowest, kind, group = found
    return Groups(
        sequence, group, micro.degrees[kind], profile.constant + slowest, profile.constant + float(micro.bounds.min())
    )


def _checked(lengths, profile: Profile, capacity: int, layouts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lengths i64 [n], degrees i64 [D])."""
    lengths, degrees = np.asarray(lengths, np.int64), np.array(profile.degrees[: layouts.shape[1]])
    if layouts.shape[1] > len(degrees) or len(set((layouts[:, : len(degrees)] @ degrees).tolist())) != 1:
        raise ValueError(
            f"layouts must divide the same devices into groups of {degrees.tolist()}, a column each; got shape {layouts.shape} "
            f"for {sorted(set((layouts[:, : len(degrees)] @ degrees).tolist()))} devices: make them for this profile"
        )
    largest = int(degrees[layouts.any(axis=0)].max())
    most = capacity * largest
    wrong = np.flatnonzero((lengths < 1) | (lengths > most))
    if wrong.size:
        raise ValueError(
            f"sequences must have 1 to {most} tokens, which a group of the highest degree, {largest}, holds at "
            f"{capacity} a device; sequence {wrong[0]} has {lengths[wrong[0]]} ({wrong.size} such): shorten it, or allow a "
            "higher degree or more memory"
        )
    return lengths, degrees


def _micro(lengths: np.ndarray, profile: Profile, degrees: np.ndarray, capacity: int, layouts: np.ndarray) -> _Micro:
    seconds = sequence_seconds(profile, lengths, degrees)
    return _Micro(seconds, lengths, degrees, capacity, layouts, _bounds(seconds, lengths, degrees, capacity, layouts))


def _solve_all(micros: list[_Micro], fastest: float) -> list[_Way] | None:
    """Solutions; none ([]) as soon as it is certain that they would not take less than so many seconds; None: one has none."""
    least, out = sum(micro.bounds.min() for micro in micros), []
    for micro in micros:
        if least >= fastest:
            return []
        found = _solve(micro)
        if found is None:
            return None
        out.append(found)
        least += found[0] - micro.bounds.min()
    return out if least < fastest else []


def _solve(micro: _Micro) -> _Way | None:
    """None: nothing was found that fits."""
    finite = np.flatnonzero(np.isfinite(micro.bounds))
    sizes = (micro.layouts[finite] > 0).sum(axis=1)
    # many sizes have low bounds, but fill badly where memory is short
    order = finite[np.lexsort((micro.bounds[finite], sizes > 2))]
    mixed = (micro.layouts[order] > 0).sum(axis=1) > 1
    at_once, best = max(16, _FILLED // len(micro.lengths)), None
    for some in (order[~mixed], order[mixed]):  # all of one size first: to be no worse than they are
        filled: list[_Way] = []
        # a second turn only where memory is so short that all of the first failed
        for start in range(0, len(some), at_once):
            filled = filled or _fill(micro, micro.layouts[some[start : start + at_once]])
        ways = [_improve(micro, *way[1:]) for way in sorted(filled, key=lambda way: way[0])[:_IMPROVED]]
        best = min([*ways, *([best] if best else [])], key=lambda way: way[0], default=None)
        if best and best[0] <= _CLOSE * micro.bounds.min():
            break
    return best


def _bounds(seconds, lengths, degrees, capacity: int, layouts: np.ndarray) -> np.ndarray:
    """[K] seconds that each layout takes at least, without the constant; infinite where memory cannot suffice.

    With degrees d ascending, sequences of class c fit groups of d_c devices and more, not of d_(c-1). Of the classes from c on,
    the longest sequence takes as long as in its best group, and device-seconds are spent on the devices of groups from d_c on.
    """
    least = np.searchsorted(degrees * capacity, lengths)
    classes = np.arange(len(degrees))
    of_class = least == classes[:, None]
    longest = np.where(of_class, lengths, 0).max(axis=1, initial=0)
    slowest = np.stack([seconds[np.where(mine, lengths, 0).argmax()] * mine.any() for mine in of_class])
    work = of_class @ (seconds * degrees)  # [class, degree]
    usable = (layouts > 0)[:, None, :] & (classes >= classes[:, None])
    best = lambda cost: np.where(longest == 0, 0, np.where(usable, cost, np.inf).min(axis=2))  # [K, class]
    from_class = lambda x: np.flip(np.cumsum(np.flip(x, -1), -1), -1)
    devices = from_class(layouts * degrees)
    tokens = from_class(of_class @ lengths)
    spent = from_class(best(work))
    shared = np.divide(spent, devices, out=np.where(spent > 0, np.inf, 0.0), where=devices > 0)
    bound = np.maximum(shared.max(axis=1), best(slowest).max(axis=1))
    return np.where((tokens > capacity * devices).any(axis=1), np.inf, bound)


def _fill(micro: _Micro, layouts: np.ndarray) -> list[_Way]:
    """Ways to fill layouts, all layouts at once, longest sequence first, each into

    * the group that is then done first, or
    * the group that is then least full of tokens, or the fullest one that holds it, which need less memory, or
    * of the smallest groups that are then done by a limit the least loaded one, the limit being bisected: long sequences would
      else take the large groups' slow links where small groups have time enough.
    """
    seconds, lengths, degrees, capacity = micro[:4]
    kinds = np.full((len(layouts), layouts.sum(axis=1).max()), -1)
    for row, counts in zip(kinds, layouts, strict=True):
        row[: counts.sum()] = np.repeat(np.arange(len(degrees)), counts)[::-1]
    size = np.where(kinds >= 0, degrees[kinds] * capacity, 0)
    fill = functools.partial(_greedy, seconds, lengths, kinds, size)
    ways = [
        fill(lambda after, room: after),
        fill(lambda after, room: -room / np.maximum(size, 1)),
        fill(lambda after, room: room),
    ]
    low, high = np.full(len(kinds), micro.bounds.min()), np.min([slowest for slowest, _ in ways], axis=0)
    for _ in range(_BISECTIONS):
        limit = np.where(np.isfinite(high), (low + high) / 2, 2 * low)
        small = kinds * (1 + limit.max())  # a smaller group comes first whatever the loads
        ways.append(fill(functools.partial(_smallest_in_time, limit[:, None], small)))
        low, high = np.where(ways[-1][0] <= limit, (low, ways[-1][0]), (limit, high))
    kind = [row[row >= 0] for row in kinds]
    return [(slowest[k], kind[k], group[k]) for slowest, group in ways for k in np.flatnonzero(slowest < np.inf)]


def _smallest_in_time(limit, small, after, room):
    return np.where(after <= limit, small + after, np.inf)


def _greedy(seconds, lengths, kinds, size, score) -> tuple[np.ndarray, np.ndarray]:
    """Longest first into the group of the lowest score(seconds after, tokens free before) of those that have room.

    Returns:
        ([K] seconds of the slowest group, infinite where a sequence fits nowhere; [K, n] group of each sequence).
    """
    every, load, room = np.arange(len(kinds)), np.zeros(kinds.shape), size.copy()
    group, fits = np.empty((len(kinds), len(lengths)), np.int64), np.ones(len(kinds), bool)
    for i in np.argsort(-lengths, kind="stable"):
        after = load + seconds[i][kinds]
        ranked = np.where(room < lengths[i], np.inf, score(after, room))
        at = ranked.argmin(axis=1)
        fits &= ranked[every, at] < np.inf
        load[every, at] = after[every, at]
        room[every, at] -= lengths[i]
        group[:, i] = at
    return np.where(fits, load.max(axis=1), np.inf), group


def _improve(micro: _Micro, kind: np.ndarray, group: np.ndarray) -> _Way:
    """Moves a sequence of the slowest group elsewhere, or exchanges it, whichever helps most, until nothing helps.

    Every step leaves both groups faster than the slowest was, so this ends.
    """
    seconds, lengths, degrees, capacity = micro[:4]
    group, n = group.copy(), np.arange(len(group))
    size = degrees[kind] * capacity
    while True:
        load = np.bincount(group, seconds[n, kind[group]], len(kind))
        room = size - np.bincount(group, lengths, len(kind)).astype(np.int64)
        slow = load.argmax()
        mine = np.flatnonzero(group == slow)
        rest = load[slow] - seconds[mine, kind[slow]][:, None]
        elsewhere = seconds[mine][:, kind]  # [mine, G]
        moved = np.maximum(rest, load + elsewhere)
        moved[(lengths[mine][:, None] > room) | (np.arange(len(kind)) == slow)] = np.inf
        partner = load[group] - seconds[n, kind[group]] + elsewhere[:, group]  # [mine, n]
        exchanged = np.maximum(rest + seconds[:, kind[slow]], partner)
        grows = lengths[mine][:, None] - lengths  # of the partner's group
        exchanged[(grows > room[group]) | (-grows > room[slow]) | (group == slow)] = np.inf
        best = min(moved.min(initial=np.inf), exchanged.min(initial=np.inf))
        if not best < load[slow] * (1 - 1e-9):
            return float(load[slow]), kind, group
        if moved.min() == best:
            i, at = np.unravel_index(moved.argmin(), moved.shape)
            group[mine[i]] = at
        else:
            i, j = np.unravel_index(exchanged.argmin(), exchanged.shape)
            group[mine[i]], group[j] = group[j], slow
