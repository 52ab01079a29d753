"""Language models: see the package."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from experiments.bench.harness import Row, row, timed_in_turn
from rl.models.language import LanguageModel
from rl.models.presets import make, preset
from rl.rollout import engine
from rl.rollout.engine import Settings
from rl.rollout.generate import generate
from rl.rollout.sampling import Sampling, sample, uniforms
from rl.rollout.score import score as blocked_score
from rl.types import Requests


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


# -- decode ----------------------------------------------------------------------------------------------------------

PROMPT, COMPLETION = 64, 128


@functools.partial(jax.jit, static_argnums=(0, 4))
def plain_decode(model: LanguageModel, params, prompts: jax.Array, key: jax.Array, room: int, steps: jax.Array):
    """A batch without an engine: prefill, then `steps` tokens for every row. Returns tokens and log-probs [room, B]."""
    batch, length = prompts.shape
    caches = jax.vmap(lambda _: model.empty(length + room))(jnp.arange(batch))
    _, caches = jax.vmap(lambda ids, cache: model.forward(params, ids, cache, 0, length - 1))(prompts, caches)
    u = uniforms(key, jnp.arange(batch, dtype=jnp.uint32), length + jnp.arange(room)[:, None])

    def one(token, cache, position):
        hidden, cache = model.forward(params, token[None], cache, position, 1)
        return model.head(params, hidden)[0], cache

    def step(i, carry):
        caches, token, out = carry
        logits, caches = jax.vmap(one, (0, 0, None))(token, caches, length - 1 + i)
        drawn = sample(logits, u[i], Sampling())
        return caches, drawn.token, jax.tree.map(lambda old, new: old.at[i].set(new), out, (drawn.token, drawn.logp))

    out = (jnp.zeros((room, batch), jnp.int32), jnp.zeros((room, batch), jnp.float32))
    return jax.lax.fori_loop(0, steps, step, (caches, prompts[:, -1], out))[2]


def long_tailed_lengths(count: int, median: float, longest: int, seed: int = 0) -> np.ndarray:
    """exp(log median + 0.5 z_group + 0.6 z_sample), cut to 1 .. longest; groups of 8 (samples of one prompt)."""
    rng = np.random.default_rng(seed)
    group, each = np.repeat(rng.normal(size=-(-count // 8)), 8)[:count], rng.normal(size=count)
    return np.clip(np.exp(np.log(median) + 0.5 * group + 0.6 * each), 1, longest).astype(np.int32)


def decode(repeats: int) -> Iterator[Row]:
    """The engine against a plain loop at equal lengths, against static batches on long-tailed ones, and under a population."""
    model = make(preset("stories260K"))
    params = model.init(jax.random.key(0))
    yield from _equal_lengths(model, params, repeats)
    for slots in (16, 32):
        yield _long_tailed(model, params, slots, repeats)


def _prompts(model: LanguageModel, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, model.config.vocab, (rows, length)).astype(np.int32)


def _equal_lengths(model: LanguageModel, params, repeats: int) -> Iterator[Row]:
    slots, key = 64, jax.random.key(2)
    settings = Settings(slots=slots, length=PROMPT + COMPLETION, chunk=32, bucket=PROMPT)
    prompts = _prompts(model, slots, PROMPT)
    es = eggroll.strategy(optax.sgd(1.0), population=eggroll.crossed(slots), sigma=0.01, rules=model.rules)
    drawn = jax.jit(es.draw)(es.init(params, jax.random.key(3)))
    mean = Requests.make(prompts.tolist(), COMPLETION)
    members = Requests.make(prompts.tolist(), COMPLETION, member=np.arange(slots))
    fns = {
        "plain": lambda: plain_decode(model, params, prompts, key, COMPLETION, jnp.int32(COMPLETION)),
        "engine": lambda: generate(model, settings, params, mean, key).tokens,
        "population": lambda: generate(model, settings, drawn, members, key).tokens,
    }
    seconds = timed_in_turn(fns, repeats)
    rates = {name: round(slots * COMPLETION / s) for name, s in seconds.items()}
    setting = {"model": "stories260K", "slots": slots, "prompt": PROMPT, "completion": COMPLETION, "lengths": "equal"}
    compared = (("engine_over_plain", "plain", "engine"), ("population_over_engine", "engine", "population"))
    for measure, base, other in compared:
        more = {"design": "crossed", "members": slots, "rank": 1} if other == "population" else {}
        pair = {name: seconds[name] for name in (base, other)}
        yield row(setting | more, measure, pair[base] / pair[other], pair, repeats, tokens_per_second=rates)


def _long_tailed(model: LanguageModel, params, slots: int, repeats: int) -> Row:
    count, median, prompt, key = 256, 28, 16, jax.random.key(2)
    prompts, lengths = _prompts(model, count, prompt), long_tailed_lengths(count, median, COMPLETION)
    settings = Settings(slots=slots, length=prompt + COMPLETION, chunk=8, bucket=prompt, tail=4)
    requests = Requests.make(prompts.tolist(), lengths)
    batches = [(prompts[i : i + slots], lengths[i : i + slots].max()) for i in range(0, count, slots)]
    fns = {
        "static": lambda: [plain_decode(model, params, p, key, COMPLETION, jnp.int32(n)) for p, n in batches],
        "engine": lambda: generate(model, settings, params, requests, key).tokens,
    }
    seconds = timed_in_turn(fns, repeats)
    setting = {"model": "stories260K", "slots": slots, "prompt": prompt, "requests": count, "lengths": "long-tailed"}
    setting |= {"mean_length": round(float(lengths.mean()), 1), "longest": int(lengths.max())}
    rates = {name: round(int(lengths.sum()) / s) for name, s in seconds.items()}
    value = seconds["static"] / seconds["engine"]
    return row(setting, "engine_over_static", value, seconds, repeats, tokens_per_second=rates)


# -- roofline --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def plain_steps(model: LanguageModel, params, caches, token: jax.Array, position: jax.Array, u: jax.Array, steps: int):
    """`steps` decode steps of a batch at one position, without an engine. Returns caches and the newest tokens [B]."""

    def one(token, cache, position):
        hidden, cache = model.forward(params, token[None], cache, position, 1)
        return model.head(params, hidden)[0], cache

    def step(i, carry):
        caches, token = carry
        logits, caches = jax.vmap(one, (0, 0, None))(token, caches, position + i)
        return caches, sample(logits, u[i], Sampling()).token

    return jax.lax.fori_loop(0, steps, step, (caches, token))


def roofline(repeats: int) -> Iterator[Row]:
    """Tokens per second of the engine at full slots against what reading weights and caches once a step would allow.

    tok/s <= b BW / (weights + b ctx kv bytes), BW the rate at which this device sums 512 MiB of f32, measured in the same run.
    """
    model, steps = make(preset("stories260K")), 32
    params = model.init(jax.random.key(0))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    kv_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: model.empty(1))))
    block = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    for context in (512, 4096):
        for slots in (1, 8, 64):
            fns = _full_slots(model, params, slots, context, steps) | {"bandwidth": lambda: total(block)}
            seconds = timed_in_turn(fns, min(repeats, 9))
            bandwidth = block.size * 4 / seconds["bandwidth"]
            bound = slots * bandwidth / (weights + slots * context * kv_bytes)
            rates = {name: round(slots * steps / seconds[name]) for name in ("engine", "static")}
            setting = {"model": "stories260K", "slots": slots, "context": context, "steps": steps}
            yield row(
                setting, "engine_over_roofline", rates["engine"] / bound, seconds, repeats,
                tokens_per_second=rates | {"roofline": round(bound)}, gigabytes_per_second=round(bandwidth / 1e9, 2),
            )  # fmt: skip


def _full_slots(model: LanguageModel, params, slots: int, context: int, steps: int) -> dict[str, Callable[[], Any]]:
    """The engine and a plain loop, each writing the last `steps` tokens of `context` in every slot, again and again."""
    settings = Settings(slots=slots, length=context + 1, chunk=steps, view=0)
    start, key = jnp.full(slots, context - steps, jnp.int32), jax.random.key(1)
    held = {"engine": engine.init(model, settings), "static": engine.init(model, settings).cache}
    u = uniforms(key, jnp.arange(slots, dtype=jnp.uint32), context - steps + jnp.arange(steps)[:, None])
    token = jnp.ones(slots, jnp.int32)

    def with_engine():
        full = held["engine"]._replace(
            position=jnp.array(start), limit=start + 2 * steps, active=jnp.ones(slots, bool), token=jnp.array(token)
        )
        held["engine"], chunk = engine.decode(model, settings, settings.length, params, full, key, jnp.int32(slots + 1))
        return chunk.tokens

    def static():
        held["static"], out = plain_steps(model, params, held["static"], token, start[0], u, steps)
        return out

    return {"engine": with_engine, "static": static}


CASES = {case.__name__: case for case in (score, decode, roofline)}
