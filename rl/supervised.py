"""Supervised training of a language model on prompts and their solutions: the start from which reward can teach."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl.models.language import LanguageModel
from rl.rollout.score import score_row
from rl.types import pad

Examples = tuple[np.ndarray, np.ndarray, np.ndarray]


def examples(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], end: int) -> Examples:
    """(ids [N, L] i32 of prompt, completion and end token, lengths [N], prompt lengths [N]).

    Raises:
        ValueError: no rows, an empty prompt, or lists of different lengths.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"every example needs a prompt of at least one token; {len(prompts)} examples")
    ids, length = pad([[*prompt, *completion, end] for prompt, completion in zip(prompts, completions, strict=True)])
    return ids, length, np.fromiter(map(len, prompts), np.int32, len(prompts))


def loss(model: LanguageModel, params, ids: jax.Array, length: jax.Array, prompt_length: jax.Array) -> jax.Array:
    """Mean negative log-probability in nats of the tokens after each prompt, over all rows' tokens together."""
    logp, _ = jax.vmap(lambda ids, n: score_row(model, params, ids, n, block=ids.shape[0], fused=True))(ids, length)
    place = jnp.arange(ids.shape[1])
    mask = (place >= prompt_length[:, None]) & (place < length[:, None])
    return -jnp.sum(jnp.where(mask, logp, 0)) / jnp.sum(mask)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(model: LanguageModel, optimizer: optax.GradientTransformation, params, opt_state, batch):
    """One update; batch is a tuple of arrays of `examples`. Returns (params, opt_state, loss)."""
    value, gradient = jax.value_and_grad(functools.partial(loss, model))(params, *batch)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def fit(
    model: LanguageModel,
    params,
    data: Examples,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    report: Callable[[int, float], Any] = lambda step, loss: None,
):
    """Trains for a fixed number of steps with Adam, a cosine decay to zero and gradients clipped to norm 1.

    Args:
        data: from `examples`.
        steps, batch: every step sees `batch` rows, all rows once per epoch.
        report: called with (step, loss in nats) now and then.

    Returns:
        The parameters.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    params = jax.tree.map(jnp.array, params)  # a copy: the steps donate
    opt_state = optimizer.init(params)
    for i, rows in enumerate(_batches(len(data[0]), batch, steps, seed)):
        params, opt_state, value = step(model, optimizer, params, opt_state, tuple(x[rows] for x in data))
        if (i + 1) % max(1, steps // 10) == 0:
            report(i + 1, float(value))
    return params


def _batches(size: int, batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.Generator(np.random.PCG64([seed, size]))
    order = np.zeros(0, np.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(size)])
        yield order[:batch]
        order = order[batch:]
