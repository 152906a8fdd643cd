"""Every example in the documentation of ``pyflowkern.flows`` runs."""

import doctest
import importlib
import pkgutil

import pytest

from pyflowkern import flows

MODULES = ["pyflowkern.flows." + m.name for m in pkgutil.iter_modules(flows.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0


@pytest.mark.parametrize("name", flows.__all__)
def test_what_is_public_has_an_example(name):
    public = getattr(flows, name)
    if hasattr(public, "__module__") and public.__module__.startswith("pyflowkern.flows"):
        assert ">>>" in public.__doc__
