"""Log-probabilities of given tokens in blocks: values by hand, a NumPy twin, gradients, and what is never formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import token_logprob


def numpy_twin(hidden, head, ids, temperature=1.0):
    """One row and one token at a time, in f64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logp, entropy = [], []
    for row, token in zip(hidden, np.asarray(ids), strict=True):
        z = np.array([row @ column for column in head.T]) / temperature
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        logp.append(np.log(p[token]))
        entropy.append(-(p * np.log(p)).sum())
    return np.array(logp), np.array(entropy)


def operands(length=11, width=6, vocab=17, dtype="float32", scale=1.5):
    keys = jax.random.split(jax.random.key(length), 3)
    hidden = jax.random.normal(keys[0], (length, width), dtype)
    head = (scale * jax.random.normal(keys[1], (width, vocab))).astype(dtype)
    return hidden, head, jax.random.randint(keys[2], (length,), 0, vocab)


def naive(hidden, head, ids, temperature=1.0):
    logp = jax.nn.log_softmax(jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / temperature)
    return jnp.take_along_axis(logp, ids[:, None], -1)[:, 0], -jnp.sum(jnp.exp(logp) * logp, -1)


def close(got, expected, atol):
    rounding = 4 * np.finfo(np.float32).eps
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=rounding), tuple(got), tuple(expected))


def test_values_by_hand():
    # z = (0, ln 3): p = (1/4, 3/4); entropy 1/4 ln 4 + 3/4 ln (4/3) = 0.56233514
    # z = (ln 3, 0) with token 1; z = 0: p = 1/2
    hidden = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    head = jnp.log(jnp.array([[1.0, 3.0], [3.0, 1.0]]))
    logp, entropy = token_logprob.log_prob(hidden, head, jnp.array([1, 1, 0]), block=2)
    np.testing.assert_allclose(logp, [-0.28768207, -1.38629436, -0.69314718], atol=1e-6)
    np.testing.assert_allclose(entropy, [0.56233514, 0.56233514, 0.69314718], atol=1e-6)
    # at temperature 1/2 the logits double: p = (1/10, 9/10), entropy 0.1 ln 10 + 0.9 ln (10/9)
    logp, entropy = token_logprob.log_prob(hidden, head, jnp.array([0, 0, 0]), temperature=0.5)
    np.testing.assert_allclose(logp, [-2.30258509, -0.10536052, -0.69314718], atol=1e-6)
    np.testing.assert_allclose(entropy[:2], [0.32508297, 0.32508297], atol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 4, 5, 11])
@pytest.mark.parametrize("block", [1, 4, 128])
def test_every_length_and_block_equals_the_twin(length, block):
    hidden, head, ids = operands(length)
    got = token_logprob.log_prob(hidden, head, ids, temperature=0.7, block=block)
    assert [x.shape for x in got] == [(length,)] * 2 and {x.dtype for x in got} == {jnp.dtype("float32")}
    close(got, numpy_twin(hidden, head, ids, 0.7), 2e-6)
    assert length < 2 or np.ptp(got[0]) > 0.5


def test_functions_as_heads():
    hidden, head, ids = operands()
    bias = jnp.linspace(-2, 2, 17)
    biased = lambda rows: rows @ head + jnp.broadcast_to(bias, (len(rows), 17))  # a shape that depends on the block
    expected = numpy_twin(jnp.c_[hidden, jnp.ones(11)], jnp.r_[head, bias[None]], ids)
    close(token_logprob.log_prob(hidden, biased, ids, block=4), expected, 2e-6)
    embedding = head.T
    tied = lambda rows: jnp.einsum("nd,vd->nv", rows, embedding)
    close(token_logprob.log_prob(hidden, tied, ids, block=4), numpy_twin(hidden, head, ids), 2e-6)
    grad = jax.grad(lambda b: token_logprob.log_prob(hidden, lambda rows: rows @ head + b, ids, block=4)[0].sum())(bias)
    p = jax.nn.softmax(hidden @ head + bias)
    np.testing.assert_allclose(grad, np.bincount(ids, minlength=17) - p.sum(0), atol=1e-5)


@pytest.mark.parametrize("block", [3, 128])
def test_gradient_is_that_of_the_naive_form(block):
    hidden, head, ids = operands()
    weights = jax.random.normal(jax.random.key(7), (2, 11))

    def loss(fn, hidden, head, temperature):
        logp, entropy = fn(hidden, head, ids, temperature=temperature)
        return weights[0] @ logp + weights[1] @ entropy

    ours = jax.grad(functools.partial(loss, functools.partial(token_logprob.log_prob, block=block)), (0, 1, 2))
    expected = jax.grad(functools.partial(loss, naive), (0, 1, 2))(hidden, head, 1.3)
    close(ours(hidden, head, 1.3), expected, 1e-5)
    close(jax.jit(ours)(hidden, head, 1.3), expected, 1e-5)
    assert min(float(jnp.abs(g).max()) for g in expected) > 0.1


def test_gradient_against_finite_differences_in_f64():
    with jax.enable_x64(True):
        hidden, head, ids = operands(5, dtype="float64")
        direction = jax.random.normal(jax.random.key(3), head.shape, "float64")

        def twin(step):
            logp, entropy = numpy_twin(hidden, head + step * direction, ids)
            return logp.sum() + 2 * entropy.sum()

        def loss(head):
            logp, entropy = token_logprob.log_prob(hidden, head, ids, block=2)
            assert logp.dtype == entropy.dtype == jnp.float64
            return logp.sum() + 2 * entropy.sum()

        np.testing.assert_allclose(loss(head), twin(0.0), rtol=1e-13)
        slope = (twin(1e-5) - twin(-1e-5)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(head), direction), slope, rtol=1e-8)


def test_bf16_accumulates_in_f32_forward_and_back():
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    head = jnp.stack([jnp.ones(4096), jnp.zeros(4096)], 1).astype(jnp.bfloat16)
    # z = (4096, 0) / 4096; a bf16 sum would stop at 256 and give p_1 / p_0 = exp(-1/16)
    logp, _ = token_logprob.log_prob(ones, head, jnp.array([1]), temperature=4096.0)
    np.testing.assert_allclose(logp, [-1.31326169], atol=1e-6)  # -1 - ln(1 + 1/e)
    # 512 blocks' gradients: summed in bf16 they are off by several per cent, summed in f32 by the last rounding
    hidden, head, ids = operands(2048, dtype="bfloat16", scale=0.3)
    for form in (lambda head: head, lambda head: functools.partial(jnp.matmul, b=head)):
        got = jax.grad(lambda head, f=form: token_logprob.log_prob(hidden, f(head), ids, block=4)[0].sum())(head)
        assert got.dtype == jnp.bfloat16
        wide = lambda head: naive(hidden.astype("float32"), head, ids)[0].sum()
        expected = jax.grad(wide)(head.astype("float32"))
        assert jnp.linalg.norm(got.astype("float32") - expected) < 0.005 * jnp.linalg.norm(expected)


def test_tokens_that_cannot_be_drawn_and_ids_outside_the_vocabulary():
    hidden, head, _ = operands(3)
    banned = lambda rows: jnp.where(jnp.arange(17) < 5, rows @ head, -jnp.inf)
    ids = jnp.array([4, 0, 16])
    logp, entropy = token_logprob.log_prob(hidden, banned, ids)
    expected = numpy_twin(hidden, head[:, :5], [4, 0, 0])
    np.testing.assert_allclose(logp[:2], expected[0][:2], atol=2e-6)
    assert logp[2] == -jnp.inf
    np.testing.assert_allclose(entropy, expected[1], atol=2e-6)
    grad = jax.grad(lambda hidden: sum(x[:2].sum() for x in token_logprob.log_prob(hidden, banned, ids)))(hidden)
    assert np.isfinite(grad).all() and jnp.abs(grad).max() > 0.1
    logp, entropy = token_logprob.log_prob(hidden, head, jnp.array([-1, 17, 16]))
    assert np.isnan(logp).tolist() == [True, True, False] and np.isfinite(entropy).all()


def test_large_logits_do_not_overflow():
    logp, entropy = token_logprob.log_prob(jnp.array([[1e4]]), jnp.array([[1.0, -1.0, 1.0]]), jnp.array([1]))
    np.testing.assert_allclose(logp, [-20000.693], rtol=1e-6)
    np.testing.assert_allclose(entropy, [np.log(2)], atol=1e-6)


def test_vmap_over_sequences_heads_and_temperatures():
    hidden, head, ids = (jnp.stack(x) for x in zip(*(operands(9, scale=s) for s in (0.5, 1.0, 2.0)), strict=True))
    one = lambda h, w, i, t: token_logprob.log_prob(h, w, i, temperature=t, block=4)
    temperatures = jnp.array([0.5, 1.0, 2.0])
    got = jax.jit(jax.vmap(one))(hidden, head, ids, temperatures)
    shared = jax.vmap(one, in_axes=(0, None, 0, None))(hidden, head[1], ids, 1.5)
    for b in range(3):
        close([x[b] for x in got], numpy_twin(hidden[b], head[b], ids[b], float(temperatures[b])), 5e-6)
        close([x[b] for x in shared], numpy_twin(hidden[b], head[1], ids[b], 1.5), 5e-6)


# -- memory ----------------------------------------------------------------------------------------------------------

LENGTH, WIDTH, VOCAB, BLOCK = 1003, 5, 211, 50


def shapes_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from shapes_in(inner.jaxpr)


def programs():
    fn = lambda scorer: lambda hidden, head, ids: sum(x.sum() for x in scorer(hidden, head, ids))
    blocked = functools.partial(token_logprob.log_prob, block=BLOCK)
    form = {"array": blocked, "function": lambda h, w, i: blocked(h, lambda rows: rows @ w, i), "naive": naive}
    return {name: {"forward": fn(f), "gradient": jax.grad(fn(f), (0, 1))} for name, f in form.items()}


@pytest.mark.optimised
@pytest.mark.parametrize("form", ["array", "function"])
@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_nothing_larger_than_a_block_of_logits_exists(form, kind):
    args = operands(LENGTH, WIDTH, VOCAB)
    sizes = lambda fn: [int(np.prod(shape)) for shape in shapes_in(jax.make_jaxpr(fn)(*args).jaxpr)]
    memory = lambda fn: jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
    plain, ours = programs()["naive"][kind], programs()[form][kind]
    assert max(sizes(plain)) == LENGTH * VOCAB and max(sizes(ours)) <= BLOCK * VOCAB
    # compiled: a few blocks (50 x 211 floats: 42 kB) and the padded rows, against 846 kB for each array of logits
    assert memory(plain) >= LENGTH * VOCAB * 4
    assert memory(ours) < 6 * BLOCK * VOCAB * 4 < LENGTH * VOCAB * 4


def test_one_product_a_block_and_three_more_for_its_gradient():
    args = operands(LENGTH, WIDTH, VOCAB)
    count = lambda fn: str(jax.make_jaxpr(fn)(*args)).count("dot_general[")
    assert (count(programs()["array"]["forward"]), count(programs()["array"]["gradient"])) == (1, 4)
    naive_counts = count(programs()["naive"]["forward"]), count(programs()["naive"]["gradient"])
    assert naive_counts == (1, 3)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.ones(6)}, r"hidden \[L, D\].*got hidden \(6,\)"),
        ({"ids": jnp.zeros(10, jnp.int32)}, r"hidden \(11, 6\), ids \(10,\)"),
        ({"head": jnp.ones((17, 6))}, r"head \(17, 6\)"),
        ({"ids": jnp.zeros(11)}, "ids must be integers; got float32"),
        ({"block": 0}, "at least 1 row; got 0"),
        ({"temperature": 0}, "positive; got 0"),
        ({"temperature": float("nan")}, "positive; got nan"),
    ],
)
def test_bad_input(changes, message):
    values = dict(zip(("hidden", "head", "ids"), operands(), strict=True)) | changes
    hidden, head, ids = (values.pop(name) for name in ("hidden", "head", "ids"))
    with pytest.raises(ValueError, match=message):
        token_logprob.log_prob(hidden, head, ids, **values)
