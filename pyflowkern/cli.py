"""The entry point of the command line: ``pyflowkern`` and ``python -m pyflowkern``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; a mistake of the caller's is one line on stderr and exit code 2."""
    try:
        from pyflowkern._commands import app
    except ModuleNotFoundError as error:
        _fail(f"the command line needs {error.name}: pip install 'pyflowkern[cli]'", 2)
    try:
        app(prog_name="pyflowkern")
    except ModuleNotFoundError as error:
        _fail(f"this command needs {error.name}: pip install 'pyflowkern[train]'", 2)
    except OSError as error:
        _fail(str(error), 1)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _fail(str(error), code)


def _fail(message: str, code: int) -> None:
    print(f"pyflowkern: {message}", file=sys.stderr)
    raise SystemExit(code)
