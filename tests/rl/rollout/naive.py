"""The sampler that the engine must equal: whole forward passes without a cache, one token at a time, drawn in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rl.types import ABORTED, LENGTH, STOPPED


def probabilities(logits, sampling):
    """f64 [V], what is drawn from; temperature above 0."""
    z = np.asarray(logits, np.float64) / sampling.temperature
    p = np.exp(z - z.max())
    order = np.argsort(-p, kind="stable")
    if 0 < sampling.top_k < len(p):
        p = np.where(p < p[order[sampling.top_k - 1]], 0, p)
    p = p / p.sum()
    if sampling.top_p < 1:
        reached, last = 0.0, 0.0
        for token in order:
            if reached >= sampling.top_p:
                break
            reached, last = reached + p[token], p[token]
        p = np.where(p < last, 0, p)
    p = np.where(p < sampling.min_p * p.max() * (1 - 1e-7), 0, p)
    return p / p.sum()


def sample(logits, u, sampling):
    """(token, logp, logp_full) of one row."""
    z = np.asarray(logits, np.float64)
    full = z - z.max()
    full = full - np.log(np.exp(full).sum())
    if sampling.temperature == 0:
        token = int(np.argmax(z))
        return token, 0.0, full[token]
    p = probabilities(logits, sampling)
    token = min(int(np.searchsorted(np.cumsum(p), float(u), side="right")), np.flatnonzero(p)[-1])
    return token, np.log(p[token]), full[token]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids, last):
    row = lambda ids, last: model.head(params, model.forward(params, ids)[0][last])
    return jax.vmap(row)(ids, last)


@functools.partial(jax.jit, static_argnums=2)
def _uniforms(key, uid, length):
    one = lambda uid, at: jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, uid), at))
    return jax.vmap(lambda uid: jax.vmap(lambda at: one(uid, at))(jnp.arange(length)))(uid)


def generate(model, params, requests, key, settings, steps=None):
    """What the engine must return for rows with one set of parameters.

    Returns:
        (tokens, logp, logp_full: lists of one array per row; finish: i8 [N]); at most `steps` tokens a row.
    """
    n, length = len(requests), settings.length
    ids = np.zeros((n, length), np.int32)
    ids[:, : requests.prompt.shape[1]] = requests.prompt[:, :length]
    position, out = requests.prompt_length.copy(), [[] for _ in range(n)]
    finish = np.full(n, ABORTED, np.int8)
    u = ((np.asarray(_uniforms(key, jnp.asarray(requests.uid), length)) >> 9) + 0.5) / 2**23
    for _ in range(length if steps is None else steps):
        if (finish != ABORTED).all():
            break
        logits = np.asarray(_logits(model, params, jnp.asarray(ids), jnp.asarray(position - 1)))
        for row in np.flatnonzero(finish == ABORTED):
            drawn = sample(logits[row], u[row, min(position[row], length - 1)], settings.sampling)
            out[row].append(drawn)
            if position[row] < length:
                ids[row, position[row]] = drawn[0]
            position[row] += 1
            if drawn[0] in settings.stop:
                finish[row] = STOPPED
            elif len(out[row]) == requests.budget[row]:
                finish[row] = LENGTH
    columns = lambda i, dtype: [np.array([entry[i] for entry in row], dtype) for row in out]
    return columns(0, np.int32), columns(1, np.float64), columns(2, np.float64), finish
