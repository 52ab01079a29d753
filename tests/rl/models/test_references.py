"""Whole models against implementations written elsewhere: live where they are installed, else by their stored logits."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.load import load, save
from rl.models.tokenizer import Characters
from tests.rl.models import checkpoints
from tests.rl.models.tiny import forward

safetensors = pytest.importorskip("safetensors", reason="checkpoints are safetensors files")

_ROOT = Path(__file__).parents[3]
STORIES = Path(os.environ.get("EGGROLL_DATA", _ROOT.parent / "shared" / "data")) / "stories260K"
needs_reference = "needs torch and transformers: pip install 'eggroll-jax[reference]'"
needs_stories = pytest.mark.skipif(
    not (STORIES / "model.safetensors").is_file(), reason=f"no stories260K in {STORIES.parent} (set EGGROLL_DATA)"
)


def logits(model, params, ids):
    return model.head(params, forward(model)(params, jnp.asarray(ids))[0])


def layouts(name):
    """Scanned too where all layers are alike."""
    return (False, True) if "mixed" not in name else (False,)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(checkpoints.CONFIGS))
def test_stored_logits(name, tmp_path):
    reference = json.loads(checkpoints.REFERENCE.read_text())
    directory = checkpoints.write(tmp_path, name)
    for scan_layers in layouts(name):
        model, params, tokenizer = load(directory, scan_layers=scan_layers)
        assert tokenizer is None
        answer = np.asarray(logits(model, params, reference["ids"]))[reference["positions"]]
        assert np.abs(answer).max() > 1
        np.testing.assert_allclose(answer, reference["logits"][name], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(checkpoints.TRANSFORMERS))
def test_transformers_gives_the_same_logits_from_its_directory_and_from_ours(name, tmp_path):
    pytest.importorskip("torch", reason=needs_reference)
    pytest.importorskip("transformers", reason=needs_reference)
    original = checkpoints.write(tmp_path / "original", name)
    expected = checkpoints.transformers_logits(original)
    for scan_layers in layouts(name):
        model, params, _ = load(original, scan_layers=scan_layers)
        np.testing.assert_allclose(logits(model, params, checkpoints.IDS), expected, atol=1e-4, rtol=0)
    save(tmp_path / "saved", model, params, shard_bytes=20_000)  # several files
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(checkpoints.transformers_logits(tmp_path / "saved"), expected, atol=1e-6, rtol=0)


def test_transformers_own_checkpoint_loads(tmp_path):
    """Weights that transformers initialised and wrote, not we."""
    torch = pytest.importorskip("torch", reason=needs_reference)
    transformers = pytest.importorskip("transformers", reason=needs_reference)
    torch.manual_seed(0)
    settings = {k: v for k, v in checkpoints.TRANSFORMERS["qwen3-moe"].items() if k != "architectures"}
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings, initializer_range=0.3))
    theirs.save_pretrained(tmp_path)
    model, params, _ = load(tmp_path)
    expected = checkpoints.transformers_logits(tmp_path)
    np.testing.assert_allclose(logits(model, params, checkpoints.IDS), expected, atol=1e-4, rtol=0)


def test_transformers_reads_the_alphabet_of_a_model_of_characters(tmp_path):
    transformers = pytest.importorskip("transformers", reason=needs_reference)
    ours = Characters("0123456789+-=. \nabü")
    save(tmp_path, *load(checkpoints.write(tmp_path / "original", "llama"))[:2], ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("12+3=15", " a  b.\n\nü", ""):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode([*ours.encode(text), ours.eos], skip_special_tokens=True) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.eos, ours.size)
    with pytest.raises(Exception, match="UNK"):  # the library raises Exception itself
        theirs.encode("12x")


def test_saved_and_loaded_is_bit_equal(tmp_path):
    for name in ("qwen3-moe", "llama-tied-dynamic", "rwkv7"):
        model, params, _ = load(checkpoints.write(tmp_path / name, name), scan_layers=True)
        save(tmp_path / name / "again", model, params)
        same, again, _ = load(tmp_path / name / "again", scan_layers=True)
        assert same is model
        jax.tree.map(np.testing.assert_array_equal, params, again)


def test_bf16_saves_as_bf16_and_loads_back(tmp_path):
    model, params, _ = load(checkpoints.write(tmp_path / "a", "qwen3-moe"), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    save(tmp_path / "b", model, params)
    with safetensors.safe_open(tmp_path / "b" / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    jax.tree.map(np.testing.assert_array_equal, params, load(tmp_path / "b", dtype="bfloat16")[1])


# -- a trained model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def stories(request):
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip(f"no stories260K in {STORIES.parent} (set EGGROLL_DATA)")
    pytest.importorskip("tokenizers", reason="the checkpoint has a tokenizer.json")
    reference = json.loads((STORIES / "reference.json").read_text())
    return load(STORIES, scan_layers=request.param), reference["prompts"]


@pytest.mark.slow
def test_stories_logits_and_log_probs(stories):
    (model, params, _), prompts = stories
    for prompt in prompts:
        answer = logits(model, params, prompt["ids"])
        np.testing.assert_allclose(answer[-1], prompt["last_logits"], atol=1e-4, rtol=0)
        logp = jnp.take_along_axis(jax.nn.log_softmax(answer[:-1]), jnp.asarray(prompt["ids"])[1:, None], -1)[:, 0]
        np.testing.assert_allclose(logp, prompt["prompt_logprobs"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_stories_greedy_continuations(stories):
    (model, params, _), prompts = stories

    @jax.jit
    def prefill(ids):
        hidden, cache = model.forward(params, ids, model.empty(len(ids) + 64), 0, len(ids))
        return model.head(params, hidden[-1]), cache

    @jax.jit
    def generate(logits, cache, start):
        def step(carry, i):
            logits, cache = carry
            token = jnp.argmax(logits)
            hidden, cache = model.forward(params, token[None], cache, start + i, 1)
            return (model.head(params, hidden[0]), cache), (token, jax.nn.log_softmax(logits)[token])

        return jax.lax.scan(step, (logits, cache), jnp.arange(64))[1]

    for prompt in prompts:
        tokens, logp = generate(*prefill(jnp.asarray(prompt["ids"])), len(prompt["ids"]))
        assert tokens.tolist() == prompt["greedy_ids"]
        np.testing.assert_allclose(logp, prompt["greedy_logprobs"], atol=1e-4, rtol=0)


def test_stories_tokenizer(stories):
    (_, _, tokenizer), prompts = stories
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos) == (512, 1, 2)
    for prompt in prompts:
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]
        assert tokenizer.decode(prompt["ids"] + prompt["greedy_ids"]) == prompt["greedy_text"]


@needs_stories
def test_stories_saved_is_read_by_transformers(tmp_path):
    pytest.importorskip("torch", reason=needs_reference)
    transformers = pytest.importorskip("transformers", reason=needs_reference)
    model, params, tokenizer = load(STORIES)
    save(tmp_path, model, params, tokenizer)
    prompt = json.loads((STORIES / "reference.json").read_text())["prompts"][0]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(prompt["text"])["input_ids"] == prompt["ids"] and theirs.eos_token_id == 2
    answer = checkpoints.transformers_logits(tmp_path, prompt["ids"])
    np.testing.assert_allclose(answer[-1], prompt["last_logits"], atol=1e-4, rtol=0)
    assert load(tmp_path)[2].encode(prompt["text"]) == prompt["ids"]
