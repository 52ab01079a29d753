"""Converts a released RWKV-7 checkpoint (.pth) to a directory that rl.models.load reads, once.

python -m experiments.convert_rwkv --source=RWKV-x070-World-0.1B.pth --target=checkpoints/rwkv7-0.1b

A .pth file is a pickle: torch reads it with weights_only=True, which runs no code of the file, and nothing else here reads one.
"""

import json
import re
from pathlib import Path

from absl import app, flags, logging

_SOURCE = flags.DEFINE_string("source", None, "the .pth file", required=True)
_TARGET = flags.DEFINE_string("target", None, "directory to write", required=True)
_TORCH = (2, 6)  # before it, weights_only=True could be made to run code (CVE-2025-32434)
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
# Tensors that say which version a checkpoint is of; the highest found decides.
_VERSIONS = {"att.r_k": 7, "att.time_maa_x": 6, "att.time_faaaa": 5, "att.time_first": 4}


def convert(source: str | Path, target: str | Path) -> dict:
    """Writes model.safetensors (tensors as they are, by their released names) and config.json. Returns the configuration.

    Raises:
        ImportError: torch is absent or older than 2.6.
        ValueError: the file is no RWKV-7 checkpoint, or holds something else than tensors; the target holds a checkpoint.
    """
    tensors = read(source)
    config = describe(tensors, str(source))
    directory = Path(target)
    if (directory / "config.json").exists():
        raise ValueError(f"{directory} must not hold a checkpoint already: convert to another directory")
    import safetensors.torch

    directory.mkdir(parents=True, exist_ok=True)
    # Copies, because tensors that share memory cannot be saved; one at a time, so that the original's memory is free again.
    whole = {name: tensors.pop(name).contiguous().clone() for name in list(tensors)}
    safetensors.torch.save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def read(source: str | Path) -> dict:
    """The tensors of a .pth file, by name."""
    if not Path(source).is_file():
        raise ValueError(f"{source} must be a .pth file; there is no file of this name")
    try:
        import torch
    except ImportError as error:
        raise ImportError("reading a .pth file needs torch: pip install torch") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _TORCH:
        raise ImportError(
            f"reading a .pth file safely needs torch >= {'.'.join(map(str, _TORCH))}; got {torch.__version__}: upgrade torch"
        )
    try:
        tensors = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises whatever the file's content makes it raise
        # Not torch's own text: it goes on to advise weights_only=False, which would run the file's code.
        raise ValueError(
            f"{source} is not a file that torch.load(weights_only=True) reads ({type(error).__name__}): it must hold a "
            "dictionary of tensors and nothing else"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise ValueError(f"{source} must hold a dictionary of tensors; it holds a {type(tensors).__name__}")
    return tensors


def describe(tensors: dict, source: str) -> dict:
    """config.json from the tensors' names and shapes."""
    marks = {version for mark, version in _VERSIONS.items() if f"blocks.0.{mark}" in tensors}
    if max(marks, default=0) != 7:
        found = f"version {max(marks)}" if marks else "no RWKV checkpoint"
        raise ValueError(f"{source} must be an RWKV-7 checkpoint (with blocks.0.att.r_k); it is {found}")

    def size(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].ndim != 2:
            raise ValueError(f"{source} must hold the matrix {name!r}; it has {sorted(tensors)[:12]} and others")
        return tensors[name].shape[axis]

    layers = 1 + max(int(found[1]) for found in map(_BLOCK.match, tensors) if found)
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": size("emb.weight", 0),
        "num_hidden_layers": layers,
        "hidden_size": size("emb.weight", 1),
        "head_dim": size("blocks.0.att.r_k", 1),
        "intermediate_size": size("blocks.0.ffn.key.weight", 0),
        "decay_low_rank_dim": size("blocks.0.att.w1", 1),
        "a_low_rank_dim": size("blocks.0.att.a1", 1),
        "v_low_rank_dim": size("blocks.1.att.v1" if layers > 1 else "blocks.0.att.w1", 1),  # layer 0 mixes no values
        "gate_low_rank_dim": size("blocks.0.att.g1", 1),
        "dtype": str(tensors["emb.weight"].dtype).removeprefix("torch."),
        "eos_token_id": 0,
    }


def main(_) -> None:
    """Converts, then loads the result to check every tensor's name and shape."""
    from rl.models.load import load

    logging.info("converted: %s", convert(_SOURCE.value, _TARGET.value))
    model, _, _ = load(_TARGET.value, dtype="bfloat16")
    logging.info("loads as %s", model.config)


if __name__ == "__main__":
    app.run(main)
