"""The gradient of a policy-gradient objective from packed rows, in micro-batches, as an `eggroll.Estimate`.

Losses see [n, L] log-probabilities of completions; here they are made from packed rows without logits of all tokens, and
differentiated one micro-batch at a time. With J = sum_m numerator_m / sum_m denominator_m over micro-batches m,

    gradient = (sum_m d numerator_m / d params) / sum_m denominator_m,

so how sequences are packed and split changes no number beyond rounding. Every function here is meant for use under `jax.jit`,
with the model and the objective static; what memory they need is what one micro-batch needs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from eggroll import Estimate
from eggroll.noise import path_name
from kernels import token_logprob
from rl.data import packing
from rl.data.packing import Shape
from rl.mesh import gatherer, over_micro_batches, parts, place
from rl.models.language import LanguageModel, Params, head_of, is_layer
from rl.objectives.policy_gradient import Credit, Objective, loss
from rl.types import Gather, TrainBatch

_CPU_BLOCK, _BLOCK = 128, 1024


class Sample(NamedTuple):
    """What the batch looks like to the policy before the update.

    Attributes:
        log_weight: f32 [M, n] nats, sum over counted tokens of logp - behaviour; 0 where no sequence is.
        maxima: name -> largest value over tokens, f32.
    """

    log_weight: Array
    maxima: dict[str, Array]


def completion_logp(
    model: LanguageModel,
    params: Params,
    micro: TrainBatch,
    *,
    temperature: float | Array = 1.0,
    block: int | None = None,
    gather: Gather | None = None,
) -> tuple[Array, Array]:
    """Log-probability of every completion token of one micro-batch, and the entropy of the distribution it was drawn from.

    Args:
        model: see `rl.models.presets.make`; the `remat` of its configuration trades arithmetic for memory.
        params: arrays.
        micro: one micro-batch of a `TrainBatch`: no leading M.
        temperature: of the distribution, > 0.
        block: tokens whose logits exist at one time; None: 128 on a CPU, where they stay in its cache, else 1024.
        gather: puts parameters together that devices hold in parts: each layer's where it is used, the others here.

    Returns:
        ([n, L], [n, L]) in nats, f32 (f64 for an f64 model); exactly 0 beyond each completion, with exactly zero gradient.
    """
    rows, capacity = micro.ids.shape
    if gather is not None:
        params = {name: part if is_layer(name) else gather(name, part) for name, part in params.items()}
    hidden = jax.vmap(functools.partial(_hidden, model, params, gather))(micro.ids, micro.segments, micro.experts)
    hidden, ids = hidden.reshape(rows * capacity, -1), micro.ids.reshape(-1)
    place = jnp.arange(micro.longest)
    real = place < micro.length[:, None]
    at = (micro.row * capacity + micro.offset + micro.prompt_length)[:, None] + place
    at = jnp.where(real, at, 1).reshape(-1)  # each token is predicted by the hidden row before it
    score = functools.partial(
        token_logprob.log_prob,
        head=head_of(model, params),
        temperature=temperature,
        block=block or _block(),
    )
    if at.size < rows * capacity:
        scores = score(hidden[at - 1], ids=ids[at])
    else:  # fewer tokens in the rows than places for completions: score them all, then pick
        scores = jax.tree.map(lambda x: x[at - 1], score(hidden[:-1], ids=ids[1:]))
    return jax.tree.map(lambda x: jnp.where(real, x.reshape(real.shape), 0), scores)


def _block() -> int:
    return _CPU_BLOCK if jax.default_backend() == "cpu" else _BLOCK


def _hidden(
    model: LanguageModel, params: Params, gather: Gather | None, ids: Array, segments: Array, experts: Array | None
) -> Array:
    """[C, width] of one packed row; padding, which may hold anything, becomes 0 before a head or a gradient meets it."""
    given = {name: x for name, x in (("experts", experts), ("gather", gather)) if x is not None}
    hidden, _ = model.forward(params, jnp.where(segments >= 0, ids, 0), segments=segments, **given)
    return jnp.where(segments[:, None] >= 0, hidden, 0)


def completion_scores(
    model: LanguageModel,
    params: Params,
    batch: TrainBatch,
    *,
    temperature: float | Array = 1.0,
    block: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """`completion_logp` of all micro-batches, ([M, n, L], [M, n, L]): what proximal and reference policies think."""

    divided = parts(mesh, params)
    score = functools.partial(completion_logp, model, temperature=temperature, block=block, gather=gatherer(divided))

    def run(params, _, batch):
        one = lambda m: score(params, _take(batch, m))
        put = lambda m, out: jax.tree.map(lambda every, part: every.at[m].set(part), out, one(m))
        empty = jax.tree.map(lambda x: jnp.zeros((len(batch.ids), *x.shape), x.dtype), jax.eval_shape(one, 0))
        return (), (), (), lax.fori_loop(0, batch.used, put, empty)

    return over_micro_batches(mesh, run, params, batch, divided=divided)[3]


def estimate(
    model: LanguageModel,
    params: Any,
    batch: TrainBatch,
    objective: Objective,
    *,
    temperature: float | Array = 1.0,
    block: int | None = None,
    base: Any = None,
    merge: Callable[[Any, Any], Params] | None = None,
    credit: Callable[[TrainBatch, Array], Credit] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Estimate, Sample]:
    """The gradient of an objective's loss.

    Args:
        model: see `rl.models.presets.make`.
        params: what is differentiated, a pytree of arrays.
        batch: with `TrainBatch.credit`.
        objective: see `rl.objectives.policy_gradient`.
        temperature: at which the completions were sampled.
        block: see `completion_logp`.
        base: arrays that `merge` needs and that do not learn.
        merge: (base, params) -> the model's parameters, applied in every micro-batch (see `rl.lora.attach`); None: they are
            `params`. Of what `fsdp` divides, base's arrays that `merge` passes on as they are, and without one all, are put
            together layer by layer, others before.
        credit: (micro-batch, logp) -> what the objective sees, where that depends on the policy; None: `credit_of`.
        mesh: of `rl.mesh`: its devices take micro-batches in turn, and the gradient lies as the parameters do.

    Returns:
        (the estimate, the sample). The gradient is summed in f32 (or wider) and divided once; a batch in which nothing counts
        gives zeros. `step_scale` is 1: VCPO's comes from `Sample.log_weight`.

    Raises:
        ValueError: a batch without credit, or one the objective cannot use.
    """
    _check(batch)
    whole = merge or (lambda base, params: params)
    divided = _left_in_parts(whole, base, params, parts(mesh, params if merge is None else base))
    score = functools.partial(completion_logp, model, temperature=temperature, block=block, gather=gatherer(divided))

    def numerator(params, base, micro):
        logp, entropy = score(whole(base, params), micro)
        seen = credit_of(micro) if credit is None else credit(micro, logp)
        out = loss(objective, logp, entropy, seen)
        return out.numerator, out

    differentiate = jax.grad(numerator, has_aux=True)

    def run(params, base, batch):
        def one(m, carry):
            sums, maxima, log_weight = carry
            part, out = differentiate(params, base, _take(batch, m))
            add = functools.partial(jax.tree.map, lambda total, x: total + x.astype(total.dtype))
            sums = add(sums, (part, out.denominator, out.metrics))
            return sums, jax.tree.map(jnp.maximum, maxima, out.maxima), log_weight.at[m].set(out.log_weight)

        shapes = jax.eval_shape(lambda: numerator(params, base, _take(batch, 0))[1])
        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
        log_weight = jnp.zeros((len(batch.ids), *shapes.log_weight.shape), shapes.log_weight.dtype)
        start = (wide_zeros(params), zeros(shapes.denominator), zeros(shapes.metrics)), zeros(shapes.maxima), log_weight
        (gradient, *sums), maxima, log_weight = lax.fori_loop(0, batch.used, one, start)
        return gradient, sums, maxima, log_weight

    gradient, (denominator, metrics), maxima, log_weight = over_micro_batches(
        mesh, run, params, batch, base=base, divided=divided, learns=True
    )
    gradient, sample = place(mesh, gradient), Sample(log_weight, maxima)
    share = jnp.where(denominator > 0, 1 / jnp.where(denominator > 0, denominator, 1), 0)
    gradient = jax.tree.map(lambda x: x * share.astype(x.dtype), gradient)
    return Estimate(gradient, jnp.float32(1), metrics), sample


def norms(
    model: LanguageModel,
    params: Any,
    batch: TrainBatch,
    *,
    temperature: float | Array = 1.0,
    block: int | None = None,
    base: Any = None,
    merge: Callable[[Any, Any], Params] = lambda base, params: params,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """|g_i|^2 of the score g_i = grad sum_t logp_it over counted tokens, and the log importance weight, of every sequence.

    What VCPO's baseline needs (`rl.objectives.vcpo.minimum_variance_baseline`). No per-sequence gradient is kept: one backward
    pass per sequence over its whole micro-batch, so micro-batches of one row of one sequence waste nothing.

    Args: as `estimate`.

    Returns:
        (f32 [M, n], f32 [M, n]); 0 where no sequence is.
    """
    _check(batch)

    def run(params, base, batch):
        def one(m, out):
            micro = _take(batch, m)

            def scores(params):
                logp, _ = completion_logp(model, merge(base, params), micro, temperature=temperature, block=block)
                mask = micro.mask & micro.counted[:, None]
                weight = jnp.where(mask, lax.stop_gradient(logp) - micro.behaviour, 0).sum(axis=1)
                return jnp.where(mask, logp, 0).sum(axis=1), weight

            score, pull, weight = jax.vjp(scores, params, has_aux=True)

            def squared_norm(i, squares):
                (gradient,) = pull(jnp.zeros_like(score).at[i].set(1))
                wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(gradient)]
                return squares.at[i].set(sum(jnp.vdot(x, x) for x in wide).astype(squares.dtype))

            count = (micro.source >= 0).sum() if mesh is None else micro.source.size  # see `over_micro_batches`
            squares = lax.fori_loop(0, count, squared_norm, jnp.zeros(score.shape, jnp.float32))
            return out[0].at[m].set(squares), out[1].at[m].set(weight.astype(jnp.float32))

        zeros = jnp.zeros(batch.source.shape, jnp.float32)
        return (), (), (), lax.fori_loop(0, batch.used, one, (zeros, zeros))

    return over_micro_batches(mesh, run, params, batch, base=base)[3]


def activation_bytes(
    model: LanguageModel,
    params: Any,
    objective: Objective,
    shape: Shape,
    *,
    base: Any = None,
    merge: Callable[[Any, Any], Params] = lambda base, params: params,
) -> int:
    """About the bytes that `estimate` takes beside its arguments and the gradient: for one micro-batch, what its forward pass
    keeps for the backward pass, and the logits of one block.

    From shapes alone, in the time of a trace. Compilers keep less (they fuse) and need more (for what the backward pass makes,
    and with remat for the layer made again): compiled programs were seen to take between 0.5 and 2.5 times as much.

    Args:
        model, objective, merge: as `estimate`.
        params, base: arrays or shapes.
        shape: of the micro-batches; how many there are makes no difference.
    """

    def kept(params, base, micro):
        def numerator(params):
            logp, entropy = completion_logp(model, merge(base, params), micro)
            return loss(objective, logp, entropy, credit_of(micro)).numerator

        return jax.vjp(numerator, params)[1]

    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    logits = 4 * min(_block(), shape.rows * shape.capacity) * model.config.vocab
    return max(size(jax.eval_shape(kept, params, base, packing.shapes(shape))) - size((params, base)), 0) + logits


def _left_in_parts(
    merge: Callable[[Any, Any], Params], base: Any, params: Any, divided: Mapping[str, int]
) -> dict[str, int]:
    """Of what devices hold in parts, that which `merge` passes on as it is; a path is of one of both trees alone."""
    named = lambda tree: [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    traced, shapes = jax.make_jaxpr(merge, return_shape=True)(base, params)
    names = [*named(base), *named(params)]
    before = dict(zip(names, traced.jaxpr.invars, strict=True))
    after = dict(zip(named(shapes), traced.jaxpr.outvars, strict=True))
    kept = lambda name: after.get(name) is before[name] and names.count(name) == 1
    return {name: axis for name, axis in divided.items() if kept(name)}


def credit_of(micro: TrainBatch) -> Credit:
    """What the objective sees of a micro-batch."""
    return Credit(**{name: getattr(micro, name) for name in Credit._fields})


def wide_zeros(params: Any) -> Any:
    """Zeros to sum gradients in, f32 at least."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)


def _take(batch: TrainBatch, m: Array | int) -> TrainBatch:
    """Micro-batch m; the number of those in use has no axis to take it from."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, m, keepdims=False) if jnp.ndim(x) else x, batch)


def _check(batch: TrainBatch) -> None:
    missing = [name for name in ("mask", "advantage", "behaviour", "counted") if getattr(batch, name) is None]
    if missing:
        raise ValueError(f"a batch to learn from needs {', '.join(missing)}: make it with TrainBatch.credit")
