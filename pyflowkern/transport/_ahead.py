"""Work that a thread does ahead of time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Ahead"]

T = TypeVar("T")


def _one_thread() -> None:
    torch.get_num_threads()  # else the first parallel loop of a thread takes the count of the process
    torch.set_num_threads(1)


class Ahead(Generic[T]):
    """Calls a function in a thread, so that a result may be there before it is asked for.

    The function must not draw random numbers: what a run draws would depend on how fast its threads are.  Its ops run
    on one thread, beside those of the caller.  In a forked process, which has no such thread, it is called at once.

    Args:
        function: what to call.
        threaded: whether a thread calls it; else it is called when the result is asked for.
    """

    def __init__(self, function: Callable[..., T], *, threaded: bool) -> None:
        self._function, self._threaded = function, threaded
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._arguments: tuple[Any, ...] = ()
        self._future: Future[T] | None = None

    def start(self, *arguments: Any) -> None:
        """Begin a call."""
        self._arguments = arguments
        if not self._threaded:
            return
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(1, "pyflowkern"), os.getpid()
            threads = torch.get_num_threads()
            self._pool.submit(_one_thread).result()
            torch.set_num_threads(threads)  # a thread of its own has one; others that begin do not
        self._future = self._pool.submit(copy_context().run, self._function, *arguments)

    def result(self) -> T:
        """Wait for the result of the call, and return it or raise its exception."""
        if self._future is None or self._process != os.getpid():
            return self._function(*self._arguments)
        return self._future.result()

    def close(self) -> None:
        """Let the thread end; a call that runs still goes on until it is done."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(wait=False, cancel_futures=True)
