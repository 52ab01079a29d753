"""Every optimizer makes the steps of its twin in NumPy: 50 steps, refreshes among them, lists of layers and stacks of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rl.optim
from rl.optim import blocks, groups, projection
from rl.optim.adam8bit import BOOKS, Adam8bitState
from rl.optim.apollo import basis
from rl.optim.fira import FiraState
from rl.optim.frugal import SplitState
from rl.optim.ldadam import LDAdamState
from tests.rl.optim import twins

STEPS, EVERY, LR, DECAY, SEED = 50, 7, 0.02, 0.3, 5
WIDTH, HIDDEN, VOCAB, STACK = 8, 11, 13, 4
# A large eps shows where it stands; 1 - b2 of 0.999 has an error of 1e-5 in f32.
BETAS, EPS = (0.8, 0.95), 0.1
TOLERANCE = 1e-5
COMMON = {"b1": BETAS[0], "b2": BETAS[1], "eps": EPS, "weight_decay": DECAY}
LAYER = {
    "query/kernel": (WIDTH, WIDTH),
    "up/kernel": (WIDTH, HIDDEN),
    "up/bias": (HIDDEN,),
    "down/kernel": (HIDDEN, WIDTH),
    "norm/scale": (WIDTH,),
}
EMBEDDING = {"embed/embedding": (VOCAB, WIDTH)}
TREES = {
    "list": EMBEDDING | {f"layer_{10 if name[0] in 'dn' else 2}/{name}": shape for name, shape in LAYER.items()},
    "three": EMBEDDING | {f"layer_{i}/{name}": shape for i in (10, 2, 7) for name, shape in LAYER.items()},
    "stack": EMBEDDING | {f"layers/{name}": (STACK, *shape) for name, shape in LAYER.items()},
    "coded": EMBEDDING | {"up/kernel": (64, 66), "up/bias": (66,), "small/kernel": (20, 15)},
}


def nested(flat):
    tree = {}
    for path, x in flat.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = x
    return tree


def flat(tree):
    return {path: np.asarray(x) for path, x in groups.leaves(tree)}


def initial(shapes):
    rng = np.random.default_rng(1)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def gradients(shapes):
    """Noise around a mean, its size changing from step to step; matrices with singular values well apart."""
    rng = np.random.default_rng(2)
    mean = {path: 0.3 * rng.normal(size=shape) for path, shape in shapes.items()}
    for _ in range(STEPS):
        size = np.exp(0.5 * rng.normal())
        out = {}
        for path, shape in shapes.items():
            g = mean[path] + rng.normal(size=shape)
            if path.endswith("kernel") and max(shape) < 50:
                u, s, vh = np.linalg.svd(g, full_matrices=False)
                g = u * (3 * 0.8 ** np.arange(s.shape[-1])) @ vh
            if "embed" in path:
                g[rng.integers(len(g), size=4)] = 0  # tokens that were not there
            if path == "up/kernel":
                g[:5] = 0  # a block of 256 that never moves
            out[path] = (size * g).astype(np.float32)
        yield out


def found(state, kind):
    return next(x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind))


def compare(tree, tx, twin, drawn=lambda t, before, after: {}, tolerance=TOLERANCE, wide=False):
    """Steps of both from the same parameters, each with its own memory; what was drawn is read from states around a step."""
    dtype = np.float64 if wide else np.float32
    params = nested({path: jnp.asarray(x, dtype) for path, x in initial(TREES[tree]).items()})
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    for t, gradient in enumerate(gradients(TREES[tree])):
        before = state
        params, state, updates = step(params, state, nested({path: dtype(g) for path, g in gradient.items()}))
        expected = twin.step(gradient, drawn(t, before, state))
        for path, got in flat(updates).items():
            assert_near(got / LR, expected[path] / LR, tolerance, f"step {t} of {path}")
    for path, got in flat(params).items():
        assert_near(got, twin.params[path], tolerance, path)
    return state


def assert_near(got, expected, tolerance, name):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def made(cls, tree, group=(), **settings):
    return cls(initial(TREES[tree]), LR, DECAY, betas=BETAS, eps=EPS, groups=group, **settings)


def at_refreshes(draw):
    return lambda t, before, after: draw(t // EVERY, after) if t % EVERY == 0 else {}


def stored(kind):
    return at_refreshes(lambda window, state: found(state, kind).stored)


def by_window(draw):
    """A draw of the library's for every window, in one program."""
    all_ = jax.jit(jax.vmap(draw))(jnp.arange(-(-STEPS // EVERY)))
    all_ = {name: np.asarray(x) for name, x in all_.items()}
    return lambda window, state: {name: x[window] for name, x in all_.items()}


def coordinates(kind, density, shapes):
    """What the projection takes of matrices that hold the numbers of their entries."""
    numbers = {
        path: jnp.broadcast_to(jnp.arange(np.prod(shape[-2:])).reshape(shape[-2:]), shape)
        for path, shape in shapes.items()
    }
    project = getattr(projection, kind)(density, SEED)
    return by_window(lambda window: project.down(project.where({}, window, numbers), numbers))


def tensors(density, order, shapes):
    families = blocks.by_shape(density)({path: jnp.zeros(shape) for path, shape in shapes.items()})
    return by_window(lambda window: {f.shape: blocks.active(f, order, window, SEED) for f in families})


FRUGAL = {
    "block random": ("three", {
        "projection": "block", "density": 2 / 3, "split_scale": 0.3, "free_scale": 0.5, "group": {"norm/scale": "split"},
    }),
    "block descending": ("three", {
        "projection": "block", "density": 2 / 3, "order": "descending", "state": "project", "free": "sgd",
    }),
    "block mirror": ("stack", {"projection": "block", "density": 0.75, "order": "mirror", "state": "project"}),
    "block reshuffled": ("stack", {
        "projection": "block", "density": 0.5, "order": "reshuffled", "full": "momentum", "free": "none",
    }),
    "columns": ("list", {
        "projection": "columns", "density": 0.4, "free_scale": 0.5, "split_scale": 0.3, "group": {"embed": "split"},
    }),
    "columns project": ("stack", {"projection": "columns", "density": 0.6, "state": "project", "free": "sgd"}),
    "rows lion": ("list", {
        "projection": "rows", "density": 0.3, "full": "lion", "split_scale": 0.3, "free_scale": 0.5, "free": "sgd",
        "group": {"query": "free", "up/bias": "frozen"},
    }),
    "permutation": ("list", {"projection": "permutation", "density": 0.45, "free": "none"}),
    "randk project": ("list", {"projection": "randk", "density": 0.35, "state": "project"}),
    "randk momentum": ("stack", {"projection": "randk", "density": 0.35, "full": "momentum"}),
    "svd keep": ("list", {"projection": "svd", "density": 0.4, "state": "keep", "free_scale": 0.5}),
    "svd long": ("stack", {
        "projection": "svd", "density": 0.4, "side": "long", "state": "project", "full": "lion", "free": "sgd",
    }),
    "random": ("stack", {"projection": "random", "density": 0.55}),
    "random full": ("list", {"projection": "random", "density": 1.0, "side": "right", "state": "project", "full": "momentum"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FRUGAL)
def test_frugal(name):
    tree, settings = FRUGAL[name]
    settings = settings | {"every": EVERY}
    kind, density, order = settings.pop("projection"), settings["density"], settings.get("order", "random")
    rules = tuple(settings.pop("group", {}).items())
    group = {path: name for path in TREES[tree] for pattern, name in rules if pattern in path}
    twin = made(twins.Frugal, tree, group, kind=kind, **settings)
    split = {path: shape for path, shape in TREES[tree].items() if twin.groups[path] == "split"}
    if kind == "block":
        drawn = tensors(density, order, split) if order in ("random", "reshuffled") else lambda window, state: {}
    elif kind in ("columns", "rows", "permutation"):
        drawn = coordinates(kind, density, split)
    else:
        drawn = lambda window, state: found(state, SplitState).stored
    tx = rl.optim.frugal(LR, projection=kind, rules=rules, seed=SEED, **settings, **COMMON)
    compare(tree, tx, twin, at_refreshes(drawn))


@pytest.mark.parametrize(("tree", "side"), [("list", "short"), ("stack", "left")])
def test_galore(tree, side):
    settings = {"rank": 3, "every": EVERY, "scale": 0.6, "side": side}
    tx = rl.optim.galore(LR, **settings, **COMMON)
    compare(tree, tx, made(twins.Galore, tree, **settings), stored(SplitState))


@pytest.mark.parametrize(("tree", "side"), [("list", "short"), ("stack", "long")])
def test_fira(tree, side):
    settings = {"rank": 3, "every": EVERY, "scale": 0.6, "side": side}
    compare(tree, rl.optim.fira(LR, **settings, **COMMON), made(twins.Fira, tree, **settings), stored(FiraState))


@pytest.mark.parametrize(
    ("tree", "settings"),
    [
        ("list", {"rank": 3, "scale": 0.6}),
        ("stack", {"rank": 2, "scale": 0.6, "side": "long"}),
        ("stack", None),
    ],
)
def test_apollo(tree, settings):
    mini = {"rank": 1, "scale": 128.0, "kind": "tensor"}
    make = rl.optim.apollo if settings else rl.optim.apollo_mini
    tx = make(LR, every=EVERY, seed=SEED, **settings or {}, **COMMON)
    settings = settings or mini
    right = lambda m, n: twins.columns_projected(settings.get("side", "short"), m, n)
    sizes = {
        path: (*shape[:-2], shape[-1] if right(*shape[-2:]) else shape[-2])
        for path, shape in TREES[tree].items()
        if path.endswith("kernel")
    }
    drawn = by_window(
        lambda window: {path: basis(path, size, settings["rank"], window, SEED) for path, size in sizes.items()}
    )
    compare(tree, tx, made(twins.Apollo, tree, every=EVERY, **settings), at_refreshes(drawn))


@pytest.mark.parametrize(("tree", "feedback", "wide"), [("list", True, True), ("stack", False, False)])
def test_ldadam(tree, feedback, wide):
    """In f64: every step's basis and variances come of the last, and rounding of 1e-7 grows to 1e-5, with feedback to 5e-4."""
    settings = {"rank": 3, "rho": 0.7, "error_feedback": feedback}
    first = lambda t, before, after: flat(found(before, LDAdamState).basis) if t == 0 else {}
    tx = rl.optim.ldadam(LR, seed=SEED, **settings, **COMMON)
    with jax.enable_x64(wide):
        compare(tree, tx, made(twins.LDAdam, tree, **settings), first, 1e-9 if wide else 1e-4, wide)


@pytest.mark.parametrize(("tree", "active", "order"), [("three", 2, "descending"), ("stack", 3, "reshuffled")])
def test_badam(tree, active, order):
    settings = {"active": active, "every": EVERY, "order": order}
    rules = (("embed", "frozen"),) if tree == "stack" else ()
    group = {"embed/embedding": "frozen"} if rules else {}
    inside = {path: jnp.zeros(shape) for path, shape in TREES[tree].items() if path.startswith("layer")}
    family = blocks.by_role(active, r"layer_\d+")(inside)[0]
    numbers = lambda window: {"active": blocks.active(family, order, window, SEED)}
    drawn = by_window(numbers) if order == "reshuffled" else lambda window, state: {}
    tx = rl.optim.badam(LR, seed=SEED, rules=rules, **settings, **COMMON)
    compare(tree, tx, made(twins.BAdam, tree, group, **settings), at_refreshes(drawn))


@pytest.mark.parametrize(
    ("tree", "rules"),
    [("list", (("query", "heads:4"),)), ("stack", (("query", "tensor"), ("down", "in"), ("scale", "element")))],
)
def test_adam_mini(tree, rules):
    group = {path: name for path in TREES[tree] for pattern, name in rules if pattern in path}
    tx = rl.optim.adam_mini(LR, rules=rules, **COMMON)
    compare(tree, tx, made(twins.AdamMini, tree, group))


def test_adam8bit():
    twin = made(twins.Adam8bit, "coded", {"small/kernel": "coded"})
    paths = [path for path, group in twin.groups.items() if group == "coded"]
    assert paths == ["up/kernel", "small/kernel"]
    for signed, table in zip((True, False), twin.books, strict=True):
        assert table.shape == (256,)
        np.testing.assert_allclose(BOOKS[signed], table, rtol=1e-6)

    def codes(t, before, after):
        own = found(after, Adam8bitState)
        mu, nu = dict(groups.leaves(own.mu)), dict(groups.leaves(own.nu))
        return {path: (np.asarray(mu[path]), np.asarray(nu[path])) for path in paths}

    state = compare("coded", rl.optim.adam8bit(LR, rules=(("small", "coded"),), **COMMON), twin, codes)
    own = found(state, Adam8bitState)
    for i, (kept, scale) in enumerate(((own.mu, own.mu_scale), (own.nu, own.nu_scale))):
        for path in paths:
            first = path.split("/")[0]
            np.testing.assert_array_equal(kept[first]["kernel"], twin.own[path][i][0])
            np.testing.assert_allclose(scale[first]["kernel"], twin.own[path][i][1], rtol=1e-6)
    assert twin.settled < 1e-4 * STEPS * 2 * 64 * 66
