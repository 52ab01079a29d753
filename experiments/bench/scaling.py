"""How work divides over devices and what they send each other, from compiled programs: see the package."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from experiments.bench.evolution import LAYERS, network
from experiments.bench.gradient import Work, packed
from experiments.bench.harness import Row, row
from rl import estimate as estimates
from rl import mesh as meshes
from rl.data import packing
from rl.models.presets import make, preset
from rl.objectives.presets import PRESETS
from rl.types import Rollouts

DEVICES = (1, 2, 4, 8)
_SENT = re.compile(r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")


def sent(compiled) -> list[int]:
    """Bytes of the result of every exchange between devices in a compiled program; those in loops count once."""
    size = lambda kind, bits, shape: (int(bits) // 8 if bits else 1) * prod(int(n) for n in shape.split(",") if n)
    return [sum(size(*array) for array in _ARRAY.findall(result)) for result in _SENT.findall(compiled.as_text())]


def evolution(mesh, width: int = 128, members: int = 128, rows: int = 4) -> dict[str, tuple[Any, int]]:
    """Part -> (compiled program, how often its work is done) of a generation: evaluation, and update by either kind of sums."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = [{"w": jax.random.normal(k, (width, width)) / width**0.5, "b": jnp.zeros(width)} for k in keys]
    batch = jax.ShapeDtypeStruct((members, rows, width), jnp.float32)
    score = lambda params, x: jnp.sum(network(params, x))
    programs = {}
    for sums in ("rebuilt", "reduced"):
        es = eggroll.strategy(
            optax.adam(1e-2), population=eggroll.antithetic(members), sigma=0.01, mesh=mesh, sums=sums,
            axes=mesh and meshes.SPREAD,
        )  # fmt: skip
        state = es.init(params, jax.random.key(1))
        scores = jax.ShapeDtypeStruct((members, rows), jnp.float32)
        if sums == "rebuilt":
            evaluate = jax.jit(lambda state, x, es=es: es.evaluate(state, score, x, per_member=True))
            programs["evaluation"] = evaluate.lower(state, batch).compile(), 1
        programs[f"update_{sums}"] = jax.jit(es.update).lower(state, scores).compile(), 1
    return programs


def grpo(mesh, **sizes) -> dict[str, tuple[Any, int]]:
    """The gradient of a step of GRPO; a device's work is that of a micro-batch, as often as it has one."""
    work = Work("tiny-transformer", prompts=8, samples=8, prompt=16, completion=48, micro_batch=256)
    model, rng = make(preset(work.model, vocab=64, **sizes)), np.random.default_rng(0)
    prompts = rng.integers(1, 64, (work.prompts, work.prompt)).astype(np.int32)
    count = work.prompts * work.samples
    rollouts = Rollouts.empty(np.full(count, -1), work.completion)
    rollouts.tokens[:], rollouts.length[:] = rng.integers(1, 64, rollouts.tokens.shape), work.completion
    shape = packing.shape(work.micro_batch, work.prompt, work.completion, per_row=1)
    ones = np.ones(rollouts.tokens.shape, np.float32)
    batch = packed(prompts, rollouts, shape, work.samples)
    batch = batch.credit(mask=ones > 0, advantage=ones, behaviour=-ones, reference=-ones)
    params = meshes.place(mesh, model.init(jax.random.key(0)))
    gradient = lambda params, batch: estimates.estimate(model, params, batch, PRESETS["grpo"].objective, mesh=mesh)[0]
    devices = 1 if mesh is None else mesh.size // mesh.shape["tensor"]
    return {"gradient": (jax.jit(gradient).lower(params, batch).compile(), -(-int(batch.used) // devices))}


def needed(compiled) -> int:
    """Bytes of one device while a program runs."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


PROGRAMS: dict[str, tuple[str, Callable]] = {"evolution": ("population", evolution), "grpo": ("data", grpo)}


def scaling(repeats: int) -> Iterator[Row]:
    """Operations and memory of one device, and what is sent, on 1, 2, 4 and 8 devices; simulated ones where there are fewer."""
    if jax.device_count() < DEVICES[-1]:
        yield from _elsewhere()
        return
    for name, (axis, programs) in PROGRAMS.items():
        alone: dict[str, float] = {}
        for count in DEVICES:
            mesh = meshes.make({axis: count}, jax.devices()[:count])
            for part, (compiled, times) in programs(mesh).items():
                work = compiled.cost_analysis()["flops"] * times
                ideal = alone.setdefault(part, work) / count
                further = {"flops_per_device": round(work), "sent_bytes": sum(sent(compiled))}
                yield row(
                    {"of": name, "part": part, "devices": count}, "ideal_over_device", ideal / work, {}, 1, **further
                )
    whole = 0
    for count in DEVICES:  # a model most of whose memory is its parameters
        mesh = meshes.make({"fsdp": count}, jax.devices()[:count])
        compiled, _ = grpo(mesh, layers=16, width=256, hidden=512, scan_layers=True, remat=True)["gradient"]
        size = needed(compiled)
        whole = whole or size
        further = {"bytes_per_device": size, "sent_bytes": sum(sent(compiled))}
        setting = {"of": "grpo", "part": "memory with fsdp", "devices": count}
        yield row(setting, "device_over_alone", size / whole, {}, 1, **further)


def _elsewhere() -> Iterator[Row]:
    """The rows of a process with eight simulated devices: how many there are is settled when jax starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES[-1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [sys.executable, "-m", "experiments.bench.scaling"]
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True).stdout
    yield from map(json.loads, out.splitlines())


CASES = {"scaling": scaling}

if __name__ == "__main__":
    for measured in scaling(1):
        print(json.dumps(measured), flush=True)
