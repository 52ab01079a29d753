"""Training of language models: results, resume after kill -9, the warm start, faults of verifiers, users' mistakes."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import build, train
from rl import checkpoint, tasks
from rl import config as config_lib
from rl.data.prompts import Prompts
from rl.models import presets
from rl.models.load import load, save
from rl.models.tokenizer import Characters
from rl.models.transformer import TransformerConfig
from rl.rollout.engine import Settings
from rl.run import Run, RunError
from rl.tasks import countdown
from rl.tasks.types import Problem, Verdict
from rl.types import FINISHES, LENGTH, STOPPED, Rollouts, Scored
from tests.experiments import faulty_verifier, tiny_language

ROOT = Path(__file__).parents[2]
CONFIG = "tests/experiments/tiny_language.py"
STORIES = Path(os.environ.get("EGGROLL_DATA", ROOT.parent / "shared" / "data")) / "stories260K"
ALPHABET = tasks.make("countdown").alphabet
SHAPE = TransformerConfig(
    vocab=len(ALPHABET) + 1, layers=1, width=16, hidden=32, heads=2, kv_heads=1, head_dim=8, max_length=32, tied=True,
    scan_layers=False,
)  # fmt: skip
FAST = ["warm_start.steps=0", "steps=1"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint directory of one layer of width 16 that reads the alphabet of countdown."""
    path = tmp_path_factory.mktemp("start") / "model"
    model = presets.make(SHAPE)
    save(path, model, model.init(jax.random.key(0)), Characters(ALPHABET))
    return path


def config_of(start, *overrides, variant=""):
    return config_lib.load(f"{ROOT / CONFIG}:{variant}", [f"model.path={start}", *overrides])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def within(seconds):
    """An error, instead of a test that hangs."""

    def late(number, frame):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- one run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(workdir, config, result) of an uninterrupted run, with everything logged."""
    workdir, config = tmp_path_factory.mktemp("whole") / "run", config_of(start, "log_samples=1000")
    return workdir, config, train.train(config, workdir)


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


def problems(split, count):
    return tasks.make("countdown", **tiny_language.COUNTDOWN).problems(split, count, 0)


def test_every_logged_verdict_is_what_the_verifier_says_of_the_completion(whole):
    answers = {problem.id: problem.answer for problem in problems("train", 10)}
    samples = rows(whole[0] / "samples.jsonl")
    for line in samples:
        verdict = countdown.verify(line["completion"], answers[line["problem"]])
        assert (line["reward"], line["parts"], line["status"]) == (verdict.value, verdict.parts, "ok")
    assert len({line["completion"] for line in samples}) > 10  # the members differ


@functools.cache
def logits(model):
    return jax.jit(lambda params, ids, n: model.head(params, model.forward(params, ids, None, 0, n)[0]))


def greedy(model, params, tokenizer, prompt, budget):
    """By whole forward passes, one token at a time."""
    ids = tokenizer.encode(prompt)
    for _ in range(budget):
        padded = np.pad(np.array(ids, np.int32), (0, 32 - len(ids)))
        ids.append(int(logits(model)(params, padded, len(ids))[len(ids) - 1].argmax()))
        if ids[-1] == tokenizer.eos:
            break
    return tokenizer.decode(ids).removeprefix(prompt)


def test_a_step_by_its_parts(whole, tmp_path):
    """The last step: members' completions from their materialised weights, and the update from the logged rewards."""
    workdir, config, _ = whole
    model, first, tokenizer = load(workdir / "warm_start")
    es = build.strategy(config, model.rules)
    like = es.init(first, jax.random.key(0))
    shutil.copytree(workdir / "checkpoints" / "0000000004", tmp_path / "0000000004")
    before, after = (checkpoint.restore(folder, like) for folder in (tmp_path, workdir / "checkpoints"))
    assert (before.step, after.step) == (4, 5)
    lines = [line for line in rows(workdir / "samples.jsonl") if line["step"] == 5]
    for line in (lines[0], lines[13], lines[31]):
        params = jax.jit(es.member_params)(before.state, line["member"])
        assert greedy(model, params, tokenizer, line["prompt"], 4) == line["completion"]
    fitness = np.float32([line["reward"] for line in lines]).reshape(8, 4)
    again, _ = jax.jit(es.update)(before.state, fitness)
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (again, after.state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before.state.params, again.params)), strict=True)
    ]
    assert min(moved) > 1e-4


def test_before_and_after_by_an_independent_evaluation(whole):
    workdir, config, result = whole
    model, first, tokenizer = load(workdir / "warm_start")
    es = build.strategy(config, model.rules)
    last = checkpoint.restore(workdir / "checkpoints", es.init(first, jax.random.key(0))).state.params
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
    monkeypatch.setattr(train.supervised, "fit", lambda *_, **__: pytest.fail("the warm start is cached"))
    assert train.train(config, workdir) == result
    assert [(workdir / name).read_bytes() for name in names] == before


# -- the warm start --------------------------------------------------------------------------------------------------


def test_the_warm_start_is_made_once_and_what_is_half_written_is_ignored(start, tmp_path, monkeypatch, capfd):
    fit, calls = train.supervised.fit, []

    def counted(*args, **kwargs):
        calls.append(kwargs["steps"])
        return fit(*args, **kwargs)

    monkeypatch.setattr(train.supervised, "fit", counted)
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
    ids, length, prompt_length = train.lessons(config, task, Characters(ALPHABET))
    first = problems("train", 10)[0]
    assert Characters(ALPHABET).decode(ids[0]) == first.prompt + first.solution
    assert (length[0], prompt_length[0]) == (len(first.prompt + first.solution) + 1, len(first.prompt))
    silent = task._replace(problems=lambda *args: [p._replace(solution="") for p in task.problems(*args)])
    with pytest.raises(config_lib.ConfigError, match="countdown has 10 problems without solution.*warm_start.steps=0"):
        train.lessons(config, silent, Characters(ALPHABET))
    assert train.lessons(config_of(start, "warm_start.steps=0"), silent, Characters(ALPHABET)) is None
    endless = Characters(ALPHABET)
    endless.eos = None
    with pytest.raises(config_lib.ConfigError, match="the tokenizer's end token is None"):
        train.lessons(config, task, endless)


# -- resume ----------------------------------------------------------------------------------------------------------


def final(workdir):
    """What an interruption must not change: metrics, samples, warm start, checksums of the last checkpoint's leaves."""
    newest = max(path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    leaves = json.loads((newest / "meta.json").read_text())["leaves"]
    names = ("metrics.jsonl", "samples.jsonl", "warm_start/model.safetensors")
    return [(workdir / name).read_bytes() for name in names], leaves


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


@pytest.mark.slow
def test_killed_anywhere_ends_bit_equal(start, tmp_path):
    """kill -9 in the warm start and at random moments of training, then SIGTERM, then to the end."""
    rng = random.Random(int(time.time()))
    # A cache of its own, which the first run fills: a process killed while it writes the shared one would leave half an entry.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def command(name):
        overrides = [
            f"--config.{o}" for o in (f"model.path={start}", "steps=60", "save_every=7", "warm_start.steps=400")
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={tmp_path / name}", *overrides],
            cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def finish(process):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return out, errors

    def kill(process):
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    def lines():
        path = tmp_path / "killed" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(process, count):
        deadline = time.monotonic() + 60
        while lines() < count:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)

    out, _ = finish(command("whole"))
    assert "12 held-out problems solved (gain " in out and (tmp_path / "whole" / "plot.png").read_bytes()[1:4] == b"PNG"

    process = command("killed")
    assert any("warm start: step 200/400" in line for line in process.stderr)
    time.sleep(rng.uniform(0, 0.3))
    kill(process)
    assert not (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    for _ in range(3):
        process = command("killed")
        wait_for(process, lines() + 1)
        time.sleep(rng.uniform(0, 0.2))
        kill(process)
    assert lines() < 60
    process = command("killed")
    wait_for(process, lines() + 1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: saved step" in errors
    _, errors = finish(command("killed"))
    assert "resumed" in errors and "warm start: step" not in errors
    assert final(tmp_path / "killed") == final(tmp_path / "whole")


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
    setup = train.Setup(None, None, Characters("ab"), None, settings, None, None, None, pool, None)
    texts, scored = train.verdicts(setup, Prompts(problem, [[1], [2]]), asked, rollouts)
    assert texts == ["ab", "ab", "ab", "aba", "a", "ab", "a"]
    assert scored.parts["answer"].tolist() == [7, 8, 7, 8, 8, 7, 8] and scored.value.tolist() == [2, 2, 2, 3, 1, 2, 1]
    # Rows 0 and 2 are equal, rows 4 and 6 too; row 5 ends by its budget, so its tokens differ.
    assert sorted(pool.asked) == [("a", 8), ("ab", 7), ("ab", 7), ("ab", 8), ("aba", 8)]


def test_fitness_by_hand(start):
    value = np.array([1, 0, 0.5, 1, 9, 0, 0, 0.5], float)  # 2 members x 2 prompts x 2 samples
    status = np.array(["ok"] * 4 + ["timeout"] + ["ok"] * 3)
    value[4] = 0
    overrides = ["prompts=2", "samples=2"]
    mean = train.fitness(config_of(start, *overrides), 2, Scored(value, status, {}))
    np.testing.assert_array_equal(mean, np.float32([[0.5, 0.75], [0, 0.25]]))
    passed = train.fitness(config_of(start, *overrides, "fitness=pass_at", "k=2"), 2, Scored(value, status, {}))
    np.testing.assert_array_equal(
        passed, np.float32([[1, 1], [1, 0]])
    )  # member 1 has one sample of prompt 0: as member 0


# -- faults of verifiers ---------------------------------------------------------------------------------------------

FAULTS = ("", "sleep", "raise", "crash", "nan")


def faulty_task(monkeypatch, fault_of):
    """Countdown whose verifier fails as `fault_of(split, index)` says, a pair (fault, always)."""
    task = tasks.make("countdown", **tiny_language.COUNTDOWN)

    def problems(split, count, seed):
        faults = [dict(zip(("fault", "always"), fault_of(split, i), strict=True)) for i in range(count)]
        return [p._replace(answer=f) for p, f in zip(task.problems(split, count, seed), faults, strict=True)]

    faulty = task._replace(problems=problems, verify="tests.experiments.faulty_verifier:verify")
    monkeypatch.setattr(tasks, "make", lambda name, **options: faulty)
    return {p.id: p.answer for p in problems("train", 10, 0)}


def test_every_fault_costs_its_samples_and_the_run_goes_on(start, tmp_path, monkeypatch):
    """Each fault on some completions of one prompt and on all of another."""
    answers = faulty_task(
        monkeypatch, lambda split, i: (FAULTS[i % 5], i >= 5) if split == "train" else ("sleep" if i == 0 else "", True)
    )
    config = config_of(
        start, "warm_start.steps=0", "steps=2", "prompts=10", "reward.deadline=0.2", "log_samples=1000", "es.sigma=0.3"
    )
    with within(90):
        result = train.train(config, tmp_path)
    assert (result["problems"], result["unjudged_before"], result["unjudged_after"]) == (12, 1, 1)
    metrics, samples = rows(tmp_path / "metrics.jsonl"), rows(tmp_path / "samples.jsonl")
    for line in samples:
        answer = answers[line["problem"]]
        expected = faulty_verifier.STATUS[faulty_verifier.fault(line["completion"], answer)]
        value = faulty_verifier.value(line["completion"]) if expected == "ok" else 0.0
        assert (line["status"], line["reward"]) == (expected, value)
    for row in metrics:
        lines = [line for line in samples if line["step"] == row["step"]]
        statuses = [line["status"] for line in lines]
        for status in ("timeout", "error", "unscorable"):
            assert row[f"reward_{status}"] == statuses.count(status) > 0
        assert row["finite_members"] == 8
        assert row["train_unjudged"] == np.mean([status != "ok" for status in statuses])
        # Prompts that were judged for nobody say nothing, and a lost sample takes the mean of its prompt.
        scores = np.array([line["reward"] if line["status"] == "ok" else np.nan for line in lines]).reshape(8, 10)
        silent = np.isnan(scores).all(axis=0)
        assert silent.sum() >= 4 and not silent.all()
        overall = np.nanmean(scores)
        filled = [
            np.where(np.isnan(c), overall if s else np.nanmean(c), c) for c, s in zip(scores.T, silent, strict=True)
        ]
        assert row["fitness_mean"] == pytest.approx(np.mean(filled), rel=1e-5)
        assert row["dead_groups"] == sum(len(set(column)) == 1 for column in filled)


def test_a_verifier_that_judges_nothing_ends_the_run(start, tmp_path, monkeypatch, capfd):
    faulty_task(monkeypatch, lambda split, i: ("raise", split == "train"))
    with within(60):
        code, error = refused(start, tmp_path / "run", *FAST, capfd=capfd)
    assert code == 2 and "step 1: none of the members has a finite fitness" in error
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["reward_error"] == 32
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_verifier_that_cannot_be_imported_is_one_clear_error(start, tmp_path, monkeypatch, capfd):
    task = tasks.make("countdown")._replace(verify="tests.experiments.faulty_verifier:absent")
    monkeypatch.setattr(tasks, "make", lambda name, **options: task)
    with within(60):
        code, error = refused(start, tmp_path / "run", capfd=capfd)
    assert code == 2 and "has no function 'absent'" in error and not (tmp_path / "run").exists()


# -- users' mistakes -------------------------------------------------------------------------------------------------


def refused(start, workdir, *overrides, variant="", capfd):
    """(exit status, what the command printed on standard error) in this process."""
    changes = [f"--config.{override}" for override in (f"model.path={start}", *overrides)]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(["train", f"--config={ROOT / CONFIG}:{variant}", f"--workdir={workdir}", *changes])
    return ended.value.code, capfd.readouterr().err


MISTAKES = {
    "task.name=countdwn": "unknown task 'countdwn'. Did you mean countdown?",
    "task.options.operands=(5,)": "config.task.options do not fit task countdown: not enough values to unpack",
    "method=grpo": "unknown method 'grpo'; known: eggroll, openes",
    "fitness=median": "unknown fitness 'median'; known: mean, pass_at",
    "fitness=pass_at k=3 samples=2": "needs 1 <= k <= samples per prompt; got k = 3 and 2 samples",
    "fitness=pass_at k=0": "got k = 0",
    "model.path= model.preset=tiny": "preset must be one of ['qwen3-0.6b'",
    "model.path=/nowhere/at/all": "neither an existing directory nor such a name",
    "model.path=tests": "is not a checkpoint: it has no config.json",
    "budget=29": "must fit the model's 32 tokens",
    "eval_problems=100000": "different test problems with these options, not 100000",
    "task.problems=100000": "different train problems with these options, not 100000",
    "warm_start.examples=100000": "different train problems with these options, not 100000",
    "es.members=7": "7 members",
    "es.rank=100": "rank 100 >",
    "es.shaping=best": "unknown es.shaping 'best'",
    "optimizer.name=lion": "unknown optimizer.name 'lion'",
    "sampling.temperature=-1.0": "temperature must be",
    "sampling.top_p=0.0": "top_p must be in (0, 1]",
    "engine.chunk=0": "chunk must be at least 1; got 0",
    "engine.view=-1": "view must be at least 1, or 0",
    "reward.deadline=0.0": "deadline must be finite and greater than 0 seconds",
    "model.dtype=float8": "float8",
}
LEAST = ("steps", "save_every", "eval_every", "eval_problems", "prompts", "samples", "budget", "task.problems", "engine.slots",
         "reward.workers", "warm_start.examples", "warm_start.batch", "es.members")  # fmt: skip
MISTAKES |= {f"{key}=0": f"config.{key} must be at least 1, not 0" for key in LEAST}
MISTAKES |= {
    f"{key}=-1": f"config.{key} must be at least 0, not -1" for key in ("seed", "warm_start.steps", "log_samples")
}
MISTAKES |= {
    f"{key}=0.0": f"config.{key} must be greater than 0, not 0.0"
    for key in ("es.sigma", "optimizer.learning_rate", "warm_start.learning_rate")
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_one_clear_line_and_leaves_nothing(start, tmp_path, capfd, overrides):
    with within(30):
        code, error = refused(start, tmp_path / "run", *overrides.split(), capfd=capfd)
    assert code == 2 and MISTAKES[overrides] in error
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def checkpoint_with(path, start, **files):
    """A copy of the checkpoint, with some files changed or (None) left out."""
    path.mkdir()
    for file in start.iterdir():
        content = files.get(file.stem, file.read_bytes())
        if content is not None:
            (path / file.name).write_bytes(content)
    return path


def test_tokenizers_that_do_not_fit(start, tmp_path, capfd):
    characters = lambda alphabet: json.dumps({"alphabet": alphabet}).encode()  # noqa: E731
    for name, alphabet, message in (
        ("none", None, "a checkpoint to train needs its tokenizer.json"),
        ("larger", characters(ALPHABET + "abc"), "23 ids for 20 entries: it belongs to another model"),
        ("other", characters("0123456789:="), "the text must be written in the alphabet '0123456789:='; it has [' ']"),
        ("broken", b"{", "characters.json is not JSON"),
    ):
        path = checkpoint_with(tmp_path / name, start, characters=alphabet)
        code, error = refused(path, tmp_path / "run", capfd=capfd)
        assert code == 2 and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()


def test_tasks_of_ordinary_text(start, tmp_path, capfd):
    broken = tmp_path / "data"
    broken.mkdir()
    good = json.dumps({"question": "How many?", "answer": "#### 3"})
    (broken / "test.jsonl").write_text(f"{good}\n")
    (broken / "train.jsonl").write_text(f'{good}\n{{"question": "x"\n')
    for variant, overrides, message in (
        ("stories", ["model.path="], "task stories is ordinary text: give a model that reads it, --config.model.path="),
        ("gsm8k", [f"task.options.path={broken}"], "train.jsonl, line 2: "),
        ("gsm8k", [f"task.options.path={tmp_path / 'absent'}"], "which cannot be read (No such file or directory)"),
        ("mistyped", [], "task countdown has no option nubmers"),
    ):
        code, error = refused(start, tmp_path / "run", *overrides, variant=variant, capfd=capfd)
        assert code == 2 and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()


def test_mistakes_on_the_command_line(start, whole, tmp_path, capfd):
    code, error = refused(start, tmp_path / "run", "promts=3", capfd=capfd)
    assert code == 2 and "did you mean prompts?" in error and not (tmp_path / "run").exists()
    before = (whole[0] / "metrics.jsonl").read_bytes()
    code, error = refused(start, whole[0], "log_samples=1000", "es.sigma=0.2", capfd=capfd)
    assert code == 2 and "es.sigma: stored 0.05, this command 0.2" in error
    assert (whole[0] / "metrics.jsonl").read_bytes() == before
    (tmp_path / "file").touch()
    code, error = refused(start, tmp_path / "file", capfd=capfd)
    assert code == 2 and "must be a folder" in error
    other = f"--config={ROOT / 'configs' / 'digits.py'}"
    with pytest.raises(SystemExit) as ended:
        train.main(["train", other, f"--workdir={tmp_path / 'run'}"])
    assert ended.value.code == 2 and "this script needs a config with the keys" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        train.main(["train", f"--config={ROOT / CONFIG}", "--help"])
    assert ended.value.code == 0 and "warm_start.steps = 100" in capfd.readouterr().out


# -- other kinds of run ----------------------------------------------------------------------------------------------


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
    config = config_of(STORIES, *FAST, "budget=6", "eval_problems=4", "prompts=2", "es.sigma=1e-4", variant="stories")
    train.train(config, tmp_path)
    for line in rows(tmp_path / "samples.jsonl"):
        assert line["prompt"].startswith("Once upon a time, there was a little ") and line["completion"].startswith(" ")
        assert "<s>" not in line["completion"] and "</s>" not in line["completion"]
