"""Config files, command-line overrides, and the resolved config that a working directory remembers.

A config is a Python file with `get_config(variant="...")` returning an `ml_collections.ConfigDict`. Scripts take
`--config=configs/x.py[:variant] --config.some.key=value --workdir=DIR`.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from kernels.dispatch import IMPLEMENTATIONS

_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=\s]+)")
_ABSENT = "(absent)"


class ConfigError(ValueError):
    """A config, an override or a working directory's config that breaks a stated rule."""


class Arguments(NamedTuple):
    """What every experiment script takes from its command line."""

    config: ml_collections.ConfigDict  # resolved and locked
    workdir: str | None
    tensorboard: bool  # also write TensorBoard event files
    kernels: str  # see `kernels.use`


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Loads a config file, applies overrides and locks it.

    Args:
      path: `configs/x.py` or `configs/x.py:variant`; the text after the colon is handed to `get_config`.
      overrides: assignments such as `"lr=3e-4"` or `"policy.width=64"`, with or without a leading `--config.`.

    Returns:
      The locked `ConfigDict`.

    Raises:
      ConfigError: the file cannot be read, a key does not exist, or a value has the wrong type.
    """
    marked = [o if o.startswith("-") else f"--config.{o}" for o in overrides]
    return _parse_flags(["load", f"--config={path}", *marked]).config


def parse(argv: Sequence[str] | None = None, workdir_required: bool = True) -> Arguments:
    """Reads `--config`, its overrides, `--workdir`, `--tensorboard` and `--kernels` from a command line.

    Args:
      argv: the command line with the program's name first; `sys.argv` if None.
      workdir_required: whether a missing `--workdir` is an error.

    Returns:
      `Arguments(config, workdir, tensorboard, kernels)`. Bad input prints one message and exits with status 2; `--help` prints
      what there is to say, the keys of a given `--config` included, and exits with status 0.
    """
    argv = list(sys.argv if argv is None else argv)
    asked = {"--help", "-h"} & set(argv)
    try:
        if asked:
            print(_help([a for a in argv if a not in asked]))
            raise SystemExit(0)
        arguments = _parse_flags(argv)
        if workdir_required and not arguments.workdir:
            raise ConfigError("--workdir is missing: give the folder that holds this run, such as --workdir=runs/first")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return arguments


def resolved(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists), exactly as a reader of `config.json` sees it.

    Raises:
      ConfigError: a value JSON cannot hold; the message names its key.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    for key, value in flatten(tree).items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"config values must be finite JSON values, but {key} is {value!r} ({type(value).__name__}): "
                "store a number, a string, a bool, None or a tuple of these"
            ) from error
    return json.loads(json.dumps(tree))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to `{"dotted.key": value}`; empty mappings are kept as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = dict(value) if isinstance(value, Mapping) else value
    return flat


def check_same(stored: Mapping[str, Any], current: Mapping[str, Any], where: str) -> None:
    """Compares two resolved configs.

    Args:
      stored: the config that `where` was started with.
      current: the config of this command.
      where: the working directory, for the message.

    Raises:
      ConfigError: they differ; names each key with both values and the two ways out.
    """
    old, new = flatten(stored), flatten(current)
    rows = [
        f"  {key}: stored {_show(old, key)}, this command {_show(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if _show(old, key) != _show(new, key)
    ]
    if rows:
        raise ConfigError(
            f"a working directory holds one config, but {where} was started with another:\n"
            + "\n".join(rows)
            + "\nuse another --workdir, or the stored values to resume it"
        )


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else _ABSENT


def _parse_flags(argv: list[str]) -> Arguments:
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        name, equals, value = argument.partition("=")
        path = (value if equals else following).partition(":")[0]
        if name in ("--config", "-config") and not Path(path).is_file():
            raise ConfigError(f"--config must name a config file, but {path!r} does not exist in {Path.cwd()}")
    base = _read(_without_overrides(argv), argv[:1])
    if base.config is None:
        raise ConfigError("--config is missing: give a config file, such as --config=configs/control_cartpole.py")
    keys = flatten(base.config.to_dict())
    for argument in argv[1:]:
        match = _OVERRIDE.match(argument)
        if match:
            _check_key(match.group(1), keys, argument)
    return _read(argv[1:], argv[:1])


def _without_overrides(argv: list[str]) -> list[str]:
    """Drops `--config.key=value` and `--config.key value`, so the config's own keys can be listed first."""
    kept, skip_value = [], False
    for argument in argv[1:]:
        if _OVERRIDE.match(argument):
            skip_value = "=" not in argument
        elif skip_value and not argument.startswith("-"):
            skip_value = False
        else:
            kept.append(argument)
            skip_value = False
    return kept


def _read(arguments: list[str], program: list[str]) -> Arguments:
    argv = [*program, *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file[:variant]", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of this run", flag_values=values)
    flags.DEFINE_bool("tensorboard", False, "also write TensorBoard event files", flag_values=values)
    flags.DEFINE_enum("kernels", "auto", IMPLEMENTATIONS, "implementation of the hot operations", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        own = [e for e in _causes(error) if isinstance(e, ConfigError)]  # what `get_config` itself found wrong
        raise ConfigError(str(own[-1]) if own else f"{error}\n{_usage(program)}") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the config could not be loaded: {type(error).__name__}: {error}") from error
    if len(rest) > 1:
        raise ConfigError(
            f"unexpected argument {rest[1]!r}: overrides are written --config.key=value\n{_usage(program)}"
        )
    config = values["config"].value
    if config is not None and not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"get_config must return an ml_collections.ConfigDict, not {type(config).__name__}")
    return Arguments(config, values["workdir"].value, values["tensorboard"].value, values["kernels"].value)


def _check_key(path: str, keys: Mapping[str, Any], argument: str) -> None:
    name = path.split("[", 1)[0]
    if name in keys or any(key.startswith(f"{name}.") for key in keys):
        return
    close = difflib.get_close_matches(name, keys, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"{argument}: this config has no key {name!r}{hint}. It has:\n{_listing(keys)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _listing(keys: Mapping[str, Any]) -> str:
    return "\n".join(f"  {key} = {value!r}" for key, value in sorted(keys.items()))


def _usage(argv: Sequence[str]) -> str:
    program = argv[0] if argv else "script"
    asked = "--config=FILE.py[:variant] [--config.key=value ...] --workdir=DIR [--tensorboard] [--kernels=auto]"
    return f"usage: {program} {asked}"


def _help(argv: list[str]) -> str:
    lines = [
        _usage(argv),
        "  --config=FILE.py[:variant]  the recipe; its docstring says what it does, and an unknown variant lists those known",
        "  --config.key=value          overrides a key of the recipe",
        "  --workdir=DIR               folder of this run; the same command resumes what is in it",
        "  --tensorboard               also write TensorBoard event files",
        f"  --kernels=auto              implementation of the hot operations: {', '.join(IMPLEMENTATIONS)}",
    ]
    if any(re.match("--?config(=|$)", argument) for argument in argv):
        lines += ["keys of this config:", _listing(flatten(_parse_flags(argv).config.to_dict()))]
    else:
        lines += ["with --config=FILE.py, --help lists the keys of that config too"]
    return "\n".join(lines)
