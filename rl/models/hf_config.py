"""config.json of Hugging Face to our configurations and back."""

from typing import Any

from rl.models.rope import TYPES, Rope
from rl.models.rwkv7 import RWKV7Config
from rl.models.transformer import TransformerConfig

Json = dict[str, Any]
# config.json's model_type -> architecture.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "rwkv7": "RWKV7ForCausalLM",
}
_DEFAULT_EPSILON = 1e-6  # of the four transformers
_DEFAULT_HEADS = {"llama": None, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}  # key-value heads; None: as many as heads
# Rope: our field -> key in rope_parameters, and the types that read it.
_ROPE = {
    "factor": ("factor", ("linear", "dynamic", "yarn", "llama3")),
    "original_length": ("original_max_position_embeddings", ("yarn", "llama3")),
    "low_frequency_factor": ("low_freq_factor", ("llama3",)),
    "high_frequency_factor": ("high_freq_factor", ("llama3",)),
    "beta_fast": ("beta_fast", ("yarn",)),
    "beta_slow": ("beta_slow", ("yarn",)),
    "attention_factor": ("attention_factor", ("yarn",)),
    "mscale": ("mscale", ("yarn",)),
    "mscale_all_dim": ("mscale_all_dim", ("yarn",)),
    "truncate": ("truncate", ("yarn",)),
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_RWKV = ("vocab", "layers", "width", "head_dim", "hidden", "decay_rank", "rate_rank", "value_rank", "gate_rank")
_RWKV_KEYS = dict(zip(_RWKV, (
    "vocab_size", "num_hidden_layers", "hidden_size", "head_dim", "intermediate_size",
    "decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim",
), strict=True))  # fmt: skip


def from_json(config: Json, where: str, *, dtype: str, scan_layers: bool) -> TransformerConfig | RWKV7Config:
    """Our configuration of a config.json.

    Args:
        config: its contents.
        where: the file, for messages.
        dtype: to compute in.
        scan_layers: whether the model is to scan over its layers.

    Raises:
        ValueError: an architecture, activation, rotary embedding, sliding window, quantisation or missing key that this code
            does not cover; named, with what it does cover.
    """
    kind = _kind(config, where)
    if kind == "rwkv7":
        return RWKV7Config(
            **{ours: _count(config, key, where) for ours, key in _RWKV_KEYS.items()},
            dtype=dtype,
            scan_layers=scan_layers,
        )
    _refuse(config, where)
    heads, width = _count(config, "num_attention_heads", where), _count(config, "hidden_size", where)
    default = config.get("num_key_value_heads", _DEFAULT_HEADS[kind]) or heads  # null means heads, absent the default
    layers, max_length = _count(config, "num_hidden_layers", where), _count(config, "max_position_embeddings", where)
    bias = _flag(config, "attention_bias", where)
    return TransformerConfig(
        vocab=_count(config, "vocab_size", where),
        layers=layers,
        width=width,
        hidden=_count(config, "intermediate_size", where),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", where, default),
        head_dim=_head_dim(config, kind, width, heads, where),
        max_length=max_length,
        norm_epsilon=_number(config.get("rms_norm_eps", _DEFAULT_EPSILON), "rms_norm_eps", where),
        rope=_rope(config, where),
        qkv_bias=True if kind == "qwen2" else bias,
        out_bias=False if kind == "qwen2" else bias,
        mlp_bias=kind == "llama" and _flag(config, "mlp_bias", where),
        qk_norm=kind.startswith("qwen3"),
        tied=_flag(config, "tie_word_embeddings", where),
        scan_layers=scan_layers,
        dtype=dtype,
        **(_experts(config, layers, where) if kind == "qwen3_moe" else {}),
    )


def special_tokens(config: Json, settings: Json, generation: Json) -> dict[str, Any]:
    """The arguments of `HFTokenizer` in the contents of config.json, tokenizer_config.json and generation_config.json.

    Returns:
        eos, bos: the text in tokenizer_config.json, else the id (the first of several) in config.json. ends: all eos ids of
        config.json and generation_config.json: chat models end a turn and a document with different tokens.

    Raises:
        ValueError: one that is neither a text nor an id.
    """

    def ids(source: Json, role: str) -> list:
        found = source.get(f"{role}_token_id")
        return found if isinstance(found, list) else [] if found is None else [found]

    def one(role: str):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return next(iter(ids(config, role)), None) if token is None else token

    out = {"eos": one("eos"), "bos": one("bos"), "ends": (*ids(config, "eos"), *ids(generation, "eos"))}
    for role, token in (("eos", out["eos"]), ("bos", out["bos"]), *(("eos", token) for token in out["ends"])):
        if isinstance(token, bool) or not isinstance(token, str | int | None):
            raise ValueError(f"the {role} token must be a text or an id; the checkpoint's files have {token!r}")
    return out


def to_json(config: TransformerConfig | RWKV7Config, *, ends: tuple[int, ...] = (), bos: int | None = None) -> Json:
    """The config.json that describes a configuration; several `ends` are a list there, as in released files.

    Raises:
        ValueError: biases or norms in a combination that none of the architectures has.
    """
    eos = list(ends) if len(ends) > 1 else next(iter(ends), None)
    shared = {"bos_token_id": bos, "eos_token_id": eos, "dtype": config.dtype, "torch_dtype": config.dtype}
    if isinstance(config, RWKV7Config):
        sizes = {key: getattr(config, ours) for ours, key in _RWKV_KEYS.items()}
        sizes["intermediate_size"] = config.hidden or 4 * config.width
        return {"architectures": [ARCHITECTURES["rwkv7"]], "model_type": "rwkv7", **sizes, **shared}
    kind = _kind_of(config)
    out = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.out_bias,
        **_rope_json(config.rope),
        **shared,
    }
    if kind == "llama":
        out["mlp_bias"] = config.mlp_bias
    if kind == "qwen3_moe":
        out |= {
            "num_experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.expert_hidden,
            "norm_topk_prob": config.normalise_experts,
            "mlp_only_layers": list(config.dense_layers),
            "decoder_sparse_step": 1,
        }
    return out


def _kind(config: Json, where: str) -> str:
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    fits = kind in ARCHITECTURES and (not architectures or ARCHITECTURES[kind] in architectures)
    if not fits:
        raise ValueError(
            f"{where}: the architecture must be one of {sorted(ARCHITECTURES.values())}; got model_type {kind!r} with "
            f"architectures {architectures}"
        )
    return kind


def _count(config: Json, key: str, where: str, default: int | None = None) -> int:
    """A whole number from 1 on; the default where the key is absent or null."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"{where} must have the key {key!r}; it has {sorted(config)}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be a whole number from 1 on; got {value!r}")
    return value


def _flag(config: Json, key: str, where: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{where}: {key} must be true or false; got {value!r}")
    return bool(value)


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{where}: {key} must be a number above 0; got {value!r}")
    return value


def _refuse(config: Json, where: str) -> None:
    """What would change the numbers and is not implemented."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act must be 'silu'; got {config['hidden_act']!r}")
    layers = set(config.get("layer_types") or ["full_attention"])
    if config.get("use_sliding_window") or layers != {"full_attention"}:
        raise ValueError(
            f"{where}: every layer must attend to all tokens before; got use_sliding_window="
            f"{config.get('use_sliding_window')} and layer types {sorted(layers)}: sliding windows are not implemented"
        )
    if config.get("quantization_config"):
        raise ValueError(f"{where}: weights must be floating point; the checkpoint is quantised: use the original one")


def _head_dim(config: Json, kind: str, width: int, heads: int, where: str) -> int:
    # Qwen3's configuration has a default of its own; the others divide the width.
    return _count(config, "head_dim", where, 128 if kind == "qwen3" else width // heads)


def _experts(config: Json, layers: int, where: str) -> Json:
    step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    experts = config.get("num_experts") or config.get("num_local_experts")
    if not experts:
        raise ValueError(f"{where} must have the key 'num_experts'; it has {sorted(config)}")
    return {
        "experts": experts,
        "experts_per_token": _count(config, "num_experts_per_tok", where),
        "expert_hidden": _count(config, "moe_intermediate_size", where),
        "normalise_experts": _flag(config, "norm_topk_prob", where),
        "dense_layers": tuple(i for i in range(layers) if i in plain or (i + 1) % step),
    }


def _rope(config: Json, where: str) -> Rope:
    """The rotary embedding, from rope_parameters or from the older rope_scaling and rope_theta."""
    settings: Json = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if not isinstance(given, dict | None):
            raise ValueError(f"{where}: {key} must be a JSON object or null; got {given!r}")
        settings |= given or {}
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    theta = settings.pop("rope_theta", config.get("rope_theta", 10000.0))
    if kind not in TYPES:
        raise ValueError(f"{where}: the rotary embedding's type must be one of {list(TYPES)}; got {kind!r}")
    if settings.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{where}: the rotary embedding must cover whole heads; partial_rotary_factor is set")
    if kind in ("yarn", "llama3") and config.get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    keys = {key: ours for ours, (key, _) in _ROPE.items()}
    unknown = sorted(set(settings) - set(keys))
    missing = [key for key in _ROPE_REQUIRED.get(kind, ()) if settings.get(key) is None]
    if unknown or missing:
        raise ValueError(
            f"{where}: rotary embedding of type {kind!r}: unknown keys {unknown}, missing keys {missing}; known are "
            f"{sorted(keys)}"
        )
    read = {
        ours: _number(settings[key], key, where) if ours != "truncate" else _flag(settings, key, where)
        for ours, (key, kinds) in _ROPE.items()
        if kind in kinds and settings.get(key) is not None
    }
    return Rope(type=kind, theta=float(_number(theta, "rope_theta", where)), **read)


def _rope_json(rope: Rope) -> Json:
    """Both spellings: rope_parameters, and rope_theta with rope_scaling for readers older than it."""
    settings = {"rope_type": rope.type}
    for ours, (key, kinds) in _ROPE.items():
        if rope.type in kinds and getattr(rope, ours) is not None:
            settings[key] = getattr(rope, ours)
    older = {"rope_scaling": settings} if rope.type != "default" else {}
    return {"rope_parameters": settings | {"rope_theta": rope.theta}, "rope_theta": rope.theta, **older}


def _kind_of(config: TransformerConfig) -> str:
    """The architecture with this configuration's biases, norms and experts."""
    same = config.qkv_bias == config.out_bias
    if config.experts and config.qk_norm and same and not config.mlp_bias:
        return "qwen3_moe"
    if not config.experts and config.qk_norm and same and not config.mlp_bias:
        return "qwen3"
    if not config.experts and not config.qk_norm and same:
        return "llama"
    if not config.experts and not config.qk_norm and not config.mlp_bias and config.qkv_bias:
        return "qwen2"
    raise ValueError(
        "to be saved, a configuration must be that of Llama (qkv_bias = out_bias), Qwen2 (qkv_bias alone), Qwen3 or Qwen3-MoE "
        f"(qk_norm, qkv_bias = out_bias, no mlp_bias); got experts={config.experts}, qk_norm={config.qk_norm}, "
        f"qkv_bias={config.qkv_bias}, out_bias={config.out_bias}, mlp_bias={config.mlp_bias}"
    )
