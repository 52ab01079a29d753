"""Small batches of completions with credit, for tests of what learns from them."""

import functools

import numpy as np

from rl.data.packing import Shape, micro_batches
from tests.rl.models.tiny import VOCAB

PROMPT, LONGEST, N = 5, 7, 9
SHAPE = Shape(PROMPT + LONGEST, 2, 3, LONGEST)


@functools.cache
def rows(seed=0):
    """name -> [N, ...]: completions of 0 to L tokens, masks with holes, and log-probabilities near those of no model."""
    rng = np.random.default_rng(seed)
    length = np.r_[LONGEST, 1, 0, rng.integers(2, LONGEST, N - 3)].astype(np.int32)
    real = np.arange(LONGEST) < length[:, None]
    real32 = lambda x: x.astype(np.float32)  # as a batch holds it, so that f64 results can agree to f64 digits
    logp = lambda: real32(-3.1 + 0.4 * rng.normal(size=(N, LONGEST)))
    return {
        "prompt": rng.integers(0, VOCAB, (N, PROMPT)).astype(np.int32),
        "prompt_length": rng.integers(1, PROMPT + 1, N).astype(np.int32),
        "tokens": np.where(real, rng.integers(0, VOCAB, (N, LONGEST)), -5).astype(np.int32),
        "length": length,
        "mask": real & (rng.random((N, LONGEST)) < 0.9),
        "advantage": real32(rng.normal(size=N)),
        "behaviour": logp(),
        "reference": logp(),
        "proximal": logp(),
    }


def made(shape=SHAPE, order=None, seed=0, **changes):
    """A `TrainBatch` of those rows in an order; `changes` replace credit, None removes it."""
    order = np.arange(N) if order is None else order
    data = {name: x[order] for name, x in rows(seed).items()}
    tokens = [data.pop(name) for name in ("prompt", "prompt_length", "tokens", "length")]
    data |= changes
    return micro_batches(*tokens, shape).credit(**{name: x for name, x in data.items() if x is not None})
