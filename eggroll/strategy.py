"""init / evaluate / update: evolution strategies on any pytree of parameters, for any optax optimizer."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eggroll import fitness, noise
from eggroll.estimate import Estimate, gradients, master_copy, masters, step
from eggroll.members import Drawn, map_members, mapped, perturbed
from eggroll.perturb import RULES as PERTURBATION_RULES
from eggroll.perturb import Interpreter, LowRank
from eggroll.population import Population
from kernels import dispatch, noise_bits

Score = Callable[[Any, Any], Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "master", "opt_state", "generation", "key"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes from one generation to the next, and all a checkpoint needs.

    Attributes:
        params: the mean parameters, in the model's own types.
        master: f32 copy of each bf16 or f16 leaf, else None; steps smaller than a half-precision ulp survive in it.
        opt_state: of the optax optimizer; frozen leaves have none.
        generation: i32, updates made so far.
        key: typed PRNG key; never changes.
    """

    params: Any
    master: Any
    opt_state: Any
    generation: Array
    key: Array


@dataclasses.dataclass(frozen=True)
class Strategy:
    """An evolution strategy as pure functions of `State`; made by `strategy`, whose docstring explains the fields."""

    optimizer: optax.GradientTransformation
    population: Population
    rank: int
    sigma: float | Callable[[Array], Array]
    noise: str
    rules: noise.Rules
    shaping: fitness.Shaper
    reuse: int
    chunk: int | None
    mesh: Mesh | None
    materialise: bool

    def init(self, params, key: Array) -> State:
        """State at generation 0 with these mean parameters.

        Raises:
            TypeError: integer leaves that are not frozen; a key that is not `jax.random.key(seed)`.
            ValueError: a leaf whose form is undecided, a rank above a matrix's size, a rule that matches nothing.
        """
        noise.seed_words(key)
        params = jax.tree.map(jnp.asarray, params)
        plan = self._plan(params)
        if all(leaf.form == "frozen" for leaf in plan):
            raise ValueError(f"at least one leaf must be perturbed; all {len(plan)} are frozen: relax the rules")
        master = master_copy(params)
        opt_state = self._optimizer(params, plan).init(masters(params, master))
        return State(params, master, opt_state, jnp.zeros((), jnp.int32), key)

    def evaluate(self, state: State, score: Score, batch, *, has_aux: bool = False, per_member: bool = False):
        """Scores of every perturbed member on every row of the batch.

        Args:
            score: score(params, row) -> scalar, higher is better; any JAX function, written for one set of parameters.
                With `has_aux`, -> (scalar, pytree).
            batch: pytree of arrays with leading axis E: every member sees every row (common random numbers). With
                `per_member`, leading axes [N, E]: rows of its own for each member.

        Returns:
            scores [N, E], member index as in `eggroll.population`; with `has_aux`, (scores, aux [N, E, ...]).

        Raises:
            PerturbationError: a perturbed leaf reaches an operation without a rule (names both).
            ValueError: score is not a scalar, or the batch's leading axes do not fit.
        """
        lead = (self.population.size,) if per_member else ()
        _check_batch(batch, lead)
        chex.assert_shape(state.generation, ())
        with dispatch.refused(self._split()):
            out = self._members(state, _scalar(score, has_aux), batch, per_member)
        return out if has_aux else out[0]

    def draw(self, state: State) -> Drawn:
        """Every member of this generation at once, as the mean parameters and all factors.

        For loops that run members in an order of their own, such as a rollout engine's slots, and must not draw noise inside:
        see `Drawn`. Memory: (rows + columns) factor sets of the population, each about as large as one input and one output of
        every matrix times the rank.
        """
        plan = self._plan(state.params)
        flat = lambda ids: ids.reshape(-1)
        lefts, rights = self._draw(plan, state, flat(self.population.row_ids()), flat(self.population.column_ids()))
        return Drawn(state.params, lefts, rights, plan, self.population)

    def evaluate_mean(self, state: State, score: Score, batch, *, has_aux: bool = False):
        """Scores [E] of the unperturbed mean parameters on every row of the batch (and aux [E, ...])."""
        _check_batch(batch, ())
        with dispatch.refused(self._split()):
            out = jax.vmap(functools.partial(_scalar(score, has_aux), state.params))(batch)
        return out if has_aux else out[0]

    def uses(self, state: State, score: Score, row) -> list[tuple[str, str, bool]]:
        """Where low-rank weights are used, without running anything.

        Returns:
            (leaf path, operation, whether a member forms its whole perturbation there) per use in the traced program; a loop's
            body counts once. With `materialise`, the entries that are True are the ones that cost memory and speed.
        """
        run = Interpreter(PERTURBATION_RULES, self.materialise)
        member = lambda state: self._one(state, jnp.zeros((), jnp.int32))
        jax.eval_shape(lambda state, row: run.call(score, member(state), row), state, row)
        return run.uses

    def member_params(self, state: State, member: int | Array):
        """The perturbed parameters of one member, materialised: what `evaluate` runs it with, as plain arrays."""
        params = self._one(state, jnp.asarray(member))
        return jax.tree.map(lambda x: x.resolve() if _is_low_rank(x) else x, params, is_leaf=_is_low_rank)

    def estimate(self, state: State, scores: Array, **context) -> Estimate:
        """Descent-sign gradient estimate -(1/(N sigma)) sum_n f_n E_n from raw scores.

        Args:
            scores: [N, E] (or [N]) from `evaluate`.
            context: what the shaping needs besides (for example groups=, baseline=).
        """
        if scores.ndim not in (1, 2) or scores.shape[0] != self.population.size:
            raise ValueError(
                f"scores must be [members] or [members, evaluations] with {self.population.size} members; "
                f"got shape {scores.shape}"
            )
        shaped, shaping_metrics = self.shaping(scores, self.population, **context)
        if shaped.shape != (self.population.size,):
            raise ValueError(f"shaping must return [{self.population.size}] numbers; got shape {shaped.shape}")
        sigma = self._sigma(state)
        plan = self._plan(state.params)
        with dispatch.refused(self._split()):
            ascent = gradients(
                plan, self.population, shaped, self._noise_key(state), sigma,
                rank=self.rank, kind=self.noise, chunk=self.chunk, place=self._place,
            )  # fmt: skip
        leaves, tree = jax.tree.flatten(state.params)
        descent = [jnp.zeros_like(p) if g is None else -g for p, g in zip(leaves, ascent, strict=True)]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in ascent if g is not None))
        metrics = shaping_metrics | {"gradient_norm": norm, "sigma": sigma}
        one = jnp.ones((), jnp.float32)
        return Estimate(jax.tree.unflatten(tree, descent), one, {k: (v, one) for k, v in metrics.items()})

    def update(self, state: State, scores: Array, **context) -> tuple[State, dict[str, Array]]:
        """One generation's step: `estimate`, then `apply`. Returns the new state and scalar metrics."""
        return self.apply(state, self.estimate(state, scores, **context))

    def apply(self, state: State, estimate: Estimate) -> tuple[State, dict[str, Array]]:
        """Hands an estimate to the optimizer and steps, in f32 master weights where the model is below f32."""
        plan = self._plan(state.params)
        frozen = jax.tree.unflatten(jax.tree.structure(state.params), [leaf.form == "frozen" for leaf in plan])
        params, master, opt_state, updates = step(
            self._optimizer(state.params, plan), state.params, state.master, state.opt_state, estimate, frozen
        )
        size = sum(math.prod(leaf.shape) for leaf in plan if leaf.form != "frozen")
        moved = [u for u, f in zip(jax.tree.leaves(updates), jax.tree.leaves(frozen), strict=True) if not f]
        metrics = {name: total / count for name, (total, count) in estimate.metrics.items()}
        metrics["update_rms"] = jnp.sqrt(sum(jnp.sum(jnp.square(u.astype(jnp.float32))) for u in moved) / size)
        return State(params, master, opt_state, state.generation + 1, state.key), metrics

    # -- parts -------------------------------------------------------------------------------------------------------

    def _plan(self, params) -> tuple[noise.Leaf, ...]:
        return noise.plan(params, self.rules, self.rank)

    def _optimizer(self, params, plan) -> optax.GradientTransformation:
        if not any(leaf.form == "frozen" for leaf in plan):
            return self.optimizer
        labels = ["frozen" if leaf.form == "frozen" else "trained" for leaf in plan]
        labels = jax.tree.unflatten(jax.tree.structure(params), labels)
        return optax.partition({"trained": self.optimizer, "frozen": optax.set_to_zero()}, labels)

    def _sigma(self, state: State) -> Array:
        return jnp.asarray(self.sigma(state.generation) if callable(self.sigma) else self.sigma, jnp.float32)

    def _noise_key(self, state: State) -> tuple[Array, Array, Array]:
        return (*noise.seed_words(state.key), (state.generation // self.reuse).astype(jnp.uint32))

    def _split(self) -> str:
        """Why no kernel can serve this strategy, or ""."""
        if self.mesh is None or self.mesh.size == 1:
            return ""
        return "the compiler divides the members over the mesh, and it cannot divide a kernel"

    def _place(self, ids: Array) -> Array:
        """Spreads members over the mesh: by blocks where there are several, else by rows."""
        if self.mesh is None:
            return ids
        axes = (
            PartitionSpec(self.mesh.axis_names)
            if self.population.blocks > 1
            else PartitionSpec(None, self.mesh.axis_names)
        )
        return lax.with_sharding_constraint(ids, NamedSharding(self.mesh, axes))

    def _draw(self, plan, state: State, rows: Array, columns: Array) -> tuple[list, list]:
        """Noise for these factor identities, laid out and scaled as members use it: row and column parts of every leaf."""
        crossed = self.population.columns > 1
        key = self._noise_key(state)
        rows, columns = noise.factors(plan, key, rows, columns, self.rank, self.noise, crossed)
        sigma = self._sigma(state)

        def scaled(leaf, x):  # the row part carries sigma, which then costs nothing per member
            if x is None:
                return None
            x = x.astype(jnp.promote_types(leaf.dtype, jnp.float32))
            return x * (sigma.astype(x.dtype) / math.sqrt(self.rank) if leaf.low_rank else sigma.astype(x.dtype))

        rows = noise_bits.once(lambda key, rows: list(map(scaled, plan, rows)), key, rows)
        laid = lambda role: lambda leaf, x: noise.unfold(leaf, x, role) if leaf.low_rank else x
        return list(map(laid(noise.LEFT), plan, rows)), list(map(laid(noise.RIGHT), plan, columns))

    def _one(self, state: State, member: Array):
        """One member's parameters, low-rank weights as factors."""
        row, column, sign = self.population.coordinates(member)
        plan = self._plan(state.params)
        lefts, rights = self._draw(plan, state, row.astype(jnp.uint32), column.astype(jnp.uint32))
        return perturbed(plan, state.params, lefts, rights, 1 - 2 * sign.astype(jnp.float32))

    def _members(self, state: State, score, batch, per_member: bool):
        """Scores and aux of all members, with leading axes [N, E]."""
        plan = self._plan(state.params)

        def draw(rows: Array, columns: Array):
            return self._draw(plan, state, self._place(rows), columns)

        def member(lefts, rights, sign, rows):
            params = perturbed(plan, state.params, lefts, rights, sign)
            run = Interpreter(PERTURBATION_RULES, self.materialise)
            size = jax.tree.leaves(rows)[0].shape[0]
            return mapped(lambda row: run.call(score, params, row), (0,), size)(rows)

        return map_members(member, draw, self.population, batch, per_member, self.chunk)


def strategy(
    optimizer: optax.GradientTransformation,
    *,
    population: Population,
    rank: int = 1,
    sigma: float | Callable[[Array], Array],
    noise: str = "gaussian",
    rules: noise.Rules = (),
    shaping: fitness.Shaper = fitness.zscore,
    reuse: int = 1,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    materialise: bool = False,
) -> Strategy:
    """EGGROLL: evolution strategies with low-rank noise; full-rank OpenES with rules=(("", "full"),).

    Member n perturbs each matrix by sigma E_n, E_n = A_n B_n^T / sqrt(r), and the estimate is (1/(N sigma)) sum_n f_n E_n.

    Args:
        optimizer: any optax optimizer; its learning rate may be an optax schedule.
        population: `eggroll.independent`, `antithetic` or `crossed`.
        rank: r.
        sigma: noise standard deviation in weight units, or a schedule sigma(generation).
        noise: "gaussian" or "rademacher" factors.
        rules: (pattern, form) pairs, the first whose pattern is found in a parameter's path decides: "lowrank", "full",
            "frozen", or a letter per axis (see `eggroll.noise.Leaf`).
        shaping: from `eggroll.fitness`.
        reuse: generations that share their noise (K in the literature); 1 draws afresh every generation.
        chunk: at most about this many members at once (whole rows of the population); bounds memory, and on a CPU keeps
            activations in cache. Changes no number beyond rounding.
        mesh: devices to spread the members over, all axes of it.
        materialise: form the perturbation of a weight that meets an operation without a rule, instead of an error.

    Raises:
        ValueError: an unknown noise name, rank or reuse below 1, sigma not positive, a population that does not divide over
            the mesh.

    Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652; crossed populations are this project's.
    """
    _check_settings(population, rank, sigma, noise, reuse, chunk, mesh)
    return Strategy(
        optimizer, population, rank, sigma, noise, tuple((str(p), str(f)) for p, f in rules), shaping, reuse, chunk, mesh,
        materialise,
    )  # fmt: skip


def _check_settings(population, rank, sigma, kind, reuse, chunk, mesh) -> None:
    if kind not in noise.KINDS:
        raise ValueError(f"noise is one of {noise.KINDS}; got {kind!r}")
    for name, value in (("rank", rank), ("reuse", reuse), ("chunk", 1 if chunk is None else chunk)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1; got {value!r}")
    if not callable(sigma) and not sigma > 0:
        raise ValueError(f"sigma must be positive (or a schedule of the generation); got {sigma!r}")
    if mesh is not None:
        spread = population.blocks if population.blocks > 1 else population.rows
        if spread % mesh.size:
            raise ValueError(
                f"the population's {'blocks' if population.blocks > 1 else 'rows'} must divide over the devices; got {spread} "
                f"over {mesh.size}: choose a population of a multiple of {mesh.size}"
            )


def _scalar(score: Score, has_aux: bool) -> Callable:
    """score with a checked scalar result, always as (score, aux)."""

    def checked(params, row):
        out = score(params, row)
        value, aux = out if has_aux else (out, None)
        if jnp.shape(value) != ():
            raise ValueError(f"score must return one number per row (higher is better); got shape {jnp.shape(value)}")
        return value, aux

    return checked


def _check_batch(batch, lead: tuple[int, ...]) -> None:
    shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    n = len(lead) + 1
    if (
        not shapes
        or len({s[:n] for s in shapes.values()}) > 1
        or any(len(s) < n or s[: n - 1] != lead for s in shapes.values())
    ):
        want = f"[members = {lead[0]}, evaluations]" if lead else "[evaluations]"
        raise ValueError(f"every array of the batch needs the same leading axes {want}; got {shapes}")


def _is_low_rank(x) -> bool:
    return isinstance(x, LowRank)
