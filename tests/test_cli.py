"""The command line: help, whole runs, and one line for every mistake."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import pyflowkern
from pyflowkern import flows
from pyflowkern.cli import main
from pyflowkern.train import FlowModule, TrainConfig
from pyflowkern.train.checkpoint import load_checkpoint

COMMANDS = ("demo", "train", "compare", "sample", "evaluate", "plot", "export", "info")
SMALL = ["--batch-size", "16", "--set", "every=2", "--set", "hidden=4", "--set", "levels=1"]
SMALL += ["--set", "flow_args.steps=1"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def cli(*arguments):
    """Run ``pyflowkern ...`` through the entry point of the installed script, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["pyflowkern", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            main()
    finally:
        sys.argv = before
    return Result(int(caught.value.code or 0), out.getvalue(), err.getvalue())


def succeeds(*arguments):
    result = cli(*arguments)
    assert result.code == 0, result
    return result.out


def refuses(folder, *arguments):
    """Assert exit code 2 and that ``folder`` did not change; return the one line of stderr."""
    before = sorted(folder.rglob("*"))
    result = cli(*arguments)
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("pyflowkern: ")
    assert len(result.err.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before, "something was written"
    return result.err


@pytest.fixture(autouse=True)
def _temporary_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    succeeds("train", "--data", "digits", "--steps", 4, "--out", out, *SMALL)
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with a table that has a header, and a run on it."""
    folder = tmp_path_factory.mktemp("table")
    rows = np.random.default_rng(0).normal((50, -3), (5, 0.1), (80, 2))
    lines = ["length,width", *(f"{a:.4f},{b:.4f}" for a, b in rows)]
    (folder / "table.csv").write_text("\n".join(lines))
    options = ("--data", folder / "table.csv", "--flow", "RealNVP", "--steps", 4)
    printed = succeeds("train", *options, "--out", folder / "run", *SMALL)
    assert "nats are of the negative log-density: lower is better" in printed
    assert re.search(r"step +4/4  train -?\d+\.\d+  held out -?\d+\.\d+ nats", printed)
    assert "values repeat" not in printed
    return folder


# ---------------------------------------------------------------- help


def test_help_shows_every_command_and_how_to_start():
    text = succeeds("--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*\.$", text, re.MULTILINE), "no whole sentence"
    assert "..." not in text.split("Commands:")[1], "a sentence was cut off"
    assert "Start with   pyflowkern demo" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command):
    text = succeeds(command, "--help")
    for option, rest in re.findall(r"^  (?:-\w, )?--([\w-]+)(.*)", text, re.MULTILINE):
        assert re.search(r"[A-Z]\w+|photos", rest), f"--{option} is not explained"
    assert not re.search(r"\b(Tensor|module|kwargs)\b", text), "a word of the implementation"


def test_help_of_train_names_every_option_flow_and_default():
    text = succeeds("train", "--help")
    config = TrainConfig()
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        assert f"{field.name}: {value}" in text, f"{field.name} is missing or has another default"
    for name, value in vars(flows).items():
        if isinstance(value, type) and issubclass(value, flows.Flow) and value is not flows.Flow:
            assert name in text


def test_no_command_shows_the_help():
    result = cli()
    assert "Commands:" in result.out + result.err


# ---------------------------------------------------------------- whole runs


def test_images_from_training_to_score(digits, tmp_path):
    for name in ("last.ckpt", "best.ckpt", "metrics.csv", "curve.png", "samples.png"):
        assert (digits / name).stat().st_size, name
    assert succeeds("sample", digits, "--out", "s.png", "-n", 5) == "s.png: 5 samples\n"
    with Image.open("s.png") as image:
        assert image.size == (2 * (3 * 10 + 2), 2 * (2 * 10 + 2))  # 3 columns, 2 rows, gaps, zoom
    succeeds("sample", digits / "last.ckpt", "--out", "new/s.NPY", "-n", 5, "--seed", 7)
    succeeds("sample", digits, "--out", "again.npy", "-n", 5, "--seed", 7)
    first, again = np.load("new/s.NPY"), np.load("again.npy")
    assert first.dtype == np.uint8
    assert first.shape == (5, 1, 8, 8)
    np.testing.assert_array_equal(first, again)
    result = json.loads(succeeds("evaluate", digits, "--json"))
    assert (result["unit"], result["rows"], result["step"]) == ("bits/dim", 180, 4)
    assert 2 < result["score"] < 5  # 5 bits is the score of the uniform distribution
    assert f"{result['score']:.4f} +- " in succeeds("evaluate", digits)


def test_table_from_training_to_score(table):
    run = table / "run"
    succeeds("sample", run, "--out", "s.csv", "-n", 200)
    with open("s.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["length", "width"]
    samples = np.array(rows, float)
    assert samples.shape == (200, 2)
    np.testing.assert_allclose(samples.mean(0), (50, -3), rtol=0.05)  # 14 and 21 standard errors
    succeeds("sample", run, "--out", "s.npy", "--temperature", 0, "-n", 3)
    calm = np.load("s.npy")
    np.testing.assert_array_equal(calm, calm[:1].repeat(3, 0))
    held_out = json.loads(succeeds("evaluate", run, "--json"))
    assert (held_out["rows"], held_out["unit"]) == (8, "nats")
    assert "nats (negative log-density, lower is better), mean over 8" in succeeds("evaluate", run)
    assert all(text == str(np.float32(text)) for row in rows for text in row)  # no digit more
    succeeds("evaluate", run, "--data", "s.csv")


def test_one_row_is_enough_to_score(table):
    """Held-out data needs no split and no statistics of its own."""
    Path("one.csv").write_text("50,-3\n")
    Path("far.csv").write_text("500,-3\n500,-3\n")
    near, far = (
        json.loads(succeeds("evaluate", table / "run", "--json", "--data", name))
        for name in ("one.csv", "far.csv")
    )
    assert (near["rows"], far["rows"]) == (1, 2)
    # a normal with the table's spreads, 5 and 0.1: log(2 pi) + log(5 * 0.1) at the centre
    assert near["score"] == pytest.approx(1.14, abs=1)
    assert far["score"] > near["score"] + 100


def test_flags_override_yaml_and_numbers_may_be_written_freely(table, tmp_path):
    Path("run.yaml").write_text(
        f"data: {table / 'table.csv'}\nflow: RealNVP\nlr: 2e-3\nsteps: 9\nevery: 1\n"
        "flow_args:\n  hidden: 4\n  steps: 2\n"
    )
    settings = ("--set", "flow_args.steps=3", "--set", "levels=1", "--set", "weight_decay=1e-2")
    succeeds("train", "run.yaml", "--steps", 1, "--out", "run", *settings)
    config = TrainConfig.create(TrainConfig.read(Path("run/config.yaml")))
    assert (config.lr, config.steps, config.weight_decay) == (2e-3, 1, 1e-2)
    assert config.flow_args.items() >= {"hidden": 4, "steps": 3, "levels": 1}.items()
    succeeds("train", "run.yaml", "--steps", 1, "--out", "run", "--overwrite")
    whole = ("--set", "flow_args={hidden: 5}")
    whole = (*whole, "--memory", "reversible")
    succeeds("train", "run.yaml", "--steps", 1, "--out", "run", "--overwrite", *whole)
    config = TrainConfig.create(TrainConfig.read(Path("run/config.yaml")))
    assert config.flow_args["memory"] == "reversible"
    # 3: the default of the flow
    assert (config.flow_args["hidden"], config.flow_args["steps"]) == (
        5,
        3,
    )


def test_resume_gives_what_an_uninterrupted_run_gives(digits, tmp_path, monkeypatch):
    step = FlowModule.training_step

    def die(self, batch, index):
        if self.step == 3:
            raise RuntimeError("killed")
        step(self, batch, index)

    monkeypatch.setattr(FlowModule, "training_step", die)
    with pytest.raises(RuntimeError, match="killed"):
        cli("train", "--data", "digits", "--steps", 4, "--out", "run", *SMALL)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert load_checkpoint(tmp_path / "moved")["pyflowkern"]["progress"][0] == 2
    succeeds("train", "--resume", "moved")
    whole, resumed = load_checkpoint(digits)["state_dict"], load_checkpoint(tmp_path / "moved")
    assert all(whole[name].equal(tensor) for name, tensor in resumed["state_dict"].items())


def test_divergence_is_one_line_and_exit_code_1(table):
    settings = ("--lr", "1000", "--set", "warmup=0", "--set", "clip=1e38", "--set", "every=50")
    options = ("--data", table / "table.csv", "--flow", "RealNVP", "--out", "run")
    result = cli("train", *options, *SMALL, *settings, "--set", "max_bad_steps=3")
    assert result.code == 1
    assert re.fullmatch(
        r"pyflowkern: stopped at step \d+: loss or gradient was not finite in 3 steps in a row .*\n",
        result.err,
    )


def test_info_prints_show_config():
    assert succeeds("info") == pyflowkern.show_config() + "\n"


# ---------------------------------------------------------------- mistakes in the data


def _save(array):
    return lambda path: np.save(path, array)


def _text(text):
    return lambda path: path.write_text(text)


def _archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones((4, 2)))


def _folder(path):
    path.mkdir()
    (path / "broken.png").write_bytes(b"no image")


NAN = np.random.default_rng(0).normal(size=(20, 2))
NAN[12, 1] = np.nan
BAD = {
    "missing": ("none.csv", lambda path: None, "none.csv: no such file"),
    "empty": ("t.csv", _text(""), "t.csv: holds no rows"),
    "binary": ("t.csv", lambda path: path.write_bytes(b"\xff\xfe\x00"), "t.csv: not a readable"),
    "nan": ("t.csv", _text("a,b\n1,2\n3,nan\n"), "t.csv, row 3, column 2 (b): holds NaN"),
    "gap": ("t.csv", _text("a,b\n1,2\n3,\n"), "t.csv, row 3, column 2 (b): is empty,"),
    "first row": ("t.csv", _text("1,NA\n1,2\n3,4\n"), "t.csv, row 1, column 2: 'NA' is not a"),
    "short row": ("t.csv", _text("1,2\n3,4\n5\n"), "t.csv, row 3: 1 columns instead of 2"),
    "npy nan": ("a.npy", _save(NAN), "a.npy, row 13, column 2: holds NaN or inf"),
    "npy empty": ("a.npy", _save(np.zeros((0, 2))), "a.npy: is empty"),
    "npy text": ("a.npy", _text("text"), "a.npy: not a readable"),
    "npz": ("a.npy", _archive, "a.npy: is an archive"),
    "npy axes": ("a.npy", _save(np.zeros((4, 2, 2, 2))), "a.npy: wants real [N, D]"),
    "channels": ("a.npy", _save(np.zeros((9, 5, 8, 8), np.uint8)), "a.npy: images have 1 or 3"),
    "folder": ("images", _folder, "broken.png: not a readable image"),
    "other": ("t.txt", _text("1,2"), "t.txt: wants a .csv, .npy or .parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_stops_training_and_scoring(case, tmp_path, table):
    name, write, message = BAD[case]
    write(tmp_path / name)
    assert message in refuses(tmp_path, "train", "--data", name, "--flow", "RealNVP")
    assert message in refuses(tmp_path, "evaluate", table / "run", "--data", name)


def test_data_of_another_shape_is_not_scored(table, digits, tmp_path):
    Path("three.csv").write_text("1,2,3\n4,5,6\n")
    line = refuses(tmp_path, "evaluate", table / "run", "--data", "three.csv")
    assert "three.csv: holds rows of 3 numbers; the flow was trained on rows of 2 numbers" in line
    line = refuses(tmp_path, "evaluate", table / "run", "--data", "digits")
    assert "digits: holds 5-bit images of shape (1, 8, 8)" in line
    np.save("eight.npy", np.zeros((4, 1, 8, 8), np.uint8))
    line = refuses(tmp_path, "evaluate", digits, "--data", "eight.npy")
    assert "holds 8-bit images of shape (1, 8, 8); the flow was trained on 5-bit images" in line


def test_changed_training_data_is_not_scored_as_held_out(tmp_path):
    np.save("a.npy", np.random.default_rng(0).normal(size=(30, 2)))
    options = ("--data", "a.npy", "--flow", "RealNVP", "--steps", 1, *SMALL)
    succeeds("train", *options, "--out", "run")
    np.save("a.npy", np.random.default_rng(1).normal(size=(30, 2)))
    assert "a.npy: has changed since training" in refuses(tmp_path, "evaluate", "run")
    assert "other data than a.npy holds now" in refuses(tmp_path, "train", "--resume", "run")


# ---------------------------------------------------------------- other mistakes

TRAIN = {
    "option": (["lrr: 1"], [], "unknown option 'lrr'; known are data, size"),
    "type": (["lr: fast"], [], "lr must be a number, got 'fast'"),
    "range": (["steps: 0"], [], "steps must be positive, got 0"),
    "infinite": (["lr: .inf"], [], "lr must be positive, got inf"),
    "huge": (["lr: 1.0e+38"], [], "lr must be at most 1000"),
    "fraction": (["ema: 1.5"], [], "ema must lie in [0, 1], got 1.5"),
    "seed": (["seed: 9223372036854775808"], [], "seed must be below 2^63"),
    "precision": (["precision: fp8"], [], "precision must be 32-true or bf16-mixed, got 'fp8'"),
    "flow": (
        ["flow: Glove"],
        [],
        "unknown flow 'Glove'; known are CNF, FFJORD, FlowMatching, Glow, IAF, MAF",
    ),
    "flow_args": (["flow_args: 3"], ["--set", "hidden=4"], "flow_args must be a mapping"),
    "argument": ([], ["--set", "width=4"], "Glow takes no argument 'width'; it takes levels"),
    "hidden": ([], ["--set", "hidden=wide"], "hidden of Glow must be a whole number, got 'wide'"),
    "truth": (
        ["flow: NSF"],
        ["--set", "residual=2"],
        "residual of NSF must be true or false, got 2",
    ),
    "fractional": ([], ["--set", "hidden=4.5"], "hidden of Glow must be a whole number, got 4.5"),
    "memory": ([], ["--memory", "all"], "memory must be one of stored, reversible, got 'all'"),
    "value": ([], ["--set", "levels=4"], "spatial sizes divisible by 2^levels = 16"),
    "no value": ([], ["--set", "hidden"], "--set wants NAME=VALUE, got 'hidden'"),
    "yaml value": ([], ["--set", "hidden=["], "--set hidden=[: the value is not readable"),
    "no options": (["steps"], [], "run.yaml: wants `option: value` lines"),
    "no yaml": (["a: [", "b"], [], "run.yaml: not a readable YAML file"),
    "size": ([], ["--data", "photos", "--set", "size=4000"], "photos: size must be at most"),
    "a file": ([], ["--out", "run.yaml"], "run.yaml: is a file, wants a folder"),
    "under a file": ([], ["--out", "run.yaml/out"], "run.yaml: is a file, wants a folder"),
    "resume": ([], ["--resume", "."], "--resume takes every option from the run itself"),
}


@pytest.mark.parametrize("case", TRAIN)
def test_bad_options_of_train(case, tmp_path):
    lines, flags, message = TRAIN[case]
    Path("run.yaml").write_text("\n".join(lines or ["seed: 0"]))
    data = [] if "--data" in flags or case == "resume" else ["--data", "digits"]
    assert message in refuses(tmp_path, "train", "run.yaml", *data, *flags)


def test_other_bad_calls(digits, table, tmp_path):
    Path("no.ckpt").write_text("no checkpoint")
    for arguments, message in {
        ("train", "none.yaml"): "none.yaml: not a readable YAML file",
        ("train", "--resume", "none"): "none: holds no run to resume",
        ("train", "--data", "digits", "--out", digits): "holds a run already",
        ("train", "--resume", digits, "--overwrite"): "give it alone",
        ("sample", digits, "--out", "s.csv"): "s.csv: these samples go to a .png or .npy file",
        ("sample", table / "run", "--out", "s.png"): "these samples go to a .csv, .npy or .parq",
        ("sample", digits, "--out", "s.png", "-n", 10**9): "samples would need 1.02e+03 GB of mem",
        ("sample", "none", "--out", "s.png"): "none: not a pyflowkern checkpoint (no such file)",
        ("evaluate", "no.ckpt"): "no.ckpt: not a pyflowkern checkpoint",
        ("evaluate", digits, "--data", "none"): "none: no such file or folder",
        ("demo", "--out", "no.ckpt"): "no.ckpt: is a file, wants a folder",
    }.items():
        assert message in refuses(tmp_path, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "pyflowkern", "train", "--data", "t.csv", "--flow", "RealNVP"),
        ("-c", "from pyflowkern.cli import main; main()", "evaluate", "none"),
    ],
)
def test_a_separate_process_shows_no_traceback(arguments, tmp_path):
    Path("t.csv").write_text("1,2\n3,4\n5,inf\n")
    # the package under test may be installed or on the path of this process
    paths = [str(Path(pyflowkern.__file__).parents[1])]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"pyflowkern: (t.csv, row 3, column 2|none): .*\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
