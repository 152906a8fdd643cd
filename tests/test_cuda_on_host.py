"""Sanitizers find no fault in the CUDA kernels compiled for the host, and do find planted ones."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import on_host
import pytest

RUNTIME = {"thread": "libtsan.so", "address": "libasan.so"}
COMPLAINT = {"thread": "data race", "address": "(heap|global)-buffer-overflow"}


def exercise(variant, library, *families):
    """Run the kernels of some families in a separate process, under a sanitizer."""
    name = RUNTIME[variant]
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip()).resolve()
    assert runtime.is_file(), f"the compiler has no {name}"
    environment = os.environ | {
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
    }
    # sanitizers need fixed parts of the address space, which randomization might occupy
    command = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    script = on_host.SOURCES / "exercise.py"
    return subprocess.run(
        [*command, sys.executable, str(script), str(library), *families],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


#: By sanitizer and family: a file, a pattern in it, and what replaces its first match.
MISTAKES = {
    "thread": {
        "actnorm": (  # a barrier removed
            "actnorm/actnorm_cuda.cu",
            r"__syncthreads\(\);\s+(if \(w\.member\(\) < half\))",
            r"\1",
        ),
        "field": (  # a barrier between two uses removed
            "field/field_fused.cuh",
            r"__syncthreads\(\);\s+(if \(c >= y.out\))",
            r"\1",
        ),
    },
    "address": {  # one element too far
        "actnorm": ("actnorm/actnorm_cuda.cu", r"e < elements;", "e <= elements;")
    },
}


def planted(tmp_path, mistakes):
    """Return a copy of csrc with a mistake in each family."""
    copy = tmp_path / "csrc"
    shutil.copytree(on_host.ROOT / "csrc", copy)
    for file, old, new in mistakes.values():
        text, found = re.subn(old, new, (copy / file).read_text(), count=1)
        assert found, f"{file} holds no {old}"
        (copy / file).write_text(text)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("variant", RUNTIME)
def test_kernels_are_clean(variant):
    done = exercise(variant, on_host.build(variant))
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("variant", MISTAKES)
def test_a_planted_mistake_is_found(tmp_path, variant):
    """All of a sanitizer in one library: headers take longer to compile than some families."""
    mistakes = MISTAKES[variant]
    copy = planted(tmp_path, mistakes)
    families = ";".join(mistakes)
    library = on_host.build(variant, name="planted", CSRC=str(copy), FAMILIES=families)
    for family in mistakes:
        done = exercise(variant, library, family)
        assert done.returncode != 0, family
        assert re.search(COMPLAINT[variant], done.stderr), family
