"""Every way of using a weight: the perturbed function equals the function of the materialised weight, f64 to 1e-12."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import eggroll
from eggroll.perturb import RULES, Interpreter, LowRank


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)  # NumPy, because JAX would make it f32 outside a test


def weight(form, *shape, rank=2, seed=0, path="w"):
    side = lambda letter: [n if own in ("s", letter) else 1 for n, own in zip(shape, form, strict=True)]
    left, right = normal(seed + 1, *side("o"), rank), normal(seed + 2, *side("i"), rank)
    return LowRank(normal(seed, *shape), left, right, np.float64(0.3), path)


def is_weight(x):
    return isinstance(x, LowRank)


def materialised(tree):
    return jax.tree.map(lambda x: x.resolve() if is_weight(x) else x, tree, is_leaf=is_weight)


def arrays_made(fn, *args):
    """The shapes of every array in fn's jaxpr, sub-jaxprs included."""
    shapes = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.update(v.aval.shape for v in eqn.outvars)
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                walk(sub.jaxpr if hasattr(sub, "jaxpr") else sub) if hasattr(sub, "eqns") else None

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return shapes


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def with_jvp(x, w):
    return jnp.tanh(x @ w)


with_jvp.defjvp(lambda p, t: (with_jvp(*p), p[0] @ t[1]))

X = normal(9, 5, 4)
IDS = jnp.array([[1, 3], [0, 2]])
W = weight("io", 4, 6)
SQUARE = weight("io", 4, 4)
STACK = weight("sio", 3, 4, 4)
carry = lambda body: lambda x, w: lax.scan(body, (x, w), None, length=3)[1]

USES = {
    "x @ W": (lambda x, w: x @ w, X, W),
    "W.T @ x": (lambda x, w: w.T @ x.T, X, W),
    "W on the left": (lambda x, w: w @ x, normal(1, 6, 3), W),
    "vector @ W": (lambda x, w: x[0] @ w, X, W),
    "heads split": (lambda x, w: jnp.einsum("bd,dhk->bhk", x, w.reshape(4, 2, 3)), X, W),
    "heads merged": (lambda x, w: x @ w.reshape(4, 6), X, weight("ioo", 4, 2, 3)),
    "heads contracted": (lambda x, w: jnp.einsum("bhk,hkd->bd", x, w), normal(1, 5, 2, 3), weight("iio", 2, 3, 4)),
    "a matrix per head": (lambda x, w: jnp.einsum("bd,hdk->bhk", x, w), X, weight("sio", 3, 4, 2)),
    "batched": (lambda x, w: jnp.einsum("bhd,hdk->bhk", x, w), normal(1, 5, 3, 4), weight("sio", 3, 4, 2)),
    "batched, weight first": (
        lambda x, w: lax.dot_general(w, x, (((1,), (2,)), ((0,), (1,)))), normal(1, 5, 3, 4), weight("sio", 3, 4, 2),
    ),
    "stack contracted": (lambda x, w: jnp.einsum("bhd,hdk->bk", x, w), normal(1, 5, 3, 4), weight("sio", 3, 4, 2)),
    "both sides contracted": (lambda x, w: jnp.einsum("io,io->", x, w), normal(1, 4, 6), W),
    "vmapped over a stack": (lambda x, w: jax.vmap(lambda w: jnp.tanh(x @ w))(w), X, STACK),
    "broadcast": (lambda x, w: jnp.einsum("bd,bdk->bk", x, jnp.broadcast_to(w, (5, 4, 6))), X, W),
    "embedding": (lambda i, w: jnp.tanh(w[i] + 1), IDS, W),
    "embedding by take": (lambda i, w: jnp.take(w, i, axis=0) * 2, IDS, W),
    "embedding by the other axis": (lambda i, w: jnp.take(w, i, axis=1), IDS, W),
    "embedding, then a weight": (lambda i, e, w: e[i] @ w, IDS, weight("io", 5, 4), W),
    "tied head": (lambda i, w: jnp.tanh(w[i]) @ w.T, IDS, W),
    "layer picked": (lambda i, w: X @ w[i], jnp.int32(1), STACK),
    "layers in a loop": (lambda x, w: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x), X, STACK),
    "scan over layers": (lambda x, w: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, w), X, STACK),
    "scan over an input axis": (lambda x, w: lax.scan(lambda c, row: (c + row, c), x[0], w.T), X, weight("io", 4, 3)),
    "scan that hands its weights back": (
        lambda x, w: (lambda out: out[0] @ out[1][2])(lax.scan(lambda c, w: (jnp.tanh(c @ w), w), x, w)), X, STACK,
    ),
    "cond that hands its weight back": (
        lambda x, w: (lambda out: out[0] @ out[1])(lax.cond(x[0, 0] > 0, lambda w: (x @ w, w), lambda w: (x, w), w)),
        X, SQUARE,
    ),
    "embedding, carried by a scan": (
        lambda i, w: lax.scan(lambda c, _: (jnp.tanh(c), None), w[i], None, length=2)[0], IDS, W,
    ),
    "embedding, carried by a while": (
        lambda i, w: lax.while_loop(lambda c: c.sum() > 1, lambda c: c / 2, w[i]), IDS, W,
    ),
    "embedding of heads": (lambda i, w: jnp.tanh(w[i]), IDS, weight("ioo", 5, 2, 3)),
    "positions added": (lambda x, w: jnp.tanh(x + w[:5]), X, weight("io", 7, 4)),
    "scan, weight closed over": (
        lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0], X, SQUARE,
    ),
    "scan, weight carried": (carry(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), c[0])), X, SQUARE),
    "while": (
        lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)), X, SQUARE,
    ),
    "cond": (lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w * 2, x), X, W),
    "switch": (lambda x, w: lax.switch(jnp.int32(x[0, 0] > 9), [lambda: x @ w, lambda: x @ (2 * w)]), X, W),
    "while, weight carried": (
        lambda x, w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, w))[1],
        X, SQUARE,
    ),
    "jit": (lambda x, w: jax.jit(jnp.matmul)(x, w), X, W),
    "remat": (lambda x, w: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w), X, W),
    "custom_vjp": (with_vjp, X, W),
    "custom_jvp": (with_jvp, X, W),
    "gradient in the forward": (lambda x, w: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x), X, W),
    "scaled": (lambda x, w: x @ (w * 3 / jnp.float64(2)), X, W),
    "columns scaled": (lambda x, w: x @ (w * jnp.arange(6.0)), X, W),
    "rows scaled": (lambda x, w: x @ (w / jnp.arange(1.0, 5.0)[:, None]), X, W),
    "subtracted": (lambda x, w: x @ (1.0 - w), X, W),
    "added to itself": (lambda x, w: x @ (w + w), X, W),
    "two weights joined": (
        lambda x, w, v: x @ jnp.concatenate([w, v, jnp.ones((4, 2))], 1), X, W, weight("io", 4, 3, seed=5, path="v"),
    ),
    "split": (lambda x, w: [x @ part for part in jnp.split(w, 3, 1)], X, W),
    "padded": (lambda x, w: x @ jnp.pad(w, ((0, 0), (1, 2))), X, W),
    "reversed and strided": (lambda x, w: x @ w[::-1, ::2], X, W),
    "summed over an axis": (lambda x, w: x + w.sum(1), X, W),
    "a column is a vector": (lambda x, w: jnp.tanh(w)[:, 0] + x @ w, normal(1, 4, 4), weight("io", 4, 1)),
    "stop_gradient": (lambda x, w: x @ lax.stop_gradient(w), X, W),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_use_of_a_weight(use):
    fn, *args = USES[use]
    got = jax.jit(lambda args: eggroll.perturbed_call(fn, *args))(args)
    base = lambda args: jax.tree.map(lambda x: x.base if is_weight(x) else x, args, is_leaf=is_weight)
    expected, unperturbed = jax.jit(lambda args: (fn(*materialised(args)), fn(*base(args))))(args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert any(
        float(jnp.abs(a - b).max()) > 1e-3 for a, b in zip(*map(jax.tree.leaves, (got, unperturbed)), strict=True)
    )


@pytest.mark.parametrize(
    ("shape", "form", "dims", "options", "rank"),
    [
        ((3, 3, 4, 6), "iiio", ("NHWC", "HWIO", "NHWC"), {}, 1),
        ((3, 3, 4, 6), "iiio", ("NHWC", "HWIO", "NHWC"), {"rhs_dilation": (2, 1)}, 3),
        ((3, 3, 2, 6), "iiio", ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}, 3),
        ((3, 3, 1, 8), "iiio", ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 4}, 1),
        ((6, 4, 3, 3), "oiii", ("NCHW", "OIHW", "NCHW"), {"window_strides": (2, 1)}, 3),
        ((6, 4, 3, 3), "oiii", ("NCHW", "OIHW", "NCHW"), {"lhs_dilation": (2, 2)}, 1),
    ],
)
def test_convolution(shape, form, dims, options, rank):
    x = normal(1, 2, 7, 7, 4) if dims[0] == "NHWC" else normal(1, 2, 4, 7, 7)
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    if "lhs_dilation" in options:
        options["padding"] = [(1, 1), (1, 1)]
    conv = lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=dims, **options)
    w = weight(form, *shape, rank=rank)
    np.testing.assert_allclose(eggroll.perturbed_call(conv, x, w), conv(x, w.resolve()), rtol=1e-12, atol=1e-12)


def test_no_perturbation_is_formed():
    """The factors and the products appear, the outer product never; neither does a copy of the weight per member."""
    w = weight("io", 40, 60)
    shapes = arrays_made(lambda x, w: eggroll.perturbed_call(lambda x, w: jnp.tanh(x @ w), x, w), normal(1, 5, 40), w)
    assert (5, 60) in shapes
    assert not {s for s in shapes if np.prod(s) >= 40 * 60}


def test_a_picked_layer_is_a_weight_still():
    with pytest.raises(eggroll.PerturbationError, match="leaf 'w' .* reaches 'tanh'"):
        eggroll.perturbed_call(lambda i, w: jnp.tanh(w[i]), jnp.int32(1), STACK)


@pytest.mark.parametrize(
    ("fn", "operation"),
    [
        (lambda x, w: x @ jnp.tanh(w), "tanh"),
        (lambda x, w: x @ (w @ w), "dot_general"),
        (lambda x, w: w, "the function's output"),
        (lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c), None), w, None, length=2)[0], "tanh"),
        (lambda x, w: lax.scan(lambda c, _: (x[:4], None), w, None, length=2)[0], "scan"),
        (lambda x, w: lax.while_loop(lambda c: c[0, 0] > 0, lambda c: x[:4], w), "while"),
        (lambda x, w: jnp.tanh(w + 1), "tanh"),
    ],
)
def test_no_rule_is_an_error_that_names_leaf_and_operation(fn, operation):
    w = weight("io", 4, 4, path="block/kernel")
    with pytest.raises(eggroll.PerturbationError) as error:
        eggroll.perturbed_call(fn, X, w)
    assert "'block/kernel' [4, 4]" in str(error.value)
    assert operation in str(error.value)


def test_control_flow_that_differs_between_members_forms_no_copy_of_the_weight():
    """vmap turns a member's branch into a selection, and would broadcast whatever enters the branch or the loop's carry."""

    def fn(x, w):
        y = lax.cond(x.sum() > 0, lambda: x @ w, lambda: -x @ w)
        return lax.while_loop(lambda c: c[0].sum() > 1, lambda c: (c[0] / 2 @ c[1] / 40, c[1]), (y, w))[0]

    members = 7
    factors = LowRank(None, normal(1, members, 1, 40, 1), normal(2, members, 40, 1, 1), np.full(members, 0.1), "w")
    axes = LowRank(None, 0, 0, 0, "w")
    base = normal(3, 40, 40)
    run = lambda x, f: eggroll.perturbed_call(fn, x, LowRank(base, f.left, f.right, f.scale, "w"))
    mapped = jax.vmap(run, (0, axes))
    x = normal(4, members, 40)
    assert (members, 40, 40) not in arrays_made(mapped, x, factors)
    for n, got in enumerate(mapped(x, factors)):
        w = LowRank(base, factors.left[n], factors.right[n], factors.scale[n], "w")
        np.testing.assert_allclose(got, fn(x[n], w.resolve()), rtol=1e-12, atol=1e-12)


def test_materialisation_on_request_is_exact_and_counted():
    run = Interpreter(RULES, materialise=True)
    fn = lambda x, w: x @ jnp.tanh(w) + x @ w
    np.testing.assert_allclose(run.call(fn, X, SQUARE), fn(X, SQUARE.resolve()), rtol=1e-12)
    assert run.uses == [("w", "tanh", True), ("w", "dot_general", False)]


def test_an_unperturbed_function_is_the_function_bit_for_bit():
    fn = lambda x, w: jax.checkpoint(lambda x: jnp.tanh(x @ w).sum())(x)
    assert eggroll.perturbed_call(fn, X, W.base) == fn(X, W.base)


def test_a_cast_weight_is_cast_in_the_product():
    got = eggroll.perturbed_call(lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), X, W)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float64), X @ W.resolve(), rtol=0.03, atol=0.1)


def model(p, ids):
    def layer(h, block):
        q, k, v = (jnp.einsum("td,dhk->thk", h * block["scale"], block[name]) for name in "qkv")
        attention = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
        h = h + jnp.einsum("thk,hkd->td", jnp.einsum("hts,shk->thk", attention, v), block["o"])
        return h + jax.nn.relu(h @ block["up"] + block["b"]) @ block["down"].T, None

    return lax.scan(jax.checkpoint(layer), p["emb"][ids], p["layers"])[0] @ p["emb"].T


def test_infer_rules_reads_inputs_outputs_and_stacks():
    shapes = {"scale": (8,), "q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8), "up": (8, 16), "b": (16,)}
    params = {
        "emb": jnp.ones((11, 8)),
        "layers": {n: jnp.ones((3, *s)) for n, s in (shapes | {"down": (8, 16)}).items()},
    }
    rules = dict(eggroll.infer_rules(model, params, jnp.arange(3)))
    assert rules == {
        "^emb$": "oi",
        "^layers/b$": "full",
        "^layers/down$": "soi",
        "^layers/k$": "sioo",
        "^layers/o$": "siio",
        "^layers/q$": "sioo",
        "^layers/scale$": "full",
        "^layers/up$": "sio",
        "^layers/v$": "sioo",
    }


@pytest.mark.parametrize(
    ("fn", "shape", "form"),
    [
        (lambda p, i: jnp.tanh(p["w"][i]), (5, 3), "io"),  # an embedding
        (lambda p, i: X @ p["w"][i[0]], (3, 4, 2), "sio"),  # a layer picked by index
        (lambda p, i: jax.vmap(lambda w: X @ w)(p["w"]), (3, 4, 2), "oio"),  # one input for all: one wide matrix
        (lambda p, i: jax.vmap(lambda x, w: x @ w)(X[:3], p["w"]), (3, 4, 2), "sio"),
        (lambda p, i: X * p["w"].sum(0), (3, 4), "full"),
        (lambda p, i: lax.conv(X[None, None], p["w"], (1, 1), "SAME"), (2, 1, 3, 3), "oiii"),
        (lambda p, i: X @ p["w"].reshape(4, 6), (4, 2, 3), "ioo"),
        (lambda p, i: p["w"][i] @ X[:4], (5, 4), "io"),  # an embedding's rows are activations
        (lambda p, i: lax.scan(lambda c, _: (jnp.tanh(c), None), p["w"][i], None, length=2)[0], (5, 3), "io"),
        (lambda p, i: (X.reshape(5, 2, 2) + p["w"]).reshape(5, 4) @ X.T, (2, 2), "full"),  # a bias of heads
        (lambda p, i: (X.reshape(5, 2, 2) * p["w"][None]).reshape(5, 4) @ X.T, (2, 2), "full"),  # a scale of heads
    ],
)
def test_infer_rules_for_one_use(fn, shape, form):
    assert eggroll.infer_rules(fn, {"w": jnp.ones(shape)}, jnp.array([1, 0])) == (("^w$", form),)
