"""The rules of the house that a script can see."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "core")
ORDER = ["cli", "train", "flows", "nn", "ode", "ops", "core", "_library"]
#: On CUDA torch's own layers run: the products of a network as wide as a GPU wants are not ours to beat.
WITHOUT_CUDA = {"relu_network"}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stem_in_four_places(family):
    for path in (
        f"csrc/{family}/{family}.h",
        f"csrc/{family}/{family}_cpu.cpp",
        f"csrc/{family}/{family}_cuda.cu",
        f"pyflowkern/ops/{family}.py",
        f"tests/ops/test_{family}.py",
        f"bench/ops/{family}.py",
    ):
        wanted = not (path.endswith(".cu") and family in WITHOUT_CUDA)
        assert (ROOT / path).is_file() == wanted, f"{path}: missing, or no longer without CUDA"


def tracked(*patterns):
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in tracked("*.py", "*.cpp", "*.cu", "*.h", "*.cuh")
        if (n := len(p.read_text().splitlines())) > 450
    }
    assert not long


def test_imports_run_one_way():
    """cli -> train -> flows -> nn -> ode -> ops -> core -> _library, never back."""
    for i, low in enumerate(ORDER):
        files = tracked(f"pyflowkern/{low}/*.py", f"pyflowkern/{low}.py")
        for path in files:
            text = path.read_text()
            for high in ORDER[:i]:
                assert f"from pyflowkern.{high}" not in text, f"{path} imports {high}"


def test_the_core_needs_torch_alone():
    code = (
        "import sys; before = set(sys.modules); import torch; torch_needs = set(sys.modules)\n"
        "import pyflowkern; new = set(sys.modules) - torch_needs\n"
        "bad = {m.split('.')[0] for m in new} & {'lightning', 'typer', 'yaml', 'PIL', 'sklearn',"
        " 'skimage', 'matplotlib'}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
