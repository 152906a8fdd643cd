"""What README.md shows runs, and its table of ops is the package's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench._summary import summary
from pyflowkern import ops

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
FUNCTIONS = {n for n in ops.__all__ if f"{n}_reference" in ops.__all__}


def lines(prefix):
    shell = "\n".join(body for kind, body in BLOCKS if kind == "sh").splitlines()
    return [shlex.split(line, comments=True) for line in shell if line.startswith(prefix)]


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"python", "sh"}
    known = [*lines("make "), *lines("pip "), *lines("pyflowkern ")]
    assert len(known) == sum(len(body.splitlines()) for kind, body in BLOCKS if kind == "sh")


def test_python_blocks_run_one_after_the_other():
    namespace = {}
    for kind, body in BLOCKS:
        if kind == "python":
            exec(compile(body, "README.md", "exec"), namespace)
    assert namespace["images"].shape == (4, 3, 32, 32)
    assert namespace["samples"].shape == (3, 5)
    assert namespace["log_det"].shape == (8,)
    assert namespace["draws"].shape == (1000, 6)
    assert namespace["states"].shape == (3, 3)


@pytest.mark.slow
def test_commands_run(tmp_path):
    for words in lines("pyflowkern "):
        if "--steps" in words:
            words[words.index("--steps") + 1] = "2"
        # the process of a wheel's script, less its name; -c leaves the package under test findable
        code = f"import sys; sys.argv = {words!r}; from pyflowkern.cli import main; main()"
        paths = [p for p in sys.path if p] + [str(Path(ops.__file__).parents[2])]
        code = f"import sys; sys.path = {paths!r}; " + code
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    assert (tmp_path / "digits.png").is_file()


def test_targets_exist():
    rules = (ROOT / "Makefile").read_text()
    for _, target in lines("make "):
        assert re.search(rf"^{target}:", rules, re.MULTILINE)


def test_table_of_ops():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|.*\| ([^|]*) \| ([^|]*) \|$", TEXT, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == FUNCTIONS
    for names, cpu, cuda in rows:
        if cpu == "none":
            continue
        for name in re.findall(r"`(\w+)`", names):
            family = getattr(ops, name).__module__.rpartition(".")[2]
            for said, suffix in ((cpu, "cpu.cpp"), (cuda, "cuda.cu")):
                exists = any(ROOT.glob(f"csrc/*/{family}_{suffix}"))
                assert said.startswith("yes") == exists, f"{name}: {said}"


def test_table_of_speed_is_that_of_the_committed_results():
    table = re.search(r"<!-- python -m bench summary -->\n(.*?)\n<!-- end -->", TEXT, re.DOTALL)
    assert table is not None
    assert table[1] == summary(ROOT / "bench/results/cpu-amd-epyc")
    pattern = r"<!-- python -m bench summary --device cuda -->\n(.*?)\n<!-- end -->"
    gpus = sorted((ROOT / "bench/results").glob("cuda-*"))
    assert re.search(pattern, TEXT, re.DOTALL)[1] == summary(next(iter(gpus), None))
