"""Settings every test needs before jax is imported; subprocesses inherit them."""

import gc
import os
import sys
from pathlib import Path

import pytest

_DEVICES = "--xla_force_host_platform_device_count=8"
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Nearly every test compiles far longer than it computes. This leaves out work on machine code; tests that
# compute long, or judge what the compiler made, are marked `optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing makes objects by the million, few of them in cycles: looking for those less often saves an eighth of the time.
gc.set_threshold(100_000, 50, 50)


@pytest.fixture(autouse=True)
def _optimised_tests_compile_as_users_do(request):
    if request.node.get_closest_marker("optimised"):
        config = sys.modules["jax"].config
        before = config.values["jax_disable_most_optimizations"]
        config.update("jax_disable_most_optimizations", False)
        yield
        config.update("jax_disable_most_optimizations", before)
    else:
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """Every compiled program keeps memory mapped; thousands of them in one process end in a crash of the compiler."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
