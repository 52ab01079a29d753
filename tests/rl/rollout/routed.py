"""A mixture of experts whose engine records, and the experts that whole forward passes choose."""

import dataclasses
import functools

import jax
import numpy as np

from rl.models.presets import make
from rl.rollout.engine import Settings
from rl.rollout.generate import generate
from rl.types import Requests
from tests.rl.models.tiny import MIXED, SHAPES, VOCAB, random_params

T = 32
KEY = jax.random.key(5)
KINDS = {
    "scanned": dataclasses.replace(SHAPES["moe"], scan_layers=True),
    "one dense layer": MIXED,
    "dense": dataclasses.replace(SHAPES["llama"], layers=1),
}
SETTINGS = Settings(slots=3, length=T, stop=(3, 7), chunk=4, bucket=T, view=0, prefill_chunk=8, record_experts=True)
PROMPTS, BUDGETS = (9, 1, 31, 2, 17, 5, 8, 10), (20, 31, 1, 1, 15, 25, 12, 9)


@functools.cache
def prepared(name="scanned"):
    model = make(KINDS[name])
    return model, random_params(model, 0.7)


def asked(rows=slice(None)):
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in PROMPTS]
    return Requests.make(prompts, np.array(BUDGETS)).take(np.arange(len(PROMPTS))[rows])


def run(requests=None, between=None, name="scanned", params=None, **changes):
    model, own = prepared(name)
    settings = dataclasses.replace(SETTINGS, **changes)
    requests = asked() if requests is None else requests
    return generate(model, settings, own if params is None else params, requests, KEY, version=1, between=between)


@functools.cache
def whole():
    return run()


@functools.cache
def _reference(model):
    return jax.jit(lambda params, ids, count: model.routed(params, ids, None, 0, count)[2])


def expected(requests, rollouts, params=None, name="scanned", newest=False):
    """One row and one token at a time, from a pass over the row's whole sequence; with `newest`, the last token's too."""
    model, own = prepared(name)
    columns, longest = requests.prompt.shape[1], rollouts.tokens.shape[1]
    out = np.full((len(requests), columns + longest, model.config.layers, 2), -1, np.int8)
    for row, (n, m) in enumerate(zip(requests.prompt_length, rollouts.length, strict=True)):
        ids = np.zeros(2 * T, np.int32)
        ids[: n + m] = [*requests.prompt[row, :n], *rollouts.tokens[row, :m]]
        chosen = np.asarray(_reference(model)(own if params is None else params, ids, n + m))
        for position in range(n + m - (not newest)):
            out[row, position if position < n else columns + position - n] = chosen[:, position]
    return out
