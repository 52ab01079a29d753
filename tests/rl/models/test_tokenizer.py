"""Tokenizers: ids typed in from a vocabulary written here, errors, and saving."""

import json
import os
from pathlib import Path

import pytest

from rl.models.tokenizer import Characters, HFTokenizer

VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5, "\u2581": 6}


def write(path, vocabulary=VOCABULARY, added=("<s>", "</s>")):
    """Byte-pair merges with a bos in front, as in Llama's files."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": vocabulary[t], "content": t, **special} for t in added],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": "<unk>"},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def file(tmp_path):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    return write(tmp_path / "tokenizer.json")


def test_ids_and_text(file):
    tokenizer = HFTokenizer(file, eos="</s>", bos="<s>")
    assert (tokenizer.size, tokenizer.eos, tokenizer.bos) == (7, 2, 1)
    assert tokenizer.encode("abba") == [1, 5, 4, 3]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([1, 5, 4, 3, 2]) == "abba"  # special tokens are no text
    assert tokenizer.token(5) == "ab"
    assert HFTokenizer(file, eos=2).eos == 2 and HFTokenizer(file).eos is None
    assert tokenizer.ends == (2,) and HFTokenizer(file).ends == ()
    assert HFTokenizer(file, eos=2, ends=["ab", 2, 0]).ends == (2, 5, 0) and HFTokenizer(file, ends=[0]).ends == (0,)


def test_size_counts_the_highest_id_not_the_entries(tmp_path):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    gap = write(tmp_path / "tokenizer.json", VOCABULARY | {"zz": 40})
    assert HFTokenizer(gap).size == 41


@pytest.mark.parametrize(("eos", "shown"), [("<end>", "'<end>'"), (7, "7"), (-1, "-1")])
def test_an_unknown_special_token_is_named(file, eos, shown):
    with pytest.raises(ValueError, match=f"7 ids, and the eos token {shown} is none of them"):
        HFTokenizer(file, eos=eos)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_a_broken_file_is_named(tmp_path, content):
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer.json that the library tokenizers reads"):
        HFTokenizer(path)


def test_characters():
    tokenizer = Characters("+=0123")
    assert (tokenizer.size, tokenizer.eos, tokenizer.bos, tokenizer.ends) == (7, 0, None, (0,))
    assert tokenizer.encode("1+2=3") == [4, 1, 5, 2, 6]
    assert tokenizer.decode([4, 1, 5, 2, 6, 0]) == "1+2=3"
    assert tokenizer.decode(tokenizer.encode("")) == ""
    with pytest.raises(ValueError, match=r"must be written in the alphabet '\+=0123'; it has \['a', 'z'\]"):
        tokenizer.encode("1za")
    with pytest.raises(ValueError, match=r"ids of this alphabet are 0 to 6; got \[-1, 7\]"):
        tokenizer.decode([1, 7, -1])
    with pytest.raises(ValueError, match=r"each character once; \['1'\] occur"):
        Characters("121")


def test_the_released_tokenizer_has_the_ids_of_its_reference():
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    data = Path(os.environ.get("EGGROLL_DATA", Path(__file__).parents[4] / "shared" / "data")) / "stories260K"
    if not (data / "tokenizer.json").is_file():
        pytest.skip(f"no stories260K in {data.parent} (set EGGROLL_DATA)")
    tokenizer = HFTokenizer(data / "tokenizer.json", eos="</s>", bos="<s>")
    for prompt in json.loads((data / "reference.json").read_text())["prompts"]:
        assert tokenizer.encode(prompt["text"]) == prompt["ids"]
        assert tokenizer.decode(prompt["ids"] + prompt["greedy_ids"]) == prompt["greedy_text"]
