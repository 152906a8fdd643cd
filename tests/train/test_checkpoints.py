"""Damaged, foreign and missing checkpoints: one line, exit code 2, nothing written."""

import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from pyflowkern import cli
from pyflowkern.train import TrainConfig, train
from pyflowkern.train.checkpoint import load_checkpoint, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.runner import resume_config

OPTIONS = {"flow_args": {"steps": 1, "hidden": 4}, "every": 2, "batch_size": 8, "flow": "RealNVP"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of four steps out of eight, of a table with two columns."""
    folder = tmp_path_factory.mktemp("original")
    np.savetxt(folder / "t.csv", np.random.default_rng(0).normal(size=(50, 2)), delimiter=",")
    options = {**OPTIONS, "data": str(folder / "t.csv"), "out": str(folder / "run"), "steps": 4}
    train(TrainConfig.create(options))
    text = (folder / "run" / "config.yaml").read_text()
    (folder / "run" / "config.yaml").write_text(text.replace("steps: 4", "steps: 8", 1))
    return folder / "run"


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def refused(capsys, monkeypatch, run, *arguments):
    """Assert exit code 2 and that nothing in the folder changed; return the one line of stderr."""
    before = files(run.parent)
    monkeypatch.setattr(sys, "argv", ["pyflowkern", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, ""), captured
    assert captured.err.startswith("pyflowkern: ")
    assert len(captured.err.splitlines()) == 1
    assert files(run.parent) == before, "something was written"
    return captured.err


def edited(change):
    """Return a function that edits the contents of a checkpoint."""

    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def weights(change):
    """Return a function that edits the weights of a checkpoint, trained and averaged."""

    def each(checkpoint):
        state = checkpoint["state_dict"]
        name = next(n for n in state if n.startswith("averaged.module.flow") and "weight" in n)
        change(state, name)
        change(state, name.replace("averaged.module", "model"))

    return edited(each)


def _nan(state, name):
    state[name].view(-1)[0] = math.nan


def _flip(path):
    """Flip one bit of a weight, which the file format alone does not detect."""
    data = bytearray(path.read_bytes())
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    largest = max(state.values(), key=torch.Tensor.numel)
    place = data.find(largest.numpy().tobytes())
    assert place > 0
    data[place + 1] ^= 1
    path.write_bytes(data)


def _other_flow(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["pyflowkern"]["config"]["flow"] = "MAF"
    checkpoint["pyflowkern"]["config"]["flow_args"] = {}
    torch.save(checkpoint, path)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "flipped bit": (_flip, "damaged, the checksum of "),
    "cut off": (_cut, "not a pyflowkern checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a pyflowkern checkpoint"),
    "text": (lambda path: path.write_text("text"), "not a pyflowkern checkpoint"),
    "pipe": (_pipe, "not a regular file"),
    "other file": (lambda path: torch.save({"a": 1}, path), "not a pyflowkern checkpoint"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "not a pyflowkern checkpoint"),
    "no weights": (edited(lambda c: c.pop("state_dict")), "without state_dict"),
    "no data": (edited(lambda c: c["pyflowkern"].pop("data")), "without pyflowkern.data.name"),
    "no progress": (
        edited(lambda c: c["pyflowkern"].pop("progress")),
        "without pyflowkern.progress",
    ),
    "progress": (
        edited(lambda c: c["pyflowkern"].update(progress=[-1, 0, 0])),
        "progress must be three counts",
    ),
    "shape": (edited(lambda c: c["pyflowkern"]["data"].update(shape=["2"])), "shape ['2'] is"),
    "mean": (
        edited(lambda c: c["pyflowkern"]["data"].update(mean=torch.zeros(3))),
        "rows without a finite mean and standard deviation",
    ),
    "missing weight": (weights(lambda s, n: s.pop(n)), "its weights do not fit"),
    "misshapen weight": (
        weights(lambda s, n: s.update({n: torch.zeros(9, 9)})),
        "its weights do not fit",
    ),
    "strange weight": (weights(lambda s, n: s.update({n: "weight"})), "its weights do not fit"),
    "not a number": (weights(_nan), "its weights are not finite"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(kind, run, capsys, monkeypatch):
    damage, message = DAMAGE[kind]
    damage(run / "last.ckpt")
    for command in (
        ("train", "--resume", run),
        ("sample", run, "--out", run.parent / "s.csv"),
        ("evaluate", run),
    ):
        line = refused(capsys, monkeypatch, run, *command)
        assert f"{run / 'last.ckpt'}: " in line
        assert message in line


def test_weights_of_another_flow(run, capsys, monkeypatch):
    _other_flow(run / "last.ckpt")
    line = refused(capsys, monkeypatch, run, "sample", run, "--out", run.parent / "s.csv")
    assert "last.ckpt: its weights do not fit" in line
    text = (run / "config.yaml").read_text().replace("hidden: 4", "hidden: 8")
    (run / "config.yaml").write_text(text)
    line = refused(capsys, monkeypatch, run, "train", "--resume", run)
    assert "last.ckpt: its weights do not fit" in line


OPTIMIZER = {
    "none": lambda c: c.update(optimizer_states=[]),
    "misshapen": lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(7)),
    "without": lambda c: c["optimizer_states"][0]["state"][0].pop("exp_avg"),
    "groups": lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].pop(),
    "rows": lambda c: c["callbacks"]["History"].update(rows=[{"step": "first"}]),
    "best": lambda c: c["callbacks"]["KeepLastAndBest"].clear(),
}


@pytest.mark.parametrize("kind", OPTIMIZER)
def test_a_state_from_which_training_cannot_resume(kind, run, capsys, monkeypatch):
    edited(OPTIMIZER[kind])(run / "last.ckpt")
    line = refused(capsys, monkeypatch, run, "train", "--resume", run)
    assert "last.ckpt: cannot be resumed" in line
    load_trained(run)  # its weights can still be loaded


def test_a_checkpoint_of_an_earlier_version_loads_and_resumes(run):
    """Lightning's counters were stored, the scores since the last evaluation were not."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    checkpoint["loops"] = {"fit_loop": {"state_dict": {}}}
    del checkpoint["pyflowkern"]["scores"]
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["fused"] = None
    torch.save(checkpoint, run / "last.ckpt")
    history = train(TrainConfig.create(TrainConfig.read(run / "config.yaml")), resume=True).history
    assert [row["step"] for row in history] == [0, 2, 4, 6, 8]


def config(run):
    return TrainConfig.create({**TrainConfig.read(run / "config.yaml"), "out": str(run)})


def test_without_the_last_checkpoint_the_best_one_is_used_with_a_warning(run, capsys):
    (run / "last.ckpt").unlink()
    step = load_checkpoint(run / "best.ckpt")["pyflowkern"]["progress"][0]
    history = train(config(run), resume=True).history
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{run}/last.ckpt is gone; going on from {run}/best.ckpt, which may be older"
    assert step > 0
    assert [row["step"] for row in history] == [0, 2, 4, 6, 8]


def test_without_any_checkpoint_resuming_is_refused(run, capsys, monkeypatch):
    (run / "last.ckpt").unlink()
    (run / "best.ckpt").unlink()
    line = refused(capsys, monkeypatch, run, "train", "--resume", run)
    assert "last.ckpt and best.ckpt are gone" in line


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_a_message(run, capsys):
    for path in run.iterdir():
        if path.name != "config.yaml" and path.is_file():
            path.unlink()
    train(config(run), resume=True)
    assert "no checkpoint was written yet; starting at step 0" in capsys.readouterr().out


def test_an_overwritten_run_leaves_no_files_behind(run, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyflowkern.train.runner._fit", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(run), overwrite=True)
    left = {path.name for path in run.rglob("*") if path.is_file()} - {"hparams.yaml"}
    assert left == {"config.yaml"}


NUMBERS = {
    "samples": (("-n", 10**12), "1000000000000 samples would take 8e+03 GB or more"),
    "infinite": (("--temperature", "inf"), "temperature must be a number from 0 on, got inf"),
    "not a number": (("--temperature", "nan"), "temperature"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_impossible_numbers(kind, run, capsys, monkeypatch):
    options, message = NUMBERS[kind]
    out = ("--out", run.parent / "s.csv")
    assert message in refused(capsys, monkeypatch, run, "sample", run, *out, *options)


def test_samples_do_not_go_into_a_folder(run, capsys, monkeypatch):
    (run.parent / "s.csv").mkdir()
    line = refused(capsys, monkeypatch, run, "sample", run, "--out", run.parent / "s.csv")
    assert "s.csv: is a folder, wants a file" in line


def test_samples_drawn_in_parts_are_as_many_as_asked_for(run, monkeypatch):
    monkeypatch.setattr("pyflowkern.train.inference._DRAWN", 6)  # three rows of two numbers
    from pyflowkern.train.inference import save_samples

    save_samples(run, run / "s.npy", 8)
    rows = np.load(run / "s.npy")
    assert rows.shape == (8, 2)
    assert len(np.unique(rows[:, 0])) == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", 10**400),
        ("minutes", math.inf),
        ("lr", math.nan),
        ("steps", 2**63),
        ("batch_size", 10**5000),
        ("threads", 10**6),
        ("threads", -1),
        ("out", "a\0b"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\0" not in value else "",
)
def test_useless_options(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must ") as caught:
        TrainConfig.create({name: value})
    assert len(str(caught.value)) < 200


def test_a_default_that_changes_later_does_not_change_a_stored_flow(tmp_path):
    """A run stores its flow's settings; runs of earlier versions, which did not, had splines up to 3."""
    out = tmp_path / "run"
    np.savetxt(tmp_path / "t.csv", np.random.default_rng(0).normal(size=(50, 2)), delimiter=",")
    options = {"flow": "NSF", "flow_args": {"transforms": 1}, "data": str(tmp_path / "t.csv")}
    train(TrainConfig.create(options | {"steps": 2, "batch_size": 8, "out": str(out)}))
    for config in (load_trained(out).config, resume_config(out)):
        assert config.flow_args["bins"] == 8
        assert config.flow_args["bound"] is None  # for which the flow now takes 5
    stored = torch.load(out / "last.ckpt", weights_only=True)
    stored["pyflowkern"]["config"]["flow_args"] = {"transforms": 1}
    torch.save(stored, out / "last.ckpt")
    assert load_trained(out).config.flow_args["bound"] == 3.0
