"""Snapshots taken while training goes on: isolation, order, back-pressure, errors, memory."""

import errno
import json
import os
import statistics
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import checkpoint
from rl.checkpoint import disk, leaves, store

MESH = jax.make_mesh((8,), ("d",))
SHARDED = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec("d"))


@jax.jit
def _fresh():
    return {"w": jnp.arange(1 << 20, dtype=jnp.float32), "n": jnp.int32(1)}


@pytest.fixture
def overwrite():
    """Computes something else into the very buffers of the state: the poison."""
    return jax.jit(lambda state: jax.tree.map(lambda x: -7 - x, state), donate_argnums=0)


@pytest.fixture
def held(monkeypatch):
    """A writer whose thread waits, before it looks at any value, until the event is set."""
    gate, write = threading.Event(), store.write

    def late(*arguments):
        assert gate.wait(20)
        write(*arguments)

    monkeypatch.setattr(store, "write", late)
    return gate


@pytest.mark.parametrize("enqueued", [False, True])
@pytest.mark.parametrize("kind", ["default", "sharded", "pinned"])
def test_a_snapshot_survives_the_donation_of_the_state(tmp_path, overwrite, held, kind, enqueued, monkeypatch):
    monkeypatch.setattr(leaves, "_enqueues", lambda array: enqueued)  # True as on an accelerator
    state = _fresh()
    if kind == "sharded":
        state["w"] = jax.device_put(state["w"], SHARDED)
    if kind == "pinned":  # an array that lives where copies go is copied all the same
        state["w"] = jax.device_put(state["w"], state["w"].sharding.with_memory_kind("pinned_host"))
    host = state["host"] = np.arange(5)
    # Not read from the state: a look at the values of an array may keep its buffers from being donated.
    before = {"w": np.arange(1 << 20, dtype=np.float32), "n": np.array(1, np.int32), "host": np.arange(5)}
    device = {name: x for name, x in state.items() if isinstance(x, jax.Array)}
    places = [shard.data.unsafe_buffer_pointer() for shard in device["w"].addressable_shards]
    with checkpoint.Writer(tmp_path) as writer:
        writer.submit(1, state, {})
        host[:] = -1
        after = overwrite(device)
        if kind != "pinned":
            jax.block_until_ready(after)
            # The step got the buffers that it was promised: the snapshot neither holds them nor turned donation into a copy.
            assert device["w"].is_deleted()
            assert [shard.data.unsafe_buffer_pointer() for shard in after["w"].addressable_shards] == places
        device["w"].delete()
        held.set()
    found = checkpoint.restore(tmp_path, before).state
    assert all(np.array_equal(found[name], before[name]) for name in before)


def test_without_pinned_memory_the_copy_is_made_at_once(tmp_path, overwrite, held, monkeypatch):
    monkeypatch.setattr(leaves, "_has_pinned_memory", lambda device: False)
    state = _fresh()
    before = np.array(state["w"])
    with checkpoint.Writer(tmp_path) as writer:
        writer.submit(1, state, {})
        jax.block_until_ready(overwrite(state))
        assert state["w"].is_deleted()
        held.set()
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, before, only="['w']").state, before)


def test_a_view_would_not_have_been_enough(overwrite):
    """Why copies are made: the state's own arrays end with the step that donates them."""
    state = _fresh()
    snapshot = leaves.view(state)
    jax.block_until_ready(overwrite(state))
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(snapshot.values["['w']"])


def test_the_thread_launches_no_computation(tmp_path, held):
    """Nor does it compile: threads that launch collectives of their own would order them differently in every process."""
    state = _fresh() | {"key": jax.random.key(0), "x": jax.device_put(jnp.arange(8), SHARDED)}
    used = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: used.append((threading.get_ident(), name))
    )
    try:
        with checkpoint.Writer(tmp_path) as writer:
            jax.clear_caches()
            writer.submit(1, state, {})
            held.set()
    finally:
        jax.monitoring.clear_event_listeners()
    assert {name for thread, name in used if thread != threading.get_ident() and "jax/core" in name} == set()


def test_snapshots_become_checkpoints_in_order_and_block_beyond_the_bound(tmp_path, monkeypatch):
    alive, most, write, lock = 0, 0, store.write, threading.Lock()
    copy, gate = leaves.copy, threading.Event()

    def counted_copy(*arguments):
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return copy(*arguments)

    def counted_write(*arguments):
        nonlocal alive
        gate.wait(0.1)
        write(*arguments)
        with lock:
            alive -= 1

    monkeypatch.setattr(leaves, "copy", counted_copy)
    monkeypatch.setattr(store, "write", counted_write)
    for in_flight in (1, 2):
        most, folder = 0, tmp_path / str(in_flight)
        with checkpoint.Writer(folder, checkpoint.Keep(9), in_flight) as writer:
            for step in range(1, 5):
                writer.submit(step, {"x": jnp.full(2, step)}, {})
                assert step > in_flight or writer.blocked < 0.05
            assert 0.1 * (4 - in_flight) - 0.05 < writer.blocked
            writer.wait()
            assert checkpoint.steps(folder) == [1, 2, 3, 4]
        assert most == in_flight


STAGES = {
    "arrays": (store, "_described"),
    "checksum": (store, "_checksum"),
    "meta": (disk, "write_json"),
    "flush": (disk, "flush"),
    "commit": (store, "_commit"),
    "rename": (os, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_stage_fails_the_last_checkpoint_stands_and_the_error_comes_back(tmp_path, monkeypatch, stage):
    state = {"x": jnp.ones(3)}
    writer = checkpoint.Writer(tmp_path)
    writer.submit(1, state, {"at": 1})
    writer.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, f"No space left on device ({stage})")

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], full)
        writer.submit(2, {"x": jnp.full(3, 2.0)}, {})
        with pytest.raises(OSError, match=rf"No space left on device \({stage}\)"):
            writer.wait()
    writer.wait()  # once
    assert checkpoint.steps(tmp_path) == [1]
    writer.submit(2, {"x": jnp.full(3, 3.0)}, {})  # the same step again, over what the failure left
    writer.close()
    assert checkpoint.restore(tmp_path, state, step=1).state["x"].tolist() == [1.0] * 3
    assert checkpoint.restore(tmp_path, state).state["x"].tolist() == [3.0] * 3
    assert sorted(os.listdir(tmp_path)) == ["0000000001", "0000000002"]


def test_an_error_comes_back_at_the_next_snapshot_which_is_not_taken(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "_commit", lambda *_: 1 / 0)
        writer = checkpoint.Writer(tmp_path)
        writer.submit(1, {"x": jnp.ones(3)}, {})
        with pytest.raises(ZeroDivisionError):
            writer.submit(2, {"x": jnp.ones(3)}, {})
    writer.submit(3, {"x": jnp.ones(3)}, {})
    writer.close()
    assert checkpoint.steps(tmp_path) == [3]
    with pytest.raises(checkpoint.CheckpointError, match=r"state\['bad'\] is a str"):
        checkpoint.Writer(tmp_path).submit(4, {"bad": "text"}, {})


def test_files_are_on_disk_before_the_checkpoint_appears(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    file = open(tmp_path / "metrics.jsonl", "ab")

    def noted_fsync(descriptor):
        if descriptor == file.fileno():
            events.append(("durable", os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", os.path.basename(b))), rename(a, b)))
    with file, checkpoint.Writer(tmp_path / "checkpoints") as writer:
        file.write(b"a row\n")
        writer.submit(7, {"x": jnp.ones(3)}, {"metrics_bytes": file.tell()}, [file])
        writer.wait()
    names = [event for event in events if event[0] == "durable" or event[1] == "0000000007"]
    assert names == [("durable", 6), ("rename", "0000000007")]


def test_memory_stays_bounded_over_many_saves(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 16 * 2**20
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state, sizes = {"w": jnp.zeros(size // 4)}, []
    with checkpoint.Writer(tmp_path) as writer:
        for number in range(1, 31):
            state = step(state)
            writer.submit(number, state, {})
            if number > 3:
                sizes.append(resident())
    # Snapshots, and what allocators keep, come and go by a few sizes; one that stays each time would be 18.
    grown = statistics.median(sizes[-9:]) - statistics.median(sizes[:9])
    assert grown < 3 * size, [round(s / size, 1) for s in sizes]
    assert float(checkpoint.restore(tmp_path, state).state["w"][-1]) == 30.0


def test_what_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(ValueError, match="in_flight must be at least 1, not 0"):
        checkpoint.Writer(tmp_path, in_flight=0)
    with pytest.raises(ValueError, match="keep.latest must be at least 1, not 0"):
        checkpoint.Writer(tmp_path, checkpoint.Keep(latest=0))


def test_meta_is_what_restore_needs_and_no_more(tmp_path):
    checkpoint.save(tmp_path, 3, {"x": jnp.ones((2, 3), jnp.bfloat16)}, {"work": 5})
    meta = json.loads((tmp_path / "0000000003" / "meta.json").read_text())
    assert sorted(meta) == ["crc32", "extra", "format", "leaves", "saved", "step", "versions"]
    (block,) = meta["leaves"]["['x']"].pop("blocks")
    assert meta["leaves"]["['x']"] == {"shape": [2, 3], "dtype": "bfloat16", "kind": "jax", "array": "00000"}
    assert block.pop("crc32") and block == {"start": [0, 0], "shape": [2, 3]}
