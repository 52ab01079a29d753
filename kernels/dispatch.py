"""Which implementation an operation runs with: one switch for all of them.

    kernels.use("auto")        # the kernel written for this device where one serves the shape, else the reference
    kernels.use("reference")   # plain JAX everywhere
    kernels.use("pallas_tpu")  # this kernel, or an error that says why it cannot serve
    op(..., implementation="reference")  # the same for one call

What was chosen, and why, is logged once per operation and shape ("kernels", level INFO).
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping

import jax

IMPLEMENTATIONS = ("auto", "reference", "pallas_tpu", "pallas_gpu")
_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
_MODES = ("device", "interpret", "lower")


class KernelError(ValueError):
    """A named kernel that cannot serve."""


log = logging.getLogger("kernels")
_wanted, _mode, _refusal = "auto", "device", ""
_logged: set[tuple[str, ...]] = set()


def use(implementation: str) -> None:
    """Sets what every operation runs with from now on, in this process; functions compiled before are compiled anew.

    Raises:
        ValueError: an unknown name.
    """
    global _wanted
    _check(implementation)
    if implementation != _wanted:
        _wanted = implementation
        jax.clear_caches()


@contextlib.contextmanager
def mode(how: str) -> Iterator[None]:
    """How kernels are traced inside: for tests, and to compile on one machine for another.

    A function jitted before keeps what it was traced with.

    Args:
        how: "device": for the device at hand, an error where it is another than the kernel's. "interpret": run on a CPU by
            Pallas' interpreters, slowly. "lower": for `jax.export` with `platforms`, whatever is at hand.

    Raises:
        ValueError: an unknown mode.
    """
    global _mode
    if how not in _MODES:
        raise ValueError(f"mode is one of {_MODES}; got {how!r}")
    before, _mode = _mode, how
    try:
        yield
    finally:
        _mode = before


@contextlib.contextmanager
def refused(reason: str) -> Iterator[None]:
    """No kernel serves what is traced inside, for this reason; "" changes nothing."""
    global _refusal
    before, _refusal = _refusal, reason or _refusal
    try:
        yield
    finally:
        _refusal = before


def interpreted() -> bool:
    """Whether kernels traced now are to be interpreted."""
    return _mode == "interpret"


def choose(
    op: str,
    shape: str,
    kernels: Mapping[str, Callable[[], str]],
    implementation: str | None = None,
    logged: bool = True,
) -> str:
    """ "reference", or the name of the kernel to call.

    Args:
        op: name of the operation, for messages.
        shape: what is asked of it, in words: shapes and types.
        kernels: name of a kernel -> () -> why it cannot serve this shape, "" where it can.
        implementation: one of `IMPLEMENTATIONS`; None: what `use` set.
        logged: whether the choice is logged.

    Raises:
        ValueError: an unknown name.
        KernelError: a named kernel that cannot serve, with the reason.
    """
    wanted = _wanted if implementation is None else implementation
    _check(wanted)
    if wanted == "reference":
        chosen, reason = wanted, "asked for"
    elif wanted == "auto":
        name = _KERNELS.get(jax.default_backend())
        reason = _reason(kernels, name) if name else f"no kernels for {jax.default_backend()}"
        chosen, reason = ("reference", reason) if reason else (name, "written for this device")
    else:
        chosen, reason = wanted, "asked for"
        if unserved := _reason(kernels, wanted):
            raise KernelError(
                f"{op} of {shape} cannot run as {wanted!r}: {unserved}; use implementation='auto' or 'reference'"
            )
    if logged and (op, shape, chosen) not in _logged:
        _logged.add((op, shape, chosen))
        log.info("%s of %s runs as %s: %s", op, shape, chosen, reason)
    return chosen


def _reason(kernels: Mapping[str, Callable[[], str]], name: str) -> str:
    if name not in kernels:
        return f"it has no such kernel (it has {', '.join(kernels)})"
    return (_mode == "device" and _device(name)) or _refusal or kernels[name]()


@functools.cache
def _device(name: str) -> str:
    """Why the device at hand cannot run this kernel, or ""."""
    backend, device = jax.default_backend(), jax.devices()[0]
    if _KERNELS.get(backend) != name:
        return f"the device is {device.device_kind} ({backend})"
    if backend == "gpu" and not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"it is written for Hopper (compute capability 9), the device is {device.device_kind}"
    return ""


def _check(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
