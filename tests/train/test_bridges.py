"""Runs that train a Schrödinger bridge between two tables."""

import csv
import math
import re

import numpy as np
import pytest
import torch

from pyflowkern.cli import main
from pyflowkern.data import DataError, load_pairs
from pyflowkern.train import TrainConfig, train
from pyflowkern.train.checkpoint import load_checkpoint, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.inference import evaluate_checkpoint, save_samples
from pyflowkern.train.module import FlowModule

ARGS = {"hidden": [16], "steps": 4, "iteration_calls": 5, "refresh_every": 2, "pool": 40}


def tables(folder, rows=(120, 90), columns=2):
    paths = []
    for k, n in enumerate(rows):
        x = torch.randn(n, columns, generator=torch.Generator().manual_seed(k)) * 3 + 50 * (k + 1)
        paths.append(folder / f"{'ab'[k]}.csv")
        with paths[-1].open("w", newline="") as file:
            csv.writer(file).writerows([[f"c{i}" for i in range(columns)], *x.tolist()])
    return paths


def config(folder, out="run", **changes):
    a, b = tables(folder)
    given = {
        "data0": str(a),
        "data1": str(b),
        "flow": "SchrodingerBridge",
        "out": str(folder / out),
    }
    given |= {"flow_args": {"method": "dsbm_imf", **ARGS}, "steps": 12, "every": 4}
    return TrainConfig.create(given | {"batch_size": 32, "warmup": 2} | changes)


@pytest.mark.parametrize("method", ["sf2m", "dsbm_imf", "dsb"])
def test_a_run_is_scored_by_where_its_paths_end(tmp_path, method):
    run = train(config(tmp_path, flow_args={"method": method, **ARGS}))
    assert [row["step"] for row in run.history] == [0, 4, 8, 12]
    assert all(math.isfinite(row["held_out"]) for row in run.history)
    found = evaluate_checkpoint(run.out)
    assert found["unit"] == "squared distance"
    assert found["rows"] == 1  # nine held-out pairs are one part
    assert found["score"] == pytest.approx(run.history[-1]["held_out"], rel=1e-5)


def test_a_bridge_learns_where_to_go(tmp_path):
    given = {"hidden": [32], "steps": 10, "sigma": 0.3}
    run = train(
        config(tmp_path, flow_args=given, steps=200, every=100, lr=1e-2, batch_size=64, ema=0.9)
    )
    assert run.history[-1]["held_out"] < 0.2 * run.history[0]["held_out"]
    for backward, centre in ((False, 100), (True, 50)):
        save_samples(run.out, tmp_path / "ends.csv", 150, backward=backward)
        rows = list(csv.reader((tmp_path / "ends.csv").open()))
        assert rows[0] == ["c0", "c1"]
        ends = np.array(rows[1:], dtype=float)
        assert ends.shape == (150, 2)
        assert np.abs(ends.mean(0) - centre).max() < 3


def test_resume_is_exact(tmp_path, monkeypatch):
    whole = train(config(tmp_path, "whole"))
    step = FlowModule.training_step

    def stop(self, batch, index):
        if self.step == 7:
            raise RuntimeError("stop")
        step(self, batch, index)

    monkeypatch.setattr(FlowModule, "training_step", stop)
    with pytest.raises(RuntimeError, match="stop"):
        train(config(tmp_path, "part"))
    monkeypatch.undo()
    train(config(tmp_path, "part"), resume=True)
    a, b = (
        load_checkpoint(tmp_path / out / "last.ckpt")["state_dict"] for out in ("whole", "part")
    )
    assert int(a["model.flow.progress"][0]) == 2  # five calls each, and one at the start
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert load_trained(whole.out).step == 12


def test_samples_are_the_ends_of_paths_from_given_rows(tmp_path):
    run = train(config(tmp_path, steps=2, every=2))
    start = tmp_path / "start.npy"
    np.save(start, np.full((3, 2), 60.0))
    save_samples(run.out, tmp_path / "one.npy", 5, start=str(start), seed=3)
    save_samples(run.out, tmp_path / "two.npy", 5, start=str(start), seed=3)
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    assert one.shape == (5, 2)
    assert np.array_equal(one, two)
    np.save(start, np.zeros((3, 4)))
    with pytest.raises(DataError, match="holds rows of 4 numbers"):
        save_samples(run.out, tmp_path / "one.npy", 5, start=str(start))
    with pytest.raises(ConfigError, match="temperature must be 1"):
        save_samples(run.out, tmp_path / "one.npy", 5, temperature=0.5)
    with pytest.raises(ConfigError, match="own held-out rows"):
        evaluate_checkpoint(run.out, str(start))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data1": ""}, "needs two tables"),
        ({"data": "digits"}, "takes data0 and data1, not data"),
        ({"flow": "NSF", "flow_args": {}}, "data0 and data1 are for SchrodingerBridge"),
        ({"flow_args": {"widths": 3}}, "takes no argument 'widths'"),
        ({"flow_args": {"sigma": "big"}}, "sigma of SchrodingerBridge must be a number"),
        ({"flow_args": {"method": "best"}}, "method must be one of"),
    ],
)
def test_wrong_options_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(config(tmp_path, **changes))


def test_tables_must_fit_each_other(tmp_path):
    a, b = tables(tmp_path)
    pairs = load_pairs(a, b)
    assert pairs.shape == (2,)
    assert len(pairs.train) == 108
    assert pairs.validation.shape == (9, 2, 2)
    both = pairs.train[torch.arange(108)]
    assert float(both[:, 0].mean()) == pytest.approx(50, abs=2)
    assert float(both[:, 1].mean()) == pytest.approx(100, abs=2)
    wide = tmp_path / "wide.npy"
    np.save(wide, np.zeros((5, 3)))
    with pytest.raises(DataError, match="as many columns"):
        load_pairs(a, wide)
    np.save(wide, np.zeros((1, 2)))
    with pytest.raises(DataError, match="2 rows at least"):
        load_pairs(a, wide)


def test_the_commands(tmp_path, monkeypatch, capsys):
    a, b = tables(tmp_path)
    for words in (
        f"train --flow SchrodingerBridge --data0 {a} --data1 {b} --steps 4 --set every=2 --set hidden=[8] "
        f"--set method=dsb --set pool=64 --set sigma=0.5 --out {tmp_path}/run",
        f"sample {tmp_path}/run --out {tmp_path}/ends.csv -n 7 --backward --start {b}",
        f"evaluate {tmp_path}/run",
    ):
        monkeypatch.setattr("sys.argv", ["pyflowkern", *words.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
    assert "squared distance (lower is better), mean over 1 rows" in capsys.readouterr().out
    assert len((tmp_path / "ends.csv").read_text().splitlines()) == 8
    monkeypatch.setattr("sys.argv", ["pyflowkern", "train", "--data0", str(a)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "data0 and data1 are for SchrodingerBridge" in capsys.readouterr().err
