"""FRUGAL: a small part of the gradient goes to an optimizer with memory, the rest moves by its sign, without any.

With a projection P of the current window, and t steps since the last refresh:

    small = P(G);  U = full(small), Adam by default: Mhat / (sqrt(Vhat) + eps), M and V in the shape of `small`
    W <- W - lr split_scale (P*(U) + free_scale sign(G - P*(small))) - lr weight_decay W

Every `every` steps P is chosen anew and the memory starts from zero (`state="reset"`, the recipe behind the published
experiments), is carried over as far as the projections overlap ("project", the paper's generic algorithm), or stays as it is
("keep", for bases that drift slowly, as GaLore does). Linear layers' weights are split; embeddings, output layer, norms, biases
and all else have AdamW in full. State bytes in f32: 8 (N_full + density N_split). Steps of the sign have one size: weights kept
in bf16 lose them once they are below half an ulp, so step f32 copies (as `eggroll.estimate.master_copy` makes).

On the estimates of evolution: the sign turns a gradient that is mostly noise into a walk of +-lr per weight, so use large
populations or `free_scale` 0.1, average before (`optax.MultiSteps`), or take `free="sgd"`, which keeps magnitudes.

Source: Zmushko, Beznosikov, Takac, Horvath, FRUGAL, ICML 2025, arXiv 2411.07837.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from rl.optim import blocks, groups, projection
from rl.optim.projection import Projection, right_side

FREE = {"sign": jnp.sign, "sgd": lambda g: g, "none": None}
STATES = ("reset", "project", "keep")
FULL = {
    "adam": lambda b1, b2, eps: optax.scale_by_adam(b1, b2, eps),
    "lion": lambda b1, b2, eps: optax.scale_by_lion(b1, b2),
    "momentum": lambda b1, b2, eps: optax.trace(b1),
}
PROJECTIONS = {
    "block": lambda density, order, side, seed: blocks.or_columns(density, order, seed),
    "columns": lambda density, order, side, seed: projection.columns(density, seed),
    "rows": lambda density, order, side, seed: projection.rows(density, seed),
    "randk": lambda density, order, side, seed: projection.randk(density, seed),
    "permutation": lambda density, order, side, seed: projection.permutation(density, seed),
    "svd": lambda density, order, side, seed: projection.svd(lambda size: round(density * size), side, seed),
    "random": lambda density, order, side, seed: projection.random(lambda size: round(density * size), side, seed),
}


class SplitState(NamedTuple):
    """Attributes: steps made, i32; what the projection stores; the state of the optimizer with memory."""

    count: Array
    stored: Any
    inner: Any


def scale_by_split(
    project: Projection,
    full: optax.GradientTransformation,
    free: projection.Free = None,
    *,
    every: int = 200,
    state: str = "reset",
) -> optax.GradientTransformation:
    """The direction P*(full(P(G))) + free(G - P*(P(G))), with P renewed every `every` steps.

    Args:
        project: P.
        full: sees P(G) alone; must not need the parameters.
        free: elementwise, without memory; None: nothing of the rest moves.
        every: steps between refreshes, the first before the first step.
        state: what becomes of the memory of `full` at a refresh: "reset", "project" or "keep".
    """
    groups.number("every", every, 1)
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}; got {state!r}")

    def init(params):
        return SplitState(jnp.zeros((), jnp.int32), project.init(params), full.init(project.zeros(params)))

    def update(updates, old, params=None):
        window, refresh = old.count // every, old.count % every == 0
        renew = functools.partial(project.renew, window=window, gradients=updates)
        stored = lax.cond(refresh, renew, lambda stored: stored, old.stored) if old.stored else old.stored
        where = project.where(stored, window, updates)
        small = project.down(where, updates)
        inner = old.inner
        if state == "reset":
            fresh = full.init(jax.tree.map(jnp.zeros_like, small))
            inner = jax.tree.map(lambda new, kept: jnp.where(refresh, new, kept), fresh, inner)
        elif state == "project":
            carry = lambda inner: carried(inner, project.where(old.stored, window - 1, updates), where, updates)
            inner = lax.cond(refresh & (old.count > 0), carry, lambda inner: inner, inner)
        step, inner = full.update(small, inner)
        out = project.join(where, step, updates, small, free)
        return out, SplitState(optax.safe_increment(old.count), stored, inner)

    def carried(inner, before, where, updates):
        """The memory's arrays of the shape of `small`, lifted by the last projection and seen through this one."""
        like = jax.tree.map(jnp.zeros_like, updates)
        small = project.down(where, like)
        kind, shapes = jax.tree.structure(small), [x.shape for x in jax.tree.leaves(small)]
        fits = lambda x: jax.tree.structure(x) == kind and [leaf.shape for leaf in jax.tree.leaves(x)] == shapes
        parts, outer = jax.tree.leaves(inner, is_leaf=fits), jax.tree.structure(inner, is_leaf=fits)
        lift = lambda x: project.down(where, project.join(before, x, like, small, None))
        return jax.tree.unflatten(outer, [lift(x) if fits(x) else x for x in parts])

    return optax.GradientTransformation(init, update)


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    density: float = 0.25,
    *,
    projection: str = "block",
    order: str = "random",
    side: str = "short",
    every: int = 200,
    state: str = "reset",
    full: str = "adam",
    free: str = "sign",
    free_scale: float = 1.0,
    split_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """FRUGAL, where `optax.adamw` was.

    Args:
        density: share of the split weights that have memory at a time, in [0, 1]. 0: sign descent. A block or a dense basis
            takes round(density x size), a subset the floor.
        projection: "block" (whole tensors; matrices of a shape too rare for one slot take "columns"), "columns", "rows",
            "randk", "permutation", "svd", "random".
        order: of blocks: "random", "ascending", "descending", "mirror", "reshuffled".
        side: of svd and random: "short", "long", "left", "right".
        every: steps between refreshes.
        state: of the memory at a refresh: "reset", "project", "keep".
        full: "adam", "lion" or "momentum" (of b1).
        free: "sign", "sgd" or "none".
        free_scale, split_scale: factors of the rest's step, and of the whole step of split weights.
        mask: what decays, as of `optax.adamw`.
        rules: (pattern, group) by path, the first that fits: "full" (AdamW), "split", "free" (no memory at all), "frozen".
        seed: of random choices.

    Raises:
        ValueError: a setting out of range or not a plain number, an unknown name, a rule that fits nothing, leaves that a
            projection cannot take.
    """
    groups.number("density", density, 0, 1, whole=False)
    groups.choose("order", order, blocks.ORDERS)
    right_side(side)
    made = groups.choose("projection", projection, PROJECTIONS)(density, order, side, seed)
    rest = groups.choose("free", free, FREE)
    without = (lambda g: free_scale * rest(g)) if rest else None
    memory = groups.choose("full", full, FULL)(b1, b2, eps)
    if (state, full) == ("project", "adam") and projection in ("svd", "random"):
        raise ValueError(
            f"state 'project' of full 'adam' needs a projection onto coordinates, because variances seen through another basis "
            f"can be negative; got projection {projection!r}: take state 'keep' or 'reset', or rl.optim.ldadam"
        )
    if state == "keep" and projection not in ("svd", "random") and 0 < density < 1:
        raise ValueError(
            f"state 'keep' would leave moments with other coordinates than they were made from; got projection {projection!r}: "
            "take state 'reset' or 'project'"
        )
    split = scale_by_split(made, memory, without, every=every, state=state)
    parts = {
        "full": optax.scale_by_adam(b1, b2, eps),
        "split": optax.chain(split, optax.scale(split_scale)),
        "free": optax.stateless(lambda g, _: jax.tree.map(lambda x: split_scale * (without(x) if rest else 0 * x), g)),
        "frozen": optax.set_to_zero(),
    }
    return groups.grouped(
        learning_rate, parts, rules=rules, default=linear_or_full("split"), weight_decay=weight_decay, mask=mask
    )


def linear_or_full(group: str):
    """A default for `groups.labels`: weights of linear layers are of this group, the others "full"."""
    return lambda path, leaf: group if groups.is_linear(path, leaf) else "full"
