"""The wheel, installed without a compiler: CPU kernels or the reference, and show_config() says which."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def newest(paths):
    return max((p.stat().st_mtime for p in paths), default=0.0)


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Return the wheel in dist/ if it is newer than its sources, else build one, without CUDA to save time."""
    sources = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    sources += [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    sources += [p for p in (ROOT / "pyflowkern").rglob("*.py") if p.is_file()]
    built = sorted((ROOT / "dist").glob("pyflowkern-*.whl"), key=lambda p: p.stat().st_mtime)
    if built and built[-1].stat().st_mtime > newest(sources):
        return built[-1]
    out = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for ninja, cmake
    run(*pip, ROOT, "-w", out, env={"PYFLOWKERN_CUDA": "OFF"} | os.environ | {"PATH": path})
    return next(out.glob("pyflowkern-*.whl"))


@pytest.fixture(scope="session")
def bare(wheel, tmp_path_factory):
    """Return a function that runs Python code in a new environment: the wheel, torch, and no tool on the PATH."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-index"]
    run(*pip, "--no-deps", wheel)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # after the environment's own packages, so that its pyflowkern is found first
    (Path(purelib) / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # neither compilers nor the variables of this process
    clean = {"PATH": str(folder / "bin"), "HOME": str(folder), "PFK_HERE": str(folder)}

    def execute(code, **variables):
        return run(python, "-c", code, cwd=folder, env=clean | variables)

    return execute


def test_what_the_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "pyflowkern/py.typed" in names
    assert "pyflowkern/lib/libpyflowkern_cpu.so" in names
    assert "pyflowkern/lib/libpyflowkern_schemas.so" in names  # for exported programs
    assert any(re.fullmatch(r"pyflowkern/_C\..*so", name) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (bill,) = (name for name in names if name.endswith(".dist-info/sboms/pyflowkern.cdx.json"))
    inside = {c["name"] for c in json.loads(zipfile.ZipFile(wheel).read(bill))["components"]}
    assert {"torch", "pybind11"} <= inside
    assert ("cudart" in inside) == ("pyflowkern/lib/libpyflowkern_cuda.so" in names)
    for name in names:
        assert name.startswith(("pyflowkern/", "pyflowkern-")), name
        assert not name.endswith((".cpp", ".cu", ".h", ".cuh", ".txt")) or ".dist-info/" in name
        assert not re.search(r"(^|/)((tests?|bench)/|test_|conftest)", name), name
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "pyflowkern").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


# Each family once: compares with the reference, and prints for each op what has computed it.
COMPUTE = """
import os, shutil, pathlib, torch, pyflowkern
from torch.utils._python_dispatch import TorchDispatchMode
from pyflowkern import flows, ops, use_reference

assert pathlib.Path(os.environ["PFK_HERE"]) in pathlib.Path(pyflowkern.__file__).parents
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "nvcc", "cmake", "ninja")))

class Ran(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyflowkern":
            names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))

torch.manual_seed(0)
x, p = torch.randn(3, 6, 8, 8), torch.randn(3, 6, 8, 8)
u, b, w = torch.randn(6), torch.randn(6), torch.linalg.qr(torch.randn(6, 6)).Q
mean = torch.zeros(6, 8, 8)
calls = {
    "affine_coupling": lambda: ops.affine_coupling(x, p),
    "affine": lambda: ops.affine(x, p, p),
    "actnorm": lambda: ops.actnorm(x, u, b),
    "linear_mix": lambda: ops.glow_step(x, u, b, w, torch.tensor(0.0)),
    "logit": lambda: ops.logit(torch.sigmoid(x)),
    "normal_log_prob": lambda: (ops.normal_log_prob(x, mean, mean),),
}
for op, call in calls.items():
    names = []
    with Ran():
        ours = call()
    by_kernel = names == [op]
    names = []
    with Ran(), use_reference():
        theirs = call()
    assert not names
    for a, c in zip(ours, theirs):  # both float32, sums of 384 terms of order one
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-3)
    print(op, "kernel" if by_kernel else "reference")

flow = flows.Glow((3, 8, 8), levels=2, steps=1, hidden=8, bits=8)
pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
loss = flow.bits_per_dim(pixels).mean()
loss.backward()
assert torch.isfinite(loss) and torch.isfinite(flow.sample(2)).all()
"""


#: What is printed after the results, or in their place.
PAGE = "print('---')\nprint(pyflowkern.show_config())\nprint('---')\n"
LOADED = "print('libpyflowkern' in open('/proc/self/maps').read())\n"
ASK = """
from pyflowkern._library import require_kernels
try:
    require_kernels()
except RuntimeError as error:
    print(error)
"""
COMMAND = """
import sys
sys.argv = ["pyflowkern", "info"]
from pyflowkern.cli import main
main()
"""


# One process for each setting: to start one takes seconds.
@pytest.fixture(scope="session")
def kernels(bare):
    """Return by what each op was computed, and the page of facts."""
    results, page, _ = bare(COMPUTE + PAGE).split("---\n")
    return dict(line.split() for line in results.splitlines()), page


@pytest.fixture(scope="session")
def disabled(bare):
    """Return the same without kernels, and what is said of libraries and of kernels that are asked for."""
    found = bare(COMPUTE + PAGE + LOADED + ASK, PYFLOWKERN_DISABLE_KERNELS="1")
    results, page, rest = found.split("---\n")
    return dict(line.split() for line in results.splitlines()), page, rest.splitlines()


def test_the_build_facts_and_the_libraries_agree(wheel, kernels):
    compiled = not re.search(r"^CUDA: none$", kernels[1], re.MULTILINE)
    assert compiled == (
        "pyflowkern/lib/libpyflowkern_cuda.so" in zipfile.ZipFile(wheel).namelist()
    )


def test_kernels_without_a_compiler(kernels):
    served, page = kernels
    assert set(served.values()) == {"kernel"}, served
    assert re.search(
        r"^cpu: kernels \((baseline|avx2|avx512)\) from .*libpyflowkern_cpu.so$", page, re.M
    )
    for op in served:
        assert re.search(rf"^  kernels for .*\b{op}\b", page, re.M)


def test_disabled_kernels(disabled):
    served, page, (loaded, _) = disabled
    assert len(served) == 6
    assert set(served.values()) == {"reference"}, served
    for device in ("cpu", "cuda"):
        assert f"{device}: reference, because PYFLOWKERN_DISABLE_KERNELS=1 is set" in page
    assert "kernels for" not in page
    assert loaded == "False"


def test_asking_for_disabled_kernels_says_why(disabled):
    message = disabled[2][1]
    assert (
        "no pyflowkern kernels for cpu: PYFLOWKERN_DISABLE_KERNELS=1 is set; unset it" in message
    )


def test_the_command_line_runs_and_a_zero_disables_nothing(bare):
    code = f"import pyflowkern\n{LOADED}{COMMAND}"
    loaded, *page = bare(code, PYFLOWKERN_DISABLE_KERNELS="0").splitlines()
    assert loaded == "True"
    assert "pyflowkern" in page[0]
    assert any(line.startswith("cpu: kernels (") for line in page)
