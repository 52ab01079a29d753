"""From completions to numbers per row, per prompt and per member."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from rl import mesh as meshes
from rl.rewards.pool import Pool, PoolError
from rl.tasks.types import Problem, Verdict
from rl.types import Scored


def judge(pool: Pool, completions: Sequence[str], problems: Sequence[Problem]) -> Scored:
    """Asks the verifiers about completions[i] of problems[i].

    Several processes (`rl.mesh.connect`) all ask the same. Each has its own pool judge a share of it, and all get the
    verdicts of all: a deadline, or a verifier that would not say the same twice, decides once and for everybody.

    Raises:
        PoolError: see `Pool.score`; processes that ask about different completions, whose runs would part.
    """
    own = slice(jax.process_index(), None, jax.process_count())
    given = pool.score(completions[own], [problem.answer for problem in problems[own]])
    asked = zlib.crc32("\0".join(completions).encode())
    every = meshes.exchanged([asked, given])
    odd = [i for i, (other, _) in enumerate(every) if other != every[0][0]]
    if odd:
        raise PoolError(
            f"all processes must get the same completions, but those of processes {odd} differ from process 0's: run them on "
            "machines of one kind; the same commands resume from the newest checkpoint"
        )
    verdicts = [Verdict(*every[i % len(every)][1][i // len(every)]) for i in range(len(completions))]
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
    """Probability that one of k samples succeeds, [..., G] -> [...]; a success has value 1.

    Unbiased: 1 - C(n - c, k) / C(n, k) for c successes among the n samples that were judged (Chen et al. 2021, arXiv
    2107.03374); NaN where n < k.

    Raises:
        ValueError: k beyond G.
    """
    samples = value.shape[-1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples per prompt; got k = {k} and {samples} samples")
    judged, successes = ok.sum(axis=-1), ((value >= 1) & ok).sum(axis=-1)
    # C(n - c, k) / C(n, k) = prod_{i < k} (n - c - i) / (n - i), which reaches 0 once n - c < k
    factors = [np.maximum(judged - successes - i, 0) / np.maximum(judged - i, 1) for i in range(k)]
    return np.where(judged >= k, 1.0 - np.prod(factors, axis=0), np.nan)


def fill_unjudged(scores: np.ndarray) -> np.ndarray:
    """[members, prompts]: a NaN (too few samples judged) becomes the mean of the others on that prompt.

    Neutral: it moves no member for or against another because a verifier failed. A prompt without any score gets the mean of
    all, the same for every member. All are NaN where there is no score at all.
    """
    known = ~np.isnan(scores)
    mean = lambda axis: np.where(known, scores, 0).sum(axis) / np.maximum(known.sum(axis), 1)
    if not known.any():
        return scores
    return np.where(known, scores, np.where(known.any(axis=0), mean(0), mean(None)))
