"""Bytes of Python source, small: the corpus, its windows, the score, learning, resume, comparison and bad input."""

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments import build, compare, plot, pretrain, pretrain_tasks
from rl import config as config_lib
from rl.data import bytes as byte_data
from rl.models.presets import make
from rl.models.transformer import TransformerConfig
from rl.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = (
    *("steps=12", "eval_every=4", "save_every=4", "batch=4", "window=16", "eval_windows=16", "train_bytes=20000"),
    *("model.layers=1", "model.width=32", "model.hidden=64", "model.heads=2", "model.kv_heads=2", "model.head_dim=16"),
)


def load(*overrides):
    return config_lib.load(str(CONFIGS / "pretrain_bytes_adamw.py"), [*SMALL, *overrides])


def scores(task, data):
    return jax.jit(jax.vmap(task.score, in_axes=(None, 0)))(task.params, data)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write_library(root, count=200):
    """Files of one line each, some of them in folders, and what must not be read."""
    names = [f"{'package/' * (i % 2)}m{i}.py" for i in range(count)]
    unwanted = ["test/a.py", "idlelib/idle_test/a.py", "site-packages/x/a.py", "encodings/a.py", "notes.txt"]
    for name in (*names, *unwanted, "_sysconfigdata__linux.py", "config-3-x86/a.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"name = {name!r}\n")
    return names


def test_the_split_by_file_is_that_of_the_digests_of_the_paths(tmp_path):
    names = write_library(tmp_path)
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    ordered = sorted(names, key=digests.get)
    held = [name for name in ordered if int(digests[name][:8], 16) / 16**8 < 0.05]
    corpus = byte_data.standard_library(root=tmp_path)
    assert corpus.held_out_files == tuple(held) and 0 < len(held) < 30
    assert corpus.train_files == tuple(name for name in ordered if name not in held)
    text = {part: b"".join(f"name = {n!r}\n".encode() + b"\0" for n in part) for part in corpus[2:4]}
    assert (
        corpus.train.tobytes() == text[corpus.train_files] and corpus.held_out.tobytes() == text[corpus.held_out_files]
    )
    assert corpus.train.dtype == np.uint8
    whole = text[corpus.train_files] + text[corpus.held_out_files]
    assert corpus.facts == {
        "sha256": hashlib.sha256(whole).hexdigest(),
        "train_files": 200 - len(held),
        "train_bytes": len(text[corpus.train_files]),
        "held_out_files": len(held),
        "held_out_bytes": len(text[corpus.held_out_files]),
    }


def test_a_cap_shortens_the_training_text_alone(tmp_path):
    write_library(tmp_path)
    whole, capped = (byte_data.standard_library(limit, tmp_path) for limit in (0, 100))
    assert capped.train.tobytes() == whole.train.tobytes()[:100] and len(capped.train_files) == 5  # of 21 or so each
    assert capped.held_out.tobytes() == whole.held_out.tobytes() and capped.sha256 != whole.sha256
    assert byte_data.standard_library(10**9, tmp_path).sha256 == whole.sha256


def test_the_library_of_this_python_has_source_but_no_tests():
    corpus, again = byte_data.standard_library(), byte_data.standard_library()
    files = {*corpus.train_files, *corpus.held_out_files}
    assert corpus.sha256 == again.sha256 and len(files) == len(corpus.train_files) + len(corpus.held_out_files) > 300
    assert {"argparse.py", "json/decoder.py", "unittest/mock.py"} <= files
    assert not [f for f in files if {"test", "tests", "idle_test", "site-packages"} & {*f.split("/")[:-1]}]
    assert 0.02 < len(corpus.held_out_files) / len(files) < 0.1 and len(corpus.held_out) > 256 * 129
    assert corpus.train.tobytes().count(0) >= len(corpus.train_files)


def test_windows_depend_on_seed_and_step_alone():
    text = jnp.arange(1000)
    one = byte_data.windows(text, 3, 7, 64, 10)
    np.testing.assert_array_equal(one, one[:, :1] + np.arange(10))  # pieces of the text
    np.testing.assert_array_equal(one, jax.jit(lambda t: byte_data.windows(text, 3, t, 64, 10))(7))
    others = [byte_data.windows(text, 3, 8, 64, 10), byte_data.windows(text, 4, 7, 64, 10)]
    assert all(np.mean(one == other) < 0.1 for other in others)
    firsts = {int(x) for step in range(8) for x in byte_data.windows(text[:12], 0, step, 64, 10)[:, 0]}
    assert firsts == {0, 1, 2}  # from the first place to the last
    np.testing.assert_array_equal(byte_data.windows(text[:10], 0, 1, 2, 10), [range(10)] * 2)


def test_evaluated_windows_do_not_overlap_and_span_the_text():
    text = np.arange(1007)
    assert byte_data.spread(text, 3, 10)[:, 0].tolist() == [0, 330, 660]
    np.testing.assert_array_equal(byte_data.spread(text, 100, 10).ravel(), text[:1000])
    with pytest.raises(ValueError, match="101 windows of 10 bytes without overlap need 1010 bytes; got 1007"):
        byte_data.spread(text, 101, 10)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_score_is_the_mean_log_likelihood_of_the_next_byte(scan):
    config = load(f"model.scan_layers={scan}", "model.layers=2")
    task = pretrain_tasks.byte_text(config)
    text = np.asarray(task.test["bytes"][3]).astype(np.int32)
    assert text.shape == (17,)
    model = make(TransformerConfig(vocab=256, max_length=16, **config.model.to_dict()))
    logits = jax.jit(lambda params: model.head(params, model.forward(params, text[:16])[0]))(task.params)
    logp = np.asarray(logits, np.float64)
    logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
    expected = np.mean([logp[i, text[i + 1]] for i in range(16)])
    changed = expected + (logp[15, 0] - logp[15, text[16]]) / 16  # only its own prediction sees the last byte
    both = jnp.stack([task.test["bytes"][3], task.test["bytes"][3].at[16].set(0)])
    np.testing.assert_allclose(scores(task, {"bytes": both}), [expected, changed], rtol=1e-5)


def test_a_uniform_model_has_8_bits_and_any_model_the_mean_over_the_windows():
    task = pretrain_tasks.byte_text(load("eval_windows=40"))
    zero, bits = jax.tree.map(jnp.zeros_like, task.params), jax.jit(functools.partial(pretrain_tasks.bits, task))
    assert float(bits(zero)["test_bits"]) == pytest.approx(8, rel=1e-6)
    mean = float(scores(task, task.test).mean())  # 40 windows: more than one batch of 32
    assert float(bits(task.params)["test_bits"]) == pytest.approx(-mean / np.log(2), rel=1e-5)


@pytest.mark.optimised
def test_small_recipe_learns_more_than_the_frequencies_of_bytes(tmp_path, capfd):
    config = load("steps=100", "eval_every=50", "save_every=100", "batch=16", "window=32", "train_bytes=0",
                  "optimizer.learning_rate=1e-2")  # fmt: skip
    result = pretrain.train(config, str(tmp_path))
    corpus = byte_data.standard_library()
    shares = np.bincount(corpus.train, minlength=256) / len(corpus.train)
    unigram = -np.mean(np.log2(shares + 1e-9)[byte_data.spread(corpus.held_out, 16, 33)])
    assert 2 < result["score"] < unigram - 0.5
    assert result["measure"] == "held-out bits per byte" and result["corpus"] == corpus.facts
    assert json.loads((tmp_path / "result.json").read_text()) == result and result["tokens"] == 100 * 16 * 32
    assert corpus.sha256 in "".join(capfd.readouterr())
    history = rows(tmp_path)
    assert [row["step"] for row in history if "test_bits" in row] == [50, 100]
    assert history[-1]["test_bits"] == pytest.approx(result["score"], abs=1e-6)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_metrics(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = pretrain.train(load(), str(whole))
    record = Run.record

    def failing(run, *args, **kwargs):
        if run.step == 6:
            raise KeyboardInterrupt
        record(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(load(), str(broken))
    assert len(rows(broken)) < 12
    assert pretrain.train(load(), str(broken)) | {"seconds": 0} == result | {"seconds": 0}
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert rows(whole)[-1]["tokens"] == 12 * 4 * 16


@pytest.mark.slow
def test_evolution_and_every_optimizer_see_the_same_windows(tmp_path):
    task, other = (pretrain_tasks.byte_text(load(f"optimizer.name={name}")) for name in ("adamw", "sgd"))
    batch = task.batch(task.train, 1)
    np.testing.assert_array_equal(batch["bytes"], other.batch(other.train, 1)["bytes"])
    expected = float(scores(task, batch).mean())
    config = load("steps=1").unlock()
    config.update({"method": "eggroll", "es": base.es(members=4, sigma=1e-6)})
    assert pretrain.train(config, str(tmp_path))["method"] == "eggroll"
    assert rows(tmp_path)[0]["fitness_mean"] == pytest.approx(expected, abs=1e-3)


def test_warmup_is_linear_and_then_a_cosine():
    c = base.optimizer(learning_rate=0.2, schedule="warmup_cosine", warmup=0.25)
    rate = build.SCHEDULES["warmup_cosine"](c, 40)
    values = [float(rate(n)) for n in (0, 5, 10, 25, 40)]
    assert values == pytest.approx([0, 0.1, 0.2, 0.1, 0], abs=1e-6)
    c.warmup = 0.0
    assert float(build.SCHEDULES["warmup_cosine"](c, 40)(0)) == pytest.approx(0.2)


def test_recipes_differ_by_their_optimizer_alone():
    paths = sorted(CONFIGS.glob("pretrain_bytes_*.py"))
    assert {"adamw", "frugal", "galore", "badam", "fira", "apollo"} <= {p.stem.rpartition("_")[2] for p in paths}
    configs = [config_lib.load(str(path)).to_dict() for path in paths]
    configs.append(config_lib.load(str(CONFIGS / "pretrain_bytes_frugal.py:zero")).to_dict())
    optimizers = [config.pop("optimizer") for config in configs]
    assert all(config == configs[0] for config in configs)
    assert len({(o["name"], str(o["options"])) for o in optimizers}) == len(configs)
    assert len({tuple(o[key] for key in ("schedule", "warmup", "decay")) for o in optimizers}) == 1


def test_compared_runs_are_named_by_optimizer_and_lower_is_better():
    optimizers = {"optimizer.name": "frugal", "optimizer.options.density": 0.0}
    data = plot.RunData(
        Path("x"),
        {"method": "backprop", "task": "bytes"} | optimizers,
        {"tokens": {n: 10 * n for n in (1, 2, 3)}, "test_bits": dict(zip((1, 2, 3), (7.0, 4.0, 3.0), strict=True))},
    )
    assert compare.name(data.config) == "frugal density 0.0"
    assert compare.name({"method": "backprop", "optimizer.name": "adam", "optimizer.options": {}}) == "backprop"
    assert compare.measured(data) == ("test_bits", "tokens")
    assert compare.reached(data, 4.5) == {"step": 2, "tokens": 20} and compare.reached(data, 2.0) is None
    assert compare.within(data, "tokens", 25) == 4.0
    assert plot.default_metric([data]) == "test_bits"


def test_bad_input_is_refused(tmp_path):
    for override, message in {
        "window=200000": "16 windows of 200001 bytes without overlap need",
        "eval_windows=100000": "100000 windows of 17 bytes",
        "train_bytes=16": "1 windows of 17 bytes without overlap need 17 bytes; got 16",
        "train_bytes=-1": "limit of bytes must be 0",
        "model.heads=3": "heads must be a multiple of kv_heads",
        "model.kv_heads=0": "config.model.kv_heads must be at least 1",
        "window=0": "config.window must be at least 1",
        "optimizer.warmup=1.0": "config.optimizer.warmup must be at least 0 and below 1",
        "optimizer.name=adamx": "unknown optimizer.name 'adamx'",
    }.items():
        with pytest.raises(config_lib.ConfigError, match=message):
            pretrain.train(load(override), str(tmp_path / "never"))
    config = load().unlock()
    config.model.depth = 3
    with pytest.raises(config_lib.ConfigError, match="unexpected keyword argument 'depth'"):
        pretrain.train(config, str(tmp_path / "never"))
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="of 0 .py files below .* there are 0 to train on and 0 held out"):
        byte_data.standard_library(root=tmp_path)
