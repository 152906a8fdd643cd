"""Comparisons of flows: the same rows, paired differences, resume, and one line for every mistake."""

import csv
import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyflowkern.train import ConfigError, TrainConfig, compare
from pyflowkern.train import comparison as module
from pyflowkern.train.comparison import configs_of
from pyflowkern.train.data_model import DataModel
from pyflowkern.train.inference import evaluate_checkpoint


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    g = np.random.default_rng(0)
    a = g.normal(size=300)
    np.savetxt(path, np.c_[a, a**2 + 0.3 * g.normal(size=300)], delimiter=",", header="a,b")
    path.write_text(path.read_text().removeprefix("# "))
    options = {"data": str(path), "steps": 4, "every": 2, "batch_size": 32}
    return TrainConfig.create(options | {"flow": "MAF", "flow_args": {"hidden": 8}})


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    configs = {"MAF": shared, "MAF-2": replace(shared, flow_args={"hidden": 8, "transforms": 1})}
    return configs, out, compare(configs, out)


def test_rows_are_those_of_the_files(finished):
    _, out, rows = finished
    scores = {row["name"]: np.load(out / row["name"] / "scores.npy") for row in rows}
    best, other = rows
    assert best["log_prob"] > other["log_prob"]
    assert (best["difference"], best["difference_error"]) == (0, 0)
    less = scores[other["name"]] - scores[best["name"]]
    assert len(less) == 30  # a tenth of the table
    assert other["difference"] == pytest.approx(less.mean())
    assert other["difference_error"] == pytest.approx(less.std(ddof=1) / math.sqrt(30))
    for row in rows:
        own = evaluate_checkpoint(out / row["name"])
        assert row["log_prob"] == pytest.approx(-own["score"], rel=1e-5)
        assert row["steps"] == 4
        assert min(row["parameters"], row["seconds_per_step"], row["samples_per_second"]) > 0
    assert json.loads((out / "comparison.json").read_text())["flows"] == rows
    table = list(csv.DictReader((out / "comparison.csv").open()))
    assert [row["name"] for row in table] == [row["name"] for row in rows]


def test_a_finished_comparison_is_not_begun_again(finished, monkeypatch):
    configs, out, rows = finished
    monkeypatch.setattr(module, "train", None)
    assert compare(configs, out, resume=True) == rows
    with pytest.raises(ConfigError, match="holds a comparison already"):
        compare(configs, out)
    with pytest.raises(ConfigError, match="other options"):
        compare({n: replace(c, steps=5) for n, c in configs.items()}, out, resume=True)


def test_what_was_ended_goes_on_with_the_same_numbers(finished, tmp_path, monkeypatch):
    configs, _, rows = finished
    right = module.train

    def ended(config, data, **options):
        if config.out.endswith("MAF-2"):
            raise KeyboardInterrupt
        return right(config, data, **options)

    monkeypatch.setattr(module, "train", ended)
    with pytest.raises(KeyboardInterrupt):
        compare(configs, tmp_path)
    monkeypatch.setattr(module, "train", right)
    again = compare(configs, tmp_path, resume=True)
    for name in ("name", "log_prob", "difference_error", "parameters"):
        assert [row[name] for row in again] == [row[name] for row in rows]


def test_a_flow_that_diverged_is_tried_again_from_its_last_checkpoint(
    finished, tmp_path, monkeypatch
):
    configs, _, rows = finished
    configs = {name: replace(c, max_bad_steps=1) for name, c in configs.items()}
    objective, right, steps = DataModel.objective, module.train, itertools.count()

    def bad_from_some_step_on(self, rows):
        loss, shown = objective(self, rows)
        return (loss / (next(steps) < 2) if torch.is_grad_enabled() else loss), shown

    def diverges(config, data, **options):
        with monkeypatch.context() as patch:
            if config.out.endswith("MAF-2"):
                patch.setattr(DataModel, "objective", bad_from_some_step_on)
            return right(config, data, **options)

    monkeypatch.setattr(module, "train", diverges)
    first = compare(configs, tmp_path)
    assert first[-1]["name"] == "MAF-2"
    assert "not finite" in first[-1]["problem"]
    checkpoint = (tmp_path / "MAF-2/last.ckpt").read_bytes()
    assert compare(configs, tmp_path, resume=True) == first  # and diverges again
    assert (tmp_path / "MAF-2/last.ckpt").read_bytes() == checkpoint
    monkeypatch.setattr(module, "train", right)
    again = compare(configs, tmp_path, resume=True)
    for name in ("name", "log_prob", "difference_error", "parameters"):
        assert [row[name] for row in again] == [row[name] for row in rows]


def test_damaged_results_are_found_again_from_the_checkpoint(finished, tmp_path):
    configs, out, rows = finished
    shutil.copytree(out, tmp_path / "copy")
    path = tmp_path / "copy" / rows[0]["name"] / "result.json"
    path.write_text(path.read_text()[:20])
    (tmp_path / "copy" / rows[1]["name"] / "scores.npy").write_bytes(b"")
    again = compare(configs, tmp_path / "copy", resume=True)
    for name in ("name", "log_prob", "difference_error", "parameters"):
        assert [row[name] for row in again] == [row[name] for row in rows]


def test_a_flow_without_finite_scores_stands_last():
    facts = {"a": {"name": "a"}, "b": {"name": "b", "problem": "diverged"}, "c": {"name": "c"}}
    scores = {"a": torch.tensor([0.0, math.nan]), "b": None, "c": torch.tensor([-1.0, -2.0])}
    rows = module._rows({n: (facts[n], scores[n]) for n in facts}, None)
    assert [row["name"] for row in rows] == ["c", "a", "b"]
    assert rows[1]["problem"] == "1 held-out rows without a finite score"
    assert rows[2]["problem"] == "diverged"


@pytest.mark.parametrize(
    ("names", "change", "words"),
    [
        (["a"], {}, "two flows at least"),
        (["a", "b"], {"flow": "SchrodingerBridge"}, "no likelihood"),
        (["a", "b"], {"devices": 2}, "one process"),
        (["a", "b"], {"flow": "Unknown"}, "unknown flow"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(shared, tmp_path, names, change, words):
    configs = {name: replace(shared, **change) for name in names}
    with pytest.raises(ConfigError, match=words):
        compare(configs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flows_are_named_with_their_arguments():
    texts = ["NSF,hidden=[16, 8],bins=4", "MAF", "MAF,transforms=2", "NSF,hidden=[8,8]"]
    texts.append("NSF,a=[[1,2],[3,4]],b={c: 1, d: [2]}")
    configs = configs_of(texts, None, {"steps": 7}, ["hidden=32", "lr=0.1"])
    assert {name: c.flow_args for name, c in configs.items()} == {
        "NSF": {"hidden": [16, 8], "bins": 4},
        "MAF": {"hidden": 32},
        "MAF-2": {"hidden": 32, "transforms": 2},
        "NSF-2": {"hidden": [8, 8]},
        "NSF-3": {"hidden": 32, "a": [[1, 2], [3, 4]], "b": {"c": 1, "d": [2]}},
    }
    assert {(c.steps, c.lr) for c in configs.values()} == {(7, 0.1)}
    for text in ("MAF,transforms", "MAF,", "MAF,hidden=[8,8],16"):
        with pytest.raises(ConfigError, match="wants NAME=VALUE behind a comma"):
            configs_of([text, "NSF"], None, {}, [])


def test_budgets_must_be_the_same(shared, tmp_path):
    with pytest.raises(ConfigError, match="steps must be the same"):
        compare({"a": shared, "b": replace(shared, steps=9)}, tmp_path)
