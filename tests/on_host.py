"""The CUDA kernels compiled for the host: building the library, and running ops through it."""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from pyflowkern import _library

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "cuda_on_host"


@functools.cache
def build(variant: str = "none", **options: str) -> Path:
    """Compile the op library for the host if needed, and return its path.

    The variants are ``none``, ``thread`` and ``address``, after the sanitizer, and ``count``, whose kernels are those
    of ``thread``.
    """
    if variant == "count":
        return build("thread", **options).with_name("libpyflowkern_counting.so")
    name = "-".join([variant, *options.pop("name", "").split()])
    folder = ROOT / "build" / "cuda_on_host" / name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = (str(shutil.which(tool, path=path)) for tool in ("cmake", "ninja"))
    options |= {"SANITIZE": variant, "TORCH": torch.__path__[0], "CMAKE_MAKE_PROGRAM": ninja}
    options |= {"NAMESPACE": _namespace(folder)}
    defined = [f"-D{key}={value}" for key, value in options.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may get here at once
        for command in (
            [cmake, "-S", str(SOURCES), "-B", str(folder), "-G", "Ninja", *defined],
            [cmake, "--build", str(folder)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                output = done.stdout[-4000:] + done.stderr
                raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    return folder / "libpyflowkern_on_host.so"


def _namespace(folder: Path) -> str:
    """Return a namespace for the ops of a build, since a process may load several builds."""
    return f"pyflowkern_on_host_{folder.name.replace('-', '_')}"


@functools.cache
def load(path: Path) -> torch.library.Library:
    """Define every op of the package again under its own namespace, served by the library."""
    library = torch.library.Library(_namespace(path.parent), "DEF")
    for op in _library.OPS:
        schema = str(getattr(torch.ops.pyflowkern, op).default._schema)
        library.define(schema.removeprefix("pyflowkern::"))
    torch.ops.load_library(str(path))
    return library


def served(path: Path) -> list[str]:
    """Return the ops that have a CUDA kernel in the library."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    name = _namespace(path.parent)
    return [op for op in _library.OPS if has_kernel(f"{name}::{op}", "CPU")]


@contextmanager
def kernels(path: Path) -> Iterator[None]:
    """Let the CUDA kernels serve tensors on the CPU."""
    load(path)
    override = torch.library.Library("pyflowkern", "IMPL")
    ops = getattr(torch.ops, _namespace(path.parent))
    try:
        for op in served(path):
            override.impl(
                op,
                getattr(ops, op).default,
                "CPU",
                allow_override=True,
            )
        chain = sys.modules["pyflowkern.ops.chain"]
        with mock.patch.object(chain, "WHOLE", ()):  # CUDA's kernels do not run all programs
            yield
    finally:
        override._destroy()
