"""The first seeds of every target; ``make fuzz`` runs many more, each in a process that may crash."""

import importlib
import inspect
import itertools
import sys

import pytest
import torch

from fuzz import __main__ as main
from fuzz import check, threads
from fuzz.call import Call
from fuzz.cases import TARGETS, run_case
from fuzz.check import Finding
from fuzz.modules import LEFT_OUT
from fuzz.ops import CALLS
from fuzz.threads import Threads
from pyflowkern import flows, nn, ops


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore")  # of hostile numbers
def test_random_calls_obey_the_rules(target):
    for seed in range(24):
        run_case(target, seed)


def test_everything_public_is_a_target():
    public = {n for n in ops.__all__ if f"{n}_reference" in ops.__all__}
    assert public <= set(CALLS)
    for name in set(CALLS) - public:  # ops that layers alone call
        assert hasattr(importlib.import_module(f"pyflowkern.ops.{name}"), f"{name}_reference")
    classes = {
        f"{name}.{n}"
        for name, package in (("nn", nn), ("flows", flows))
        for n in package.__all__
        if inspect.isclass(getattr(package, n))
    }
    assert classes - set(TARGETS) == LEFT_OUT


@pytest.mark.parametrize("target", ["ops.affine", "ops.chain", "nn.SplineCoupling", "flows.MAF"])
@pytest.mark.filterwarnings("ignore")
def test_several_threads_find_what_one_finds(target):
    run = Threads(4)
    for seed in range(6):
        run(target, seed)


def test_a_result_that_depends_on_other_threads_is_found(monkeypatch):
    calls = itertools.count()
    spoilt = [lambda: [torch.full((), float(next(calls) < 4))]]  # the four threads, then one alone
    monkeypatch.setattr(threads, "functions", lambda target, seed: spoilt)
    with pytest.raises(Finding, match="finds other numbers"):
        Threads(4)("ops.affine", 0)


def test_without_comparisons_only_errors_of_another_kind_are_findings(monkeypatch):
    monkeypatch.setattr(check, "use_reference", None)  # would raise
    for target in ("ops.affine", "ops.spline", "nn.ActNorm", "flows.RealNVP"):
        for seed in range(6):
            run_case(target, seed, crashes_only=True)
    monkeypatch.setitem(CALLS, "affine", lambda draw: Call(lambda x: 1 / 0, {"x": draw.tensor(2)}))
    for seed in range(3):
        with pytest.raises(Finding, match="ZeroDivisionError"):
            run_case("ops.affine", seed, crashes_only=True)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("os.abort()", ["flows.MAF 0 ended its process (-6)"]),
        ("time.sleep(60)", ["flows.MAF 0 ended its process (-14)"]),
    ],
    ids=["a crash", "a hang"],
)
def test_a_case_that_ends_its_process_is_found_and_the_next_ones_run(tmp_path, body, wanted):
    """By a stand-in for the worker, that prints what it prints."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "for case in range(*map(int, sys.argv[2:])):\n"
        "    print('case', case, ('nn.MLP', 'flows.MAF')[case % 2], case // 2, flush=True)\n"
        "    signal.alarm(1)\n"
        f"    if case == 1: {body}\n"
    )
    found = main.supervise([sys.executable, str(script)], range(6), 60)
    assert found == (wanted, 6)
