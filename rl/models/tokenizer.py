"""Text to ids and back: a tokenizer.json of Hugging Face, or one id per character."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer.

    Attributes:
        size: ids are 0 .. size - 1.
        eos, bos: ids that end and begin a text, or None.
        ends: every id that ends a text, `eos` first: what generation stops on.
    """

    size: int
    eos: int | None
    bos: int | None
    ends: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with whatever the tokenizer puts in front of every text (a bos)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        ...


class HFTokenizer:
    """A tokenizer.json, read by the library `tokenizers`.

    Args:
        path: the file.
        eos, bos: text of these tokens (as in tokenizer_config.json), or their ids.
        ends: further tokens that end a text.

    Raises:
        ImportError: the library `tokenizers` is not installed.
        ValueError: the file is not a tokenizer, or lacks a token named.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        eos: str | int | None = None,
        bos: str | int | None = None,
        ends: Sequence[str | int] = (),
    ):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("reading tokenizer.json needs the package tokenizers: pip install tokenizers") from error
        self.path = Path(path)
        self.json, self._tokenizer = _parsed(tokenizers.Tokenizer, self.path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self.eos, self.bos = self._id("eos", eos), self._id("bos", bos)
        further = [self._id("eos", token) for token in ends]
        self.ends = tuple(dict.fromkeys(further if self.eos is None else [self.eos, *further]))

    def _id(self, name: str, token: str | int | None) -> int | None:
        known = token is None or (
            self._tokenizer.token_to_id(token) is not None if isinstance(token, str) else 0 <= token < self.size
        )
        if not known:
            raise ValueError(f"{self.path} has {self.size} ids, and the {name} token {token!r} is none of them")
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else token

    def token(self, index: int) -> str:
        """The vocabulary's entry for an id."""
        return self._tokenizer.id_to_token(index)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with what the file's post-processor adds."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)


def _parsed(kind, path: Path):
    """The file's text and its tokenizer."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        json.loads(text)
        return text, kind.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises Exception itself
        raise ValueError(f"{path} is not a tokenizer.json that the library tokenizers reads: {error}") from error


class Characters:
    """One id per character of an alphabet, from 1 on in its order; id 0 ends a text and is nothing when decoded.

    Raises:
        ValueError: a character twice in the alphabet; at `encode`, one that is not in it.
    """

    eos = 0
    bos = None
    ends = (0,)
    end = "<end>"  # the name of id 0 in `json`

    def __init__(self, alphabet: str):
        if len(set(alphabet)) != len(alphabet):
            twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
            raise ValueError(f"an alphabet holds each character once; {twice} occur more often in {alphabet!r}")
        self.alphabet = alphabet
        self.size = len(alphabet) + 1
        self._ids = {character: i + 1 for i, character in enumerate(alphabet)}

    @property
    def json(self) -> str:
        """The same tokenizer as a tokenizer.json: every character a word, and an error at one that is not in the alphabet."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.eos, "content": self.end, **flags, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": {self.end: self.eos} | self._ids, "unk_token": ""},
        }
        return json.dumps(content, indent=2) + "\n"

    def encode(self, text: str) -> list[int]:
        """Ids of the characters."""
        unknown = sorted(set(text) - set(self._ids))
        if unknown:
            raise ValueError(f"the text must be written in the alphabet {self.alphabet!r}; it has {unknown}")
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of ids; 0 is nothing.

        Raises:
            ValueError: an id of no character.
        """
        wrong = sorted({int(i) for i in ids if not 0 <= i < self.size})
        if wrong:
            raise ValueError(f"ids of this alphabet are 0 to {self.size - 1}; got {wrong}")
        return "".join(self.alphabet[i - 1] for i in ids if i)
