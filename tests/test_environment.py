"""Environment variables: wrong values give a warning, and importing never fails."""

import _struct
import shutil
from pathlib import Path

import fresh
import pytest

from pyflowkern import _library
from pyflowkern._version import __version__

PAGE = "import pyflowkern; print(pyflowkern.show_config())"
STRICT = "import warnings; warnings.simplefilter('error'); "
NAME = "libpyflowkern_cpu.so"


def page(code=PAGE, **options):
    """Return stdout and stderr of show_config() in a separate process."""
    result = fresh.run(code, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_an_unknown_simd_level_is_a_warning_and_never_stops_the_import():
    line = "PYFLOWKERN_SIMD=zzz is ignored: it must be one of baseline, avx2, avx512"
    out, err = page(PYFLOWKERN_SIMD="zzz")
    assert line in out
    assert f"RuntimeWarning: {line}" in err
    out, err = page(STRICT + PAGE, PYFLOWKERN_SIMD="zzz")
    assert line in out
    assert not err


@pytest.mark.parametrize("level", ["", "baseline"])
def test_a_known_simd_level_gives_no_warning(level):
    out, err = page(STRICT + PAGE, PYFLOWKERN_SIMD=level)
    assert "ignored" not in out + err
    if level and "cpu" in _library._loaded:
        assert f"cpu: kernels ({level})" in out


def test_a_level_that_the_processor_lacks_is_a_warning(monkeypatch):
    monkeypatch.setattr(_library, "_loaded", {"cpu": Path("x")})
    monkeypatch.setattr(_library, "_ignored", "")
    monkeypatch.setattr(_library, "simd_level", lambda wanted=None: "avx2")
    monkeypatch.setenv("PYFLOWKERN_SIMD", "avx512")
    with pytest.warns(RuntimeWarning, match="PYFLOWKERN_SIMD=avx512 is ignored: .* has avx2"):
        _library._check_simd_variable()


@pytest.mark.parametrize(
    ("kind", "relative", "reason"),
    [
        ("foreign", False, "is not pyflowkern's library: it holds no kernels of this package"),
        ("foreign", True, "is not pyflowkern's library: it holds no kernels of this package"),
        ("text", False, "could not be loaded by torch"),
        ("empty", True, "could not be loaded by torch"),
        ("folder", False, "was not built or not installed"),
        ("none", True, "was not built or not installed"),
    ],
)
def test_a_library_that_is_not_ours(kind, relative, reason, tmp_path):
    path = tmp_path / NAME
    if kind == "foreign":
        shutil.copy(_struct.__file__, path)
    elif kind == "text":
        path.write_text("no library")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    out, _ = page(cwd=tmp_path, PYFLOWKERN_LIBRARY_DIR="." if relative else str(tmp_path))
    (line,) = (line for line in out.splitlines() if line.startswith("cpu: "))
    assert line.startswith("cpu: reference, because ")
    assert reason in line
    assert "PYFLOWKERN_LIBRARY_DIR=" in out


class Symbols:
    """The exported functions of a library, of which some may be missing."""

    def __init__(self, version, schemas):
        self.pyflowkern_simd_level = lambda: 0
        if version:
            self.pyflowkern_version = lambda: version.encode()
        if schemas:
            self.pyflowkern_schemas = lambda: schemas


@pytest.mark.parametrize(
    ("version", "schemas", "problem"),
    [
        (__version__, _library.SCHEMAS, None),
        ("0.0.9", _library.SCHEMAS, "belongs to 0.0.9, not to"),
        (None, _library.SCHEMAS, "belongs to an unknown version"),
        (__version__, None, "belongs to an unknown version"),
        (__version__, _library.SCHEMAS - 1, "was built from other sources"),
    ],
)
@pytest.mark.parametrize("override", [False, True])
def test_kernels_of_another_version_are_refused(version, schemas, override, problem, monkeypatch):
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path: Symbols(version, schemas))
    monkeypatch.setenv("PYFLOWKERN_LIBRARY_DIR", "x" if override else "")
    found = _library._problem("cpu", Path(NAME), frozenset({"affine"}))
    assert (found is None) if problem is None else (problem in found)


def test_a_library_without_our_functions_is_refused(monkeypatch):
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda path: object())
    found = _library._problem("cpu", Path(NAME), frozenset({"affine"}))
    assert "is not pyflowkern's library: it has no SIMD levels" in found


def test_the_schemas_of_exported_programs_change_nothing_where_they_are_known(tmp_path):
    """An exception in a library that is being loaded would end the process."""
    _library.require_kernels("cpu")
    schemas = _library._loaded["cpu"].parent / "libpyflowkern_schemas.so"
    copy = shutil.copy(schemas, tmp_path)
    load = "; ".join(f"torch.ops.load_library({str(path)!r})" for path in (schemas, copy))
    code = f"import torch, pyflowkern; {load}; print(pyflowkern.ops.logit(torch.zeros(2, 1))[1])"
    result = fresh.run(code)
    assert result.returncode == 0, result.stderr
    assert "tensor" in result.stdout
    result = fresh.run(f"import torch; {load}; print(torch.ops.pyflowkern.logit.default._schema)")
    assert result.returncode == 0, result.stderr
    assert "alpha" in result.stdout
