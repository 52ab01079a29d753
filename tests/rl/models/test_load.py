"""Strict loading and saving: everything that is wrong is named, in one error."""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.load import load, save
from rl.models.presets import make
from rl.models.tokenizer import Characters
from tests.rl.models import checkpoints, test_tokenizer
from tests.rl.models.tiny import SHAPES, random_params

files = pytest.importorskip("safetensors.numpy", reason="checkpoints are safetensors files")

LAYER = "model.layers.1"


@pytest.fixture
def directory(tmp_path):
    return checkpoints.write(tmp_path / "llama", "llama")


def rewrite(directory, change, file="model.safetensors"):
    tensors = files.load_file(directory / file)
    change(tensors)
    files.save_file(tensors, directory / file)


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_missing_extra_misshaped_and_integer_tensors_in_one_error(directory):
    def change(tensors):
        del tensors[f"{LAYER}.self_attn.q_proj.weight"], tensors["model.norm.weight"]
        tensors[f"{LAYER}.mlp.up_proj.weight"] = tensors[f"{LAYER}.mlp.up_proj.weight"].T.copy()
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
        tensors["lm_head.bias"] = np.zeros(37, np.float32)
        tensors[f"{LAYER}.mlp.gate_proj.weight"] = np.zeros((40, 24), np.int32)

    rewrite(directory, change)
    with pytest.raises(ValueError) as error:
        load(directory)
    message = str(error.value)
    for part in (
        "llama does not fit its config.json",
        "2 missing: model.layers.1.self_attn.q_proj.weight [32, 24], model.norm.weight [24]",
        "2 extra: lm_head.bias [37], model.layers.3.mlp.up_proj.weight [40, 24]",
        "1 mis-shaped: model.layers.1.mlp.up_proj.weight [24, 40] instead of [40, 24]",
        "1 not floating point: model.layers.1.mlp.gate_proj.weight I32",
    ):
        assert part in message, message


def test_known_leftovers_are_not_extra(directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = load(directory)[1]
    rewrite(directory, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    after = load(directory)[1]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_a_tied_head_stored_twice_must_be_the_embedding(tmp_path):
    directory = checkpoints.write(tmp_path, "qwen3-tied-yarn")
    model, params, _ = load(directory)
    twice = lambda scale: lambda t: t.update({"lm_head.weight": scale * t["model.embed_tokens.weight"]})
    rewrite(directory, twice(1))
    jax.tree.map(np.testing.assert_array_equal, load(directory)[1], params)
    assert "head" not in params
    rewrite(directory, twice(2))
    with pytest.raises(ValueError, match=r"1 extra: lm_head.weight \[37, 24\]"):
        load(directory)


@pytest.fixture
def sharded(directory):
    model, params, _ = load(directory)
    save(directory.parent / "sharded", model, params, shard_bytes=15_000)
    return directory.parent / "sharded", params


def test_shards(sharded):
    directory, params = sharded
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    written = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(written) > 2 and set(index["weight_map"].values()) == set(written)
    assert written[0] == f"model-00001-of-{len(written):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, load(directory)[1], params)


def test_shards_that_do_not_fit_the_index(sharded):
    directory, _ = sharded
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, *_, last = sorted(set(weight_map.values()))
    embedding = checkpoints.tensor("model.embed_tokens.weight", (37, 24))
    rewrite(directory, lambda tensors: tensors.update({"model.embed_tokens.weight": embedding}), last)
    with pytest.raises(ValueError, match=f"model.embed_tokens.weight is in both {first} and {last}"):
        load(directory)
    rewrite(directory, lambda tensors: tensors.pop("model.embed_tokens.weight"), last)
    edit(index, weight_map=weight_map | {"model.embed_tokens.weight": last})
    with pytest.raises(ValueError, match=f"1 not where the index says: model.embed_tokens.weight in {first} instead"):
        load(directory)
    edit(index, weight_map=weight_map)
    (directory / first).unlink()
    with pytest.raises(
        ValueError, match=rf"listed in the index but absent: \['{first}'\]; \d+ missing: .*embed_tokens"
    ):
        load(directory)
    edit(index, weight_map={"model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="must name files of its own directory"):
        load(directory)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match="must have a 'weight_map'"):
        load(directory)


def test_what_is_no_checkpoint(tmp_path, directory):
    with pytest.raises(ValueError, match="neither an existing directory nor such a name"):
        load(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither an existing directory"):
        load("../absent")  # a path, not a name on the hub
    with pytest.raises(ValueError, match="neither an existing directory"):
        load(directory / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a checkpoint: it has no config.json; it has \\[\\]"):
        load(tmp_path / "empty")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither model.safetensors nor .*'pytorch_model.bin'.*convert"):
        load(directory)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[1]", "holds a list"), ("\x00", "is not JSON")]
)
def test_broken_json(directory, content, message):
    (directory / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json .*{message}"):
        load(directory)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_or_garbled_safetensors(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        load(directory)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(directory)


def test_a_tokenizer_of_another_model(directory):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    test_tokenizer.write(directory / "tokenizer.json", test_tokenizer.VOCABULARY | {"zz": 37})
    with pytest.raises(ValueError, match="38 ids for 37 entries: it belongs to another model"):
        load(directory)
    test_tokenizer.write(directory / "tokenizer.json", test_tokenizer.VOCABULARY | {"zz": 36})
    assert load(directory)[2].size == 37


def test_special_tokens_come_from_the_tokenizers_settings_else_from_the_config(directory):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    test_tokenizer.write(directory / "tokenizer.json")
    special = lambda: (load(directory)[2].eos, load(directory)[2].bos)
    assert special() == (2, 1)
    edit(directory / "config.json", eos_token_id=[5, 2], bos_token_id=[])
    assert special() == (5, None)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "a"}))
    assert special() == (2, 3)
    settings.write_text(json.dumps({"eos_token": 1.5}))
    with pytest.raises(ValueError, match="the eos token must be a text or an id; .* 1.5"):
        load(directory)


def test_every_token_that_ends_a_text_is_kept_and_saved(directory, tmp_path):
    """Chat models end a turn and a document with different tokens, spread over three files."""
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    test_tokenizer.write(directory / "tokenizer.json")
    assert load(directory)[2].ends == (2,)
    generation = directory / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [5, 2], "temperature": 0.6}))
    assert load(directory)[2].ends == (2, 5)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    edit(directory / "config.json", eos_token_id=[4, 5])
    model, params, tokenizer = load(directory)
    assert (tokenizer.eos, tokenizer.ends) == (3, (3, 4, 5, 2))
    save(tmp_path / "copy", model, params, tokenizer)
    again = load(tmp_path / "copy")[2]
    assert (again.eos, again.ends) == (3, (3, 4, 5, 2))
    for wrong, words in ((7, "7 ids, and the eos token 7 is none of them"), (True, "a text or an id; .* True")):
        generation.write_text(json.dumps({"eos_token_id": [2, wrong]}))
        with pytest.raises(ValueError, match=words):
            load(directory)


def test_a_character_model_is_saved_with_its_alphabet(tmp_path):
    model = make(SHAPES["rwkv7"])
    tokenizer = Characters("abcde+")
    save(tmp_path, model, random_params(model), tokenizer)
    assert load(tmp_path)[2].encode("a+") == tokenizer.encode("a+")
    (tmp_path / "characters.json").write_text("{}")
    with pytest.raises(ValueError, match="characters.json must have the key 'alphabet', a text; it has None"):
        load(tmp_path)
    (tmp_path / "characters.json").write_text(json.dumps({"alphabet": "abcdefghijklmnopqrstuvwxyz"}))
    with pytest.raises(ValueError, match="27 ids for 23 entries"):
        load(tmp_path)


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_name_without_a_network_fails_soon_and_clearly(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="loading by name")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(
        ValueError, match="(?s)'owner/model' is no local directory and could not be had from the hub.*network"
    ):
        load("owner/model")
    assert time.monotonic() - start < 60


def test_a_hub_name_loads_what_was_downloaded(monkeypatch, directory):
    hub = pytest.importorskip("huggingface_hub", reason="loading by name")
    asked = {}

    def download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", download)
    _, params, _ = load("owner/model.v1", revision="abc")
    assert (asked["name"], asked["revision"]) == ("owner/model.v1", "abc")
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".bin", ".pt", ".pth", ".py", "*"))]
    jax.tree.map(np.testing.assert_array_equal, params, load(directory)[1])


def test_a_package_that_is_not_installed_is_named(monkeypatch, directory):
    (directory / "tokenizer.json").write_text("{}")
    for package, run in {
        "tokenizers": lambda: load(directory),
        "huggingface_hub": lambda: load("owner/model"),
        "safetensors": lambda: save(directory / "new", *load(directory)[:2]),
    }.items():
        if package == "safetensors":
            (directory / "tokenizer.json").unlink()
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                patch.setitem(sys.modules, name, None)
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=f"pip install {package}"):
                run()


# -- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3-moe", "rwkv7"])
def test_types_are_as_asked_whatever_the_file_holds(tmp_path, stored, dtype, name):
    directory = checkpoints.write(tmp_path, name)
    rewrite(directory, lambda ts: ts.update({k: v.astype(jnp.dtype(stored)) for k, v in ts.items()}))
    for scan_layers in (False, True):
        model, params, _ = load(directory, dtype=dtype, scan_layers=scan_layers)
        assert model.config.dtype == dtype and model.config.scan_layers == scan_layers
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0)))
    expected = checkpoints.tensors(name)["model.embed_tokens.weight" if name == "qwen3-moe" else "emb.weight"]
    expected = expected.astype(jnp.dtype(stored)).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)


@pytest.mark.parametrize("dtype", ["float16", "int8", "auto"])
def test_other_types_are_refused(directory, dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of .*got '{dtype}'"):
        load(directory, dtype=dtype)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_saving_refuses_parameters_of_another_shape_type_or_model(tmp_path):
    model = make(SHAPES["llama"])
    params = random_params(model)
    wrong = jax.tree.map(lambda x: x, params)
    wrong["norm"]["scale"] = wrong["norm"]["scale"].astype(jnp.bfloat16)
    wrong["embed"]["embedding"] = wrong["embed"]["embedding"][:-1]
    wrong["extra"] = jnp.zeros(2)
    del wrong["layer_1"]["mlp"]["up"]
    with pytest.raises(ValueError) as error:
        save(tmp_path / "new", model, wrong)
    for part in (
        "extra is no parameter of it",
        "norm/scale bfloat16 [24] instead of float32 [24]",
        "embed/embedding float32 [22, 24] instead of float32 [23, 24]",
        "layer_1/mlp/up/kernel absent instead of float32 [24, 40]",
    ):
        assert part in str(error.value), error.value
    assert not (tmp_path / "new").exists()  # nothing half-written
    save(tmp_path / "new", model, params)
    with pytest.raises(ValueError, match=r"must not hold a checkpoint already; it has \['model.safetensors'\]"):
        save(tmp_path / "new", model, params)
    with pytest.raises(TypeError, match="HFTokenizer and Characters; got object"):
        save(tmp_path / "other", model, params, object())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["moe", "rwkv7"])
def test_either_layout_saves_the_same_files(tmp_path, name):
    scanned = make(dataclasses.replace(SHAPES[name], scan_layers=True))
    save(tmp_path / "a", scanned, random_params(scanned))
    model, params, _ = load(tmp_path / "a")
    assert not model.config.scan_layers
    save(tmp_path / "b", model, params)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
