"""Bad settings and trees: a clear error, or the right behaviour."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import optim
from tests.rl.optim.cases import MAKERS, tree

init = lambda tx, params=None: tx.init(tree() if params is None else params)
SCHEDULE = optax.constant_schedule(0.5)
SETTINGS = {
    "density must be from 0 to 1; got 1.5": lambda: optim.frugal(0.1, 1.5),
    "density must be from 0 to 1; got -0.1": lambda: optim.frugal(0.1, -0.1),
    "density must be a plain number, because the shapes": lambda: optim.frugal(0.1, SCHEDULE),
    "every must be from 1 to inf; got 0": lambda: optim.frugal(0.1, every=0),
    "every must be a plain number": lambda: optim.galore(0.1, 2, every=SCHEDULE),
    "rank must be from 1 to inf; got 0": lambda: optim.galore(0.1, 0),
    "rank must be a plain number.*got True": lambda: optim.apollo(0.1, True),
    "projection must be one of block, columns, .*; got 'col'": lambda: optim.frugal(0.1, projection="col"),
    "order must be one of ascending, .*; got 'up'": lambda: optim.frugal(0.1, order="up"),
    "side must be one of short, long, left, right; got 'top'": lambda: optim.fira(0.1, 2, side="top"),
    "full must be one of adam, lion, momentum; got 'sgd'": lambda: optim.frugal(0.1, full="sgd"),
    "free must be one of sign, sgd, none; got 'adam'": lambda: optim.frugal(0.1, free="adam"),
    "state must be one of reset, project, keep; got 'drop'": lambda: optim.frugal(0.1, state="drop"),
    "state 'project' of full 'adam' needs .* got projection 'svd'": lambda: optim.frugal(
        0.1, projection="svd", state="project"
    ),
    "state 'keep' .* other coordinates .* got projection 'columns'": lambda: optim.frugal(
        0.1, projection="columns", state="keep"
    ),
    "rank must be a whole number; got 4.0": lambda: optim.galore(0.1, 4.0),
    "order must be one of .*; got 'down'": lambda: optim.frugal(0.1, projection="rows", order="down"),
    "mask must be a function": lambda: optim.badam(0.1, mask={"w": True}),
    "kind must be one of channel, tensor; got 'row'": lambda: optim.apollo(0.1, 2, kind="row"),
    "active must be from 1": lambda: optim.badam(0.1, active=0),
}
TREES = {
    r"rule \('q_proj', 'full'\) matches none of 9 paths, such as embed/embedding": lambda: init(
        optim.frugal(0.1, 0.5, rules=(("q_proj", "full"),))
    ),
    r"rule \('embed', 'adam'\) must name one of the groups full, split, free, frozen": lambda: init(
        optim.frugal(0.1, 0.5, rules=(("embed", "adam"),))
    ),
    r"rank must be at most a matrix's smaller side; got 9 for layer_0/back/kernel of shape \(12, 8\)": lambda: init(
        optim.galore(0.1, 9)
    ),
    "rank must be at most a matrix's smaller side; got 9": lambda: init(optim.apollo(0.1, 9)),
    "rank must be at most a matrix's smaller side; got 10": lambda: init(optim.ldadam(0.1, 10)),
    r"projections need matrices; layer_0/norm/scale has shape \(8,\)": lambda: init(
        optim.frugal(0.1, 0.5, projection="columns", rules=(("scale", "split"),))
    ),
    "projections need matrices; layer_0/dense/bias": lambda: init(optim.fira(0.1, 2, rules=(("bias", "split"),))),
    r"density 0.2 of 2 tensors of shape \(12,\) rounds to none": lambda: init(
        optim.frugal(0.1, 0.2, rules=(("bias", "split"),))
    ),
    "pattern .* finds no block in paths such as embed/embedding": lambda: init(optim.badam(0.1, pattern="stage")),
    "weight decay needs the current value of parameters": lambda: optim.badam(0.1, weight_decay=0.1).update(
        tree(), optim.badam(0.1, weight_decay=0.1).init(tree())
    ),
    r"real numbers; got a leaf complex64\[2, 2\]": lambda: init(
        optim.fira(0.1, 2), {"w": jnp.ones((2, 2), jnp.complex64)}
    ),
    r"blocks 'heads:4' are of columns .* q/kernel has shape \(8, 4, 6\)": lambda: init(
        optim.adam_mini(0.1, rules=(("q", "heads:4"),)), {"q": {"kernel": jnp.ones((8, 4, 6))}}
    ),
    "blocks 'out' are of matrices; layer_0/norm/scale": lambda: init(optim.adam_mini(0.1, rules=(("scale", "out"),))),
    "columns must divide into heads; got 12 .* and 5 heads": lambda: init(
        optim.adam_mini(0.1, rules=(("dense/kernel", "heads:5"),))
    ),
    "active must be at most the number of blocks; got 3 of 2": lambda: init(optim.badam(0.1, active=3)),
    "embed/embedding is in no block of pattern": lambda: init(optim.badam(0.1, rules=(("embed", "block"),))),
    "blocks must be alike to share a slot": lambda: init(
        optim.badam(0.1), {"layer_0": {"w": jnp.ones((2, 3))}, "layer_1": {"w": jnp.ones((3, 3))}}
    ),
    "blocks must have the same parameters": lambda: init(
        optim.badam(0.1), {"layer_0": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "layer_1": {"w": jnp.ones((2, 3))}}
    ),
}


@pytest.mark.parametrize("message", (*SETTINGS, *TREES))
def test_an_error_says_what_is_wrong(message):
    with pytest.raises(ValueError, match=message):
        (SETTINGS | TREES)[message]()


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_tree_is_fine(name):
    maker = MAKERS[name] if name != "adam8bit" else optim.adam8bit
    tx = maker(0.1)
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


@pytest.mark.slow
def test_frozen_leaves_stay_and_do_not_decay():
    rows = functools.partial(optim.frugal, projection="rows")
    for maker in (rows, functools.partial(optim.galore, rank=2), optim.adam_mini, optim.adam8bit):
        tx = maker(0.1, weight_decay=0.5, rules=(("layer_0|embed", "frozen"),))
        updates, state = tx.update(tree(1), tx.init(tree()), tree())
        assert all(not np.any(x) for x in jax.tree.leaves((updates["layer_0"], updates["embed"])))
        assert all(np.any(x) for x in jax.tree.leaves(updates["layer_1"]))
        assert optim.report(tx, tree()).parameters["embed/embedding"] == 0


def test_free_leaves_move_by_sign_without_state():
    tx = optim.frugal(0.1, 0.5, rules=(("embed", "free"),), split_scale=0.5, free_scale=0.5)
    updates, _ = tx.update(tree(1), tx.init(tree()), tree())
    np.testing.assert_allclose(
        updates["embed"]["embedding"], -0.025 * np.sign(tree(1)["embed"]["embedding"]), rtol=1e-6
    )
    assert optim.report(tx, tree()).parameters["embed/embedding"] == 0


def test_a_stack_of_vectors_is_no_matrix():
    params = {"layers": {"norm": {"scale": jnp.ones((4, 8))}, "w": {"kernel": jnp.ones((4, 8, 8))}}}
    report = optim.report(optim.frugal(0.1, 0.25), params)
    assert report.parameters["layers/norm/scale"] == 8 * 32  # AdamW
    assert report.groups["split"] == 8 * 64 + 2 * 4  # one layer's kernel, and two counters


def test_leaves_below_a_numbered_layer_are_no_stack():
    params = {"layers": {0: {"kernel": jnp.ones((8, 4))}, 1: {"kernel": jnp.ones((8, 4))}}}
    assert optim.report(optim.frugal(0.1, 0.5), params).groups["split"] == 8 * 32 + 2 * 4
