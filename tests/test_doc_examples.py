"""Every example in the docstrings runs, and every public name has one."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import pyflowkern
from pyflowkern import data, estimation, flows, interop, nn, ode, ops, testing, train, transport

PACKAGES = (ops, ode, nn, flows, testing, transport, estimation, interop, data, train)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(pyflowkern.__path__, "pyflowkern.")
    if (path := Path(module.module_finder.find_spec(module.name).origin)).suffix == ".py"
    and ">>>" in path.read_text()
]
PUBLIC = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package in (pyflowkern, *PACKAGES)
    for name in package.__all__
    if not name.endswith("_reference")  # whose op has the example
    and getattr(getattr(package, name), "__module__", "").startswith(package.__name__)
]


def test_every_package_has_examples():
    for package in PACKAGES:
        assert any(name.startswith(package.__name__) for name in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, tmp_path, monkeypatch):
    if module == "pyflowkern.flows.weights":
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)  # some write files
    found = doctest.testmod(importlib.import_module(module))
    assert found.failed == 0


@pytest.mark.parametrize("public", PUBLIC)
def test_what_is_public_has_an_example_that_runs_by_itself(public, tmp_path, monkeypatch):
    """With the imports that it has, as one who reads ``help()`` would copy it."""
    if public.__module__ == "pyflowkern.flows.weights":
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    assert ">>>" in public.__doc__
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(public, "example", globs={}):
        runner.run(example)
    assert runner.failures == 0
