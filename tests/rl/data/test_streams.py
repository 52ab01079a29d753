"""Streams of a text, corpora from files, and the bits that simple models of a text need."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.data import bytes as byte_data
from rl.data import streams


def test_streams_are_whole_segments_of_consecutive_text():
    text = np.arange(47, dtype=np.uint8)
    laid = streams.lay_out(text, 2, 5)  # 23 bytes each: 4 segments and one byte more
    np.testing.assert_array_equal(laid, [np.arange(21), 23 + np.arange(21)])
    inputs, targets = jax.jit(lambda n: streams.segment(jnp.asarray(laid), n, 5))(1)
    np.testing.assert_array_equal(inputs, [np.arange(5, 10), 23 + np.arange(5, 10)])
    np.testing.assert_array_equal(targets, np.asarray(inputs) + 1)


def test_after_the_last_segment_comes_the_first():
    laid = jnp.asarray(streams.lay_out(np.arange(47, dtype=np.uint8), 2, 5))
    for number in range(9):
        expected = streams.segment(laid, number % 4, 5)
        jax.tree.map(np.testing.assert_array_equal, streams.segment(laid, number, 5), expected)
    every = np.concatenate([streams.segment(laid, n, 5)[1] for n in range(4)], 1)
    np.testing.assert_array_equal(every, laid[:, 1:])


@pytest.mark.parametrize(
    ("text", "count", "tokens", "words"),
    [
        (np.zeros(11, np.uint8), 2, 5, r"2 streams of at least 5 \+ 1 bytes need 12 bytes; the text has 11"),
        (np.zeros(0, np.uint8), 1, 1, "the text has 0"),
        (np.zeros(9, np.int32), 1, 1, r"a text is u8 \[bytes\]; got int32\[9\]"),
        (np.zeros((3, 3), np.uint8), 1, 1, r"got uint8\[3, 3\]"),
        (np.zeros(9, np.uint8), 0, 1, "at least 1; got 0 and 1"),
        (np.zeros(9, np.uint8), 1, 0, "at least 1; got 1 and 0"),
    ],
)
def test_texts_that_make_no_streams(text, count, tokens, words):
    with pytest.raises(ValueError, match=words):
        streams.lay_out(text, count, tokens)


def test_a_corpus_from_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello\0world")
    np.save(tmp_path / "b.npy", np.frombuffer(b"held out", np.uint8))
    rows = [{"text": "grün"}, {"text": "b"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = lambda name: str(tmp_path / name)
    corpus = byte_data.corpus(0, path("a.txt"), path("b.npy"))
    assert corpus.train.tobytes() == b"hello\0world" and corpus.held_out.tobytes() == b"held out"
    assert corpus.facts["train_bytes"] == 11
    assert byte_data.corpus(4, path("a.txt"), path("b.npy")).train.tobytes() == b"hell"
    assert byte_data.corpus(0, path("c.jsonl"), path("b.npy")).train.tobytes() == "grün\0b\0".encode()
    other = byte_data.corpus(0, path("c.jsonl"), path("b.npy"))
    assert other.sha256 != corpus.sha256
    assert byte_data.corpus(100).facts["train_bytes"] == 100  # the standard library


def test_files_that_are_no_corpus(tmp_path):
    good, empty, wide, bad = (str(tmp_path / name) for name in ("good.txt", "empty.txt", "wide.npy", "bad.jsonl"))
    (tmp_path / "good.txt").write_bytes(b"abc")
    (tmp_path / "empty.txt").touch()
    np.save(wide, np.zeros(3, np.int64))
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    for train, held, words in (
        (good, "", "needs a file to train on and one that is held out"),
        ("", good, "needs a file to train on and one that is held out"),
        (str(tmp_path / "none"), good, "none cannot be read as a corpus .FileNotFoundError"),
        (empty, good, r"at least one; .*empty.txt is uint8\[0\]"),
        (good, wide, r"wide.npy is int64\[3\]"),
        (bad, good, "bad.jsonl cannot be read as a corpus .KeyError"),
    ):
        with pytest.raises(ValueError, match=words):
            byte_data.corpus(0, train, held)
    with pytest.raises(ValueError, match=r"0 \(none\) or more; got -1"):
        byte_data.corpus(-1, good, good)


def test_bits_of_simple_models_by_hand():
    """A text of a and b: counts with one added of 256 bytes; after each byte mixed with the unigram by its kinds."""
    train = np.frombuffer(b"abababaabb", np.uint8)
    held = np.frombuffer(b"abb", np.uint8).reshape(1, 3)
    found = byte_data.reference_bits(train, held)
    unigram = 6 / 266  # five of each
    assert found["unigram"] == pytest.approx(-np.log2(unigram))
    after_a, after_b = (4 + 2 * unigram) / (5 + 2), (1 + 2 * unigram) / (4 + 2)  # ab x4, aa x1; ba x3, bb x1
    assert found["bigram"] == pytest.approx(-(np.log2(after_a) + np.log2(after_b)) / 2)
    assert found["gzip"] == 8 * len(gzip.compress(b"abb", 9)) / 3


def test_a_bigram_model_is_a_distribution_and_knows_more():
    text = np.frombuffer((b"the cat sat on the mat. " * 400), np.uint8)
    before = np.full(256, text[0])
    every = np.stack([before, np.arange(256)], 1).astype(np.uint8)
    probability = [2 ** -byte_data.reference_bits(text, pair[None])["bigram"] for pair in every]
    assert sum(probability) == pytest.approx(1)
    found = byte_data.reference_bits(text, text[:2400].reshape(2, -1))
    assert found["gzip"] < found["bigram"] < found["unigram"] < 8
