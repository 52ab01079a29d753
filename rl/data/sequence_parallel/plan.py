"""Which devices work on which sequences: the slowest group of every micro-batch as fast as can be found in milliseconds.

Of a micro-batch, all layouts are bounded from below at once, the most promising are filled longest sequence first, and the best
of those are improved by moving and exchanging sequences. The bound is kept: it says how far from the optimum an answer can be.
FlexSP (arXiv 2412.01523) solves the exact problem, a mixed-integer program, instead; it is the oracle of the tests.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rl.data.sequence_parallel.buckets import split
from rl.data.sequence_parallel.cost import Profile, sequence_seconds

_FILLED, _IMPROVED, _SPLITS = 64, 4, 5


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


def plan(lengths: Sequence[int], profile: Profile, capacity: int, layouts: np.ndarray) -> tuple[Groups, ...]:
    """A batch as micro-batches, each divided over the devices; the sum of their seconds is the step's.

    The batch is cut into the fewest micro-batches that memory allows, and one to four more; the fastest is kept.

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
    lengths = np.asarray(lengths, np.int64)
    degrees = np.array(profile.degrees[: layouts.shape[1]])
    _check(lengths, capacity, degrees, layouts)
    found: list[tuple[Groups, ...]] = []
    fewest = -(-int(lengths.sum()) // (capacity * int(layouts[0] @ degrees)))
    for parts in range(fewest, len(lengths) + 1):
        # as many micro-batches as sequences always fit: then none has more tokens than the longest sequence
        step = [_solve(lengths, part, profile, capacity, layouts) for part in split(lengths, parts)]
        found += [tuple(step)] if None not in step else []
        if len(found) == _SPLITS:
            break
    return min(found, key=lambda step: sum(micro.seconds for micro in step), default=())


def _check(lengths: np.ndarray, capacity: int, degrees: np.ndarray, layouts: np.ndarray) -> None:
    most = capacity * int(degrees[layouts.any(axis=0)].max())
    wrong = np.flatnonzero((lengths < 1) | (lengths > most))
    if wrong.size:
        raise ValueError(
            f"sequences must have 1 to {most} tokens, which a group of the highest degree, {most // capacity}, holds at "
            f"{capacity} a device; sequence {wrong[0]} has {lengths[wrong[0]]} ({wrong.size} such): shorten it, or allow a "
            "higher degree or more memory"
        )


def _solve(lengths, sequence: np.ndarray, profile: Profile, capacity: int, layouts: np.ndarray) -> Groups | None:
    """One micro-batch; None: no layout was found that holds it."""
    lengths, degrees = lengths[sequence], np.array(profile.degrees[: layouts.shape[1]])
    seconds = sequence_seconds(profile, lengths, degrees)
    bounds = _bounds(seconds, lengths, degrees, capacity, layouts)
    order = np.argsort(bounds, kind="stable")[: np.isfinite(bounds).sum()]
    filled: list[tuple[float, np.ndarray, np.ndarray]] = []
    for start in range(0, len(order), _FILLED):  # more than one turn only where memory is so short that none succeeds
        filled = _fill(seconds, lengths, degrees, capacity, layouts[order[start : start + _FILLED]])
        if filled:
            break
    if not filled:
        return None
    filled = sorted(filled, key=lambda way: way[0])[:_IMPROVED]
    improved = [(*_improve(seconds, lengths, degrees, capacity, kind, group), kind) for _, kind, group in filled]
    slowest, group, kind = min(improved, key=lambda way: way[0])
    constant = profile.constant
    return Groups(sequence, group, degrees[kind], constant + slowest, constant + float(bounds[order[0]]))


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


def _fill(seconds, lengths, degrees, capacity: int, layouts) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Longest first into the group that is then done first, or that is then least full, of all layouts at once.

    Returns:
        (seconds of the slowest group, degree index of each group, group of each sequence) of every way that fits.
    """
    most = layouts.sum(axis=1).max()
    kinds = np.full((len(layouts), most), -1)
    for row, counts in zip(kinds, layouts, strict=True):
        row[: counts.sum()] = np.repeat(np.arange(len(degrees)), counts)[::-1]
    size = np.where(kinds >= 0, degrees[kinds] * capacity, 0)
    out, every = [], np.arange(len(kinds))
    for by_time in (True, False):
        load, room = np.zeros(kinds.shape), size.copy()
        group = np.empty((len(kinds), len(lengths)), np.int64)
        for i in np.argsort(-lengths, kind="stable"):
            after = load + seconds[i][kinds]
            score = after if by_time else (size - room + lengths[i]) / np.maximum(size, 1)
            at = np.where(room < lengths[i], np.inf, score).argmin(axis=1)
            load[every, at] = after[every, at]
            room[every, at] -= lengths[i]  # below 0 for good once nothing fits
            group[:, i] = at
        fits = (room >= 0).all(axis=1)
        out += [(load[k].max(), kinds[k][kinds[k] >= 0], group[k]) for k in np.flatnonzero(fits)]
    return out


def _improve(seconds, lengths, degrees, capacity: int, kind: np.ndarray, group: np.ndarray) -> tuple[float, np.ndarray]:
    """Moves a sequence of the slowest group elsewhere, or exchanges it, whichever helps most, until nothing helps.

    Every step leaves both groups faster than the slowest was, so this ends.
    """
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
            return float(load[slow]), group
        if moved.min() == best:
            i, at = np.unravel_index(moved.argmin(), moved.shape)
            group[mine[i]] = at
        else:
            i, j = np.unravel_index(exchanged.argmin(), exchanged.shape)
            group[mine[i]], group[j] = group[j], slow
