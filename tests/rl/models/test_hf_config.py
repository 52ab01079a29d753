"""config.json to configurations and back, and what is refused."""

import dataclasses
import json

import pytest

from rl.models import hf_config
from rl.models.presets import PRESETS, preset
from rl.models.rope import Rope
from rl.models.rwkv7 import RWKV7Config
from rl.models.transformer import TransformerConfig
from tests.rl.models import checkpoints
from tests.rl.models.tiny import MIXED, SHAPES

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "num_hidden_layers": 4,
}  # fmt: skip


def read(config, **changes):
    return hf_config.from_json(config | changes, "config.json", dtype="float32", scan_layers=False)


def test_defaults_are_those_of_the_architectures():
    """A key that is absent has the value that transformers gives it (read from its configuration classes)."""
    plain = TransformerConfig(vocab=100, layers=2, width=32, hidden=48, heads=4, kv_heads=4, head_dim=8, max_length=128)
    assert read(LLAMA) == plain
    assert read(LLAMA, num_key_value_heads=None, head_dim=None) == plain
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 32}
    wide = qwen2 | {"hidden_size": 64}
    assert read(LLAMA, **wide) == dataclasses.replace(plain, width=64, heads=32, kv_heads=32, head_dim=2, qkv_bias=True)
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_attention_heads": 32}
    assert read(LLAMA, **qwen3) == dataclasses.replace(plain, heads=32, kv_heads=32, head_dim=128, qk_norm=True)
    found = read(MOE, num_attention_heads=8)
    assert (found.kv_heads, found.head_dim, found.normalise_experts, found.dense_layers) == (4, 4, False, ())


def test_layers_without_experts():
    assert read(MOE, mlp_only_layers=[1]).dense_layers == (1,)
    assert read(MOE, decoder_sparse_step=2).dense_layers == (0, 2)  # layer i has experts where (i + 1) % step is 0
    assert read(MOE, decoder_sparse_step=2, mlp_only_layers=[3]).dense_layers == (0, 2, 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Rope()),
        ({"rope_theta": 5e5}, Rope(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(theta=7.0)),
        ({"rope_scaling": None, "rope_theta": 1000000}, Rope(theta=1e6)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope("linear", factor=2.0)),
        ({"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 3.0}}, Rope("dynamic", factor=3.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
            Rope("llama3", factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8,
                              "beta_slow": 2, "attention_factor": 0.9, "mscale": 1.0, "mscale_all_dim": 0.5,
                              "truncate": False}},
            Rope("yarn", factor=4.0, original_length=16, beta_fast=8, beta_slow=2, attention_factor=0.9, mscale=1.0,
                 mscale_all_dim=0.5, truncate=False),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
            Rope("yarn", factor=4.0, original_length=16),
        ),
        # keys of another type are not read
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, Rope("linear", factor=2.0)),
    ],
)  # fmt: skip
def test_rotary_embeddings_in_both_spellings(settings, expected):
    config = read(LLAMA, **settings)
    assert config.rope == expected
    assert read(json.loads(json.dumps(hf_config.to_json(config)))).rope == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, r"must be one of \['LlamaForCausalLM'.*got model_type 'llama'"),
        ({"model_type": "gemma3"}, "got model_type 'gemma3'"),
        ({"model_type": None, "architectures": None}, "got model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'; got 'gelu'"),
        ({"use_sliding_window": True}, "sliding windows are not implemented"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows are not implemented"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"vocab_size": None}, "must have the key 'vocab_size'; it has"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number from 1 on; got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be .*got 0"),
        ({"num_key_value_heads": 3}, "multiple of kv_heads; got 4 and 3"),
        ({"num_attention_heads": True}, "num_attention_heads must be .*got True"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, r"must be one of \['default'.*got 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"type 'linear'.*missing keys \['factor'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"missing keys \['low_freq_factor', 'high_freq"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "fudge": 1}}, r"unknown keys \['fudge'\]"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a JSON object or null; got 'linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a number above 0; got '2'"),
        ({"rope_theta": -1}, "rope_theta must be a number above 0; got -1"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number above 0; got None"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false; got 'false'"),
        ({"partial_rotary_factor": 0.5}, "whole heads"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "whole heads"),
    ],
)
def test_refusals_name_rule_value_and_file(changes, message):
    with pytest.raises(ValueError, match=message):
        read(LLAMA, **changes)


def test_refusals_of_experts():
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        read(MOE, num_experts_per_tok=None)
    with pytest.raises(ValueError, match="must have the key 'num_experts'"):
        read(MOE, num_experts=None)
    with pytest.raises(ValueError, match=r"layers \[1\] have no experts"):
        hf_config.from_json(MOE | {"mlp_only_layers": [1]}, "config.json", dtype="float32", scan_layers=True)


@pytest.mark.parametrize("name", [*SHAPES, "mixed", *(n for n in PRESETS if n.startswith(("qwen", "rwkv", "stories")))])
def test_there_and_back(name):
    config = {**SHAPES, "mixed": MIXED, **PRESETS}[name]
    written = json.loads(json.dumps(hf_config.to_json(config, ends=(3,), bos=4)))
    assert (written["eos_token_id"], written["bos_token_id"]) == (3, 4)
    again = hf_config.from_json(written, "config.json", dtype=config.dtype, scan_layers=config.scan_layers)
    if isinstance(config, RWKV7Config):  # written out, and the chunk is no property of a checkpoint
        config = dataclasses.replace(
            config, hidden=config.hidden or 4 * config.width, chunk=RWKV7Config(1, 1, 64).chunk
        )
    assert again == config


@pytest.mark.slow
@pytest.mark.parametrize("name", list(checkpoints.TRANSFORMERS))
def test_transformers_reads_what_we_write(name):
    transformers = pytest.importorskip("transformers", reason="needs pip install 'eggroll-jax[reference]'")
    config = read(checkpoints.TRANSFORMERS[name])
    theirs = transformers.AutoConfig.for_model(**hf_config.to_json(config))
    assert read(theirs.to_dict() | {"architectures": checkpoints.TRANSFORMERS[name]["architectures"]}) == config


def test_a_combination_of_no_architecture_is_refused():
    for changes in ({"qk_norm": True, "mlp_bias": True}, {"qk_norm": True, "qkv_bias": True}):
        config = dataclasses.replace(SHAPES["llama"], **changes)
        with pytest.raises(ValueError, match="to be saved, a configuration must be that of Llama"):
            hf_config.to_json(config)
    assert preset("qwen3-0.6b").qk_norm
