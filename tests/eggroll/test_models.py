"""One four-layer language model written in Flax NNX, in Flax Linen and as plain functions, all evolved unmodified.

Layers scanned over and rematerialised, biases and norm scales, a tied head: every member's outputs equal those of its
materialised weights, and the compiled program holds no weight per member.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import eggroll

LAYERS, HEADS = 4, 2


class Widths(NamedTuple):
    vocabulary: int
    model: int
    hidden: int
    tokens: int = 4

    def scaled(self, by):
        return Widths(self.vocabulary * by, self.model * by, self.hidden * by, self.tokens)


SMALL = Widths(11, 6, 10)
WIDE = Widths(512, 64, 256)


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def shapes(widths):
    """The shape of every parameter; the tree has the names that Flax gives it."""
    d, h, k = widths.model, HEADS, widths.model // HEADS
    layer = {
        "norm1": {"scale": (d,), "bias": (d,)},
        "attention": {n: {"kernel": (d, h, k), "bias": (h, k)} for n in ("query", "key", "value")}
        | {"out": {"kernel": (h, k, d), "bias": (d,)}},
        "norm2": {"scale": (d,), "bias": (d,)},
        "up": {"kernel": (d, widths.hidden), "bias": (widths.hidden,)},
        "down": {"kernel": (widths.hidden, d), "bias": (d,)},
    }
    layers = jax.tree.map(lambda s: (LAYERS, *s), layer, is_leaf=lambda s: isinstance(s, tuple))
    return {"embed": {"embedding": (widths.vocabulary, d)}, "layers": layers, "norm": {"scale": (d,), "bias": (d,)}}


def weights(widths, dtype=None):
    """Random parameters, no bias 0 and no scale 1; with a dtype, only their shapes."""
    rng = np.random.default_rng(0)
    make = lambda s: jax.ShapeDtypeStruct(s, dtype) if dtype else jnp.asarray(rng.normal(size=s) / math.sqrt(s[-1]))
    return jax.tree.map(make, shapes(widths), is_leaf=lambda s: isinstance(s, tuple))


# -- the model, three times ------------------------------------------------------------------------------------------


def norm(p, x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def plain_attention(p, x):
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value"))
    logits = jnp.einsum("thk,shk->hts", q / math.sqrt(q.shape[-1]), k)
    logits = jnp.where(jnp.tril(jnp.ones((len(x), len(x)), bool)), logits, -1e30)
    mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(logits), v)
    return jnp.einsum("thk,hkd->td", mixed, p["out"]["kernel"]) + p["out"]["bias"]


def plain_model(params, ids):
    @jax.checkpoint
    def layer(x, p):
        x = x + plain_attention(p["attention"], norm(p["norm1"], x))
        hidden = jax.nn.gelu(norm(p["norm2"], x) @ p["up"]["kernel"] + p["up"]["bias"])
        return x + hidden @ p["down"]["kernel"] + p["down"]["bias"], None

    embedding = params["embed"]["embedding"]
    x, _ = jax.lax.scan(layer, embedding[ids], params["layers"])
    return norm(params["norm"], x) @ embedding.T


class LinenBlock(linen.Module):
    widths: Widths

    @linen.compact
    def __call__(self, x, _):
        mask = linen.make_causal_mask(jnp.ones(len(x)))
        normed = linen.LayerNorm(name="norm1")(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS, name="attention")(normed, mask=mask)
        hidden = jax.nn.gelu(linen.Dense(self.widths.hidden, name="up")(linen.LayerNorm(name="norm2")(x)))
        return x + linen.Dense(self.widths.model, name="down")(hidden), None


class LinenModel(linen.Module):
    widths: Widths

    @linen.compact
    def __call__(self, ids):
        embed = linen.Embed(self.widths.vocabulary, self.widths.model, name="embed")
        block = linen.remat(LinenBlock)
        layers = linen.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers(self.widths, name="layers")(embed(ids), None)
        return embed.attend(linen.LayerNorm(name="norm")(x))


class NnxBlock(nnx.Module):
    def __init__(self, widths, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(widths.model, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, widths.model, decode=False, rngs=rngs)
        self.up = nnx.Linear(widths.model, widths.hidden, rngs=rngs)
        self.down = nnx.Linear(widths.hidden, widths.model, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # holds a key and a counter, which are no parameters

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(jnp.ones(len(x))))
        return x + self.dropout(self.down(jax.nn.gelu(self.up(self.norm2(x)))))


class NnxModel(nnx.Module):
    def __init__(self, widths, rngs):
        precision = jnp.result_type(float)  # an NNX embedding computes in the type it was made in
        self.embed = nnx.Embed(widths.vocabulary, widths.model, param_dtype=precision, rngs=rngs)
        make = nnx.vmap(functools.partial(NnxBlock, widths))
        self.layers = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        self.norm = nnx.LayerNorm(widths.model, rngs=rngs)

    def __call__(self, ids):
        layer = nnx.remat(lambda x, block: block(x))
        x = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(self.embed(ids), self.layers)
        return self.embed.attend(self.norm(x))


def plain(widths, params):
    return plain_model, params


def flax_linen(widths, params):
    return lambda params, ids: LinenModel(widths).apply({"params": params}, ids), params


def flax_nnx(widths, params):
    model = NnxModel(widths, nnx.Rngs(0))
    model.eval()
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    nnx.replace_by_pure_dict(state, params)
    # copied, because under any jit the layers' scan refuses Variables (here the dropout's counter) made outside
    return lambda params, ids: nnx.merge(graph, params, rest, copy=True)(ids), state


MODELS = {"nnx": flax_nnx, "linen": flax_linen, "plain": plain}


def language_score(model):
    """Mean log-likelihood of a row of tokens, and the logits."""

    def score(params, row):
        logits = model(params, row[:-1])
        return jnp.take_along_axis(jax.nn.log_softmax(logits), row[1:, None], -1).mean(), logits

    return score


def score_alone(score, params, row):
    return score(params, row)[0]


def rows(widths, count=2):
    return jnp.asarray(np.random.default_rng(1).integers(widths.vocabulary, size=(count, widths.tokens + 1)))


def strategy(population, rules, rank=1, **options):
    return eggroll.strategy(optax.adam(0.01), population=population, rank=rank, sigma=0.1, rules=rules, **options)


def prepared(name, widths):
    """(score with logits, parameters, rules) of one of the models."""
    model, params = MODELS[name](widths, weights(widths))
    score = language_score(model)
    return score, params, eggroll.infer_rules(functools.partial(score_alone, score), params, rows(widths)[0])


@functools.cache
def evaluated(name):
    """(score, strategy, state, batch, scores, logits) of one of the models."""
    score, params, rules = prepared(name, SMALL)
    es, batch = strategy(eggroll.crossed(12), rules, 2), rows(SMALL)
    state = es.init(params, jax.random.key(3))
    scores, logits = jax.jit(lambda s, b: es.evaluate(s, score, b, has_aux=True))(state, batch)
    return score, es, state, batch, scores, logits


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("double_precision")
def test_outputs_are_those_of_materialised_weights(name):
    score, es, state, batch, scores, logits = evaluated(name)
    params = state.params
    assert jax.tree.leaves(params)[0].dtype == jnp.float64

    @jax.jit
    def materialised(state):
        each = jax.vmap(lambda n: es.member_params(state, n))(jnp.arange(12))
        of = jax.vmap(score, (None, 0))
        return each, jax.vmap(of, (0, None))(each, batch), of(state.params, batch)[1]

    each, (expected_scores, expected_logits), mean = materialised(state)
    assert logits.shape == (12, 2, SMALL.tokens, SMALL.vocabulary) and logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-12, atol=1e-12)
    assert float(jnp.min(jnp.max(jnp.abs(logits - mean), axis=(1, 2, 3)))) > 1e-3  # every member differs from the mean
    # every parameter is perturbed: no member has an entry of the mean, but for the odd zero of an integer-sum Gaussian
    for leaf, base in zip(jax.tree.leaves(each), jax.tree.leaves(params), strict=True):
        assert float(jnp.mean(leaf == base)) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("double_precision")
def test_the_three_models_are_one_model_and_share_their_noise():
    outs = []
    for name in MODELS:
        score, es, state, batch, _, logits = evaluated(name)
        assert not [use for use in es.uses(state, functools.partial(score_alone, score), batch[0]) if use[2]]
        outs.append(logits)
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-6, atol=1e-6)  # Flax divides by an f32 root
    np.testing.assert_allclose(outs[2], outs[0], rtol=1e-6, atol=1e-6)  # Flax divides by an f32 root


def test_rules_are_read_off_each_model():
    expected = {
        "attention/query/kernel": "sioo",
        "attention/out/kernel": "siio",
        "up/kernel": "sio",
        "down/kernel": "sio",
        "embed/embedding": "oi",
    }
    for name in MODELS:
        rules = dict(prepared(name, SMALL)[2])
        for path, form in expected.items():
            found = [f for pattern, f in rules.items() if path in pattern]
            assert found in ([form], [form.translate(str.maketrans("io", "oi"))]), (name, path, rules)


def compiled(name, members, rank=1):
    model, params = MODELS[name](WIDE, weights(WIDE))
    score = language_score(model)
    loss = functools.partial(score_alone, score)
    es = strategy(eggroll.crossed(members), eggroll.infer_rules(loss, params, rows(WIDE)[0]), rank)
    state = es.init(params, jax.random.key(0))
    return jax.jit(lambda s, b: es.evaluate(s, loss, b)).lower(state, rows(WIDE, 1)).compile()


@pytest.mark.optimised
@pytest.mark.parametrize("name", MODELS)
def test_the_compiled_program_holds_no_weight_per_member(name):
    """Its arrays are far smaller than members x the smallest matrix, and its memory grows by activations alone."""
    few, many = 64, 128
    smallest = WIDE.model * WIDE.model  # entries of an attention kernel
    program = compiled(name, many)
    sizes = [
        math.prod(int(n) for n in dims.split(",")) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    ]
    assert len(sizes) > 100 and max(sizes) < many * smallest
    extra = program.memory_analysis().temp_size_in_bytes - compiled(name, few).memory_analysis().temp_size_in_bytes
    assert 0 < extra < (many - few) * 4 * WIDE.model * WIDE.hidden  # less than one of the 24 matrices of each member


@pytest.mark.optimised
def test_materialised_weights_would_be_seen():
    """The same check on the same model, run on materialised members, fails: 128 weights of every kind are there."""
    score, params, rules = prepared("plain", WIDE)
    es = strategy(eggroll.crossed(128), rules)
    state = es.init(params, jax.random.key(0))

    def naive(state, batch):
        each = jax.vmap(lambda n: es.member_params(state, n))(jnp.arange(128))
        return jax.vmap(lambda p: score(p, batch[0])[0])(each)

    memory = jax.jit(naive).lower(state, rows(WIDE, 1)).compile().memory_analysis()
    assert memory.temp_size_in_bytes > 128 * 4 * WIDE.model * WIDE.hidden


@pytest.mark.slow
def test_leaves_that_are_no_parameters_are_refused_and_frozen_ones_stay():
    model = NnxModel(SMALL, nnx.Rngs(0))
    everything = nnx.state(model)  # with the dropout's counter, an integer
    with pytest.raises(TypeError, match="must be floating point to be perturbed; '.*count"):
        strategy(eggroll.crossed(12), (("kernel|embedding|bias|scale", "frozen"),)).init(everything, jax.random.key(0))
    score, params, rules = prepared("plain", SMALL)
    es = strategy(eggroll.crossed(12), (("attention/(query|key)/kernel", "frozen"), *rules))
    state = es.init(params, jax.random.key(0))
    loss = functools.partial(score_alone, score)
    moved, _ = jax.jit(lambda s: es.update(s, es.evaluate(s, loss, rows(SMALL))))(state)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/"): not np.array_equal(a, b)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved.params), strict=True)
    }
    assert [path for path, moved in changed.items() if not moved] == [
        path for path in changed if "query/kernel" in path or "key/kernel" in path
    ]
