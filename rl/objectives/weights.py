"""Importance weights of stale or mismatched samples, all stop-gradient, and the proximal policy without a forward pass."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

OF, LEVELS, OUTSIDE = ("proximal", "policy"), ("token", "sequence", "geometric"), ("clamp", "zero", "reject")
LOG_LIMIT = 20.0  # e^20 = 4.9e8: no ratio overflows, and its square does not either


@dataclasses.dataclass(frozen=True)
class Weight:
    """A stop-gradient factor, how much likelier the sample is under another policy than under the sampler's.

    With d = logp(of) - logp(behaviour), all clamped to +-20 before the exponential:

    token:     exp(d_t)                 biased for sequences beyond one token, by an amount linear in the mismatch
    sequence:  exp(sum_t d_t)           unbiased, heavy-tailed
    geometric: exp(sum_t d_t / L)       a per-token measure of a whole sequence

    Attributes:
        of: "proximal", the learner at the start of the update (only the mismatch of sampler and learner), or "policy", the
            parameters being updated (mismatch and staleness).
        level: "token", "sequence" or "geometric".
        cap: largest weight kept, or None.
        floor: smallest weight kept, or None.
        outside: what happens beyond: "clamp" to the bound (TIS), "zero" (IcePop, MIS), or "reject": weight 1 inside and 0
            outside. Dropped tokens stay in the aggregation's denominator, as in AReaL and verl.
    """

    of: str = "proximal"
    level: str = "token"
    cap: float | None = None
    floor: float | None = None
    outside: str = "clamp"

    def __post_init__(self):
        for name, known in (("of", OF), ("level", LEVELS), ("outside", OUTSIDE)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"a weight's {name} must be one of {', '.join(known)}; got {value!r}")
        low, high = 0 if self.floor is None else self.floor, float("inf") if self.cap is None else self.cap
        if not 0 <= low < high:
            raise ValueError(f"a weight needs 0 <= floor < cap; got floor {self.floor} and cap {self.cap}")
        if self.outside == "reject" and self.cap is None and self.floor is None:
            raise ValueError("a weight that rejects needs a cap or a floor; got neither")


def importance_weight(weight: Weight, log_ratio: Array, mask: Array) -> tuple[Array, Array]:
    """Weights of tokens.

    Args:
        weight: the rule.
        log_ratio: [N, L], logp(of) - behaviour, 0 where masked.
        mask: bool [N, L].

    Returns:
        (weights [N, L], bool [N, L] tokens whose weight fell outside floor or cap). A sequence's weight stands at each of
        its tokens; masked entries have weight 1 and fall nowhere.
    """
    log_ratio = lax.stop_gradient(log_ratio)
    if weight.level != "token":
        log_ratio = over_sequence(log_ratio, mask, mean=weight.level == "geometric")
    ratio = jnp.exp(jnp.clip(jnp.where(mask, log_ratio, 0), -LOG_LIMIT, LOG_LIMIT))
    low, high = 0 if weight.floor is None else weight.floor, jnp.inf if weight.cap is None else weight.cap
    outside = ((ratio < low) | (ratio > high)) & mask
    if weight.outside == "clamp":
        return jnp.where(mask, jnp.clip(ratio, low, high), 1), outside
    kept = jnp.ones_like(ratio) if weight.outside == "reject" else ratio
    return jnp.where(outside, 0, kept), outside


def over_sequence(x: Array, mask: Array, *, mean: bool) -> Array:
    """[N, L] -> [N, L]: sum or mean over the tokens of each row, standing at every entry of it; x must be 0 where masked."""
    total = x.sum(axis=1, keepdims=True)
    if mean:
        total = total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1).astype(x.dtype)
    return jnp.broadcast_to(total, x.shape)


def approximate_proximal(logp: Array, behaviour: Array, written: Array, version: Array | int) -> Array:
    """A-3PO's stand-in for the proximal log-probability (arXiv 2512.06547): on the line from the sampler to the policy.

    behaviour + a (sg[logp] - behaviour) with a = (version - 1 - written) / (version - written), and a = 0 where the token
    was written by the proximal version or later.

    Args:
        logp: [N, L], of the policy.
        behaviour: [N, L].
        written: integers [N, L], policy version that sampled each token.
        version: the version being optimised; the proximal policy is the one before it.

    Returns:
        [N, L], stop-gradient.
    """
    age = version - written
    share = jnp.where(age > 1, (age - 1) / jnp.maximum(age, 1), 0).astype(logp.dtype)
    return lax.stop_gradient(behaviour + share * (logp - behaviour))
