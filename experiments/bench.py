"""Speed, as ratios inside one run: `python -m experiments.bench CASE [CASE...] [--out=results.jsonl]`.

Each measurement is one JSON object on one line of standard output; everything else goes to standard error. The things
compared are compiled, warmed up, and then timed in turn, round after round; a value is the ratio of the median seconds.

* population_forward, `inference_over_forward`: five dense layers with bias and relu on N rows, plain, against N perturbed
  members on one row each, noise drawn included.
* es_update, `update_over_forward`: the estimate from N scores (noise drawn again), against that forward.
* openes, `openes_over_eggroll`: forward and estimate with full-rank noise, against low-rank noise. Full-rank members are
  independent, or antithetic pairs (half the noise).
* control, `eggroll_over_evosax`: environment steps per second of whole generations, against evosax's OpenES on the same
  environment, policy and population.
"""

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax

import eggroll

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "eggroll-jax")
LAYERS = 5


def timed_in_turn(fns: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, all of them called once a round, after two rounds that do not count."""
    seconds = {name: [] for name in fns}
    for turn in range(repeats + 2):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn())
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def network(params, x):
    """Dense layers with bias and relu."""
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x


def _network(width: int, population: eggroll.Population, **settings):
    """(strategy, state, rows [N, 1, width], score) of the dense network."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = [{"w": jax.random.normal(k, (width, width)) / width**0.5, "b": jnp.zeros(width)} for k in keys]
    es = eggroll.strategy(optax.sgd(1e-2), population=population, sigma=1e-2, **settings)
    rows = jax.random.normal(jax.random.key(1), (population.size, 1, width))
    return es, es.init(params, jax.random.key(2)), rows, lambda params, x: jnp.sum(network(params, x))


def _functions(width: int, population: eggroll.Population, **settings) -> dict[str, Callable[[], Any]]:
    """Plain inference on N rows, the population's forward on the same rows, and the estimate, ready to time."""
    es, state, rows, score = _network(width, population, **settings)
    inference = jax.jit(lambda params, x: jnp.sum(network(params, x), axis=-1))
    forward = jax.jit(lambda state, x: es.evaluate(state, score, x, per_member=True))
    estimate = jax.jit(lambda state, scores: es.estimate(state, scores).gradient)
    flat, scores = rows[:, 0], forward(state, rows)
    return {
        "inference": lambda: inference(state.params, flat),
        "forward": lambda: forward(state, rows),
        "update": lambda: estimate(state, scores),
    }


def _dense_settings() -> Iterator[tuple[dict[str, Any], dict[str, Callable[[], Any]]]]:
    """At most 512 members at once: at width 256 their activations then stay in a CPU's cache between layers."""
    for width, members in ((1024, 256), (256, 4096)):
        for design in ("crossed", "antithetic"):
            for noise in ("gaussian", "rademacher"):
                setting = {"width": width, "members": members, "rows": 1, "rank": 1, "design": design, "noise": noise}
                setting |= {"chunk": 512} if members > 512 else {}
                yield setting, _functions(width, getattr(eggroll, design)(members), noise=noise, chunk=512)


def population_forward(repeats: int) -> Iterator[dict[str, Any]]:
    """Perturbed forward against plain batched inference."""
    for setting, fns in _dense_settings():
        seconds = timed_in_turn({name: fns[name] for name in ("inference", "forward")}, repeats)
        yield _row(setting, "inference_over_forward", seconds["inference"] / seconds["forward"], seconds, repeats)


def es_update(repeats: int) -> Iterator[dict[str, Any]]:
    """Estimate against perturbed forward."""
    for setting, fns in _dense_settings():
        seconds = timed_in_turn({name: fns[name] for name in ("forward", "update")}, repeats)
        yield _row(setting, "update_over_forward", seconds["update"] / seconds["forward"], seconds, repeats)


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
        yield _row(setting, "openes_over_eggroll", seconds["openes"] / seconds["eggroll"], seconds, repeats)


def control(repeats: int) -> Iterator[dict[str, Any]]:
    """Whole generations on Pendulum, whose episodes all have one length; every member plays one episode."""
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
        steps = members * env.max_steps
        setting = {"env": "Pendulum-v1", "hidden": list(hidden), "members": members, "design": "crossed", "rank": 1}
        setting["steps_per_second"] = {name: round(steps / s) for name, s in seconds.items()}
        yield _row(setting, "eggroll_over_evosax", seconds["evosax"] / seconds["eggroll"], seconds, turns)


def _eggroll_generation(env, policy, params, members: int) -> Callable[[], Any]:
    from rl.control import rollout

    es = eggroll.strategy(optax.adam(1e-2), population=eggroll.crossed(members), sigma=0.05)
    state = es.init(params, jax.random.key(0))

    @jax.jit
    def generation(state, keys):
        play = lambda params, key: rollout.episode(env, rollout.make_act(policy, params), key).total
        return es.update(state, es.evaluate(state, play, keys))[0]

    return lambda: generation(state, jax.random.split(jax.random.key(1), 1))


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

    return lambda: generation(state, jax.random.key(1))


def _row(
    setting: dict[str, Any], measure: str, value: float, seconds: dict[str, float], repeats: int
) -> dict[str, Any]:
    rounded = {name: round(s, 6) for name, s in seconds.items()}
    return {"setting": setting, "measure": measure, "value": round(value, 3), "seconds": rounded, "repeats": repeats}


@functools.cache
def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    name = f"cpu x{len(os.sched_getaffinity(0))}" if cpu else f"{device.device_kind} x{jax.device_count()}"
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {"device": name, "versions": {p: installed[p] for p in _PACKAGES if p in installed}}


CASES = {case.__name__: case for case in (population_forward, es_update, openes, control)}


def main(arguments: list[str]) -> None:
    """Runs the cases named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count (fewer in the slow cases)")
    parser.add_argument("--out", help="also append the lines to this file")
    options = parser.parse_args(arguments)
    for case in options.cases:
        for row in CASES[case](options.repeats):
            command = f"python -m experiments.bench {case} --repeats={options.repeats}"
            date = datetime.date.today().isoformat()
            line = json.dumps({"case": case, **row, **_machine(), "command": command, "date": date})
            print(line, flush=True)
            print(f"{case}: {row['measure']} = {row['value']} {row['setting']}", file=sys.stderr)
            if options.out:
                with open(options.out, "a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
