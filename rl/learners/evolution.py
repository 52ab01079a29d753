"""Evolution of a language model: every member of a population answers the same prompts; reward is its fitness."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

import eggroll
from rl.learners.types import Answers, Learner, tree_bytes
from rl.mesh import place
from rl.rewards.judge import fill_unjudged

# (value [..., G], ok [..., G]) -> [...], as in `rl.rewards.judge`
Fitness = Callable[[np.ndarray, np.ndarray], np.ndarray]


def learner(es: eggroll.Strategy, fitness: Fitness, key: jax.Array, *, common: bool = True) -> Learner:
    """EGGROLL (or OpenES) on verified reward.

    Fitness of member m on prompt p is `fitness` of the rewards of its G samples, which the strategy shapes; a sample that no
    verifier could judge counts neither for nor against its member.

    Args:
        es: the strategy.
        fitness: such as `rl.rewards.judge.mean_reward`.
        key: of all noise.
        common: whether members share the randomness of each (prompt, sample).
    """
    drawn = lambda state: es.draw(dataclasses.replace(state, params=place(es.mesh, state.params, whole=True)))
    draw, update, members = jax.jit(drawn), jax.jit(es.update, donate_argnums=0), es.population.size

    def learn(state: eggroll.State, answers: Answers, replayed: None = None):
        value, ok = (answers.by_member(x, members) for x in (answers.scored.value, answers.scored.ok))
        return update(state, member_fitness(fitness, value, ok))

    def plan(state: eggroll.State) -> str:
        drawn = jax.eval_shape(es.draw, state)
        mib = lambda *trees: f"{tree_bytes(trees) / 2**20:.1f} MiB"
        return (
            f"parameters {mib(state.params, state.master)}, optimizer {mib(state.opt_state)}, "
            f"noise {mib(drawn.lefts, drawn.rights)}"
        )

    return Learner(
        members=members,
        common=common,
        init=lambda params: es.init(params, key),
        weights=lambda state: (draw(state), int(state.generation)),
        mean=lambda state: place(es.mesh, state.params, whole=True),
        learn=learn,
        plan=plan,
    )


def member_fitness(fitness: Fitness, value: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """f32 [M, P] from rewards [M, P, G] and whether each was judged; higher is better."""
    return fill_unjudged(fitness(value, ok)).astype(np.float32)
