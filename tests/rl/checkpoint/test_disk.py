"""What reaches the disk, and by which way; checkpoints of the layout before; what is said when a disk is full."""

import errno
import fcntl
import json
import mmap
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rl import checkpoint
from rl.checkpoint import backend, disk, leaves

PAGE = mmap.PAGESIZE


@pytest.fixture
def flags(monkeypatch):
    """Those that files are given."""
    seen, given = [], fcntl.fcntl

    def noted(file, command, *flags):
        if command == fcntl.F_SETFL:
            seen.append(bool(flags[0] & os.O_DIRECT))
        return given(file, command, *flags)

    monkeypatch.setattr(fcntl, "fcntl", noted)
    return seen


def _has_direct(folder):
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("way", ["aligned", "not aligned", "refused by the file system", "unknown to the system"])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5])
def test_a_file_is_the_bytes_of_its_array(tmp_path, monkeypatch, flags, way, size):
    direct, pages = disk._write_pages, []
    monkeypatch.setattr(disk, "_write_pages", lambda *a: pages.append(direct(*a)) or pages[-1])
    monkeypatch.setattr(disk, "_PIECE", 2 * PAGE)
    value = disk.aligned((size + 1,), np.dtype(np.uint8))
    assert value.ctypes.data % PAGE == 0
    value[:] = np.random.default_rng(size).integers(0, 256, size + 1)
    value = value[1:] if way == "not aligned" else value[:-1]
    if way == "refused by the file system":

        def refuse(file, command, *flags):
            if flags and flags[0] & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(fcntl, "fcntl", lambda *a: refuse(*a) or 0)
    if way == "unknown to the system":
        monkeypatch.delattr(os, "O_DIRECT")
    disk.write_array(tmp_path / "x", value)
    assert (tmp_path / "x").read_bytes() == value.tobytes()
    whole = size // PAGE * PAGE if "aligned" in way else 0
    assert flags == ([True, False] if whole else [])  # whole pages without the cache, where the file system can
    assert pages == [whole] or (pages == [0] and not _has_direct(tmp_path))
    with pytest.raises(FileExistsError):
        disk.write_array(tmp_path / "x", value)


def test_orders_other_than_c_are_brought_into_it(tmp_path):
    value = np.arange(6.0).reshape(2, 3).T
    disk.write_array(tmp_path / "x", value)
    assert (tmp_path / "x").read_bytes() == np.array([0, 3, 1, 4, 2, 5.0]).tobytes()
    state = {"x": value, "other end first": np.array([1.5, -2.0], ">f4")}
    checkpoint.save(tmp_path / "c", 1, state, {})
    found = checkpoint.restore(tmp_path / "c", state).state
    assert all(np.array_equal(found[name], state[name]) for name in state)


def test_what_is_written_is_what_orbax_writes(tmp_path):
    """File by file, as plain Orbax makes them of the same arrays without OCDBT and compression."""
    names = ["float32", "bfloat16", "bool", "int4", "uint32", "complex64", "float8_e4m3fn"]
    arrays = {name: np.asarray(jnp.asarray([[0, 1, 1], [1, 0, 1]], name)) for name in names}
    arrays |= {f"{name} scalar": np.asarray(jnp.asarray(1, name)) for name in names}
    backend.checkpointer([0]).save(tmp_path / "ours", arrays)
    plain = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    ocp.Checkpointer(plain).save(tmp_path / "plain", arrays)
    content = {
        kind: {str(path.relative_to(tmp_path / kind)): path.read_bytes() for path in (tmp_path / kind).rglob("*/*")}
        for kind in ("ours", "plain")
    }
    assert content["ours"].keys() == content["plain"].keys() and len(content["ours"]) == 2 * len(arrays)
    for name, written in content["ours"].items():
        read = json.loads if name.endswith(".zarray") else bytes
        assert read(written) == read(content["plain"][name]), name


def test_checkpoints_of_the_layout_before_restore(tmp_path):
    """Whose arrays Orbax wrote in its own way, into one database (OCDBT)."""
    state = {"w": jnp.arange(6.0).reshape(2, 3), "n": 3, "key": jax.random.key(1)}
    checkpoint.save(tmp_path, 4, state, {"work": 2})
    arrays = tmp_path / "0000000004" / "arrays"
    content = ocp.PyTreeCheckpointer().restore(arrays)
    shutil.rmtree(arrays)
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)).save(arrays, content)
    assert (arrays / "manifest.ocdbt").exists()
    found = checkpoint.restore(tmp_path, {"w": jnp.zeros((2, 3)), "n": 0, "key": jax.random.key(0)})
    assert (found.step, found.extra, found.skipped, found.state["n"]) == (4, {"work": 2}, (), 3)
    np.testing.assert_array_equal(found.state["w"], state["w"])
    np.testing.assert_array_equal(jax.random.key_data(found.state["key"]), jax.random.key_data(state["key"]))


def test_saving_says_nothing(tmp_path, caplog):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)}, {})
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_said_to_be_one(tmp_path, monkeypatch, code):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)}, {})
    path = tmp_path / "writing-0000000002" / "arrays" / "00000" / "0"

    def refuse(*_):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(disk, "write_array", refuse)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        checkpoint.save(tmp_path, 2, {"x": jnp.ones(1000), "n": np.zeros(3)}, {})
    assert isinstance(caught.value, checkpoint.NoRoomError) == (code != errno.EIO)
    assert checkpoint.steps(tmp_path) == [1]
    if code != errno.EIO:
        free = shutil.disk_usage(tmp_path).free
        message = str(caught.value)
        assert f"'{path}'" in message and "step 2 takes 4,024 bytes and " in message
        told = int(message.partition("bytes and ")[2].partition(" were free")[0].replace(",", ""))
        assert abs(told - free) < 2e9  # others use this disk too
        assert message.endswith("the checkpoint of step 1 is intact: make room, and the same command resumes from it")
        assert ("a file may have at most" in message) == (code == errno.EFBIG)


def test_written_copies_give_their_memory_to_the_next():
    first = leaves.copy(leaves.view({"a": jnp.ones((2, 3)), "b": np.ones(4), "c": jnp.ones(2)}))
    second = leaves.copy(leaves.view({"a": jnp.zeros((2, 3)), "b": np.ones(5), "c": jnp.ones(2, jnp.int32)}), first)
    shared = {name: np.shares_memory(x, first.values[name]) for name, x in second.values.items()}
    assert shared == {"['a']": True, "['b']": False, "['c']": False}  # only what fits
    assert not second.values["['a']"].any() and second.values["['b']"].shape == (5,)


def test_copies_in_flight_keep_theirs(tmp_path):
    with checkpoint.Writer(tmp_path, checkpoint.Keep(9), in_flight=3) as writer:
        for step in range(1, 9):
            writer.submit(step, {"x": jnp.full(100_000, step)}, {})
    for step in range(1, 9):
        found = checkpoint.restore(tmp_path, {"x": jnp.zeros(100_000, jnp.int32)}, step=step).state
        assert (np.asarray(found["x"]) == step).all()
