"""What tests of training share: a checkpoint of one layer, a config that takes seconds, greedy decoding without the engine."""

import contextlib
import functools
import json
import signal
from pathlib import Path

import jax
import numpy as np

from rl import config as config_lib
from rl import tasks
from rl.models import presets
from rl.models.load import save
from rl.models.tokenizer import Characters
from rl.models.transformer import TransformerConfig
from tests.experiments import tiny_language

ROOT = Path(__file__).parents[2]
CONFIG = "tests/experiments/tiny_language.py"
ALPHABET = tasks.make("countdown").alphabet
SHAPE = TransformerConfig(
    vocab=len(ALPHABET) + 1, layers=1, width=16, hidden=32, heads=2, kv_heads=1, head_dim=8, max_length=32, tied=True,
    scan_layers=False,
)  # fmt: skip
FAST = ["warm_start.steps=0", "steps=1"]


def save_start(path):
    """Writes a checkpoint directory that reads the alphabet of countdown; returns its path."""
    model = presets.make(SHAPE)
    save(path, model, model.init(jax.random.key(0)), Characters(ALPHABET))
    return path


def config_of(start, *overrides, variant=""):
    return config_lib.load(f"{ROOT / CONFIG}:{variant}", [f"model.path={start}", *overrides])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(workdir):
    """What an interruption must not change: metrics, samples, warm start, checksums of the last checkpoint's leaves."""
    names = ("metrics.jsonl", "samples.jsonl", "warm_start/model.safetensors")
    return [(workdir / name).read_bytes() for name in names], leaves(workdir)


def leaves(workdir):
    """What the last checkpoint says of every array: shape, dtype, and the blocks it is held in, with their checksums."""
    newest = max(path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    return json.loads((newest / "meta.json").read_text())["leaves"]


def problems(split, count):
    return tasks.make("countdown", **tiny_language.COUNTDOWN).problems(split, count, 0)


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
