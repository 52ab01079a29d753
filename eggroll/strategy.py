"""init / evaluate / update: evolution strategies on any pytree of parameters, for any optax optimizer."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from eggroll import checks, fitness, noise, sharding
from eggroll.estimate import Estimate, gradients, master_copy, masters, step
from eggroll.members import Drawn, map_members, mapped, perturbed
from eggroll.perturb import RULES as PERTURBATION_RULES
from eggroll.perturb import Interpreter, LowRank
from eggroll.population import Population
from kernels import dispatch, noise_bits

_COMPILER_DIVIDES = "the compiler divides arrays over axes of the mesh, and it cannot divide a kernel"


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
    axes: tuple[str, ...]
    layout: sharding.Layout
    sums: str
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
        params = self._laid_out(params)
        master, init, zero = master_copy(params), self._optimizer(params, plan).init, jnp.zeros((), jnp.int32)
        if self.mesh is None:
            return State(params, master, init(masters(params, master)), zero, key)
        everywhere = functools.partial(sharding.place, self.mesh, ())
        opt_state = sharding.init_beside(self.mesh, self.layout, init, masters(params, master))
        return State(params, master, opt_state, everywhere(zero), everywhere(key))

    def evaluate(self, state: State, score: checks.Score, batch, *, has_aux: bool = False, per_member: bool = False):
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
        checks.check_batch(batch, lead)
        chex.assert_shape(state.generation, ())
        with dispatch.refused(self._shared()):
            out = self._members(state, checks.scalar(score, has_aux), batch, per_member)
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

    def evaluate_mean(self, state: State, score: checks.Score, batch, *, has_aux: bool = False):
        """Scores [E] of the unperturbed mean parameters on every row of the batch (and aux [E, ...])."""
        checks.check_batch(batch, ())
        with dispatch.refused(_COMPILER_DIVIDES if self.mesh is not None and self.mesh.size > 1 else ""):
            out = jax.vmap(functools.partial(checks.scalar(score, has_aux), state.params))(batch)
        return out if has_aux else out[0]

    def uses(self, state: State, score: checks.Score, row) -> list[tuple[str, str, bool]]:
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
        with dispatch.refused(self._shared()):
            ascent = self._ascent(plan, shaped, self._noise_key(state), sigma)
        leaves, tree = jax.tree.flatten(state.params)
        descent = [jnp.zeros_like(p) if g is None else -g for p, g in zip(leaves, ascent, strict=True)]
        descent = jax.tree.leaves(self._laid_out(jax.tree.unflatten(tree, descent)))
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
        if self.mesh is not None:
            params, master = self._laid_out(params), self._laid_out(master)
            opt_state = sharding.place_beside(self.mesh, self.layout, masters(params, master), opt_state)
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

    def _shared(self) -> str:
        """Why no kernel can serve the program of one device, or ""."""
        if self.mesh is None or math.prod(self.mesh.shape[axis] for axis in self.axes) == self.mesh.size:
            return ""
        return _COMPILER_DIVIDES

    def _laid_out(self, tree):
        return tree if self.mesh is None else sharding.place(self.mesh, self.layout, tree)

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
        state = dataclasses.replace(state, master=None, opt_state=None)
        plan = self._plan(state.params)

        def some(state, batch, population, ids):
            def member(lefts, rights, sign, rows):
                params = perturbed(plan, state.params, lefts, rights, sign)
                run = Interpreter(PERTURBATION_RULES, self.materialise)
                size = jax.tree.leaves(rows)[0].shape[0]
                return mapped(lambda row: run.call(score, params, row), (0,), size)(rows)

            draw = functools.partial(self._draw, plan, state)
            return map_members(member, draw, population, ids, batch, per_member, self.chunk)

        if self.mesh is None:
            return some(state, batch, self.population, (self.population.row_ids(), self.population.column_ids()))
        return sharding.evaluate(some, self.population, self.mesh, self.axes, state, batch, per_member)

    def _ascent(self, plan, shaped: Array, key: tuple[Array, Array, Array], sigma: Array) -> list[Array | None]:
        """`gradients` of all members, on every device or by parts."""

        def all_or_own(shaped, key, sigma, **own):
            settings = {"rank": self.rank, "kind": self.noise, "chunk": self.chunk}
            return gradients(plan, self.population, shaped, key, sigma, **settings, **own)

        if self.mesh is None:
            return all_or_own(shaped, key, sigma)
        reduced = self.sums == "reduced"
        return sharding.summed(all_or_own, self.population, self.mesh, self.axes, reduced, shaped, key, sigma)


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
    axes: Sequence[str] | None = None,
    layout: sharding.Layout = (),
    sums: str = "rebuilt",
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
            activations in cache. Changes no number beyond rounding; and where it divides N / D, the number D of devices
            changes none at all.
        mesh: devices, or None: what is jitted runs where its arguments are. Its axes must be automatic.
        axes: of the mesh, over which members are divided; None: all. What is sent is every score, once, 4 bytes.
        layout: (pattern, PartitionSpec) pairs over the other axes, see `eggroll.sharding`: where parameters lie, their
            optimizer state and the compiler's share of every member's work; () copies them to every device. Members' loops then
            have to run equally long on all devices, which exchange parts inside of them.
        sums: "rebuilt": every device draws and sums all members, so that nothing is sent and the update does not depend on
            the number D of devices, bit for bit. "reduced": each sums its own members, and the sums are added, which sends
            about twice the gradient's bytes and rounds otherwise. Per matrix rebuilding takes 2 m n N r operations, the
            evaluation 2 m n (N / D) rows: "reduced" pays where D r exceeds the rows (tokens) a member is evaluated on.
        materialise: form the perturbation of a weight that meets an operation without a rule, instead of an error.

    Raises:
        ValueError: an unknown noise name, rank or reuse below 1, sigma not positive, a population that does not divide over
            the mesh, or unknown axes and sums.

    Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652; crossed populations are this project's.
    """
    checks.check_settings(rank, sigma, noise, reuse, chunk, sums)
    axes = () if mesh is None else mesh.axis_names if axes is None else tuple(axes)
    if mesh is not None:
        sharding.check(population, mesh, axes)
    return Strategy(
        optimizer, population, rank, sigma, noise, tuple((str(p), str(f)) for p, f in rules), shaping, reuse, chunk, mesh,
        axes, tuple(layout), sums, materialise,
    )  # fmt: skip


def _is_low_rank(x) -> bool:
    return isinstance(x, LowRank)
