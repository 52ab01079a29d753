"""Training of language models: results by an independent evaluation, the warm start, verdicts, other kinds of run."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import build, language, train
from rl import checkpoint, slots, tasks
from rl import config as config_lib
from rl.data import replay, selection
from rl.data.prompts import Prompts
from rl.learners import evolution
from rl.models import presets
from rl.models.load import load
from rl.models.tokenizer import Characters
from rl.rollout.engine import Settings
from rl.run import Run, RunError
from rl.tasks import countdown
from rl.tasks.types import Problem, Verdict
from rl.types import FINISHES, LENGTH, STOPPED, Rollouts
from tests.experiments import tiny_language
from tests.experiments.tiny_train import (
    ALPHABET,
    FAST,
    ROOT,
    SHAPE,
    config_of,
    final,
    greedy,
    problems,
    rows,
    save_start,
)

STORIES = Path(os.environ.get("EGGROLL_DATA", ROOT.parent / "shared" / "data")) / "stories260K"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start") / "model")


def start_like(config, es, params):
    """What a checkpoint of a run holds, in structure."""
    picked = {name: slots.bind(f"rl.data.{name}", config[name]) for name in ("selection", "replay")}
    pool = selection.Pool(config.task.problems, 0, lambda: None)
    shape = replay.Shape(config.prompts, config.samples, config.budget, 0)
    return train.State(
        es.init(params, jax.random.key(0)), picked["selection"].init(pool), picked["replay"].init(shape), np.int64(0)
    )


# -- one run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(workdir, config, result) of an uninterrupted run, with everything logged."""
    workdir, config = tmp_path_factory.mktemp("whole") / "run", config_of(start, "log_samples=1000")
    return workdir, config, train.train(config, workdir)


@pytest.mark.slow
def test_a_run_leaves_what_it_should(whole):
    workdir, config, result = whole
    metrics, samples = rows(workdir / "metrics.jsonl"), rows(workdir / "samples.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in metrics if "eval_reward" in row] == [2, 4, 5]
    assert json.loads((workdir / "result.json").read_text()) == result
    assert (result["task"], result["method"], result["problems"], result["seed"]) == ("countdown", "eggroll", 12, 0)
    assert (metrics[-1]["eval_reward"], 100 * metrics[-1]["eval_solved"]) == pytest.approx(
        (result["reward_after"], result["score"])
    )
    assert result["tokens"] == metrics[-1]["tokens"] and result["seconds"] > 0
    # 8 members x 4 prompts a step; 10 problems, so that an epoch ends in the third step.
    by_step = [[s for s in samples if s["step"] == step] for step in range(1, 6)]
    for row, lines in zip(metrics, by_step, strict=True):
        assert [line["member"] for line in lines] == [m for m in range(8) for _ in range(4)]
        asked = [line["problem"] for line in lines]
        assert asked == asked[:4] * 8
        assert row["train_reward"] == pytest.approx(np.mean([line["reward"] for line in lines]), rel=1e-12)
        assert row["fitness_mean"] == pytest.approx(row["train_reward"], rel=1e-6)
        assert row["train_format"] == pytest.approx(np.mean([line["parts"]["format"] for line in lines]), rel=1e-12)
        for finish in FINISHES:
            assert row[f"{finish}_share"] == np.mean([line["finish"] == finish for line in lines])
        assert row["reward_timeout"] == row["reward_error"] == row["reward_unscorable"] == 0
    order = [line["problem"] for lines in by_step for line in lines[:4]]
    assert sorted(order[:10]) == sorted(order[10:]) == sorted(p.id for p in problems("train", 10))
    tokens = [sum(len(s["completion"]) + (s["finish"] == "stopped") for s in lines) for lines in by_step]
    assert [row["tokens"] for row in metrics] == list(np.cumsum(tokens))


def test_every_logged_verdict_is_what_the_verifier_says_of_the_completion(whole):
    answers = {problem.id: problem.answer for problem in problems("train", 10)}
    samples = rows(whole[0] / "samples.jsonl")
    for line in samples:
        verdict = countdown.verify(line["completion"], answers[line["problem"]])
        assert (line["reward"], line["parts"], line["status"]) == (verdict.value, verdict.parts, "ok")
    assert len({line["completion"] for line in samples}) > 10  # the members differ


@pytest.mark.slow
def test_a_step_by_its_parts(whole, tmp_path):
    """The last step: members' completions from their materialised weights, and the update from the logged rewards."""
    workdir, config, _ = whole
    model, first, tokenizer = load(workdir / "warm_start")
    es = build.strategy(config, model.rules)
    like = start_like(config, es, first)
    shutil.copytree(workdir / "checkpoints" / "0000000004", tmp_path / "0000000004")
    before, after = (checkpoint.restore(folder, like) for folder in (tmp_path, workdir / "checkpoints"))
    assert (before.step, after.step) == (4, 5)
    lines = [line for line in rows(workdir / "samples.jsonl") if line["step"] == 5]
    for line in (lines[0], lines[13], lines[31]):
        params = jax.jit(es.member_params)(before.state.learner, line["member"])
        assert greedy(model, params, tokenizer, line["prompt"], 4) == line["completion"]
    fitness = np.float32([line["reward"] for line in lines]).reshape(8, 4)
    assert (before.state.asked, after.state.asked) == (4 * 32, 5 * 32)
    again, _ = jax.jit(es.update)(before.state.learner, fitness)
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (again, after.state.learner)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (before.state.learner.params, again.params)), strict=True)
    ]
    assert min(moved) > 1e-4


def test_before_and_after_by_an_independent_evaluation(whole):
    workdir, config, result = whole
    model, first, tokenizer = load(workdir / "warm_start")
    es = build.strategy(config, model.rules)
    last = checkpoint.restore(workdir / "checkpoints", start_like(config, es, first)).state.learner.params
    value = np.array(
        [
            [
                countdown.verify(greedy(model, params, tokenizer, p.prompt, 4), p.answer).value
                for p in problems("test", 12)
            ]
            for params in (first, last)
        ]
    )
    assert value[0].max() > 0 and (value[0] != value[1]).any()
    assert [result["reward_before"], result["reward_after"]] == pytest.approx(value.mean(axis=1), abs=1e-12)
    gain = value[1] - value[0]
    assert abs(gain.std() - value[1].std()) > 1e-3
    assert result["reward_gain"] == pytest.approx(gain.mean(), abs=1e-12)
    assert result["reward_gain_interval"] == pytest.approx(1.96 * gain.std() / 12**0.5, abs=1e-12)
    solved = 100 * (value >= 1).mean(axis=1)
    assert [result["solved_before"], result["solved_after"]] == pytest.approx(solved) and result["score"] == solved[1]


def test_a_finished_run_is_left_as_it_is(whole, monkeypatch):
    workdir, config, result = whole
    names = ("metrics.jsonl", "samples.jsonl", "result.json")
    before = [(workdir / name).read_bytes() for name in names]
    monkeypatch.setattr(language.supervised, "fit", lambda *_, **__: pytest.fail("the warm start is cached"))
    assert train.train(config, workdir) == result
    assert [(workdir / name).read_bytes() for name in names] == before


# -- the warm start --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_warm_start_is_made_once_and_what_is_half_written_is_ignored(start, tmp_path, monkeypatch, capfd):
    fit, calls = language.supervised.fit, []

    def counted(*args, **kwargs):
        calls.append(kwargs["steps"])
        return fit(*args, **kwargs)

    monkeypatch.setattr(language.supervised, "fit", counted)
    config = config_of(start, "warm_start.steps=5", "steps=1")
    unfinished = tmp_path / "run" / "warm_start.writing"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    result = train.train(config, tmp_path / "run")
    assert calls == [5] and not unfinished.exists()
    assert "warm start: step 5/5" in capfd.readouterr().err
    assert train.train(config, tmp_path / "run") == result and calls == [5]
    model, trained, tokenizer = load(tmp_path / "run" / "warm_start")
    assert tokenizer.alphabet == ALPHABET
    given = jax.tree.leaves(load(start)[1])
    assert all(not np.array_equal(a, b) for a, b in zip(given, jax.tree.leaves(trained), strict=True))
    os.truncate(tmp_path / "run" / "warm_start" / "model.safetensors", 100)
    with pytest.raises(RunError, match="not a readable safetensors file.* Delete .*warm_start, and the same command"):
        train.train(config, tmp_path / "run")


@pytest.mark.slow
def test_without_steps_training_begins_at_the_model_given(start, tmp_path):
    config = config_of(start, *FAST, "optimizer.learning_rate=1e-30")
    result = train.train(config, tmp_path)
    assert not (tmp_path / "warm_start").exists() and result["reward_gain"] == 0 == result["reward_gain_interval"]


def test_a_warm_start_that_diverges_is_an_error_and_is_not_kept(start, tmp_path):
    with pytest.raises(RunError, match="not finite: lower config.warm_start.learning_rate"):
        train.train(config_of(start, "warm_start.steps=5", "warm_start.learning_rate=1e38"), tmp_path)
    assert not (tmp_path / "warm_start").exists()


def test_solutions_and_an_end_token_are_needed(start):
    config, task = config_of(start), tasks.make("countdown", **tiny_language.COUNTDOWN)
    ids, length, prompt_length = language.lessons(config, task, Characters(ALPHABET))
    first = problems("train", 10)[0]
    assert Characters(ALPHABET).decode(ids[0]) == first.prompt + first.solution
    assert (length[0], prompt_length[0]) == (len(first.prompt + first.solution) + 1, len(first.prompt))
    silent = task._replace(problems=lambda *args: [p._replace(solution="") for p in task.problems(*args)])
    with pytest.raises(config_lib.ConfigError, match="countdown has 10 problems without solution.*warm_start.steps=0"):
        language.lessons(config, silent, Characters(ALPHABET))
    assert language.lessons(config_of(start, "warm_start.steps=0"), silent, Characters(ALPHABET)) is None
    endless = Characters(ALPHABET)
    endless.eos = None
    with pytest.raises(config_lib.ConfigError, match="the tokenizer's end token is None"):
        language.lessons(config, task, endless)


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_ends_bit_equal(whole, tmp_path, monkeypatch):
    workdir, config, _ = whole
    record = Run.record

    def failing(run, *args, **kwargs):
        if run.step == 3:  # a checkpoint is at 2; the samples of step 4 are written
            raise KeyboardInterrupt
        record(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", failing)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path)
    assert rows(tmp_path / "samples.jsonl")[-1]["step"] == 4
    train.train(config, tmp_path)
    assert final(tmp_path) == final(workdir)


# -- verdicts --------------------------------------------------------------------------------------------------------


class CountingPool:
    """Judges in this process and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, completions, answers):
        self.asked += list(zip(completions, answers, strict=True))
        return [Verdict(float(len(c)), "ok", {"answer": float(a)}) for c, a in zip(completions, answers, strict=True)]


def test_equal_answers_to_a_problem_are_judged_once():
    pool = CountingPool()
    tokens = np.array([[1, 2, 0], [1, 2, 0], [1, 2, 0], [1, 2, 1], [1, 9, 9], [1, 2, 9], [1, 8, 8]], np.int32)
    length = np.array([3, 3, 3, 3, 1, 2, 1])  # what follows is padding
    finish = np.array([STOPPED] * 3 + [LENGTH] * 4, np.int8)
    zeros = np.zeros(tokens.shape, np.float32)
    rollouts = Rollouts(tokens, length, zeros, zeros, zeros.astype(np.int32), finish, np.arange(7, dtype=np.int32))
    asked = np.array([0, 1, 0, 1, 1, 0, 1])
    problem = [Problem("x", "a", 7), Problem("y", "b", 8)]
    settings = Settings(slots=1, length=4, stop=(0,))
    setup = language.Setup(None, None, Characters("ab"), None, None, None, settings, None, None, None, pool, None)
    texts, scored = language.verdicts(setup, Prompts(problem, [[1], [2]]), asked, rollouts)
    assert texts == ["ab", "ab", "ab", "aba", "a", "ab", "a"]
    assert scored.parts["answer"].tolist() == [7, 8, 7, 8, 8, 7, 8] and scored.value.tolist() == [2, 2, 2, 3, 1, 2, 1]
    # Rows 0 and 2 are equal, rows 4 and 6 too; row 5 ends by its budget, so its tokens differ.
    assert sorted(pool.asked) == [("a", 8), ("ab", 7), ("ab", 7), ("ab", 8), ("aba", 8)]


def test_fitness_by_hand(start):
    value = np.array([1, 0, 0.5, 1, 9, 0, 0, 0.5], float)  # 2 members x 2 prompts x 2 samples
    status = np.array(["ok"] * 4 + ["timeout"] + ["ok"] * 3)
    value[4] = 0
    value, ok = (x.reshape(2, 2, 2) for x in (value, status == "ok"))
    mean = evolution.member_fitness(build.FITNESS["mean"](None), value, ok)
    np.testing.assert_array_equal(mean, np.float32([[0.5, 0.75], [0, 0.25]]))
    passed = evolution.member_fitness(build.FITNESS["pass_at"](config_of(start, "samples=2", "k=2")), value, ok)
    np.testing.assert_array_equal(
        passed, np.float32([[1, 1], [1, 0]])
    )  # member 1 has one sample of prompt 0: as member 0


# -- other kinds of run ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_rank_noise_pass_at_k_and_randomness_of_each_member(start, tmp_path):
    pytest.importorskip("tensorboardX", reason="extra tensorboard is not installed")
    overrides = ["method=openes", "fitness=pass_at", "samples=3", "k=2", "sampling.temperature=1.0", "log_samples=1000"]
    config = config_of(start, *FAST, *overrides, "common_random_numbers=False", "es.sigma=1e-9")
    result = train.train(config, tmp_path, tensorboard=True)
    assert result["method"] == "openes"
    lines = rows(tmp_path / "samples.jsonl")
    assert len(lines) == 8 * 4 * 3
    # Members without a difference answer one prompt in different words; greedy evaluation is as before.
    answers = [[line["completion"] for line in lines[i : i + 3]] for i in range(0, len(lines), 12)]
    assert len({tuple(a) for a in answers}) > 1
    solved = np.array([line["reward"] >= 1 for line in lines]).reshape(8, 4, 3).sum(axis=2)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["fitness_mean"] == pytest.approx(np.mean([[0, 2 / 3, 1, 1][c] for c in solved.flat]), abs=1e-6)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"eval_reward" in events.read_bytes()


@pytest.mark.slow
def test_frozen_parameters_stay_as_they_are(start, tmp_path):
    config = config_of(start, *FAST)
    with config.unlocked():
        config.es.frozen = ("embed", "norm")
    train.train(config, tmp_path)
    before, after = (jax.tree_util.tree_leaves_with_path(load(folder)[1]) for folder in (start, tmp_path / "model"))
    for (path, old), (_, new) in zip(before, after, strict=True):
        name = jax.tree_util.keystr(path)
        assert np.array_equal(old, new) == ("embed" in name or "norm" in name), name


@pytest.mark.slow
def test_members_share_randomness_and_differ_by_their_weights_alone(start, tmp_path):
    alike = ["sampling.temperature=1.0", "es.sigma=1e-9", "optimizer.learning_rate=1e-30"]
    one = ["task.problems=1", "prompts=1", "samples=8", "steps=2", "warm_start.steps=0", "log_samples=1000"]
    result = train.train(config_of(start, *alike, *one), tmp_path)
    answers = np.array([line["completion"] for line in rows(tmp_path / "samples.jsonl")]).reshape(2, 8, 8)
    assert (answers == answers[:, :1]).all() and len(set(answers[0, 0])) > 4
    assert (answers[0, 0] != answers[1, 0]).sum() > 4  # the same weights and problem in another step
    model, params, tokenizer = load(start)
    rewards = [
        countdown.verify(greedy(model, params, tokenizer, p.prompt, 4), p.answer).value for p in problems("test", 12)
    ]
    assert result["reward_before"] == pytest.approx(np.mean(rewards)) == result["reward_after"]  # evaluation is greedy


@pytest.mark.slow
def test_a_preset_with_the_alphabet_of_the_task(start, tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny-transformer", SHAPE)
    for seed in (0, 1):
        config = config_of("", *FAST, f"seed={seed}")
        assert train.train(config, tmp_path / str(seed))["seed"] == seed
    samples = [(tmp_path / str(seed) / "samples.jsonl").read_bytes() for seed in (0, 1)]
    assert samples[0] != samples[1]


@pytest.mark.slow
@pytest.mark.skipif(not (STORIES / "model.safetensors").is_file(), reason=f"no stories260K in {STORIES.parent}")
def test_a_checkpoint_with_its_own_tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    config = config_of(
        STORIES,
        *FAST,
        "budget=6",
        "eval_problems=4",
        "prompts=2",
        "es.sigma=1e-4",
        "engine.bucket=32",
        variant="stories",
    )
    train.train(config, tmp_path)
    for line in rows(tmp_path / "samples.jsonl"):
        assert line["prompt"].startswith("Once upon a time, there was a little ") and line["completion"].startswith(" ")
        assert "<s>" not in line["completion"] and "</s>" not in line["completion"]
