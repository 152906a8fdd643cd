"""``make gpu`` as far as it can be tested without a GPU: stages, time limits, and messages."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package

from bench import __main__ as bench_main
from bench import gpu

ROOT = Path(__file__).resolve().parents[1]


def test_the_stages_fit_ten_minutes():
    stages = list(gpu.stages(Path("out")).values())
    assert sum(s.least for s in stages) <= 9.5 * 60
    left = 9.5 * 60
    for i, stage in enumerate(stages):  # each takes all the time that it is allowed
        seconds = gpu.allowed(stage, stages[i + 1 :], left)
        assert stage.least <= seconds <= stage.most
        left -= seconds
    assert left >= 0


def test_every_command_can_be_parsed(monkeypatch):
    for stage in gpu.stages(Path("out")).values():
        if stage.command[1:3] == ["-m", "bench"]:
            monkeypatch.setattr(sys, "argv", ["bench", *stage.command[3:]])
            assert bench_main.arguments().family in ("all", "small_flows", "steps", "cuda-report")


def gpu_tests(config):
    """Return the names of all tests that need a GPU: this process knows them, if it has collected every file."""
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    if files <= config.collected:
        return config.gpu_tests
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_no_test_that_needs_a_gpu_is_left_out(pytestconfig):
    assert all((ROOT / place).exists() for place in gpu.TESTS)
    found = [name.partition("::")[0] for name in gpu_tests(pytestconfig)]
    assert len(found) > 100
    for file in {Path(name) for name in found}:
        assert {str(place) for place in (file, *file.parents)} & {*gpu.TESTS}, file


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: it would run")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make gpu: " in done.stderr
    assert "CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_stage_that_is_cut_off_dies_with_its_children(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = gpu.run("stage", [sys.executable, "-c", parent], 1, tmp_path)
    assert found["ended"] == "cut off after 1 s"
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_a_missing_command_is_reported(tmp_path):
    assert "not run" in str(gpu.run("stage", ["no-such-program"], 1, tmp_path)["ended"])
    bad = gpu.run("stage", [sys.executable, "-c", "raise SystemExit(3)"], 20, tmp_path)
    assert bad["ended"] == "exit status 3"
