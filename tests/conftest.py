"""Settings every test needs before jax is imported; subprocesses inherit them."""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

_DEVICES = "--xla_force_host_platform_device_count=8"
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Nearly every test compiles far longer than it computes. This leaves out work on machine code and takes the older, quicker
# emitters. Tests that compute long, compare the bits of two programs, or judge what the compiler made are marked `optimised`
# and run with FULL_COMPILE=1 alone: XLA reads its flags once in a process.
FULL_COMPILE = os.environ.get("FULL_COMPILE") == "1"
if not FULL_COMPILE:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if version("jaxlib").startswith("0.10.") and "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # jaxlib 0.11 does not know this flag
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing makes objects by the million, few of them in cycles: looking for those less often saves an eighth of the time.
gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(config, items):
    """Leaves tests marked `optimised` to a process that compiles as users' programs are compiled; with ONE_CASE=1, runs only
    the first case of each test."""
    kept, seen = [], set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if FULL_COMPILE or not item.get_closest_marker("optimised"):
            if os.environ.get("ONE_CASE") != "1" or name not in seen:
                kept.append(item)
            seen.add(name)
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in set(map(id, kept))])
    items[:] = kept


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """Every compiled program keeps memory mapped; thousands of them in one process end in a crash of the compiler."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
