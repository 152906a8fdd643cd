"""The soak tells a process that grows from one that does not (bench/faults/soak.py)."""

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package
from bench.faults import soak as module


def test_slope_of_a_line_and_its_interval():
    times = [i / 60 for i in range(10 * module.BLOCKS)]
    rate, half = module.slope(times, [3 * t + 5 for t in times])
    assert rate == pytest.approx(3)
    assert half == pytest.approx(0, abs=1e-9)
    waves = [(-1) ** (i // 10) for i in range(len(times))]  # a block above, a block below
    rate, half = module.slope(times, waves)
    assert abs(rate) < half


def test_a_leak_is_found(monkeypatch):
    kept = []

    def leaks(draw, only=None):
        kept.append(bytearray(2**16))
        time.sleep(0.005)
        return "leak"

    monkeypatch.setattr(module, "_round", leaks)
    # of all tests' objects, which takes longer than the time between two looks
    monkeypatch.setattr(module.gc, "collect", lambda: 0)
    found = module.soak(0.1, every=0.02)
    rate, half = found["mib_per_hour"]
    assert rate - half > 0
    assert found["rounds"] == {"leak": len(kept)}


def test_too_short_a_soak_says_so(monkeypatch):
    monkeypatch.setattr(module, "_round", lambda draw, only=None: "nothing")
    with pytest.raises(ValueError, match="minutes must give 24 looks after warming up, got 0"):
        module.soak(0.001)
