"""Which checkpoints outlive newer ones: a pure function of what is there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Keep(NamedTuple):
    """What is kept; a checkpoint stays if any one of the rules keeps it.

    Attributes:
      latest: the newest ones, at least 1.
      best: those with the highest `metric`; of equal ones the newest.
      metric: a number among the metrics that were saved with a checkpoint; one without it, or not finite, is never best.
      lower: whether a lower metric is better.
      every_steps: every checkpoint whose step is a multiple; 0 for none.
      every_seconds: the oldest, and then whenever so much wall-clock time has passed since the last one so kept; 0 for none.
    """

    latest: int = 2
    best: int = 0
    metric: str = ""
    lower: bool = False
    every_steps: int = 0
    every_seconds: float = 0.0


KEEP = Keep()


class Entry(NamedTuple):
    """A checkpoint as the rules see it."""

    step: int
    saved: float  # seconds since 1970
    metrics: Mapping[str, Any]


def check(keep: Keep) -> None:
    """Raises ValueError for a policy that cannot be meant."""
    if keep.latest < 1:
        raise ValueError(f"keep.latest must be at least 1, not {keep.latest}: a run resumes from its newest checkpoint")
    if min(keep.best, keep.every_steps, keep.every_seconds) < 0:
        raise ValueError(f"keep.best, keep.every_steps and keep.every_seconds must be at least 0; got {keep}")
    if (keep.best > 0) != bool(keep.metric):
        raise ValueError(f"keep.best and keep.metric go together; got best = {keep.best} and metric = {keep.metric!r}")


def doomed(entries: Sequence[Entry], keep: Keep) -> set[int]:
    """The steps to delete. Deleting them changes nothing about what is kept: asked again, the answer is none.

    Args:
      entries: all checkpoints, oldest first.
      keep: the policy.
    """
    kept = {entry.step for entry in entries[-keep.latest :]}
    if keep.every_steps:
        kept |= {entry.step for entry in entries if entry.step % keep.every_steps == 0}
    if keep.every_seconds:
        last = -math.inf
        for entry in entries:
            if entry.saved - last >= keep.every_seconds:
                kept.add(entry.step)
                last = entry.saved
    if keep.best:
        scored = [(entry.metrics[keep.metric], entry.step) for entry in entries if _finite(entry, keep.metric)]
        scored.sort(key=lambda pair: (-pair[0] if keep.lower else pair[0], pair[1]))
        kept |= {step for _, step in scored[-keep.best :]}
    return {entry.step for entry in entries} - kept


def _finite(entry: Entry, metric: str) -> bool:
    value = entry.metrics.get(metric)
    return isinstance(value, int | float) and math.isfinite(value)
