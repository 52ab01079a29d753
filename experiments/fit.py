"""What a language-model run takes on this device, and the most slots and tokens of a micro-batch that fit.

    python -m experiments.fit --config=configs/countdown_grpo.py
    python -m experiments.fit --config=configs/countdown_eggroll.py --memory=16

A step takes memory twice: while answers are sampled (weights, every member's noise, the cache of all slots, what a decode step
and a prefill need beside them) and while the method learns (weights, optimizer, gradient, one micro-batch). Both are read off
the compiled programs (`memory_analysis`) for shapes alone; nothing is allocated. Sizes are doubled from the config's until one
does not fit or holds a whole step, or halved until one fits, within a margin left for what no program knows of: fragments and
the runtime itself. On a mesh all of it is of one device: `jax.eval_shape` says what there is, and the compiler where it lies.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from eggroll import sharding
from experiments import build
from experiments.language import set_up, task_of
from rl import config as config_lib
from rl.mesh import SPREAD
from rl.models.language import LanguageModel
from rl.rewards.pool import Pool
from rl.rollout import engine

MARGIN = 0.9  # of the memory that there is
GIB = 2**30


def capacity(device: jax.Device) -> int:
    """Bytes of a device: its allocator's limit, or on a CPU its share of this machine's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def laid_out(mesh: Mesh | None, make: Callable[..., Any], *args: Any) -> Any:
    """Shapes of what make(*args) returns, and on a mesh where they lie; nothing is made."""
    shapes = jax.eval_shape(make, *args)
    if mesh is None:
        return shapes
    where = jax.jit(make).lower(*args).compile().output_shardings
    return jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes, where)


def held(tree: Any) -> int:
    """Bytes that one device holds of arrays or shapes that say where they lie, else all of them."""
    lies = lambda x: getattr(x, "sharding", None)
    own = lambda x: math.prod(lies(x).shard_shape(x.shape) if lies(x) else x.shape) * x.dtype.itemsize
    return sum(map(own, jax.tree.leaves(tree)))


def anew(make: Callable[[Any], Any], given: Any, made: Any) -> list[Any]:
    """Those arrays of made = make(given), both from `laid_out`, that are not given ones lying where they lay."""
    jaxpr = jax.make_jaxpr(make)(given).jaxpr
    known = dict(zip(jaxpr.invars, jax.tree.leaves(given), strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint" and eqn.invars[0] in known:
            known[eqn.outvars[0]] = known[eqn.invars[0]]
    lies = lambda x: getattr(x, "sharding", None)
    same = lambda a, b: lies(a) == lies(b) or (lies(a) and lies(b) and lies(a).is_equivalent_to(lies(b), a.ndim))
    kept = lambda var, x: isinstance(var, jax.extend.core.Var) and var in known and same(known[var], x)
    return [x for var, x in zip(jaxpr.outvars, jax.tree.leaves(made), strict=True) if not kept(var, x)]


def taken(compiled: jax.stages.Compiled) -> int:
    """Bytes beside a program's arguments while it runs: temporaries, and results that do not overwrite an argument."""
    m = compiled.memory_analysis()
    return m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def largest(need: Callable[[int], int], limit: int, start: int, most: int) -> int:
    """The largest of start, its doubles up to the first beyond `most`, and its halves whose `need` is within the limit; 0 if
    none. Needs are nearly a constant and a multiple of the size, so two of them say where to look; the answer is measured. A
    size may be asked for again: cache `need`."""
    size, slope = start, max(1.0, (need(start) - need(max(start // 2, 1))) / max(start - start // 2, 1))
    guess = start + (limit - need(start)) / slope
    while size // 2 and size > guess:
        size //= 2
    while size < most and 2 * size <= guess:
        size *= 2
    while size and need(size) > limit:
        size //= 2
    while 0 < size < most and need(2 * size) <= limit:
        size *= 2
    return size


def sampling_bytes(model: LanguageModel, settings: engine.Settings, weights: Any) -> int:
    """Bytes beside the weights while answers are sampled: the slots, and what a decode step or a prefill needs beside them."""
    array = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)
    state = laid_out(settings.mesh, lambda: engine.init(model, settings))
    key = jax.eval_shape(lambda: jax.random.key(0))
    view, bucket, count = settings.views[-1], settings.buckets[-1], settings.shared[-1]
    decode = engine.decode.lower(model, settings, view, weights, state, key, array(jnp.int32)).compile()
    names = {name: array(jnp.int32, settings.block) for name in engine.Rows._fields}
    rows = engine.Rows(**names | {"uid": array(jnp.uint32, settings.block)})
    sequences = array(jnp.int32, count, bucket), array(jnp.int32, count), array(jnp.int32, count)
    admit = engine.admit.lower(model, settings, weights, state, *sequences, rows).compile()
    return held(state) + max(taken(decode), taken(admit))


def fit(config: ml_collections.ConfigDict, limit: int) -> dict[str, Any]:
    """Needs in bytes as the config is, and the largest sizes that fit.

    Args:
        config: of `experiments.train`.
        limit: bytes of a device.

    Returns:
        `held`: by name, of all devices together; `sampling`, `learning`: most at once on one device in either half of a step;
        `slots`, `tokens`: the largest that fit, 0 if none does; `tokens` is None for evolution, which has no micro-batches.
    """
    build.require(config, "task", "warm_start")
    build.check(config)
    task = task_of(config)
    with Pool(task.verify, workers=1, deadline=config.reward.deadline) as pool:
        setup, params = set_up(config, task, pool)
        mesh, evolves = setup.settings.mesh, bool(setup.learner.members)
        devices = 1 if mesh is None else sharding.count(mesh, SPREAD)
        rows = max(setup.learner.members, 1) * config.prompts * config.samples

        @functools.cache
        def learning(tokens: int) -> int:
            changed = config.copy_and_resolve_references()
            if not evolves:
                changed.gradient.tokens = tokens
            learner = build.learner(changed, setup.model, setup.train, setup.settings.stop)
            program = learner.compile(state, rows)
            return held((state, program.args_info[0][-1])) + taken(program)

        @functools.cache
        def sampling(slots: int) -> int:  # on every device
            settings = dataclasses.replace(setup.settings, slots=slots * devices)
            return held((state, beside)) + sampling_bytes(setup.model, settings, weights)

        state = laid_out(mesh, setup.learner.init, params)
        sampled = (lambda state: setup.learner.weights(state)[0]) if evolves else setup.learner.mean
        weights = laid_out(mesh, sampled, state)
        stale = not evolves and config.gradient.staleness  # then an older policy is taken out of those kept
        beside = weights if stale else anew(sampled, state, weights)
        tokens = None if evolves else config.gradient.tokens
        slots = config.engine.slots // devices
        return {
            "held": setup.learner.plan(state),
            "sampling": sampling(slots),
            "learning": learning(tokens),
            "slots": devices * largest(sampling, limit, slots, -(-rows // devices)),
            "tokens": tokens and largest(learning, limit, tokens, -(-rows * setup.settings.length // devices)),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fit", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="a config of experiments.train")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device; by default what this one has")
    args, overrides = parser.parse_known_args(argv)
    device = jax.devices()[0]
    limit = capacity(device) if args.memory is None else int(args.memory * GIB)
    config = config_lib.load(args.config, [x.removeprefix("--config.") for x in overrides])
    found = fit(config, int(MARGIN * limit))
    mib = lambda size: f"{size / 2**20:,.1f} MiB"
    print(f"{device.device_kind}: {limit / GIB:.1f} GiB, of which {MARGIN:.0%} are planned with")
    print("held: " + ", ".join(f"{name} {mib(size)}" for name, size in found["held"].items() if size))
    print(f"most at once while sampling {mib(found['sampling'])}, while learning {mib(found['learning'])}")
    print(f"fits: --config.engine.slots={found['slots']}" if found["slots"] else "not one slot fits")
    if found["tokens"] is not None:
        print(f"fits: --config.gradient.tokens={found['tokens']}" if found["tokens"] else "no micro-batch fits")
    return 0 if found["slots"] and found["tokens"] != 0 else 1


if __name__ == "__main__":
    sys.exit(main())
