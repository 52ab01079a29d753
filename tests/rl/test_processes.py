"""Two processes of four devices are one of eight; processes that would not agree are refused."""

import json
import os
import socket
import subprocess
import sys

import pytest

from rl import mesh as meshes


def launch(count, seeds=(0, 0)):
    """[(exit status, output, errors)] of so many processes of 8 / count devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for i in range(count):
        env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}"}
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        command = [sys.executable, "-m", "tests.rl.two_processes", str(seeds[i])]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
    try:
        ended = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def found(output):
    """The last line; those before are the transport's."""
    return json.loads(output.splitlines()[-1])


def test_two_processes_give_the_bits_of_one():
    ((status, alone, errors),) = launch(1)
    assert status == 0, errors
    first, second = launch(2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert found(first[1]) == found(alone) | {"processes": 2}
    assert found(alone)["devices"] == 8 and "bits" not in second[1]


def test_processes_that_do_not_agree_are_refused():
    for status, _, errors in launch(2, seeds=(0, 1)):
        assert status != 0 and "all processes must run one config" in errors and "processes [1] differ" in errors


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="missing: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"):
        meshes.connect()
