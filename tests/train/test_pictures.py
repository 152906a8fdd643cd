"""The pictures of a run: drawn when it ends, drawn again from its folder, and never a reason to lose it."""

import csv
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from picture_colours import BLUE, GREEN, ORANGE, count

from pyflowkern.cli import main
from pyflowkern.data import Conditioned, DataSet
from pyflowkern.train import TrainConfig, pictures, plot, plots, train
from pyflowkern.train.config import ConfigError
from pyflowkern.train.data_model import DataFlow

SMALL = {"flow": "RealNVP", "flow_args": {"steps": 1, "hidden": 4}, "steps": 2, "every": 2}


def table(folder, name="rows.csv", n=300, header=("length", "width"), seed=0):
    rows = np.random.default_rng(seed).normal(50, 5, (n, len(header)))
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows.tolist()])
    return folder / name


def config(folder, **changes):
    given = {"data": str(folder / "rows.csv"), "out": str(folder / "run"), "batch_size": 32}
    return TrainConfig.create(SMALL | given | changes)


def command(*arguments):
    """Run a command; return its exit code."""
    before, sys.argv = sys.argv, ["pyflowkern", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        sys.argv = before
    return int(caught.value.code or 0)


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


# --- runs ---------------------------------------------------------------------------------------------


def test_a_run_draws_its_pictures_and_plot_draws_them_again(tmp_path, capsys):
    table(tmp_path)
    run = train(config(tmp_path))
    first = {name: (run.out / name).read_bytes() for name in ("pairs.png", "density.png")}
    assert min(count(run.out / "pairs.png", colour) for colour in (BLUE, ORANGE)) > 500
    assert not (run.out / "beside.png").exists()
    for name in (*first, "curve.png"):
        (run.out / name).unlink()
    capsys.readouterr()
    assert command("plot", run.out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{run.out}/pairs.png: 30 held-out rows, 2000 samples",
        f"{run.out}/density.png: log-density, 30 held-out rows",
        f"{run.out}/curve.png: scores up to step 2",
    ]
    assert {name: (run.out / name).read_bytes() for name in first} == first
    assert (run.out / "curve.png").stat().st_size > 5000


def test_options_of_plot(tmp_path, capsys):
    table(tmp_path)
    train(config(tmp_path))
    other = table(tmp_path, "other.csv", n=500, header=("width", "length"), seed=1)
    best = tmp_path / "run" / "best.ckpt"
    given = ("--data", other, "-n", "100", "--seed", "3", "--out", tmp_path / "new")
    capsys.readouterr()
    assert command("plot", best, *given) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/new/pairs.png: 100 rows, 100 samples\n" in printed
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "pairs.png",
        "density.png",
        "curve.png",
    }


def test_of_many_columns_the_first_are_drawn_and_it_says_so(tmp_path, monkeypatch):
    assert plots.MOST_COLUMNS == 8
    monkeypatch.setattr(plots, "MOST_COLUMNS", 3)  # which takes less time to draw
    table(tmp_path, header=("a", "b", "c", "d"))
    run = train(config(tmp_path))
    drawn = plot(run.out)
    name = str(run.out / "pairs.png")
    assert drawn[name] == "30 held-out rows, 2000 samples, the first 3 of 4 columns"
    assert not (run.out / "density.png").exists()


def test_samples_are_those_of_the_contexts_of_held_out_rows(tmp_path, monkeypatch):
    table(tmp_path, header=("dose", "x", "y"), n=200)
    seen = []
    sample = DataFlow.sample
    monkeypatch.setattr(
        DataFlow, "sample", lambda self, n, c=None, **k: seen.append(c) or sample(self, n, c, **k)
    )
    run = train(config(tmp_path, context_columns="dose"))
    held_out = run.module.data.validation
    (contexts,) = seen
    assert torch.equal(contexts[:20], held_out.context)
    assert torch.equal(contexts[20:40], held_out.context)
    assert len(contexts) == plots.MOST_POINTS
    # the density is another one for each context: there is no picture of it
    assert (run.out / "pairs.png").exists()
    assert not (run.out / "density.png").exists()
    assert plot(run.out).keys() == {str(run.out / n) for n in ("pairs.png", "curve.png")}
    assert torch.equal(seen[1], contexts)


def test_images_lie_beside_samples_of_their_labels(tmp_path, monkeypatch):
    sets = []
    save = pictures.save_beside
    monkeypatch.setattr(
        pictures, "save_beside", lambda path, *a: sets.append(a[0]) or save(path, *a)
    )
    flow = {"flow": "Glow", "flow_args": {"levels": 1, "steps": 1, "hidden": 4}}
    for labels in (False, True):
        run = train(
            config(tmp_path, data="digits", labels=labels, out=str(tmp_path / str(labels)), **flow)
        )
        assert (run.out / "beside.png").stat().st_size > 5000
        assert not (run.out / "pairs.png").exists()
    assert [[*each] for each in sets] == [
        ["held out", "samples"],
        ["held out", "samples, of the same labels"],
    ]
    for each in sets:
        assert {images.shape for images in each.values()} == {(64, 1, 8, 8)}
    assert [*plot(run.out)] == [str(run.out / n) for n in ("beside.png", "curve.png")]


def test_a_bridge_shows_both_tables_and_what_it_transports(tmp_path, monkeypatch):
    first, second = table(tmp_path, "a.csv"), table(tmp_path, "b.csv", n=200, seed=1)
    args = {"hidden": [8], "steps": 4, "sigma": 0.3}
    given = {"data0": str(first), "data1": str(second), "flow": "SchrodingerBridge"}
    run = train(config(tmp_path, **given, data=TrainConfig().data, flow_args=args))
    sets = {}
    save = pictures.save_pairs
    monkeypatch.setattr(
        pictures, "save_pairs", lambda path, s, *a: sets.update(s) or save(path, s, *a)
    )
    (run.out / "pairs.png").unlink()
    drawn = plot(run.out)
    assert drawn[str(run.out / "pairs.png")] == "20 start, 20 end, 2000 transported"
    start, end = run.module.data.validation.unbind(1)
    assert torch.equal(sets["start"], start)
    assert torch.equal(sets["end"], end)
    assert len({tuple(row) for row in sets["transported"].tolist()}) == 2000  # noise of their own
    assert min(count(run.out / "pairs.png", c) for c in (BLUE, ORANGE, GREEN)) > 200
    assert not (run.out / "density.png").exists()


def test_an_overwritten_run_leaves_no_picture(tmp_path):
    table(tmp_path)
    train(config(tmp_path))
    table(tmp_path, header=("a", "b", "c"))
    run = train(config(tmp_path), overwrite=True)
    assert not (run.out / "density.png").exists()


def test_the_first_of_several_processes_draws(tmp_path):
    pictures.draw_at_end(SimpleNamespace(rank=1), tmp_path)  # which would fail, and say so
    assert not [*tmp_path.iterdir()]


# --- what must not end a run --------------------------------------------------------------------------


def test_without_matplotlib_a_run_goes_on_and_says_once_what_to_install(
    tmp_path, capsys, without_matplotlib
):
    table(tmp_path)
    run = train(config(tmp_path, steps=6))
    assert [row["step"] for row in run.history] == [0, 2, 4, 6]
    assert capsys.readouterr().err.splitlines() == [
        "no curve and no plots without matplotlib: pip install matplotlib, "
        f"then pyflowkern plot {run.out}"
    ]
    assert not [*run.out.glob("*.png")]
    assert command("plot", run.out) == 2
    assert capsys.readouterr().err == (
        "pyflowkern: this command needs matplotlib: pip install 'pyflowkern[train]'\n"
    )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("broken")])
def test_a_plot_that_fails_is_a_line(tmp_path, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    table(tmp_path)
    monkeypatch.setattr(pictures, "save_pairs", fail)
    run = train(config(tmp_path))
    assert run.history[-1]["step"] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run.out}: its plots were not drawn (")
    assert line.endswith(f"); pyflowkern plot {run.out} tries again")
    assert str(error) in line


def test_a_curve_that_fails_is_a_line(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    table(tmp_path)
    monkeypatch.setattr("pyflowkern.train.callbacks.curve_picture", fail)
    run = train(config(tmp_path, steps=4))
    assert run.history[-1]["step"] == 4
    assert capsys.readouterr().err.count("broken") == 1
    assert (run.out / "pairs.png").exists()


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    table(folder)
    train(config(folder))
    return folder


def test_what_holds_no_run_is_named(finished, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "note.ckpt").write_text("no checkpoint")
    run = finished / "run"
    for arguments, message in {
        ("none",): "none: no such run",
        (tmp_path,): f"{tmp_path}: holds no run (no last.ckpt)",
        (tmp_path / "begun",): "begun: its run ended before its first checkpoint; go on with: pyf",
        (tmp_path / "note.ckpt",): "note.ckpt: not a pyflowkern checkpoint",
        (run, "--out", tmp_path / "note.ckpt"): "note.ckpt: is a file, wants a folder",
        (run, "--data", tmp_path / "no.csv"): "no.csv: no such file or folder",
        (run, "-n", "3000"): "Invalid value for '-n' / '--number'",
    }.items():
        assert command("plot", *arguments) == 2
        found = capsys.readouterr()
        assert message in found.err
        assert found.out == ""
    with pytest.raises(ConfigError, match="number must be from 1 to 2000, got 0"):
        plot(run, n=0)


def test_data_that_are_gone_or_others_are_named(tmp_path, capsys):
    table(tmp_path)
    run = train(config(tmp_path))
    before = sorted(run.out.iterdir())
    (run.out / "pairs.png").unlink()
    (tmp_path / "rows.csv").unlink()
    assert command("plot", run.out) == 2
    assert re.fullmatch(r"pyflowkern: .*rows.csv: no such file.*\n", capsys.readouterr().err)
    table(tmp_path, seed=5)
    assert command("plot", run.out) == 2
    assert "rows.csv: has changed since training" in capsys.readouterr().err
    table(tmp_path, "moved.csv")
    assert command("plot", run.out, "--data", tmp_path / "moved.csv") == 0
    (run.out / "metrics.csv").write_text("step,train\n1,x\n")
    with pytest.raises(ConfigError, match=r"metrics\.csv: is damaged"):
        plot(run.out, data=str(tmp_path / "moved.csv"))
    assert sorted(run.out.iterdir()) == before


def test_a_run_that_is_not_finished_says_how_far_it_is(tmp_path, monkeypatch):
    table(tmp_path)
    monkeypatch.setattr("pyflowkern.train.callbacks.History.on_train_end", _die)
    with pytest.raises(KeyError):
        train(config(tmp_path, steps=2))
    chosen = (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 2\n" in chosen
    drawn = plot(tmp_path / "run")
    assert "after" not in "".join(drawn.values())
    monkeypatch.undo()
    monkeypatch.setattr("pyflowkern.train.callbacks.History.on_train_epoch_end", _at_four)
    with pytest.raises(KeyError):
        train(config(tmp_path, steps=6, out=str(tmp_path / "other")))
    drawn = plot(tmp_path / "other")
    assert {what.rpartition(", ")[2] for what in drawn.values()} == {"after 2 of 6 steps"}


def test_some_rows_of_a_file_are_any_of_its_parts():
    parts = [torch.arange(1000.0)[:, None], torch.arange(1000.0, 1500.0)[:, None]]
    some = pictures._some(parts, 300, seed=0)
    assert some.shape == (300, 1)
    assert len(some.unique()) == 300
    # 100 of the second part, give or take four standard deviations
    assert abs(int((some >= 1000).sum()) - 100) < 33
    both = [Conditioned(part, 2 * part) for part in parts]
    assert torch.equal(pictures._some(both, 300, 0).context, 2 * some)
    assert torch.equal(pictures._some(parts[:1], 2000, 0), parts[0])


def test_a_run_on_data_of_its_own_is_drawn(tmp_path):
    x = torch.randn(60, 1)
    data = DataSet("numbers", x[10:], x[:10], mean=x.mean(0), std=x.std(0))
    run = train(config(tmp_path, flow="NSF", flow_args={"transforms": 1, "hidden": [4]}), data)
    assert (run.out / "pairs.png").stat().st_size > 3000


def _die(self, trainer, module):
    raise KeyError("died")


def _at_four(self, trainer, module):
    if module.step == 4:
        raise KeyError("died")
