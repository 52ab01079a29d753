"""Training when verifiers fail and when users do: counted statuses, one clear error, nothing hung or half-written."""

import json

import numpy as np
import pytest

from experiments import train
from rl import tasks
from rl.run import Run
from tests.experiments import faulty_verifier, tiny_language
from tests.experiments.tiny_train import ALPHABET, CONFIG, FAST, ROOT, config_of, rows, save_start, within


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start") / "model")


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


@pytest.mark.slow
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
    "method=grpoo": "unknown method 'grpoo'; known: eggroll, openes, reinforce, grpo",
    "method=grpo": "method grpo reads config.gradient, which this config does not have",
    "refills=1": "got config.refills = 1 and config.replay.name = 'none'",
    "refills=-1": "config.refills must be at least 0, not -1",
    "fitness=median": "unknown fitness 'median'; known: mean, pass_at",
    "fitness=pass_at k=3 samples=2": "needs 1 <= k <= samples per prompt; got k = 3 and 2 samples",
    "fitness=pass_at k=0": "got k = 0",
    "samples=2": "got config.samples = 2 at temperature 0",
    "model.path= model.preset=tiny": "preset must be one of ['micro-transformer', 'qwen3-0.6b'",
    "model.path=/nowhere/at/all": "neither an existing directory nor such a name",
    "model.path=tests": "is not a checkpoint: it has no config.json",
    "budget=29": "must fit the model's 32 tokens",
    "eval_problems=100000": "different test problems with these options, not 100000",
    "task.problems=100000": "different train problems with these options, not 100000",
    "warm_start.examples=100000": "different train problems with these options, not 100000",
    "es.members=7": "7 members",
    "es.rank=100": "rank 100 >",
    "es.shaping=best": "unknown es.shaping 'best'",
    "optimizer.name=lyon": "unknown optimizer.name 'lyon'",
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
        same = {} if alphabet else {"tokenizer": None}
        path = checkpoint_with(tmp_path / name, start, characters=alphabet, **same)
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


def test_mistakes_on_the_command_line(start, tmp_path, capfd):
    code, error = refused(start, tmp_path / "run", "promts=3", capfd=capfd)
    assert code == 2 and "did you mean prompts?" in error and not (tmp_path / "run").exists()
    with Run(tmp_path / "used", config_of(start), total_steps=5, save_every=2):
        pass
    code, error = refused(start, tmp_path / "used", "es.sigma=0.2", capfd=capfd)
    assert code == 2 and "es.sigma: stored 0.05, this command 0.2" in error
    with Run(tmp_path / "used", config_of(start), total_steps=5, save_every=2):
        code, error = refused(start, tmp_path / "used", capfd=capfd)
    assert code == 2 and "one process at a time may train in a working directory" in error
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
