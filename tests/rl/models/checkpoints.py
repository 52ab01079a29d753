"""Tiny checkpoints with typed-in configurations and seeded weights, and what reference implementations answer to them.

`python -m tests.rl.models.checkpoints` asks transformers and rwkv for the logits and writes reference.json beside this file.
"""

import contextlib
import io
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).with_name("reference.json")
VOCAB, LENGTH = 37, 24
IDS = [(7 * i * i + 3 * i + 1) % VOCAB for i in range(LENGTH)]
KEPT = (0, 9, LENGTH - 1)  # positions whose logits are stored

_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(kind, architecture, rope, **changes):
    rope = {"rope_type": "default", "rope_theta": 10000.0} | rope
    return _SHARED | {"model_type": kind, "architectures": [architecture], "rope_parameters": rope} | changes


_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}
TRANSFORMERS = {
    "llama": _config("llama", "LlamaForCausalLM", {}, mlp_bias=False),
    "llama-biases-llama3": _config("llama", "LlamaForCausalLM", _LLAMA3, mlp_bias=True, attention_bias=True),
    "llama-tied-dynamic": _config(
        "llama", "LlamaForCausalLM", {"rope_type": "dynamic", "factor": 2.0}, mlp_bias=False, tie_word_embeddings=True,
        max_position_embeddings=LENGTH // 2,
    ),
    "qwen2-linear": _config("qwen2", "Qwen2ForCausalLM", {"rope_type": "linear", "factor": 3.0}),
    "qwen3-tied-yarn": _config("qwen3", "Qwen3ForCausalLM", _YARN, tie_word_embeddings=True),
    "qwen3-yarn-mscale": _config(
        "qwen3", "Qwen3ForCausalLM", _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}
    ),
    "qwen3-moe": _config("qwen3_moe", "Qwen3MoeForCausalLM", {}, **_EXPERTS),
    "qwen3-moe-mixed": _config(
        "qwen3_moe", "Qwen3MoeForCausalLM", {}, **_EXPERTS | {"norm_topk_prob": False}, mlp_only_layers=[1],
        attention_bias=True,
    ),
}  # fmt: skip
RWKV = {
    "architectures": ["RWKV7ForCausalLM"],
    "model_type": "rwkv7",
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "head_dim": 8,
    "intermediate_size": 96,
    "decay_low_rank_dim": 6,
    "a_low_rank_dim": 5,
    "v_low_rank_dim": 4,
    "gate_low_rank_dim": 7,
}
CONFIGS = TRANSFORMERS | {"rwkv7": RWKV}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Seeded by the name: norm scales near 1, biases and vectors near 0, matrices [out, in] that keep sizes."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if "norm" in name or ".ln" in name:
        x = 0.2 * x + name.endswith("weight")
    elif max(shape) == math.prod(shape):
        x = 0.4 * x
    else:
        x = 1.3 * x / math.sqrt(shape[-1])
    return x.astype(np.float32)


def tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint; that transformers finds none missing and none too many is a test."""
    from rl.models import hf_config, names
    from rl.models.presets import make

    config = hf_config.from_json(CONFIGS[name], name, dtype="float32", scan_layers=False)
    shapes = {n: source.shape for source in names.sources(make(config)) for n in source.names}
    return {n: tensor(n, shape) for n, shape in shapes.items()}


def write(directory: Path, name: str) -> Path:
    """A checkpoint directory."""
    import safetensors.numpy

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    safetensors.numpy.save_file(tensors(name), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def transformers_logits(directory: Path, ids=None) -> np.ndarray:
    """[L, vocab] of a directory by transformers; asserts that it uses all tensors and lacks none."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        return model(torch.tensor([IDS if ids is None else ids])).logits[0].numpy()


def write_pth(path: Path) -> None:
    """The RWKV checkpoint as it is released."""
    import torch

    torch.save({name: torch.from_numpy(x) for name, x in tensors("rwkv7").items()}, path)


def rwkv_logits(path: Path) -> np.ndarray:
    """[L, vocab] of a .pth file by the public package rwkv."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        import torch
        from rwkv.model import RWKV as Reference

        model = Reference(str(path.with_suffix("")), "cpu fp32")
    with torch.no_grad():
        return model.forward(list(IDS), None, full_output=True)[0].numpy()


def main() -> None:
    import tempfile

    logits = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in TRANSFORMERS:
            logits[name] = transformers_logits(write(Path(temporary) / name, name))
        write_pth(Path(temporary) / "rwkv7.pth")
        logits["rwkv7"] = rwkv_logits(Path(temporary) / "rwkv7.pth")
    import torch
    import transformers

    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    kept = {name: [[float(f"{v:.7g}") for v in x[i]] for i in KEPT] for name, x in logits.items()}
    REFERENCE.write_text(json.dumps({"made_with": made_with, "ids": IDS, "positions": KEPT, "logits": kept}) + "\n")


if __name__ == "__main__":
    main()
