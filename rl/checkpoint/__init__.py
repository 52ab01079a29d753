"""Checkpoints of a state pytree: Orbax writes the arrays, a rename publishes them, checksums decide what is usable."""

from rl.checkpoint.store import CheckpointError as CheckpointError
from rl.checkpoint.store import Restored as Restored
from rl.checkpoint.store import restore as restore
from rl.checkpoint.store import save as save

__all__ = ["CheckpointError", "Restored", "restore", "save"]
