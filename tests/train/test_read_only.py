"""Folders that cannot be written to: one line that names what is in the way, and nothing is lost."""

import os
import re

import fresh
import numpy as np
import pytest

from pyflowkern.train import TrainConfig, train

#: Root may write where permissions forbid it, by capabilities that a process can give up.
AS_ANYBODY = """
import ctypes, sys
def give_up_rights():
    capget, capset = (getattr(ctypes.CDLL(None), name, None) for name in ("capget", "capset"))
    if capset is None:  # not Linux
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert capget(header, sets) == 0
    for i in range(2):
        sets[i] &= ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert capset(header, sets) == 0
give_up_rights()
"""
COMMAND = f"""{AS_ANYBODY}
sys.argv = ["pyflowkern", *sys.argv[1:]]
from pyflowkern.cli import main
main()
"""
TRY = f"""{AS_ANYBODY}
try:
    open(sys.argv[1], "w")
except PermissionError:
    print("refused")
"""
FEW = ["--set", "flow_args.hidden=4", "--set", "flow_args.steps=1", "--set", "every=2"]
TWO = ["--flow", "MAF", "--flow", "NSF"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a table, a run that nobody may write to, and a folder of the same kind without a run."""
    folder = tmp_path_factory.mktemp("read-only")
    np.savetxt(folder / "t.csv", np.random.default_rng(0).normal(size=(50, 2)), delimiter=",")
    options = {"data": str(folder / "t.csv"), "flow": "RealNVP", "every": 2}
    options |= {"flow_args": {"steps": 1, "hidden": 4}, "steps": 2, "out": str(folder / "run")}
    train(TrainConfig.create(options))
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file")
    paths = [folder / "empty", folder / "run", *(p for p in folder.glob("run/**/*") if p.is_dir())]
    for path in paths:
        path.chmod(0o555)
    yield folder
    for path in paths:
        path.chmod(0o755)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_permissions_hold_here(folder):
    """Else the tests below test nothing."""
    assert fresh.run(TRY, folder / "empty" / "x").stdout == "refused\n"


@pytest.mark.parametrize(
    ("named", "words"),
    {
        "train": ("empty", ["train", "--data", "t.csv", "--flow", "RealNVP", "--steps", "2", *FEW, "--out", "empty"]),
        "train, a new folder": ("empty", ["train", "--data", "t.csv", "--flow", "RealNVP", *FEW, "--out", "empty/run"]),
        "resume": ("run", ["train", "--resume", "run", "--steps", "4"]),
        "overwrite": ("run", ["train", "--data", "t.csv", "--flow", "RealNVP", *FEW, "--out", "run", "--overwrite"]),
        "compare": ("empty", ["compare", "--data", "t.csv", *TWO, "--out", "empty/c"]),
        "sample": ("empty", ["sample", "run", "-n", "3", "--out", "empty/s.csv"]),
        "sample, under a file": ("file", ["sample", "run", "-n", "3", "--out", "file/s.npy"]),
        "export": ("empty", ["export", "run", "--out", "empty/w.safetensors"]),
        "export, under a file": ("file", ["export", "run", "--out", "file/w.safetensors"]),
        "compare, under a file": ("file", ["compare", "--data", "t.csv", *TWO, "--out", "file/c"]),
    }.values(),
)  # fmt: skip
def test_one_line_and_nothing_lost(folder, named, words):
    before = contents(folder)
    result = fresh.run(COMMAND, *words, cwd=folder)
    assert result.returncode in (1, 2), result
    assert re.fullmatch(rf"pyflowkern: .*\b{named}\b.*\n", result.stderr), result.stderr
    assert contents(folder) == before
    assert sorted(os.listdir(folder)) == ["empty", "file", "run", "t.csv"]
