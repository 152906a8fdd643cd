"""Every example in the documentation of ``pyflowkern.nn`` runs."""

import doctest
import importlib
import pkgutil

import pytest

from pyflowkern import nn

MODULES = ["pyflowkern.nn." + m.name for m in pkgutil.iter_modules(nn.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0


@pytest.mark.parametrize("name", nn.__all__)
def test_what_is_public_has_an_example(name):
    public = getattr(nn, name)
    if hasattr(public, "__module__") and public.__module__.startswith("pyflowkern.nn"):
        assert ">>>" in public.__doc__
