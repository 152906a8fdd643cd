"""``make gpu``: build from source, test, sanitize and measure on the GPU of this machine.

Everything is written to one folder: ``summary.json`` with a description of the machine and how each stage ended, a log
for each stage, and the results of the benchmarks, to be committed under bench/results/ after a look at them.  The
stages share ten minutes.  A stage that runs out of its time is cut off and reported, so that each later one gets the
time that it needs at least.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXERCISE = ["tests/cuda_on_host/exercise.py", "cuda"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: The tests that need a GPU; other folders need packages that this machine may lack.
TESTS = (
    *("tests/core", "tests/ops", "tests/ode", "tests/transport", "tests/test_gpu.py"),
    *("tests/nn", "tests/flows/test_laws.py", "tests/flows/test_chunks.py"),
)
#: Modules that the stages import, and the packages that have them.
PACKAGES = {
    "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
    "ninja": "ninja",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
}


@dataclass(frozen=True)
class Stage:
    """A command, the seconds that it may take at most, and those that earlier stages must leave for it."""

    command: list[str]
    most: float
    least: float


def stages(out: Path) -> dict[str, Stage]:
    """Return the stages in their order."""
    python = sys.executable
    pip, bench = [python, "-m", "pip", "install", "-q"], [python, "-m", "bench"]
    watch = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9"]
    results = ["--quick", "--out", str(out / "results")]
    graphs = ["--graphs", "--quick", "--case", "step ", "--out", str(out / "graphs")]
    return {
        "build": Stage(
            [*pip, "--no-build-isolation", "--no-deps", "--force-reinstall", "."],
            240,
            90,
        ),
        "tests": Stage([python, "-m", "pytest", "-q", "-m", "gpu", "-n", "4", *TESTS], 150, 40),
        **{
            f"sanitizer-{tool}": Stage([*watch, "--tool", tool, python, *EXERCISE], 60, 20)
            for tool in TOOLS
        },
        "report": Stage([*bench, "cuda-report"], 60, 20),
        "steps": Stage([*bench, "steps", "--device", "cuda", "--out", str(out)], 120, 40),
        "graphs": Stage([*bench, "small_flows", "--device", "cuda", *graphs], 90, 30),
        "bench": Stage([*bench, "all", "--device", "cuda", *results], 300, 120),
    }


def missing() -> list[str]:
    """Return one line for each thing that this machine or this Python lacks; none if everything can run."""
    found: list[str] = []
    if importlib.util.find_spec("torch") is None:
        return [f"{sys.executable} has no torch; name a Python that has it: make gpu PYTHON=..."]
    import torch

    if torch.version.cuda is None:
        found.append(
            f"torch {torch.__version__} of {sys.executable} was built without CUDA; "
            "name a Python whose torch has CUDA: make gpu PYTHON=..."
        )
    elif not torch.cuda.is_available():
        found.append(f"torch {torch.__version__} sees no CUDA device (look at nvidia-smi)")
    absent = [package for name, package in PACKAGES.items() if not _has(name)]
    if absent:
        found.append(f"{sys.executable} -m pip install {' '.join(absent)}")
    if shutil.which("cmake") is None and not _has("cmake"):
        found.append(f"{sys.executable} -m pip install cmake")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file():
        found.append("no nvcc on the PATH: install the CUDA toolkit, or add its bin folder")
    return found


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None or shutil.which(name) is not None


def allowed(stage: Stage, later: list[Stage], left: float) -> float:
    """Return the seconds of a stage: what is left, minus what the later ones need at least."""
    return max(1.0, min(stage.most, left - sum(s.least for s in later)))


def run(name: str, command: list[str], seconds: float, out: Path) -> dict[str, object]:
    """Run one stage with its output in a log; kill it with all its children when its time is over."""
    begin = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            ended = f"not run: {error}"
        else:
            try:
                code = process.wait(seconds)
                ended = "ok" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                ended = f"cut off after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    print(f"{name}: {ended} ({time.monotonic() - begin:.0f} s)", flush=True)
    return {"ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def use_what_was_built() -> None:
    """Make the later stages load the libraries that the build installed, not others in the source tree."""
    try:
        place = metadata.distribution("pyflowkern").locate_file("pyflowkern/lib")
    except metadata.PackageNotFoundError:
        return
    if Path(str(place)).is_dir():
        os.environ["PYFLOWKERN_LIBRARY_DIR"] = str(place)


def facts() -> dict[str, object]:
    """Return a description of the machine: device, driver, torch, CUDA and commit."""
    import torch

    from bench import _environment

    properties = torch.cuda.get_device_properties(0)
    return {
        **_environment.describe(torch.device("cuda")),
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages together")
    parser.add_argument("--stages", nargs="+", default=[], help="these only")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and run none")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if unknown := set(args.stages) - set(stages(args.out)):
        parser.error(f"no such stages: {', '.join(sorted(unknown))}")
    return args


def run_all(chosen: Mapping[str, Stage], out: Path, minutes: float) -> bool:
    """Run the stages, write the summary after each; return whether all succeeded."""
    found: dict[str, object] = {"machine": facts()}
    print(json.dumps(found["machine"]), flush=True)
    end, good = time.monotonic() + 60 * minutes, True
    for i, (name, stage) in enumerate(chosen.items()):
        seconds = allowed(stage, list(chosen.values())[i + 1 :], end - time.monotonic())
        found[name] = result = run(name, stage.command, seconds, out)
        good = good and result["ended"] == "ok"
        if name == "build":
            use_what_was_built()
        (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    return good


def main() -> int:
    args = arguments()
    chosen = {
        name: stage
        for name, stage in stages(args.out).items()
        if not args.stages or name in args.stages
    }
    if args.dry_run:
        for name, stage in chosen.items():
            print(f"{name} ({stage.least:.0f} to {stage.most:.0f} s): {shlex.join(stage.command)}")
        return 0
    if lacking := missing():
        print("\n".join(f"make gpu: {line}" for line in lacking), file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    good = run_all(chosen, args.out, args.minutes)
    shutil.make_archive(str(args.out.parent / f"{args.out.name}-all"), "gztar", args.out)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
