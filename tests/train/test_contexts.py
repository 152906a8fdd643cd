"""Runs whose densities depend on columns of a table, or on labels."""

import csv
import math
import re

import numpy as np
import pytest
import torch

from pyflowkern.cli import main
from pyflowkern.data import Columns, Conditioned, DataError, load
from pyflowkern.train import TrainConfig, train
from pyflowkern.train.checkpoint import load_checkpoint, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.inference import evaluate_checkpoint, save_samples
from pyflowkern.train.module import FlowModule

HEADER = ["dose", "x", "kind", "y"]
KINDS = (3, 7, 20)


def table(folder, name="rows.csv", n=300, header=HEADER, seed=0):
    """Columns of which x follows the dose, and y the kind."""
    random = np.random.default_rng(seed)
    dose, kind = random.uniform(100, 200, n), random.choice(KINDS, n)
    x, y = 3 * dose + random.normal(0, 5, n), kind + random.normal(0, 0.5, n)
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header] if header else [])
        writer.writerows(np.column_stack([dose, x, kind, y]).tolist())
    return path


def config(folder, **changes):
    given = {"data": str(table(folder)), "out": str(folder / "run"), "flow": "NSF", "lr": 1e-2}
    given |= {"flow_args": {"transforms": 1, "hidden": [16]}, "steps": 6, "every": 3, "warmup": 1}
    return TrainConfig.create(given | {"batch_size": 64} | changes)


def read(path):
    rows = list(csv.reader(path.open()))
    return rows[0], np.array(rows[1:], dtype=float)


CONTEXT = {"context_columns": "dose, kind"}
LABEL = {"label_column": "kind"}


def test_a_flow_learns_how_its_columns_depend_on_others(tmp_path):
    given = {"flow": "MAF", "steps": 500, "every": 500, "ema": 0.9, "lr": 2e-2}
    run = train(config(tmp_path, **CONTEXT, **given))
    assert run.module.data.columns == ["x", "y"]
    assert run.module.data.shape == (2,)
    noise = math.log(5 * 0.5) + math.log(2 * math.pi * math.e)  # which is left of x and y, in nats
    assert noise - 0.2 < run.history[-1]["held_out"] < noise + 1
    moments = run.module.model.context_mean
    assert moments.tolist() == pytest.approx([150, 10], abs=6)
    for dose in (120, 180):
        save_samples(run.out, tmp_path / "drawn.csv", 200, context=f"{dose},7")
        header, rows = read(tmp_path / "drawn.csv")
        assert header == ["x", "y"]
        assert np.median(rows, 0) == pytest.approx([3 * dose, 7], abs=8)
    # a row for each sample, of a file with these columns among others
    save_samples(run.out, tmp_path / "drawn.csv", 300, context=str(tmp_path / "rows.csv"))
    _, rows = read(tmp_path / "drawn.csv")
    _, truth = read(tmp_path / "rows.csv")
    assert np.corrcoef(rows[:, 0], truth[:, 0])[0, 1] > 0.9


def test_scores_are_of_rows_given_their_context(tmp_path):
    run = train(config(tmp_path, **CONTEXT))
    own = evaluate_checkpoint(run.out)
    assert own["score"] == pytest.approx(run.history[-1]["held_out"], rel=1e-5)
    other = table(tmp_path, "other.csv", n=20, seed=1)
    found = evaluate_checkpoint(run.out, str(other))
    assert found["rows"] == 20
    model = load_trained(run.out).model
    rows = torch.tensor(read(other)[1], dtype=torch.float32)
    wanted = -model.log_prob(rows[:, [1, 3]], rows[:, [0, 2]]).mean().item()
    assert found["score"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("changes", [CONTEXT, LABEL])
def test_resume_is_exact(tmp_path, monkeypatch, changes):
    matching = {"hidden": [8], "method": "rk4", "step_size": 0.5}
    given = {**changes, "flow": "FlowMatching", "flow_args": matching}
    train(config(tmp_path, **given, out=str(tmp_path / "whole")))
    step = FlowModule.training_step

    def stop(self, batch, index):
        if self.step == 4:
            raise RuntimeError("stop")
        step(self, batch, index)

    monkeypatch.setattr(FlowModule, "training_step", stop)
    with pytest.raises(RuntimeError, match="stop"):
        train(config(tmp_path, **given))
    monkeypatch.undo()
    train(config(tmp_path, **given), resume=True)
    a, b = (load_checkpoint(tmp_path / out / "last.ckpt") for out in ("whole", "run"))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(t, b["state_dict"][name]) for name, t in a["state_dict"].items())
    other = {"context_columns": "kind,dose"} if changes is CONTEXT else {"label_column": "3"}
    swapped = config(tmp_path, **given | other)
    if changes is CONTEXT:  # the same columns in another order are other contexts
        with pytest.raises(ConfigError, match="was trained on other data"):
            train(swapped, resume=True)
    else:
        train(swapped, resume=True)


def test_a_column_of_integers_is_named_before_the_first_step(tmp_path, capsys):
    """Of the columns that are modelled: x, kind and y, the second to the fourth of the file."""
    train(config(tmp_path, context_columns="dose", steps=1))
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "rows.csv, column 3 (kind): 3 values in 30 held-out rows; log-densities grow" in first
    assert second == "nats are of the negative log-density: lower is better"


@pytest.mark.parametrize("flow", ["FlowMatching", "MAF"])
def test_labels_of_a_table_are_the_numbers_of_its_column(tmp_path, flow):
    """FlowMatching has classes of its own; other flows take them as one-hot vectors."""
    args = {"FlowMatching": {"hidden": [32], "method": "rk4", "step_size": 0.25}}
    args["MAF"] = {"transforms": 1, "hidden": [16]}
    given = {"flow": flow, "flow_args": args[flow], "steps": 200, "every": 200, "ema": 0.9}
    run = train(config(tmp_path, **LABEL, **given))
    flow = run.module.model.flow
    assert (getattr(flow, "classes", 0) or flow.context_features) == 3
    for kind in KINDS:
        save_samples(run.out, tmp_path / "drawn.csv", 100, label=kind)
        header, rows = read(tmp_path / "drawn.csv")
        assert header == ["dose", "x", "y"]
        assert np.median(rows[:, 2]) == pytest.approx(kind, abs=2.5)
    save_samples(run.out, tmp_path / "drawn.csv", 300)  # all in turn
    _, rows = read(tmp_path / "drawn.csv")
    assert np.median(rows[2::3, 2]) > np.median(rows[::3, 2]) + 10
    assert math.isfinite(evaluate_checkpoint(run.out)["score"])
    other = table(tmp_path, "other.csv", n=20, seed=1)
    assert evaluate_checkpoint(run.out, str(other))["rows"] == 20
    other.write_text(other.read_text() + "150,450,4,4\n")
    with pytest.raises(
        DataError, match=r"column 3 \(kind\): holds the class 4, which the flow was not"
    ):
        evaluate_checkpoint(run.out, str(other))


def test_digits_with_their_labels(tmp_path):
    args = {"hidden": [4, 4], "conv": "unet", "method": "midpoint", "step_size": 0.5}
    run = train(
        config(
            tmp_path,
            data="digits",
            labels=True,
            flow="FlowMatching",
            flow_args=args,
            steps=2,
            every=2,
        )
    )
    assert run.module.model.flow.classes == 10
    assert run.module.data.train[torch.tensor([0, 1])].context.dtype == torch.int64
    assert (tmp_path / "run" / "samples.png").is_file()
    for options in ({"label": 3}, {"label": 3, "guidance": 3.0}, {}):
        save_samples(run.out, tmp_path / "drawn.npy", 4, **options)
        assert np.load(tmp_path / "drawn.npy").shape == (4, 1, 8, 8)
    score = evaluate_checkpoint(run.out, "digits")
    assert score["unit"] == "bits/dim"
    np.save(tmp_path / "images.npy", np.zeros((3, 1, 8, 8), np.uint8))
    with pytest.raises(DataError, match="has no labels, which the flow was trained with"):
        evaluate_checkpoint(run.out, str(tmp_path / "images.npy"))


def test_columns_go_by_name_or_number(tmp_path):
    named = load(table(tmp_path), context=Columns.parse("kind,dose", ""))
    bare = table(tmp_path, "bare.csv", header=None)
    numbered = load(bare, context=Columns.parse("3, 1", ""))
    assert torch.equal(named.validation.context, numbered.validation.context)
    assert torch.equal(named.validation.rows, numbered.validation.rows)
    assert named.condition.columns == ["kind", "dose"]
    assert numbered.condition.columns == ["3", "1"]
    assert isinstance(named.train, Conditioned)
    assert torch.allclose(named.condition.mean, named.train.context.mean(0))
    array = tmp_path / "rows.npy"
    np.save(array, read(bare)[1])
    labelled = load(array, context=Columns.parse("", "3"))
    assert labelled.condition.classes == list(KINDS)
    assert labelled.validation.context.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"context_columns": "age"},
            DataError,
            "no column 'age'; its columns are dose, x, kind, y",
        ),
        ({"context_columns": "5"}, DataError, "has no column '5'"),
        ({"context_columns": "dose,1"}, DataError, "a column is given twice"),
        ({"context_columns": "1,2,3,4"}, DataError, "none is left to model"),
        ({"label_column": "dose"}, DataError, "column 1 (dose): holds 1"),
        (CONTEXT | LABEL, ConfigError, "exclude each other"),
        ({"labels": True}, DataError, "has no labels of its own"),
        ({"data": "digits", "context_columns": "1"}, DataError, "digits: holds images"),
        ({"labels": 1}, ConfigError, "labels must be true or false, got 1"),
        ({"context_columns": 3}, ConfigError, "context_columns must be text"),
        (CONTEXT | {"flow_args": {"context_features": 2}}, ConfigError, "takes no argument"),
        (
            CONTEXT | {"flow": "SchrodingerBridge", "data": "photos", "data0": "a", "data1": "b"},
            ConfigError,
            "takes no context and no labels",
        ),
    ],
)
def test_wrong_options_are_named(tmp_path, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        train(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_columns": "a"}, "column 1 (a): constant, so nothing depends on it"),
        ({"context_columns": "b"}, "column 1 (a): constant, so it has no density"),
        ({"label_column": "a"}, "column 1 (a): must hold from 2 to 1000 different classes, got 1"),
    ],
)
def test_columns_that_tell_nothing_are_named(tmp_path, changes, message):
    path = tmp_path / "constant.csv"
    path.write_text("a,b,c\n1,2,5\n1,3,6\n1,4,8\n")
    with pytest.raises(DataError, match=re.escape(message)):
        train(config(tmp_path, data=str(path), **changes))


def test_wrong_contexts_of_samples_are_named(tmp_path):
    run = train(config(tmp_path, **CONTEXT, steps=1))
    plain = train(config(tmp_path, steps=1, out=str(tmp_path / "plain")))
    kinds = train(config(tmp_path, **LABEL, steps=1, out=str(tmp_path / "kinds")))
    (tmp_path / "short.csv").write_text("a\n1\n")
    for out, options, message in (
        (run.out, {}, "context must be given: 2 numbers (dose, kind)"),
        (run.out, {"context": "1"}, "context must be 2 numbers (dose, kind), got '1'"),
        (run.out, {"context": "1,nan"}, "context must be 2 numbers"),
        (run.out, {"context": "a,b"}, "or a file of them, got 'a,b'"),
        (run.out, {"context": str(tmp_path / "short.csv")}, "has no column 'dose'"),
        (run.out, {"label": 1}, "label is for runs with labels"),
        (run.out, {"context": "1,2", "guidance": 2.0}, "guidance is for FlowMatching"),
        (plain.out, {"context": "1,2"}, "context is for runs with context columns"),
        (kinds.out, {"context": "1,2"}, "this one has labels"),
        (kinds.out, {"label": 4}, "label must be one of 3, 7, 20, got 4"),
    ):
        with pytest.raises((ConfigError, DataError), match=re.escape(message)):
            save_samples(out, tmp_path / "drawn.csv", 5, **options)


def test_flows_that_may_leave_a_context_out(tmp_path):
    args = {"hidden": [8], "method": "rk4", "step_size": 0.5}
    given = {**CONTEXT, "flow": "FlowMatching", "steps": 1}
    dropped = train(config(tmp_path, **given, flow_args=args | {"context_dropout": 0.2}))
    save_samples(dropped.out, tmp_path / "drawn.csv", 5)
    save_samples(dropped.out, tmp_path / "guided.csv", 5, context="150,7", guidance=2.0)
    kept = train(config(tmp_path, **given, flow_args=args, out=str(tmp_path / "kept")))
    for options, message in (
        ({"context": "150,7", "guidance": 2.0}, "guidance must be 1"),
        ({}, "context must be given"),
    ):
        with pytest.raises(ConfigError, match=message):
            save_samples(kept.out, tmp_path / "drawn.csv", 5, **options)


def test_the_commands(tmp_path, monkeypatch, capsys):
    path = table(tmp_path)
    small = "--flow NSF --steps 2 --set every=2 --set hidden=[8] --set transforms=1"
    for words in (
        f"train --data {path} {small} --context-columns dose,kind --out {tmp_path}/run",
        f"sample {tmp_path}/run --out {tmp_path}/drawn.csv -n 7 --context 150,7",
        f"evaluate {tmp_path}/run --data {path}",
        f"train --data {path} {small} --label-column kind --out {tmp_path}/kinds",
        f"sample {tmp_path}/kinds --out {tmp_path}/drawn.csv -n 7 --label 20",
        f"train --data digits --labels --flow RealNVP --steps 2 --set every=2 --set hidden=4 --out {tmp_path}/digits",
    ):
        monkeypatch.setattr("sys.argv", ["pyflowkern", *words.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
    assert "mean over 30 rows" in capsys.readouterr().out
    monkeypatch.setattr(
        "sys.argv", f"pyflowkern sample {tmp_path}/run --out {tmp_path}/a.csv".split()
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "context must be given: 2 numbers (dose, kind)" in capsys.readouterr().err
