"""Evolution strategies on dense layers and on control: see the package."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import eggroll
from experiments.bench.harness import row, timed_in_turn

LAYERS = 5
GENERATIONS = 3  # of a turn of `control`


def network(params, x):
    """Dense layers with bias and relu."""
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x


def _network(width: int, population: eggroll.Population, rows: int, **settings):
    """(strategy, state, rows [N, rows, width], score) of the dense network."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = [{"w": jax.random.normal(k, (width, width)) / width**0.5, "b": jnp.zeros(width)} for k in keys]
    es = eggroll.strategy(optax.sgd(1e-2), population=population, sigma=1e-2, **settings)
    batch = jax.random.normal(jax.random.key(1), (population.size, rows, width))
    return es, es.init(params, jax.random.key(2)), batch, lambda params, x: jnp.sum(network(params, x))


def _functions(width: int, population: eggroll.Population, rows: int = 1, **settings) -> dict[str, Callable[[], Any]]:
    """Plain inference on N x rows rows, the population's forward on the same rows, and the estimate, ready to time."""
    es, state, batch, score = _network(width, population, rows, **settings)
    inference = jax.jit(lambda params, x: jnp.sum(network(params, x), axis=-1))
    forward = jax.jit(lambda state, x: es.evaluate(state, score, x, per_member=True))
    estimate = jax.jit(lambda state, scores: es.estimate(state, scores).gradient)
    flat, scores = batch.reshape(-1, width), forward(state, batch)
    return {
        "inference": lambda: inference(state.params, flat),
        "forward": lambda: forward(state, batch),
        "update": lambda: estimate(state, scores),
    }


def _dense_settings() -> Iterator[tuple[dict[str, Any], dict[str, Callable[[], Any]]]]:
    """At most 1,024 members at once: at width 256 their activations then stay in a CPU's cache between layers."""
    for width, members in ((1024, 256), (256, 4096)):
        for design in ("crossed", "antithetic"):
            for noise in ("gaussian", "rademacher"):
                setting = {"width": width, "members": members, "rows": 1, "rank": 1, "design": design, "noise": noise}
                setting |= {"chunk": 1024} if members > 1024 else {}
                yield setting, _functions(width, getattr(eggroll, design)(members), noise=noise, chunk=1024)


def _more_settings() -> Iterator[tuple[dict[str, Any], dict[str, Callable[[], Any]]]]:
    """Crossed populations of other sizes, rows a member and ranks, up to 50 GFLOP."""
    sizes = {256: (64, 1024, 4096, 16384), 1024: (64, 256, 1024, 4096), 4096: (64, 256)}
    cells = [(width, members, 1, 1) for width, of in sizes.items() for members in of]
    cells += [(width, members, 4, 1) for width, members in ((256, 4096), (1024, 256), (4096, 64))]
    cells += [(width, members, 1, rank) for width, members in ((256, 4096), (1024, 256), (4096, 64)) for rank in (2, 4)]
    for width, members, rows, rank in cells:
        setting = {
            "width": width,
            "members": members,
            "rows": rows,
            "rank": rank,
            "design": "crossed",
            "noise": "gaussian",
        }
        chunk = 1024 // rows
        setting |= {"chunk": chunk} if members > chunk else {}
        yield setting, _functions(width, eggroll.crossed(members), rows, rank=rank, chunk=chunk)


def population_forward(repeats: int) -> Iterator[dict[str, Any]]:
    """Perturbed forward against plain batched inference."""
    done = []
    for setting, fns in itertools.chain(_dense_settings(), _more_settings()):
        if setting in done:
            continue
        done.append(setting)
        seconds = timed_in_turn({name: fns[name] for name in ("inference", "forward")}, repeats)
        yield row(setting, "inference_over_forward", seconds["inference"] / seconds["forward"], seconds, repeats)


def es_update(repeats: int) -> Iterator[dict[str, Any]]:
    """Estimate against perturbed forward."""
    for setting, fns in _dense_settings():
        seconds = timed_in_turn({name: fns[name] for name in ("forward", "update")}, repeats)
        yield row(setting, "update_over_forward", seconds["update"] / seconds["forward"], seconds, repeats)


def openes(repeats: int) -> Iterator[dict[str, Any]]:
    """Full-rank twin of the same generation; its members' weights are formed a few at a time, which is fastest."""
    width, members, repeats = 1024, 256, min(repeats, 2)

    def generation(fns):
        return lambda: (fns["forward"](), fns["update"]())

    low = _functions(width, eggroll.crossed(members))
    for design in ("independent", "antithetic"):
        full = _functions(width, getattr(eggroll, design)(members), rules=(("", "full"),), chunk=16)
        seconds = timed_in_turn({"openes": generation(full), "eggroll": generation(low)}, repeats)
        setting = {
            "width": width,
            "members": members,
            "rows": 1,
            "rank": 1,
            "design": "crossed",
            "openes_design": design,
        }
        yield row(setting, "openes_over_eggroll", seconds["openes"] / seconds["eggroll"], seconds, repeats)


def control(repeats: int) -> Iterator[dict[str, Any]]:
    """Training on Pendulum, whose episodes all have one length; every member plays one episode a generation.

    A turn is three generations in a row, as in a run: the first one after the other library's turn finds cold caches, which
    costs the faster of the two a sixth of its time and is no part of training.
    """
    from rl import envs
    from rl.control.policy import Policy

    env = envs.make("Pendulum-v1")
    for hidden, members in (((64, 64), 1024), ((256, 256, 256), 256), ((256, 256, 256), 1024)):
        policy = Policy(env.action, hidden)
        params = policy.init(jax.random.key(0), jnp.zeros(env.observation_size))
        fns = {"eggroll": _eggroll_generation(env, policy, params, members)}
        fns["evosax"] = _evosax_generation(env, policy, params, members)
        turns = min(repeats, 3)
        seconds = timed_in_turn(fns, turns)
        steps = GENERATIONS * members * env.max_steps
        setting = {"env": "Pendulum-v1", "hidden": list(hidden), "members": members, "design": "crossed", "rank": 1}
        setting |= {"generations": GENERATIONS}
        rates = {name: round(steps / s) for name, s in seconds.items()}
        ratio = seconds["evosax"] / seconds["eggroll"]
        yield row(setting, "eggroll_over_evosax", ratio, seconds, turns, steps_per_second=rates)


def _eggroll_generation(env, policy, params, members: int) -> Callable[[], Any]:
    from rl.control import rollout

    es = eggroll.strategy(optax.adam(1e-2), population=eggroll.crossed(members), sigma=0.05)
    state = es.init(params, jax.random.key(0))

    @jax.jit
    def generation(state, keys):
        play = lambda params, key: rollout.episode(env, rollout.make_act(policy, params), key).total
        return es.update(state, es.evaluate(state, play, keys))[0]

    return lambda: _in_a_row(lambda state, key: generation(state, key[None]), state)


def _evosax_generation(env, policy, params, members: int) -> Callable[[], Any]:
    from evosax.algorithms import Open_ES

    from rl.control import rollout

    es = Open_ES(population_size=members, solution=params, optimizer=optax.adam(1e-2))
    settings = es.default_params
    state = es.init(jax.random.key(0), params, settings)

    @jax.jit
    def generation(state, key):
        population, state = es.ask(key, state, settings)
        play = lambda params: rollout.episode(env, rollout.make_act(policy, params), key).total
        return es.tell(key, population, -jax.vmap(play)(population), state, settings)[0]  # evosax minimises

    return lambda: _in_a_row(generation, state)


def _in_a_row(generation: Callable, state):
    for key in jax.random.split(jax.random.key(1), GENERATIONS):
        state = generation(state, key)
    return state


CASES = {case.__name__: case for case in (population_forward, es_update, openes, control)}
