"""Orbax as it is used here: without compression, which finds nothing in weights, and without work on arrays or devices.

What it leaves is its plain layout: a folder of the format Zarr 2 for each array, which plain Orbax, TensorStore and zarr read.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from rl.checkpoint import disk

# What fails in a thread of Orbax is raised by `save`: it need not be logged as well, with a traceback.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())


class _HostArrays(ocp.type_handlers.NumpyHandler):
    """Writes arrays of the host as its base does, of one chunk each, but at once, by `disk.write_array`."""

    async def serialize(
        self,
        values: Sequence[np.ndarray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            if jax.process_index() == 0:
                place, shape = Path(info.path), list(value.shape)
                layout = {"shape": shape, "chunks": shape, "compressor": None}
                store = {"driver": "file", "path": str(place)}
                spec = {"driver": "zarr", "kvstore": store, "dtype": value.dtype.name, "metadata": layout}
                await ts.open(spec, create=True)  # its description; raises for a dtype that it does not know
                disk.write_array(place / ".".join("0" * max(1, value.ndim)), value)
        return []


def checkpointer(processes: Sequence[int]) -> ocp.Checkpointer:
    """One that meets the given processes, naming them, which makes it use the coordinator instead of collectives."""
    meeting = ocp.options.MultiprocessingOptions(primary_host=processes[0], active_processes=set(processes))
    # Nothing changes a snapshot, so Orbax need not copy it again, nor cut replicas up, which it would compute on devices.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _HostArrays(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, use_ocdbt=False, multiprocessing_options=meeting, type_handler_registry=registry
    )
    # It would look for files of another format to merge, and warn of their absence.
    handler.finalize = lambda directory: None
    return ocp.Checkpointer(handler, multiprocessing_options=meeting)
