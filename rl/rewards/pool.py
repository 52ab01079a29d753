"""A pool of processes that run a verifier, with a deadline per item.

Workers are fresh interpreters (`rl.rewards.worker`), so they share nothing with jax or its threads, and talk JSON lines
over pipes of their own. A verifier that hangs, crashes or returns nonsense costs its one sample.
"""

import collections
import json
import logging
import math
import select
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from rl.rewards.connection import Connection, ProtocolError
from rl.tasks.types import Status, Verdict

_log = logging.getLogger(__name__)

_CHUNK_ITEMS = 256
_CHUNK_BYTES = 1 << 18  # so that passing a chunk over takes a small part of a deadline
_STARTS = 3  # workers in a row that die before they are ready: the pool gives up
_KEPT_FAILURES = 100
_IDLE = 1.0  # seconds to wait where no deadline is nearer


class PoolError(RuntimeError):
    """The pool cannot work: a verifier that cannot be imported, workers that do not start, or input that is not JSON."""


class Failure(NamedTuple):
    """One sample that got no score: its status, why, and the first 200 characters of its completion."""

    status: Status
    message: str
    completion: str


class _Batch:
    """The state of one call of `score`."""

    def __init__(self, completions: Sequence[str], answers: Sequence[Any]):
        if len(completions) != len(answers):
            raise PoolError(
                f"score needs one answer per completion, but got {len(completions)} completions and "
                f"{len(answers)} answers"
            )
        self.completions = completions
        self.items = [_encode(i, *item) for i, item in enumerate(zip(completions, answers, strict=True))]
        self.waiting = collections.deque(range(len(completions)))
        self.verdicts: dict[int, Verdict] = {}

    def chunk(self, workers: int) -> tuple[list[int], bytes]:
        """The next items as one line of JSON: many while many wait, few near the end, so that workers end together."""
        wanted = min(_CHUNK_ITEMS, max(1, len(self.waiting) // (2 * workers)))
        positions, size = [], 0
        while self.waiting and len(positions) < wanted and size < _CHUNK_BYTES:
            positions.append(self.waiting.popleft())
            size += len(self.items[positions[-1]])
        return positions, b"[" + b",".join(self.items[i] for i in positions) + b"]\n"


def _encode(i: int, completion: str, answer: Any) -> bytes:
    if not isinstance(completion, str):
        raise PoolError(f"completions must be str, but completion {i} is {type(completion).__name__}")
    try:
        return json.dumps([completion, answer], allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise PoolError(f"answers must be finite JSON values, but answer {i} is not: {error}") from error


class Pool:
    """Scores completions in worker processes; a context manager. One call of `score` at a time.

    Attributes:
      counts: how many verdicts of each status this pool has given.
      failures: the last 100 samples that got no score.
      replaced: how many workers were lost and started anew.
    """

    def __init__(
        self,
        verify: str,
        workers: int = 2,
        deadline: float = 1.0,
        memory: int | None = 2 << 30,
        start_timeout: float = 60.0,
    ):
        """Starts the workers and waits until each has imported the verifier.

        Args:
          verify: `module:function` of `verify(completion: str, answer) -> Verdict`, importable from `sys.path` in a
            process without jax.
          workers: how many processes.
          deadline: seconds one item may take before its worker is killed, > 0.
          memory: address space of a worker in bytes, beyond which its allocations fail; None for no limit.
          start_timeout: seconds a worker may take to start.

        Raises:
          PoolError: an argument out of range, or the verifier cannot be imported (with its traceback).
        """
        module, colon, function = verify.partition(":")
        if not (module and colon and function):
            raise PoolError(f"verify must be 'module:function', such as 'rl.tasks.countdown:verify', not {verify!r}")
        if workers < 1:
            raise PoolError(f"workers must be at least 1, not {workers}")
        for name, seconds in (("deadline", deadline), ("start_timeout", start_timeout)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise PoolError(f"{name} must be finite and greater than 0 seconds, not {seconds}")
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: collections.deque[Failure] = collections.deque(maxlen=_KEPT_FAILURES)
        self.replaced = 0
        self._setup = json.dumps({"path": verify, "memory": memory}).encode() + b"\n"
        self._deadline, self._start_timeout = deadline, start_timeout
        self._failed_starts = 0
        self._closed = False
        self._connections: list[Connection] = []
        try:
            for _ in range(workers):
                self._connections.append(Connection(self._setup))
            nothing = _Batch([], [])
            while not all(connection.ready for connection in self._connections):
                self._advance(nothing, _IDLE)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker and its process group; may be called again."""
        self._closed = True
        ending, self._connections = self._connections, []
        for connection in ending:
            connection.hang_up()
        for connection in ending:
            connection.wait()

    def score(self, completions: Sequence[str], answers: Sequence[Any]) -> list[Verdict]:
        """Judges `completions[i]` against `answers[i]`.

        Args:
          completions: texts, untrusted.
          answers: one JSON value per completion.

        Returns:
          One `Verdict` per completion, in order. Where the verifier overran the deadline the status is "timeout"; where
          it raised or its process died, "error"; where it gave no finite number, "unscorable". `failures` says why.

        Raises:
          PoolError: the pool is closed, the lengths differ, an input is not a str or not JSON, or workers no longer
            start.
        """
        if self._closed:
            raise PoolError("this pool is closed: call score inside its `with` block")
        batch = _Batch(completions, answers)
        self._advance(batch, 0)  # workers lost since the last batch cost this one nothing
        try:
            while len(batch.verdicts) < len(batch.items):
                for connection in self._connections:
                    if connection.ready and not connection.items and batch.waiting:
                        connection.begin(*batch.chunk(len(self._connections)))
                self._advance(batch, _IDLE)
        except BaseException:
            # After an interrupt, answers are on their way that the next batch must not take for its own.
            for connection in [c for c in self._connections if c.items]:
                self._replace(connection)
            raise
        verdicts = [batch.verdicts[i] for i in range(len(batch.items))]
        self.counts.update(verdict.status for verdict in verdicts)
        return verdicts

    def _advance(self, batch: _Batch, timeout: float) -> None:
        """Waits for news of the workers, at most `timeout` seconds or until a deadline, and takes them in."""
        # The clock is read before the poll: who is late by it and had nothing to say in the poll is late indeed,
        # however long this process itself was held up.
        now = time.monotonic()
        poll = select.poll()
        for connection in self._connections:
            poll.register(connection.replies, select.POLLIN)
            if connection.pending:
                poll.register(connection.requests, select.POLLOUT)
            timeout = min(timeout, max(0.0, self._due(connection) - now))
        active = {descriptor for descriptor, _ in poll.poll(math.ceil(timeout * 1000))}
        for connection in list(self._connections):
            if connection.replies in active:
                self._take(connection, batch)
            elif connection.requests in active:
                connection.write()
            elif now >= self._due(connection):
                self._lose(connection, batch, "timeout", f"the verifier took longer than {self._deadline} s")

    def _due(self, connection: Connection) -> float:
        """When a worker is late."""
        if not connection.ready:
            return connection.since + self._start_timeout
        return connection.since + self._deadline if connection.items else math.inf

    def _take(self, connection: Connection, batch: _Batch) -> None:
        """Takes in the replies of one worker, or its end."""
        try:
            for message in connection.read():
                if connection.ready:
                    value, status, parts, reason = message
                    self._record(batch, connection.items.popleft(), Verdict(value, status, parts), reason)
                elif "failed" in message:
                    raise PoolError(f"the verifier could not be imported: {message['failed']}")
                else:
                    connection.ready = True
                    self._failed_starts = 0
        except ProtocolError as error:
            self._lose(connection, batch, "error", str(error))
        except (IndexError, TypeError, ValueError) as error:
            self._lose(connection, batch, "error", f"it sent a reply that does not fit: {error}")

    def _lose(self, connection: Connection, batch: _Batch, status: Status, reason: str) -> None:
        """Replaces a worker; the item it was at gets `status`, those behind it go back to the front of the queue."""
        printed = "" if connection.ready else connection.printed()
        ending = self._replace(connection)
        if status == "error":
            reason = f"{reason} ({ending})"
        if not connection.ready:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS:
                raise PoolError(f"{_STARTS} workers in a row did not start: {reason}\n{printed}".rstrip())
        elif connection.items:
            self._record(batch, connection.items.popleft(), Verdict(0.0, status, {}), reason)
            batch.waiting.extendleft(reversed(connection.items))

    def _replace(self, connection: Connection) -> str:
        """Ends a worker, starts another in its place and says how the first one ended."""
        connection.hang_up()
        try:
            ending = connection.wait()
        finally:
            self._connections[self._connections.index(connection)] = Connection(self._setup)
        self.replaced += 1
        _log.warning("a reward worker was lost (%s) and is replaced", ending)
        return ending

    def _record(self, batch: _Batch, position: int, verdict: Verdict, reason: str) -> None:
        batch.verdicts[position] = verdict
        if verdict.status != "ok":
            self.failures.append(Failure(verdict.status, reason, batch.completions[position][:200]))
