"""The files of a working directory: its lock, its config, rows of JSON, and cutting them back to a checkpoint."""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rl import config as config_lib
from rl.checkpoint import disk


class RunError(RuntimeError):
    """A working directory or a training step that cannot be continued as asked."""


def json_line(row: Mapping[str, Any]) -> bytes:
    """One JSON line; JSON has no NaN or infinity, so these become the strings nan, inf and -inf."""
    plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return (json.dumps(plain, allow_nan=False) + "\n").encode()


def append(file: BinaryIO, content: bytes) -> None:
    """Writes to an unbuffered file: what a full disk refuses is not tried again when the file is closed."""
    with disk.naming(file.name):
        while content:
            content = content[file.write(content) :]


def lock(workdir: Path) -> Any:
    """Takes the folder's lock; the kernel frees it when the process ends, however it ends."""
    file = open(workdir / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RunError(
            f"one process at a time may train in a working directory, but {workdir} is in use by process {holder}: "
            "wait for it, stop it, or use another --workdir"
        ) from error
    file.seek(0)
    file.truncate()
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def settle_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json` in a new folder, compares it in an old one."""
    path = workdir / "config.json"
    if path.exists():
        config_lib.check_same(json.loads(path.read_text()), config, str(workdir))
        return
    foreign = [name for name in ("metrics.jsonl", "checkpoints") if (workdir / name).exists()]
    if foreign:
        raise RunError(
            f"{workdir} has {' and '.join(foreign)} but no config.json: restore it, or use another --workdir"
        )
    write_json(path, config)


def settle_data(workdir: Path, data: Mapping[str, Any]) -> None:
    """Writes `data.json` in a new folder, compares it in an old one; nothing, if there is nothing to compare."""
    path, data = workdir / "data.json", json.loads(json.dumps(data))
    if not data:
        return
    if not path.exists():
        write_json(path, data)
    elif (found := json.loads(path.read_text())) != data:
        raise RunError(
            f"{workdir} was trained on other data: {path} has {found}, now there is {data}: use the same text (of the standard "
            "library: the same version of Python), or another --workdir"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that a reader sees all of it or nothing."""
    temporary = path.with_suffix(".writing")
    with disk.naming(temporary), open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def cut(file: Any, size: int, step: int) -> None:
    """Shortens a file to where a checkpoint of this step found it."""
    if file.tell() < size:
        raise RunError(
            f"the checkpoint of step {step} needs {size} bytes of {file.name}, which has {file.tell()}: "
            "put the file back, or use another --workdir"
        )
    file.truncate(size)
    file.seek(size)


def event_writer(folder: Path, step: int) -> Any:
    """TensorBoard event files, from this step on."""
    try:
        import tensorboardX
    except ImportError as error:
        raise RunError("TensorBoard files need tensorboardX: pip install 'eggroll-jax[tensorboard]'") from error
    return tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)
