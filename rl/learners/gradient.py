"""Backprop on verified reward: GRPO and its relatives, one learner whose variants are settings.

A step: rewards of G samples per prompt -> advantages -> minibatches of whole groups, packed -> an `eggroll.Estimate` each ->
the optimizer. What differs between methods is the objective and the advantage (`rl.objectives.presets`) and the switches of
`Settings`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

import eggroll.estimate
from rl import estimate as estimates
from rl import lora, optim
from rl.data import packing
from rl.data.replay import Groups, join
from rl.learners import credit as credits
from rl.learners.credit import rows
from rl.learners.settings import Lora, Settings
from rl.learners.types import Answers, Learner, tree_bytes
from rl.learners.update import means_and_maxima, update
from rl.mesh import init_optimizer, place
from rl.models.experts import id_dtype
from rl.models.language import LanguageModel, Params
from rl.objectives import advantages
from rl.rollout import routing
from rl.types import Requests, Rollouts, TrainBatch, pad

__all__ = ["Lora", "NonFinite", "Settings", "State", "learner"]


class State(NamedTuple):
    """All a checkpoint needs.

    Attributes:
        params: what learns: the model's parameters in their own types, or an adapter's factors.
        base: the parameters that an adapter belongs to, else None.
        master: f32 copies of half-precision leaves of what learns, else None.
        opt_state: of the optax optimizer.
        step: i32, steps made.
        history: `params` of the last `staleness` steps, newest over oldest in a ring, or None.
        reference: `params` of the policy to stay close to, or None.
        previous: `params` that the last step started from, where `kl_convex` asks for it, or None.
        skipped: i32, updates skipped in a row.
    """

    params: Any
    base: Params | None
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
    mesh: Mesh | None = None,
) -> Learner:
    """Policy gradients on verified reward.

    Args:
        shape: of the packed micro-batches.
        prompts: token ids of every training problem.
        samples: G.
        seed: of adapters, and of the order in which a step's prompts form minibatches.
        stop: tokens that end an answer.
        mesh: of `rl.mesh`; None: one device.

    Raises:
        ValueError: see `Settings.check`.
    """
    settings.check(samples, shape.longest, model.routed is not None)
    merged, whole_on = jax.jit(_whole(settings, lora.merge)), functools.partial(place, mesh, whole=True)
    step = _Step(model, optimizer, settings, shape, prompts, seed, stop, mesh)

    def weights(state: State) -> tuple[Params, int]:
        params, version = _sampler(settings, state)
        return whole_on(params if state.base is None else merged(state.base, params)), version

    return Learner(
        members=0,
        common=True,
        init=functools.partial(_init, optimizer, settings, seed, mesh),
        weights=weights,
        mean=lambda state: whole_on(state.params if state.base is None else merged(state.base, state.params)),
        learn=step.learn,
        plan=lambda state: (
            _plan(optimizer, state)
            | {"activations of config.gradient.tokens, about": _activations(model, settings, shape, state)}
        ),
        compile=step.compile,
        record_experts=settings.routing == "r3",
    )


def _whole(settings: Settings, form: Callable[..., Params] = lora.attach) -> Callable[[Params | None, Any], Params]:
    """(base, what learns) -> the model's parameters, with adapters in this form of `rl.lora`."""
    if settings.lora is None:
        return lambda base, params: params
    return functools.partial(form, alpha=settings.lora.alpha)


def _init(optimizer, settings: Settings, seed: int, mesh: Mesh | None, params: Params) -> State:
    params, base = place(mesh, jax.tree.map(jnp.array, params)), None  # a copy: updates donate
    if settings.lora is not None:
        key = jax.random.fold_in(jax.random.key(seed), 4)
        params, base = lora.init(params, settings.lora.rank, settings.lora.pattern, key), params
        params = place(mesh, params)
    master = eggroll.estimate.master_copy(params)
    ring = None
    if settings.staleness:
        ring = jax.tree.map(lambda x: jnp.broadcast_to(x, (settings.staleness, *x.shape)) + jnp.zeros_like(x), params)
    copy = lambda wanted: jax.tree.map(jnp.array, params) if wanted else None
    reference, previous = copy(settings.anchored), copy(settings.kl_convex)
    opt_state = init_optimizer(mesh, optimizer.init, eggroll.estimate.masters(params, master))
    step, skipped = place(mesh, (jnp.int32(0), jnp.int32(0)))
    return State(params, base, master, opt_state, step, ring, reference, previous, skipped)


def _sampler(settings: Settings, state: State) -> tuple[Any, int]:
    """`params` of `staleness` steps ago, or the oldest there are, and the steps made before them."""
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

    def __init__(self, model, optimizer, settings: Settings, shape: packing.Shape, prompts, seed: int, stop, mesh):
        self.model, self.settings, self.shape, self.seed, self.stop = model, settings, shape, seed, stop
        self.prompt, self.prompt_length = pad(prompts)
        whole = _whole(settings)
        score = functools.partial(estimates.completion_scores, model, temperature=settings.temperature, mesh=mesh)
        self.score = jax.jit(lambda base, params, batch: score(whole(base, params), batch)[0])
        rule, temperature = credits.NORMS.get(settings.norms), settings.temperature
        norms = lambda base, *args: rule(model, *args, temperature=temperature, base=base, merge=whole, mesh=mesh)
        self.norms = jax.jit(norms) if rule and settings.advantage == "minimum_variance" else None
        self.update = jax.jit(functools.partial(update, model, optimizer, settings, whole, mesh), donate_argnums=0)
        self.whole = jax.jit(whole)

    def learn(self, state: State, answers: Answers, replayed: Groups | None = None):
        """One step."""
        settings, step = self.settings, int(state.step)
        groups = join(Groups.make(answers.problem, answers.rollouts, answers.scored), replayed)
        if settings.anchored and 0 < settings.reincarnation == step:
            state = state._replace(reference=jax.tree.map(jnp.copy, state.params))
        epochs = 1 if 0 < settings.reincarnation <= step else settings.epochs
        parts = [part for epoch in range(epochs) for part in self.split(step, epoch, groups.size)]
        experts = self.experts(state, answers, groups, replayed)
        batches = [self.pack(groups, part, experts) for part in parts]
        credit, value = self.credit(state, groups, parts, batches)
        if settings.staleness:
            state = state._replace(history=_ring_put(state.history, step % settings.staleness, state.params))
        if settings.kl_convex:
            state = state._replace(previous=jax.tree.map(jnp.copy, state.params))
        learning = (state.params, state.master, state.opt_state, state.skipped)
        measured = []
        for part, batch in zip(parts, batches, strict=True):
            some = {name: rows(x[part]) for name, x in credit.items()}
            if self.norms:
                some["advantage"] = self.least_variance(learning[0], state.base, batch, some, value[part])
            learning, *measures = self.update(learning, state.base, batch.credit(**some))
            measured.append(measures)
        params, master, opt_state, skipped = learning
        metrics = means_and_maxima(measured) | self.measures(step, groups, credit, value, replayed)
        self.check(metrics, groups)
        state = state._replace(params=params, master=master, opt_state=opt_state, skipped=skipped, step=state.step + 1)
        return state, metrics

    def compile(self, state: State, completions: int) -> jax.stages.Compiled:
        """The update of one of the minibatches of a step of so many completions."""
        c = self.model.config
        experts = None if self.settings.routing == "none" else (c.layers, c.experts_per_token, id_dtype(c.experts))
        one = packing.shapes(self.shape, experts)
        count = max(1, -(-(completions // self.settings.minibatches) // self.shape.rows))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), one)
        batch = dataclasses.replace(batch, used=one.used)
        learning = (state.params, state.master, state.opt_state, state.skipped)
        return self.update.lower(learning, state.base, batch).compile()

    def split(self, step: int, epoch: int, size: int) -> list[np.ndarray]:
        """The groups of each minibatch, in an order of the epoch's own."""
        count = self.settings.minibatches
        if size % count:
            raise ValueError(f"a step's groups must divide into minibatches; got {size} groups and {count} minibatches")
        if count == 1:
            return [np.arange(size)]
        order = np.random.Generator(np.random.PCG64([self.seed, step, epoch])).permutation(size)
        return [np.sort(part) for part in order.reshape(count, -1)]

    def experts(self, state: State, answers: Answers, groups: Groups, replayed: Groups | None) -> np.ndarray | None:
        """The experts that this step forces, [P G, longest prompt + L, layers, k], or None."""
        kind, (_, samples, longest) = self.settings.routing, groups.tokens.shape
        if kind == "none":
            return None
        problem = np.repeat(groups.problem, samples)
        if kind == "r2":
            filled = lambda value, dtype=np.int32: np.full(len(problem), value, dtype)
            prompt, prompt_length = self.prompt[problem], self.prompt_length[problem]
            requests = Requests(prompt, prompt_length, filled(longest), filled(0, np.uint32), filled(-1))
            begun = Rollouts.empty(filled(-1), longest)
            rollouts = dataclasses.replace(begun, tokens=rows(groups.tokens), length=groups.length.reshape(-1))
            return routing.recompute(self.model, self.whole(state.base, state.params), requests, rollouts)
        recorded = answers.rollouts.experts
        if replayed is not None or recorded is None:
            raise ValueError(
                "routing 'r3' forces the experts that the sampler used, for which it has to record them, and which replayed "
                f"groups do not keep; got {'replayed groups' if recorded is not None else 'no record'}: take routing 'r2'"
            )
        # the prompts asked may all be shorter than the longest there is
        columns = recorded.shape[1] - longest
        padding = np.full((len(problem), self.prompt.shape[1] - columns, *recorded.shape[2:]), -1, recorded.dtype)
        return np.concatenate([recorded[:, :columns], padding, recorded[:, columns:]], axis=1)

    def credit(self, state: State, groups: Groups, parts, batches) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """See `rl.learners.credit.assign`."""
        once = list(zip(parts, batches, strict=True))[: self.settings.minibatches]  # every answer, one time
        free = [(part, dataclasses.replace(batch, experts=None)) for part, batch in once]
        score = lambda over: lambda params: self.scores(state.base, params, over, groups.logp.shape)
        return credits.assign(
            self.settings, groups, int(state.step), longest=self.shape.longest, stop=self.stop, own=score(once),
            free=score(free), policies=(state.params, state.reference, state.previous), updates=len(parts),
        )  # fmt: skip

    def pack(self, groups: Groups, part: np.ndarray, experts: np.ndarray | None) -> TrainBatch:
        """Some groups as micro-batches."""
        samples = groups.tokens.shape[1]
        problem = np.repeat(groups.problem[part], samples)
        row = (part[:, None] * samples + np.arange(samples)).reshape(-1)
        return packing.micro_batches(
            self.prompt[problem], self.prompt_length[problem], rows(groups.tokens[part]), groups.length[part].reshape(-1),
            self.shape, experts=None if experts is None else experts[row],
        )  # fmt: skip

    def scores(self, base, params, over, shape: tuple[int, ...]) -> np.ndarray:
        """Log-probabilities of all answers under a policy, f32 [P, G, L]."""
        out = np.zeros(shape, np.float32)
        for part, batch in over:
            logp = batch.gathered(np.asarray(self.score(base, params, batch)))[:, : shape[-1]]
            out[part] = logp.reshape(out[part].shape)
        return out

    def least_variance(self, params, base, batch: TrainBatch, credit, value: np.ndarray) -> np.ndarray:
        """VCPO's advantages for the parameters of now, [n, L]."""
        shape = value.shape
        norms, log_weight = self.norms(base, params, batch.credit(**credit))
        norms, log_weight = (batch.gathered(np.asarray(x)).reshape(shape) for x in (norms, log_weight))
        ok = credit["counted"].reshape(shape)
        advantage = advantages.minimum_variance(value, ok, log_weight, norms)
        return np.asarray(advantages.to_tokens(advantage, credit["mask"]))

    def measures(self, step: int, groups: Groups, credit, value, replayed: Groups | None) -> dict[str, float]:
        """Metrics of what was learnt from; the age of a token is in steps."""
        mean = lambda x, where: float(x[where].mean()) if where.any() else 0.0
        more = {}
        if self.settings.advantage == "adora":
            options = {name: x for name, x in self.settings.advantage_options if name != "base"}
            lengths = (groups.mask & credit["counted"][..., None]).sum(axis=-1)
            weight = advantages.adora_weight(value, credit["counted"], lengths, **options)
            more["adora_weight"] = float(np.mean(weight))
        return more | {
            "zero_spread_groups": float(1 - groups.informative.mean()),
            "replayed_groups": 0 if replayed is None else replayed.size,
            "advantage_size": mean(np.abs(credit["advantage"]), credit["mask"]),
            "age": mean(step - groups.version, groups.mask),
        }

    def check(self, metrics: dict[str, Any], groups: Groups) -> None:
        """Raises `NonFinite` after too many updates in a row without a finite gradient."""
        skipped, limit = int(metrics["skipped_in_a_row"]), self.settings.limit
        if skipped >= limit:
            raise NonFinite(
                f"{skipped} updates in a row had no finite gradient and were skipped, and the limit is {limit}: lower the "
                "learning rate, or look at the rewards and log-probabilities of the last batch", groups,
            )  # fmt: skip


def _activations(model: LanguageModel, settings: Settings, shape: packing.Shape, state: State) -> int:
    merge = _whole(settings)
    return estimates.activation_bytes(model, state.params, settings.objective, shape, merge=merge, base=state.base)


def _plan(optimizer: optax.GradientTransformation, state: State) -> dict[str, int]:
    of_state = optim.report(optimizer, eggroll.estimate.masters(state.params, state.master))
    return {
        "parameters": tree_bytes((state.params, state.master, state.base)),
        "gradients": tree_bytes(jax.eval_shape(estimates.wide_zeros, state.params)),
        **{f"optimizer {group}".rstrip(): size for group, size in of_state.groups.items()},
        "older policies": tree_bytes((state.history, state.reference, state.previous)),
    }
