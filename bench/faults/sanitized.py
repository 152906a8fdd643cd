"""``python -m bench.faults.sanitized address``: the cases of tests/fuzz, with CPU kernels that a sanitizer watches.

``address`` is GCC's address and undefined-behaviour sanitizers; ``thread`` its thread sanitizer, where eight threads
make each call at once and a kernel's parallel regions are run by threads that the sanitizer knows.  The library is
built into build/sanitized first.  It holds a fault on purpose, which the sanitizer must report before a run counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.faults import _record

__all__ = ["build", "environment", "fuzz", "planted"]

ROOT = Path(__file__).resolve().parents[2]
#: The SIMD levels that are built, the highest of which runs.
LEVELS = {"baseline": 1, "avx2": 2, "avx512": 3}
RUNTIMES = {"address": ("asan", "ubsan", "stdc++"), "thread": ("tsan", "stdc++")}
REPORTS = {"address": "heap-buffer-overflow", "thread": "data race"}
WORDS = {
    "address": "random calls of everything public, {level} kernels{some} under AddressSanitizer and UBSan{rule}",
    "thread": "random calls by eight threads at once, {level} kernels{some} under ThreadSanitizer{rule}",
}


def build(kind: str, level: str = "baseline", families: str = "*") -> Path:
    """Compile the library of the CPU kernels, of all op families or some, and return its folder."""
    name = f"{kind}-{level}" + ("" if families == "*" else "-" + families.replace(";", "-"))
    folder = ROOT / "build" / "sanitized" / name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = (str(shutil.which(tool, path=path)) for tool in ("cmake", "ninja"))
    options = {
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_MAKE_PROGRAM": ninja,
        "PYFLOWKERN_CUDA": "OFF",
        "PYFLOWKERN_SANITIZE": kind,
        "PYFLOWKERN_SIMD_LEVELS": str(LEVELS[level]),
        "PYFLOWKERN_FAMILIES": families,
    }
    defined = [f"-D{key}={value}" for key, value in options.items()]
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defined]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(folder), "--target", "pyflowkern_cpu"], check=True)
    return folder


def environment(kind: str, folder: Path) -> dict[str, str]:
    """Return the environment of a process that loads the library."""
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for name in RUNTIMES[kind]
    ]
    suppressions = ROOT / "tests" / "sanitized" / "thread.supp"
    return os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch free little when they end; the soak looks for leaks
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"halt_on_error=1:report_signal_unsafe=0:suppressions={suppressions}",
        "OMP_NUM_THREADS": "1",
        "PYFLOWKERN_LIBRARY_DIR": str(folder.resolve()),  # cases run in another folder
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
    }


def _python(*words: str) -> list[str]:
    # sanitizers need fixed parts of the address space, which randomization might occupy
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    return [*fixed, sys.executable, "-P", "-W", "ignore", *words]


#: Commits the fault of the library whose kernels run; without kernels it is no report that ends it.
PLANTED = """
import ctypes
from pyflowkern import _library
_library.require_kernels("cpu")
ctypes.CDLL(str(_library._loaded["cpu"])).pyflowkern_planted_fault(64)
"""


def planted(kind: str, folder: Path) -> None:
    """Commit the fault that lies in the library, in a process that is started like that of the cases.

    Raises:
        RuntimeError: if the sanitizer does not report it, so that no finding would mean nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            _python("-c", PLANTED),
            env=environment(kind, folder),
            cwd=name,
            capture_output=True,
            text=True,
        )
    if done.returncode == 0 or REPORTS[kind] not in done.stderr:
        raise RuntimeError(f"the planted fault was not reported: {done.stderr[-2000:]}")


def fuzz(kind: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Run cases; return how many, the findings, and the seconds by the clock and of the processor."""
    with tempfile.TemporaryDirectory() as name:
        counts = Path(name) / "counts.json"
        command = _python("-m", "fuzz", "--json", str(counts), *options)
        begin = _processor_seconds()
        subprocess.run(command, env=environment(kind, folder), cwd=name)
        if not counts.exists():
            raise RuntimeError("the cases did not run")
        result: dict[str, Any] = json.loads(counts.read_text())
        return result | {"processor_seconds": round(_processor_seconds() - begin)}


def _processor_seconds() -> float:
    """Return what ended child processes and theirs have used: on a busy machine the clock says little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _summary(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Return the words of the table."""
    rule = ", nothing compared" if args.crashes_only else ""
    some = "" if args.families == "*" else f" of {', '.join(args.families.split(';'))}"
    rule += f", {len(args.targets)} targets alone" if args.targets else ""
    options = [args.kind, f"--level {args.level}", f"--cases {args.cases}"]
    options += ["--crashes-only"] if args.crashes_only else []
    options += [] if args.families == "*" else [f"--families '{args.families}'"]
    options += [f"--first {args.first}"] if args.first else []
    options += ["--targets ..."] if args.targets else []
    found = len(result["findings"])
    return {
        "level": args.level,
        "first_seed": args.first,
        "crashes_only": args.crashes_only,
        "families": args.families,
        "targets": args.targets,
        "tried": WORDS[args.kind].format(level=args.level, some=some, rule=rule),
        "amount": f"{result['cases']:,} cases in {result['processor_seconds'] / 60:.0f} minutes of a processor; "
        "the planted fault was reported",
        "found": f"{found} findings" if found != 1 else "1 finding",
        "command": f"python -m bench.faults.sanitized {' '.join(options)}",
    }


def main() -> int:
    """Run from the command line, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults.sanitized", description=__doc__)
    parser.add_argument("kind", choices=list(RUNTIMES))
    parser.add_argument("--level", choices=list(LEVELS), default="baseline")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=86_400.0)
    parser.add_argument("--first", type=int, default=0, help="the first seed of each target")
    parser.add_argument("--crashes-only", action="store_true", help="see python -m fuzz --help")
    parser.add_argument("--targets", nargs="+", default=[], help="some ops, layers or flows alone")
    parser.add_argument(
        "--families", default="*", help="kernels of some families, as affine;chain"
    )
    parser.add_argument("--library", type=Path, help="a folder whose library is built already")
    parser.add_argument("--out", type=Path, default=_record.RESULTS)
    args = parser.parse_args()
    folder = args.library or build(args.kind, args.level, args.families)
    planted(args.kind, folder)
    options = ["--cases", str(args.cases), "--first", str(args.first)]
    options += ["--seconds", str(args.seconds)]
    options += ["--crashes-only"] if args.crashes_only else []
    options += ["--threads", "8"] if args.kind == "thread" else []
    options += ["--targets", *args.targets] if args.targets else []
    result = fuzz(args.kind, folder, options)
    result |= _summary(args, result)
    name = f"{args.kind}-{args.level}" + ("-crashes" if args.crashes_only else "")
    print(_record.write(name + ("-some" if args.targets else ""), result, args.out))
    print(result["amount"], result["found"])
    return int(bool(result["findings"]))


if __name__ == "__main__":
    sys.exit(main())
