"""Devices of a run: one mesh of four axes, where a language model's parameters lie on it, and several processes as one.

* `population`: members of a population are divided over it;
* `data`: sequences of a gradient, slots of the rollout engine, and members too;
* `fsdp`: as `data`, and parameters and optimizer state are held in parts;
* `tensor`: matrices are divided, by columns into a layer and by rows out of it, and computed with in parts.

Results depend on the sizes by rounding alone, and evolution's not at all under the conditions of `eggroll.strategy`.

`fsdp` also divides what a gradient takes: a layer's parameters are put together where they are used, in the forward pass and
again in the backward pass, and its gradient is summed into parts at once (Zhao et al., PyTorch FSDP, arXiv 2304.11277).
Embedding and head are put together for each micro-batch; on a CPU also layers that are not stacked, because its compiler keeps
them for the backward pass. Exceptions, for which every device has all parameters that `tensor` leaves it: VCPO's norms of
single sequences, sampling, and what LoRA merges (`rl.lora.attach`).
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eggroll import sharding
from eggroll.noise import path_name
from rl.types import Gather, TrainBatch

AXES = ("population", "data", "fsdp", "tensor")
SPREAD = AXES[:3]  # what members, sequences and slots are divided over
_SILENCE = 30  # seconds without a heartbeat after which a process counts as lost
_VERSIONED = ("jax", "jaxlib", "eggroll-jax")

# The first pattern found in a path decides; entries are of the last axes, so that stacked layers and experts have these too.
_IN, _OUT = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")
LAYOUT = (
    (r"(^|/)embed/embedding$", _OUT),  # [vocab, width]
    (r"(^|/)head/kernel$", _IN),
    (r"attention/(query|key|value)/kernel$", _IN),
    (r"attention/out/kernel$", _OUT),
    (r"(mlp/|experts_)(gate|up)(/kernel)?$", _IN),
    (r"(mlp/|experts_)down(/kernel)?$", _OUT),
    (r"(attention/(query|key|value)|mlp/(gate|up))/bias$", PartitionSpec("tensor")),
    (r"time/(receptance|key|value)/kernel$|channel/key/kernel$", _IN),  # RWKV-7
    (r"time/output/kernel$|channel/value/kernel$", _OUT),
)


def make(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of a config's sizes.

    Args:
        sizes: of the axes; one may be -1: as many as there are devices for. All 1: no mesh, one device.
        devices: all of all processes, if None.

    Returns:
        A mesh of all four axes in the order of `AXES`, devices of one process next to each other along the last ones.

    Raises:
        ValueError: unknown axes, sizes below 1, more than one -1, sizes whose product is not the number of devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    shape = [sizes.get(name, 1) for name in AXES]
    if unknown or any(n < 1 and n != -1 for n in shape) or shape.count(-1) > 1:
        raise ValueError(
            f"a mesh has the axes {', '.join(AXES)}, each of a size from 1, one of them at most -1 (what is left); got "
            f"{dict(sizes)}"
        )
    if shape == [1] * len(AXES):
        return None
    devices = jax.devices() if devices is None else devices
    known = math.prod(n for n in shape if n > 0)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"the sizes of a mesh must multiply to the number of devices; got {dict(zip(AXES, shape, strict=True))} and "
            f"{len(devices)} devices: change a size, or set one to -1 (for trying on a CPU, "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 devices)"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def place(mesh: Mesh | None, tree: Any, whole: bool = False) -> Any:
    """Parameters laid out on a mesh; None: as they are.

    Args:
        tree: arrays, or what is being traced.
        whole: put together where `fsdp` holds them in parts, as what computes needs them.
    """
    if mesh is None:
        return tree
    keep = lambda entry: None if whole and entry == "fsdp" else entry
    layout = [(pattern, PartitionSpec(*map(keep, spec))) for pattern, spec in LAYOUT]
    return sharding.place(mesh, layout, tree)


def init_optimizer(mesh: Mesh | None, init: Callable[[Any], Any], params: Any) -> Any:
    """An optimizer's first state, laid out as the parameters."""
    return init(params) if mesh is None else sharding.init_beside(mesh, LAYOUT, init, params)


def lay_out(mesh: Mesh | None, params: Any, master: Any, opt_state: Any) -> tuple[Any, Any, Any]:
    """What an update returns, constrained to lie as `place` and `init_optimizer` laid it out."""
    if mesh is None:
        return params, master, opt_state
    opt_state = sharding.place_beside(mesh, LAYOUT, params, opt_state)
    return place(mesh, params), place(mesh, master), opt_state


def parts(mesh: Mesh | None, params: Any) -> dict[str, int]:
    """Path -> axis, counted from the last (-1), of the parameters that `fsdp` divides."""
    if mesh is None:
        return {}
    where = jax.tree_util.tree_flatten_with_path(sharding.shardings(mesh, LAYOUT, params))[0]
    return {path_name(path): x.spec.index("fsdp") - len(x.spec) for path, x in where if "fsdp" in x.spec}


def gatherer(divided: Mapping[str, int]) -> Gather | None:
    """What puts parameters together inside `over_micro_batches`; None where nothing is divided.

    Args:
        divided: from `parts`.
    """
    if not divided:
        return None

    def gather(name, tree):
        def one(path, x):
            axis = divided.get(f"{name}/{path_name(path)}")
            return x if axis is None else _put_together(x, x.ndim + axis)

        return jax.tree_util.tree_map_with_path(one, tree)

    return gather


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _put_together(x: jax.Array, axis: int) -> jax.Array:
    """The parts of all devices along `fsdp`; its gradient is the sum of theirs, in f32 at least, each keeping its part."""
    return _gather_parts(x, axis)


def _gather_parts(x, axis):
    return lax.all_gather(x, "fsdp", axis=axis, tiled=True)


def _summed_into_parts(axis, _, gradient):
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    return (lax.psum_scatter(wide, "fsdp", scatter_dimension=axis, tiled=True).astype(gradient.dtype),)


_put_together.defvjp(lambda x, axis: (_gather_parts(x, axis), None), _summed_into_parts)


def over_micro_batches(
    mesh: Mesh | None,
    run: Callable,
    params: Any,
    batch: TrainBatch,
    *,
    base: Any = None,
    divided: Mapping[str, int] = MappingProxyType({}),
    learns: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Every device runs its own micro-batches, dealt out in turn; where they run out, empty ones.

    Args:
        run: (params, base, batch) -> (gradient, what else is added over micro-batches, what is largest, what each has with
            leading axis M).
        params, base: the same on every device, but for those divided.
        divided: from `parts`: what `run` sees one part of, on each device, and puts together by `gatherer`.
        learns: whether there is a gradient, summed over micro-batches, like the parameters; else it is ().

    Returns:
        What `run` returns of the whole batch.
    """
    if mesh is None:
        return run(params, base, batch)
    devices, size = sharding.count(mesh, SPREAD), len(batch.ids)
    padding = -size % devices

    def deal(path, x):  # [M, ...] -> [D, M / D, ...]: micro-batch m to device m % D
        if not jnp.ndim(x):
            return jnp.zeros(devices, x.dtype)
        nothing = -1 if path[0].name in ("segments", "source", "experts") else 0
        x = jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:])), constant_values=nothing)
        return x.reshape(-1, devices, *x.shape[1:]).swapaxes(0, 1)

    def own(device, params, base, batch, used):
        batch = jax.tree.map(lambda x: x[0], batch)
        # as many on every device: exchanges over `fsdp`, and the compiler's own over `tensor`, must go in step
        gradient, added, largest, each = run(params, base, dataclasses.replace(batch, used=-(-used // devices)))
        each = jax.tree.map(lambda x: x[None], each)
        others = lambda path: [axis for axis in SPREAD if axis != "fsdp" or path_name(path) not in divided]
        return (
            jax.tree_util.tree_map_with_path(lambda path, x: lax.psum(x, others(path)), gradient),
            jax.tree.map(lambda x: lax.psum(x, SPREAD), added),
            jax.tree.map(lambda x: lax.pmax(x, SPREAD), largest),
            each,
        )

    def held(path, x):
        axis = divided.get(path_name(path))
        return PartitionSpec(*("fsdp" if i - x.ndim == axis else None for i in range(x.ndim)))

    everywhere, spread = PartitionSpec(), PartitionSpec(SPREAD)
    lies, base_lies = (jax.tree_util.tree_map_with_path(held, tree) for tree in (params, base))
    results = (lies if learns else everywhere, everywhere, everywhere, spread)
    mapped = sharding.per_device(own, mesh, SPREAD, (lies, base_lies, spread, everywhere), results)
    dealt = jax.tree_util.tree_map_with_path(deal, batch)
    gradient, added, largest, each = mapped(params, base, dealt, jnp.asarray(batch.used))
    back = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:size]
    each = jax.tree.map(lambda x: lax.with_sharding_constraint(back(x), NamedSharding(mesh, everywhere)), each)
    return gradient, added, largest, each


# -- several processes -----------------------------------------------------------------------------------------------


def connect() -> None:
    """Makes the processes of a launch one: call before jax looks for devices; a process alone is left as it is.

    Reads JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what SLURM and Open MPI
    set for their tasks. Where one is lost, what the others exchange with it fails, or at the latest 30 s later jax aborts them.

    Raises:
        ValueError: some of the three variables without the others.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given and len(given) < len(names):
        raise ValueError(
            f"several processes need all of {', '.join(names)}; missing: {', '.join(n for n in names if n not in given)}"
        )
    lost = {"heartbeat_timeout_seconds": _SILENCE}
    if given:
        jax.distributed.initialize(given[names[0]], int(given[names[1]]), int(given[names[2]]), **lost)
    elif int(os.environ.get("SLURM_NTASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))) > 1:
        jax.distributed.initialize(**lost)


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def agreed(value: int) -> list[int]:
    """The numbers of all processes, process 0's first, on each of them; all have to call this at the same point."""
    if jax.process_count() == 1:
        return [value]
    return _gathered(np.int32(value)).tolist()


def exchanged(value: Any) -> list[Any]:
    """The JSON values of all processes, process 0's first, on each of them; all have to call this at the same point."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = agreed(text.size)
    room = 1 << max(sizes).bit_length()  # a power of two: few programs to compile
    every = _gathered(np.pad(text, (0, room - text.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def on_host(tree: Any) -> Any:
    """Arrays of several processes as NumPy arrays, whole and in each of them, one after the other; others as they are."""
    return jax.tree.map(lambda x: x if not isinstance(x, jax.Array) or x.is_fully_addressable else _whole(x), tree)


def _gathered(value: np.ndarray) -> np.ndarray:
    """[process, ...]: an array of each process, on each of them."""
    mesh = Mesh(np.reshape(jax.devices(), (jax.process_count(), -1)), ("process", "device"))
    own = np.asarray(value)[None]
    return _whole(jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process")), own))


def _whole(x: jax.Array) -> np.ndarray:
    """An array of several processes. Waits for all devices: one that has not met its peers yet would hang the end."""
    whole = jax.jit(_same, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return np.asarray(jax.block_until_ready(whole))


def _same(x: jax.Array) -> jax.Array:
    return x


def check_agreement(config: Mapping[str, Any]) -> None:
    """Refuses processes that would not run the same program.

    Args:
        config: resolved, JSON values.

    Raises:
        ValueError: configs or versions differ between processes; says which processes differ from the first.
    """
    if jax.process_count() == 1:
        return
    versions = {name: metadata.version(name) for name in _VERSIONED}
    text = json.dumps([config, versions], sort_keys=True).encode()
    words = np.frombuffer(hashlib.sha256(text).digest(), np.uint32)
    every = _gathered(words)
    odd = [i for i, other in enumerate(every) if not np.array_equal(other, every[0])]
    if odd:
        raise ValueError(
            f"all processes must run one config and one version of {', '.join(_VERSIONED)}; those of processes {odd} differ "
            f"from process 0's; here, in process {jax.process_index()}: {versions}"
        )
