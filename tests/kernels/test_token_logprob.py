"""Log-probabilities of given tokens: values by hand, a NumPy twin, gradients, what is never formed, kernels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch, token_logprob, tuning
from kernels.token_logprob import pallas_gpu
from tests.kernels import harness


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
    rng = np.random.default_rng(length)
    hidden, head = rng.normal(size=(length, width)), scale * rng.normal(size=(width, vocab))
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(rng.integers(0, vocab, length), "int32")


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


@pytest.mark.parametrize(("length", "block"), [(0, 4), (1, 128), (4, 4), (5, 4), (11, 1), (11, 4), (11, 128)])
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
    expected = jax.jit(jax.grad(functools.partial(loss, naive), (0, 1, 2)))(hidden, head, 1.3)
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


@pytest.mark.parametrize("vocab", [32_768, 131_072])
def test_memory_at_vocabularies_of_real_models(vocab):
    # compiled, not run: a few blocks of logits, each 1/64 of the whole, and the head's gradient, 1/256
    length, width, block = 4096, 16, 64
    args = shapes(length, width, vocab, "float32")
    for kind, most in (("forward", 1 / 16), ("gradient", 1 / 8)):
        fn = lambda *a: sum(x.sum() for x in token_logprob.log_prob(*a, block=block))
        fn = fn if kind == "forward" else jax.grad(fn, (0, 1))
        used = jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert block * vocab * 4 <= used < most * length * vocab * 4


# -- kernels ---------------------------------------------------------------------------------------------------------


def shapes(length, width, vocab, dtype):
    shape = jax.ShapeDtypeStruct
    return shape((length, width), dtype), shape((width, vocab), dtype), shape((length,), "int32")


def loss(implementation, hidden, head, ids, temperature=1.0):
    logp, entropy = token_logprob.log_prob(hidden, head, ids, temperature=temperature, implementation=implementation)
    return logp.sum() + 2 * entropy.sum()


def largest(program: str) -> int:
    """Elements of the largest array of a lowered program."""
    arrays = re.findall(r"tensor<((?:\d+x)+)[a-z]", program)
    return max(int(np.prod([int(n) for n in a.split("x")[:-1]])) for a in arrays)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tuning, "blocks", lambda op, platform, default, kind, **shape: default | {"m": 128, "n": 128})


CASES = [
    ("pallas_tpu", "bfloat16", 200, 72, 300),
    ("pallas_tpu", "float32", 130, 24, 140),
    ("pallas_tpu", "float32", 5, 7, 17),
    ("pallas_tpu", "bfloat16", 0, 8, 256),
    ("pallas_gpu", "bfloat16", 200, 72, 300),
    ("pallas_gpu", "bfloat16", 0, 8, 256),
]


@pytest.mark.usefixtures("small_tiles")
class TestKernels:
    @pytest.mark.parametrize(("kernel", "dtype", "length", "width", "vocab"), CASES)
    def test_values_and_gradients_are_those_of_the_reference(self, kernel, dtype, length, width, vocab, monkeypatch):
        monkeypatch.setattr(pallas_gpu, "_SCORES", 200 * 200)  # two blocks, one over the other
        hidden, head, ids = operands(length, width, vocab, dtype, 3 / width**0.5)
        ids = ids.at[1:4].set(jnp.array([-1, vocab, vocab - 1])[:length])
        weights = tuple(jnp.asarray(np.random.default_rng(7).normal(size=(2, length)), jnp.float32))

        def both(implementation, *args):
            fn = lambda h, w, t: token_logprob.log_prob(h, w, ids, temperature=t, implementation=implementation)
            out, back = jax.vjp(fn, *args)
            return out, back(weights)

        run = jax.jit(both, static_argnums=0)
        got, gradients = harness.run(kernel, functools.partial(run, kernel), hidden, head, 0.7)
        wide = lambda x: x.astype(jnp.float32)
        expected, wanted = run("reference", wide(hidden), wide(head), 0.7)
        assert [x.shape for x in got] == [(length,)] * 2 and np.isnan(got[0]).sum() == 2 * (length > 0)
        close(got, expected, 1e-5)  # f32 sums of the same products in another order, scores up to 20
        # bf16: dz is rounded and so is the result, 2^-9 of each element at most; f32: sums of terms of both signs
        rounding = 2**-8 if dtype == "bfloat16" else 5e-6
        for a, b, like in zip(gradients[:2], wanted, (hidden, head), strict=False):
            assert a.dtype == like.dtype and a.shape == like.shape
            assert jnp.linalg.norm(wide(a) - b) <= rounding * jnp.linalg.norm(b)
            assert jnp.abs(wide(a) - b).max(initial=0) <= 2 * rounding * jnp.abs(b).max(initial=0)
            assert length == 0 or jnp.abs(b).max() > 0.1
        # the temperature's is minus the sum of hidden times its gradient, over the temperature: terms that nearly cancel
        assert jnp.abs(gradients[2] - wanted[2]) <= rounding * jnp.abs(wide(hidden) * wanted[0]).sum() / 0.7

    @pytest.mark.parametrize("kernel", harness.KERNELS)
    def test_vmap_over_two_axes_is_the_loop(self, kernel):
        hidden, head, ids = operands(2 * 3 * 5, 16, 140, "bfloat16", 0.7)
        hidden, ids, temperatures = hidden.reshape(2, 3, 5, 16), ids.reshape(2, 3, 5), jnp.array([0.7, 1.0, 1.3])

        def total(implementation, hidden, head):
            one = lambda h, i, t: loss(implementation, h, head, i, t)
            return jax.vmap(jax.vmap(one, (0, 0, 0)), (0, 0, None))(hidden, ids, temperatures).sum()

        got = harness.run(kernel, jax.jit(jax.value_and_grad(functools.partial(total, kernel), (0, 1))), hidden, head)
        places = [(a, b) for a in range(2) for b in range(3)]
        each = lambda h, w: sum(loss("reference", h[at], w, ids[at], temperatures[at[1]]) for at in places)
        wide = [x.astype("float32") for x in (hidden, head)]
        value, gradients = jax.jit(jax.value_and_grad(each, (0, 1)))(*wide)
        np.testing.assert_allclose(got[0], value, rtol=1e-6)
        for a, b in zip(got[1], gradients, strict=True):
            assert jnp.linalg.norm(a.astype("float32") - b) <= 2**-8 * jnp.linalg.norm(b)

    def test_several_heads_and_a_gradient_for_each_sequence(self):
        hidden, head, ids = (jnp.stack(x) for x in zip(*(operands(9, scale=s) for s in (0.5, 1.0)), strict=True))
        several = lambda how, w: jax.grad(lambda w: jax.vmap(functools.partial(loss, how))(hidden, w, ids).sum())(w)
        each = lambda how, w: jax.vmap(jax.grad(functools.partial(loss, how), 1), (0, None, 0))(hidden, w, ids)
        for gradient, w in ((several, head), (each, head[0])):
            got = harness.run("pallas_tpu", jax.jit(functools.partial(gradient, "pallas_tpu")), w)
            close([got], [jax.jit(functools.partial(gradient, "reference"))(w)], 1e-4)

    def test_inside_of_checkpoint_and_scan(self):
        hidden, head, ids = operands(8)

        def total(how, head):
            one = jax.checkpoint(lambda h, i: loss(how, h, head, i))
            return jax.lax.scan(
                lambda sum_, x: (sum_ + one(*x), None), 0.0, (hidden.reshape(2, 4, 6), ids.reshape(2, 4))
            )[0]

        gradient = jax.jit(jax.grad(total, 1), static_argnums=0)
        got = harness.run("pallas_tpu", functools.partial(gradient, "pallas_tpu"), head)
        close([got], [gradient("reference", head)], 1e-4)

    def test_forward_mode_says_that_there_is_none(self):
        hidden, head, ids = operands()
        push = lambda head: jax.jvp(lambda w: loss("pallas_tpu", hidden, w, ids), (head,), (head,))
        with pytest.raises(NotImplementedError, match="reverse-mode derivatives alone.*'reference'"):
            harness.run("pallas_tpu", jax.jit(push), head)


@pytest.mark.parametrize(
    ("kernel", "length", "width", "vocab"),
    [
        ("pallas_tpu", 4096, 2560, 151_936),
        ("pallas_tpu", 300, 16_384, 32_000),
        ("pallas_gpu", 4096, 2560, 151_936),
        ("pallas_gpu", 512, 768, 50_257),
    ],
)
def test_lowers_at_shapes_of_models_and_forms_no_logits(kernel, length, width, vocab):
    # the padded head is the largest array of a forward pass; a gradient on a GPU has blocks of 2^26 scores
    shape = shapes(length, width, vocab, "bfloat16")
    temperature = jax.ShapeDtypeStruct((), "float32")
    for fn in (loss, jax.grad(loss, (1, 2, 4))):
        program = harness.lowered(kernel, functools.partial(fn, kernel), *shape, temperature)
        head = width * (vocab + -vocab % 128)
        assert largest(program) <= max(head, 2**26 if fn is not loss else 0)
        assert length < width or largest(program) < length * vocab


def test_f32_lowers_for_a_tpu():
    fn = jax.grad(functools.partial(loss, "pallas_tpu"), (0, 1))
    assert harness.lowered("pallas_tpu", fn, *shapes(1001, 896, 151_936, "float32")).count("@tpu_custom_call") == 3


@pytest.mark.parametrize("kernel", harness.KERNELS)
def test_sequences_are_rows_of_one_call_and_the_heads_gradient_is_summed_inside(kernel):
    hidden, head, ids = shapes(64, 512, 32_768, "bfloat16")
    many = lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype)
    total = lambda h, w, i: jax.vmap(functools.partial(loss, kernel), (0, None, 0))(h, w, i).sum()
    call = {"pallas_tpu": "@tpu_custom_call", "pallas_gpu": "@mosaic_gpu"}[kernel]
    program = lambda fn: harness.lowered(kernel, fn, many(hidden), head, many(ids))
    counts = lambda text: (text.count(call), text.count("stablehlo.while"))
    assert counts(program(total)) == (1, 0)  # no loop over sequences
    gradient = program(jax.grad(total, (0, 1)))
    assert counts(gradient) == {"pallas_tpu": (3, 0), "pallas_gpu": (1, 2)}[kernel]  # two loops over the vocabulary
    assert largest(gradient) == 512 * 32_768  # one head, where one for each sequence would be 8 times this


def test_dispatch():
    hidden, head, ids = operands()
    with pytest.raises(ValueError, match="cannot run as 'pallas_tpu': the device is cpu"):
        token_logprob.log_prob(hidden, head, ids, implementation="pallas_tpu")
    program = lambda how: str(
        jax.make_jaxpr(functools.partial(token_logprob.log_prob, implementation=how))(hidden, head, ids)
    )
    assert program(None) == program("auto") == program("reference")


@pytest.mark.parametrize(
    ("kernel", "dtypes", "width", "reason"),
    [
        ("pallas_tpu", ("float32", "float32"), 6, "the head is a function: give its matrix"),
        ("pallas_tpu", ("bfloat16", "float32"), 6, "of one type, bfloat16 or float32"),
        ("pallas_gpu", ("float32", "float32"), 6, "of one type, bfloat16;"),
        ("pallas_tpu", ("bfloat16", "bfloat16"), 16_385, "all of D, up to 16384 for bfloat16"),
        ("pallas_tpu", ("float32", "float32"), 8193, "all of D, up to 8192 for float32"),
    ],
)
def test_what_a_kernel_does_not_serve_is_refused_with_the_reason(kernel, dtypes, width, reason):
    hidden, head = jnp.ones((1, width), dtypes[0]), jnp.ones((width, 2), dtypes[1])
    head = functools.partial(jnp.matmul, b=head) if "function" in reason else head
    with dispatch.mode("interpret"), pytest.raises(ValueError, match=f"token_logprob of .*{reason}"):
        token_logprob.log_prob(hidden, head, jnp.array([0]), implementation=kernel)


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
