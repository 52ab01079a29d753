"""BAdam: AdamW on one block (a layer) of the network at a time, the others stand still.

For `every` steps the active block's weights have AdamW, W <- W - lr (Mhat / (sqrt(Vhat) + eps) + weight_decay W); then its
moments are dropped and the next block starts from zero. Blocks are alike and share one slot, so state is 8 bytes per weight of
one block (times `active`). By default everything outside blocks (embeddings, final norm, output layer) has AdamW always, as in
the comparisons of the FRUGAL paper; the rule ("", "frozen") behind rules for blocks freezes it instead.

On the estimates of evolution: one block's update is as noisy as it would be in the whole, so BAdam only moves fewer weights;
perturbing the active block alone, which would spend the population on it, needs `frozen` rules of the strategy.

Source: Luo, Yu, Li, BAdam, arXiv 2404.02827, which suggests every = samples / (batch x blocks), 50 to 100. A block's f32 master
copy is not kept here: masters are the caller's.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax

from rl.optim import blocks, groups
from rl.optim.frugal import scale_by_split

BLOCK = r"(?i)((layers?|blocks?)[_/]?|(?<![^/])h/)\d+"  # "layer_3", "blocks/3", "TransformerBlock_3", "h/3"


def scale_by_badam(
    active: int = 1,
    *,
    every: int = 100,
    order: str = "reshuffled",
    pattern: str = BLOCK,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Adam on the active blocks, plus weight_decay W there; zero elsewhere."""
    groups.number("active", active, 1)
    project = blocks.blocks(blocks.by_role(active, pattern), order, seed)
    inner = scale_by_split(project, optax.scale_by_adam(b1, b2, eps), every=every)

    def update(updates, state, params=None):
        window, decay = state.count // every, weight_decay
        decay = decay(state.count) if callable(decay) else decay
        out, state = inner.update(updates, state)
        if isinstance(decay, int | float) and not decay:
            return out, state
        if params is None:
            raise ValueError("weight decay needs the current value of parameters: call update(updates, state, params)")
        where = project.where({}, window, params)
        here = project.down(where, params)
        active = project.join(where, here, params, here, None)
        added = lambda u, w, keep: u + lax.convert_element_type(decay, u.dtype) * w if keep else u
        keep = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
        return jax.tree.map(added, out, active, keep), state

    return optax.GradientTransformation(inner.init, update)


def badam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    active: int = 1,
    every: int = 100,
    order: str = "reshuffled",
    pattern: str = BLOCK,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] | None = None,
    rules: groups.Rules = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """BAdam on the layers, AdamW on what is outside of them.

    Args:
        active: blocks at a time.
        every: K, steps until the next blocks.
        order: "reshuffled" (the paper's random), "ascending", "descending", "mirror", "random".
        pattern: finds a block's name in a path, such as "layer_3", the first match; a stack of layers below "layers" is
            always one block a layer.
        mask: parameters -> tree of bools, what decays; None: all.
        rules: (pattern, group) by path: "block", "full" (AdamW always), "frozen".

    Raises:
        ValueError: no blocks, blocks that are not alike, fewer than `active`, a rule that fits nothing, a mask that is a tree.
    """
    if mask is not None and not callable(mask):
        raise ValueError("mask must be a function of the parameters, because blocks see parts of them; got a tree")
    parts = {
        "full": optax.scale_by_adam(b1, b2, eps),
        "block": scale_by_badam(
            active,
            every=every,
            order=order,
            pattern=pattern,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=mask,
            seed=seed,
        ),
        "frozen": optax.set_to_zero(),
    }
    default = lambda path, leaf: "block" if groups.stacked(path) or re.search(pattern, path) else "full"
    tx = groups.grouped(
        learning_rate,
        parts,
        rules=rules,
        default=default,
        weight_decay=weight_decay,
        mask=mask,
        decayed=lambda group: group == "full",
    )

    def init(params):
        chosen = jax.tree.leaves(groups.labels(params, rules, default, parts))
        if chosen and "block" not in chosen:
            some = ", ".join(path for path, _ in groups.leaves(params)[:5])
            raise ValueError(
                f"pattern {pattern!r} finds no block in paths such as {some}: mend it, or take optax.adamw"
            )
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)
