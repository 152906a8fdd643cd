"""Functions that ``torch.compile`` leaves out of its graphs, without the time that importing the compiler takes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["outside_graphs"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_graphs(reason: str) -> Callable[[_Function], _Function]:
    """Run a function as it is under ``torch.compile``, as :func:`torch.compiler.disable` does.

    That function imports the compiler, which takes as long as importing torch does; a process that compiles nothing
    has no use for it.  Here the compiler is told of the function by the attributes that it looks for.

    Args:
        reason: what is said where only a whole graph is wanted.

    Example:
        >>> from pyflowkern.core.outside_graphs import outside_graphs
        >>> @outside_graphs("it counts")
        ... def double(x):
        ...     return 2 * x
        >>> double(3)
        6
    """

    def decorate(function: _Function) -> _Function:
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:  # then no compiler looks at any frame
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        marked: Any = run
        marked._torchdynamo_disable = True
        marked._torchdynamo_disable_msg = reason
        return marked if _skipped(run) else torch.compiler.disable(function, reason=reason)  # type: ignore

    return decorate


def _skipped(function: Callable[..., Any]) -> bool:
    """Keep the compiler from the function's own frame, after a break of the graph; False where torch cannot."""
    try:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(function.__code__, skip)
    except (AttributeError, TypeError):
        return False
    return True
