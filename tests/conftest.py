"""Settings every test needs before jax is imported; subprocesses inherit them."""

import os
from pathlib import Path

_DEVICES = "--xla_force_host_platform_device_count=8"
_QUICK = "--xla_backend_optimization_level=0"  # most programs run once: what counts is how long they take to compile
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _flag in (_DEVICES, _QUICK):
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
