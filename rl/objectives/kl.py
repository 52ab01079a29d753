"""How far the policy is from a reference, from the log-probabilities of sampled tokens only."""

import jax.numpy as jnp
from jax import Array, lax

ESTIMATORS = ("k1", "k2", "k3", "k3_straight")
LOG_LIMIT, K3_LIMIT = 20.0, 10.0


def kl(estimator: str, logp: Array, reference: Array) -> Array:
    """Estimates KL(policy || reference) per token, d = reference - logp (Schulman, "Approximating KL divergence", 2020).

    k1 = -d              unbiased on-policy, any sign; its gradient has mean 0: no use in a loss, right in a reward
    k2 = d^2 / 2         its mean gradient is that of KL(policy || reference), the one a penalty wants
    k3 = e^d - d - 1     >= 0, unbiased on-policy; its mean gradient is that of KL(reference || policy), the other direction
    k3_straight          the value of k3 with the gradient of k2

    All of it on-policy: tokens of an older policy estimate something else.

    Guards, as in verl: d is clamped to +-20 before the exponential and k3 to 10. A clamped token has no gradient, so k3 lets
    go of tokens with d > 2.61 (e^2.61 - 3.61 = 10), where the policy has fallen to a fourteenth of the reference, and of those
    with d < -11; k2 and k3_straight hold on to them.

    Args:
        estimator: one of `ESTIMATORS`.
        logp: of the policy, any shape.
        reference: of the reference, same shape; gets no gradient.

    Returns:
        nats, same shape.

    Raises:
        ValueError: an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"kl estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    d = lax.stop_gradient(reference) - logp
    if estimator == "k1":
        return -d
    k2 = d**2 / 2
    if estimator == "k2":
        return k2
    near = jnp.clip(d, -LOG_LIMIT, LOG_LIMIT)
    # expm1(d) - d loses nothing near 0, where e^d - d - 1 would be the difference of two numbers near 1
    k3 = jnp.minimum(jnp.expm1(near) - near, K3_LIMIT)
    return k3 if estimator == "k3" else lax.stop_gradient(k3 - k2) + k2


def kl_convex(estimator: str, logp: Array, base: Array, previous: Array, share: Array | float) -> Array:
    """ReMix's two anchors, share KL(policy || base) + (1 - share) KL(policy || previous) (arXiv 2507.06892).

    Args:
        estimator: one of `ESTIMATORS`.
        logp: of the policy.
        base: of the base model, same shape.
        previous: of the policy one iteration ago, same shape.
        share: in [0, 1], see `convex_share`; broadcasts. With 1, `previous` may hold anything.
    """
    share = jnp.asarray(share, logp.dtype)
    alone = jnp.where(share < 1, previous, lax.stop_gradient(logp))
    return share * kl(estimator, logp, base) + (1 - share) * kl(estimator, logp, alone)


def convex_share(step: Array | int) -> Array:
    """ReMix's schedule, max(1 - 0.1 ceil(max(t - 50, 0) / 10), 0.5): 1 up to step 50, 0.5 from step 91 on."""
    tenths = -(-jnp.maximum(jnp.asarray(step) - 50, 0) // 10)
    return jnp.maximum(10 - tenths, 5) / 10
