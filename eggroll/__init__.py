"""Evolution strategies with low-rank perturbations (EGGROLL) for any JAX model, unmodified.

es = eggroll.strategy(optax.adam(1e-2), population=eggroll.crossed(4096), rank=1, sigma=0.05)
state = es.init(params, jax.random.key(0))

@jax.jit
def generation(state, batch):
    return es.update(state, es.evaluate(state, score, batch))  # score(params, row) -> scalar, higher is better
"""

from eggroll import fitness, integer, scale
from eggroll.estimate import Estimate
from eggroll.members import Drawn, rows
from eggroll.perturb import LowRank, PerturbationError, infer_rules
from eggroll.perturb import call as perturbed_call
from eggroll.population import Population, antithetic, crossed, independent
from eggroll.scale import anchored_weight_decay, convert_learning_rate, predicted_cosine
from eggroll.strategy import State, Strategy, strategy

__all__ = [
    "Drawn",
    "Estimate",
    "LowRank",
    "PerturbationError",
    "Population",
    "State",
    "Strategy",
    "anchored_weight_decay",
    "antithetic",
    "convert_learning_rate",
    "crossed",
    "fitness",
    "independent",
    "infer_rules",
    "integer",
    "perturbed_call",
    "predicted_cosine",
    "rows",
    "scale",
    "strategy",
]
