"""The integer language model through its script, small: learning, resume, no floats, devices, comparison, bad input."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import eggroll
from experiments import build, pretrain, pretrain_tasks
from experiments.pretrain_tasks import TASKS
from rl import config as config_lib
from rl.data import bytes as byte_data
from rl.run import Run, RunError

CONFIG = Path(__file__).parents[2] / "configs" / "egg_bytes.py"
SMALL = (
    *("steps=4", "eval_every=2", "save_every=1", "batch=4", "tokens=6", "eval_streams=4", "train_bytes=20000"),
    *("model.layers=1", "model.width=16"),
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Held-out text of a few thousand bytes."""
    whole = byte_data.corpus
    cut = lambda *args: (corpus := whole(*args))._replace(held_out=corpus.held_out[:4000])
    monkeypatch.setattr(byte_data, "corpus", cut)
    monkeypatch.setattr(pretrain_tasks, "_SAMPLES", (2, 8))


def load(variant="", *overrides):
    evolution = ("es.members=32", "es.chunk=16") if variant not in ("sgd", "adamw") else ()
    return config_lib.load(f"{CONFIG}:{variant}" if variant else str(CONFIG), [*SMALL, *evolution, *overrides])


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["crossed", "momentum", "faithful", "adamw"])
def test_a_run_has_its_figures_and_its_texts(variant, tmp_path):
    result = pretrain.train(load(variant), str(tmp_path))
    assert result["measure"] == "held-out bits per byte" and result["tokens"] == 4 * 4 * 6
    assert {"unigram", "bigram", "gzip"} == set(result["reference_bits"])
    metrics = rows(tmp_path)
    assert metrics[1]["test_bits"] > 4 and metrics[-1]["test_bits"] == result["score"]
    if variant == "adamw":
        assert not (tmp_path / "samples.jsonl").exists()
        return
    assert -10 < metrics[0]["fitness_mean"] < -7 and 0 < metrics[0]["moved_share"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [2, 4] and all(len(s["texts"]) == 2 for s in samples)
    size = 513 * 16 + 4 * 16 + 12 * 16**2
    assert result["optimizer_bytes"] == (2 * size if variant == "momentum" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["momentum", "sgd"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(variant, tmp_path, monkeypatch):
    config = load(variant)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = pretrain.train(config, str(whole))
    record, count = Run.record, []

    def failing(self, *args, **options):
        record(self, *args, **options)
        count.append(0)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "record", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train(config, str(broken))
    monkeypatch.setattr(Run, "record", record)
    assert pretrain.train(config, str(broken)) | {"seconds": 0} == result | {"seconds": 0}
    for name in ("metrics.jsonl", *(["samples.jsonl"] if variant == "momentum" else [])):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_devices_change_no_byte(tmp_path):
    found = []
    for sizes in ((), ("mesh.population=2", "mesh.data=4")):
        folder = tmp_path / str(len(found))
        pretrain.train(load("", *sizes), str(folder))
        found.append([(folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")])
    assert found[0] == found[1]


@pytest.mark.slow
def test_no_float_is_in_the_compiled_step():
    config = load("momentum")
    task = TASKS["streams"](config)
    method = pretrain.integer_method(config, task)
    text = pretrain.train_step(method, task).lower(method.state, task.train, np.int32(1)).compile().as_text()
    assert "s8[" in text and not re.findall(r"\b(bf16|f16|f32|f64)\[", text)


@pytest.mark.slow
def test_it_learns():
    """More than a bit a byte in 60 generations of 256 members on 16 streams."""
    config = load("", "es.members=256", "es.chunk=0", "es.alpha=0.3", "batch=16", "tokens=20", "steps=60")
    task = TASKS["streams"](config)
    method = pretrain.integer_method(config, task)
    state, step = method.state, pretrain.train_step(method, task)
    evaluate = jax.jit(lambda params: task.measure.evaluate(task, params)["test_bits"])
    first = float(evaluate(state.params))
    for number in range(1, 61):
        state, _ = step(state, task.train, np.int32(number))
    assert first - float(evaluate(state.params)) > 1


def test_only_bytes_that_were_read_move_their_embeddings():
    config = load()
    task = TASKS["streams"](config)
    method = pretrain.integer_method(config, task)
    before = np.asarray(method.state.params["embed"])
    state, _ = pretrain.train_step(method, task)(method.state, task.train, np.int32(1))
    read = np.unique(task.batch(task.train, np.int32(1))["inputs"])
    moved = np.flatnonzero((np.asarray(state.params["embed"]) != before).any(1))
    assert set(moved) <= set(read.tolist()) and len(moved) > 5


@pytest.mark.parametrize(
    ("variant", "override", "words"),
    [
        ("", "batch=5", "config.batch does not fit the population of config.es: rows must divide"),
        ("", "es.members=33", "N must be even, got 33"),
        ("", "es.alpha=0.0", "config.es.alpha must be greater than 0|alpha must be in"),
        ("", "es.noise=cauchy", "gaussian, rademacher; got 'cauchy'"),
        ("", "es.population=rings", "unknown es.population 'rings'; known: antithetic, crossed"),
        ("", "model.width=512", "width 512 times expansion 4 is 2048"),
        ("", "train_bytes=20", r"4 streams of at least 6 \+ 1 bytes need 28 bytes; the text has 20"),
        ("", "train_file=/none/x", "needs a file to train on and one that is held out"),
        ("", "mesh.population=3", "config.mesh: the sizes of a mesh must multiply"),
        ("", "method=eggroll", "evolves models without memory"),
        ("", "es.blocks=2", "config.es.blocks is of crossed populations"),
        ("", "model.faithful=True", "go together; got False and True"),
        ("", "method=backprop", "needs a config with the keys optimizer, but this one has no optimizer"),
        ("sgd", "method=integer", "this one has no es, mesh"),
        ("sgd", "model.faithful=True", "config.model.faithful is of integers"),
        ("faithful", "es.momentum=2", "faithful means independent pairs"),
    ],
)
def test_configs_that_do_not_fit(variant, override, words, tmp_path):
    with pytest.raises(config_lib.ConfigError, match=words):
        pretrain.train(load(variant, override), str(tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_tasks_that_are_not_of_integers(tmp_path):
    config = config_lib.load(str(CONFIG.with_name("digits.py")), ["method=integer"])
    with pytest.raises(config_lib.ConfigError, match="needs an integer task, 'streams'; got task 'digits'"):
        pretrain.train(config, str(tmp_path / "never"))


@pytest.mark.parametrize("changes", [("tokens=5700000",), ("tokens=400000", "es.members=32768")])
def test_scores_that_could_overflow(changes):
    """382 x 5,700,000 is above 2^31; 382 x 400,000 x 32,768 above 2^41."""
    task = TASKS["streams"](load())
    with pytest.raises(config_lib.ConfigError, match="could overflow: use fewer tokens"):
        pretrain.integer_method(load("", *changes), task)
    assert pretrain.integer_method(load(), task)


def test_the_strategy_is_the_config_s():
    changes = ("es.blocks=2", "es.sigma_shift=5", "es.noise=rademacher", "es.momentum=2", "es.chunk=0", "mesh.tensor=8")
    es = build.integer_strategy(load("crossed", "es.alpha=0.5", "es.members=64", *changes))
    assert es.population == eggroll.crossed(64, blocks=2, signs=2)
    assert (es.sigma_shift, es.noise, es.momentum, es.chunk) == (5, "rademacher", 2, None)
    assert es.mesh.shape["tensor"] == 8 and es.axes == es.mesh.axis_names
    es = build.integer_strategy(load("pairs", "es.alpha=4.0", "es.alpha_decay=10", "steps=7"))
    assert len(es.limits) == 7 and es.limits[0] == 0 < es.limits[1] and es.chunk == 16 and es.mesh is None
    assert build.integer_strategy(load("faithful")).noise == "released"


def test_a_run_does_not_go_on_with_another_text(tmp_path, monkeypatch):
    with Run(tmp_path, {}, total_steps=2, save_every=1, data={"corpus": {"sha256": "a"}}):
        pass
    with Run(tmp_path, {}, total_steps=2, save_every=1, data={"corpus": {"sha256": "a"}}):
        pass
    with (
        pytest.raises(RunError, match="was trained on other data.*'a'.*'b'"),
        Run(tmp_path, {}, total_steps=2, save_every=1, data={"corpus": {"sha256": "b"}}),
    ):
        pass
