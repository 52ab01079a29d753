"""A process that runs one verifier: `python -m rl.rewards.worker` with three pipe ends, started by `rl.rewards.pool`.

Two processes per worker. The *guardian* only waits for its lifeline, a pipe whose other end the pool holds, so it
notices the pool's death and kills the verifier whatever that one does, also inside C code that never lets go of the
interpreter. The *verifier* reads chunks of items and answers one line of JSON per item, in a process group of its own.

    pool -> verifier  {"path": "module:function", "memory": bytes or null}, then [[completion, answer], ...] per line
    verifier -> pool  {"ready": true} or {"failed": text}, then [value, status, parts, message] per item
"""

import ctypes
import importlib
import io
import json
import math
import numbers
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from rl.tasks.types import STATUSES, Verdict

Reply = tuple[float, str, dict[str, float], str]

MAX_PARTS = 64
MAX_NAME = 100  # characters in the name of a part
MAX_MESSAGE = 500  # characters
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Splits into guardian and verifier; arguments: descriptors of the requests, the replies and the lifeline."""
    requests, replies, lifeline = (int(argument) for argument in sys.argv[1:])
    guardian = os.getpid()
    verifier = os.fork()  # nothing has been imported and no thread started yet, so this is safe
    if verifier == 0:
        os.setpgid(0, 0)
        os.close(lifeline)
        _die_with(guardian)
        _serve(requests, replies)
    else:
        os.close(requests)
        os.close(replies)
        _guard(verifier, lifeline)


def _guard(verifier: int, lifeline: int) -> None:
    """Waits until the pool closes the lifeline, or dies; then kills the verifier's process group and reaps it."""
    os.read(lifeline, 1)
    for kill, target in ((os.killpg, verifier), (os.kill, verifier)):
        try:
            kill(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # already gone, or between fork and setpgid
    status = os.waitstatus_to_exitcode(os.waitpid(verifier, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _die_with(guardian: int) -> None:
    """If somebody kills the guardian, the kernel kills the verifier (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:  # it died before the kernel knew
        os._exit(1)


def _serve(requests: int, replies: int) -> None:
    os.set_inheritable(requests, False)  # a program started by the verifier must not keep the pipes open
    os.set_inheritable(replies, False)
    with os.fdopen(requests, "rb") as incoming:
        setup = json.loads(incoming.readline())
        if setup["memory"] is not None:
            resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
        try:
            verify = _load(setup["path"])
        except BaseException as error:  # noqa: BLE001  (whatever importing does, the pool has to hear of it)
            _send(replies, {"failed": _describe(error, traceback.format_exc()[-4000:])})
            return
        _silence()
        _send(replies, {"ready": True})
        for line in incoming:
            for completion, answer in json.loads(line):
                _send(replies, judge(verify, completion, answer))


def _load(path: str) -> Callable[[str, Any], Verdict]:
    module_name, _, function = path.partition(":")
    verify = vars(importlib.import_module(module_name)).get(function)
    if not callable(verify):
        raise ImportError(f"module {module_name} has no function {function!r}")
    if "jax" in sys.modules:
        raise ImportError(
            f"verifiers run in processes without jax (a second process cannot share an accelerator), but importing "
            f"{module_name} imports it: move the verifier to a module that does not"
        )
    return verify


def _silence() -> None:
    """Whatever a verifier prints goes nowhere: it cannot fill a pipe, nor the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.stdout = io.TextIOWrapper(open(os.devnull, "wb"), errors="replace")
    sys.stderr = sys.stdout


def judge(verify: Callable[[str, Any], Verdict], completion: str, answer: Any) -> Reply:
    """One item: `(value, status, parts, message)`; never raises.

    Anything but a `Verdict` with a finite value, a known status and finite parts is "unscorable"; an exception, also
    `SystemExit` and `KeyboardInterrupt`, is "error". The value is 0 unless the status is "ok".
    """
    try:
        return _checked(verify(completion, answer))
    except BaseException as error:  # noqa: BLE001  (the verifier's bugs cost one sample, whatever they raise)
        return 0.0, "error", {}, _describe(error)


def _checked(verdict: Any) -> Reply:
    if not isinstance(verdict, Verdict):
        return 0.0, "unscorable", {}, f"a verifier must return a Verdict, not {type(verdict).__name__}"[:MAX_MESSAGE]
    if verdict.status not in STATUSES:
        return 0.0, "unscorable", {}, f"the status must be one of {STATUSES}, not {verdict.status!r:.100}"
    value = _finite(verdict.value)
    if value is None:
        return 0.0, "unscorable", {}, f"the value must be a finite number, not {_shown(verdict.value)}"
    if not isinstance(verdict.parts, dict) or len(verdict.parts) > MAX_PARTS:
        return 0.0, "unscorable", {}, f"parts must be a dict of at most {MAX_PARTS} numbers"
    parts = {str(name)[:MAX_NAME]: _finite(part) for name, part in verdict.parts.items()}
    wrong = [name for name, part in parts.items() if part is None]
    if wrong:
        return 0.0, "unscorable", {}, f"part {wrong[0]!r} must be a finite number"
    return value if verdict.status == "ok" else 0.0, verdict.status, parts, ""


def _finite(value: Any) -> float | None:
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int or a Fraction beyond the range of a float
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    # Not repr of everything: that of a huge int takes seconds or raises.
    return repr(value) if isinstance(value, float) else f"a {type(value).__name__}"


def _describe(error: BaseException, trace: str = "") -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001  (an exception whose own __str__ raises)
        text = type(error).__name__
    return f"{text[:MAX_MESSAGE]}\n{trace}".rstrip()


def _send(replies: int, message: Any) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(replies, data) :]


if __name__ == "__main__":
    main()
