"""The first seeds of every target; ``make fuzz`` runs many more, each in a process that may crash."""

import importlib
import inspect

import pytest

from fuzz.cases import TARGETS, run_case
from fuzz.modules import LEFT_OUT
from fuzz.ops import CALLS
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
