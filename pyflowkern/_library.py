"""Find and load the op libraries, and decide who serves a call: a kernel or the reference.

Two shared objects implement the ``pyflowkern`` operator namespace, ``libpyflowkern_cpu.so`` and
``libpyflowkern_cuda.so``; the second is loaded only by a torch that was built with CUDA, because a CPU
torch does not export the symbols it needs.  Importing never fails and never compiles: a load error is kept,
shown by :func:`show_config` and raised by :func:`require_kernels`; every public function then runs its
pure-PyTorch reference.

Environment variables, read at import:

- ``PYFLOWKERN_DISABLE_KERNELS``: load no library, as if none had been built (unless it is empty or 0).
- ``PYFLOWKERN_LIBRARY_DIR``: the folder to take the libraries from.  Native code is loaded from there and runs with
  the rights of the process: name only folders that nobody else can write to.
- ``PYFLOWKERN_SIMD``: baseline, avx2 or avx512; the best that the processor has if it is not set, or set to another
  word (which :func:`show_config` and a warning say) or to a level that the processor lacks.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyflowkern._version import __version__

__all__ = [
    "LIBRARY",
    "kernel_serves",
    "load",
    "observed",
    "reference_wanted",
    "require_kernels",
    "show_config",
    "simd_level",
    "transformed",
    "use_reference",
]

#: Schemas are defined here, in Python; the loaded objects only implement them.
LIBRARY = torch.library.Library("pyflowkern", "DEF")

#: Counts the changes of schemas and of the numbers in core/codes.py; csrc/core/simd.cpp has the same.
SCHEMAS = 10

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_loaded: dict[str, Path] = {}
_served: dict[str, frozenset[str]] = {}
#: Names of all ops with a schema, filled by their files.
OPS: list[str] = []
_errors: dict[str, str] = {}
#: What was asked of ``PYFLOWKERN_SIMD`` in vain.
_ignored = ""

#: The open blocks of :func:`use_reference` in this thread and context, each a list of one answer; the last one counts.
_blocks: ContextVar[tuple[list[bool], ...]] = ContextVar("pyflowkern_reference", default=())
#: Those of all threads, which every call looks at first: "1" for a block that wants references, "0" for one that
#: does not.  A plain global is quick to read, and compilers watch it.
_open_anywhere = ""
_all_blocks: list[list[bool]] = []
_blocks_lock = threading.Lock()
#: The answer of a block that a compiler is tracing.
_traced_block: bool | None = None


def _candidates(name: str) -> Iterator[Path]:
    """Yield where the shared object may lie: next to this file, else in the installed wheel."""
    if override := _override():
        yield Path(override).absolute() / name  # a bare name would be looked for elsewhere
        return
    yield Path(__file__).parent / "lib" / name
    try:  # running from a source tree beside an installed wheel of the same version
        dist = metadata.distribution("pyflowkern")
    except metadata.PackageNotFoundError:
        return
    if dist.version == __version__:
        yield Path(str(dist.locate_file("pyflowkern/lib"))) / name


def _load(device: str) -> None:
    name = f"libpyflowkern_{device}.so"
    path = next((p for p in _candidates(name) if p.is_file()), None)
    if path is None:
        _errors[device] = (
            f"{name} was not built or not installed; build it with "
            "`pip install . --no-build-isolation` (needs a C++20 compiler"
            + (", nvcc" if device == "cuda" else "")
            + ")"
        )
        return
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        _errors[device] = (
            f"{path} could not be loaded by torch {torch.__version__}: {error.__cause__ or error}"
        )
        return
    key = device.upper()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    served = frozenset(op for op in OPS if has_kernel(f"pyflowkern::{op}", key))
    problem = _problem(device, path, served)
    if problem or (_override() and device == "cuda" and "cpu" in _errors):
        _errors[device] = problem or f"{path} lies beside a CPU library that cannot be used"
        return
    _loaded[device], _served[device] = path, served


def _problem(device: str, path: Path, served: frozenset[str]) -> str | None:
    """Return why a library that could be loaded must not be used."""
    if not served:
        return f"{path} is not pyflowkern's library: it holds no kernels of this package"
    if device != "cpu":
        return None
    library = ctypes.CDLL(str(path))  # loaded already: this only asks for its names
    if not hasattr(library, "pyflowkern_simd_level"):
        return f"{path} is not pyflowkern's library: it has no SIMD levels"
    if not hasattr(library, "pyflowkern_version") or not hasattr(library, "pyflowkern_schemas"):
        return f"{path} belongs to an unknown version, not to {__version__}"
    library.pyflowkern_version.restype = ctypes.c_char_p
    version = library.pyflowkern_version().decode()
    if version != __version__:
        return f"{path} belongs to {version}, not to {__version__}"
    if library.pyflowkern_schemas() != SCHEMAS:
        return (
            f"{path} was built from other sources, whose ops take other arguments: build it anew"
        )
    return None


def _override() -> str:
    return os.environ.get("PYFLOWKERN_LIBRARY_DIR", "")


def _check_simd_variable() -> None:
    """Keep, and warn of, a level that was asked for in vain; even where warnings are errors the import goes on."""
    global _ignored
    wanted = os.environ.get("PYFLOWKERN_SIMD", "")
    if wanted and wanted not in SIMD_LEVELS:
        _ignored = (
            f"PYFLOWKERN_SIMD={wanted} is ignored: it must be one of {', '.join(SIMD_LEVELS)}"
        )
    elif wanted and "cpu" in _loaded and simd_level() != wanted:
        _ignored = f"PYFLOWKERN_SIMD={wanted} is ignored: this processor or build has {simd_level()} at most"
    else:
        return
    with suppress(Warning):
        warnings.warn(_ignored, RuntimeWarning, stacklevel=2)


def load() -> None:
    """Load what this torch can use.  Called once, after every schema has been defined."""
    if (disable := os.environ.get("PYFLOWKERN_DISABLE_KERNELS", "")) not in ("", "0"):
        reason = f"PYFLOWKERN_DISABLE_KERNELS={disable} is set; unset it to have the kernels"
        _errors.update(cpu=reason, cuda=reason)
        return
    _load("cpu")
    if torch.version.cuda is None:
        _errors["cuda"] = f"torch {torch.__version__} was built without CUDA"
    else:
        _load("cuda")
    _check_simd_variable()


def require_kernels(device: str = "cpu") -> None:
    """Raise RuntimeError with the reason and the remedy when no kernels serve ``device``."""
    if device not in _loaded:
        raise RuntimeError(
            f"no pyflowkern kernels for {device}: {_errors.get(device, 'unknown device')}"
        )


SIMD_LEVELS = ("baseline", "avx2", "avx512")


def simd_level(wanted: str | None = None) -> str:
    """Return the SIMD level of the CPU kernels, after setting it if ``wanted`` names one.

    The level in force stays what it is where the processor lacks the wanted one: compare the answer.  The
    environment variable ``PYFLOWKERN_SIMD`` sets the level at start.

    Raises:
        ValueError: for an unknown level.
        RuntimeError: without CPU kernels.
    """
    require_kernels("cpu")
    library = ctypes.CDLL(str(_loaded["cpu"]))
    if wanted is None:
        return SIMD_LEVELS[library.pyflowkern_simd_level()]
    if wanted not in SIMD_LEVELS:
        raise ValueError(f"wanted must be one of {', '.join(SIMD_LEVELS)}, got {wanted!r}")
    return SIMD_LEVELS[library.pyflowkern_set_simd_level(SIMD_LEVELS.index(wanted))]


@contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Run every op of the block as its pure-PyTorch reference.

    The block counts in its own thread and context (an asyncio task has its own) and nowhere else; the innermost of
    several blocks decides.  A compiled function is traced again where other blocks are open
    than before; several threads that call one meanwhile all get what the first of them had.

    Args:
        enabled: False gives the kernels back within an outer block.

    Raises:
        TypeError: for anything but True or False.

    Example:
        >>> import torch, pyflowkern
        >>> with pyflowkern.use_reference():
        ...     y, log_det = pyflowkern.ops.actnorm(torch.ones(2, 3), torch.zeros(3), torch.zeros(3))
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    if torch.compiler.is_compiling():  # which cannot follow a context variable
        global _traced_block
        before, _traced_block = _traced_block, enabled
        try:
            yield
        finally:
            _traced_block = before
        return
    block = [enabled]
    _blocks.set((*_blocks.get(), block))
    _note_block(block, True)
    try:
        yield
    finally:  # by identity: blocks may overlap without one being inside the other
        _blocks.set(tuple(b for b in _blocks.get() if b is not block))
        _note_block(block, False)


def _note_block(block: list[bool], opens: bool) -> None:
    global _open_anywhere
    with _blocks_lock:
        others = [b for b in _all_blocks if b is not block]
        _all_blocks[:] = [*others, block] if opens else others
        _open_anywhere = "".join("1" if b[0] else "0" for b in _all_blocks)


def _context_wants_reference() -> bool:
    blocks = _blocks.get()
    return bool(blocks) and blocks[-1][0]


# a compiler takes the answer as it is while it traces
_context_wants_reference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reference_wanted() -> bool:
    """Whether the innermost :func:`use_reference` block of this thread and context asks for references."""
    if _traced_block is not None:
        return _traced_block
    return "1" in _open_anywhere and _context_wants_reference()


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: the reference knows how, the kernels do not."""
    if forward_ad._current_level >= 0:
        return True
    # the compiler holds this stack itself while it traces, and cannot trace the question
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def observed() -> bool:
    """Whether a compiler, a function transform or a dispatch mode sees what tensors are asked."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def kernel_serves(
    op: str, first: Tensor, *others: Tensor | None, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> bool:
    """Whether a kernel of ``op`` takes these tensors: one device, known dtypes, no functional transform."""
    if (_open_anywhere or _traced_block is not None) and reference_wanted():
        return False
    device = first.device
    if op not in _served.get(device.type, ()) or first.dtype not in dtypes:
        return False
    for t in others:
        if t is not None and (t.dtype not in dtypes or t.device != device):
            return False
    return not transformed()


def show_config() -> str:
    """Return a page that says which backend serves each device and op, and why.

    Example:
        >>> import pyflowkern
        >>> print(pyflowkern.show_config())  # doctest: +ELLIPSIS
        pyflowkern ...
    """
    lines = [f"pyflowkern {__version__}, torch {torch.__version__} (CUDA {torch.version.cuda})"]
    for device in ("cpu", "cuda"):
        if device in _loaded:
            level = f" ({simd_level()})" if device == "cpu" else ""
            lines.append(f"{device}: kernels{level} from {_loaded[device]}")
            lines.append(f"  kernels for {', '.join(sorted(_served[device]))}")
            if rest := sorted(set(OPS) - _served[device]):
                lines.append(f"  reference, not having been built, for {', '.join(rest)}")
        else:
            lines.append(f"{device}: reference, because {_errors.get(device, 'not loaded')}")
    if reference_wanted():
        lines.append("use_reference() is on: every op runs its reference")
    if folder := _override():
        lines.append(f"PYFLOWKERN_LIBRARY_DIR={folder}: libraries are taken from there alone")
    if _ignored:
        lines.append(_ignored)
    try:
        from pyflowkern import _C
    except ImportError as error:
        lines.append(f"build facts: none ({error})")
    else:
        lines += [f"{key}: {value}" for key, value in _C.build_info().items()]
    return "\n".join(lines)
