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

import jax
import optax
from jax import lax

from rl.optim import blocks, groups
from rl.optim.frugal import scale_by_split


def scale_by_badam(
    active: int = 1,
    *,
    every: int = 100,
    order: str = "reshuffled",
    pattern: str = r"(layers?[_/]|blocks?[_/]|h/)\d+",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Adam on the active blocks, plus weight_decay W there; zero elsewhere."""
    groups.number("active", active, 1)
    project = blocks.blocks(blocks.by_role(active, pattern), order, seed)
    inner = scale_by_split(project, optax.scale_by_adam(b1, b2, eps), every=every)

    def update(updates, state, params=None):
        window = state.count // every
        out, state = inner.update(updates, state)
        if isinstance(weight_decay, int | float) and not weight_decay:
            return out, state
        here = project.down({}, window, params)
        decay = project.join({}, window, here, params, here, None)
        return jax.tree.map(lambda u, w: u + lax.convert_element_type(weight_decay, u.dtype) * w, out, decay), state

    return optax.GradientTransformation(inner.init, update)


def badam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    active: int = 1,
    every: int = 100,
    order: str = "reshuffled",
    pattern: str = r"(layers?[_/]|blocks?[_/]|h/)\d+",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    rules: groups.Rules = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """BAdam on the layers, AdamW on what is outside of them.

    Args:
        active: blocks at a time.
        every: K, steps until the next blocks.
        order: "reshuffled" (the paper's random), "ascending", "descending", "mirror", "random".
        pattern: finds a block's name in a path, such as "layer_3"; a stack of layers below "layers" is always one block a
            layer.
        rules: (pattern, group) by path: "block", "full" (AdamW always), "frozen".

    Raises:
        ValueError: blocks that are not alike, fewer than `active`, a rule that fits nothing.
    """
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
            seed=seed,
        ),
        "frozen": optax.set_to_zero(),
    }
    default = lambda path, leaf: "block" if groups.stacked(path) or re.search(pattern, path) else "full"
    return groups.grouped(
        learning_rate,
        parts,
        rules=rules,
        default=default,
        weight_decay=weight_decay,
        decayed=lambda group: group == "full",
    )
