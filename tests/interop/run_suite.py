"""Run a library's own test suite with the instances of its classes accelerated.

``python tests/interop/run_suite.py CHECKOUT [arguments of pytest]``: a checkout of nflows, zuko, normflows or FrEIA, or
its unpacked source distribution.  The package in it is the one that is tested.  Each test begins with the same random
numbers both times, so that any difference between the two runs is a fault, of tests that fail without acceleration,
too.  Exit status: 0 where there is no difference, 1 where there is one, 2 where nothing passed or no op ever ran.
"""

import contextlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyflowkern
from pyflowkern.interop._doors import MethodDoor

#: Where suites lie in checkouts; those of other libraries lie beside what they test.
SUITE = "tests"


class Outcomes:
    """Which tests passed and which failed, and which of them ran an op in the place of a method."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.by_ops: set[str] = set()
        self._test = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin each test with the same random numbers."""
        self._test = item.nodeid
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test; one fails where any phase of it does."""
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    @contextlib.contextmanager
    def watch_doors(self) -> Any:
        """Within it, note the tests in which a door did not call the library's method."""
        call, own = MethodDoor.__call__, MethodDoor.own
        called: list[int] = []

        def noted_call(door: MethodDoor, *args: Any, **kwargs: Any) -> Any:
            called.append(0)
            try:
                result = call(door, *args, **kwargs)
                if not called[-1]:
                    self.by_ops.add(self._test)
                return result
            finally:
                called.pop()

        def noted_own(door: MethodDoor, *args: Any, **kwargs: Any) -> Any:
            if called:
                called[-1] += 1
            return own(door, *args, **kwargs)

        MethodDoor.__call__, MethodDoor.own = noted_call, noted_own  # type: ignore[method-assign]
        try:
            yield
        finally:
            MethodDoor.__call__, MethodDoor.own = call, own  # type: ignore[method-assign]


def run(checkout: Path, *arguments: str) -> Outcomes:
    """Run the tests of a checkout."""
    outcomes = Outcomes()
    suite = checkout / SUITE
    folder = suite if suite.is_dir() else checkout
    options = ["-q", "--tb=no", "--no-summary", "-p", "no:cacheprovider", f"--rootdir={checkout}"]
    with outcomes.watch_doors():
        status = pytest.main([str(folder), *options, *arguments], plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"{checkout}: the suite did not run: {status!r}")
    outcomes.passed -= outcomes.failed
    return outcomes


def main(place: str, *arguments: str) -> int:
    """Run a suite as it is and accelerated, say what differs, and return the exit status."""
    checkout = Path(place).resolve()
    sys.path.insert(0, str(checkout))
    plain = run(checkout, *arguments)
    with pyflowkern.accelerate():
        fast = run(checkout, *arguments)
    print(f"{checkout.name}:")
    for name, outcomes in (("as it is", plain), ("accelerated", fast)):
        print(f"  {name:11}: {len(outcomes.passed)} passed, {len(outcomes.failed)} failed")
    print(f"  tests that ran ops: {len(fast.by_ops)}")
    lost, gained = (sorted(a.passed - b.passed) for a, b in ((plain, fast), (fast, plain)))
    for what, tests in (("only as it is", lost), ("only accelerated", gained)):
        for test in tests:
            print(f"  passed {what}: {test}")
    if not plain.passed or not fast.by_ops:
        return 2
    return 1 if lost or gained else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
