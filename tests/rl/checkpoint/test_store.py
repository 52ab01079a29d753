"""Checkpoints: exact round trip, atomicity, what counts as damage, and how many are kept."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import checkpoint


def make_state(scale=1.0):
    params = {
        "w": (jnp.arange(12.0).reshape(3, 4) * scale / 7).astype(jnp.bfloat16),
        "a.b/c": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "empty": jnp.zeros((0, 5)),
        "bits": jnp.array([0, 2**32 - 1], jnp.uint32),
        "byte": jnp.array([-128, 127], jnp.int8),
    }
    return {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(6, impl="rbg"), 3),
        "host": np.arange(4, dtype=np.int64) * 2**40,
        "number": 0.1 * scale,
        "count": 2**40,
        "flag": True,
        "weak": jnp.asarray(2.0),
        "weak_vector": jnp.full(3, 0.1 * scale),
    }


def leaves_as_bytes(state):
    def plain(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
        array = np.asarray(leaf)
        return type(leaf).__name__, array.dtype.name, array.shape, array.tobytes()

    return jax.tree.map(plain, state, is_leaf=lambda x: x is None)


def test_round_trip_is_exact(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path, 7, state, {"work": 2**60, "seconds": 0.1})
    found = checkpoint.restore(tmp_path, jax.tree.map(lambda leaf: leaf, make_state(scale=2.0)))
    assert (found.step, found.extra, found.skipped) == (7, {"work": 2**60, "seconds": 0.1}, ())
    assert leaves_as_bytes(found.state) == leaves_as_bytes(state)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    # Promotion depends on weak types: losing one would change bf16 arithmetic after a resume.
    assert found.state["weak"].weak_type and found.state["weak_vector"].weak_type
    assert not found.state["params"]["a.b/c"].weak_type
    assert (found.state["weak"] * found.state["params"]["w"]).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        jax.random.normal(found.state["key"], (3,)), jax.random.normal(jax.random.key(5), (3,))
    )


def test_number_that_became_an_array_still_fits(tmp_path):
    checkpoint.save(tmp_path, 1, jax.jit(lambda s: s)({"best": 0.5, "n": 3}), {})
    found = checkpoint.restore(tmp_path, {"best": 0.0, "n": 0}).state
    assert found["best"].weak_type and float(found["best"]) == 0.5 and int(found["n"]) == 3
    with pytest.raises(checkpoint.CheckpointError, match="best.*dtype float32 in the checkpoint, int64 here"):
        checkpoint.restore(tmp_path, {"best": 0, "n": 0})


def test_sharding_follows_the_target(tmp_path):
    mesh = jax.make_mesh((8,), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.device_put(jnp.arange(16.0), sharding)
    checkpoint.save(tmp_path, 1, {"x": x, "y": jnp.ones(2)}, {})
    found = checkpoint.restore(tmp_path, {"x": jnp.zeros_like(x), "y": jnp.zeros(2)}).state
    assert found["x"].sharding == sharding and len(found["x"].addressable_shards) == 8
    assert not found["y"].committed
    np.testing.assert_array_equal(found["x"], np.arange(16.0))


def test_newest_are_kept_and_nothing_else(tmp_path):
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)}, {}, checkpoint.Keep(3))
    assert sorted(os.listdir(tmp_path)) == ["0000000002", "0000000010", "0000000011"]
    checkpoint.save(tmp_path, 11, {"x": jnp.full(2, 5)}, {}, checkpoint.Keep(1))
    assert os.listdir(tmp_path) == ["0000000011"]
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(2, jnp.int32)}).state["x"].tolist() == [5, 5]


def test_nothing_to_restore_returns_the_target(tmp_path):
    target = {"x": jnp.ones(2)}
    assert checkpoint.restore(tmp_path / "none", target) == checkpoint.Restored(0, target, {}, ())
    (tmp_path / "writing-0000000003").mkdir()  # what a kill during a save leaves
    assert checkpoint.restore(tmp_path, target).step == 0
    assert os.listdir(tmp_path) == []


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def halve_largest(folder):
    path = largest_file(folder / "arrays")
    os.truncate(path, path.stat().st_size // 2)


def empty_every_file(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def flip_one_bit(folder):
    flip(largest_file(folder / "arrays"))  # the values themselves: Orbax would not notice


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve_meta(folder):
    os.truncate(folder / "meta.json", 40)


def wrong_checksum(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["leaves"]["['x']"]["blocks"][0]["crc32"] ^= 1
    (folder / "meta.json").write_text(json.dumps(meta))


def no_arrays(folder):
    shutil.rmtree(folder / "arrays")


@pytest.mark.parametrize(
    "damage", [halve_largest, empty_every_file, flip_one_bit, halve_meta, wrong_checksum, no_arrays]
)
def test_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    noise = np.random.default_rng(0).normal(size=(2, 1000))
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": jnp.asarray(noise[step - 1], jnp.float32)}, {"at": step})
    damage(tmp_path / "0000000002")
    found = checkpoint.restore(tmp_path, {"x": jnp.zeros(1000)})
    assert (found.step, found.extra, len(found.skipped)) == (1, {"at": 1}, 1)
    assert "0000000002 is unusable" in found.skipped[0]
    np.testing.assert_array_equal(found.state["x"], noise[0].astype(np.float32))
    assert sorted(os.listdir(tmp_path)) == ["0000000001", "unusable-0000000002"]
    halve_meta(tmp_path / "0000000001")
    assert checkpoint.restore(tmp_path, {"x": jnp.zeros(1000)}).step == 0


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": jnp.full(3, 1.0)}, {})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, 2, {"x": jnp.full(3, 2.0)}, {})
    found = checkpoint.restore(tmp_path, {"x": jnp.zeros(3)})
    assert (found.step, found.skipped, found.state["x"].tolist()) == (1, (), [1.0, 1.0, 1.0])


@pytest.mark.parametrize("leaf", ["text", np.array([object()]), object()])
def test_unsupported_leaf_is_named(tmp_path, leaf):
    with pytest.raises(checkpoint.CheckpointError, match=r"state\['bad'\] is a"):
        checkpoint.save(tmp_path, 1, {"bad": leaf, "good": jnp.ones(1)}, {})
