"""A model of one layer, made-up answers, and a step of GRPO written out: full logits, one sequence a row, optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl.data.packing import Shape
from rl.learners import gradient
from rl.learners.types import Answers
from rl.models.presets import make
from rl.models.transformer import TransformerConfig
from rl.types import LENGTH, STOPPED, Rollouts, Scored
from tests.rl.models.tiny import random_params

VOCAB, STOP, P, G, L, SEED = 11, 0, 4, 3, 5, 7
CONFIG = TransformerConfig(
    vocab=VOCAB, layers=1, width=16, hidden=24, heads=2, kv_heads=1, head_dim=8, max_length=32, scan_layers=False
)
MOE = TransformerConfig(
    vocab=VOCAB, layers=1, width=16, hidden=24, heads=2, kv_heads=1, head_dim=8, max_length=32, scan_layers=False,
    experts=4, experts_per_token=2, expert_hidden=12, normalise_experts=True,
)  # fmt: skip
PROMPTS = [[3, 1], [4, 1, 5], [9], [2, 6, 5, 3], [5, 8], [7]]
LONGEST = max(map(len, PROMPTS))
SHAPE = Shape(LONGEST + L, 2, 3, L)


@functools.cache
def start(config=CONFIG):
    """(model, seeded parameters)."""
    model = make(config)
    return model, random_params(model)


def optimizer(rate=0.5):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9))


@functools.cache
def made(settings, rate=0.5, config=CONFIG):
    """The learner, with a rate or a schedule; equal arguments share what was compiled."""
    return gradient.learner(start(config)[0], optimizer(rate), settings, SHAPE, PROMPTS, G, SEED, (STOP,))


def answers(seed=0, problem=(0, 1, 2, 3), params=None, spread=0.2, config=CONFIG, value=None, version=0, ok=True):
    """Random answers; their behaviour log-probabilities are the parameters' own, moved by noise of this spread."""
    rng = np.random.default_rng(seed)
    n = len(problem) * G
    length = rng.integers(1, L + 1, n).astype(np.int32)
    real = np.arange(L) < length[:, None]
    tokens = np.where(real, rng.integers(1, VOCAB, (n, L)), 0).astype(np.int32)
    ends = rng.random(n) < 0.5
    tokens[np.arange(n)[ends], length[ends] - 1] = STOP
    model, own = start(config)
    rows = np.repeat(problem, G)
    logp = np.asarray(scores(model, own if params is None else params, rows, tokens)[0])
    logp = np.where(real, logp + spread * rng.normal(size=logp.shape), 0).astype(np.float32)
    finish = np.where(ends, STOPPED, LENGTH).astype(np.int8)
    rollouts = Rollouts(
        tokens, length, logp, logp, np.full((n, L), version, np.int32), finish, np.full(n, -1, np.int32)
    )
    if value is None:
        value = rng.integers(0, 3, n) / 2
        value[::G], value[1::G] = 0, 1  # every group has a spread
    status = np.where(np.broadcast_to(ok, n), "ok", "timeout")
    value = np.where(status == "ok", np.broadcast_to(value, n), 0).astype(float)
    return Answers(np.array(problem, np.int32), [""] * n, rollouts, Scored(value, status, {}))


def sequences(rows, tokens):
    """i32 [N, T] of prompts and all L places of their answers, and [N, L] where the logits of each place are."""
    ids = np.zeros((len(rows), LONGEST + L), np.int32)
    at = np.zeros((len(rows), L), int)
    for i, row in enumerate(rows):
        ids[i, : len(PROMPTS[row]) + L] = [*PROMPTS[row], *tokens[i]]
        at[i] = len(PROMPTS[row]) - 1 + np.arange(L)
    return ids, at


def scores(model, params, rows, tokens, experts=None):
    """(log-probabilities [N, L], entropies [N, L], sum of squared probabilities [N, L]); masked entries mean nothing.

    experts: [N, layers, T, k] of whole sequences.
    """
    return _scores(model, params, *sequences(rows, tokens), tokens, experts)


def routed(model, params, rows, tokens):
    """[N, layers, T, k]: the experts of whole sequences that these parameters choose."""
    return np.asarray(_routed(model, params, sequences(rows, tokens)[0]))


@functools.partial(jax.jit, static_argnums=0)
def _routed(model, params, ids):
    return jax.vmap(lambda row: model.routed(params, row)[2])(ids)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, params, ids, at, tokens, experts):
    def one(row, forced):
        kwargs = {} if forced is None else {"experts": forced}
        return model.head(params, model.forward(params, row, **kwargs)[0])

    table = jax.nn.log_softmax(jax.vmap(one, (0, None if experts is None else 0))(ids, experts))
    table = jnp.take_along_axis(table, at[..., None], axis=1)
    logp = jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]
    return logp, -jnp.sum(jnp.exp(table) * table, axis=-1), jnp.exp(2 * table).sum(axis=-1)


def plain_grpo(model, params, batch, tx, opt_state, *, reference, kl, parts, experts=None, old=None, merge=lambda p: p):
    """GRPO of the paper over these parts (lists of groups), one update each; `old` are the log-probs at the start of the step.

    Returns:
        (params, optimizer state, [(objective, kl, clipped share)] of every update).
    """
    value = batch.scored.value.reshape(-1, G)
    advantage = ((value - value.mean(1, keepdims=True)) / (value.std(1, ddof=1, keepdims=True) + 1e-6)).reshape(-1)
    rows, tokens, length = np.repeat(batch.problem, G), batch.rollouts.tokens, batch.rollouts.length
    old = scores(model, merge(params), rows, tokens, experts)[0] if old is None else old
    anchor = scores(model, merge(reference), rows, tokens)[0]

    ids, at = sequences(rows, tokens)
    batch_of = lambda some: jax.tree.map(lambda x: x[some], (ids, at, tokens, advantage, length, old, anchor, experts))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, data):
        ids, at, tokens, advantage, length, old, anchor, experts = data
        logp = _scores(model, merge(params), ids, at, tokens, experts)[0]
        mask = jnp.arange(L) < length[:, None]
        a, r, d = advantage[:, None], jnp.exp(logp - old), anchor - logp
        j = jnp.minimum(r * a, jnp.clip(r, 0.8, 1.2) * a)
        mean = lambda x: (jnp.where(mask, x, 0).sum(1) / length).mean()
        token = lambda x: jnp.where(mask, x, 0).sum() / mask.sum()
        k3 = jnp.minimum(jnp.exp(d) - d - 1, 10)  # verl's guard
        clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
        return -mean(j) + kl * mean(k3), (mean(j), token(k3), token(clipped))

    measured = []
    for part in parts:
        some = (np.asarray(part)[:, None] * G + np.arange(G)).reshape(-1)
        (_, parts_of), gradient = loss(params, batch_of(some))
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        measured.append(tuple(map(float, parts_of)))
    return params, opt_state, measured
