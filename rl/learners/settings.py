"""The switches of learning by policy gradients: what a config's `gradient` block holds beside sizes."""

import dataclasses
from typing import Any

from rl.objectives import advantages
from rl.objectives.policy_gradient import Objective

PROXIMAL, NORMS, ROUTING = ("recompute", "sampler", "interpolated"), ("exact", "logits", "equal"), ("none", "r2", "r3")
_LEAST = {
    "minibatches": 1, "epochs": 1, "staleness": 0, "overlong": 0, "kl_in_reward": 0, "step_scale": 0, "reincarnation": 0,
    "limit": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, see `rl.lora`: only their factors learn, and are what optimizer state and older policies are of.

    Attributes:
        rank: r.
        alpha: scale; W + (alpha / r) A B.
        pattern: regular expression looked for in a matrix's path, such as "attention/.*kernel".
    """

    rank: int
    alpha: float
    pattern: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a step's groups become updates.

    Attributes:
        objective: of the policy gradient.
        advantage: name in `rl.objectives.advantages.ADVANTAGES`.
        advantage_options: further arguments of it.
        minibatches, epochs: a step's prompts are split into so many parts, and passed over so often; one update each.
        proximal: the policy that ratios are centred on: "recompute" scores every answer with the parameters the step starts
            from (free where the step is a single update: it is the policy itself); "sampler" takes the sampler's own
            log-probs; "interpolated" puts it between sampler and policy by each token's age, without a pass
            (`rl.objectives.weights.approximate_proximal`).
        temperature: of the sampler, and so of every log-probability.
        staleness: answers come from the policy of so many steps ago (0: the present one).
        overlong: DAPO's penalty begins so many tokens before the budget; 0: none.
        drop_truncated: answers that ran into their budget teach nothing, though they count in their group's statistics and
            in means over sequences.
        step_scale: VCPO: ESS / N at and above which the step is whole; 0: steps are never scaled.
        norms: for the advantage "minimum_variance": gradient norms of every answer at every update, "exact" (a backward pass
            each) or with respect to the "logits" (one forward pass for all); "equal" ones: none.
        informative_only: groups whose rewards are all equal do not count at all (DAPO), rather than with advantage 0.
        kl_in_reward: coefficient of a penalty k1 = logp - reference inside the reward: per token for the advantage
            "whitened_returns" (REINFORCE++), else its sum over the answer (RLOO); logp is the proximal policy's.
        kl_convex: ReMix: the KL penalty is shared between the reference and the policy of the step before, by `convex_share`.
        reincarnation: ReMix: the step at which the reference policy is renewed and the epochs fall to one; 0: never.
        routing: of a mixture of experts, see `rl.rollout.routing`: "none"; "r2", every update forces the experts that the
            parameters the step starts from choose; "r3", it and the proximal pass force those the sampler used. The reference
            is another policy and always routes for itself.
        lora: adapters, or None: all parameters learn.
        limit: updates that may be skipped in a row because their gradient or step was not finite.
    """

    objective: Objective
    advantage: str
    advantage_options: tuple[tuple[str, Any], ...] = ()
    minibatches: int = 1
    epochs: int = 1
    proximal: str = "recompute"
    temperature: float = 1.0
    staleness: int = 0
    overlong: int = 0
    drop_truncated: bool = False
    step_scale: float = 0.0
    norms: str = "exact"
    informative_only: bool = False
    kl_in_reward: float = 0.0
    kl_convex: bool = False
    reincarnation: int = 0
    routing: str = "none"
    lora: Lora | None = None
    limit: int = 3

    @property
    def anchored(self) -> bool:
        """Whether there is a reference policy to stay close to."""
        return bool(self.objective.kl or self.kl_in_reward)

    def check(self, samples: int, longest: int, experts: bool) -> None:
        """Refuses what cannot be learnt with.

        Args:
            samples: G.
            longest: tokens, the budget of an answer.
            experts: whether the model is a mixture of experts.

        Raises:
            ValueError: unknown names, settings out of range or that contradict each other, an advantage that needs more
                samples.
        """
        advantages.check(self.advantage, samples, dict(self.advantage_options))
        for name, known in (("proximal", PROXIMAL), ("norms", NORMS), ("routing", ROUTING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.overlong > longest:
            raise ValueError(f"overlong must be at most the budget, {longest} tokens; got {self.overlong}")
        if self.step_scale > 1:
            raise ValueError(f"step_scale is a share of effective samples, at most 1; got {self.step_scale}")
        if self.kl_convex and not self.objective.kl:
            raise ValueError(
                "kl_convex shares a KL penalty out, but the objective's coefficient kl is 0: set it above 0"
            )
        if self.kl_in_reward and self.objective.kl:
            raise ValueError(
                f"a KL penalty belongs in the reward or in the loss; got kl_in_reward {self.kl_in_reward} and the objective's "
                f"kl {self.objective.kl}: set one of them to 0"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"policy gradients need samples and their probabilities; got temperature {self.temperature}: raise it above 0"
            )
        if self.routing != "none" and not experts:
            raise ValueError(
                f"only a mixture of experts has a routing to replay; got routing {self.routing!r} and a dense model: set 'none'"
            )
