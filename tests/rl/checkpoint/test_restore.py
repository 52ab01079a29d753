"""Restoring to what was not saved: other meshes, dtypes, parts; reading without this code; exporting."""

import json
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from rl import checkpoint
from rl.checkpoint.__main__ import main
from tests.rl.checkpoint.test_store import flip_one_bit

P = jax.sharding.PartitionSpec


def on(shape, axes, spec):
    return jax.sharding.NamedSharding(jax.make_mesh(shape, axes, devices=jax.devices()[: np.prod(shape)]), P(*spec))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state on a 4 x 2 mesh: weights, optimizer moments, a key."""
    folder = tmp_path_factory.mktemp("mesh")
    w = jax.device_put(jnp.arange(96.0).reshape(8, 12), on((4, 2), ("d", "t"), ("d", "t")))
    state = {"params": {"w": w, "b": jnp.ones(4, jnp.bfloat16)}, "params_old": jnp.zeros(3), "key": jax.random.key(3)}
    with checkpoint.Writer(folder) as writer:
        writer.submit(5, state, {"work": 1})
    return folder, state


@pytest.mark.parametrize(
    "sharding", [on((2, 4), ("d", "t"), ("t", "d")), on((3,), ("d",), (None, "d")), on((1,), ("d",), ())], ids=str
)
def test_another_mesh_and_device_count(saved, sharding):
    folder, state = saved
    target = jax.tree.map(lambda x: x, state)
    target["params"]["w"] = jax.device_put(jnp.zeros((8, 12)), sharding)
    found = checkpoint.restore(folder, target).state
    assert found["params"]["w"].sharding == sharding
    np.testing.assert_array_equal(found["params"]["w"], np.arange(96.0).reshape(8, 12))
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)(found["params"]["w"])
    np.testing.assert_array_equal(donated, np.arange(1, 97.0).reshape(8, 12))


def test_abstract_targets_take_no_memory_and_may_be_keys(saved):
    folder, state = saved
    target = jax.eval_shape(lambda: {**state, "params": {**state["params"], "w": jnp.zeros((8, 12))}})
    sharding = on((8,), ("d",), ("d",))
    target["params"]["w"] = jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=sharding)
    found = checkpoint.restore(folder, target).state
    assert found["params"]["w"].sharding == sharding and not found["params"]["b"].committed
    np.testing.assert_array_equal(jax.random.bits(found["key"]), jax.random.bits(state["key"]))
    target["key"] = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    with pytest.raises(checkpoint.CheckpointError, match="key threefry2x32 in the checkpoint, rbg here"):
        checkpoint.restore(folder, target)


def test_another_dtype_only_on_request(saved):
    folder, state = saved
    target = {"w": jnp.zeros((8, 12), jnp.bfloat16), "b": jnp.zeros(4, jnp.float16)}
    with pytest.raises(checkpoint.CheckpointError, match=r"\['w'\]: dtype float32 in the checkpoint, bfloat16 here"):
        checkpoint.restore(folder, target, only="['params']")
    found = checkpoint.restore(folder, target, only="['params']", cast=True).state
    assert found["w"].dtype == jnp.bfloat16 and found["b"].dtype == jnp.float16
    np.testing.assert_array_equal(found["w"], np.arange(96).reshape(8, 12).astype(ml_dtypes.bfloat16))
    with pytest.raises(checkpoint.CheckpointError, match="dtype float32 in the checkpoint, int32 here"):
        checkpoint.restore(folder, {**target, "w": jnp.zeros((8, 12), jnp.int32)}, only="['params']", cast=True)


def test_a_part_is_read_alone_and_its_name_ends_where_it_says(saved, tmp_path):
    folder, state = saved
    found = checkpoint.restore(folder, state["params"], only="['params']")
    assert (found.step, found.extra) == (5, {"work": 1})
    jax.tree.map(np.testing.assert_array_equal, found.state, state["params"])
    weight = checkpoint.restore(folder, jnp.zeros((8, 12)), only="['params']['w']").state
    np.testing.assert_array_equal(weight, state["params"]["w"])
    with pytest.raises(checkpoint.CheckpointError, match=r"\['absent'\]: not in the checkpoint"):
        checkpoint.restore(folder, jnp.zeros(2), only="['absent']")
    # Damage elsewhere is nobody's business who reads this part; the whole is refused.
    noise = jnp.asarray(np.random.default_rng(0).normal(size=5000), jnp.float32)
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(3), "b": noise}, {})
    flip_one_bit(tmp_path / "0000000001")
    assert checkpoint.restore(tmp_path, jnp.zeros(3), only="['a']").state.tolist() == [1.0] * 3
    with pytest.raises(checkpoint.CheckpointError, match=r"0000000001 is unusable .*checksum of \['b'\] differs"):
        checkpoint.restore(tmp_path, {"a": jnp.zeros(3), "b": noise}, step=1)
    assert checkpoint.steps(tmp_path) == [1]  # asked for by name, it is left where it is


class _State(NamedTuple):
    params: jax.Array
    params_old: jax.Array


def test_the_name_of_a_part_is_no_mere_prefix(tmp_path):
    checkpoint.save(tmp_path, 1, _State(jnp.ones(2), jnp.zeros(3)), {})
    assert checkpoint.restore(tmp_path, jnp.zeros(2), only=".params").state.tolist() == [1.0, 1.0]


def test_one_step_can_be_asked_for(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)}, {})
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(2, jnp.int32)}, step=1).state["x"].tolist() == [1, 1]
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of step 3; it has \[1, 2\]"):
        checkpoint.restore(tmp_path, {"x": jnp.zeros(2, jnp.int32)}, step=3)


NARROW = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int4", "bool", "uint32", "int16"]


def test_narrow_dtypes_come_back_bit_for_bit(tmp_path):
    state = {name: jnp.asarray([0, 1, 3, 1, 0, 2], name) for name in NARROW}
    state |= {f"{name} scalar": jnp.asarray(1, name) for name in NARROW}
    checkpoint.save(tmp_path, 1, state, {})
    found = checkpoint.restore(tmp_path, state).state
    for name, x in state.items():
        assert found[name].dtype == x.dtype and np.asarray(found[name]).tobytes() == np.asarray(x).tobytes(), name


def test_orbax_reads_it_without_this_code(saved):
    """The arrays by number; `meta.json` says which is which."""
    folder, state = saved
    arrays = ocp.PyTreeCheckpointer().restore(folder / "0000000005" / "arrays")
    meta = json.loads((folder / "0000000005" / "meta.json").read_text())
    read = {name: arrays[row["array"]] for name, row in meta["leaves"].items()}
    np.testing.assert_array_equal(read["['params']['w']"], np.arange(96.0).reshape(8, 12))
    assert read["['params']['b']"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read["['key']"], jax.random.key_data(state["key"]))


def test_another_format_is_an_error_and_not_damage(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(1)}, {})
    path = tmp_path / "0000000001" / "meta.json"
    meta = json.loads(path.read_text()) | {"format": 1}
    del meta["crc32"]  # of format 2
    path.write_text(json.dumps(meta))
    with pytest.raises(checkpoint.CheckpointError, match="written in format 1, this code reads 2"):
        checkpoint.restore(tmp_path, {"x": jnp.ones(1)})
    assert checkpoint.steps(tmp_path) == [1]


def test_the_command_lists_checks_and_exports(saved, tmp_path, capsys):
    folder, state = saved
    file = tmp_path / "weights.safetensors"
    assert main([str(folder), "--only=['params']", f"--export={file}", "--leaves"]) == 0
    shown = capsys.readouterr().out
    assert "step 5: intact, 2 leaves, 392 bytes" in shown and "  ['params']['w']: float32 [8, 12]" in shown
    tensors = safetensors.numpy.load_file(file)
    assert sorted(tensors) == ["b", "w"] and tensors["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors["w"], state["params"]["w"])
    assert main([str(folder), "--only=.nothing", f"--export={file}"]) == 1
    assert "has no leaf below '.nothing'" in capsys.readouterr().err
    assert main([str(folder), "--step=4"]) == 1 and "no checkpoint of step 4" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1 and "has no checkpoints" in capsys.readouterr().err


def test_the_command_names_what_is_damaged_and_exports_the_intact(tmp_path):
    noise = np.random.default_rng(0).normal(size=(2, 1000))
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, {"layers": [{"w": noise[step - 1]}]}, {})
    flip_one_bit(tmp_path / "checkpoints" / "0000000002")
    command = [sys.executable, "-m", "rl.checkpoint", str(tmp_path), f"--export={tmp_path / 'w'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "0000000002 is unusable" in done.stderr and "step 1 written to" in done.stdout
    tensors = safetensors.numpy.load_file(tmp_path / "w")
    np.testing.assert_array_equal(tensors["layers.0.w"], noise[0])
