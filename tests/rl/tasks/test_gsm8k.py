"""gsm8k from its files and through TFDS, and the extraction of final numbers."""

import importlib.util
import json
import os
import socket
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from rl import tasks
from rl.tasks import TaskError
from rl.tasks.gsm8k import SPLITS, final_number, read, verify

DATA = Path(os.environ.get("EGGROLL_DATA", Path(__file__).parents[4] / "shared" / "data")) / "gsm8k"
COUNTS = {"train": 7473, "test": 1319}

needs_data = pytest.mark.skipif(
    not all((DATA / f"{split}.jsonl").is_file() for split in SPLITS),
    reason="the gsm8k files are not there: set EGGROLL_DATA to the folder that has gsm8k/train.jsonl and test.jsonl",
)
needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None or importlib.util.find_spec("importlib_resources") is None,
    reason="needs TFDS: pip install 'eggroll-jax[data]'",
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("so\n#### 1,234", "1234"),
        ("#### 1,234,567", "1234567"),
        ("####-5", "-5"),
        ("#### \u22125", "-5"),
        ("#### $18", "18"),
        ("#### $-18", "-18"),
        ("#### -$18.50", "-18.5"),
        ("#### 0.25", "1/4"),
        ("#### 72.", "72"),
        ("#### **72**", "72"),
        ("#### 72 apples\nQuestion: 5 and 6?\n#### 11", "72"),
        ("#### none\nQuestion 3", "3"),
        ("The answer is 42.", "42"),
        ("It costs $1,250.75.", "5003/4"),
        ("5 - 3 = 2", "2"),
        ("7-3", "3"),
        ("x = -3", "-3"),
        ("(-3)", "-3"),
        ("in 1, 2 or 3", "3"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        ("50%", "50"),
        ("007", "7"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "####", "#### none", "$", "-", "\u0663", "#### " + "9" * 41, "9" * 41])
def test_no_final_number(text):
    assert final_number(text) is None


def test_only_a_marked_number_counts_where_the_marker_is_required():
    assert final_number("It is 72.", marker_required=True) is None
    assert final_number("It is 7.\n#### 72", marker_required=True) == 72
    answer = {"value": "72", "marker_required": True}
    assert verify("It is 72.", answer) == (0.0, "ok", {"format": 0.0, "exact": 0.0})
    assert verify("#### 72", answer) == (1.0, "ok", {"format": 1.0, "exact": 1.0})
    assert verify("#### 71", answer) == (0.0, "ok", {"format": 1.0, "exact": 0.0})
    assert verify("It is 72.", {**answer, "marker_required": False}) == (1.0, "ok", {"format": 0.0, "exact": 1.0})


def test_values_are_compared_as_rationals():
    assert verify("#### 3.50", {"value": "7/2", "marker_required": True}).value == 1
    # Equal as floats, not as numbers.
    assert verify("#### 9007199254740993", {"value": "9007199254740992", "marker_required": True}).value == 0


@needs_data
def test_counts_and_every_gold_answer():
    task = tasks.make("gsm8k", path=str(DATA))
    for split, count in COUNTS.items():
        assert len(read(DATA / f"{split}.jsonl").records) == count
        problems = task.problems(split, count, 0)
        assert len({p.id for p in problems}) == count
        assert sum(verify(p.solution, p.answer).value for p in problems) == count
        with pytest.raises(TaskError, match=f"has {count} problems, fewer than the {count + 1} asked for"):
            task.problems(split, count + 1, 0)


@needs_data
def test_gold_answers_equal_a_plain_reading_of_the_last_line():
    for split in SPLITS:
        for record in read(DATA / f"{split}.jsonl").records:
            last = record.answer.split("\n")[-1].removeprefix("#### ").replace(",", "")
            assert final_number(record.answer, marker_required=True) == int(last)


@pytest.mark.slow
@needs_data
@needs_tfds
def test_tfds_offline_gives_the_same_problems(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    plain = tasks.make("gsm8k", path=str(DATA))
    for _ in range(2):  # prepared, then read as it was prepared
        through = tasks.make("gsm8k", path=str(DATA), source="tfds", data_dir=str(tmp_path))
        for split, count in COUNTS.items():
            problems = through.problems(split, count, 5)
            assert len(problems) == count
            assert problems == plain.problems(split, count, 5)
    written = [path.name for path in tmp_path.rglob("*.array_record*")]
    assert len(written) == 2
    assert "tensorflow" not in sys.modules


@needs_tfds
def test_tfds_prepares_other_files_anew_and_names_broken_lines(tmp_path):
    write(tmp_path, train=[row(1)], test=[row(2)])
    task = tasks.make("gsm8k", path=str(tmp_path), source="tfds", data_dir=str(tmp_path / "tfds"))
    assert task.problems("train", 1, 0)[0].answer["value"] == "1"
    write(tmp_path, train=[row(3)], test=[row(2)])
    task = tasks.make("gsm8k", path=str(tmp_path), source="tfds", data_dir=str(tmp_path / "tfds"))
    assert task.problems("train", 1, 0)[0].answer["value"] == "3"
    write(tmp_path, train=[row(3), "{"], test=[row(2)])
    task = tasks.make("gsm8k", path=str(tmp_path), source="tfds", data_dir=str(tmp_path / "tfds"))
    with pytest.raises(TaskError, match="train.jsonl, line 2"):
        task.problems("train", 1, 0)


def row(i):
    return json.dumps({"question": f"What is {i}?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i}"})


def write(folder, **splits):
    for split, lines in splits.items():
        data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        (folder / f"{split}.jsonl").write_bytes(data + b"\n")


BROKEN = {
    '{"question": "Q"': "Expecting",
    "": "Expecting value",
    "[1]": "a line must be a JSON object, not list",
    '{"question": "Q"}': "the field 'answer' must be a text",
    '{"question": 5, "answer": "#### 1"}': "the field 'question' must be a text",
    '{"question": "Q", "answer": "72"}': "must end in '####' and a number",
    '{"question": "Q", "answer": "#### many"}': "must end in '####' and a number",
    b"\xff\xfe": "utf-8",
    "[" * 100_000: "recursion",
    row(1): "the same question as line 1",
}


@pytest.mark.parametrize(("line", "message"), BROKEN.items())
def test_a_broken_line_is_named_and_the_rest_is_there_on_request(tmp_path, line, message):
    write(tmp_path, train=[row(1), row(2), line, row(3)], test=[row(4)])
    task = tasks.make("gsm8k", path=str(tmp_path))
    with pytest.raises(TaskError, match=f"train.jsonl, line 3: .*{message}.*skip_broken=True"):
        task.problems("train", 1, 0)
    with pytest.warns(UserWarning, match="1 broken lines left out: .*train.jsonl, line 3"):
        problems = tasks.make("gsm8k", path=str(tmp_path), skip_broken=True).problems("train", 3, 0)
    assert sorted(p.answer["value"] for p in problems) == ["1", "2", "3"]
    found = read(tmp_path / "train.jsonl", skip_broken=True)
    assert (len(found.records), len(found.broken)) == (3, 1)


def test_a_question_in_both_splits_is_an_error(tmp_path):
    write(tmp_path, train=[row(1), row(2)], test=[row(2)])
    with pytest.raises(TaskError, match="1 questions of .* are in both, such as 'What is 2"):
        tasks.make("gsm8k", path=str(tmp_path)).problems("test", 1, 0)


@pytest.mark.parametrize("source", ["jsonl", pytest.param("tfds", marks=needs_tfds)])
def test_missing_files_are_named(tmp_path, source):
    task = tasks.make("gsm8k", path=str(tmp_path / "nowhere"), source=source)
    with pytest.raises(TaskError, match="nowhere.*No such file"):
        task.problems("train", 1, 0)


def test_prompt_and_solution(tmp_path):
    write(tmp_path, train=[row(1)], test=[row(2)])
    problem = tasks.make("gsm8k", path=str(tmp_path)).problems("train", 1, 0)[0]
    assert problem.prompt == "Question: What is 1?\nAnswer:"
    assert problem.solution == " It is <<1=1>>1.\n#### 1"
    options = {"annotations": False, "template": "{question} {4}\n"}
    problem = tasks.make("gsm8k", path=str(tmp_path), **options).problems("train", 1, 0)[0]
    assert (problem.prompt, problem.solution) == ("What is 1? {4}\n", " It is 1.\n#### 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "hub"}, "source must be one of jsonl, tfds"),
        ({"source": "tfds", "skip_broken": True}, "use source='jsonl'"),
        ({"template": "Q:"}, "template must contain {question}"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TaskError, match=message):
        tasks.make("gsm8k", path=".", **options)
