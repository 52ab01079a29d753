"""The estimate from packed rows against a loss written out by hand, and everything that must not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import estimate as estimates
from rl.data.packing import Shape
from rl.models.presets import make, preset
from rl.objectives import vcpo
from rl.objectives.policy_gradient import Objective
from rl.objectives.weights import Weight
from tests.rl.batches import LONGEST, PROMPT, SHAPE, N, made, rows
from tests.rl.models.tiny import close, prepared, trees_close

CLIP = Objective(low=0.2, high=0.3, kl=0.1, kl_estimator="k2", entropy=0.05)
ON_POLICY = {"proximal": None, "reference": None}
SHAPES = [Shape(12, 1, 1, LONGEST), Shape(12, 2, 3, LONGEST), Shape(40, 1, 8, LONGEST), Shape(16, 4, 2, LONGEST + 4)]


@functools.cache
def estimator(model, objective, temperature=0.8):
    run = lambda params, batch: estimates.estimate(model, params, batch, objective, temperature=temperature, block=8)
    return jax.jit(run)


def alone(model, params, temperature=0.8):
    """(log-probabilities, entropies) of completion tokens, [N, L], from all logits of each sequence in a row of its own."""
    data = rows()
    columns = np.arange(PROMPT + LONGEST)
    shifted = np.clip(columns - data["prompt_length"][:, None], 0, LONGEST - 1)
    own = np.take_along_axis(data["tokens"], shifted, axis=1)
    before = np.pad(data["prompt"], ((0, 0), (0, LONGEST)))
    ids = np.where(columns < data["prompt_length"][:, None], before, np.maximum(own, 0))
    logits = jax.vmap(lambda row: model.head(params, model.forward(params, row)[0]))(ids)
    table = jax.nn.log_softmax(logits / temperature)
    at = np.minimum(data["prompt_length"][:, None] + np.arange(LONGEST), len(columns) - 1)
    real = np.arange(LONGEST) < data["length"][:, None]
    table = table[np.arange(N)[:, None], at - 1]
    logp = jnp.take_along_axis(table, np.take_along_axis(ids, at, axis=1)[..., None], axis=-1)[..., 0]
    return jnp.where(real, logp, 0), jnp.where(real, -jnp.sum(jnp.exp(table) * table, axis=-1), 0)


def written_out(model, params):
    """CLIP's loss of all sequences, one token mean, in as many words."""
    data = {name: jnp.asarray(x) for name, x in rows().items()}
    logp, entropy = alone(model, params)
    advantage = data["advantage"][:, None]
    ratio = jnp.exp(logp - data["proximal"])
    clipped = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.3) * advantage)
    k2 = (data["reference"] - logp) ** 2 / 2
    total = jnp.where(data["mask"], clipped - 0.1 * k2 + 0.05 * entropy, 0)
    return -jnp.sum(total) / jnp.sum(data["mask"])


def doubled(name):
    """The model in f64; credit stays f32."""
    return prepared(name, dtype="float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "moe", "rwkv7"])
def test_equals_the_loss_written_out_with_full_logits(name):
    with jax.enable_x64(True):
        model, params, _ = doubled(name)
        expected = jax.jit(jax.grad(functools.partial(written_out, model)))(params)
        got, sample = estimator(model, CLIP)(params, made())
        assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 0.05
        trees_close(got.gradient, expected, 1e-10)
        logp, entropy = jax.jit(functools.partial(alone, model))(params)
        scores = estimates.completion_scores(model, params, made(), temperature=0.8)
        data, batch = rows(), made()
        close(batch.gathered(np.asarray(scores[0])), logp, 1e-12)
        close(batch.gathered(np.asarray(scores[1])), entropy, 1e-12)
        weight = np.where(data["mask"], np.asarray(logp) - data["behaviour"], 0).sum(axis=1)
        close(batch.gathered(np.asarray(sample.log_weight)), weight, 1e-10)
        mean = lambda x: np.where(data["mask"], x, 0).sum() / data["mask"].sum()
        for metric, x in (("entropy", entropy), ("kl_behaviour", data["behaviour"] - logp)):
            close(got.metrics[metric][0] / got.metrics[metric][1], mean(np.asarray(x)), 1e-6)
        gap = np.abs(data["proximal"] - data["behaviour"])[data["mask"]].max()
        close(sample.maxima["sampler_gap"], gap, 1e-6)


OBJECTIVES = {
    "token": CLIP,
    "sequence": Objective(ratio="sequence", low=0.01, high=0.02, aggregation="sequence_mean"),
    "score": Objective(shape="score", weight=Weight("policy", "sequence", cap=8.0), aggregation="constant", longest=20),
}
SPLITS = [*(("token", shape) for shape in SHAPES), ("sequence", SHAPES[1]), ("score", SHAPES[3])]


@pytest.mark.parametrize(
    ("objective", "shape"), SPLITS, ids=[f"{name}-{shape.rows}x{shape.capacity}" for name, shape in SPLITS]
)
def test_packing_splitting_and_order_change_nothing(objective, shape):
    objective = OBJECTIVES[objective]
    with jax.enable_x64(True):
        model, params, _ = doubled("qwen3")
        expected, first = estimator(model, objective)(params, made())
        order = np.random.default_rng(shape.capacity).permutation(N)
        batch = made(shape, order)
        got, sample = estimator(model, objective)(params, batch)
        trees_close(got.gradient, expected.gradient, 1e-10)
        back = np.empty(N)
        back[order] = batch.gathered(np.asarray(sample.log_weight))
        close(back, made().gathered(np.asarray(first.log_weight)), 1e-10)
        for name, (total, count) in expected.metrics.items():
            np.testing.assert_allclose(np.asarray(got.metrics[name]), [total, count], rtol=1e-5, atol=1e-5)
        assert max(np.abs(x).max() for x in jax.tree.leaves(expected.gradient)) > 1e-3


def test_it_is_not_a_mean_of_means():
    """Token means of micro-batches average to another number than the token mean: the split would show."""
    with jax.enable_x64(True):
        model, params, _ = doubled("qwen3")
        whole = estimator(model, CLIP)(params, made())[0].gradient
        batch = made()
        parts = []
        for m in range(int(batch.used)):
            one = jax.tree.map(lambda x, m=m: x[m : m + 1] if np.ndim(x) else np.int32(1), batch)
            parts.append(estimator(model, CLIP)(params, one)[0].gradient)
        mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *parts)
        assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (mean, whole)), strict=True)) > 1e-4


@pytest.mark.slow
def test_masked_tokens_leave_no_trace_whatever_their_credit():
    model, params, _ = prepared("qwen3")
    run, data = estimator(model, CLIP), rows()
    expected, _ = run(params, made())
    hostile = {k: np.where(data["mask"], data[k], np.nan) for k in ("behaviour", "proximal", "reference")}
    hostile["advantage"] = np.where(data["mask"], data["advantage"][:, None], np.inf)
    got, _ = run(params, made(**hostile))
    jax.tree.map(np.testing.assert_array_equal, (got.gradient, got.metrics), (expected.gradient, expected.metrics))
    # nothing counts: exactly nothing
    for changes in ({"mask": np.zeros((N, LONGEST), bool)}, {"counted": np.zeros(N, bool)}):
        nothing, sample = run(params, made(**changes))
        assert all((x == 0).all() for x in jax.tree.leaves((nothing.gradient, nothing.metrics, sample)))
    # a masked sequence is as if it had not been sampled, but for the mean over sequences
    keep = np.arange(N) != 4
    got, _ = run(params, made(mask=data["mask"] & keep[:, None]))
    fewer, _ = run(params, made(order=np.flatnonzero(keep)))
    trees_close(got.gradient, fewer.gradient, 1e-6)


def test_what_the_model_leaves_in_padding_does_not_matter():
    model, params, _ = prepared("qwen3")

    def poisoned(params, ids, *, segments):
        hidden, cache = model.forward(params, ids, segments=segments)
        return jnp.where(segments[:, None] >= 0, hidden, jnp.nan), cache

    broken = model._replace(forward=poisoned)
    trees_close(
        estimator(broken, CLIP)(params, made())[0].gradient, estimator(model, CLIP)(params, made())[0].gradient, 1e-6
    )
    ids, segments = (getattr(made(), name).copy() for name in ("ids", "segments"))
    ids[segments < 0] = 2**31 - 1
    got = estimator(model, CLIP)(params, dataclasses.replace(made(), ids=ids))[0].gradient
    jax.tree.map(np.testing.assert_array_equal, got, estimator(model, CLIP)(params, made())[0].gradient)


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["qwen3", "rwkv7"])
def test_the_first_update_on_policy_has_ratio_one_and_kl_zero(name):
    model, params, _ = prepared(name)
    score = jax.jit(functools.partial(estimates.completion_scores, model, temperature=0.8, block=8))
    logp = made().gathered(np.asarray(score(params, made())[0]))
    batch = made(behaviour=logp, proximal=None, reference=logp)
    got, sample = estimator(model, CLIP)(params, batch)
    tokens = rows()["mask"].sum()
    assert got.metrics["ratio"] == (tokens, tokens) and sample.maxima["ratio"] == 1
    assert got.metrics["clip_fraction"][0] == 0
    for metric in ("kl_behaviour", "kl_reference", "sampler_gap"):
        assert got.metrics[metric] == (0, tokens), metric
    assert (sample.log_weight == 0).all() and sample.maxima["sampler_gap"] == 0
    assert (
        got.step_scale == 1 and vcpo.step_scale(sample.log_weight.reshape(-1), counted=batch.counted.reshape(-1)) == 1
    )


def test_bf16_weights_have_f32_gradients():
    half, rounded, _ = prepared("qwen3", dtype="bfloat16")
    model = prepared("qwen3")[0]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    got, expected = estimator(half, CLIP)(rounded, made())[0].gradient, estimator(model, CLIP)(wide, made())[0].gradient
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    a, b = flat(got), flat(expected)
    assert 1e-5 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


@pytest.mark.slow
def test_forced_experts_are_used():
    model, params, _ = prepared("moe")
    length = rows()["prompt"].shape[1] + LONGEST
    experts = (
        np.random.default_rng(0).permuted(np.tile(np.arange(5), (N, length, 2, 1)), axis=-1)[..., :2].astype(np.int8)
    )
    data = rows()
    from rl.data.packing import micro_batches

    batch = micro_batches(*(data[k] for k in ("prompt", "prompt_length", "tokens", "length")), SHAPE, experts=experts)
    score = jax.jit(functools.partial(estimates.completion_scores, model))
    logp = batch.gathered(np.asarray(score(params, batch)[0]))
    free = batch.gathered(np.asarray(score(params, made())[0]))
    i = 5
    p, n = data["prompt_length"][i], data["length"][i]
    ids = jnp.asarray(np.r_[data["prompt"][i, :p], data["tokens"][i, :n]])
    own = np.concatenate([experts[i, :p], experts[i, 5 : 5 + n]]).transpose(1, 0, 2)
    table = jax.nn.log_softmax(model.head(params, model.forward(params, ids, experts=jnp.asarray(own))[0]))
    close(logp[i, :n], table[np.arange(p - 1, p + n - 1), ids[p:]])
    assert np.abs(logp - free).max() > 0.01


@pytest.mark.optimised
def test_no_logits_of_a_whole_row_exist_and_a_micro_batch_is_all_the_memory():
    model = make(preset("tiny-transformer", vocab=1009, layers=1))
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = Shape(12, 5, 2, LONGEST)
    run = jax.jit(lambda params, batch: estimates.estimate(model, params, batch, CLIP, block=20))
    lowered = run.lower(params, made(shape, np.arange(90) % N))
    text = lowered.as_text()
    assert "20x1009xf32" in text and not any(f"{k}x1009x" in text for k in (59, 60, 70, 12, 7))
    needed = lowered.compile().memory_analysis().temp_size_in_bytes
    one, four = (estimates.activation_bytes(model, params, CLIP, dataclasses.replace(shape, rows=r)) for r in (5, 20))
    assert 0.5 < needed / one < 2.5 and 2.5 < four / one < 4.5


def test_compiled_once_whatever_the_lengths():
    model, params, _ = prepared("qwen3")
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return estimates.estimate(model, params, batch, CLIP)[0].gradient

    used = set()
    for seed in range(3, 6):
        batch = made(seed=seed)
        used.add(int(batch.used))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(params, batch)))
    assert len(traces) == 1 and len(used) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rwkv7"])
def test_remat_changes_no_number_and_keeps_less(name):
    model = make(dataclasses.replace(prepared(name, scan_layers=True)[0].config, layers=8))
    params, sparing = model.init(jax.random.key(0)), make(dataclasses.replace(model.config, remat=True))
    batch = made()
    sparing, plain = (estimator(m, CLIP).lower(params, batch).compile() for m in (sparing, model))
    trees_close(sparing(params, batch)[0].gradient, plain(params, batch)[0].gradient, 1e-6)
    size = lambda program: program.memory_analysis().temp_size_in_bytes
    assert size(sparing) < 0.5 * size(plain)


@pytest.mark.slow
def test_norms_are_those_of_each_sequence_alone():
    with jax.enable_x64(True):
        model, params, _ = doubled("qwen3")
        mask = rows()["mask"]
        jacobian = jax.jit(jax.jacrev(lambda p: jnp.where(mask, alone(model, p)[0], 0).sum(axis=1)))(params)
        expected = sum((np.asarray(x).reshape(N, -1) ** 2).sum(axis=1) for x in jax.tree.leaves(jacobian))
        run = jax.jit(lambda p, batch: estimates.norms(model, p, batch, temperature=0.8))
        for shape in SHAPES[:2]:
            batch = made(shape)
            squares, weight = run(params, batch)
            np.testing.assert_allclose(batch.gathered(np.asarray(squares)), expected, rtol=1e-5)
            close(weight, estimator(model, CLIP)(params, batch)[1].log_weight, 1e-5)
        assert expected[2] == 0 and expected[0] > 1  # sequence 2 has no token


def two_buffers(model, params, batch, rewards, groups, temperature=0.8):
    """VCPO's gradient in one pass: per group S = sum w grad l and Q = sum w R grad l, then Q - b S over the group's spread."""

    def score(params, micro):
        logp, _ = estimates.completion_logp(model, params, micro, temperature=temperature)
        return jnp.where(micro.mask, logp, 0).sum(), jnp.where(micro.mask, logp - micro.behaviour, 0).sum()

    differentiate, total = jax.jit(jax.grad(score, has_aux=True)), estimates.wide_zeros(params)
    rewards, tokens = np.asarray(rewards), batch.mask.sum(axis=(1, 2))
    for group in range(groups.max() + 1):
        norms, logs = [], []
        plain, weighted = (jax.tree.map(jnp.zeros_like, total) for _ in range(2))
        members = np.flatnonzero(groups == group)
        for i in members:
            (m,) = np.flatnonzero(batch.source[:, 0] == i)
            micro = jax.tree.map(lambda x, m=m: x[m] if np.ndim(x) else x, batch)
            gradient, log_weight = differentiate(params, micro)
            norms.append(sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(gradient)))
            logs.append(float(log_weight))
            scale = min(np.exp(logs[-1]), 8.0) / max(tokens[m], 1)
            plain = jax.tree.map(lambda s, g, c=scale: s + c * g, plain, gradient)
            weighted = jax.tree.map(lambda q, g, c=scale * rewards[i]: q + c * g, weighted, gradient)
        w2 = np.exp(2 * np.array(logs)) * np.array(norms)
        b = (w2 * rewards[members]).sum() / w2.sum()
        spread = rewards[members].std()
        total = jax.tree.map(lambda t, q, s, b=b, d=spread: t - (q - b * s) / d / N, total, weighted, plain)
    return total


@pytest.mark.slow
def test_the_two_pass_form_of_vcpo_equals_two_buffers():
    with jax.enable_x64(True):
        model, params, _ = doubled("qwen3")
        objective = Objective(shape="score", weight=Weight("policy", "sequence", cap=8.0), aggregation="sequence_mean")
        batch = made(Shape(12, 1, 1, LONGEST), **ON_POLICY)
        rewards, groups = np.array([1.0, 0, 1, 0, 0, 1, 1, 0.5, 0]), np.repeat(np.arange(3), 3)
        squares, weight = (
            batch.gathered(np.asarray(x)).reshape(3, 3) for x in estimates.norms(model, params, batch, temperature=0.8)
        )
        shaped = rewards.reshape(3, 3)
        baseline = np.asarray(vcpo.minimum_variance_baseline(weight, squares, shaped))
        advantage = (shaped - baseline[:, None]) / shaped.std(axis=1, keepdims=True)
        packed = made(advantage=advantage.reshape(-1), **ON_POLICY)
        got, _ = estimator(model, objective)(params, packed)
        expected = two_buffers(model, params, batch, rewards, groups)
        scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
        assert scale > 1e-3
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * scale), got.gradient, expected)


@pytest.mark.slow
def test_a_step_along_it_raises_the_objective():
    model, params, _ = prepared("qwen3")
    run = estimator(model, Objective(shape="ratio"))
    batch = made(reference=None)
    before, _ = run(params, batch)
    step = 0.01 / optax.tree.norm(before.gradient)
    after, _ = run(jax.tree.map(lambda p, g: p - step * g, params, before.gradient), batch)
    value = lambda made: float(made.metrics["objective"][0] / made.metrics["objective"][1])
    predicted = float(0.01 * optax.tree.norm(before.gradient))
    assert 0.7 * predicted < value(after) - value(before) < 1.3 * predicted


def test_a_batch_without_credit_is_refused():
    from rl.data.packing import micro_batches

    data = rows()
    model, params, _ = prepared("qwen3")
    batch = micro_batches(*(data[k] for k in ("prompt", "prompt_length", "tokens", "length")), SHAPE)
    for function in (
        lambda: estimates.estimate(model, params, batch, CLIP),
        lambda: estimates.norms(model, params, batch),
    ):
        with pytest.raises(
            ValueError, match="needs mask, advantage, behaviour, counted: make it with TrainBatch.credit"
        ):
            function()
