"""Processes that train together, as torchrun starts them, but forked (tests/fresh.py): two start in a second."""

import os
import socket
from contextlib import ExitStack

import fresh

TESTS = os.path.dirname(os.path.abspath(__file__))


def start(stack, path, function, ranks, *arguments, **variables):
    """Start ``ranks`` processes that call a function of a test file with the arguments, which are strings.

    Args:
        stack: what ends with the test.
        path: of the file.
        function: its name in it.
        ranks: how many.
        arguments: of the function.
        variables: further variables of the environment.
    """
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    # what tests import from tests/ comes first
    code = (
        f"import sys, runpy; sys.path.insert(1, {TESTS!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        f"runpy.run_path({str(path)!r})[{function!r}](*sys.argv[1:])"
    )
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return [
        stack.enter_context(
            fresh.Process(code, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        )
        for rank in range(ranks)
    ]


def run(path, function, ranks, *arguments, **variables):
    """Run such processes to the end, see that none fails, and return what each printed."""
    with ExitStack() as stack:
        processes = start(stack, path, function, ranks, *arguments, **variables)
        found = [process.communicate() for process in processes]
    # all that was said: the first error may be what another process's end has caused
    assert not any(process.returncode for process in processes), "\n".join(
        f"process {rank}: {errors}" for rank, (_, errors) in enumerate(found)
    )
    return [printed for printed, _ in found]
