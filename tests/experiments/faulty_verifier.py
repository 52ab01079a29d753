"""A verifier that fails as a problem's answer asks for; imported by reward workers."""

import os
import time
import zlib

from rl.tasks.types import Verdict

STATUS = {"": "ok", "sleep": "timeout", "raise": "error", "crash": "error", "nan": "unscorable"}


def fault(completion, answer):
    """The fault that this completion meets: that of its problem, for every completion or for about half of them."""
    return answer["fault"] if answer["always"] or zlib.crc32(completion.encode()) % 2 else ""


def value(completion):
    return (zlib.crc32(completion.encode()) % 11) / 10


def verify(completion, answer):
    match fault(completion, answer):
        case "sleep":
            time.sleep(600)
        case "raise":
            raise ValueError("no verdict")
        case "crash":
            os._exit(3)
        case "nan":
            return Verdict(float("nan"), "ok", {})
    return Verdict(value(completion), "ok", {"length": float(len(completion))})
