"""Language models: see the package."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.harness import Row, row, timed_in_turn
from rl.models.language import LanguageModel
from rl.models.presets import make, preset
from rl.rollout.score import score as blocked_score


def _score_settings() -> Iterator[tuple[dict[str, Any], LanguageModel, int, int]]:
    """(setting, model, sequences, tokens of each): a small vocabulary, where nothing is to be won, and a usual one."""
    for name, vocab in (("stories260K", 512), ("tiny-transformer", 32768)):
        config = preset(name, vocab=vocab)
        setting = {"model": name, "vocab": vocab, "width": config.width, "sequences": 8, "tokens": 512}
        yield setting, make(config), 8, 512


def naive_score(model: LanguageModel, params, ids, lengths):
    """What `rl.rollout.score.score` returns, from logits of the whole batch."""

    def one(ids, length):
        logp = jax.nn.log_softmax(model.head(params, model.forward(params, ids, None, 0, length)[0][:-1]))
        entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
        real = jnp.arange(1, len(ids)) < length
        both = jnp.take_along_axis(logp, ids[1:, None], -1)[:, 0], entropy
        return jax.tree.map(lambda x: jnp.pad(jnp.where(real, x, 0), (1, 0)), both)

    return jax.vmap(one)(ids, lengths)


def score(repeats: int) -> Iterator[Row]:
    """Log-probabilities of given tokens: blocks of positions against logits of all of them."""
    for setting, model, sequences, tokens in _score_settings():
        params = model.init(jax.random.key(0))
        ids = jax.random.randint(jax.random.key(1), (sequences, tokens), 0, model.config.vocab)
        operands = (params, ids, jnp.full(sequences, tokens))
        for gradient in (False, True):
            programs = {
                name: _program(scorer, gradient, model).lower(*operands).compile()
                for name, scorer in (("naive", naive_score), ("blocked", blocked_score))
            }
            calls = {name: functools.partial(program, *operands) for name, program in programs.items()}
            seconds = timed_in_turn(calls, repeats)
            yield row(
                setting | {"gradient": gradient},
                "naive_over_blocked",
                seconds["naive"] / seconds["blocked"],
                seconds,
                repeats,
                tokens_per_second={name: round(sequences * tokens / s) for name, s in seconds.items()},
                temporary_bytes={name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()},
            )


def _program(scorer: Callable, gradient: bool, model: LanguageModel):
    def scores(params, ids, lengths):
        return scorer(model, params, ids, lengths)

    def total(params, ids, lengths):
        both = scores(params, ids, lengths)
        return both[0].sum() + both[1].sum(), both

    return jax.jit(jax.grad(total, has_aux=True) if gradient else scores)


CASES = {case.__name__: case for case in (score,)}
