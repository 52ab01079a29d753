"""Which prompts a step sees, how a population's requests are laid out, and texts of completions."""

import os
from pathlib import Path

import numpy as np
import pytest

from rl.data.prompts import Prompts, completion_text, encode, population_requests, split_solution
from rl.models.tokenizer import Characters, HFTokenizer
from rl.tasks.types import Problem, TaskError

STORIES = Path(os.environ.get("EGGROLL_DATA", Path(__file__).parents[4] / "shared" / "data")) / "stories260K"


def prompts(*ids):
    return Prompts([Problem(f"p{i}", "", None) for i in range(len(ids))], list(ids))


def test_the_layout_of_a_population_by_hand():
    requests = population_requests(prompts([5, 6], [7]), members=2, samples=2, budget=9, first=0)
    #                          member 0                        member 1
    #                          prompt 0         prompt 1       prompt 0         prompt 1
    assert requests.prompt.tolist() == [[5, 6], [5, 6], [7, 0], [7, 0], [5, 6], [5, 6], [7, 0], [7, 0]]
    assert requests.prompt_length.tolist() == [2, 2, 1, 1, 2, 2, 1, 1]
    assert requests.member.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert requests.uid.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert requests.budget.tolist() == [9] * 8 and requests.done is None
    own = population_requests(prompts([5, 6], [7]), members=2, samples=2, budget=9, first=0, common=False)
    assert own.uid.tolist() == list(range(8)) and own.member.tolist() == requests.member.tolist()
    mean = population_requests(prompts([5, 6], [7]), members=0, samples=1, budget=9, first=0)
    assert (mean.member.tolist(), mean.uid.tolist(), mean.prompt.tolist()) == ([-1, -1], [0, 1], [[5, 6], [7, 0]])
    types = {name: getattr(requests, name).dtype for name in ("prompt", "prompt_length", "budget", "uid", "member")}
    assert types.pop("uid") == np.uint32 and set(types.values()) == {np.dtype(np.int32)}


@pytest.mark.parametrize("common", [True, False])
def test_no_two_steps_share_randomness_until_names_run_out(common):
    size = 6 if common else 24

    def uids(step):
        first = step * size
        return population_requests(prompts([1], [2], [3]), 4, 2, 5, first, common=common).uid.astype(np.int64)

    seen = np.concatenate([np.unique(uids(step)) for step in range(10)])
    assert sorted(seen) == list(range(10 * size))
    # 2^32 is no multiple of 6: the step that reaches it wraps inside.
    step = 2**32 // size
    place = step * size + np.tile(np.arange(6), 4) if common else step * size + np.arange(24)
    np.testing.assert_array_equal(uids(step), place % 2**32)
    assert uids(step).max() == 2**32 - 1 and uids(step).min() == 0


def test_prompts_are_encoded_and_empty_ones_refused():
    tokenizer = Characters("ab")
    found = encode([Problem("x", "ab", 1), Problem("y", "b", 2)], tokenizer)
    assert found.ids == [[1, 2], [2]] and found.longest == 2 and len(found) == 2
    assert [p.id for p in found.take([1, 0, 1]).problems] == ["y", "x", "y"]
    with pytest.raises(TaskError, match=r"at least one token; 2 prompts, without tokens: \['empty'\]"):
        encode([Problem("x", "a", 1), Problem("empty", "", 1)], tokenizer)
    with pytest.raises(TaskError, match="0 prompts"):
        encode([], tokenizer)


def test_completion_of_characters_without_its_stop_token():
    tokenizer = Characters("ab:")
    text = lambda tokens: completion_text(tokenizer, [1, 3], tokens, stop=(0,))  # noqa: E731
    assert [text([2, 1, 0]), text([2, 1]), text([0]), text([])] == ["ba", "ba", "", ""]
    assert text(np.array([2, 0], np.int32)) == "b"
    assert completion_text(tokenizer, [1], [2, 3], stop=()) == "b:"
    # A stop token of text is part of no completion either.
    assert completion_text(tokenizer, [1], [2, 3], stop=(0, 3)) == "b"


class Words:
    """Ids of words with the space before them; decoding loses the first one's, as sentencepiece does."""

    words = (" a", " b", " c")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_completion_keeps_the_space_that_its_own_decoding_loses():
    assert Words().decode([1, 2]) == "b c"
    assert completion_text(Words(), [0], [1, 2], stop=()) == " b c"


@pytest.fixture(scope="module")
def stories():
    pytest.importorskip("tokenizers", reason="reads tokenizer.json")
    if not STORIES.is_dir():
        pytest.skip(f"no stories260K in {STORIES.parent} (set EGGROLL_DATA)")
    return HFTokenizer(STORIES / "tokenizer.json", eos="</s>", bos="<s>")


def test_completion_keeps_its_leading_space(stories):
    prompt = stories.encode("Once upon a time, there was a little girl")
    continued = stories.encode("Once upon a time, there was a little girl named Lily. She")
    tokens = continued[len(prompt) :]
    assert continued[: len(prompt)] == prompt
    assert stories.decode(tokens)[0] != " "  # by themselves they lose it
    assert completion_text(stories, prompt, tokens, stop=(2, 1)) == " named Lily. She"
    assert completion_text(stories, prompt, [*tokens, stories.eos], stop=(2, 1)) == " named Lily. She"
    assert completion_text(stories, prompt, [stories.eos], stop=(2, 1)) == ""
    # A byte of a character that never ends changes nothing before it.
    byte = stories.encode("\u20ac")[-3]
    assert completion_text(stories, prompt, [*tokens, byte], stop=(2, 1)).startswith(" named Lily. She")


def test_a_solution_has_no_second_beginning(stories):
    prompt, solution = "Tim had a big dog.", " He was happy."
    first, rest = split_solution(stories, prompt, solution)
    assert first == stories.encode(prompt) and stories.bos in first and stories.bos not in rest
    assert stories.decode([*first, *rest]) == prompt + solution
    # By itself, it would begin a text.
    assert stories.encode(solution)[0] == stories.bos


def test_a_token_across_the_border_belongs_to_the_solution():
    class Pairs:
        """Two characters per token, as far as they go."""

        def encode(self, text):
            return [text[i : i + 2] for i in range(0, len(text), 2)]

    assert split_solution(Pairs(), "abc", "def") == (["ab"], ["cd", "ef"])
    assert split_solution(Pairs(), "abcd", "e") == (["ab", "cd"], ["e"])
    assert split_solution(Characters("ab:"), "a:", "b") == ([1, 3], [2])
