"""What makes a release: the source archive and its messages, the bill of materials, the workflows, the repair."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CODE = "compute_80,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


# ---- the source archive --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return the unpacked sdist."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = (p for p in folder.iterdir() if p.is_dir())
    return unpacked


def configure(sources, folder, *options, python=sys.executable):
    """Run CMake's first step, which decides what is built; compiling takes minutes."""
    command = ["cmake", "-S", sources, "-B", folder, "-G", "Ninja"]
    options = [f"-D{option}" for option in (f"Python_EXECUTABLE={python}", *options)]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=os.environ | {"PATH": TOOLS}
    )


def hidden():
    """Return the option that hides nvcc, wherever it is."""
    folders = {f for f in TOOLS.split(os.pathsep) if (Path(f) / "nvcc").exists()}
    return f"CMAKE_IGNORE_PATH={';'.join(sorted(folders | {'/usr/local/cuda/bin'}))}"


def test_the_source_archive_is_whole(sources):
    """All that is compiled or installed, and no results or pictures."""
    for path in [*ROOT.glob("csrc/**/*"), *ROOT.glob("pyflowkern/**/*.py")]:
        if path.is_file() and "__pycache__" not in path.parts:
            assert (sources / path.relative_to(ROOT)).is_file(), path
    size = sum(path.stat().st_size for path in sources.rglob("*") if path.is_file())
    assert size < 20e6
    assert not list(sources.glob("pyflowkern/lib/*.so"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "works", "message"),
    [
        (["PYFLOWKERN_CUDA=OFF"], True, "without CUDA kernels, because PYFLOWKERN_CUDA=OFF"),
        (["PYFLOWKERN_CUDA=AUTO", None], True, "without CUDA kernels, because nvcc was not found"),
        (["PYFLOWKERN_CUDA=ON", None], False, "PYFLOWKERN_CUDA=ON, but nvcc is neither on the"),
    ],
)
def test_the_source_archive_says_what_it_builds(sources, tmp_path, options, works, message):
    options = [option or hidden() for option in options]
    done = configure(sources, tmp_path, *options)
    said = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == works, said
    assert message in said
    assert works == (tmp_path / "build.ninja").exists()
    if works:
        assert "pyflowkern_cuda" not in (tmp_path / "build.ninja").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_source_archive_with_nvcc(sources, tmp_path):
    done = configure(sources, tmp_path, "PYFLOWKERN_CUDA=ON", f"PYFLOWKERN_CUDA_CODE={CODE}")
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "build.ninja").read_text()
    assert f"code=[{CODE}]" in rules
    assert "cudart_static" in rules


@pytest.mark.slow
def test_a_build_without_torch_says_so(sources, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare/bin/python"
    done = configure(sources, tmp_path / "build", "PYFLOWKERN_CUDA=OFF", python=python)
    assert done.returncode != 0
    assert "Install torch>=2.11 first" in " ".join(done.stderr.split())


# ---- the bill of materials --------------------------------------------------------------------------------------
@pytest.mark.parametrize("cuda", ["", "13.0.88"])
def test_bill_of_materials(tmp_path, cuda):
    """CycloneDX: what is inside is named, and every reference leads to something."""
    path = tmp_path / "bill.json"
    facts = ["--version", "1.2.3", "--torch", "2.13.0+cpu", "--pybind11", "3.1.0"]
    facts += ["--compiler", "GNU 12.2.0"]
    command = [sys.executable, ROOT / "csrc/sbom.py", path, *facts, "--cuda", cuda]
    subprocess.run(command, check=True)
    bill = json.loads(path.read_text())
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    ours = bill["metadata"]["component"]
    assert (ours["purl"], ours["version"]) == ("pkg:pypi/pyflowkern@1.2.3", "1.2.3")
    assert bill["metadata"]["tools"]["components"][0]["version"] == "12.2.0"
    inside = {part["name"]: part["version"] for part in bill["components"]}
    headers = {"torch": "2.13.0", "pybind11": "3.1.0"}
    assert inside == headers | ({"cudart": cuda} if cuda else {})
    known = {part["bom-ref"] for part in [ours, *bill["components"]]}
    assert {link["ref"] for link in bill["dependencies"]} == known
    assert set(bill["dependencies"][0]["dependsOn"]) == known - {ours["bom-ref"]}


# ---- the workflows ------------------------------------------------------------------------------------------------
def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_are_pinned_and_may_do_little(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert True in workflow  # YAML 1.1 reads the key "on" so
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:  # by commit, which nobody can move; a comment names the release
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
            assert re.search(rf"{re.escape(step['uses'])} # v\d+\.\d+\.\d+$", text, re.MULTILINE)
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        # names of branches and tags are text of strangers: they reach a shell as variables alone
        assert "${{" not in step.get("run", "")
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 240
        if "permissions" in job:  # writes what a tag, and no pull request, has made
            assert job["if"] == "startsWith(github.ref, 'refs/tags/v')"


def test_wheels_are_built_tested_attested_and_kept():
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())
    jobs = workflow["jobs"]
    used = [step.get("uses", "").partition("@")[0] for step in steps(workflow)]
    assert {"pypa/cibuildwheel", "actions/attest-build-provenance"} <= set(used)
    assert used.count("actions/upload-artifact") == 2
    assert set(jobs["release"]["needs"]) == {"wheels", "sdist"}
    pythons = jobs["wheels"]["strategy"]["matrix"]["python"]
    built = (ROOT / "pyproject.toml").read_text()
    assert f"build = {json.dumps([f'{python}-*' for python in pythons])}" in built
    made = len(pythons) * len(jobs["wheels"]["strategy"]["matrix"]["runner"]) + 1
    assert any(f'wc -l)" = {made}' in step.get("run", "") for step in jobs["release"]["steps"])
    assert jobs["release"]["permissions"] == {
        "attestations": "write",
        "contents": "write",
        "id-token": "write",
    }


def test_audit_reads_the_pins():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    commands = [step.get("run", "") for step in steps(workflow)]
    assert "pip-audit --disable-pip --no-deps --requirement constraints.txt" in commands
    assert ".ci/run" in commands


def test_settings_of_the_wheels_name_files_that_exist():
    text = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"\{project\}/([\w./]+)", text):
        assert (ROOT / name).is_file(), name
    for minor in range(10, 15):
        assert f'"cp3{minor}-*"' in text
    # the same machine code in both ways to a release
    assert text.count(CODE) == 1
    assert CODE in (ROOT / "Makefile").read_text()


# ---- the repair ---------------------------------------------------------------------------------------------------
def test_versions_of_symbols_are_compared_as_numbers():
    sys.path.append(str(ROOT / "release"))
    try:
        import repair
    finally:
        sys.path.remove(str(ROOT / "release"))
    limits = repair.MANYLINUX_2_28
    assert repair.newer_than({"GLIBC_2.9", "GLIBC_2.28", "GLIBCXX_3.4.9"}, limits) == []
    assert repair.newer_than({"GLIBC_2.29", "GLIBCXX_3.4.26"}, limits) == [
        "GLIBCXX_3.4.26",
        "GLIBC_2.29",
    ]
    for name in ("libcudart.so.13", "libcuda.so.1", "libgomp.so.1", "libcublas.so.13"):
        assert not repair.TORCH.fullmatch(name)
        assert not repair.SYSTEM.fullmatch(name)
    for name in ("libtorch_cpu.so", "libtorch.so", "libc10.so"):
        assert repair.TORCH.fullmatch(name)
