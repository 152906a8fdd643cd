"""What a measurement depends on besides the code: device, machine, versions, commit, caches."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import pyflowkern
from pyflowkern import _library

__all__ = ["cache_bytes", "describe", "slug", "usable_cores"]


def describe(device: torch.device) -> dict[str, str | int]:
    """Return the facts that every result row repeats."""
    is_cuda = device.type == "cuda"
    cpu = _cpu_model()
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else cpu,
        "driver": f"{_driver()} / CUDA {torch.version.cuda}" if is_cuda else "",
        "torch": torch.__version__,
        "pyflowkern": pyflowkern.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "machine": cpu,
        "cores": usable_cores(),
        "simd": _simd(),
    }


def cache_bytes(device: torch.device) -> int:
    """Return the size of a CPU's last-level cache, or of a GPU's L2."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes) or 32 << 20


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def slug(facts: dict[str, str | int], device: torch.device) -> str:
    """Return a folder name for results of this device, such as ``cuda-nvidia-h100``."""
    return f"{device.type}-" + re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file() and (found := re.search(r"model name\s*:\s*(.+)", path.read_text())):
        return found[1].strip()
    return platform.processor() or platform.machine()


def _simd() -> str:
    """Return the SIMD level of this package's kernels, else torch's."""
    try:
        _library.require_kernels("cpu")
    except RuntimeError:
        return f"torch {torch.backends.cpu.get_cpu_capability()}"
    return _library.simd_level()


def _output(*command: str) -> str:
    try:
        found = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _driver() -> str:
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return query.splitlines()[0] if query else "unknown"


def _commit() -> str:
    """Return the short commit, with a + if the measured code has uncommitted changes."""
    commit = _output("git", "rev-parse", "--short=10", "HEAD")
    changed = _output(
        "git", "status", "--porcelain", "--", "../csrc", "../pyflowkern", "../bench/ops"
    )
    return (commit or "unknown") + ("+" if changed else "")
