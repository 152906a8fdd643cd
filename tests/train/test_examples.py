"""Every configuration in examples/ trains."""

import re
from pathlib import Path

import pytest
import yaml

from pyflowkern import train
from pyflowkern.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
#: Small enough for two steps in seconds; what is not named here stays as the file has it.
SHRUNK = {"steps": 2, "every": 1, "batch_size": 4, "minutes": 0.0}


def test_there_are_examples_of_images_and_of_vectors():
    sources = {(c["data"], c["flow"]) for c in map(TrainConfig.read, CONFIGS)}
    assert {("photos", "Glow"), ("photos", "RealNVP"), ("digits", "Glow")} <= sources
    assert any(source.endswith(".csv") for source, _ in sources)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # data paths are relative to it
    options = TrainConfig.read(path)
    assert TrainConfig.create(options).out == f"out/{path.stem}", "two examples share a folder"
    arguments = {**options["flow_args"], "steps": 1, "hidden": 4}
    shrunk = {**options, **SHRUNK, "flow_args": arguments, "out": str(tmp_path)}
    run = train.train(TrainConfig.create(shrunk))
    assert [row["step"] for row in run.history] == [0, 1, 2]
    assert run.history[-1]["skipped"] == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_short_and_says_what_to_expect(path):
    text = path.read_text()
    assert f"pyflowkern train examples/{path.name}" in text
    assert "# Expect: " in text
    assert len(text.splitlines()) <= 30
    assert yaml.safe_load(text)["steps"] >= 1000, "an example is a whole training run"
    for command in re.findall(r"pyflowkern (\w+)", text):
        assert command in ("demo", "train", "sample", "evaluate")
