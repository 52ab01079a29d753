"""The named methods as choices of one core: (1) formula and source, (2) where libraries differ, objective and advantage.

r = exp(logp - proximal), w = exp(proximal - behaviour), sg the stop-gradient; J is maximised and A never has a gradient.
Change a setting with `dataclasses.replace(PRESETS["grpo"].objective, kl=0.0)`. Proximal is the learner at the start of an
update: with one update per batch r is 1, and staleness is seen only by what looks at behaviour.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rl.objectives.policy_gradient import Objective
from rl.objectives.weights import Weight


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method.

    Attributes:
        about: formula, source, and where libraries differ.
        objective: the loss.
        advantage: a name in `rl.objectives.advantages.ADVANTAGES`.
        options: of the advantage, each with its default.
    """

    about: str
    objective: Objective
    advantage: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_MINIRL_WEIGHT = Weight(of="policy", level="token", cap=5.0)
_DAPO = Objective(low=0.2, high=0.28)
_ADORA = {"base": "group_std", "success": 0.5, "longest_failure": None, "attenuation": 0.1, "empty": "language"}

PRESETS: dict[str, Preset] = {
    "reinforce": Preset(
        "J = (1/N) sum_i R_i sum_t logp_it (Williams 1992). No baseline, no correction: exact on-policy only.",
        Objective(shape="score", aggregation="sequence_sum"), "reward",
    ),
    "grpo": Preset(
        "J = (1/N) sum_i (1/L_i) sum_t min(r A, clip(r, 0.8, 1.2) A) - 0.04 k3, A = (R - mean)/(std + 1e-6) (2402.03300). "
        "TRL now defaults to kl 0 and delta 1e-4, verl to token_mean; std is unbiased in all of them.",
        Objective(low=0.2, high=0.2, aggregation="sequence_mean", kl=0.04), "group_std",
    ),
    "dr_grpo": Preset(
        "J = (1/(N longest)) sum_it min(r A, clip(r, 0.8, 1.2) A), A = R - mean (2503.20783). TRL divides so; verl's "
        "'seq-mean-token-sum-norm' divides the sum by the padded width without 1/N. Set longest to the configured limit.",
        Objective(low=0.2, high=0.2, aggregation="constant", longest=1024), "group_mean",
    ),
    "dapo": Preset(
        "J = sum_it min(r A, clip(r, 0.8, 1.28) A) / sum_it m, A as GRPO (2503.14476). Dynamic sampling, overlong penalty: the "
        "loop's refills and gradient.overlong. A token mean per micro-batch, as several libraries had it, is another loss.",
        _DAPO, "group_std",
    ),
    "gspo": Preset(
        "J = (1/N) sum_i min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), s = exp(mean_t log r) (2507.18071). verl clamps log s at 10, "
        "here 20; with token_mean instead, long sequences would weigh more. ratio='sequence_token' is GSPO-token.",
        Objective(ratio="sequence", low=3e-4, high=4e-4, aggregation="sequence_mean"), "group_std",
    ),
    "rloo": Preset(
        "J = (1/N) sum_i A_i sum_t logp_it, A = R - mean of the others (2402.14740). KL belongs in the reward. TRL clips a "
        "sequence ratio at 0.2, which is no different with one update per batch.",
        Objective(shape="score", aggregation="sequence_sum"), "leave_one_out",
    ),
    "reinforce_pp": Preset(
        "J as GRPO's clip with token_mean, A = returns of R - kl k1 per token, whitened over the batch's tokens (2501.03262). "
        "verl whitens with the unbiased variance, here the population's.",
        Objective(low=0.2, high=0.2), "whitened_returns",
    ),
    "reinforce_pp_baseline": Preset(
        "As reinforce_pp (2501.03262), A = R - group mean whitened over the batch's tokens; its KL, if any, is k2 in the loss.",
        Objective(low=0.2, high=0.2, kl_estimator="k2"), "whitened_group_mean",
    ),
    "cispo": Preset(
        "J = sum_it sg[min(r, 5)] A logp / sum_it m (2506.13585; its bound is not published, 5 is TRL's). The bound is "
        "1 + high here, in verl and in NeMo-RL, r itself in TRL: 0.28 copied there caps every ratio. slime keeps a low one.",
        Objective(shape="capped", high=4.0), "group_std",
    ),
    "ppo": Preset(
        "J = sum_it min(q A, clip(q, 0.8, 1.2) A) / sum_it m, at most -3 |A| deep (dual clip 3), q = exp(logp - behaviour) "
        "(1707.06347): the sampler is the centre. On stale samples it pulls back to the oldest policy: AReaL's naive PPO.",
        Objective(centre="behaviour", window="unit", low=0.2, high=0.2, dual=3.0), "group_std",
    ),
    "minirl": Preset(
        "J = (1/N) sum_it M sg[min(exp(logp - behaviour), 5)] A logp, M = 0 where (A > 0, r > 1.27) or (A < 0, r < 0.8), "
        "A = R - mean (2512.01374). No length, no std. The gate sees staleness, the weight all of it.",
        Objective(shape="gate", low=0.2, high=0.27, weight=_MINIRL_WEIGHT, aggregation="sequence_sum"), "group_mean",
    ),
    "decoupled_ppo": Preset(
        "J = sum_it w min(r A, clip(r, 0.8, 1.2) A) / sum_it m (2505.24298). The paper's w is unbounded; AReaL drops tokens "
        "with w > 5, and without 'rejection sampling' configured trains without w after a warning.",
        Objective(low=0.2, high=0.2, weight=Weight(cap=5.0, outside="zero")), "group_std",
    ),
    "tis": Preset(
        "J = sum_it min(w, 2) min(r A, clip(r, 0.8, 1.28) A) / sum_it m: DAPO with token truncation, as in slime and Tunix; "
        "verl's presets truncate the sequence's weight.",
        dataclasses.replace(_DAPO, weight=Weight(cap=2.0)), "group_std",
    ),
    "mis": Preset(
        "As tis, with the sequence's weight W = exp(sum_t log w) where 0.5 <= W <= 2, else 0. TRL masks above 3 only; dropped "
        "tokens stay in the denominator, as in verl.",
        dataclasses.replace(_DAPO, weight=Weight(level="sequence", floor=0.5, cap=2.0, outside="zero")), "group_std",
    ),
    "remix": Preset(
        "J = sum_it min(q A, clip(q, c - 0.2, c + 0.2) A) / sum_it m - 1e-3 KL-Convex, q = exp(logp - behaviour), "
        "c = exp(proximal - behaviour) (2507.06892), KL(policy || anchor) by k2. No released code: coefficients are ours.",
        Objective(centre="behaviour", window="additive", low=0.2, high=0.2, kl=1e-3, kl_estimator="k2"), "group_std",
    ),
    "dots_rr": Preset(
        "J = sum_it min(q A, clip(q, 0.8 c, 1.2 c) A) / sum_it m, as in the released code: c times PPO around the proximal "
        "policy (2506.05316). The paper's text clips around 1 (window='unit') and drops the std.",
        Objective(centre="behaviour", low=0.2, high=0.2), "group_std",
    ),
    "sapo": Preset(
        "J = (1/N) sum_i (1/L_i) sum_t (4/tau) sigmoid(tau (r - 1)) A, tau 1 for A > 0 and 1.05 for A < 0: slope "
        "sech^2(tau (r - 1)/2) A instead of a clip. As in TRL.",
        Objective(shape="sapo", aggregation="sequence_mean"), "group_std",
    ),
    "adora": Preset(
        "J as GRPO's clip with token_mean - 0.001 k3, A of a group rule times 1 or 0.1 by `adora_weight` (2602.10019). "
        "Its released codes disagree on groups without success or failure; thresholds belong to their rewards: set success.",
        Objective(low=0.2, high=0.2, kl=1e-3), "adora", _ADORA,
    ),
    "vcpo": Preset(
        "J = (1/N) sum_i sg[min(W_i, 8)] A (1/L_i) sum_t logp_it, W = exp(sum_t logp - behaviour), A = (R - b*)/population std "
        "(2602.17616); with rl.objectives.vcpo's step scale. Its released code weighs the norms in b* by w^2 twice.",
        Objective(shape="score", weight=Weight(of="policy", level="sequence", cap=8.0), aggregation="sequence_mean"),
        "minimum_variance",
    ),
}  # fmt: skip
