"""Slots: steps of the loop that can be exchanged. A slot is a folder, a method is one file in it, the config names the file.

Every method has the same four functions; what they take and return is written in the folder's `__init__`:

    default_config() -> ConfigDict        flat and locked, every key with its default
    init(config, ...) -> state            a pytree of arrays, part of the train state and so of every checkpoint
    apply(config, state, ...) -> ...      what the loop asks for
    update(config, state, ...) -> (state, metrics)     what the method learns from how that went

All are pure: a state is never changed in place. There is no registry: a new file is found by its name, and by
`tests/conformance`, which reads `FOLDERS`. Files whose name begins with "_" are not methods.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from rl.config import ConfigError

FOLDERS = ("rl.data.selection", "rl.data.replay")


class Slot(NamedTuple):
    """A method with its config bound: `init(...)`, `apply(state, ...)` and `update(state, ...)`."""

    name: str
    init: Callable[..., Any]
    apply: Callable[..., Any]
    update: Callable[..., tuple[Any, dict[str, float]]]


def names(folder: str) -> tuple[str, ...]:
    """The methods of a slot, such as `names("rl.data.replay")`."""
    found = pkgutil.iter_modules(importlib.import_module(folder).__path__)
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def block(folder: str, name: str, **changes: Any) -> ml_collections.ConfigDict:
    """The part of a config that picks a method: its `name` and all of its keys, locked.

    Raises:
        ConfigError: no such method, key or type.
    """
    config = _configured(folder, name, changes)
    return ml_collections.ConfigDict({"name": name} | config.to_dict()).lock()


def bind(folder: str, config: ml_collections.ConfigDict) -> Slot:
    """The method that a `block` picks.

    Raises:
        ConfigError: no such method, a key it does not have or lacks, or a value of another type.
    """
    given = dict(config.items())
    if "name" not in given:
        raise ConfigError(f"a slot's config needs a name, one of {', '.join(names(folder))}; got keys {sorted(given)}")
    name = given.pop("name")
    own = _configured(folder, name, given)
    if missing := sorted(set(own) - set(given)):
        raise ConfigError(
            f"a slot's config holds every key of its method; {folder}.{name} also has {missing}: use block()"
        )
    module = _module(folder, name)
    with_config = lambda f: functools.partial(f, own)
    return Slot(name, with_config(module.init), with_config(module.apply), with_config(module.update))


def _module(folder: str, name: str):
    if name not in names(folder):
        raise ConfigError(f"unknown method {name!r} of {folder}; known: {', '.join(names(folder))}")
    return importlib.import_module(f"{folder}.{name}")


def _configured(folder: str, name: str, changes: dict[str, Any]) -> ml_collections.ConfigDict:
    config = _module(folder, name).default_config().lock()
    if unknown := sorted(set(changes) - set(config)):
        raise ConfigError(f"unknown keys {unknown} of {folder}.{name}; known: {sorted(config)}")
    for key, value in changes.items():
        try:
            config[key] = value
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{key} of {folder}.{name} must be a {type(config[key]).__name__}; got {value!r}"
            ) from error
    return config
