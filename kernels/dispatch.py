"""Which implementation an operation runs with: one switch for all of them.

    kernels.use("auto")        # the kernel written for this device where one serves the shape, else the reference
    kernels.use("reference")   # plain JAX everywhere
    kernels.use("pallas_tpu")  # this kernel, or an error that says why it cannot serve
    op(..., implementation="reference")  # the same for one call

What was chosen, and why, is logged once per operation and shape ("kernels", level INFO).
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

import jax
from jax.sharding import AxisType

IMPLEMENTATIONS = ("auto", "reference", "pallas_tpu", "pallas_gpu")
_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
_MODES = ("device", "interpret", "lower")


class KernelError(ValueError):
    """A named kernel that cannot serve."""


class _Setting(NamedTuple):
    wanted: str = "auto"
    mode: str = "device"
    refusal: str = ""


log = logging.getLogger("kernels")
_setting = jax.make_user_context(_Setting())  # part of what `jax.jit` remembers a trace by
_logged: set[tuple[str, ...]] = set()


def use(implementation: str) -> None:
    """Sets what every operation runs with from now on, in this process; jitted functions are traced anew.

    Raises:
        ValueError: an unknown name.
    """
    _check(implementation)
    _setting.set_global(_setting.value._replace(wanted=implementation))


@contextlib.contextmanager
def mode(how: str) -> Iterator[None]:
    """How kernels are traced inside: for tests, and to compile on one machine for another.

    Args:
        how: "device": for the device at hand, an error where it is another than the kernel's. "interpret": run on a CPU by
            Pallas' interpreters, slowly. "lower": for `jax.export` with `platforms`, whatever is at hand.

    Raises:
        ValueError: an unknown mode.
    """
    if how not in _MODES:
        raise ValueError(f"mode is one of {_MODES}; got {how!r}")
    with _setting(_setting.value._replace(mode=how)):
        yield


@contextlib.contextmanager
def refused(reason: str) -> Iterator[None]:
    """No kernel serves what is traced inside, for this reason; "" changes nothing."""
    with _setting(_setting.value._replace(refusal=reason or _setting.value.refusal)):
        yield


def interpreted() -> bool:
    """Whether kernels traced now are to be interpreted."""
    return _setting.value.mode == "interpret"


def module(op: str, kernel: str) -> ModuleType:
    """`kernels.<op>.<kernel>`, imported when it is needed: Pallas takes half a second."""
    return importlib.import_module(f"kernels.{op}.{kernel}")


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
    wanted = _setting.value.wanted if implementation is None else implementation
    _check(wanted)
    if wanted == "reference":
        chosen, reason = wanted, "asked for"
    elif wanted == "auto":
        name = _KERNELS.get(_platform())
        reason = (_undivided() or _reason(kernels, name)) if name else f"no kernels for {_platform()}"
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


def passed(op: str, shape: str, reason: str) -> None:
    """Logs that a caller with a form of its own for what no kernel computes uses that form, once per shape."""
    if (op, shape, "passed") not in _logged:
        _logged.add((op, shape, "passed"))
        log.info("%s of %s does not run as a kernel: %s", op, shape, reason)


def _reason(kernels: Mapping[str, Callable[[], str]], name: str) -> str:
    if name not in kernels:
        return f"it has no such kernel (it has {', '.join(kernels)})"
    setting = _setting.value
    return (setting.mode == "device" and _device(name, _platform())) or setting.refusal or kernels[name]()


def _platform() -> str:
    """Of the device that what is traced now will run on."""
    chosen = jax.config.jax_default_device
    return jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)


def _undivided() -> str:
    """Why no kernel may be chosen unasked on a machine of several devices, or "".

    The compiler divides arrays as it likes over every axis that `jax.shard_map` does not, and it cannot divide a kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = [kind for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if size > 1]
    if jax.device_count() == 1 or (mesh.axis_types and all(kind == AxisType.Manual for kind in kinds)):
        return ""
    return (
        f"there are {jax.device_count()} devices, and only where jax.shard_map divides over all of them is a kernel sure to "
        "run on one"
    )


@functools.cache
def _device(name: str, backend: str) -> str:
    """Why the device at hand cannot run this kernel, or ""."""
    device = jax.devices(backend)[0]
    if _KERNELS.get(backend) != name:
        return f"the device is {device.device_kind} ({backend})"
    if backend == "gpu" and not str(getattr(device, "compute_capability", "")).startswith("9."):
        return f"it is written for Hopper (compute capability 9), the device is {device.device_kind}"
    return ""


def _check(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
