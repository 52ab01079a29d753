"""Two processes save together, restore together, and agree on which checkpoint is intact."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rl import checkpoint
from tests.rl.checkpoint.two_processes import ROWS

ROOT = Path(__file__).parents[3]


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.rl.checkpoint.two_processes"]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [*command, str(process), str(port), str(tmp_path)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], [errors[-2000:] for _, errors in ended]
    # Process 0 alone writes leaves of the host, and commits. Of the damage in what process 1 wrote it tells process 1.
    undamaged = "restored 2 {'by': 0} 0 [0, 2, 4] 7"
    assert [[line for line in out.splitlines() if line.startswith("restored")] for out, _ in ended] == [
        [undamaged, "restored 1 {'by': 0} 1 [0, 1, 2] 7"],
        [undamaged, "restored 1 {'by': 0} 0 [0, 1, 2] 7"],
    ]
    assert sorted(os.listdir(tmp_path)) == ["0000000001", "unusable-0000000002"]
    leaves = json.loads((tmp_path / "0000000001" / "meta.json").read_text())["leaves"]
    starts = {name: sorted(block["start"] for block in row["blocks"]) for name, row in leaves.items()}
    assert starts["['rows']"] == [[0, 0], [2, 0], [4, 0], [6, 0]] and starts["['half']"] == [[0, 0], [4, 0]]
    assert starts["['all']"] == [[0]] == starts["['host']"]
    # One process, with eight devices, reads what two wrote with two devices each.
    target = {"rows": jnp.zeros((8, 1000)), "half": jnp.zeros((8, 1000)), "all": jnp.zeros(1000)}
    target |= {"host": np.zeros(3, int), "count": 0, "local": jnp.zeros(2)}
    found = checkpoint.restore(tmp_path, target).state
    np.testing.assert_array_equal(found["rows"], ROWS)
    np.testing.assert_array_equal(found["half"], ROWS)
