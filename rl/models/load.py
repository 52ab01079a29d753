"""Checkpoint directories in Hugging Face's layout: strict loading, and saving what `transformers` loads again."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.models import hf_config, names
from rl.models.language import LanguageModel, Params, stack_layers, unstack_layers
from rl.models.presets import make
from rl.models.rwkv7 import RWKV7Config
from rl.models.tokenizer import Characters, HFTokenizer, Tokenizer

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_NAME = re.compile(r"^\w[\w.-]*/\w[\w.-]*$", re.ASCII)
_LISTED = 12  # names per kind of mismatch in a message


def load(
    name: str | Path, *, dtype: str = "float32", scan_layers: bool = False, revision: str | None = None
) -> tuple[LanguageModel, Params, Tokenizer | None]:
    """A model, its parameters and its tokenizer from a directory or, by name, from the hub.

    Args:
        name: a directory with config.json, model.safetensors (or shards with an index) and, optionally, tokenizer.json; or
            "owner/model" on the Hugging Face hub, which needs the package huggingface_hub and a network.
        dtype: "float32" or "bfloat16", of parameters and computation, whatever the files hold.
        scan_layers: see the configurations.
        revision: of the hub.

    Returns:
        (model, params, tokenizer); the tokenizer is None where the directory has none.

    Raises:
        ValueError: not a checkpoint; tensors missing, extra, mis-shaped or not floating point, all of them in one error; an
            architecture, activation or rotary embedding not covered; a tokenizer with more ids than the vocabulary.
        ImportError: a package that this needs is not installed (says which).
    """
    directory = _directory(name, revision)
    config_file = directory / "config.json"
    json_config = _read_json(config_file)
    config = hf_config.from_json(json_config, str(config_file), dtype=dtype, scan_layers=scan_layers)
    tokenizer = _tokenizer(directory, json_config, config.vocab)
    flat = dataclasses.replace(config, scan_layers=False)
    params = _with_layout(_read(directory, make(flat)), config)
    return make(config), jax.tree.map(jnp.asarray, params), tokenizer


def save(
    path: str | Path,
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that `load` and, for the architectures it knows, `transformers` load again.

    Args:
        path: created if absent; must not hold a checkpoint yet.
        shard_bytes: several files and an index where the tensors are larger than this together.

    Raises:
        ValueError: parameters that do not fit the model in shape or type; a directory with a checkpoint; a configuration
            without a name in that layout.
        TypeError: a tokenizer of another kind. Nothing is written in any of these cases.
    """
    safetensors_numpy = _safetensors().numpy
    directory = Path(path)
    present = sorted(p.name for p in directory.glob("*.safetensors*")) if directory.is_dir() else []
    if present:
        raise ValueError(f"{directory} must not hold a checkpoint already; it has {present}: save to another directory")
    texts = {} if tokenizer is None else _tokenizer_files(tokenizer)
    ends, bos = ((), None) if tokenizer is None else (tokenizer.ends, tokenizer.bos)
    texts["config.json"] = _json_text(hf_config.to_json(model.config, ends=ends, bos=bos))
    tensors = _tensors(model, params)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _sharded(tensors, shard_bytes)
    files = [_WEIGHTS] if len(shards) == 1 else _shard_files(len(shards))
    for file, shard in zip(files, shards, strict=True):
        safetensors_numpy.save_file(shard, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(x.nbytes for x in tensors.values())
        texts = {_INDEX: _json_text({"metadata": {"total_size": total}, "weight_map": weight_map})} | texts
    for file, text in texts.items():  # config.json last: without it, a directory is no checkpoint
        (directory / file).write_text(text, encoding="utf-8")


# -- reading ---------------------------------------------------------------------------------------------------------


def _directory(name: str | Path, revision: str | None) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_NAME.match(str(name)):
        raise ValueError(
            f"a checkpoint is a directory, or a name like 'owner/model' on the hub; {str(name)!r} is neither an existing "
            "directory nor such a name"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{str(name)!r} is no local directory, and loading from the hub needs: pip install huggingface_hub"
        ) from error
    try:
        texts = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "characters.json"]
        wanted = ["*.safetensors", "*.safetensors.index.json", *texts]
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(
            f"{str(name)!r} is no local directory and could not be had from the hub ({type(error).__name__}: {error}): check "
            "name and network, or give the path of a local copy"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir())
        raise ValueError(f"{path.parent} is not a checkpoint: it has no {path.name}; it has {there[:_LISTED]}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("checkpoints need the package safetensors: pip install safetensors") from error
    return safetensors


def _read(directory: Path, model: LanguageModel) -> Params:
    """Parameters with unstacked layers, NumPy, in the model's type."""
    files, listed, problems = _files(directory)
    handles, place = {}, {}
    for file in files:
        handles[file] = _opened(directory / file)
        for name in handles[file].keys():  # noqa: SIM118 - not a dict
            if place.setdefault(name, file) != file:
                problems.append(f"{name} is in both {place[name]} and {file}")
    misplaced = [
        f"{name} in {place.get(name)} instead of {file}"
        for name, file in listed.items()
        if file in files and place.get(name) != file
    ]
    if misplaced:
        problems.append(f"{len(misplaced)} not where the index says: {', '.join(misplaced)}")
    slices = {name: handles[file].get_slice(name) for name, file in place.items()}
    wanted = names.sources(model)
    expected = {name: source.shape for source in wanted for name in source.names}
    tensor = lambda name: handles[place[name]].get_tensor(name)
    problems += _mismatches(model, expected, slices, tensor)
    if problems:
        raise ValueError(f"{directory} does not fit its config.json: " + "; ".join(problems))
    dtype = jnp.dtype(model.config.dtype)

    def ours(source: names.Source) -> np.ndarray:
        parts = [tensor(name) for name in source.names]
        parts = [(x.T if source.transposed else x.reshape(source.part)).astype(dtype) for x in parts]
        return np.stack(parts) if source.stacked else parts[0]

    return names.nested({source.path: ours(source) for source in wanted})


def _opened(path: Path):
    library = _safetensors()
    try:
        return library.safe_open(path, framework="np")
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _files(directory: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """The safetensors files of a checkpoint, its index of tensors' files, and what is wrong with the index."""
    if not (directory / _INDEX).is_file():
        if (directory / _WEIGHTS).is_file():
            return [_WEIGHTS], {}, []
        there = sorted(p.name for p in directory.iterdir())
        raise ValueError(
            f"{directory} is not a checkpoint: it has neither {_WEIGHTS} nor {_INDEX}; it has {there[:_LISTED]} (convert .bin "
            "or .pth files to safetensors first)"
        )
    weight_map = _read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{directory / _INDEX} must have a 'weight_map' of tensor names to files")
    listed = sorted(set(weight_map.values()))
    outside = [file for file in listed if Path(file).name != file]
    if outside:
        raise ValueError(f"{directory / _INDEX} must name files of its own directory; it names {outside}")
    absent = [file for file in listed if not (directory / file).is_file()]
    problems = [f"shards listed in the index but absent: {absent}"] if absent else []
    return [file for file in listed if file not in absent], weight_map, problems


def _mismatches(model: LanguageModel, expected: dict, slices: dict, tensor) -> list[str]:
    """Every missing, extra, mis-shaped and non-float tensor, one text per kind."""
    found = {name: tuple(part.get_shape()) for name, part in slices.items()}
    extra = [name for name in found if name not in expected and not names.unused(model.config, name)]
    if "lm_head.weight" in extra and "lm_head.weight" not in expected and "model.embed_tokens.weight" in found:
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if found[head] == found[embedding] and np.array_equal(tensor(head), tensor(embedding)):
            extra.remove(head)  # some files store a tied head twice
    kinds = {
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found],
        "extra": [f"{name} {list(found[name])}" for name in extra],
        "mis-shaped": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != tuple(shape)
        ],
        "not floating point": [
            f"{name} {slices[name].get_dtype()}"
            for name in expected
            if name in found and slices[name].get_dtype() not in _FLOATS
        ],
    }
    return [f"{len(what)} {kind}: {', '.join(sorted(what))}" for kind, what in kinds.items() if what]


def _with_layout(params: Params, config) -> Params:
    """Stacked where the configuration says so; RWKV's layer 0 then gets value-mixing weights that nothing depends on."""
    if not config.scan_layers:
        return params
    if isinstance(config, RWKV7Config):
        c, first = config, params["layer_0"]["time"]
        shapes = {"v0": (c.width,), "v1": (c.width, c.value_rank), "v2": (c.value_rank, c.width)}
        first |= {name: np.zeros(shape, jnp.dtype(c.dtype)) for name, shape in shapes.items()}
    return stack_layers(params)


def _tokenizer(directory: Path, config: dict[str, Any], vocab: int) -> Tokenizer | None:
    file = directory / "tokenizer.json"
    if (directory / "characters.json").is_file():
        alphabet = _read_json(directory / "characters.json").get("alphabet")
        if not isinstance(alphabet, str):
            raise ValueError(
                f"{directory / 'characters.json'} must have the key 'alphabet', a text; it has {alphabet!r}"
            )
        tokenizer: Tokenizer = Characters(alphabet)
    elif file.is_file():
        read = lambda name: _read_json(directory / name) if (directory / name).is_file() else {}
        special = hf_config.special_tokens(config, read("tokenizer_config.json"), read("generation_config.json"))
        tokenizer = HFTokenizer(file, **special)
    else:
        return None
    if tokenizer.size > vocab:
        raise ValueError(
            f"a tokenizer must not have more ids than the vocabulary; {directory} has {tokenizer.size} ids for {vocab} "
            "entries: it belongs to another model"
        )
    return tokenizer


# -- writing ---------------------------------------------------------------------------------------------------------


def _tensors(model: LanguageModel, params: Params) -> dict[str, np.ndarray]:
    """Tensors by their released names; params in either layout."""
    dtype = model.config.dtype
    flat_model = make(dataclasses.replace(model.config, scan_layers=False))
    params = unstack_layers(params)
    wanted = names.sources(flat_model)
    paths = {source.path for source in wanted}
    given = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    wrong = [
        "/".join(path) + " is no parameter of it" for path in given if path not in paths and not _spare(model, path)
    ]
    out = {}
    for source in wanted:
        value, shape = names.lookup(params, source.path), source.whole
        found = "absent" if value is None else f"{value.dtype} {list(value.shape)}"
        if found != f"{dtype} {list(shape)}":
            wrong.append(f"{'/'.join(source.path)} {found} instead of {dtype} {list(shape)}")
            continue
        parts = np.asarray(value) if source.stacked else np.asarray(value)[None]
        for name, part in zip(source.names, parts, strict=True):
            out[name] = np.ascontiguousarray(part.T if source.transposed else part.reshape(source.shape))
    if wrong:
        raise ValueError(f"the parameters do not fit the model: {', '.join(wrong)}")
    return out


def _spare(model: LanguageModel, path: tuple[str, ...]) -> bool:
    """Whether a parameter exists only because RWKV's layers were stacked."""
    of_first = isinstance(model.config, RWKV7Config) and path[:2] == ("layer_0", "time")
    return of_first and path[-1] in ("v0", "v1", "v2")


def _sharded(tensors: dict[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    """Tensors in order, cut where a file would exceed the limit; at least one per file."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    return shards


def _shard_files(count: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    match tokenizer:
        case Characters():
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end}
            return {
                "characters.json": _json_text({"alphabet": tokenizer.alphabet}),
                "tokenizer.json": tokenizer.json,
                "tokenizer_config.json": _json_text(settings | {"clean_up_tokenization_spaces": False}),
            }
        case HFTokenizer():
            ids = {"eos_token": tokenizer.eos, "bos_token": tokenizer.bos}
            special = {name: tokenizer.token(index) for name, index in ids.items() if index is not None}
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
            return {"tokenizer.json": tokenizer.json, "tokenizer_config.json": _json_text(settings)}
        case _:
            raise TypeError(
                f"tokenizers that can be saved are HFTokenizer and Characters; got {type(tokenizer).__name__}"
            )
