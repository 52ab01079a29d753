"""Evolution of a language model: every member of a population answers the same prompts; reward is its fitness."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

import eggroll
from rl import generations
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
    shape, update = generations.cut(es)
    drawn = lambda state: es.draw(dataclasses.replace(state, params=place(es.mesh, state.params, whole=True)))
    draw, shape, update = jax.jit(drawn), jax.jit(shape), jax.jit(update, donate_argnums=0)
    members = es.population.size

    def learn(state: eggroll.State, answers: Answers, replayed: None = None):
        value, ok = (answers.by_member(x, members) for x in (answers.scored.value, answers.scored.ok))
        shaped, measured = shape(member_fitness(fitness, value, ok))
        state, metrics = update(state, shaped)
        return state, measured | metrics | {"fitness": shaped}

    def plan(state: eggroll.State) -> dict[str, int]:
        drawn = jax.eval_shape(es.draw, state)
        return {
            "parameters": tree_bytes((state.params, state.master)),
            "optimizer": tree_bytes(state.opt_state),
            "noise": tree_bytes((drawn.lefts, drawn.rights)),
        }

    def compile(state: eggroll.State) -> jax.stages.Compiled:
        return update.lower(state, jax.ShapeDtypeStruct((members,), np.float32)).compile()

    return Learner(
        members=members,
        common=common,
        init=lambda params: es.init(params, key),
        weights=lambda state: (draw(state), state.generation),
        mean=lambda state: place(es.mesh, state.params, whole=True),
        learn=learn,
        plan=plan,
        compile=compile,
        update=lambda state, shaped: update(state, shaped)[0],
    )


def member_fitness(fitness: Fitness, value: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """f32 [M, P] from rewards [M, P, G] and whether each was judged; higher is better."""
    return fill_unjudged(fitness(value, ok)).astype(np.float32)
