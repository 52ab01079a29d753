"""Trees and wrappers of other people's programs: whatever holds the parameters, and whatever optax puts around."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rl import optim
from rl.optim import groups, projection
from tests.rl.optim.cases import MAKERS, tree

shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kernel", "bias"), meta_fields=())
@dataclasses.dataclass
class Layer:
    """A layer."""

    kernel: jax.Array
    bias: jax.Array


def holders():
    """The same two layers in several kinds of tree: (the tree, its first kernel)."""
    kernel, bias = jnp.full((8, 12), 0.5), jnp.full(12, 0.5)
    return {
        "tuples": (((kernel, bias), (kernel, bias)), lambda t: t[0][0]),
        "lists": ([[kernel, bias], [kernel, bias]], lambda t: t[0][0]),
        "dataclasses": ([Layer(kernel, bias), Layer(kernel, bias)], lambda t: t[0].kernel),
        "with nothing": ({"a": [kernel, None], "b": [kernel, bias]}, lambda t: t["a"][0]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ("frugal_columns", "adam_mini", "adam8bit"))
def test_any_tree_has_the_steps_of_a_dict(name):
    tx = MAKERS[name](1e-2) if name != "adam8bit" else optim.adam8bit(1e-2)
    plain = {"a": {"kernel": jnp.full((8, 12), 0.5)}, "b": {"kernel": jnp.full((8, 12), 0.5)}}
    wanted, _ = tx.update(plain, tx.init(plain), plain)
    for kind, (params, first) in holders().items():
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params), kind
        np.testing.assert_allclose(first(updates), wanted["a"]["kernel"], rtol=1e-5)
        assert optim.report(tx, params).total == sum(x.nbytes for x in jax.tree.leaves(state))


class Model(nnx.Module):
    """Two layers of each shape."""

    def __init__(self):
        make = lambda i, o: nnx.Linear(i, o, rngs=nnx.Rngs(0))
        self.layer_0, self.layer_1, self.back_0, self.back_1 = make(8, 12), make(8, 12), make(12, 8), make(12, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("frugal_block", "apollo", "adam_mini", "adam8bit"))
def test_a_flax_optimizer_steps_several_times(name):
    tx = optim.adam8bit(1e-2, rules=(("kernel", "coded"),)) if name == "adam8bit" else MAKERS[name](1e-2)
    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    plain = nnx.state(model, nnx.Param)
    state = tx.init(plain)
    for i in range(3):
        gradients = jax.tree.map(lambda x, i=i: jnp.cos(x * (i + 2)), plain)
        updates, state = tx.update(gradients, state, plain)
        plain = optax.apply_updates(plain, updates)
        optimizer.update(model, gradients)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, nnx.state(model, nnx.Param), plain)


def test_names_of_embeddings_and_output_layers():
    lookup = (
        *(
            "embed/embedding",
            "tok_emb",
            "params/pos_emb/kernel",
            "wte",
            "lm_head/kernel",
            "value_head/kernel",
            "head/w",
        ),
        *("logits_dense/kernel", "output/kernel", "params/output_layer/kernel", "classifier/kernel", "emb/w"),
    )
    linear = ("layer_0/attention/output/kernel", "layer_0/member/kernel", "heads/0/kernel", "dense/kernel", "remb/w")
    assert [path for path in lookup if not groups.is_lookup(path)] == []
    assert [path for path in linear if groups.is_lookup(path)] == []


def test_what_is_taken_for_the_weight_of_a_linear_layer():
    params = {
        "attention": {"query": {"kernel": shape(64, 4, 16), "bias": shape(4, 16)}, "out": {"kernel": shape(4, 16, 64)}},
        "conv": {"kernel": shape(3, 3, 8, 8)},
        "dense": {"kernel": shape(64, 64), "bias": shape(64)},
        "experts_up": shape(5, 64, 32),
        "layers": {
            "norm1": {"scale": shape(2, 64)},
            "up": {"kernel": shape(2, 64, 64)},
            "experts_up": shape(2, 5, 64, 32),
        },
    }
    found = {path for path, leaf in groups.leaves(params) if groups.is_linear(path, leaf)}
    assert found == {"dense/kernel", "experts_up", "layers/up/kernel", "layers/experts_up"}
    report = optim.report(optim.adam_mini(0.1), params).parameters
    assert report["attention/query/kernel"] == 8 * 64 * 64 and report["dense/kernel"] == 4 * 64 * 64 + 4 * 64


@pytest.mark.parametrize("name", ("0", "layer_0", "block0", "EncoderBlock_0"))
def test_numbered_layers_below_layers_are_no_stack(name):
    params = {"layers": {name.replace("0", str(i)): {"kernel": jnp.ones((8, 4))} for i in range(4)}}
    assert optim.report(optim.frugal(0.1), params).groups["split"] == 8 * 32 + 2 * 4  # one of four
    if name != "0":
        tx = optim.badam(1.0)
        updates, _ = tx.update(params, tx.init(params), params)
        assert sorted(np.count_nonzero(x) for x in jax.tree.leaves(updates)) == [0, 0, 0, 32]


@pytest.mark.parametrize("name", ("TransformerBlock_{}", "h/{}", "blocks/{}", "model/layers/{}"))
def test_blocks_are_found_by_their_usual_names(name):
    params = {}
    for i in range(3):
        here, (*front, last) = params, name.format(i).split("/")
        for key in front:
            here = here.setdefault(key, {})
        here[last] = {"mlp": {"layers": {"0": {"kernel": jnp.ones((4, 4))}, "1": {"kernel": jnp.ones((4, 2))}}}}
    assert optim.report(optim.badam(0.1), params).groups["block"] == 8 * 24 + 2 * 4
    with pytest.raises(ValueError, match="finds no block in paths such as path/0, path/1"):
        optim.badam(0.1).init({"path": [jnp.ones((4, 4))] * 2})


def test_matrices_of_a_rare_shape_take_columns():
    params = {"Dense_0": {"kernel": jnp.ones((64, 16)), "bias": jnp.ones(16)}, "Dense_1": {"kernel": jnp.ones((16, 8))}}
    params |= {f"same_{i}": {"kernel": jnp.ones((4, 4))} for i in range(4)}
    tx = optim.frugal(1.0, 0.25)
    sizes = {"full": 8 * 16 + 4, "split": 8 * (64 * 4 + 16 * 2 + 16) + 2 * 4}
    assert {name: size for name, size in optim.report(tx, params).groups.items() if size} == sizes
    gradient = jax.tree.map(lambda x: 3 * x, params)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):  # every weight moves by one learning rate, by sign and by Adam alike
        updates, state = update(gradient, state, params)
        jax.tree.map(lambda u: np.testing.assert_allclose(u, -1, rtol=1e-5), updates)


@pytest.mark.parametrize(
    "name", ("frugal_rows", "galore", "badam", "fira", "ldadam", "apollo_mini", "adam_mini", "adam8bit")
)
def test_a_mask_says_what_decays(name):
    kernels = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path), tree)
    make = lambda **settings: MAKERS[name](1.0, **settings)
    some, none, everything = make(weight_decay=0.5, mask=kernels), make(), make(weight_decay=0.5)
    first = lambda tx: tx.update(tree(1), tx.init(tree()), tree())[0]
    for (path, a), (_, b), (_, c) in zip(*(groups.leaves(first(tx)) for tx in (some, none, everything)), strict=True):
        np.testing.assert_array_equal(a, c if "kernel" in path else b)
        assert np.any(b != c) or (name == "badam" and "layer" in path)
    if name != "badam":
        same = make(weight_decay=0.5, mask=kernels(tree()))
        jax.tree.map(np.testing.assert_array_equal, first(same), first(some))


def test_weight_decay_may_be_a_schedule_of_a_block():
    params = {"layer_0": {"w": jnp.ones((2, 2))}}
    tx = optim.badam(1.0, weight_decay=lambda count: 0.1 * (count + 1))
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for wanted in (-0.1, -0.2):
        updates, state = tx.update(zero, state, params)
        np.testing.assert_allclose(updates["layer_0"]["w"], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_the_report_sees_through_what_optax_puts_around(name):
    tx, params = MAKERS[name](1e-2), tree()
    inner, gradients = optim.report(tx, params), sum(x.nbytes for x in jax.tree.leaves(params))
    several = jax.eval_shape(optax.MultiSteps(tx, 2).init, params)
    counters = sum(np.prod(x.shape, dtype=int) * x.dtype.itemsize for x in jax.tree.leaves(several._replace(
        inner_opt_state=None, acc_grads=None
    )))  # fmt: skip
    assert optim.report(optax.MultiSteps(tx, 2), params).total == inner.total + gradients + counters
    masked = optax.masked(tx, {"embed": False, "layer_0": True, "layer_1": True})
    assert optim.report(masked, params).total == inner.total - inner.parameters["embed/embedding"]
    updates, _ = masked.update(tree(1), masked.init(params), params)
    np.testing.assert_array_equal(updates["embed"]["embedding"], tree(1)["embed"]["embedding"])


def test_doubles_keep_f32_codes():
    with jax.enable_x64(True):
        params = {"w": jnp.ones((16, 32), jnp.float64)}
        tx = optim.scale_by_adam8bit()
        _, after = tx.update(params, tx.init(params))
        kinds = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert kinds(after) == kinds(tx.init(params))


@pytest.mark.slow
def test_numbers_and_matrices_of_no_size():
    params = {"temperature": 1.0, "w": jnp.ones((0, 8)), "v": jnp.ones((8, 4))}
    for tx in (optim.frugal(0.1, projection="columns"), optim.adam_mini(0.1), optim.adam8bit(0.1)):
        updates, state = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(updates["temperature"], -0.1, rtol=1e-5)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_memory_of_a_single_array_is_carried_over():
    bare = optim.scale_by_split(projection.columns(0.5), optax.scale_by_adam(), jnp.sign, every=1, state="project")
    w, held = jnp.ones((4, 4)), bare.init(jnp.ones((4, 4)))
    for _ in range(3):
        updates, held = bare.update(w, held)
    assert np.isfinite(updates).all() and held.inner.mu.shape == (4, 2) and held.inner.count == 3


@pytest.mark.slow
def test_seeds_may_be_negative():
    for tx in (optim.apollo_mini(0.1, seed=-1), optim.frugal(0.1, 0.5, seed=-1), optim.ldadam(0.1, 2, seed=-1)):
        assert np.any(tx.update(tree(1), tx.init(tree()), tree())[0]["layer_0"]["dense"]["kernel"])
