"""The demonstration in a short form: its output and its files."""

import csv
import re
from dataclasses import replace

import pytest

from pyflowkern._commands import app
from pyflowkern.train import demo as demo_module

#: Rows with kernels, reference and gain.
COMPARED = (
    "steps/s",
    "peak memory, MB",
    "spline-flow step",
    "1000 MAF samples",
    "continuous-flow step",
)


def run(capsys, *flags):
    app(["demo", "--out", "demo", "--minutes", "0.1", *flags], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_short_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"levels": 2, "steps": 1, "hidden": 8}
    monkeypatch.setattr(
        demo_module, "CONFIG", replace(demo_module.CONFIG, flow_args=small, batch_size=8, warmup=1)
    )
    monkeypatch.setattr(demo_module, "ROUNDS", 4)
    text = run(capsys)
    for name in ("samples.png", "curve.png", "metrics.csv", "last.ckpt"):
        assert (tmp_path / "demo" / name).stat().st_size, name
    numbers = {
        label: [float(word) for word in re.findall(r"[\d.]+(?:e-?\d+)?", rest.split("(")[0])]
        for label, rest in re.findall(
            rf"^  (bits/dim|round-trip error|{'|'.join(COMPARED)}) +(.*)", text, re.MULTILINE
        )
    }
    before, after = numbers["bits/dim"]
    assert 9 > before > after > 2
    assert 0 < numbers["round-trip error"][0] < 1 / 256
    with open("demo/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[i]["held_out"]) for i in (0, -1)] == pytest.approx(
        [before, after], abs=1e-3
    )
    for label in COMPARED:
        fused, reference, gain = numbers[label]
        assert fused > 0
        assert reference > 0
        assert gain > 0
    again = run(capsys, "--resume")
    assert "bits/dim" in again
    assert "measuring" not in again, "a resumed demo keeps its measurements"
