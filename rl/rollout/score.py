"""Log-probabilities of given tokens under a language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels import token_logprob
from rl.models.language import LanguageModel, Params, head_of


def score(
    model: LanguageModel,
    params: Params,
    ids: Array,
    lengths: Array,
    *,
    temperature: float | Array = 1.0,
    block: int | None = None,
) -> tuple[Array, Array]:
    """Log-probability of each token given those before it, and the entropy of the distribution it was drawn from.

    Compiled once per model, shape and block. Ids and lengths are checked where they are concrete, not under `jit`.

    Args:
        model: see `rl.models.presets.make`.
        params: arrays.
        ids: [B, L] integers, row b a sequence of lengths[b] tokens; what follows is padding and is never read.
        lengths: [B], 1 to L.
        temperature: of the distribution, > 0; one number.
        block: positions, of all sequences together, whose logits exist at one time (at least one of each sequence). None: 64
            on a CPU, where they then stay in its cache, else 1024.

    Returns:
        (log-probabilities [B, L], entropies [B, L]) in nats, f32 (f64 for an f64 model). Position 0, which has nothing before
        it, and padding are exactly 0, with exactly zero gradient.

    Raises:
        ValueError: shapes that do not fit, a length below 1 or beyond L, an id outside the vocabulary, a bad temperature or
            block.
    """
    if np.ndim(ids) != 2 or np.shape(lengths) != np.shape(ids)[:1]:
        raise ValueError(f"score needs ids [B, L] and lengths [B]; got {np.shape(ids)} and {np.shape(lengths)}")
    if block is None:
        block = 64 if jax.default_backend() == "cpu" else 1024
    if block < 1:
        raise ValueError(f"block must be at least 1 position; got {block}")
    if not any(isinstance(x, jax.core.Tracer) for x in (ids, lengths)):
        _check(np.asarray(ids), np.asarray(lengths), model.config.vocab)
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    each = max(1, block // max(1, len(ids)))
    return _score(model, params, jnp.asarray(ids), jnp.asarray(lengths), temperature, each)


def score_row(
    model: LanguageModel,
    params: Params,
    ids: Array,
    length: Array | int,
    *,
    temperature: float | Array = 1.0,
    block: int = 128,
    fused: bool = False,
) -> tuple[Array, Array]:
    """`score` of one sequence, a pure function of params: what `vmap`, `jax.grad` and `eggroll.perturbed_call` take.

    Args:
        ids: [L].
        length: 1 to L, unchecked.
        block: positions whose logits exist at one time.
        fused: by a kernel, where there is one: not for perturbed parameters, which no kernel of a whole head takes.

    Returns:
        (log-probabilities [L], entropies [L]).
    """
    real = jnp.arange(len(ids)) < length
    ids = jnp.where(real, ids, 0)
    hidden, _ = model.forward(params, ids, None, 0, length)
    # masked before the head and after: a row without meaning may hold anything, and 0 * NaN in a gradient is NaN
    hidden = jnp.where(real[1:, None], hidden[:-1], 0)
    head = head_of(model, params) if fused else functools.partial(model.head, params)
    scores = token_logprob.log_prob(hidden, head, ids[1:], temperature=temperature, block=block)
    return jax.tree.map(lambda x: jnp.pad(jnp.where(real[1:], x, 0), (1, 0)), scores)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _score(model, params, ids, lengths, temperature, block):
    row = functools.partial(score_row, model, params, temperature=temperature, block=block, fused=True)
    return jax.vmap(row)(ids, lengths)


def _check(ids: np.ndarray, lengths: np.ndarray, vocab: int) -> None:
    for name, x in (("ids", ids), ("lengths", lengths)):
        if not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"{name} must be integers; got {x.dtype}")
    wrong = np.flatnonzero((lengths < 1) | (lengths > ids.shape[1]))
    if wrong.size:
        raise ValueError(
            f"lengths must be between 1 and {ids.shape[1]}, the columns of ids; got {lengths[wrong[0]]} in row {wrong[0]}"
            f" ({wrong.size} such rows)"
        )
    outside = ((ids < 0) | (ids >= vocab)) & (np.arange(ids.shape[1]) < lengths[:, None])
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"ids must be between 0 and {vocab - 1}, the model's vocabulary; got {ids[row, column]} at row {row}, position "
            f"{column} ({outside.sum()} such ids): is this the model's tokenizer?"
        )
