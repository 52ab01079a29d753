"""EGGROLL in integers: int8 parameters, int8 noise, integer scores, and steps of one unit; no float from end to end.

es = eggroll.integer.strategy(population=eggroll.antithetic(4096), alpha=0.25)
state, carry = es.init(params, jax.random.key(0)), es.carry(model_state)

@jax.jit
def generation(state, carry, batch):
    scores, carry = es.evaluate(state, score, carry, batch)  # score(weights, carry, rows) -> (int32, carry), higher is better
    state, metrics = es.update(state, scores)
    return state, carry, metrics

`arithmetic` has the operations that a model is written in, `threshold` the rule that turns sums of noise into steps.
"""

from eggroll.integer import arithmetic, fitness, noise, threshold
from eggroll.integer.arithmetic import Perturbed
from eggroll.integer.strategy import State, Strategy, strategy

__all__ = ["Perturbed", "State", "Strategy", "arithmetic", "fitness", "noise", "strategy", "threshold"]
