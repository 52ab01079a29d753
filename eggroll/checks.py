"""What a strategy refuses: settings out of range, batches and scores of other shapes than it evaluates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eggroll import noise

Score = Callable[[Any, Any], Any]
SUMS = ("rebuilt", "reduced")


def check_settings(rank, sigma, kind, reuse, chunk, sums) -> None:
    """Raises ValueError where settings are unknown or out of range."""
    if kind not in noise.KINDS:
        raise ValueError(f"noise is one of {noise.KINDS}; got {kind!r}")
    if sums not in SUMS:
        raise ValueError(f"sums is one of {SUMS}; got {sums!r}")
    for name, value in (("rank", rank), ("reuse", reuse), ("chunk", 1 if chunk is None else chunk)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1; got {value!r}")
    if not callable(sigma) and not sigma > 0:
        raise ValueError(f"sigma must be positive (or a schedule of the generation); got {sigma!r}")


def scalar(score: Score, has_aux: bool) -> Callable:
    """score with a checked scalar result, always as (score, aux)."""

    def checked(params, row):
        out = score(params, row)
        value, aux = out if has_aux else (out, None)
        if jnp.shape(value) != ():
            raise ValueError(f"score must return one number per row (higher is better); got shape {jnp.shape(value)}")
        return value, aux

    return checked


def check_batch(batch, lead: tuple[int, ...]) -> None:
    """Raises ValueError where arrays differ in their leading axes, these and one of evaluations."""
    shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    n = len(lead) + 1
    if (
        not shapes
        or len({s[:n] for s in shapes.values()}) > 1
        or any(len(s) < n or s[: n - 1] != lead for s in shapes.values())
    ):
        want = f"[members = {lead[0]}, evaluations]" if lead else "[evaluations]"
        raise ValueError(f"every array of the batch needs the same leading axes {want}; got {shapes}")
