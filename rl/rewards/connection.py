"""One worker process as the pool sees it: pipes that never block, and the items it has not answered yet."""

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

_WORKER = "rl.rewards.worker"
_READ = 1 << 16  # bytes per read
_MAX_LINE = 1 << 17  # bytes in one reply: workers bound theirs, so more is not a reply
_PATIENCE = 5.0  # seconds the guardian gets to kill its verifier


class ProtocolError(Exception):
    """The worker closed its pipe, or sent what is not a reply."""


class Connection:
    """A started worker.

    Attributes:
      ready: whether it has imported the verifier.
      items: positions in the batch of what it was given and has not answered, in its order.
      since: `time.monotonic()` when it was started, last took bytes or last answered: the item in front is at most
        this old.
      replies: descriptor to wait on for reading.
      requests: descriptor to wait on for writing while `pending`.
    """

    def __init__(self, setup: bytes):
        """Starts the worker; `setup` is the first line it reads."""
        self.ready = False
        self.items: collections.deque[int] = collections.deque()
        self._outgoing, self._incoming = memoryview(setup), bytearray()
        self._output = tempfile.TemporaryFile()  # what is printed until the verifier is imported, for the error
        child_requests, self.requests = os.pipe()
        self.replies, child_replies = os.pipe()
        child_lifeline, lifeline = os.pipe()
        children = (child_requests, child_replies, child_lifeline)
        try:
            # -P: a file of the working directory must not shadow the standard library.
            self._guardian = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER, *map(str, children)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=children,
                start_new_session=True,  # Ctrl-C in the terminal is for the pool's process alone
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        except BaseException:
            for descriptor in (self.requests, self.replies, lifeline):
                os.close(descriptor)
            self._output.close()
            raise
        finally:
            for descriptor in children:
                os.close(descriptor)
        for descriptor in (self.requests, self.replies):
            os.set_blocking(descriptor, False)
        self._open = (lifeline, self.requests, self.replies)
        self.since = time.monotonic()

    @property
    def pending(self) -> bool:
        """Whether there are bytes the worker has not taken."""
        return len(self._outgoing) > 0

    def begin(self, positions: Iterable[int], line: bytes) -> None:
        """Gives an idle worker its next chunk: the items at `positions`, which `line` holds as JSON."""
        self.items.extend(positions)
        self._outgoing = memoryview(line)
        self.since = time.monotonic()
        self.write()

    def write(self) -> None:
        """Writes what the pipe takes. A worker that is gone is noticed by `read`."""
        try:
            self._outgoing = self._outgoing[os.write(self.requests, self._outgoing) :]
            self.since = time.monotonic()
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._outgoing = memoryview(b"")

    def read(self) -> list[Any]:
        """The replies that have arrived, possibly none.

        Raises:
          ProtocolError: end of file, bytes that are not JSON lines, or a line without an end.
        """
        try:
            data = os.read(self.replies, _READ)
        except BlockingIOError:
            return []
        if not data:
            raise ProtocolError("its process ended")
        self._incoming += data
        *lines, rest = self._incoming.split(b"\n")
        if len(rest) > _MAX_LINE:
            raise ProtocolError(f"it sent {len(rest)} bytes without an end of line")
        self._incoming = bytearray(rest)
        if lines:
            self.since = time.monotonic()
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise ProtocolError(f"it sent bytes that are not JSON: {error}") from error

    def hang_up(self) -> None:
        """Closes the pipes, at which the guardian kills the verifier and its process group; may be called again."""
        closing, self._open = self._open, ()
        for descriptor in closing:
            os.close(descriptor)

    def wait(self) -> str:
        """After `hang_up`: reaps the worker and says how its process ended."""
        try:
            code = self._guardian.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # somebody stopped the guardian; its death takes the verifier along
            self._guardian.kill()
            code = self._guardian.wait()
        self._output.close()
        if code < 0 or code > 128:
            return f"killed by signal {-code if code < 0 else code - 128}"
        return f"exit status {code}"

    def printed(self) -> str:
        """The last 4,000 bytes the worker printed before it was ready."""
        self._output.seek(max(0, os.fstat(self._output.fileno()).st_size - 4000))
        return self._output.read().decode(errors="replace")
