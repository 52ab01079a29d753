"""Launches of several processes on this machine, with eight devices in all."""

import os
import re
import socket
import subprocess
import sys

_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")


def start(count, *commands):
    """So many processes of 8 / count devices, as `python -m` of a command each, the last for all that are left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{_DEVICES.sub('', os.environ['XLA_FLAGS'])} --xla_force_host_platform_device_count={8 // count}"
    running = []
    for i in range(count):
        env = os.environ | {"XLA_FLAGS": flags}
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        pipe, command = subprocess.PIPE, commands[min(i, len(commands) - 1)]
        running.append(subprocess.Popen([sys.executable, "-m", *command], env=env, stdout=pipe, stderr=pipe, text=True))
    return running


def ends(running):
    """[(exit status, output, errors)]."""
    try:
        ended = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]
