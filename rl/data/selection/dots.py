"""Difficulty-targeted online data selection, DOTS (arXiv 2506.05316): prompts that the current policy solves half the time.

A group of answers teaches nothing where all or none are right; the squared advantage of a prompt with success rate p is
p (1 - p) (1 - 1/G), largest at one half. Every `period` steps K prompts drawn at random are answered G times by the current
policy; attention over prompt embeddings predicts the difficulty d_q = 1 - mean reward of all others (`_predictor`); and
prompts are drawn without replacement with probability proportional to exp(-|d_q - target| / temperature), by Gumbel
top-k. A round's whole order is drawn at once, so a step may take as many as it needs.

* `measure="success"`: rewards in [0, 1], the difficulty above. Published.
* `measure="spread"`: for other rewards, and for the members of a population. The "difficulty" is the standard deviation of
  a prompt's rewards over the largest among the references, and `target=1` asks for the most useful prompts.

The cost is K G answers every `period` steps. Released code predicts success instead of difficulty; at target 0.5 the two
are the same.
"""

from typing import Any

import ml_collections
import numpy as np

from rl.data.selection import EMPTY, Choice, Judged, Pool
from rl.data.selection import _predictor as predictor

MEASURES = ("success", "spread")


def default_config() -> ml_collections.ConfigDict:
    """Keys.

    `references`: K; `samples`: G of each; `period`: steps between measurements; `target`: alpha; `temperature`: tau;
    `measure`: "success" or "spread"; `predictor`: a file by `python -m experiments.predictor`, "" for none.
    """
    keys = {"references": 256, "samples": 8, "period": 2, "target": 0.5, "temperature": 1e-3}
    return ml_collections.ConfigDict(keys | {"measure": "success", "predictor": ""}).lock()


def init(config: ml_collections.ConfigDict, pool: Pool) -> dict[str, Any]:
    """State: the pool's features [Q, H], the round's predictions and order [Q], and how many of it are taken.

    Raises:
        ValueError: a key out of range, embeddings that are not finite or not one per problem, an unreadable predictor.
    """
    _check(config, pool)
    x = np.asarray(pool.embed(), np.float32)
    if x.ndim != 2 or len(x) != pool.size or not np.isfinite(x).all():
        raise ValueError(
            f"embeddings must be finite and [{pool.size}, H], one per problem; got {x.shape}, {(~np.isfinite(x)).sum()} of "
            "them not finite"
        )
    adapters = predictor.load(config.predictor) if config.predictor else {}
    if adapters and (expects := adapters["query"]["Dense_0"]["kernel"].shape[0]) != x.shape[1]:
        raise ValueError(
            f"a predictor reads the embeddings it was trained on; {config.predictor} expects a width of {expects}, this "
            f"model's is {x.shape[1]}: train one on runs of this model, or set predictor to ''"
        )
    return {
        "features": x if config.predictor else predictor.features(x),
        "adapters": adapters,
        "predicted": np.full(pool.size, 0.5, np.float32),
        "order": np.arange(pool.size, dtype=np.int32),
        "taken": np.int64(0),
        "since": np.int64(-1),  # the step of the last measurement
        "rounds": np.int64(0),
        "seed": np.int64(pool.seed),
    }


def apply(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, count: int):
    """The next problems of the round's order, or the reference set of a new round.

    Raises:
        ValueError: more problems than the pool has, which no draw without replacement can give.
    """
    size, since, taken = len(state["order"]), int(state["since"]), int(state["taken"])
    if count > size:
        raise ValueError(f"a draw without replacement gives at most the pool's {size} problems; got count {count}")
    if since < 0 or step >= since + config.period or taken + count > size:
        return state, Choice(EMPTY, _references(config, state), config.samples)
    rows = state["order"][taken : taken + count]
    return state | {"taken": np.int64(taken + count)}, Choice(rows, EMPTY, 0)


def update(config: ml_collections.ConfigDict, state: dict[str, Any], judged: Judged):
    """A reference set starts a round; of training groups it is reported how well they were predicted.

    Raises:
        ValueError: rewards outside [0, 1] where difficulty is a success rate.
    """
    label, known = labels(config.measure, judged.value, judged.ok)
    if not judged.reference:
        return state, _hits(state["predicted"][judged.rows], label, known)
    if state["adapters"]:
        width = state["adapters"]["query"]["Dense_0"]["bias"].shape[0]
        predicted, scale = (
            predictor.predict(state["adapters"], width, state["features"], judged.rows, label, known),
            None,
        )
    else:
        predicted, scale = predictor.similarity(state["features"], judged.rows, label, known)
    predicted = np.asarray(predicted)
    order = draw(_generator(state, 1), predicted, config.target, config.temperature)
    metrics = {"selection_reference_difficulty": float(label[known].mean())} if known.any() else {}
    metrics |= {"selection_measured": float(known.sum())} | ({} if scale is None else {"selection_scale": float(scale)})
    new = {"predicted": predicted, "order": order, "taken": np.int64(0), "since": np.int64(judged.step)}
    return state | new | {"rounds": state["rounds"] + 1}, metrics


def labels(measure: str, value: np.ndarray, ok: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(difficulty f32 [K], whether it is known) from rewards [K, S] and whether each was judged."""
    count = ok.sum(axis=1)
    mean = np.where(ok, value, 0).sum(axis=1) / np.maximum(count, 1)
    if measure == "success":
        outside = ok & ~((value >= 0) & (value <= 1))
        if outside.any():
            raise ValueError(
                f'measure "success" needs rewards between 0 and 1; got {value[outside][0]}: use measure="spread", target=1'
            )
        return (1 - mean).astype(np.float32), count > 0
    spread = np.sqrt((np.where(ok, value - mean[:, None], 0) ** 2).sum(axis=1) / np.maximum(count - 1, 1))
    known = count > 1
    return (spread / max(spread[known].max(initial=0), 1e-12)).astype(np.float32), known


def draw(random: np.random.Generator, difficulty: np.ndarray, target: float, temperature: float) -> np.ndarray:
    """All problems in the order of one draw without replacement, P(q) ~ exp(-|d_q - target| / temperature); i32 [Q].

    Sorting logits plus independent Gumbel noise is exactly that: the first place is a draw of all, the second one of the
    rest, and so on.
    """
    logit = -np.abs(difficulty.astype(np.float64) - target) / temperature
    return np.argsort(-(logit + random.gumbel(size=len(logit))), kind="stable").astype(np.int32)


def _references(config: ml_collections.ConfigDict, state: dict[str, Any]) -> np.ndarray:
    size = len(state["order"])
    rows = _generator(state, 0).choice(size, min(config.references, size), replace=False)
    return rows.astype(np.int32)


def _hits(predicted: np.ndarray, label: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """What was predicted of training groups, what came, and Pearson's correlation where both vary."""
    if not known.any():
        return {}
    x, y = predicted[known].astype(np.float64), label[known].astype(np.float64)
    metrics = {"selection_predicted": float(x.mean()), "selection_difficulty": float(y.mean())}
    if x.std() > 0 and y.std() > 0:
        metrics["selection_correlation"] = float(np.corrcoef(x, y)[0, 1])
    return metrics


def _generator(state: dict[str, Any], purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([int(state["seed"]), int(state["rounds"]), purpose]))


def _check(config: ml_collections.ConfigDict, pool: Pool) -> None:
    for name, value in (("pool", pool.size), *((key, config[key]) for key in ("references", "samples", "period"))):
        if value < 1:
            raise ValueError(f"{name} of a selection by difficulty must be at least 1; got {value}")
    if config.measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}; got {config.measure!r}")
    if config.measure == "spread" and config.samples < 2:
        raise ValueError('measure="spread" needs at least 2 samples of each reference; got 1')
    if not config.temperature > 0 or not 0 <= config.target <= 1:
        raise ValueError(
            f"temperature must be positive and target between 0 and 1; got {config.temperature} and {config.target}"
        )
