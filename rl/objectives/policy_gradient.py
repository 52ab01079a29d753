"""One policy-gradient objective for the whole family, J = W phi(exp(logp - centre), A), on log-probabilities only.

centre is a policy, phi a shape, W a stop-gradient weight, and an aggregation turns tokens into one number. Every named method
is a choice of these: `rl.objectives.presets`.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from rl.objectives import aggregate as aggregation
from rl.objectives.kl import ESTIMATORS, kl, kl_convex
from rl.objectives.weights import LOG_LIMIT, Weight, importance_weight, over_sequence

RATIOS, CENTRES = ("token", "sequence", "sequence_token"), ("proximal", "behaviour")
SHAPES, WINDOWS = ("score", "ratio", "clip", "gate", "capped", "sapo"), ("relative", "additive", "unit")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Static settings; hashable, so a static argument of `jit`.

    With r = exp(logp - centre), sg the stop-gradient, W the weight and A the advantage, a token adds to J:

    score   W A logp                                        REINFORCE; the ratio takes no part
    ratio   W r A
    clip    W A min(r, high) if A > 0, W A max(r, low) if A < 0          PPO; with `dual` the latter is at most dual
    gate    W A logp, 0 where clip would have no gradient                MiniRL; the gradient of clip at W = r
    capped  W sg[clip(r, low, high)] A logp                              CISPO; no token loses its gradient
    sapo    W (4/tau) sigmoid(tau (r - 1)) A, tau by the sign of A       smooth; slope A at r = 1, value 2 A / tau there

    and the loss is -(J - kl KL + entropy H) aggregated. Log-ratios are clamped to +-20 (no gradient beyond), as in verl.

    Attributes:
        ratio: "token"; "sequence", one ratio exp(mean of the token log-ratios) at each token (GSPO); "sequence_token", that
            value with the gradient of the token's own log-probability (GSPO-token).
        centre: what r is relative to: "proximal", the learner at the start of the update, or "behaviour", the sampler. With
            the latter the mismatch of the two is in r already.
        shape: see above.
        low: half-width of the window below, None: open.
        high: half-width above, None: open.
        window: around c = exp(proximal - behaviour) if the centre is behaviour, else around 1: "relative"
            [c (1 - low), c (1 + high)], which makes clip c times PPO around the proximal policy; "additive"
            [c - low, c + high] (ReMix); "unit" [1 - low, 1 + high] whatever the centre (PPO on stale samples).
        dual: largest ratio of a token with A < 0, in units of the window's centre; for clip only.
        tau: of sapo, for A > 0 and for A < 0.
        weight: see `rl.objectives.weights.Weight`; None: 1.
        aggregation: one of `rl.objectives.aggregate.KINDS`.
        longest: tokens, for the aggregation "constant".
        kl: coefficient of the penalty against the reference, nats^-1.
        kl_estimator: one of `rl.objectives.kl.ESTIMATORS`.
        entropy: coefficient of the bonus.

    Raises:
        ValueError: unknown names, settings that the shape would ignore, a mismatch that would count twice.
    """

    ratio: str = "token"
    centre: str = "proximal"
    shape: str = "clip"
    low: float | None = None
    high: float | None = None
    window: str = "relative"
    dual: float | None = None
    tau: tuple[float, float] = (1.0, 1.05)
    weight: Weight | None = None
    aggregation: str = "token_mean"
    longest: int | None = None
    kl: float = 0.0
    kl_estimator: str = "k3"
    entropy: float = 0.0

    def __post_init__(self):
        for name, known in (
            ("ratio", RATIOS), ("centre", CENTRES), ("shape", SHAPES), ("window", WINDOWS), ("kl_estimator", ESTIMATORS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        aggregation.check(self.aggregation, self.longest)
        for name in ("low", "high"):
            width = getattr(self, name)
            if width is not None and self.shape not in ("clip", "gate", "capped"):
                raise ValueError(f"{name} belongs to the shapes clip, gate and capped; got {width} and {self.shape!r}")
            if width is not None and not width >= 0:
                raise ValueError(f"{name} is a half-width, at least 0; got {width}")
        if self.dual is not None and (self.shape != "clip" or not self.dual > 1):
            raise ValueError(f"dual belongs to the shape clip and is above 1; got {self.dual} and {self.shape!r}")
        if not self.kl >= 0:
            raise ValueError(f"kl is the coefficient of a penalty, at least 0; got {self.kl}")
        if not min(self.tau) > 0:
            raise ValueError(f"tau must be positive; got {self.tau}")
        if self.weight is not None and self.shape not in ("score", "gate"):
            if self.centre == "behaviour":
                raise ValueError(
                    "a ratio to the behaviour policy already holds the mismatch, so a weight would count it twice; got "
                    f"shape {self.shape!r} with {self.weight}: drop the weight, or take the centre 'proximal'"
                )
            if self.weight.of == "policy":
                raise ValueError(
                    "a weight of the policy holds what the ratio to the proximal policy holds; got shape "
                    f"{self.shape!r} with {self.weight}: take of='proximal', or the shape score or gate"
                )


class Credit(NamedTuple):
    """What the learner knows of N sampled completions; masked entries may hold anything, NaN included.

    Attributes:
        mask: bool [N, L], tokens the policy sampled and that count.
        advantage: f32 [N, L].
        behaviour: f32 [N, L] nats, of the distribution that was sampled.
        proximal: f32 [N, L], of the learner at the start of the update. None: the policy itself, stop-gradient.
        reference: f32 [N, L], of the anchor of the KL penalty, or None.
        counted: bool [N], rows that exist. None: all.
        previous: f32 [N, L], of the second anchor (ReMix), or None.
        share: f32 [N], the share of `reference` beside `previous`, see `rl.objectives.kl.convex_share`.
    """

    mask: Array
    advantage: Array
    behaviour: Array
    proximal: Array | None = None
    reference: Array | None = None
    counted: Array | None = None
    previous: Array | None = None
    share: Array | None = None


class Loss(NamedTuple):
    """Sums, so that micro-batches add up exactly: the loss is numerator / denominator over all of them.

    Attributes:
        numerator: scalar, to minimise.
        denominator: scalar without gradient.
        metrics: name -> (sum, denominator), without gradient.
        log_weight: f32 [N] nats, sum_t (logp - behaviour), without gradient; 0 for rows that do not exist.
        maxima: name -> largest value, without gradient; micro-batches combine by their maximum.
    """

    numerator: Array
    denominator: Array
    metrics: dict[str, tuple[Array, Array]]
    log_weight: Array
    maxima: dict[str, Array]


def loss(objective: Objective, logp: Array, entropy: Array, credit: Credit) -> Loss:
    """The loss and what to watch.

    Metrics, means over tokens: objective (J alone, aggregated as the loss), entropy, kl_behaviour (behaviour - logp, the
    estimate k1 of KL(behaviour || policy)), kl_reference, clip_fraction (tokens that the window keeps from their full
    gradient), ratio, weight, weight_outside (tokens beyond floor or cap), sampler_gap (|proximal - behaviour|). Maxima:
    sampler_gap, ratio, weight.

    Args:
        objective: settings.
        logp: [N, L] nats, of the policy; differentiable.
        entropy: [N, L] nats; differentiable.
        credit: the rest; nothing of it gets a gradient.

    Returns:
        see `Loss`; computed in f32, or f64 if logp is.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, a log-probability that is missing.
    """
    _check(objective, logp, entropy, credit)
    dtype = jnp.promote_types(jnp.result_type(logp), jnp.float32)
    mask = credit.mask if credit.counted is None else credit.mask & credit.counted[:, None]
    # what is masked becomes 0 before any arithmetic: after it, 0 times the gradient of a NaN would still be NaN
    clean = lambda x: jnp.where(mask, x, 0).astype(dtype)
    fixed = lambda x: lax.stop_gradient(clean(x))
    logp, entropy = clean(logp), clean(entropy)
    advantage, behaviour = fixed(credit.advantage), fixed(credit.behaviour)
    proximal = lax.stop_gradient(logp) if credit.proximal is None else fixed(credit.proximal)

    centre = behaviour if objective.centre == "behaviour" else proximal
    ratio = _ratio(objective.ratio, logp - centre, logp, mask)
    around = jnp.ones_like(ratio)
    if objective.window != "unit" and objective.centre == "behaviour":
        around = lax.stop_gradient(_ratio(objective.ratio, proximal - behaviour, proximal, mask))
    term, clipped = _shape(objective, ratio, around, advantage, logp)
    weight, outside = jnp.ones_like(ratio), jnp.zeros_like(mask)
    if objective.weight is not None:
        of = proximal if objective.weight.of == "proximal" else logp
        weight, outside = importance_weight(objective.weight, of - behaviour, mask)
    term = weight * term

    distance = _distance(objective, logp, credit, fixed)
    total = term - (objective.kl * distance if objective.kl else 0)
    if objective.entropy:  # 0 times the gradient of an entropy that is not finite would be NaN
        total = total + objective.entropy * entropy
    reduce = lambda x: aggregation.aggregate(objective.aggregation, x, mask, objective.longest, credit.counted)
    gap = jnp.abs(proximal - behaviour)
    means = _means(
        mask,
        entropy=entropy, kl_behaviour=behaviour - logp, kl_reference=distance, clip_fraction=clipped,
        ratio=ratio, weight=weight, weight_outside=outside, sampler_gap=gap,
    )  # fmt: skip
    maxima = _maxima(mask, sampler_gap=gap, ratio=ratio, weight=weight)
    watched = lax.stop_gradient(({"objective": reduce(term)} | means, (logp - behaviour).sum(axis=1), maxima))
    return Loss(*reduce(-total), *watched)


def _ratio(kind: str, log_ratio: Array, logp: Array, mask: Array) -> Array:
    """exp of the log-ratio per token or of its mean over the sequence; exactly 1 where masked or where equal."""
    if kind != "token":
        log_ratio = jnp.where(mask, over_sequence(log_ratio, mask, mean=True), 0)
    if kind == "sequence_token":
        log_ratio = lax.stop_gradient(log_ratio) + (logp - lax.stop_gradient(logp))
    return jnp.exp(jnp.clip(log_ratio, -LOG_LIMIT, LOG_LIMIT))


def _shape(objective: Objective, r: Array, around: Array, advantage: Array, logp: Array) -> tuple[Array, Array]:
    """(phi [N, L], bool [N, L] where the window acts)."""
    if objective.shape == "score":
        return advantage * logp, jnp.zeros(r.shape, bool)
    if objective.shape == "ratio":
        return r * advantage, jnp.zeros(r.shape, bool)
    if objective.shape == "sapo":
        tau = jnp.where(advantage > 0, *jnp.asarray(objective.tau, r.dtype))
        return 4 / tau * lax.logistic(tau * (r - 1)) * advantage, jnp.zeros(r.shape, bool)
    low, high = _window(objective, around)
    above, below = r > high, r < low
    if objective.shape == "capped":
        return lax.stop_gradient(jnp.clip(r, low, high)) * advantage * logp, above | below
    positive, negative = advantage > 0, advantage < 0
    # by the sign of A rather than min(r A, clip(r) A): at equality a minimum would halve the gradient of each branch
    stopped = (positive & above) | (negative & below)
    if objective.shape == "gate":
        return jnp.where(stopped, 0, advantage * logp), stopped
    bound = jnp.where(positive, high, low)
    if objective.dual is not None:
        beyond = negative & (r > objective.dual * around)
        stopped, bound = stopped | beyond, jnp.where(beyond, objective.dual * around, bound)
    return jnp.where(stopped, jnp.where(stopped, bound, 0), r) * advantage, stopped


def _window(objective: Objective, around: Array) -> tuple[Array, Array]:
    """Lowest and highest ratio; an open side is infinite."""
    scale = around if objective.window == "relative" else jnp.ones_like(around)
    low = jnp.full_like(around, -jnp.inf) if objective.low is None else around - objective.low * scale
    high = jnp.full_like(around, jnp.inf) if objective.high is None else around + objective.high * scale
    return low, high


def _distance(objective: Objective, logp: Array, credit: Credit, fixed) -> Array:
    """KL estimates to the reference, [N, L]; 0 without one."""
    if credit.reference is None:
        return jnp.zeros_like(logp)
    if credit.previous is None:
        return kl(objective.kl_estimator, logp, fixed(credit.reference))
    share = lax.stop_gradient(credit.share)[:, None]
    return kl_convex(objective.kl_estimator, logp, fixed(credit.reference), fixed(credit.previous), share)


def _means(mask: Array, **values: Array) -> dict[str, tuple[Array, Array]]:
    tokens = mask.sum().astype(jnp.float32)
    return {name: (jnp.where(mask, value, 0).astype(jnp.float32).sum(), tokens) for name, value in values.items()}


def _maxima(mask: Array, **values: Array) -> dict[str, Array]:
    return {name: jnp.where(mask, value, 0).max(initial=0) for name, value in values.items()}


def _check(objective: Objective, logp: Array, entropy: Array, credit: Credit) -> None:
    if jnp.ndim(logp) != 2:
        raise ValueError(f"logp must be [rows, tokens]; got shape {jnp.shape(logp)}")
    if credit.behaviour is None:
        raise ValueError("behaviour log-probabilities are missing: record those of the distribution that was sampled")
    if jnp.result_type(credit.mask) != jnp.bool_:
        raise ValueError(f"mask must be bool; got {jnp.result_type(credit.mask)}")
    given = {"entropy": entropy, **{name: getattr(credit, name) for name in Credit._fields[:5]}}
    given["previous"] = credit.previous
    for name, x in given.items():
        if x is not None and jnp.shape(x) != jnp.shape(logp):
            raise ValueError(f"{name} must be of the shape of logp, {jnp.shape(logp)}; got {jnp.shape(x)}")
    for name in ("counted", "share"):
        x = getattr(credit, name)
        if x is not None and jnp.shape(x) != jnp.shape(logp)[:1]:
            raise ValueError(f"{name} must have one entry per row, {jnp.shape(logp)[0]}; got shape {jnp.shape(x)}")
    if objective.kl and credit.reference is None:
        raise ValueError(f"a KL coefficient of {objective.kl} needs reference log-probabilities; got None: set kl to 0")
    if credit.previous is not None and (credit.reference is None or credit.share is None):
        raise ValueError("a second anchor `previous` needs `reference` and `share` beside it; got None")
