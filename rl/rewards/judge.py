"""From completions to numbers per row, per prompt and per member."""

from collections.abc import Sequence

import numpy as np

from rl.rewards.pool import Pool
from rl.tasks.types import Problem
from rl.types import Scored


def judge(pool: Pool, completions: Sequence[str], problems: Sequence[Problem]) -> Scored:
    """Asks the verifiers about completions[i] of problems[i]."""
    verdicts = pool.score(completions, [problem.answer for problem in problems])
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    return Scored(
        value=np.array([verdict.value for verdict in verdicts], np.float64),
        status=np.array([verdict.status for verdict in verdicts], str),
        parts={name: np.array([verdict.parts.get(name, np.nan) for verdict in verdicts]) for name in names},
    )


def mean_reward(value: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Mean over the samples of a prompt, [..., G] -> [...], of those that were judged; NaN where none was."""
    judged = ok.sum(axis=-1)
    return np.where(judged > 0, np.where(ok, value, 0).sum(axis=-1) / np.maximum(judged, 1), np.nan)


def pass_at(k: int, value: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Probability that one of k samples succeeds, [..., G] -> [...]; a success has value 1, an unjudged sample none.

    Unbiased: 1 - C(G - c, k) / C(G, k) for c successes among G samples (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: k beyond G.
    """
    n = value.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 <= k <= samples per prompt; got k = {k} and {n} samples")
    successes = ((value >= 1) & ok).sum(axis=-1)
    # C(n - c, k) / C(n, k) = prod_{i < k} (n - c - i) / (n - i), which reaches 0 once n - c < k
    miss = np.prod([np.maximum(n - successes - i, 0) / (n - i) for i in range(k)], axis=0)
    return 1.0 - miss


def fill_unjudged(scores: np.ndarray) -> np.ndarray:
    """[members, prompts]: a NaN (no sample judged) becomes the mean of the others on that prompt; NaN where there is none.

    Neutral: it moves no member for or against another because a verifier failed.
    """
    known = ~np.isnan(scores)
    mean = np.where(known, scores, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.where(known, scores, np.where(known.any(axis=0), mean, np.nan))
