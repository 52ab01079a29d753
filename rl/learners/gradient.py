"""Backprop on verified reward: GRPO and its relatives, one learner whose variants are settings.

A step: rewards of G samples per prompt -> advantages -> minibatches of whole groups, packed -> an `eggroll.Estimate` each ->
the optimizer. What differs between methods is the objective and the advantage (`rl.objectives.presets`) and the switches of
`Settings`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import eggroll.estimate
from rl import estimate as estimates
from rl.data import packing
from rl.data.replay import Groups, join
from rl.learners.types import Answers, Learner, tree_bytes
from rl.models.language import LanguageModel, Params
from rl.objectives import advantages, vcpo
from rl.objectives.policy_gradient import Objective
from rl.types import TrainBatch, pad

PROXIMAL, NORMS = ("recompute", "sampler"), ("exact", "equal")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a step's groups become updates.

    Attributes:
        objective: of the policy gradient.
        advantage: name in `rl.objectives.advantages.ADVANTAGES`.
        advantage_options: further arguments of it.
        minibatches, epochs: a step's prompts are split into so many parts, and passed over so often; one update each.
        proximal: the policy that ratios are centred on: "recompute" scores every answer with the parameters the step starts
            from (free where the step is a single update: it is the policy itself), "sampler" takes the sampler's own log-probs.
        temperature: of the sampler, and so of every log-probability.
        staleness: answers come from the policy of so many steps ago (0: the present one).
        overlong: DAPO's penalty begins so many tokens before the budget; 0: none.
        drop_truncated: answers that ran into their budget teach nothing, though they count in their group's statistics.
        step_scale: VCPO: ESS / N at and above which the step is whole; 0: steps are never scaled.
        norms: for the advantage "minimum_variance": "exact" gradient norms of every answer at every update, or "equal" ones.
        informative_only: groups whose rewards are all equal do not count at all (DAPO), rather than with advantage 0.
        kl_convex: ReMix: the KL penalty is shared between the reference and the policy of the step before, by `convex_share`.
        reincarnation: ReMix: the step at which the reference policy is renewed and the epochs fall to one; 0: never.
        limit: updates that may be skipped in a row because their gradient was not finite.
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
    kl_convex: bool = False
    reincarnation: int = 0
    limit: int = 3


class State(NamedTuple):
    """All a checkpoint needs.

    Attributes:
        params: in the model's own types.
        master: f32 copies of half-precision leaves, else None.
        opt_state: of the optax optimizer.
        step: i32, steps made.
        history: parameters of the last `staleness` steps, newest over oldest in a ring, or None.
        reference: the policy to stay close to, or None.
        previous: the policy that the last step started from, where `kl_convex` asks for it, or None.
        skipped: i32, updates skipped in a row.
    """

    params: Params
    master: Any
    opt_state: Any
    step: Array
    history: Any
    reference: Any
    previous: Any
    skipped: Array


def learner(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    shape: packing.Shape,
    prompts: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    stop: tuple[int, ...] = (),
) -> Learner:
    """Policy gradients on verified reward.

    Args:
        shape: of the packed micro-batches.
        prompts: token ids of every training problem.
        samples: G.
        seed: of the order in which a step's prompts form minibatches.
        stop: tokens that end an answer.

    Raises:
        ValueError: unknown names, an advantage that needs more samples, settings out of range.
    """
    _check(settings, samples)
    loop = _Step(model, optimizer, settings, shape, prompts, seed, stop)
    return Learner(
        members=0,
        common=True,
        init=functools.partial(_init, optimizer, settings),
        weights=functools.partial(_weights, settings),
        mean=lambda state: state.params,
        learn=loop.learn,
        plan=functools.partial(_plan, settings),
    )


def _check(settings: Settings, samples: int) -> None:
    advantages.check(settings.advantage, samples)
    for name, known in (("proximal", PROXIMAL), ("norms", NORMS)):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name} must be one of {known}; got {getattr(settings, name)!r}")
    for name, least in (
        ("minibatches", 1),
        ("epochs", 1),
        ("staleness", 0),
        ("overlong", 0),
        ("reincarnation", 0),
        ("limit", 1),
    ):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(settings, name)}")
    if settings.kl_convex and not settings.objective.kl:
        raise ValueError("kl_convex shares a KL penalty out, but the objective's coefficient kl is 0: set it above 0")
    if settings.temperature <= 0:
        raise ValueError(
            f"policy gradients need samples and their probabilities; got temperature {settings.temperature}: raise it above 0"
        )


def _init(optimizer, settings: Settings, params: Params) -> State:
    params = jax.tree.map(jnp.array, params)  # a copy: updates donate
    master = eggroll.estimate.master_copy(params)
    ring = None
    if settings.staleness:
        ring = jax.tree.map(lambda x: jnp.broadcast_to(x, (settings.staleness, *x.shape)) + jnp.zeros_like(x), params)
    copy = lambda wanted: jax.tree.map(jnp.array, params) if wanted else None
    reference, previous = copy(settings.objective.kl), copy(settings.kl_convex)
    opt_state = optimizer.init(eggroll.estimate.masters(params, master))
    return State(params, master, opt_state, jnp.int32(0), ring, reference, previous, jnp.int32(0))


def _weights(settings: Settings, state: State) -> tuple[Params, int]:
    """The policy of `staleness` steps ago, or the oldest there is."""
    step = int(state.step)
    if not settings.staleness:
        return state.params, step
    return _ring_at(state.history, step % settings.staleness), max(0, step - settings.staleness)


@jax.jit
def _ring_at(ring, place):
    return jax.tree.map(lambda x: x[place], ring)


@functools.partial(jax.jit, donate_argnums=0)
def _ring_put(ring, place, params):
    return jax.tree.map(lambda x, p: x.at[place].set(p), ring, params)


class NonFinite(RuntimeError):
    """Updates without a finite gradient, and the groups they were made from."""

    def __init__(self, message: str, groups: Groups):
        super().__init__(message)
        self.groups = groups


class _Step:
    """A step's groups -> updates: the jitted parts, and what the host prepares for them."""

    def __init__(self, model, optimizer, settings: Settings, shape: packing.Shape, prompts, seed: int, stop):
        self.settings, self.shape, self.seed, self.stop = settings, shape, seed, stop
        self.prompt, self.prompt_length = pad(prompts)
        score = functools.partial(estimates.completion_scores, model, temperature=settings.temperature)
        self.score = jax.jit(lambda params, batch: score(params, batch)[0])
        self.norms = jax.jit(functools.partial(estimates.norms, model, temperature=settings.temperature))
        self.update = jax.jit(functools.partial(_update, model, optimizer, settings), donate_argnums=0)
        self.advantage = jax.jit(functools.partial(_advantage, settings))

    def learn(self, state: State, answers: Answers, replayed: Groups | None = None):
        """One step."""
        settings, step = self.settings, int(state.step)
        groups = join(Groups.make(answers.problem, answers.rollouts, answers.scored), replayed)
        if settings.reincarnation and step == settings.reincarnation:
            state = state._replace(reference=jax.tree.map(jnp.copy, state.params))
        epochs = 1 if settings.reincarnation and step >= settings.reincarnation else settings.epochs
        parts = [part for epoch in range(epochs) for part in self.split(step, epoch, groups.size)]
        credit = self.credit(state, groups, parts)
        if settings.staleness:
            state = state._replace(history=_ring_put(state.history, step % settings.staleness, state.params))
        if settings.kl_convex:
            state = state._replace(previous=jax.tree.map(jnp.copy, state.params))
        sums: dict[str, Any] = {}
        largest: dict[str, Any] = {}
        for part in parts:
            some = {name: None if x is None else _rows(x[part]) for name, x in credit.items()}
            batch = self.pack(groups, part)
            if settings.advantage == "minimum_variance" and settings.norms == "exact":
                some["advantage"] = self.least_variance(state.params, batch, some, groups.take(part))
            state, more, most = self.update(state, batch.credit(**some))
            sums = jax.tree.map(jnp.add, sums, more) if sums else more
            largest = jax.tree.map(jnp.maximum, largest, most) if largest else most
        self.check(state, groups)
        metrics = {name: total / jnp.where(count > 0, count, 1) for name, (total, count) in sums.items()} | largest
        metrics["zero_spread_groups"] = float(1 - groups.informative.mean())
        metrics["replayed_groups"] = 0 if replayed is None else replayed.size
        return state._replace(step=state.step + 1), metrics

    def split(self, step: int, epoch: int, size: int) -> list[np.ndarray]:
        """The groups of each minibatch, in an order of the epoch's own."""
        count = self.settings.minibatches
        if size % count:
            raise ValueError(f"a step's groups must divide into minibatches; got {size} groups and {count} minibatches")
        if count == 1:
            return [np.arange(size)]
        order = np.random.Generator(np.random.PCG64([self.seed, step, epoch])).permutation(size)
        return [np.sort(part) for part in order.reshape(count, -1)]

    def credit(self, state: State, groups: Groups, parts: Sequence[np.ndarray]) -> dict[str, np.ndarray | None]:
        """What every token is worth, each [P, G, L]."""
        settings, mask = self.settings, groups.mask & groups.ok[..., None]
        value = groups.value
        longest = self.shape.longest
        if settings.overlong:
            value = value + np.asarray(advantages.overlong_penalty(groups.length, longest, settings.overlong))
        if settings.informative_only:
            mask = mask & groups.informative[:, None, None]
        if settings.drop_truncated:
            last = np.take_along_axis(groups.tokens, np.maximum(groups.length - 1, 0)[..., None], axis=-1)[..., 0]
            mask = mask & ((groups.length < longest) | np.isin(last, self.stop))[..., None]
        whole = parts[: settings.minibatches]
        proximal = groups.logp if settings.proximal == "sampler" else None
        if settings.proximal == "recompute" and len(parts) > 1:
            proximal = self.scores(state.params, groups, whole)
        reference = None if state.reference is None else self.scores(state.reference, groups, whole)
        advantage = np.asarray(self.advantage(value, groups.ok, _rows(mask))).reshape(mask.shape)
        return {
            "mask": mask, "advantage": advantage, "behaviour": groups.logp, "proximal": proximal, "reference": reference,
        }  # fmt: skip

    def pack(self, groups: Groups, part: np.ndarray) -> TrainBatch:
        """Some groups as micro-batches."""
        rows = np.repeat(groups.problem[part], groups.tokens.shape[1])
        return packing.micro_batches(
            self.prompt[rows],
            self.prompt_length[rows],
            _rows(groups.tokens[part]),
            groups.length[part].reshape(-1),
            self.shape,
        )

    def scores(self, params: Params, groups: Groups, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Log-probabilities of all answers under these parameters, [P, G, L]."""
        out = np.zeros(groups.logp.shape, np.float32)
        for part in parts:
            batch = self.pack(groups, part)
            logp = batch.gathered(np.asarray(self.score(params, batch)))[:, : out.shape[-1]]
            out[part] = logp.reshape(out[part].shape)
        return out

    def least_variance(self, params: Params, batch: TrainBatch, credit, groups: Groups) -> np.ndarray:
        """VCPO's advantages for the parameters of now, [n, L]."""
        norms, log_weight = self.norms(params, batch.credit(**credit))
        shape = groups.value.shape
        norms, log_weight = (batch.gathered(np.asarray(x)).reshape(shape) for x in (norms, log_weight))
        advantage = advantages.minimum_variance(groups.value, groups.ok, log_weight, norms)
        return np.asarray(advantages.to_tokens(advantage, credit["mask"]))

    def check(self, state: State, groups: Groups) -> None:
        """Raises `NonFinite` after too many updates in a row without a finite gradient."""
        skipped, limit = int(state.skipped), self.settings.limit
        if skipped >= limit:
            raise NonFinite(
                f"{skipped} updates in a row had no finite gradient and were skipped, and the limit is {limit}: lower the "
                "learning rate, or look at the rewards and log-probabilities of the last batch", groups,
            )  # fmt: skip


def _update(model, optimizer, settings: Settings, state: State, batch: TrainBatch):
    """One update; one whose gradient is not finite changes nothing but the count of skipped ones."""
    made, sample = estimates.estimate(model, state.params, batch, settings.objective, temperature=settings.temperature)
    counted = batch.counted.reshape(-1)
    log_weight = sample.log_weight.reshape(-1)
    share = vcpo.ess(log_weight, counted) / jnp.maximum(counted.sum(), 1)
    if settings.step_scale:
        made = dataclasses.replace(made, step_scale=vcpo.step_scale(log_weight, settings.step_scale, counted=counted))
    norm = optax.global_norm(made.gradient)
    after = eggroll.estimate.step(optimizer, state.params, state.master, state.opt_state, made)[:3]
    before = (state.params, state.master, state.opt_state)
    finite = jnp.isfinite(norm)
    params, master, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    one = jnp.float32(1)
    metrics = made.metrics | {
        "gradient_norm": (norm, one), "ess": (share, one), "step_scale": (made.step_scale, one),
        "skipped": (1 - finite.astype(jnp.float32), one),
    }  # fmt: skip
    skipped = jnp.where(finite, 0, state.skipped + 1)
    return state._replace(params=params, master=master, opt_state=opt_state, skipped=skipped), metrics, sample.maxima


def _advantage(settings: Settings, value: Array, ok: Array, mask: Array) -> Array:
    return advantages.ADVANTAGES[settings.advantage](value, ok, mask, **dict(settings.advantage_options))


def _plan(settings: Settings, state: State) -> str:
    mib = lambda *trees: tree_bytes(trees) / 2**20
    parts = {
        "parameters": mib(state.params, state.master),
        "gradients": mib(jax.eval_shape(estimates.wide_zeros, state.params)),
        "optimizer": mib(state.opt_state),
        "older policies": mib(state.history, state.reference),
    }
    return ", ".join(f"{name} {size:.1f} MiB" for name, size in parts.items() if size)


def _rows(x: np.ndarray) -> np.ndarray:
    """[P, G, ...] -> [P G, ...]."""
    return x.reshape(-1, *x.shape[2:])
