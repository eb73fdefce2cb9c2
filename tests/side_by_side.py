"""Processes that run at the same time, as those of a distributed training do."""

import os
import subprocess
import sys


def run(*arguments):
    """Run Python once for each list of arguments, at the same time; raise if one of them fails."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, given)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for given in arguments
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
