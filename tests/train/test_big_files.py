"""Training, scores and samples where no file is in memory as a whole."""

import csv
import io
import json
import os
import signal
import sys
import time
from functools import partial

import fresh
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from pyflowkern.cli import main
from pyflowkern.core.files import open_atomic
from pyflowkern.train import inference
from pyflowkern.train.signals import signals_raise

OPTIONS = ["--flow", "RealNVP", "--batch-size", 16, "--set", "every=2", "--set", "hidden=4"]
OPTIONS += ["--set", "flow_args.steps=1", "--set", "stream=always"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """A function that runs a command, and returns its output and what it says on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["pyflowkern", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert int(caught.value.code or 0) == code, err
        return out, err

    return run


def rows_of(count=900):
    return np.random.default_rng(0).normal((50, -3), (5, 0.1), (count, 2)).astype(np.float32)


@pytest.fixture
def run(cli, tmp_path):
    """The folder of a run on a file that stays on the disk."""
    np.save("t.npy", rows_of())
    cli("train", "--data", "t.npy", *OPTIONS, "--steps", 6, "--out", "run")
    return "run"


def table(path):
    with open(path) as file:
        return [*csv.DictReader(file)]


def test_a_resumed_run_is_the_uninterrupted_one(cli, run):
    """Also where it stopped in the middle of a pass, and one round before the end."""
    cli(
        "train", "--data", "t.npy", *OPTIONS, "--steps", 6, "--set", "minutes=1e-9", "--out", "cut"
    )
    assert len(table("cut/metrics.csv")) < 4
    with open("cut/config.yaml") as file:
        text = file.read().replace("minutes: 1.0e-09", "minutes: 0.0")
    with open("cut/config.yaml", "w") as file:
        file.write(text)
    cli("train", "--resume", "cut")
    for whole, resumed in zip(table("run/metrics.csv"), table("cut/metrics.csv"), strict=True):
        for name in ("step", "train", "held_out"):
            assert whole[name] == resumed[name]


def test_scores_do_not_depend_on_the_kind_of_file(cli, run, monkeypatch):
    rows = rows_of()
    pyarrow_table = pyarrow.table({"a": rows[:, 0], "b": rows[:, 1]})
    parquet.write_table(pyarrow_table, "t.parquet", row_group_size=100)
    np.savetxt("t.csv", rows, delimiter=",", fmt="%.9g")
    np.save("columns.npy", np.asfortranarray(rows))
    names = ("t.csv", "t.parquet", "columns.npy")
    whole = json.loads(cli("evaluate", run, "--data", "columns.npy", "--json")[0])
    monkeypatch.setattr(inference, "_SCORED", 300)  # many parts
    for name in names:
        found = json.loads(cli("evaluate", run, "--data", name, "--json")[0])
        assert found.pop("data") == name
        assert found["rows"] == 900
        assert found["score"] == pytest.approx(whole["score"], rel=1e-6)
        assert found["standard_error"] == pytest.approx(whole["standard_error"], rel=1e-6)
    own = json.loads(cli("evaluate", run, "--json")[0])
    assert own["rows"] == 90
    held_out = float(table("run/metrics.csv")[-1]["held_out"])
    assert own["score"] == pytest.approx(held_out, rel=1e-5)
    np.save("t.npy", rows + 1)
    _, err = cli("evaluate", run, code=2)
    assert "t.npy: has changed since training" in err


def test_a_bad_row_far_into_a_file_is_named(cli, run, monkeypatch):
    monkeypatch.setattr(inference, "_SCORED", 300)
    rows = rows_of()
    rows[800, 1] = np.nan
    np.save("bad.npy", rows)
    out, err = cli("evaluate", run, "--data", "bad.npy", code=2)
    assert (out, err) == ("", "pyflowkern: bad.npy, row 801, column 2: holds NaN or inf\n")
    parquet.write_table(pyarrow.table({"a": [1.0, 2.0]}), "one.parquet")
    _, err = cli("evaluate", run, "--data", "one.parquet", code=2)
    assert "holds rows of 1 numbers; the flow was trained on rows of 2 numbers" in err


@pytest.mark.parametrize("context", [(), ("--context-columns", "c"), ("--label-column", "c")])
def test_columns_are_found_by_their_names(cli, context):
    rows = np.concatenate([rows_of(300), np.arange(300)[:, None] % 3], 1)
    columns = dict(zip("abc", rows.T, strict=True))
    parquet.write_table(pyarrow.table(columns), "t.parquet")
    cli("train", "--data", "t.parquet", *OPTIONS, "--steps", 1, *context, "--out", "run")
    parquet.write_table(pyarrow.table(columns), "same.parquet")
    wanted = cli("evaluate", "run", "--data", "same.parquet")[0]
    wanted = wanted.replace("same.parquet", "other.csv")
    turned = "\n".join(",".join(map(repr, row)) for row in rows[:, [2, 1, 0]].tolist())
    for header, code in (("c,b,a", 0), ("c,b,x", 2)):
        with open("other.csv", "w") as file:
            file.write(f"{header}\n{turned}\n")
        out, err = cli("evaluate", "run", "--data", "other.csv", code=code)
        assert out == (wanted if code == 0 else "")
    assert "other.csv: has no column 'a', which the flow was trained on; its columns are" in err
    parquet.write_table(pyarrow.table({**columns, "run": columns["a"]}), "more.parquet")
    _, err = cli("evaluate", "run", "--data", "more.parquet", code=2)
    assert "has the column 'run', which the flow was not trained on; leave it out" in err


def test_samples_are_the_same_in_every_file_and_written_in_parts(cli, run, monkeypatch):
    monkeypatch.setattr(inference, "_DRAWN", 64)
    for suffix in ("npy", "csv", "parquet"):
        cli("sample", run, "-n", 100, "--out", f"s.{suffix}", "--seed", 3)
    array = np.load("s.npy")
    assert array.shape == (100, 2)
    buffer = io.BytesIO()
    np.save(buffer, array)
    with open("s.npy", "rb") as file:
        assert file.read() == buffer.getvalue()
    np.testing.assert_array_equal(np.loadtxt("s.csv", delimiter=",", dtype=np.float32), array)
    drawn = parquet.ParquetFile("s.parquet")
    assert (drawn.schema_arrow.names, drawn.num_row_groups) == (["x1", "x2"], 4)
    columns = [column.to_numpy() for column in drawn.read().columns]
    np.testing.assert_array_equal(np.stack(columns, 1), array)
    assert cli("evaluate", run, "--data", "s.parquet")[0]  # what was written can be read


def test_contexts_of_samples_that_come_in_parts(cli, monkeypatch):
    rows = np.concatenate([rows_of(300), np.arange(300)[:, None] % 3 + 5], 1)
    columns = dict(zip(("a", "b", "c"), rows.T, strict=True))
    parquet.write_table(pyarrow.table(columns), "t.parquet", row_group_size=100)
    options = ("--data", "t.parquet", *OPTIONS, "--steps", 1)
    cli("train", *options, "--label-column", "c", "--out", "labels")
    cli("train", *options, "--context-columns", "c", "--out", "numbers")
    np.save("contexts.npy", np.arange(5.0)[:, None])
    for given in (
        ("labels",),
        ("labels", "--label", 6),
        ("numbers", "--context", "5"),
        ("numbers", "--context", "contexts.npy"),
    ):
        found = []
        for part in (2**18, 64):
            monkeypatch.setattr(inference, "_DRAWN", part)
            cli("sample", *given, "-n", 100, "--out", "s.npy", "--temperature", 0)
            found.append(np.load("s.npy"))
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert "100 samples" in cli("sample", "labels", "-n", 100, "--out", "s.parquet")[0]
    assert parquet.read_schema("s.parquet").names == ["a", "b"]


def test_more_samples_than_the_disk_holds_are_refused_at_once(cli, run):
    for suffix in ("npy", "csv", "parquet"):
        _, err = cli("sample", run, "-n", 10**15, "--out", f"new/s.{suffix}", code=2)
        assert f"s.{suffix}: {10**15} samples would take" in err
    assert not os.path.exists("new")


def test_a_bar_where_it_is_asked_for(cli, run):
    assert cli("evaluate", run)[1] == ""
    assert "evaluate: 100%" in cli("evaluate", run, "--progress")[1]
    assert "sample: 100%" in cli("sample", run, "--out", "s.npy", "--progress")[1]
    assert cli("sample", run, "--out", "s.npy", "--no-progress")[1] == ""


def test_without_pyarrow_one_line_says_what_is_needed(cli, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _, err = cli("sample", run, "--out", "new/s.parquet", code=2)
    assert "need pyarrow: pip install 'pyflowkern[parquet]'" in err
    assert not os.path.exists("new")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_old_file_and_no_other(number, tmp_path, request):
    path = tmp_path / "s.npy"
    path.write_text("old")
    interrupt = number is signal.SIGINT
    wanted = KeyboardInterrupt if interrupt else SystemExit
    # as of a process that ignores none: one behind nohup does
    before = signal.default_int_handler if interrupt else signal.SIG_DFL
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, before)))

    def write():
        with signals_raise(), open_atomic(path) as file:
            file.write(b"new" * 10_000)
            assert len([*tmp_path.iterdir()]) == 2
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(wanted) as caught:
        write()
    if wanted is SystemExit:
        assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["s.npy"]


def test_errors_of_what_is_read_while_a_file_is_written_keep_their_names(tmp_path):
    with pytest.raises(OSError, match=r"none\.csv") as caught, open_atomic(tmp_path / "s.npy"):
        (tmp_path / "none.csv").read_text()
    assert caught.value.filename == str(tmp_path / "none.csv")
    assert not [*tmp_path.iterdir()]


#: Evaluate, sample and go through files of 64 MB; print by how many MB each raises the peak of memory.
LARGE = """
import sys, numpy as np, torch
from pathlib import Path
from pyflowkern.data import Batches, open_blocks, streamed_set
from pyflowkern.train import TrainConfig, measure, train
from pyflowkern.train.checkpoint import load_trained
from pyflowkern.train.inference import evaluate_checkpoint, save_samples
torch.set_num_threads(1)
rows = np.random.default_rng(0).normal(size=(2_000_000, 8)).astype(np.float32)
np.save("large.npy", rows)
np.save("small.npy", rows[:40_000])
del rows
options = {"flow": "RealNVP", "flow_args": {"steps": 1, "hidden": 4}, "steps": 1, "out": "run"}
train(TrainConfig.create({"data": "small.npy", **options}))

def one_pass(path):
    data = streamed_set(open_blocks(Path(path)), 0, buffer=2**18)
    batches = Batches(data, 2**15, 0)
    for step in range(len(data.train) // 2**15):
        batches.batch(step)

flow = load_trained(Path("run")).model.flow

def calls(path, n):
    with torch.no_grad():
        yield lambda: flow.log_prob(np.load(path, mmap_mode="r"), chunk=2**16).mean()
    yield lambda: evaluate_checkpoint(Path("run"), path)
    yield lambda: save_samples(Path("run"), Path("s.npy"), n)
    yield lambda: one_pass(path)

for work in calls("small.npy", 70_000):
    work()
for work in calls("large.npy", 2_000_000):
    measure.forget_peak()
    before = measure.peak()
    work()
    print(measure.peak() - before)
"""


def test_memory_does_not_grow_with_the_files(tmp_path):
    result = fresh.run(LARGE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    grown = [*map(float, result.stdout.split()[-4:])]
    assert grown[0] < 16 + 8  # two million densities are the result
    assert max(grown[1:]) < 16
