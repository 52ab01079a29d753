"""Policy gradients: see the package."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench import twins
from experiments.bench.harness import Row, row, timed_in_turn
from experiments.bench.language import naive_score
from rl import estimate as estimates
from rl import lora
from rl.data import packing
from rl.learners import gradient
from rl.learners.types import Answers
from rl.models.language import LanguageModel
from rl.models.presets import make, preset
from rl.objectives.presets import PRESETS
from rl.rollout.engine import Settings
from rl.rollout.generate import generate
from rl.types import Requests, Rollouts, Scored, TrainBatch

PARTS = ("rollout", "reward", "logp", "update")


class Work(NamedTuple):
    """A step's size: Q prompts of P tokens, G samples of L tokens each; ours packs micro-batches of so many tokens."""

    model: str = "stories260K"
    prompts: int = 8
    samples: int = 8
    prompt: int = 64
    completion: int = 128
    micro_batch: int = 384


class Side(NamedTuple):
    """One implementation of the step.

    Attributes:
        rollout: () -> samples, by the parameters of now; its `tokens` are an array [N, L].
        learn: (samples, reward [N]) -> arrays to wait for; the parameters step.
        logp: samples -> log-probabilities of the reference alone, which `learn` makes too.
        tokens: samples -> tokens on the host.
    """

    rollout: Callable[[], Any]
    learn: Callable[[Any, np.ndarray], Any]
    logp: Callable[[Any], Any]
    tokens: Callable[[Any], np.ndarray]


def reward(tokens: np.ndarray) -> np.ndarray:
    """f64 [N], the share of even tokens: costs both sides the same, next to nothing."""
    return (tokens % 2 == 0).mean(axis=1)


def sides(work: Work) -> dict[str, Side]:
    """Ours and the twins, from equal parameters and prompts."""
    config = preset(work.model)
    model = make(config)
    params = model.init(jax.random.key(0))
    shape = (work.prompts, work.prompt)
    prompts = np.random.default_rng(1).integers(1, config.vocab, shape).astype(np.int32)
    twin = functools.partial(_twin, config, params, prompts, work)
    return {
        "plain": twin(twins.plain_rollout, twins.plain_logp, twins.plain_gradient),
        "tuned": twin(twins.tuned_rollout, twins.tuned_scores, twins.tuned_gradient),
        "ours": _ours(model, params, prompts, work),
    }


def _twin(config, params, prompts, work: Work, rollout, logp, gradient) -> Side:
    scores = jax.jit(lambda params, ids: logp(config, params, ids, work.completion))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, batch):
        return twins.adam(gradient(config, state[0], batch, work.completion)[1], state)

    held, ids = {"state": twins.adam_state(params), "step": 0}, np.repeat(prompts, work.samples, axis=0)

    def sampled():
        held["step"] += 1
        key = jax.random.key(held["step"])
        return rollout(config, held["state"][0], prompts, key, work.samples, work.completion)

    whole = lambda samples: jnp.concatenate([ids, samples[0]], axis=1)

    def learn(samples, rewards):
        advantage = twins.group_advantage(jnp.asarray(rewards, jnp.float32), work.samples)
        batch = twins.Batch(whole(samples), advantage, scores(params, whole(samples)))
        held["state"] = update(held["state"], batch)
        return held["state"]

    return Side(sampled, learn, lambda samples: scores(params, whole(samples)), lambda samples: np.asarray(samples[0]))


def _ours(model: LanguageModel, params, prompts, work: Work) -> Side:
    grpo, rows = PRESETS["grpo"], work.prompts * work.samples
    shape = packing.shape(work.micro_batch, work.prompt, work.completion, per_row=1)
    learner = gradient.learner(
        model,
        optax.adam(twins.STEP),
        gradient.Settings(grpo.objective, grpo.advantage),
        shape,
        prompts,
        work.samples,
        0,
    )
    settings = Settings(slots=rows, length=work.prompt + work.completion, chunk=32, bucket=work.prompt)
    held, key = {"state": learner.init(params), "asked": 0}, jax.random.key(0)
    problem = np.arange(work.prompts, dtype=np.int32)
    scores = jax.jit(lambda params, batch: estimates.completion_scores(model, params, batch)[0])

    def sampled() -> Rollouts:
        uid = held["asked"] + np.arange(rows)
        held["asked"] += rows
        requests = Requests.make(np.repeat(prompts, work.samples, axis=0), work.completion, uid=uid)
        return generate(model, settings, learner.weights(held["state"])[0], requests, key)

    def learn(rollouts: Rollouts, rewards: np.ndarray):
        answers = Answers(problem, [""] * rows, rollouts, Scored(rewards, np.full(rows, "ok"), {}))
        held["state"], metrics = learner.learn(held["state"], answers, None)
        return held["state"], metrics

    logp = lambda rollouts: scores(params, packed(prompts, rollouts, shape, work.samples))
    return Side(sampled, learn, logp, lambda rollouts: rollouts.tokens)


def packed(prompts: np.ndarray, rollouts: Rollouts, shape: packing.Shape, samples: int) -> TrainBatch:
    """Rollouts of prompts of one length as micro-batches."""
    ids = np.repeat(prompts, samples, axis=0)
    lengths = np.full(len(ids), ids.shape[1], np.int32)
    return packing.micro_batches(ids, lengths, rollouts.tokens, rollouts.length, shape)


def grpo_step(repeats: int) -> Iterator[Row]:
    """Whole steps, then their parts on fixed samples, then the memory of scoring."""
    work, repeats = Work(), min(repeats, 7)
    built = sides(work)
    tokens = work.prompts * work.samples * work.completion
    setting = work._asdict() | {"method": "grpo", "kl": twins.KL}
    whole = timed_in_turn({name: functools.partial(_step, side) for name, side in built.items()}, repeats)
    rates = lambda seconds: {name: round(tokens / s) for name, s in seconds.items()}
    for twin in ("plain", "tuned"):
        pair = {name: whole[name] for name in (twin, "ours")}
        value = pair["ours"] / pair[twin]
        yield row(setting, f"ours_over_{twin}", value, pair, repeats, tokens_per_second=rates(pair))
    for part, seconds in _parts(built, repeats).items():
        value = seconds["ours"] / seconds["tuned"]
        yield row(
            setting | {"part": part}, "ours_over_tuned", value, seconds, repeats, tokens_per_second=rates(seconds)
        )
    yield from _memory(repeats)


def _step(side: Side):
    samples = side.rollout()
    return side.learn(samples, reward(side.tokens(samples)))


def _parts(built: dict[str, Side], repeats: int) -> dict[str, dict[str, float]]:
    """Part -> implementation -> median seconds. An update is what learning takes beyond the reference's log-probabilities."""
    fns = {}
    for name, side in built.items():
        samples = jax.block_until_ready(side.rollout())
        rewards = reward(side.tokens(samples))
        fns |= {
            (name, "rollout"): side.rollout,
            (name, "reward"): lambda side=side, samples=samples: reward(side.tokens(samples)),
            (name, "logp"): functools.partial(side.logp, samples),
            (name, "learn"): functools.partial(side.learn, samples, rewards),
        }
    seconds = timed_in_turn(fns, repeats)
    part = lambda name, part: (
        seconds[name, "learn"] - seconds[name, "logp"] if part == "update" else seconds[name, part]
    )
    return {p: {name: part(name, p) for name in built} for p in PARTS}


# -- memory ----------------------------------------------------------------------------------------------------------


def _memory(repeats: int, vocab: int = 32768) -> Iterator[Row]:
    """Temporary memory, as compiled, of log-probabilities and entropies under a usual vocabulary."""
    work = Work("tiny-transformer", prompts=2, samples=4)
    model = make(preset(work.model, vocab=vocab))
    programs, operands = scorers(model, work)
    compiled = {name: jax.jit(f).lower(*operands[name]).compile() for name, f in programs.items()}
    size = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
    calls = {name: functools.partial(program, *operands[name]) for name, program in compiled.items()}
    seconds = timed_in_turn(calls, repeats)
    setting = work._asdict() | {"vocab": vocab, "part": "logp"}
    yield row(setting, "full_over_ours_bytes", size["full"] / size["ours"], seconds, repeats, temporary_bytes=size)


def scorers(model: LanguageModel, work: Work) -> tuple[dict[str, Callable], dict[str, tuple]]:
    """Scoring of the same sequences from logits of all their tokens, and ours, with the arguments of each."""
    params, rng = model.init(jax.random.key(0)), np.random.default_rng(1)
    rows = work.prompts * work.samples
    prompts = rng.integers(1, model.config.vocab, (work.prompts, work.prompt)).astype(np.int32)
    rollouts = Rollouts.empty(np.full(rows, -1), work.completion)
    rollouts.tokens[:] = rng.integers(1, model.config.vocab, rollouts.tokens.shape)
    rollouts.length[:] = work.completion
    ids = np.concatenate([np.repeat(prompts, work.samples, axis=0), rollouts.tokens], axis=1)
    shape = packing.shape(work.micro_batch, work.prompt, work.completion, per_row=1)
    programs = {
        "full": functools.partial(naive_score, model),
        "ours": functools.partial(estimates.completion_scores, model),
    }
    batch = packed(prompts, rollouts, shape, work.samples)
    return programs, {"full": (params, ids, np.full(rows, ids.shape[1])), "ours": (params, batch)}


# -- adapters --------------------------------------------------------------------------------------------------------


def adapter(repeats: int, width: int = 256, layers: int = 8, rank: int = 8) -> Iterator[Row]:
    """One gradient: of adapters attached to the weights, of adapters merged into them, and of all parameters."""
    work = Work("tiny-transformer", prompts=2, samples=4, prompt=32, completion=96, micro_batch=512)
    config = preset(work.model, width=width, hidden=4 * width, head_dim=64, layers=layers, scan_layers=True)
    model, objective = make(config), PRESETS["dr_grpo"].objective
    params, batch = scorers(model, work)[1]["ours"]
    mask = np.ones((work.prompts * work.samples, work.completion), bool)
    batch = batch.credit(mask, np.ones(len(mask)), -np.ones(mask.shape, np.float32))
    gradient = lambda params, batch, **options: (
        estimates.estimate(model, params, batch, objective, **options)[0].gradient
    )
    of_adapter = lambda form: (
        lambda factors, base, batch: gradient(factors, batch, base=base, merge=functools.partial(form, alpha=16.0))
    )
    programs = {"attached": of_adapter(lora.attach), "merged": of_adapter(lora.merge), "full": gradient}
    factors = lora.init(params, rank, "layers/(attention|mlp)/.*kernel", jax.random.key(1))
    operands = dict.fromkeys(programs, (factors, params, batch)) | {"full": (params, batch)}
    compiled = {name: jax.jit(f).lower(*operands[name]).compile() for name, f in programs.items()}
    calls = {name: functools.partial(program, *operands[name]) for name, program in compiled.items()}
    seconds = timed_in_turn(calls, repeats)
    size = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
    setting = work._asdict() | {"width": width, "layers": layers, "rank": rank}
    for other in ("merged", "full"):
        pair = {name: seconds[name] for name in ("attached", other)}
        value = pair["attached"] / pair[other]
        yield row(setting, f"attached_over_{other}", value, pair, repeats, temporary_bytes={n: size[n] for n in pair})


CASES = {"grpo_step": grpo_step, "adapter": adapter}
