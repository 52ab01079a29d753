"""Language tasks: prompts, and verifiers that judge completions as untrusted text. Nothing here imports jax.

A task is one module of this folder with `make(**options) -> Task` and `verify(completion, answer) -> Verdict`; modules
whose names start with an underscore are parts of tasks.
"""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

from rl.tasks.types import Problem, Task, TaskError, Verdict

__all__ = ["Problem", "Task", "TaskError", "Verdict", "make", "names"]


def names() -> list[str]:
    """The tasks `make` knows."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_") and m.name != "types")


def make(name: str, **options: Any) -> Task:
    """Builds a task by name.

    Args:
      name: one of `names()`.
      **options: the keyword arguments of that module's `make`.

    Returns:
      A `Task`.

    Raises:
      TaskError: an unknown name or option (the message lists what exists), or an option out of range.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise TaskError(f"unknown task {name!r}.{hint} There are: {', '.join(known)}")
    build = importlib.import_module(f"rl.tasks.{name}").make
    parameters = inspect.signature(build).parameters
    unknown = sorted(options.keys() - parameters.keys())
    if unknown:
        listing = ", ".join(str(p) for p in parameters.values()) or "none"
        raise TaskError(f"task {name} has no option {', '.join(unknown)}. It has: {listing}")
    missing = sorted(n for n, p in parameters.items() if p.default is p.empty and n not in options)
    if missing:
        raise TaskError(f"task {name} needs the option {', '.join(missing)}")
    return build(**options)
