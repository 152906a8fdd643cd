"""``make gpu``: build from source, test, sanitize and measure on the GPU of this machine.

Everything is written to one folder: ``summary.json`` with the facts of the machine and how each stage ended, a log a
stage, and the results of the benchmarks, to be committed under bench/results/ after a look at them.  The stages share
ten minutes; one that runs out of its time is cut off and reported, and the next one starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXERCISE = ["tests/cuda_on_host/exercise.py", "cuda"]


def stages(out: Path) -> dict[str, tuple[list[str], int]]:
    """Return the command and the seconds of each stage."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    tools = {
        f"sanitizer-{tool}": (
            [sanitizer, "--tool", tool, "--error-exitcode", "9", python, *EXERCISE],
            60,
        )
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    }
    install = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "."]
    bench = [python, "-m", "bench"]
    return {
        "build": (install, 240),
        "tests": ([python, "-m", "pytest", "-q", "-m", "gpu", "-n", "4", "tests"], 150),
        "report": ([*bench, "cuda-report"], 60),
        "steps": ([*bench, "steps", "--device", "cuda", "--out", str(out)], 90),
        "bench": (
            [*bench, "all", "--device", "cuda", "--quick", "--out", str(out / "results")],
            240,
        ),
        **tools,
    }


def run(name: str, command: list[str], seconds: float, out: Path) -> dict[str, object]:
    """Run one stage with its output in a log."""
    begin = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            ended = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {seconds:.0f} s"
        except OSError as error:
            ended = f"not run: {error}"
    print(f"{name}: {ended} ({time.monotonic() - begin:.0f} s)", flush=True)
    return {"ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def facts() -> dict[str, object]:
    """Return device, driver, torch, CUDA and commit; raises SystemExit without a GPU."""
    import torch

    from bench import _environment

    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA device and a torch built with CUDA")
    return {**_environment.describe(torch.device("cuda")), "cuda": torch.version.cuda}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--stages", nargs="+", default=[], help="these only")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    machine = facts()
    print(json.dumps(machine))
    found: dict[str, object] = {"machine": machine}
    end = time.monotonic() + 60 * args.minutes
    for name, (command, seconds) in stages(out).items():
        if not args.stages or name in args.stages:
            left = max(1.0, min(seconds, end - time.monotonic()))
            found[name] = run(name, command, left, out)
            (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.make_archive(str(out / "all"), "gztar", out)
    ended = [
        stage["ended"] for stage in found.values() if isinstance(stage, dict) and "ended" in stage
    ]
    return 0 if all(e == "ok" for e in ended) else 1


if __name__ == "__main__":
    raise SystemExit(main())
