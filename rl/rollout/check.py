"""What requests, weights and settings must agree on before anything runs."""

import numpy as np

import eggroll
from rl.models.language import LanguageModel
from rl.rollout.engine import Settings
from rl.types import Requests


def check(model: LanguageModel, settings: Settings, weights, requests: Requests) -> None:
    """Raises a ValueError with the rule, the values and the rows that break it."""
    vocab, length, done = model.config.vocab, settings.length, requests.done
    outside = [stop for stop in settings.stop if not 0 <= stop < vocab]
    if outside:
        raise ValueError(f"stop tokens must be ids 0 to {vocab - 1} of the model's vocabulary; got {outside}")

    def strange(tokens, lengths):
        ids = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
        wrong = (ids < 0) | (ids >= vocab)
        first = ids[np.arange(len(ids)), wrong.argmax(1)]
        return wrong.any(1), f"ids must be 0 to {vocab - 1}, the model's vocabulary", first

    total = requests.prompt_length + requests.budget.astype(np.int64)
    rules = [
        (requests.prompt_length < 1, "a prompt has at least one token", requests.prompt_length),
        (requests.budget < 1, "a budget is at least one token", requests.budget),
        (total > length, f"prompt and budget must fit `length`, {length} tokens: raise it or lower the budget", total),
        strange(requests.prompt, requests.prompt_length),
        _members(weights, requests.member),
    ]
    if done is not None:
        rules += [
            (done.length > requests.budget, "a budget counts the tokens in `done`: raise it", done.length),
            strange(done.tokens, done.length),
        ]
        if settings.record_experts and model.routed is not None:
            rules += _recorded(model, requests)
    _raise(np.arange(len(requests)), rules)


def check_members(weights, member: np.ndarray, rows: np.ndarray) -> None:
    """As `check`, whether these weights have the members of rows with these numbers."""
    _raise(rows, [_members(weights, member)])


def _members(weights, member: np.ndarray):
    size = weights.population.size if isinstance(weights, eggroll.Drawn) else 0
    rule = f"members must be -1 to {size - 1} of these weights" if size else "plain parameters have no members but -1"
    return (member < -1) | (member >= size), rule, member


def _recorded(model: LanguageModel, requests: Requests) -> list:
    """What the experts of a resumed row must be, where they were recorded."""
    c, done, longest = model.config, requests.done, int(requests.prompt_length.max(initial=0))
    experts = done.experts
    if experts is None:
        return []
    tokens, sizes = done.tokens.shape[1], (len(done), c.layers, c.experts_per_token)
    if experts.ndim != 4 or (len(experts), *experts.shape[2:]) != sizes or experts.shape[1] < longest + tokens:
        raise ValueError(
            f"experts in `done` must be [rows, at least {longest + tokens} prompt and completion columns, layers, experts per "
            f"token], {sizes} without the columns; got {experts.shape}: were they recorded by another model?"
        )
    ids = experts.reshape(len(experts), -1)
    worst = np.where(ids.min(1, initial=0) < -1, ids.min(1, initial=0), ids.max(1, initial=0))
    rule = f"experts in `done` must be ids 0 to {c.experts - 1}, or -1 where nothing was recorded"
    return [((worst < -1) | (worst >= c.experts), rule, worst)]


def _raise(rows: np.ndarray, rules: list) -> None:
    for broken, rule, value in rules:
        if broken.any():
            raise ValueError(
                f"{rule}; got {value[broken][:8].tolist()} in rows {rows[broken][:8].tolist()} "
                f"({broken.sum()} of {len(rows)})"
            )
