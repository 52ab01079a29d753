"""Routing replay: the experts that read each token, kept fixed while a mixture of experts learns from what it sampled.

A router that chooses otherwise in the sampler, in the learner's pass or after an update makes log-probabilities jump, and with
them the ratios of every objective. Forcing recorded experts (`LanguageModel.forward(experts=...)`) removes the jumps:

    R2: `recompute` under the weights an update starts from; removes the part of staleness. No bias in the first step.
    R3: `rl.rollout.engine.Settings.record_experts`, what the sampler used; also removes the part of sampler against learner.
        Biased from the first step on, since the router might not choose this set itself, and it has to be forced in the
        log-probabilities that ratios are centred on too.

Both are `Rollouts.experts`, the same array. Router logits still learn, through the experts chosen.
Source: MiniRL, arXiv 2512.01374, section 3; R3, arXiv 2510.11370.
"""

import functools

import jax
import numpy as np
from jax import Array

from rl.mesh import on_host
from rl.models.experts import id_dtype
from rl.models.language import LanguageModel, Params
from rl.types import Requests, Rollouts


def recompute(
    model: LanguageModel, params: Params, requests: Requests, rollouts: Rollouts, *, batch: int | None = None
) -> np.ndarray:
    """The experts that these parameters choose for every token of whole sequences (R2).

    Compiled once per model and shape.

    Args:
        batch: sequences in one pass, which bounds memory; None: 8. The last pass is padded to it.

    Returns:
        i8, i16 or i32 [N, P + L, layers, experts per token], as `Rollouts.experts`; here the newest token of a row has its
        experts too.

    Raises:
        ValueError: a model without experts, another number of requests than rollouts, a batch below 1.
    """
    c, batch = model.config, 8 if batch is None else batch
    if model.routed is None:
        raise ValueError(
            "only a mixture of experts has experts to recompute; this model has none: leave out routing replay"
        )
    if len(requests) != len(rollouts):
        raise ValueError(f"requests and rollouts must have the same rows; got {len(requests)} and {len(rollouts)}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1 sequence; got {batch}")
    (n, columns), longest = requests.prompt.shape, rollouts.tokens.shape[1]
    # a row's tokens are neighbours in the model and have the padding of the prompts between them in the tables
    prompt, length, place = requests.prompt_length[:, None], rollouts.length[:, None], np.arange(columns + longest)
    there = np.where(place < columns, place < prompt, place - columns < length)
    source = np.where(there, np.where(place < columns, place, place - columns + prompt), 0)
    ids = np.zeros((n, columns + longest), np.int32)
    ids[place < prompt + length] = np.concatenate([requests.prompt, rollouts.tokens], axis=1)[there]
    out = np.full((n, columns + longest, c.layers, c.experts_per_token), -1, id_dtype(c.experts))
    for start in range(0, n, batch):
        rows = np.arange(start, start + batch) % n  # the last pass is filled with rows that come again
        chosen = np.asarray(on_host(_routed(model, params, ids[rows], (prompt + length)[rows, 0])))
        chosen = np.take_along_axis(chosen, source[rows, :, None, None], axis=1)
        out[rows] = np.where(there[rows, :, None, None], chosen, -1)
    return out


def changed(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How much two routings of the same tokens differ, over the tokens that both have: the discrepancy to watch.

    Args:
        one, other: integers [N, T, layers, experts per token], as `Rollouts.experts`; the order of a token's experts does not
            count.

    Returns:
        "routing/decisions": share of (token, layer) whose chosen set differs; "routing/tokens": share of tokens for which it
        does in at least one layer. 0 where there are none.

    Raises:
        ValueError: different shapes.
    """
    if one.shape != other.shape:
        raise ValueError(f"two routings to compare must have one shape; got {one.shape} and {other.shape}")
    both = (one >= 0).all(-1) & (other >= 0).all(-1)
    differ = both & (np.sort(one, axis=-1) != np.sort(other, axis=-1)).any(-1)
    share = lambda part, whole: float(part.sum() / max(1, whole.sum()))
    return {"routing/decisions": share(differ, both), "routing/tokens": share(differ.any(-1), both.any(-1))}


@functools.partial(jax.jit, static_argnums=0)
def _routed(model: LanguageModel, params: Params, ids: Array, lengths: Array) -> Array:
    """[B, T, layers, k] of ids [B, T]."""
    row = lambda ids, length: model.routed(params, ids, None, 0, length)[2].swapaxes(0, 1)
    return jax.vmap(row)(ids, lengths).astype(id_dtype(model.config.experts))
