"""Evaluation: majorities against all subsets, intervals by hand, a run and a checkpoint end to end, bad input."""

import collections
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate, train
from rl import tasks
from rl.models.load import load
from rl.rollout import generate as rollout
from rl.rollout.engine import Settings
from rl.rollout.sampling import Sampling
from rl.tasks import arithmetic, countdown
from rl.types import LENGTH, STOPPED, Requests, Rollouts, Scored
from tests.experiments.tiny_train import CONFIG, ROOT, config_of, greedy, problems, save_start

# -- numbers ---------------------------------------------------------------------------------------------------------


def by_subsets(k, answers, solved):
    """Every subset votes; ties are shared."""
    right = {a for a, won in zip(answers, solved, strict=True) if won and a is not None}
    chances = []
    for subset in itertools.combinations(answers, k):
        votes = collections.Counter(a for a in subset if a is not None)
        leaders = [a for a, count in votes.items() if count == max(votes.values())]
        chances.append(sum(a in right for a in leaders) / len(leaders) if leaders else 0)
    return np.mean(chances)


def test_majorities_by_hand():
    # Of 7 7 3 3 3 and no answer, 7 is right. One sample: 2 of 6. All: 3 has three votes. Two of six, 15 pairs: 7 7 wins (1),
    # 7 - wins (2), 7 3 is a tie (6 halves), all else loses: (1 + 2 + 3) / 15.
    answers, solved = ["7", "7", "3", "3", "3", None], [True, True, False, False, False, False]
    assert evaluate.majority_at(1, answers, solved) == pytest.approx(2 / 6)
    assert evaluate.majority_at(2, answers, solved) == pytest.approx(6 / 15)
    assert evaluate.majority_at(6, answers, solved) == 0
    # Two right answers beat a more frequent wrong one where they are among the leaders only.
    assert evaluate.majority_at(4, ["a", "b", "c", "c"], [True, True, False, False]) == 0
    assert evaluate.majority_at(3, ["a", "b", "c"], [True, True, False]) == pytest.approx(2 / 3)
    assert evaluate.majority_at(2, [None, None], [False, False]) == 0
    # Judged right once, not judged the other time (a timeout): the answer is right.
    assert evaluate.majority_at(2, ["5", "5"], [True, False]) == 1


@pytest.mark.parametrize("seed", range(6))
def test_majorities_are_the_mean_over_all_subsets(seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        answers = rng.choice(np.array(["a", "b", "c", "d", None], object), size=7, p=[0.3, 0.25, 0.15, 0.1, 0.2])
        right = rng.choice(["a", "b", "c", "d"], size=2)
        solved = [a in right for a in answers]
        for k in (1, 2, 3, 5, 7):
            assert evaluate.majority_at(k, answers, solved) == pytest.approx(by_subsets(k, answers, solved), abs=1e-12)


def test_a_single_vote_is_pass_at_1_and_many_samples_are_exact():
    answers, solved = ["a"] * 40 + ["b"] * 30 + [None] * 30, [True] * 40 + [False] * 60
    assert evaluate.majority_at(1, answers, solved) == pytest.approx(0.4, abs=1e-15)
    assert evaluate.majority_at(100, answers, solved) == 1
    # The majority of 33 of these 100, by drawing.
    rng, draws = np.random.default_rng(0), 20_000
    votes = rng.multivariate_hypergeometric([40, 30, 30], 33, size=draws)
    won = (votes[:, 0] > votes[:, 1]) + 0.5 * (votes[:, 0] == votes[:, 1])
    assert evaluate.majority_at(33, answers, solved) == pytest.approx(won.mean(), abs=5 * won.std() / draws**0.5)


def test_intervals_by_hand():
    # 1 0 0 1: mean 1/2, variance (4/4) / 3, half-width 1.96 sqrt(1/3) / 2.
    assert evaluate.estimate([1, 0, 0, 1]) == pytest.approx({"mean": 0.5, "half": 1.96 * (1 / 3) ** 0.5 / 2})
    assert evaluate.estimate([0.25]) == {"mean": 0.25, "half": None}
    assert evaluate.estimate([True, True]) == {"mean": 1.0, "half": 0.0}


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_intervals_hold_the_truth_95_times_in_100(share):
    """Problems differ in difficulty, and samples of one problem share it: 40 problems with 4 samples each."""
    rng, hits, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        difficulty = rng.beta(share, 1 - share, size=40)
        solved = rng.random((40, 4)) < difficulty[:, None]
        made = evaluate.estimate(solved.mean(axis=1))
        hits += abs(made["mean"] - share) <= made["half"]
    assert (
        0.92 < hits / trials < 0.965
    )  # the standard error is 0.005; intervals over samples would hold it 70 times in 100


def answered():
    """2 problems x 4 samples of arithmetic: 5 5 6 (timeout) to 2+3, 8 9 - 9 to 4+5."""
    texts = ["5", "5", "6", "5", "8", "9", "x", "9"]
    value = np.array([1, 1, 0, 0, 0, 1, 0, 1], float)
    status = np.array(["ok", "ok", "ok", "timeout", "ok", "ok", "ok", "ok"])
    length, finish = np.array([2, 2, 2, 2, 2, 2, 3, 2]), np.array([STOPPED] * 6 + [LENGTH, STOPPED], np.int8)
    zeros = np.zeros((8, 3), np.float32)
    rollouts = Rollouts(zeros.astype(np.int32), length, zeros, zeros, zeros.astype(np.int32), finish, np.full(8, -1))
    return evaluate.Answered(texts, rollouts, Scored(value, status, {}))


def test_a_report_by_hand():
    task = tasks.make("arithmetic")
    at = evaluate.at_k(task, answered(), 2, (1, 2, 4))
    # Two of four solved in both: C(2, 2) / C(4, 2) = 1/6 of the pairs have no success.
    assert {k: v["mean"] for k, v in at["pass_at"].items()} == pytest.approx({"1": 1 / 2, "2": 5 / 6, "4": 1})
    # 5 5 5 6: pairs are 5 5 (3, won) and 5 6 (3, tied): 3/4. 9 9 8 -: 9 9, 2 times 9 -, (won), 2 times 9 8 (tied): 4/6.
    maj = {"1": (3 / 4 + 1 / 2) / 2, "2": (3 / 4 + 4 / 6) / 2, "4": 1}
    assert {k: v["mean"] for k, v in at["maj_at"].items()} == pytest.approx(maj)
    assert at["maj_at"]["4"]["half"] == 0 and at["maj_at"]["1"]["half"] == pytest.approx(1.96 * 0.25 / 2**0.5 / 2**0.5)
    made = evaluate.describe(answered(), 2)
    assert made["solved"] == made["reward"] == {"mean": 0.5, "half": 0.0}
    assert made["length"]["mean"] == 17 / 8 and (made["length"]["median"], made["length"]["longest"]) == (2, 3)
    assert made["finish"] == {"stopped": 7 / 8, "length": 1 / 8}
    assert made["unjudged"] == {"timeout": 1, "error": 0, "unscorable": 0}
    assert evaluate.at_k(tasks.make("stories"), answered(), 2, (1,))["maj_at"] is None


# -- final answers ---------------------------------------------------------------------------------------------------


def test_final_answers():
    assert [arithmetic.answer_of(x) for x in ("5", ":2+3=5", " 5", "-0", "5=", "05", "2+3", "x")] == [
        "5", "5", "5", "0", None, None, None, None
    ]  # fmt: skip
    assert arithmetic.answer_of("=".join(["5"] * 16)) == "5" and arithmetic.answer_of("=".join(["5"] * 17)) is None
    compact = tasks.make("countdown").answer_of
    assert [compact(x) for x in ("3 + 5", "3+5=8", "3+5=9", "5+3", "1/0", "3+", "<answer>3 \u00d7 5</answer>")] == [
        "3+5", "3+5", None, "5+3", "1/0", None, "3*5"
    ]  # fmt: skip
    english = tasks.make("countdown", style="english").answer_of
    assert [english(x) for x in ("3+5", "so <answer> 3+5 </answer>")] == [None, "3+5"]
    loose, strict = (tasks.make("gsm8k", path="", marker_required=m).answer_of for m in (False, True))
    assert [loose(x) for x in ("#### 1,234", "so 72.0", "#### 72", "0.5", "none")] == ["1234", "72", "72", "1/2", None]
    assert [strict(x) for x in ("so 72", "#### $72.")] == [None, "72"]
    assert tasks.make("stories").answer_of is None


def test_equal_answers_are_right_together():
    """What majorities rely on: the verifier never tells two completions with one final answer apart."""
    rng = np.random.default_rng(0)
    for task in (tasks.make("arithmetic"), tasks.make("countdown", numbers=(2, 2))):
        verify = {"arithmetic": arithmetic, "countdown": countdown}[task.name].verify
        seen: dict = {}
        for problem in task.problems("train", 30, 0):
            target = str(problem.answer.get("value", problem.answer.get("target")))
            pieces = [problem.solution, target, "=", " ", ":", "+", "1", f"{problem.solution}={target}"]
            for text in ("".join(rng.choice(pieces, size=rng.integers(1, 4))) for _ in range(200)):
                seen.setdefault((problem.id, task.answer_of(text)), set()).add(verify(text, problem.answer).value >= 1)
        verdicts = {key: value for key, value in seen.items() if key[1] is not None}
        assert all(len(value) == 1 for value in verdicts.values()) and {True} in verdicts.values()
        assert all(value == {False} for key, value in seen.items() if key[1] is None)


# -- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """A finished run of one step."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train.train(config_of(start, "steps=1"), workdir)


@pytest.mark.slow
def test_a_run_exports_what_it_evaluated_and_keeps_it(run, start):
    workdir, result = run
    model, params, tokenizer = load(workdir / "model")
    value = [
        countdown.verify(greedy(model, params, tokenizer, p.prompt, 4), p.answer).value for p in problems("test", 12)
    ]
    assert np.mean(value) == pytest.approx(result["reward_after"], abs=1e-12)
    warm = load(workdir / "warm_start")[1]
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (warm, params)), strict=True))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (workdir / "model").iterdir()}
    train.train(config_of(start, "steps=1"), workdir)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (workdir / "model").iterdir()}


def test_an_export_that_was_interrupted_is_made_again(run, start, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "model.writing").mkdir()
    (tmp_path / "run" / "model.writing" / "model.safetensors").write_bytes(b"half")
    assert train.train(config_of(start, "steps=1"), tmp_path / "run") == run[1]
    whole, again = (x / "model" / "model.safetensors" for x in (run[0], tmp_path / "run"))
    assert whole.read_bytes() == again.read_bytes() and not (tmp_path / "run" / "model.writing").exists()


def test_a_finished_run_is_evaluated(run, capsys):
    workdir, result = run
    assert evaluate.main([str(workdir), "--problems=12", "--samples=5", "--k=1,3,5", "--temperature=0.7"]) == 0
    report = json.loads((workdir / "evaluation.json").read_text())
    assert report["greedy"]["reward"]["mean"] == pytest.approx(result["reward_after"], abs=1e-12)
    assert 100 * report["greedy"]["solved"]["mean"] == pytest.approx(result["solved_after"])
    # The samples once more, from the engine itself, judged in this process.
    model, params, tokenizer = load(workdir / "model")
    asked = [p for p in problems("test", 12) for _ in range(5)]
    longest = max(len(p.prompt) for p in asked)
    settings = Settings(slots=60, length=longest + 4, stop=(0,), sampling=Sampling(temperature=0.7), chunk=4, view=0)
    requests = Requests.make([tokenizer.encode(p.prompt) for p in asked], budget=4)
    rows = rollout.generate(model, settings, params, requests, jax.random.key(0))
    texts = [tokenizer.decode(tokens[:n]) for tokens, n in zip(rows.tokens, rows.length, strict=True)]
    value = np.array([countdown.verify(t, p.answer).value for t, p in zip(texts, asked, strict=True)])
    solved = (value >= 1).reshape(12, 5)
    assert report["sampled"]["reward"]["mean"] == pytest.approx(value.mean(), abs=1e-12)
    assert report["sampled"]["length"]["mean"] == pytest.approx(rows.length.mean(), abs=1e-12)
    subsets = {k: list(itertools.combinations(range(5), k)) for k in (1, 3, 5)}
    passed = {str(k): np.mean([row[list(s)].any() for row in solved for s in subsets[k]]) for k in subsets}
    assert {k: v["mean"] for k, v in report["pass_at"].items()} == pytest.approx(passed, abs=1e-12)
    keys = np.array([countdown.answer_of(text) for text in texts], object).reshape(12, 5)
    voted = {str(k): np.mean([by_subsets(k, *row) for row in zip(keys, solved, strict=True)]) for k in subsets}
    assert {k: v["mean"] for k, v in report["maj_at"].items()} == pytest.approx(voted, abs=1e-12)
    printed = capsys.readouterr().out
    assert f"pass@3   {100 * passed['3']:5.1f} +- " in printed and printed.rstrip().endswith("evaluation.json")


def test_any_checkpoint_with_a_recipe_and_the_training_problems(run, start, tmp_path):
    out = tmp_path / "new" / "report.json"
    flags = [f"--config={ROOT / CONFIG}", f"--model={start}", "--config.budget=3", "--split=train", "--problems=10"]
    assert evaluate.main([*flags, "--samples=2", "--seed=3", f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    assert (report["model"], report["split"], report["budget"], report["seed"]) == (str(start), "train", 3, 3)
    assert list(report["pass_at"]) == ["1"]  # of 1, 4 and 8
    model, params, tokenizer = load(start)
    value = [
        countdown.verify(greedy(model, params, tokenizer, p.prompt, 3), p.answer).value for p in problems("train", 10)
    ]
    assert report["greedy"]["reward"]["mean"] == pytest.approx(np.mean(value), abs=1e-12)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_clear_message(run, start, tmp_path, capsys):
    workdir = str(run[0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[1, 2")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"env": {"name": "CartPole-v1"}}')
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    recipe = f"--config={ROOT / CONFIG}"
    for arguments, message in (
        ([], "give either RUN, a job's --workdir, or --config"),
        ([workdir, recipe], "give either RUN"),
        ([workdir, "--config.budget=3"], "a RUN has its config, but got --config.budget=3"),
        ([str(tmp_path / "none")], "a run is a folder with config.json, but .*none has none"),
        ([str(tmp_path / "broken")], "is not the JSON object a job writes"),
        ([str(tmp_path / "running")], "has no folder model, which a job writes when it ends"),
        ([str(tmp_path / "other"), f"--model={start}"], "needs a config with the keys task.* has no task"),
        ([workdir, f"--model={tmp_path / 'nowhere'}"], "neither an existing directory nor such a name"),
        ([workdir, "--split=dev"], "--split must be test or train; got 'dev'"),
        ([workdir, "--problems=0"], "--problems must be at least 1; got 0"),
        ([workdir, "--problems=100000"], "found only"),
        ([workdir, "--samples=4", "--k=8"], r"1 to the number of samples, 4; got \(8,\): raise --samples"),
        ([workdir, "--k=1,x"], "whole numbers with commas between them, such as 1,4,8; got '1,x'"),
        ([workdir, "--temperature=0"], "greedy answers to one prompt are all equal; got --samples=8"),
        ([workdir, "--temperature=-1", "--problems=12"], "temperature must be 0 .* got -1"),
        ([recipe, "--problems=12"], "config.model.path is empty: give --model=DIRECTORY"),
        ([recipe, "--config.bugdet=3"], "no key 'bugdet' .did you mean budget"),
        (
            [workdir, "--problems=2", "--samples=1", f"--out={tmp_path / 'broken' / 'config.json'}/x"],
            "cannot be written",
        ),
    ):
        assert evaluate.main(arguments) == 2, arguments
        assert re.search(message, capsys.readouterr().err.replace("\n", " ")), arguments
    with pytest.raises(SystemExit):
        evaluate.main([workdir, "--sampels=3"])
    assert "unrecognized arguments: --sampels=3" in capsys.readouterr().err
