"""Memory of a training loop: once it runs, it asks the operating system for no more."""

import os
import subprocess
import sys
from pathlib import Path

import pyflowkern

FLOWS = {
    "MAF": "flows.MAF(43, hidden=(128, 128)), torch.randn(500, 43)",
    "NSF": "flows.NSF(6, transforms=3, hidden=(256, 256)), torch.randn(512, 6)",
    "Glow": "flows.Glow((3, 16, 16), levels=2, steps=2, hidden=32), torch.randn(16, 3, 16, 16)",
    "FFJORD": "flows.FFJORD(6, hidden=(64, 64)), torch.randn(500, 6)",
}
#: Prints the page faults of a step, whose tensors take some MiB: the fewest of three times five steps, as the heap may
#: grow once more.
LOOP = """
import resource, sys, torch, pyflowkern
from pyflowkern import flows

torch.manual_seed(0)
kept = sys.argv[1] == "keep" and pyflowkern.keep_memory()
for flow, x in ({}):
    optimizer = torch.optim.AdamW(flow.parameters(), fused=True)
    seen = []
    for i in range(30):
        if i >= 15 and i % 5 == 0:
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(int(kept), min(b - a for a, b in zip(seen, seen[1:])) / 5)
"""


def faults(keep, names):
    """Return whether memory is kept, and the page faults of a step of each flow, in a process of its own."""
    code = LOOP.format("".join(f"({FLOWS[name]})," for name in names))
    root = str(Path(pyflowkern.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, "keep" if keep else "leave"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return lines[0][0] == "1", [float(count) for _, count in lines]


def test_a_training_loop_meets_no_page_faults():
    kept, counts = faults(True, FLOWS)
    if kept:  # another C library than glibc is left alone
        assert max(counts) < 50, dict(zip(FLOWS, counts, strict=True))
        assert faults(False, ["NSF"])[1][0] > 100, "this flow has none anyway: it shows nothing"
