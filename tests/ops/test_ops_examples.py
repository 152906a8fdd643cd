"""Every example in the documentation of ``pyflowkern.ops`` runs."""

import doctest
import importlib
import pkgutil

import pytest

from pyflowkern import ops

MODULES = ["pyflowkern.ops." + m.name for m in pkgutil.iter_modules(ops.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0
