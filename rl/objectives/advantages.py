"""Advantages of completions from the rewards of their group.

Groups are rows of [P, G] arrays; `ok` marks the samples a verifier judged: the others are left out of every statistic and get
exactly 0. So does everyone where all rewards are equal: rewards are taken relative to the least one first, since a mean of
equal f32 numbers need not be that number, and dividing what is left over by a tiny spread would be a signal made of rounding.
Everything here is stop-gradient by nature: no model takes part.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rl.objectives import vcpo


def group_std(rewards: Array, ok: Array, *, ddof: int = 1, delta: float = 1e-6) -> Array:
    """GRPO: (R - mean) / (std + delta) within the group, [P, G] -> [P, G].

    delta: 1e-6 in verl, Tunix and slime, 1e-5 in AReaL, 1e-4 in TRL, 1e-9 in OpenRLHF; all take the unbiased std (ddof 1). A
    group with one judged sample gets 0, having nothing to compare with; verl falls back to the reward itself there.
    """
    centred, judged = _centred(rewards, ok)
    return centred / (jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(judged - ddof, 1)) + delta)


def group_mean(rewards: Array, ok: Array) -> Array:
    """Dr. GRPO: R - mean, [P, G] -> [P, G]; on-policy its expected gradient is (1 - 1/G) times the true one."""
    return _centred(rewards, ok)[0]


def leave_one_out(rewards: Array, ok: Array) -> Array:
    """RLOO: R - mean of the others = n/(n-1) (R - mean), [P, G] -> [P, G], n samples judged; unbiased; 0 where n = 1."""
    centred, judged = _centred(rewards, ok)
    return centred * judged / jnp.maximum(judged - 1, 1)


def batch_std(rewards: Array, ok: Array, *, ddof: int = 0, delta: float = 1e-6) -> Array:
    """Lite PPO: (R - group mean) / (std of all rewards of the batch + delta), [P, G] -> [P, G]."""
    everyone, judged = _centred(rewards.reshape(1, -1), ok.reshape(1, -1))
    deviation = jnp.sqrt((everyone**2).sum() / jnp.maximum(judged - ddof, 1)[0, 0])
    return _centred(rewards, ok)[0] / (deviation + delta)


def length_weighted(rewards: Array, ok: Array, lengths: Array) -> Array:
    """OPO: R - sum_j L_j R_j / sum_j L_j, [P, G] -> [P, G], the baseline of least variance if |grad|^2 grows with length."""
    lengths = jnp.where(ok, lengths, 0).astype(jnp.float32)
    above = _above(rewards, ok)
    total = lengths.sum(axis=1, keepdims=True)
    return jnp.where(ok, above - (lengths * above).sum(axis=1, keepdims=True) / jnp.where(total > 0, total, 1), 0)


def minimum_variance(
    rewards: Array, ok: Array, log_weights: Array | None = None, squared_norms: Array | None = None
) -> Array:
    """VCPO: (R - b*) / population std, [P, G] -> [P, G]; see `rl.objectives.vcpo.minimum_variance_baseline`.

    No division where the std is at most 1e-8. Without weights or norms, on-policy or of equal size, b* is the group's mean.
    """
    one = jnp.ones(rewards.shape, jnp.float32)
    baseline = vcpo.minimum_variance_baseline(
        0 * one if log_weights is None else log_weights, one if squared_norms is None else squared_norms, rewards, ok
    )
    centred, judged = _centred(rewards, ok)
    deviation = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(judged, 1))
    return jnp.where(ok, rewards - baseline[:, None], 0) / jnp.where(deviation > 1e-8, deviation, 1)


def whitened_returns(
    rewards: Array, ok: Array, mask: Array, *, kl: Array | None = None, coefficient: float = 0.0, discount: float = 1.0
) -> Array:
    """REINFORCE++: returns of every token, whitened over all tokens of the batch, [N, L].

    G_t = sum_{s >= t} discount^(s-t) (R 1[s last] - coefficient kl_s), then (G - mean) / (population std + 1e-6). Steps count
    sampled tokens: a masked stretch in between (a tool's answer) is no time.

    Args:
        rewards: [P, G].
        ok: bool [P, G].
        mask: bool [N, L].
        kl: [N, L], estimates per token (k1), for the penalty in the reward.
        coefficient: of the penalty.
        discount: per token.
    """
    mask = mask & ok.reshape(-1, 1)
    remaining = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    step = jnp.where(remaining == 1, jnp.where(ok, rewards, 0).reshape(-1, 1), 0).astype(jnp.float32)
    if kl is not None:
        step = step - coefficient * jnp.where(mask, kl, 0)

    def back(later, now):
        value, real = now
        total = jnp.where(real, value + discount * later, later)
        return total, total

    _, returns = jax.lax.scan(back, jnp.zeros(len(mask), step.dtype), (step.T, mask.T), reverse=True)
    return _whiten(returns.T, mask)


def whitened_group_mean(rewards: Array, ok: Array, mask: Array) -> Array:
    """REINFORCE++-baseline: R - group mean at every token, whitened over all tokens of the batch, [N, L]."""
    return _whiten(to_tokens(group_mean(rewards, ok), mask), mask & ok.reshape(-1, 1))


def adora_weight(
    rewards: Array,
    ok: Array,
    lengths: Array,
    *,
    success: float = 0.5,
    longest_failure: float | None = None,
    attenuation: float = 0.1,
    empty: str = "language",
) -> Array:
    """ADORA: weight of a prompt, [P]: 1 if its longest success is longer than its mean failure, else `attenuation`.

    Failures of `longest_failure` tokens and more are truncated, not answers, and left out (None: none is). The two released
    codes disagree on empty sets (arXiv 2602.10019, repo ShadeCloak/ADORA; the paper's own formulas are not verified):

    "language": no success -> attenuation;  successes but no failure left -> 1
    "vision":   no success -> 1;            successes but no failure left -> attenuation

    It multiplies advantages after any normalisation, and lowers their mean size: log its mean before crediting the method.

    Args:
        rewards: [P, G].
        ok: bool [P, G].
        lengths: [P, G], counted tokens (no tool output).
        success: a reward above it is a success (1.01 of 3 in the release's language task, 0.5 in the vision task).
        longest_failure: tokens (4054 and 4094 there, about its generation limit).
        attenuation: weight of the others.
        empty: "language" or "vision".

    Raises:
        ValueError: an unknown convention.
    """
    if empty not in ("language", "vision"):
        raise ValueError(f"empty must be 'language' or 'vision', one of the released conventions; got {empty!r}")
    lengths = jnp.asarray(lengths, jnp.float32)
    won = ok & (rewards > success)
    lost = ok & (rewards <= success)
    if longest_failure is not None:
        lost = lost & (lengths < longest_failure)
    longest = jnp.where(won, lengths, -jnp.inf).max(axis=1)
    mean = jnp.where(lost, lengths, 0).sum(axis=1) / jnp.maximum(lost.sum(axis=1), 1)
    mean = jnp.where(lost.any(axis=1), mean, -jnp.inf if empty == "language" else jnp.inf)
    whole = longest > mean
    if empty == "vision":
        whole = whole | ~won.any(axis=1)
    return jnp.where(whole, 1.0, attenuation)


def overlong_penalty(lengths: Array, hard: int, cache: int) -> Array:
    """DAPO: added to the reward, 0 up to hard - cache tokens, then falling linearly to -1 at hard, -1 beyond.

    Raises:
        ValueError: a cache outside 1 to hard.
    """
    if not 1 <= cache <= hard:
        raise ValueError(f"the overlong penalty needs 1 <= cache <= hard; got cache {cache} and hard {hard}")
    return -jnp.clip((jnp.asarray(lengths, jnp.float32) - (hard - cache)) / cache, 0, 1)


def to_tokens(advantage: Array, mask: Array) -> Array:
    """[P, G] -> [N, L], prompt-major: each sample's advantage at each of its tokens, 0 where masked."""
    return jnp.where(mask, advantage.reshape(-1, 1), 0)


def check(name: str, samples: int, options: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raises ValueError for an unknown name or option, or where samples of a group are compared and the group has one."""
    if name not in ADVANTAGES:
        raise ValueError(f"advantage must be one of {', '.join(ADVANTAGES)}; got {name!r}")
    if samples < 2 and name not in ALONE:
        raise ValueError(
            f"advantage {name!r} compares the samples of a prompt, so it needs at least 2; got {samples}: raise the samples "
            f"per prompt or take one of {', '.join(ALONE)}"
        )
    group, token = jnp.zeros((1, samples)), jnp.ones((samples, 1), bool)
    try:
        jax.eval_shape(lambda: ADVANTAGES[name](group, group == 0, token, **options))
    except (KeyError, TypeError) as error:
        raise ValueError(f"advantage {name!r} does not take the options {dict(options)}: {error}") from error


def _above(rewards: Array, ok: Array) -> Array:
    """Rewards relative to the least judged one of the group, f32, 0 where not judged."""
    least = jnp.where(ok, rewards, jnp.inf).min(axis=1, keepdims=True)
    return jnp.where(ok, rewards - jnp.where(jnp.isposinf(least), 0, least), 0).astype(jnp.float32)


def _centred(rewards: Array, ok: Array) -> tuple[Array, Array]:
    """([P, G] minus the mean of the judged, [P, 1] how many were judged)."""
    above, judged = _above(rewards, ok), ok.sum(axis=1, keepdims=True)
    return jnp.where(ok, above - above.sum(axis=1, keepdims=True) / jnp.maximum(judged, 1), 0), judged


def _whiten(x: Array, mask: Array, delta: float = 1e-6) -> Array:
    count = jnp.maximum(mask.sum(), 1)
    # relative to one of them, for the same reason as rewards
    x = jnp.where(mask, x - jnp.where(mask.any(), jnp.where(mask, x, jnp.inf).min(), 0), 0)
    x = jnp.where(mask, x - x.sum() / count, 0)
    return x / (jnp.sqrt((x**2).sum() / count) + delta)


def adora(rewards: Array, ok: Array, mask: Array, *, base: str = "group_std", **settings) -> Array:
    """The advantages of another rule times `adora_weight` of their group, which takes the settings; [N, L]."""
    weight = adora_weight(rewards, ok, _lengths(ok, mask), **settings)
    return ADVANTAGES[base](rewards, ok, mask) * jnp.repeat(weight, ok.shape[1])[:, None]


def _lengths(ok: Array, mask: Array) -> Array:
    return mask.sum(axis=1).reshape(ok.shape)


def _grouped(rule: Callable) -> Callable:
    return lambda rewards, ok, mask, **settings: to_tokens(rule(rewards, ok, **settings), mask)


# name -> f(rewards [P, G], ok bool [P, G], mask bool [N, L], **settings of the rule) -> f32 [N, L]
ADVANTAGES: dict[str, Callable] = {
    "reward": _grouped(lambda rewards, ok: jnp.where(ok, rewards, 0).astype(jnp.float32)),
    "group_std": _grouped(group_std),
    "group_mean": _grouped(group_mean),
    "leave_one_out": _grouped(leave_one_out),
    "batch_std": _grouped(batch_std),
    "length_weighted": lambda rewards, ok, mask: to_tokens(length_weighted(rewards, ok, _lengths(ok, mask)), mask),
    "whitened_returns": whitened_returns,
    "whitened_group_mean": whitened_group_mean,
    "minimum_variance": _grouped(minimum_variance),
    "adora": adora,
}
ALONE = ("reward", "whitened_returns")
