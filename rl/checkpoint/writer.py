"""Snapshots without stopping: the loop hands over a state and goes on, a thread makes the checkpoint.

    with Writer(directory) as writer:
        while ...:
            state, metrics = step(state)  # may donate the state that is being saved
            writer.submit(number, state, {"work": work})

After DataStates-LLM (Maurya et al., HPDC 2024, arXiv 2406.10707), whose idea is that a state does not change between two
updates: its copy to the host need not stop anybody. In JAX arrays never change, and end when a step donates them, so
`submit` enqueues copies into pinned host memory and returns; on a CPU it copies, into the memory of earlier snapshots. The
thread waits for them, checksums, writes, flushes to disk and renames last; it reads host memory only and never launches a
computation.
"""

import collections
import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from rl.checkpoint import leaves, retention, store


class Writer:
    """Writes the checkpoints of one folder, one after another; a context manager that ends when all are on disk.

    Host memory: `in_flight` copies of the local part of the state; on a CPU they are kept for the next snapshots.

    Attributes:
      blocked: seconds that `submit` and `wait` have waited for the thread.
    """

    def __init__(self, directory: str | Path, keep: retention.Keep = retention.KEEP, in_flight: int = 1) -> None:
        """Describes the writer; nothing is written before `submit`.

        Args:
          directory: folder of the checkpoints of one run.
          keep: which checkpoints outlive newer ones.
          in_flight: snapshots that may wait or be written at a time, at least 1; one more blocks `submit`.
        """
        if in_flight < 1:
            raise ValueError(
                f"in_flight must be at least 1, not {in_flight}: a snapshot is in flight while it is written"
            )
        retention.check(keep)
        self.blocked = 0.0
        self._directory, self._keep, self._in_flight = Path(directory), keep, in_flight
        self._pending: collections.deque[tuple[Future[None], leaves.Snapshot]] = collections.deque()
        self._spare: list[leaves.Snapshot] = []  # written ones; the next are copied into their memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def submit(self, step: int, state: Any, extra: Mapping[str, Any], files: Sequence[BinaryIO] = ()) -> None:
        """Takes a snapshot to be written; the state may be donated or changed as soon as this returns.

        Args:
          step: number of completed steps, at least 0.
          state: as for `save`.
          extra: as for `save`.
          files: open for writing; what they hold by now is on disk before the checkpoint appears.

        Raises:
          CheckpointError: a leaf that cannot be stored.
          Exception: what went wrong with an earlier snapshot, which then does not exist; raised once.
        """
        self._collect(self._in_flight - 1)  # before the copy, which bounds the memory
        for file in files:
            file.flush()
        view, extra = leaves.view(state), dict(extra)
        snapshot = leaves.copy(view, self._spare.pop() if self._spare else None)
        written = self._thread.submit(store.write, self._directory, step, snapshot, extra, self._keep, files)
        self._pending.append((written, snapshot))

    def wait(self) -> None:
        """Returns when every snapshot is a checkpoint on disk; raises as `submit` does."""
        self._collect(0)

    def close(self) -> None:
        """`wait`, and no more snapshots."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _collect(self, leave: int) -> None:
        start = time.perf_counter()
        try:
            while len(self._pending) > leave or (self._pending and self._pending[0][0].done()):
                written, snapshot = self._pending.popleft()
                concurrent.futures.wait([written])
                self._spare.append(snapshot)
                written.result()
        finally:
            self.blocked += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
