"""Every preset written a second time, from its paper's formula: plain loops over tokens, f64, gradients by hand.

None of it shares a line or a factorisation with the package.
"""

import math

import numpy as np


def ppo_term(r, a, low, high, dual=None):
    """(value, whether the token still has a gradient)."""
    value = min(r * a, min(max(r, low), high) * a)
    if dual is not None and a < 0:
        value = max(value, dual * a)
    return value, value == r * a


def _aggregation(kind, mask, longest):
    """Weight of each token in the mean."""
    n, width = mask.shape
    out = np.zeros((n, width))
    for i in range(n):
        for t in range(width):
            if mask[i, t]:
                out[i, t] = {
                    "token_mean": 1 / mask.sum(),
                    "sequence_mean": 1 / (n * mask[i].sum()),
                    "sequence_sum": 1 / n,
                    "constant": 1 / (n * (longest or 1)),
                }[kind]
    return out


AGGREGATION = {
    "reinforce": "sequence_sum", "grpo": "sequence_mean", "dr_grpo": "constant", "dapo": "token_mean",
    "gspo": "sequence_mean", "rloo": "sequence_sum", "reinforce_pp": "token_mean", "reinforce_pp_baseline": "token_mean",
    "cispo": "token_mean", "ppo": "token_mean", "minirl": "sequence_sum", "decoupled_ppo": "token_mean",
    "tis": "token_mean", "mis": "token_mean", "remix": "token_mean", "dots_rr": "token_mean", "sapo": "sequence_mean",
    "vcpo": "sequence_mean", "adora": "token_mean",
}  # fmt: skip


def twin(name, logp, proximal, behaviour, reference, advantage, mask, longest=None):
    """(J, dJ/dlogp [N, L]) of a preset in f64."""
    n, width = mask.shape
    weight = _aggregation(AGGREGATION[name], mask, longest)
    value, slope = 0.0, np.zeros((n, width))
    for i in range(n):
        tokens = [t for t in range(width) if mask[i, t]]
        if name == "gspo" and tokens:
            s = math.exp(sum(logp[i, t] - proximal[i, t] for t in tokens) / len(tokens))
            for t in tokens:
                j, alive = ppo_term(s, advantage[i, t], 1 - 3e-4, 1 + 4e-4)
                value += weight[i, t] * j
                for u in tokens:  # every token of the sequence moves s
                    slope[i, u] += weight[i, t] * alive * s * advantage[i, t] / len(tokens)
            continue
        for t in tokens:
            j, g = _token(
                name, i, t, tokens, logp, proximal, behaviour, reference, advantage[i, t]
            )  # fmt: skip
            value += weight[i, t] * j
            slope[i, t] += weight[i, t] * g
    return value, slope


def _token(name, i, t, tokens, logp, proximal, behaviour, reference, a):
    lp, old, mu = logp[i, t], proximal[i, t], behaviour[i, t]
    u, q, b = math.exp(lp - old), math.exp(lp - mu), math.exp(old - mu)
    if name in ("reinforce", "rloo"):
        return a * lp, a
    if name in ("grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline", "adora"):
        j, alive = ppo_term(u, a, 0.8, 1.2)
        g = u * a if alive else 0.0
        if name in ("grpo", "adora"):
            d, k = reference[i, t] - lp, {"grpo": 0.04, "adora": 1e-3}[name]
            j -= k * min(math.exp(d) - d - 1, 10)
            g -= k * (1 - math.exp(d) if math.exp(d) - d - 1 < 10 else 0.0)
        return j, g
    if name in ("dapo", "tis", "mis"):
        j, alive = ppo_term(u, a, 0.8, 1.28)
        w = 1.0
        if name == "tis":
            w = min(b, 2.0)
        if name == "mis":
            whole = math.exp(sum(proximal[i, s] - behaviour[i, s] for s in tokens))
            w = whole if 0.5 <= whole <= 2.0 else 0.0
        return w * j, (w * u * a if alive else 0.0)
    if name == "cispo":
        return min(u, 5.0) * a * lp, min(u, 5.0) * a
    if name == "ppo":
        j, alive = ppo_term(q, a, 0.8, 1.2, 3.0)
        return j, (q * a if alive else 0.0)
    if name == "minirl":
        gate = not ((a > 0 and u > 1.27) or (a < 0 and u < 0.8))
        return gate * min(q, 5.0) * a * lp, gate * min(q, 5.0) * a
    if name == "decoupled_ppo":
        j, alive = ppo_term(u, a, 0.8, 1.2)
        w = b if b <= 5 else 0.0
        return w * j, (w * u * a if alive else 0.0)
    if name == "remix":
        j, alive = ppo_term(q, a, b - 0.2, b + 0.2)
        d = reference[i, t] - lp
        return j - 1e-3 * d**2 / 2, (q * a if alive else 0.0) + 1e-3 * d
    if name == "dots_rr":
        j, alive = ppo_term(q, a, b * 0.8, b * 1.2)
        return j, (q * a if alive else 0.0)
    if name == "sapo":
        tau = 1.0 if a > 0 else 1.05
        s = 1 / (1 + math.exp(-tau * (u - 1)))
        return 4 / tau * s * a, 4 * s * (1 - s) * a * u
    if name == "vcpo":
        w = min(math.exp(min(max(sum(logp[i, s] - behaviour[i, s] for s in tokens), -20), 20)), 8.0)
        return w * a * lp, w * a
    raise ValueError(f"no twin of {name}")
