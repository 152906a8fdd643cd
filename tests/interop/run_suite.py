"""Run a library's own test suite with the instances of its classes accelerated.

``python tests/interop/run_suite.py FOLDER [arguments of pytest]``, where the folder is that of the suite, as it lies in
a checkout of the library or in its source distribution.  Tests that fail without are run, too, and are not counted:
what is asked is whether any fails that passed before.  Exit status: 0 where none does, 1 where one does.
"""

import sys

import pytest

import pyflowkern


class Outcomes:
    """Which tests passed."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test; one fails where any phase of it does."""
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)


def run(folder: str, *arguments: str) -> set[str]:
    """Return the tests of a folder that pass."""
    outcomes = Outcomes()
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
    status = pytest.main([folder, *options], plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"{folder}: the suite did not run: {status!r}")
    return outcomes.passed - outcomes.failed


def main(folder: str, *arguments: str) -> int:
    """Run a suite as it is and accelerated; return whether tests fail that passed before."""
    before = run(folder, *arguments)
    with pyflowkern.accelerate():
        after = run(folder, *arguments)
    lost = sorted(before - after)
    print(f"{len(before)} tests pass as they are, {len(after)} accelerated; lost: {len(lost)}")
    for test in lost:
        print(f"  {test}")
    return bool(lost)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
