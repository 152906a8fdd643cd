"""The entry point of the command line: ``pyflowkern`` and ``python -m pyflowkern``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Run the command line; whatever goes wrong outside of this package is one line on stderr.

    Exit codes: 2 for a mistake of the caller's, 1 for what happened on the way (a full disk, too little memory, a
    training that diverged), 128 and the number of the signal for a run that a signal ended.
    """
    try:
        from pyflowkern._commands import app
        from pyflowkern._memory import keep_memory
    except ModuleNotFoundError as error:
        _fail(f"the command line needs {error.name}: pip install 'pyflowkern[cli]'", 2)
    keep_memory()
    try:
        try:
            app(prog_name="pyflowkern")
        finally:
            sys.stdout.flush()
    except SystemExit as error:
        if error.code == 130:  # how the library of the command line reports Ctrl-C
            _fail("interrupted", 130)
        raise
    except ModuleNotFoundError as error:
        extra = "safetensors" if error.name == "safetensors" else "train"
        _fail(f"this command needs {error.name}: pip install 'pyflowkern[{extra}]'", 2)
    except (
        BrokenPipeError
    ):  # who reads our output has seen enough, like `pyflowkern info | head -1`
        _forget_output()
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:  # every file of ours is named, so this is the output
            _forget_output()
            _fail(f"standard output: {error.strerror or error}", 1)
        _fail(str(error), 1)
    except MemoryError:
        _fail("out of memory", 1)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None and not _is_out_of_memory(error):
            raise
        _fail(" ".join(str(error).split()), 1 if code is None else code)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch could not have the memory it asked for; on the CPU it raises a plain RuntimeError."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "out of memory" in text
    )


def _forget_output() -> None:
    """Let what is still to be printed go nowhere, so that Python does not fail again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    print(f"pyflowkern: {message}", file=sys.stderr)
    raise SystemExit(code)
