"""Members over devices: numbers that do not depend on how many there are, work that divides, and what is sent."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import eggroll
import kernels
from eggroll import sharding
from kernels import dispatch
from tests.eggroll.test_strategy import assert_trees_close, make, normal

DESIGNS = {"antithetic": eggroll.antithetic(64), "crossed": eggroll.crossed(64)}
_SENT = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "u8": 1, "u64": 8, "s64": 8, "bf16": 2}


PARAMS = {"w": normal(0, 4, 8).astype(jnp.float32), "b": normal(1, 8).astype(jnp.float32)}
ROW = normal(2, 1, 4).astype(jnp.float32)


def score(p, row):
    return jnp.sum(jnp.tanh(row @ p["w"] + p["b"]))


def devices(*sizes, names=("members", "tensor")):
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), names[: len(sizes)])


@functools.cache
def generation(design, count, **settings):
    """(state, compiled evaluation, compiled update) on so many devices."""
    mesh = devices(count) if count else None
    es = make(DESIGNS[design], mesh=mesh, **settings)
    state = es.init(PARAMS, jax.random.key(0))
    evaluate = jax.jit(lambda s: es.evaluate(s, score, ROW)).lower(state).compile()
    return state, evaluate, jax.jit(es.update).lower(state, evaluate(state)).compile()


def sent(compiled):
    """[(kind, bytes of its result)] of every collective of a program."""
    found = []
    for shapes, kind, _ in _SENT.findall(compiled.as_text()):
        sizes = [
            _BYTES[t] * math.prod(map(int, filter(None, d.split(","))))
            for t, d in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        found.append((kind, sum(sizes)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("design", "count"), [("antithetic", 8), ("crossed", 8), ("crossed", 2)])
def test_members_in_chunks_give_the_same_bits_on_any_number_of_devices(design, count):
    state, evaluate, update = generation(design, 0, chunk=8)
    scores, (after, metrics) = evaluate(state), update(state, evaluate(state))
    spread, *programs = generation(design, count, chunk=8)
    got = programs[0](spread)
    np.testing.assert_array_equal(got, scores)
    assert got.sharding.is_fully_replicated and np.ptp(np.asarray(scores)) > 0.1
    new, measured = programs[1](spread, got)
    jax.tree.map(
        np.testing.assert_array_equal, (new.params, new.opt_state, measured), (after.params, after.opt_state, metrics)
    )
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(new)} == {count}


def test_a_schedule_of_sigma_gives_the_same_bits_too():
    """One that stays where it is, which the compiler sees on one device and not on several."""
    settings = {"sigma": optax.exponential_decay(0.05, 1, 1.0), "chunk": 8}
    fitness = normal(4, 64).astype(jnp.float32)
    after = []
    for mesh in (None, devices(8)):
        es = make(DESIGNS["crossed"], mesh=mesh, **settings)
        after.append(jax.jit(es.update)(es.init(PARAMS, jax.random.key(0)), fitness))
    jax.tree.map(np.testing.assert_array_equal, *((state.params, state.opt_state) for state, _ in after))


@pytest.mark.slow
@pytest.mark.parametrize("design", ["antithetic", "crossed"])
def test_what_is_sent_is_the_scores(design):
    _, evaluate, update = generation(design, 8, chunk=8)
    assert sent(evaluate) == [("all-gather", 4 * 64)] and sent(update) == []
    _, _, reduced = generation(design, 8, chunk=8, sums="reduced")
    kinds, sizes = zip(*sent(reduced), strict=True)
    assert set(kinds) == {"all-reduce"} and sum(sizes) == 4 * sum(x.size for x in jax.tree.leaves(PARAMS))


@pytest.mark.slow
@pytest.mark.parametrize(("design", "count"), [("antithetic", 8), ("crossed", 8)])
def test_sums_of_parts_are_the_sums(design, count):
    state, evaluate, update = generation(design, 0, chunk=8)
    scores = evaluate(state)
    alone = update(state, scores)[0].params
    spread, _, reduced = generation(design, count, chunk=8, sums="reduced")
    scores = jax.device_put(scores, NamedSharding(devices(count), PartitionSpec()))
    assert_trees_close(reduced(spread, scores)[0].params, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["antithetic", "crossed"])
def test_evaluation_divides(design):
    """Operations of a device, times devices."""
    params = {"w": normal(0, 64, 64).astype(jnp.float32)}
    batch = jax.ShapeDtypeStruct((64, 16, 64), jnp.float32)
    flops = {}
    for count in (1, 8):
        es = make(DESIGNS[design], mesh=devices(count))
        work = jax.jit(lambda s, b, es=es: es.evaluate(s, lambda p, x: (x @ p["w"]).sum(), b, per_member=True))
        flops[count] = work.lower(es.init(params, jax.random.key(0)), batch).compile().cost_analysis()["flops"]
    np.testing.assert_allclose([flops[count] * count for count in flops], flops[1], rtol=0.1)


@pytest.mark.slow
def test_rows_of_their_own_and_results_besides_scores_find_their_members():
    es = make(eggroll.Population(2, 4, 2, 2))  # eight devices divide blocks, columns and rows
    state, own = es.init(PARAMS, jax.random.key(0)), normal(3, 32, 2, 4).astype(jnp.float32)
    run = lambda es: jax.jit(
        lambda s: es.evaluate(s, lambda p, x: (score(p, x), x + p["b"][:4]), own, has_aux=True, per_member=True)
    )
    want = run(es)(state)
    for mesh in (devices(4), devices(2, 4, names=("a", "b"))):
        spread = dataclasses.replace(es, mesh=mesh, axes=mesh.axis_names)
        assert_trees_close(run(spread)(spread.init(PARAMS, jax.random.key(0))), want, rtol=1e-5, atol=1e-6)


def scored_step(es, state):
    scores = es.evaluate(state, score, ROW)
    return scores, es.update(state, scores)[0]


@functools.cache
def alone():
    """The scores and the state after a step on one device."""
    es = make(DESIGNS["crossed"])
    return jax.jit(functools.partial(scored_step, es))(es.init(PARAMS, jax.random.key(0)))


@pytest.mark.slow
@pytest.mark.parametrize("sums", ["rebuilt", "reduced"])
def test_weights_may_be_divided_too(sums):
    """Members over two devices, the columns of their matrix over four: no device holds more than a quarter of it."""
    layout = (("w$", PartitionSpec(None, "tensor")),)
    mesh = devices(2, 4)
    scores, after = alone()
    es = make(DESIGNS["crossed"], mesh=mesh, axes=("members",), layout=layout, sums=sums)
    step = jax.jit(functools.partial(scored_step, es))
    spread, state = step(es.init(PARAMS, jax.random.key(0)))
    assert_trees_close((spread, state.params), (scores, after.params), rtol=1e-6, atol=1e-6)
    moments = state.opt_state[0]
    for tree in (state.params, moments.mu, moments.nu):
        assert tree["w"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "tensor")), 2)
        assert tree["w"].addressable_shards[0].data.shape == (4, 2) and tree["b"].sharding.is_fully_replicated
    step(state)
    assert step._cache_size() == 1  # the state comes back laid out as it went in


@pytest.mark.slow
def test_kernels_serve_members_by_hand_but_not_what_the_compiler_divides():
    def traced(mesh, **settings):
        es = make(DESIGNS["crossed"], mesh=mesh, noise="rademacher", **settings)
        state = es.init({"w": jnp.ones((8, 128))}, jax.random.key(0))
        evaluate = lambda s, x: es.evaluate(s, lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["w"].T), x)
        return jax.jit(evaluate).trace(state, jnp.ones((2, 8))).lower(lowering_platforms=("tpu",)).as_text()

    kernels.use("pallas_tpu")
    try:
        with dispatch.mode("lower"):
            assert "tpu_custom_call" in traced(devices(4))
            with pytest.raises(kernels.KernelError, match="the compiler divides arrays over axes of the mesh"):
                traced(devices(2, 4), axes=("members",))
    finally:
        kernels.use("auto")


@pytest.mark.slow
def test_layout_rules():
    mesh = devices(2, 4, names=("fsdp", "tensor"))
    layout = (("kernel$", PartitionSpec("fsdp", "tensor")), ("embed", PartitionSpec(("fsdp", "tensor"), "absent")))
    where = lambda path, *shape: sharding.sharding(mesh, layout, path, shape).spec
    assert where("a/kernel", 4, 8) == PartitionSpec("fsdp", "tensor")
    assert where("layers/kernel", 3, 4, 8) == PartitionSpec(None, "fsdp", "tensor")  # stacked layers
    assert where("a/kernel", 4, 6) == PartitionSpec("fsdp", None)  # 6 does not divide by 4
    assert where("embed", 16, 2) == PartitionSpec(("fsdp", "tensor"), None)
    assert where("a/bias", 8) == PartitionSpec(None) and where("step") == PartitionSpec()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make(eggroll.independent(12), mesh=devices(8)), "got 12 x 1 x 1 over 8: choose"),
        (lambda: make(eggroll.crossed(12), mesh=devices(8)), "got 1 x 3 x 4 over 8"),
        (lambda: make(DESIGNS["crossed"], mesh=devices(8), axes=("data",)), r"\('members',\); got data"),
        (lambda: make(DESIGNS["crossed"], sums="sent"), r"\('rebuilt', 'reduced'\); got 'sent'"),
        (
            lambda: make(DESIGNS["crossed"], mesh=jax.make_mesh((8,), ("m",), axis_types=(AxisType.Explicit,))),
            "must be automatic; got AxisType.Explicit",
        ),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_a_state_array_belongs_to_the_parameter_that_its_path_names():
    key = jax.tree_util.DictKey
    owner = sharding.owners({"kernel": 1, "a": {"kernel": 2}, "b": [3, {"kernel": 4}]})
    of = lambda *path: (owner(path) or (None, None))[1]
    assert of(key("mu"), key("kernel")) == of(key("c"), key("kernel")) == 1
    assert of(key("mu"), key("a"), key("kernel")) == of(key("state"), key("a/kernel")) == 2  # the longest of two
    assert of(key("mu"), key("b"), jax.tree_util.SequenceKey(0)) == of(key("b/0")) == 3
    assert (
        of(jax.tree_util.SequenceKey(1), key("kernel")) == 1
        and of(key("b"), jax.tree_util.SequenceKey(1), key("kernel")) == 4
    )
    assert of(key("count")) is of(jax.tree_util.GetAttrKey("kernel")) is of(key("a")) is of() is None
