"""Scores of given tokens: against a trained model's stored log-probs, a plain log-softmax, and hostile padding."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from rl.models.presets import make, preset
from rl.rollout.score import score, score_row

_ROOT = Path(__file__).parents[3]
STORIES = Path(os.environ.get("EGGROLL_DATA", _ROOT.parent / "shared" / "data")) / "stories260K"
VOCAB, LENGTHS = 23, (13, 6, 1, 2)
_SMALL = {"vocab": VOCAB, "layers": 1}
CONFIGS = {
    "tied transformer": preset("tiny-transformer", **_SMALL),
    "transformer": preset("tiny-transformer", tied=False, scan_layers=True, **_SMALL),
    "experts": preset("tiny-moe", **_SMALL),
    "rwkv7": preset("tiny-rwkv7", chunk=4, **_SMALL),
}


@functools.cache
def prepared(name, **changes):
    """A model whose distributions are far from uniform, and a batch of random ids."""
    model = make(dataclasses.replace(CONFIGS[name], **changes))
    params = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape).astype(x.dtype) for x, k in zip(leaves, keys, strict=True)]
    ids = jax.random.randint(jax.random.key(2), (len(LENGTHS), max(LENGTHS)), 0, VOCAB)
    return model, jax.tree.unflatten(tree, noisy), np.asarray(ids), np.array(LENGTHS)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids):
    return model.head(params, model.forward(params, ids)[0])


def naive_row(model, params, ids, temperature=1.0):
    """Scores by log-softmax of all the sequence's logits, in NumPy."""
    z = np.asarray(_logits(model, params, jnp.asarray(ids)), np.float64)[:-1] / temperature
    logp = z - z.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return np.r_[0, logp[np.arange(len(ids) - 1), ids[1:]]], np.r_[0, -(np.exp(logp) * logp).sum(-1)]


def close(got, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), tuple(got), tuple(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_log_softmax_of_each_sequence_and_zero_elsewhere(name):
    model, params, ids, lengths = prepared(name)
    scores = score(model, params, ids, lengths, temperature=0.8, block=20)
    assert [(x.shape, x.dtype) for x in scores] == [(ids.shape, jnp.float32)] * 2
    for b, n in enumerate(LENGTHS):
        expected = [x[:n] for x in naive_row(model, params, ids[b], 0.8)]
        close([x[b, :n] for x in scores], expected)
        assert all((x[b, n:] == 0).all() and x[b, 0] == 0 for x in scores)
        assert n < 6 or np.ptp(expected[0]) > 1
    for block in (1, None) if name == "transformer" else ():
        close(score(model, params, ids, lengths, temperature=0.8, block=block), scores, 1e-5)


@pytest.mark.parametrize("name", ["tied transformer", "rwkv7"])
def test_padding_leaves_no_trace_whatever_it_holds(name):
    model, params, ids, lengths = prepared(name)
    scores = score(model, params, ids, lengths)
    padding = np.arange(ids.shape[1]) >= lengths[:, None]
    for filler in (0, VOCAB - 1, -1, VOCAB, 2**31 - 1):
        jax.tree.map(
            np.testing.assert_array_equal, score(model, params, np.where(padding, filler, ids), lengths), scores
        )
    if name == "tied transformer":  # an embedding of an id outside is NaN, and so would be its share of a gradient
        gradient = jax.jit(jax.grad(lambda p, ids: score_row(model, p, ids, 6)[0].sum()))
        filled = jnp.asarray(np.where(padding, VOCAB, ids)[1])
        jax.tree.map(np.testing.assert_array_equal, gradient(params, filled), gradient(params, jnp.asarray(ids[1])))
    wider = np.pad(ids, ((0, 0), (0, 5)), constant_values=-100)
    close([x[:, :13] for x in score(model, params, wider, lengths)], scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied transformer", "rwkv7"])
def test_gradients_of_masked_positions_are_exactly_zero(name):
    model, params, ids, lengths = prepared(name)

    def gradient(weights):
        def loss(params):
            logp, entropy = score(model, params, ids, lengths, block=12)
            return jnp.sum(weights * (logp + entropy))

        return jax.grad(loss)(params)

    gradient = jax.jit(gradient)
    real = np.arange(ids.shape[1]) < lengths[:, None]
    real[:, 0] = False
    for leaf in jax.tree.leaves(gradient(np.where(real, 0.0, 1e6))):
        assert (np.asarray(leaf) == 0).all()
    gradients = gradient(np.where(real, 1.0, 1e6))
    jax.tree.map(np.testing.assert_array_equal, gradients, gradient(np.where(real, 1.0, 0.0)))

    def plain(params):
        logp = jax.nn.log_softmax(jax.vmap(lambda row: _logits(model, params, row))(ids)[:, :-1])
        both = jnp.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0] - jnp.sum(jnp.exp(logp) * logp, -1)
        return jnp.sum(real[:, 1:] * both)

    expected = jax.jit(jax.grad(plain))(params)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert scale > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), gradients, expected)


def test_hidden_rows_without_meaning_may_be_nan():
    """A model may leave anything in the rows of padding: neither scores nor gradients see it."""
    model, params, ids, lengths = prepared("tied transformer")

    def poisoned(params, ids, cache, start, count):
        hidden, cache = model.forward(params, ids, cache, start, count)
        return jnp.where(jnp.arange(len(ids))[:, None] < count, hidden, jnp.nan), cache

    broken = model._replace(forward=poisoned)
    close(score(broken, params, ids, lengths), score(model, params, ids, lengths), 1e-6)
    gradient = lambda model: jax.jit(jax.grad(lambda p: score_row(model, p, jnp.asarray(ids[1]), 6)[0].sum()))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(broken), gradient(model))


def test_bf16_and_f64():
    model, params, ids, lengths = prepared("tied transformer")
    half = make(dataclasses.replace(model.config, dtype="bfloat16"))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    scores, expected = score(half, rounded, ids, lengths), score(model, wide, ids, lengths)
    assert {x.dtype for x in scores} == {jnp.dtype("float32")}
    assert 1e-5 < np.abs(scores[0] - expected[0]).mean() < 0.05
    with jax.enable_x64(True):
        double = make(dataclasses.replace(model.config, dtype="float64"))
        exact = score(double, jax.tree.map(lambda x: x.astype("float64"), params), ids, lengths)
        assert {x.dtype for x in exact} == {jnp.dtype("float64")}
        close(score(model, params, ids, lengths), exact, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied transformer", "transformer"])
def test_a_population_scores_as_its_members_do_alone(name):
    """Low-rank perturbed heads, tied or not: `score_row` is any function of params to `eggroll`."""
    model, params, ids, lengths = prepared(name)
    es = eggroll.strategy(optax.sgd(0.1), population=eggroll.crossed(4), sigma=0.1, rules=model.rules)
    state = es.init(params, jax.random.key(3))
    fitness = lambda params, row: score_row(model, params, *row, block=5)[0].sum()
    got = jax.jit(lambda state: es.evaluate(state, fitness, (ids, lengths)))(state)
    one = jax.jit(lambda i: score(model, es.member_params(state, i), ids, lengths)[0].sum(-1))
    alone = np.stack([one(i) for i in range(4)])
    np.testing.assert_allclose(got, alone.reshape(got.shape), atol=1e-4)
    assert np.std(alone[:, 0]) > 0.5


def test_no_logits_of_a_whole_sequence_exist():
    model = make(preset("tiny-transformer", vocab=1009, layers=1))
    params = model.init(jax.random.key(0))
    ids, lengths = jnp.ones((2, 301), jnp.int32), jnp.array([301, 7])
    fn = lambda p, *rest: score(model, p, *rest, block=60)[0].sum()
    for program in (fn, jax.grad(fn)):
        text = jax.jit(program).lower(params, ids, lengths).as_text()
        assert "2x30x1009xf32" in text  # 300 positions in blocks of 30 for each of two sequences
        assert "300x1009x" not in text and "301x1009x" not in text


def test_compiled_once_per_shape():
    from rl.rollout.score import _score

    model, params, ids, lengths = prepared("transformer")
    before = _score._cache_size()
    for temperature, n in ((1.0, 13), (0.5, 7), (2.0, 1)):
        score(model, params, ids, np.minimum(lengths, n), temperature=temperature, block=9)
    assert _score._cache_size() == before + 1


def test_a_trained_model_gives_the_stored_log_probs():
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip(f"no stories260K in {STORIES.parent} (set EGGROLL_DATA)")
    pytest.importorskip("safetensors", reason="checkpoints are safetensors files")
    pytest.importorskip("tokenizers", reason="the checkpoint has a tokenizer.json")
    from rl.models.load import load

    model, params, _ = load(STORIES)
    prompts = json.loads((STORIES / "reference.json").read_text())["prompts"]
    texts = [(p["ids"] + p["greedy_ids"], p["prompt_logprobs"] + p["greedy_logprobs"]) for p in prompts]
    lengths = np.array([len(ids) for ids, _ in texts])
    batch = np.stack([np.pad(ids, (0, lengths.max() - len(ids)), constant_values=-1) for ids, _ in texts])
    logp, entropy = score(model, params, batch, lengths)
    for row, (ids, expected) in zip(logp, texts, strict=True):
        np.testing.assert_allclose(row[1 : len(ids)], expected, atol=1e-4, rtol=0)
    assert (entropy >= 0).all() and entropy.max() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [13, 0, 1, 2]}, r"between 1 and 13.*got 0 in row 1 \(1 such rows\)"),
        ({"lengths": [13, 6, 14, 15]}, r"got 14 in row 2 \(2 such rows\)"),
        ({"lengths": [13, 6, 1]}, r"ids \[B, L\] and lengths \[B\]; got \(4, 13\) and \(3,\)"),
        ({"lengths": [13.0, 6, 1, 2]}, "lengths must be integers; got float64"),
        ({"ids": np.zeros((4, 13))}, "ids must be integers; got float64"),
        ({"ids": np.zeros(13, int)}, r"got \(13,\) and \(4,\)"),
        ({"ids": np.full((4, 13), VOCAB)}, r"between 0 and 22.*got 23 at row 0, position 0 \(22 such ids\).*tokenizer"),
        ({"ids": np.diag([0, -3, 0, 0])[:, [1] * 13]}, r"got -3 at row 1, position 0 \(6 such ids\)"),
        ({"block": 0}, "at least 1 position; got 0"),
        ({"temperature": -1.0}, "positive; got -1.0"),
    ],
)
def test_bad_input(changes, message):
    model, params, ids, lengths = prepared("rwkv7")
    values = {"ids": ids, "lengths": lengths} | changes
    with pytest.raises(ValueError, match=message):
        score(model, params, **values)
