"""Processes as new as those of ``python -c`` that need not import torch and Lightning, which takes five seconds.

One process a test run imports what is large and not of this package. It forks for each call, and pyflowkern is imported
in the fork: from the paths, with the environment, in the folder and with the streams that the call names.
"""

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

LARGE = ("lightning.pytorch", "matplotlib.figure", "sklearn.datasets", "typer")


class Process:
    """Python code in a process of its own, with as much of ``subprocess.Popen`` as tests need.

    Args:
        code: what it runs.
        arguments: ``sys.argv`` after the first.
        stdout: a file or its descriptor; None for a pipe, as stderr always is.
        cwd: the folder it runs in.
        variables: further variables of the environment; by default the package under test is found there.
    """

    def __init__(self, code, *arguments, stdout=None, cwd=None, **variables):
        import pyflowkern

        root = str(Path(pyflowkern.__file__).parents[1])  # may be installed, or only on our path
        request = {
            "code": code,
            "argv": ["-c", *map(str, arguments)],
            "cwd": str(cwd or os.getcwd()),
            "environment": {**os.environ, "PYTHONPATH": root, **variables},
        }
        pipes = [os.pipe() for _ in range(3)]
        ends = [end for _, end in pipes]
        given = ends if stdout is None else [stdout, *ends[1:]]
        socket.send_fds(
            _server(),
            [json.dumps(request).encode()],
            [end if isinstance(end, int) else end.fileno() for end in given],
        )
        for end in ends:
            os.close(end)
        self.stdout, self.stderr, self._status = (os.fdopen(begin) for begin, _ in pipes)
        self.pid = int(self._status.readline())
        self.returncode = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()
        for stream in (self.stdout, self.stderr, self._status):
            stream.close()

    def kill(self):
        """End it at once, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        """Wait for the end, and return the exit code: minus the signal, if one ended it."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
        return self.returncode

    def communicate(self):
        """Return the rest of stdout and stderr, after the end."""
        with ThreadPoolExecutor() as readers:
            found = list(readers.map(lambda stream: stream.read(), (self.stdout, self.stderr)))
        self.wait()
        return found


def run(code, *arguments, **options):
    """Run to the end, like ``subprocess.run`` with its output captured as text."""
    with Process(code, *arguments, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(["-c", *arguments], process.returncode, out, err)


@cache
def _server():
    """Return the connection to the process that forks; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [sys.executable, __file__, str(theirs.fileno())]
        subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
    atexit.register(ours.close)
    return ours


def _serve(connection):
    """Fork for each request; in the fork, become what it asks for, and return its code."""
    for name in LARGE:
        __import__(name)
    gc.freeze()  # else each fork would copy all of it when it ends and looks for garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait below
    while True:
        message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for stream in streams:
            os.close(stream)
    connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *outputs, status = streams
    if child := os.fork():
        for stream in outputs:
            os.close(stream)
        os.write(status, f"{child}\n".encode())
        os.write(status, f"{os.waitpid(child, 0)[1]}\n".encode())
        os._exit(0)
    os.close(status)
    for stream, place in zip(outputs, (1, 2), strict=True):
        os.dup2(stream, place)
        os.close(stream)
    request = json.loads(message)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    sys.path[:1] = ["", *request["environment"]["PYTHONPATH"].split(os.pathsep)]
    return request["code"]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as server:
        program = _serve(server)
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
