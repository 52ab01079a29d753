"""Checkpoints of a state pytree: Orbax writes the arrays, a rename publishes them, checksums decide what is usable.

`Writer` takes a snapshot and lets the loop go on while a thread writes it; `save` writes at once. `restore` reads the newest
intact checkpoint, onto the devices and, if asked, in the dtypes of its target, all of it or one part. `Keep` says which
checkpoints outlive newer ones. `python -m rl.checkpoint RUN` lists and verifies them, and exports weights as safetensors.
"""

from rl.checkpoint.leaves import CheckpointError as CheckpointError
from rl.checkpoint.leaves import NoRoomError as NoRoomError
from rl.checkpoint.retention import KEEP as KEEP
from rl.checkpoint.retention import Keep as Keep
from rl.checkpoint.store import Restored as Restored
from rl.checkpoint.store import export as export
from rl.checkpoint.store import no_room as no_room
from rl.checkpoint.store import restore as restore
from rl.checkpoint.store import save as save
from rl.checkpoint.store import steps as steps
from rl.checkpoint.store import verify as verify
from rl.checkpoint.writer import Writer as Writer

__all__ = [
    "KEEP",
    "CheckpointError",
    "Keep",
    "NoRoomError",
    "Restored",
    "Writer",
    "export",
    "no_room",
    "restore",
    "save",
    "steps",
    "verify",
]
