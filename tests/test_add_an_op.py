"""The worked example of docs/add_an_op.md compiles, and computes what PyTorch does."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/add_an_op.md").read_text()
FILES = dict(
    re.findall(r"^\*\*([\w/.]+)\*\*\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
)

#: What the process of the example does: values, gradients and second derivatives of the op itself.
CHECK = """
import importlib.util, sys
import torch
from pyflowkern import _library

folder, library = sys.argv[1:]

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

ops = load("pyflowkern.ops.asinh", "pyflowkern/ops/asinh.py")
torch.ops.load_library(library)
_library._served["cpu"] = _library._served.get("cpu", frozenset()) | {"asinh"}  # as loading does
called = []
op, ops._asinh = ops._asinh, lambda x: called.append(x) or op(x)
case = load("case", "tests/cases/asinh.py").CASES[0]
shapes = 0
for dtype in (torch.float32, torch.float64):
    for sample in case.samples(dtype):
        x = sample.tensors["x"].requires_grad_()
        results = [f(x) for f in (ops.asinh, ops.asinh_reference)]
        torch.testing.assert_close(*results)
        a, b = torch.randn(2, *x.shape, dtype=dtype)
        torch.testing.assert_close(*(
            torch.autograd.grad((y * a).sum() + (t * b).sum(), x) for y, t in results
        ))
        shapes += 1
assert shapes == len(called) == 12
x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradgradcheck(ops.asinh, x)
"""


def test_the_page_has_all_files_of_a_family():
    assert set(FILES) == {
        *(f"csrc/asinh/asinh{end}" for end in (".h", "_host.h", "_cpu.cpp")),
        *("pyflowkern/ops/asinh.py", "tests/cases/asinh.py", "bench/ops/asinh.py"),
    }
    for path, text in FILES.items():
        if path.endswith(".py"):
            compile(text, path, "exec")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_example_compiles_and_agrees_with_torch(tmp_path):
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    library = tmp_path / "libasinh.so"
    flags = re.findall(r"TORCH_TARGET_VERSION=\w+", (ROOT / "CMakeLists.txt").read_text())[:1]
    defined = ["PFK_SIMD_NAMESPACE=baseline", "PFK_SIMD_LEVEL=0", "PFK_SIMD_LEVELS=1", *flags]
    built = subprocess.run(
        [
            *("g++", "-std=c++20", "-fPIC", "-shared", "-O0", "-fno-math-errno"),
            *("-Wno-psabi", "-fno-trapping-math", "-fvisibility=hidden"),
            *(f"-D{name}" for name in defined),
            '-DPFK_VERSION="of the example"',
            *(f"-I{path}" for path in (tmp_path / "csrc", ROOT / "csrc")),
            *(part for path in include_paths() for part in ("-isystem", path)),
            *(str(tmp_path / "csrc/asinh/asinh_cpu.cpp"), str(ROOT / "csrc/core/simd.cpp")),
            *(f"-L{path}" for path in library_paths()),
            *("-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)),
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    paths = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + CHECK, str(tmp_path), str(library)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
