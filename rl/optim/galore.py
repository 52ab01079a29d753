"""GaLore: Adam on the gradient's projection onto its own top singular vectors.

Every `every` steps, Q from the SVD of the current gradient [m, n]: m >= n: Q [n, r], g = G Q; else Q [m, r], g = Q^T G (the
shorter side is projected, as in the paper; `optax.contrib.galore` projects the longer). W <- W - lr scale lift(Adam(g)). The
moments stay as they are at a refresh, and bias correction runs on. State of a matrix in f32: 4 (r min + 2 r max) bytes.

On the estimates of evolution: an estimate is a sum of low-rank noise, whose singular vectors at one step are those of the noise
as much as of the gradient, and what lies outside is lost for a whole window.

Source: Zhao et al., GaLore, arXiv 2403.03507. Weight decay is decoupled and of the weights before the step, as everywhere here;
the authors' code decays after it, a difference of second order in the learning rate.
"""

from typing import Any

import optax

from rl.optim import groups, projection
from rl.optim.frugal import linear_or_full, scale_by_split


def scale_by_galore(
    rank: int, *, every: int = 200, side: str = "short", b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """lift(Adam(G Q)); every leaf must be a matrix with both sides at least `rank`."""
    groups.number("rank", rank, 1)
    basis = projection.svd(lambda size: rank, side)
    return scale_by_split(basis, optax.scale_by_adam(b1, b2, eps), every=every, state="keep")


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    every: int = 200,
    scale: float = 0.25,
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
) -> optax.GradientTransformation:
    """GaLore on the weights of linear layers, AdamW on the others.

    Args:
        rank: r.
        every: steps between refreshes.
        scale: alpha, of the step of projected weights.
        side: "short", "long", "left", "right".
        mask: what decays, as of `optax.adamw`.
        rules: (pattern, group) by path: "full" (AdamW), "split" (GaLore), "frozen".

    Raises:
        ValueError: a rank above a matrix's smaller side, a leaf in "split" that is no matrix, a rule that fits nothing.
    """
    split = scale_by_galore(rank, every=every, side=side, b1=b1, b2=b2, eps=eps)
    parts = {
        "full": optax.scale_by_adam(b1, b2, eps),
        "split": optax.chain(split, optax.scale(scale)),
        "frozen": optax.set_to_zero(),
    }
    return groups.grouped(
        learning_rate, parts, rules=rules, default=linear_or_full("split"), weight_decay=weight_decay, mask=mask
    )
