"""Every example in the docstrings runs, and every public name has one."""

import doctest
import importlib
import pkgutil

import pytest

from pyflowkern import estimation, flows, nn, ode, ops, testing, transport

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (ops, ode, nn, flows, testing, transport, estimation)
    for module in pkgutil.iter_modules(package.__path__)
]
PUBLIC = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package in (ops, nn, flows, testing, transport, estimation)
    for name in package.__all__
    if not name.endswith("_reference")  # whose op has the example
    and getattr(getattr(package, name), "__module__", "").startswith(package.__name__)
]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    if module == "pyflowkern.flows.weights":
        pytest.importorskip("safetensors")
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0


@pytest.mark.parametrize("public", PUBLIC)
def test_what_is_public_has_an_example(public):
    assert ">>>" in public.__doc__
