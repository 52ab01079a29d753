"""Grade School Math (Cobbe et al., 2021): word problems whose answer is one number.

Records come from JSON lines or from TensorFlow Datasets, in both cases from local files. A record has a `question` and
an `answer`, a worked solution with calculator annotations `<<48/2=24>>` and a last line `#### 24`.
"""

import json
import random
import re
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from rl.tasks import _draw
from rl.tasks.types import Problem, Task, TaskError, Verdict, check_request

SPLITS = ("train", "test")
_MARKER = "####"
_AFTER_MARKER = 100  # characters looked at after a marker
_TAIL = 2000  # characters at the end of a completion that are searched for a last number
_MAX_NUMBER = 40  # characters in a number
# A minus sign counts where it cannot be a subtraction; commas where they group thousands.
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z.)])[-\u2212])?\$?(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?)"
)
_ANNOTATION = re.compile(r"<<[^<>]*>>")


class Record(NamedTuple):
    """One line of the data set."""

    question: str
    answer: str


class Records(NamedTuple):
    """The records of one split, and one message per broken line that was left out."""

    records: list[Record]
    broken: list[str]


def make(
    path: str,
    source: str = "jsonl",
    data_dir: str | None = None,
    skip_broken: bool = False,
    annotations: bool = True,
    marker_required: bool = False,
    template: str = "Question: {question}\nAnswer:",
) -> Task:
    """Builds the task.

    Args:
      path: the folder with `train.jsonl` and `test.jsonl`.
      source: "jsonl" reads the files; "tfds" reads the TensorFlow data set `gsm8k_jsonl`, prepared from the files the
        first time (extra `data`; neither TensorFlow nor a network is needed).
      data_dir: where TFDS keeps what it prepares; None for its own default.
      skip_broken: whether broken lines are left out, with a warning that counts them, instead of being an error; only
        for "jsonl".
      annotations: whether solutions keep the calculator annotations.
      marker_required: whether a completion's number only counts after `####`.
      template: the prompt, with `{question}`.

    Returns:
      The `Task`; its files are read at the first call of `problems`.

    Raises:
      TaskError: an option out of range; at the first call of `problems`, a missing file or a broken line.
    """
    if source not in ("jsonl", "tfds"):
        raise TaskError(f"source must be one of jsonl, tfds, not {source!r}")
    if source == "tfds" and skip_broken:
        raise TaskError("a TFDS data set holds whole files: use source='jsonl' to skip broken lines")
    if "{question}" not in template:
        raise TaskError(f"template must contain {{question}}, but it is {template!r}")
    cache: dict[str, list[Problem]] = {}

    def problems(split: str, count: int, seed: int) -> list[Problem]:
        check_request(split, count)
        if not cache:
            for name, records in _records(path, source, data_dir, skip_broken).items():
                made = [_problem(record, annotations, marker_required, template) for record in records]
                cache[name] = sorted(made)  # by id: every source and every order of lines gives the same problems
        return _sample(cache[split], split, count, seed)

    def answer_of(completion: str) -> str | None:
        number = final_number(completion, marker_required)
        return None if number is None else str(number)

    return Task("gsm8k", problems, f"{__name__}:verify", None, answer_of)


def verify(completion: str, answer: dict[str, Any]) -> Verdict:
    """Compares the final number of a completion with the right one, as exact rationals.

    Args:
      completion: untrusted.
      answer: a problem's `answer`, `{"value": "1234", "marker_required": false}`.

    Returns:
      A `Verdict` with value 1 or 0 and parts `format` (a number follows `####`) and `exact`.
    """
    marked = final_number(completion, marker_required=True)
    found = final_number(completion, answer["marker_required"])
    exact = float(found is not None and found == Fraction(answer["value"]))
    return Verdict(exact, "ok", {"format": float(marked is not None), "exact": exact})


def final_number(text: str, marker_required: bool = False) -> Fraction | None:
    """The number a solution ends in.

    That is the number after the first `####`, where a model that goes on to another question has ended the one it was
    asked. Without one, the last number in the final 2,000 characters. Understands "1,234", "-3", "$5", "0.25", "72.".

    Args:
      text: untrusted.
      marker_required: whether only a number after `####` counts.

    Returns:
      The number, or None where there is none of at most 40 characters.
    """
    at = text.find(_MARKER)
    if at >= 0:
        start = at + len(_MARKER)
        match = _NUMBER.search(text[start : start + _AFTER_MARKER].partition("\n")[0])
        if match:
            return _fraction(match)
    if marker_required:
        return None
    last = None
    for match in _NUMBER.finditer(text[-_TAIL:]):
        last = match
    return _fraction(last) if last else None


def read(path: Path, skip_broken: bool = False) -> Records:
    """Reads one file of JSON lines.

    Args:
      path: the file.
      skip_broken: whether broken lines are reported in `Records.broken` instead of raised.

    Returns:
      The `Records`, in the order of the file.

    Raises:
      TaskError: the file cannot be read, or (unless `skip_broken`) line N is broken: not UTF-8, not JSON, without the
        two texts, without a number after `####`, or with the question of an earlier line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TaskError(
            f"gsm8k needs {path}, which cannot be read ({error.strerror}): give the folder of train.jsonl and "
            "test.jsonl as path"
        ) from error
    if lines[-1] == b"":
        lines.pop()
    records: list[Record] = []
    broken: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = _parse(line)
            if record.question in seen:
                raise ValueError(f"the same question as line {seen[record.question]}")
        except (ValueError, RecursionError) as error:
            if not skip_broken:
                raise TaskError(f"{path}, line {number}: {error}. skip_broken=True reads the other lines") from error
            broken.append(f"{path}, line {number}: {error}")
            continue
        seen[record.question] = number
        records.append(record)
    return Records(records, broken)


def _parse(line: bytes) -> Record:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, not {type(record).__name__}")
    for field in Record._fields:
        if not isinstance(record.get(field), str):
            raise ValueError(f"the field {field!r} must be a text")
    if final_number(record["answer"], marker_required=True) is None:
        raise ValueError(f"the answer must end in '{_MARKER}' and a number")
    return Record(record["question"], record["answer"])


def _records(path: str, source: str, data_dir: str | None, skip_broken: bool) -> dict[str, list[Record]]:
    if source == "tfds":
        try:
            from rl.tasks import _gsm8k_tfds
        except ImportError as error:
            raise TaskError(f"source='tfds' needs TFDS ({error}): pip install 'eggroll-jax[data]'") from error
        found = _gsm8k_tfds.read(Path(path), data_dir)
    else:
        files = {split: read(Path(path) / f"{split}.jsonl", skip_broken) for split in SPLITS}
        broken = [message for file in files.values() for message in file.broken]
        if broken:
            warnings.warn(f"{len(broken)} broken lines left out: {'; '.join(broken[:10])}", stacklevel=3)
        found = {split: file.records for split, file in files.items()}
    shared = {record.question for record in found["train"]} & {record.question for record in found["test"]}
    if shared:
        raise TaskError(
            f"train and test must not overlap, but {len(shared)} questions of {path} are in both, such as "
            f"{min(shared)[:100]!r}: remove them from one file"
        )
    return found


def _problem(record: Record, annotations: bool, marker_required: bool, template: str) -> Problem:
    value = final_number(record.answer, marker_required=True)
    solution = record.answer if annotations else _ANNOTATION.sub("", record.answer)
    answer = {"value": str(value), "marker_required": marker_required}
    prompt = template.replace("{question}", record.question)
    return Problem(_draw.digest(record.question), prompt, answer, f" {solution}")


def _sample(problems: list[Problem], split: str, count: int, seed: int) -> list[Problem]:
    if count > len(problems):
        raise TaskError(f"the {split} split has {len(problems)} problems, fewer than the {count} asked for")
    order = list(range(len(problems)))
    _draw.shuffle(random.Random(f"gsm8k/{split}/{seed}"), order)
    return [problems[i] for i in order[:count]]


def _fraction(match: re.Match[str]) -> Fraction | None:
    digits = match["digits"].replace(",", "")
    if len(digits) > _MAX_NUMBER:
        return None
    return -Fraction(digits) if match["sign"] else Fraction(digits)
