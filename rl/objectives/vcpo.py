"""VCPO: steps and baselines that know how far the samples are from the policy (arXiv 2602.17616; repo mit-han-lab/vcpo).

The update is g = (1/N) sum_i w_i (R_i - b) / sigma (1/L_i) sum_t grad logp_it with w_i = min(exp(l_i), 8) and
l_i = sum_t (logp_it - behaviour_it): the preset "vcpo". Here is what it adds: the step scale from the effective sample size,
and the baseline b of least variance.
"""

import jax.numpy as jnp
from jax import Array

RULES = ("sqrt", "linear")


def ess(log_weights: Array, counted: Array | None = None) -> Array:
    """Effective sample size (sum w)^2 / sum w^2 of importance weights w = e^l, from 1 to N.

    The largest l is taken off first, so nothing overflows and a common factor changes nothing: all weights 1e-6 still give N.
    Log mean and largest weight beside it. Equal weights give N exactly.

    Args:
        log_weights: [N] nats, unclipped.
        counted: bool [N], rows that exist. None: all.

    Returns:
        scalar; 1 where the weights are not finite, the value that shortens the step most.
    """
    counted = jnp.ones(log_weights.shape, bool) if counted is None else counted
    top = jnp.where(counted, log_weights, -jnp.inf).max(initial=-jnp.inf)
    w = jnp.where(counted, jnp.exp(log_weights - top), 0)
    size = w.sum() ** 2 / (w**2).sum()
    return jnp.where(jnp.isfinite(size), size, 1.0)


def step_scale(log_weights: Array, base: float = 1.0, rule: str = "sqrt", counted: Array | None = None) -> Array:
    """Factor on the optimizer's update, sqrt(min(1, rho / base)) with rho = ESS / N; "linear" drops the root.

    It scales one update, weight decay included (AdamW multiplies the decay by the rate); the base rate never changes.

    Args:
        log_weights: [N] nats.
        base: rho at and above which the step is whole, in (0, 1].
        rule: "sqrt" or "linear".
        counted: bool [N], rows that exist. None: all.

    Raises:
        ValueError: an unknown rule, a base outside (0, 1].
    """
    if rule not in RULES:
        raise ValueError(f"the step rule must be one of {', '.join(RULES)}; got {rule!r}")
    if not 0 < base <= 1:
        raise ValueError(f"the base share of effective samples must be in (0, 1]; got {base}")
    rows = log_weights.shape[0] if counted is None else jnp.maximum(counted.sum(), 1)
    share = jnp.minimum(ess(log_weights, counted) / rows / base, 1.0)
    return jnp.sqrt(share) if rule == "sqrt" else share


def minimum_variance_baseline(
    log_weights: Array, squared_norms: Array, rewards: Array, ok: Array | None = None
) -> Array:
    """Per group, b* = sum_i w_i^2 |g_i|^2 R_i / sum_i w_i^2 |g_i|^2.

    It minimises sum_i w_i^2 |g_i|^2 (R_i - b)^2, the second moment of the importance-weighted estimator, whose mean does not
    depend on b as long as E[w g] = 0 (which a truncated w breaks a little). The paper's formula: the released code seems to
    weigh the norms a second time. Weights are compared inside a group only, in log space.

    Args:
        log_weights: [P, G] nats, untruncated.
        squared_norms: [P, G], |g_i|^2 of the score g_i = grad sum_t logp_it, or `logit_squared_norms` The update applies
            g_i / L_i, whose least variance is at |g_i|^2 / L_i^2: the release has this as a switch, off in its scripts.
        rewards: [P, G].
        ok: bool [P, G], rows that were judged. None: all.

    Returns:
        [P]; the mean reward where no norm is above 0, 0 where no row was judged.
    """
    ok = jnp.ones(rewards.shape, bool) if ok is None else ok
    heavy = ok & (squared_norms > 0)
    heavy = jnp.where(heavy.any(axis=1, keepdims=True), heavy, ok)
    log = 2 * log_weights + jnp.log(jnp.where(squared_norms > 0, squared_norms, 1))
    log = jnp.where(heavy, log, -jnp.inf)
    top = log.max(axis=1, keepdims=True)
    weight = jnp.where(heavy, jnp.exp(log - jnp.where(jnp.isneginf(top), 0, top)), 0)
    # from the least reward of the group, so that equal rewards give exactly themselves
    least = jnp.where(ok, rewards, jnp.inf).min(axis=1)
    least = jnp.where(ok.any(axis=1), least, 0)
    above = jnp.where(ok, rewards - least[:, None], 0)
    total = weight.sum(axis=1)
    return least + (weight * above).sum(axis=1) / jnp.where(total > 0, total, 1)


def collision(logits: Array) -> Array:
    """sum_v pi_v^2 of softmax(logits), [..., V] -> [...]: the chance that two draws agree."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return (p**2).sum(axis=-1) / p.sum(axis=-1) ** 2


def logit_squared_norms(logp: Array, agree: Array, mask: Array) -> Array:
    """Squared norm of the score with respect to the logits, a stand-in for the one with respect to the parameters.

    d logp_t / d logits = onehot - pi, so the square is sum_t (1 - 2 pi_t + sum_v pi_v^2), exactly.

    Args:
        logp: [N, L], of the sampled tokens.
        agree: [N, L], `collision` of the logits at each token.
        mask: bool [N, L].

    Returns:
        [N].
    """
    return jnp.where(mask, 1 - 2 * jnp.exp(jnp.where(mask, logp, 0)) + agree, 0).sum(axis=1)
