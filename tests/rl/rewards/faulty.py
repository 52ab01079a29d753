"""A verifier with every fault a worker has to survive; the completion names the fault. Imported by reward workers."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import time

from rl.tasks.types import Verdict


def verify(completion, answer):
    name, _, argument = completion.partition(" ")
    return (
        FAULTS[name](argument) if name in FAULTS else Verdict(float(len(completion)), "ok", {"answer": float(answer)})
    )


def busy_in_c(_):
    """C code that holds the interpreter lock and never looks at signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sum(itertools.repeat(1))


def sleep(_):
    time.sleep(600)


def raises(_):
    raise ValueError("bad " * 10_000)


def recursion(argument):
    return recursion(argument)


def hog(_):
    kept = []
    while True:
        kept.append(bytes(1 << 26))


def noise(_):
    """Prints lines like the protocol's, by Python and below it, far more than a pipe holds."""
    for _ in range(100):
        print('[9.0, "ok", {}, ""]\n' * 1000)
        print("noise " * 1000, file=sys.stderr)
        os.write(1, b"noise\n" * 1000)
        os.write(2, b"noise\n" * 1000)
    sys.stdin.read()
    return Verdict(0.5, "ok", {})


def leave_child(path):
    """Starts a process that outlives the item, and writes its number to a file."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    return Verdict(1.0, "ok", {})


def leave_child_and_hang(path):
    leave_child(path)
    busy_in_c("")


def write_pid(path):
    """Says who it is, then hangs, until somebody kills it."""
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


class Rude(Exception):
    def __str__(self):
        raise RuntimeError("no message either")


def rude(_):
    raise Rude


def interrupt(_):
    raise KeyboardInterrupt


FAULTS = {
    "nan": lambda _: Verdict(float("nan"), "ok", {}),
    "infinite": lambda _: Verdict(float("-inf"), "ok", {}),
    "huge": lambda _: Verdict(10**400, "ok", {}),
    "text": lambda _: Verdict("1.0", "ok", {}),
    "none": lambda _: None,
    "number": lambda _: 1.0,
    "status": lambda _: Verdict(1.0, "fine", {}),
    "parts": lambda _: Verdict(1.0, "ok", {"part": float("nan")}),
    "many": lambda _: Verdict(1.0, "ok", {str(i): 0.0 for i in range(10**5)}),
    "big": lambda _: "x" * 10**8,
    "declines": lambda _: Verdict(3.0, "unscorable", {"format": 0.0}),
    "raises": raises,
    "rude": rude,
    "quit": lambda _: sys.exit(0),
    "interrupt": interrupt,
    "recursion": recursion,
    "hog": hog,
    "exit": lambda _: os._exit(3),
    "abort": lambda _: os.abort(),
    "segfault": lambda _: ctypes.string_at(0),
    "sleep": sleep,
    "busy": busy_in_c,
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "noise": noise,
    "modules": lambda _: Verdict(1.0, "ok", {name: float(name in sys.modules) for name in ("jax", "numpy", "rl")}),
    "pid": lambda _: Verdict(float(os.getpid()), "ok", {}),
    "child": leave_child,
    "child_hang": leave_child_and_hang,
    "killed": write_pid,
}
