"""What a step's answers are worth: advantages, and the log-probabilities that ratios and penalties are relative to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl import estimate as estimates
from rl.data.replay import Groups
from rl.learners.settings import Settings
from rl.models.language import LanguageModel, Params
from rl.objectives import advantages, vcpo
from rl.objectives.kl import convex_share
from rl.objectives.policy_gradient import Credit
from rl.objectives.weights import approximate_proximal
from rl.types import TrainBatch

Score = Callable[[Any], np.ndarray]  # a policy -> log-probabilities of all answers, f32 [P, G, L]


def assign(
    settings: Settings,
    groups: Groups,
    step: int,
    *,
    longest: int,
    stop: tuple[int, ...],
    own: Score,
    free: Score,
    policies: tuple[Any, Any, Any],
    updates: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Credit by answer and token, under the names of `TrainBatch.credit`.

    Unjudged answers, and groups without spread where `informative_only`, count nowhere. Truncated ones that are dropped lose
    their tokens after the statistics were taken.

    Args:
        settings: see `Settings`.
        groups: the step's.
        step: counted from 0.
        longest: tokens, the budget of an answer.
        stop: tokens that end an answer.
        own, free: score all answers, under the step's routing replay or without.
        policies: (the one the step starts from, reference or None, that of the step before or None).
        updates: of this step; with a single one the proximal policy is the policy itself.

    Returns:
        (credit, rewards f32 [P, G] with their penalties). Of the credit, mask is bool [P, G, L]; advantage, behaviour and,
        where they are needed, proximal, reference and previous f32 [P, G, L]; counted bool and share f32 [P, G]. Where the
        proximal policy is interpolated, "proximal" holds ages, for `interpolated`.
    """
    policy, reference, previous = policies
    counted = groups.ok & (groups.informative[:, None] | (not settings.informative_only))
    judged = groups.mask & counted[..., None]
    mask = judged & ~truncated(groups, longest, stop)[..., None] if settings.drop_truncated else judged
    out = {"mask": mask, "behaviour": groups.logp, "counted": counted}
    if settings.proximal == "sampler":
        out["proximal"] = groups.logp
    elif settings.proximal == "interpolated":
        out["proximal"] = (step + 1 - groups.version).astype(np.float32)
    elif updates > 1:
        out["proximal"] = own(policy)
    if settings.anchored:
        out["reference"] = free(reference)
    if settings.kl_convex:
        share = float(convex_share(step))
        out["previous"] = free(previous) if share < 1 else out["reference"]  # alone, the reference has all of it
        out["share"] = np.full(counted.shape, share, np.float32)
    value, by_token = groups.value, {}
    if settings.overlong:
        value = value + np.asarray(advantages.overlong_penalty(groups.length, longest, settings.overlong))
    if settings.kl_in_reward:
        known = settings.proximal != "interpolated" and "proximal" in out
        penalty = np.where(judged, (out["proximal"] if known else own(policy)) - out["reference"], 0)
        if settings.advantage == "whitened_returns":
            by_token = {"kl": rows(penalty), "coefficient": settings.kl_in_reward}
        else:
            value = value - settings.kl_in_reward * penalty.sum(axis=-1)
    value = value.astype(np.float32)
    made = _advantage(settings.advantage, settings.advantage_options, value, counted, rows(judged), by_token)
    return out | {"advantage": np.asarray(made).reshape(judged.shape)}, value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advantage(name: str, options: tuple[tuple[str, Any], ...], value, ok, mask, by_token) -> jax.Array:
    return advantages.ADVANTAGES[name](value, ok, mask, **dict(options), **by_token)


def truncated(groups: Groups, longest: int, stop: tuple[int, ...]) -> np.ndarray:
    """bool [P, G], answers that used up their budget without ending."""
    last = np.take_along_axis(groups.tokens, np.maximum(groups.length - 1, 0)[..., None], axis=-1)[..., 0]
    return (groups.length >= longest) & ~np.isin(last, stop)


def interpolated(micro: TrainBatch, logp: jax.Array) -> Credit:
    """Credit whose proximal policy lies between the sampler and the policy of now; "proximal" of the batch holds ages."""
    credit = estimates.credit_of(micro)
    written = -jnp.where(credit.mask, credit.proximal, 1)
    behaviour = jnp.where(credit.mask, credit.behaviour, 0)
    return credit._replace(proximal=approximate_proximal(logp, behaviour, written, 0))


def logit_norms(
    model: LanguageModel,
    params: Any,
    batch: TrainBatch,
    *,
    temperature: float,
    base: Any = None,
    merge: Callable[[Any, Any], Params] = lambda base, params: params,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `rl.estimate.norms`, but with respect to the logits: forward passes alone.

    With z the logits over the temperature T, log p_v = z_v - lse(z), and at T / 2 it is 2 z_v - lse(2 z): the chance that two
    draws agree, exp(lse(2 z) - 2 lse(z)), is exp(2 log p_T(v) - log p_{T/2}(v)) of any token v. So it costs no more than a
    second normalisation of the same logits.
    """
    score = lambda t: estimates.completion_scores(model, merge(base, params), batch, temperature=t, mesh=mesh)[0]
    logp, halved = jax.vmap(score)(temperature * jnp.array([1.0, 0.5]))
    mask = batch.mask & batch.counted[..., None]
    weight = jnp.where(mask, logp - batch.behaviour, 0).sum(axis=-1)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    agree = jnp.exp(2 * logp - halved)
    return vcpo.logit_squared_norms(flat(logp), flat(agree), flat(mask)).reshape(weight.shape), weight


NORMS = {"exact": estimates.norms, "logits": logit_norms}


def rows(x: np.ndarray) -> np.ndarray:
    """[P, G, ...] -> [P G, ...]."""
    return x.reshape(-1, *x.shape[2:])
