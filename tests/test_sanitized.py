"""Sanitizers watch the CPU kernels: they find a planted fault, and none in calls of some ops.

``make fuzz-sanitized`` and ``make threads-sanitized`` do the same with all families and many calls.
"""

import platform
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package

from bench.faults import sanitized

#: Few sources, as each takes long to compile.  Their calls met what was found so far: sums of the bits of bad numbers,
#: and of random words; margins of images that one thread cleared and another read.
FAMILIES = {"address": "preprocess", "thread": "preprocess;conv_network"}
#: A library of two levels is neither the wheel's, which has all, nor that of one, which chooses none.
LEVELS = {
    "address": "avx2" if platform.machine() == "x86_64" else "baseline",
    "thread": "baseline",
}
TARGETS = {
    "address": ["ops.add_noise", "ops.logit", "nn.Logit"],
    "thread": ["ops.add_noise", "ops.logit", "nn.Logit", "ops.conv_network"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sanitized.RUNTIMES)
def test_kernels_of_some_families_are_clean_and_a_planted_fault_is_found(kind):
    library = sanitized.build(kind, LEVELS[kind], FAMILIES[kind])
    sanitized.planted(kind, library)
    threads = ["--threads", "4"] if kind == "thread" else []
    found = sanitized.fuzz(kind, library, ["--cases", "24", "--targets", *TARGETS[kind], *threads])
    assert (found["cases"], found["findings"]) == (24, [])


def test_a_run_without_kernels_does_not_count(tmp_path, monkeypatch):
    """A folder without a library leaves plain PyTorch to be watched; a relative one is that of the caller."""
    with pytest.raises(RuntimeError, match="no pyflowkern kernels for cpu"):
        sanitized.planted("address", tmp_path)
    monkeypatch.chdir(tmp_path)
    found = sanitized.environment("address", Path("here"))["PYFLOWKERN_LIBRARY_DIR"]
    assert found == str(tmp_path / "here")
