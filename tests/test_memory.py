"""Memory of a training loop: once it runs, it asks the operating system for no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyflowkern

FLOWS = {
    "MAF": "flows.MAF(43, hidden=(256, 256)), torch.randn(500, 43)",
    "NSF": "flows.NSF(20, hidden=(64, 64)), torch.randn(2048, 20)",
    "Glow": "flows.Glow((3, 16, 16), levels=2, steps=2, hidden=32), torch.randn(16, 3, 16, 16)",
    "FFJORD": "flows.FFJORD(6, hidden=(64, 64)), torch.randn(500, 6)",
}
#: Prints the page faults of a step, whose tensors take some MiB.
LOOP = """
import resource, sys, torch, pyflowkern
from pyflowkern import flows

torch.manual_seed(0)
kept = pyflowkern.keep_memory()
for flow, x in ({}):
    optimizer = torch.optim.AdamW(flow.parameters(), fused=True)
    for i in range(30):
        if i == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    print(int(kept), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.fixture(scope="module")
def faults():
    """Return whether memory is kept and the page faults of a step, for each flow."""
    code = LOOP.format(", ".join(f"({flow})" for flow in FLOWS.values()))
    root = str(Path(pyflowkern.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (kept == "1", float(n)) for name, (kept, n) in zip(FLOWS, lines, strict=True)}


@pytest.mark.parametrize("name", FLOWS)
def test_a_training_loop_meets_no_page_faults(faults, name):
    kept, count = faults[name]
    assert not kept or count < 50  # another allocator than glibc's is left alone
