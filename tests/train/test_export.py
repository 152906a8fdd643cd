"""``pyflowkern export``: the flow of a file scores rows as its run does."""

import sys

import numpy as np
import pytest
import torch

from pyflowkern import cli, flows
from pyflowkern.train import TrainConfig, train
from pyflowkern.train.checkpoint import load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.export import export_weights

pytest.importorskip("safetensors")

FLOWS = {
    "NSF": {"transforms": 1, "hidden": [8]},
    "MAF": {"transforms": 1, "hidden": [8]},
    "RealNVP": {"steps": 2, "hidden": 8},
    "FlowMatching": {"hidden": [8], "method": "rk4", "step_size": 0.5},
}


def trained(folder, flow, **changes):
    path = folder / "t.csv"
    np.savetxt(path, np.random.default_rng(0).normal(50, 9, size=(60, 3)), delimiter=",")
    options = {
        "data": str(path),
        "out": str(folder / "run"),
        "flow": flow,
        "steps": 3,
        "warmup": 1,
    }
    options |= {"flow_args": FLOWS.get(flow, {}), "every": 3, "batch_size": 16}
    train(TrainConfig.create(options | changes))
    return folder / "run"


@pytest.mark.parametrize("flow", FLOWS)
def test_densities_of_a_file_are_those_of_the_run(flow, tmp_path):
    run, out = trained(tmp_path, flow), tmp_path / "w.safetensors"
    units = export_weights(run, out)
    model, again = load_trained(run).model, flows.load_flow(out).eval()
    x = torch.from_numpy(np.loadtxt(tmp_path / "t.csv", delimiter=",")).float()
    with torch.no_grad():
        wanted = model.log_prob(x)
        if units == "standardized":
            found = again.log_prob((x - model.mean) / model.std) - model.std.log().sum()
        else:
            found = again.log_prob(x)
    assert units == ("standardized" if flow == "FlowMatching" else "data")
    # rows of 50 in float32 lose two digits where their mean is taken away in another order
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_images(tmp_path, monkeypatch, capsys):
    options = {
        "data": "digits",
        "flow": "Glow",
        "steps": 2,
        "every": 2,
        "batch_size": 4,
        "warmup": 1,
    }
    options |= {"flow_args": {"levels": 1, "steps": 1, "hidden": 4}, "out": str(tmp_path / "run")}
    train(TrainConfig.create(options))
    capsys.readouterr()
    out = tmp_path / "w.safetensors"
    monkeypatch.setattr(
        sys, "argv", ["pyflowkern", "export", str(tmp_path / "run"), "--out", str(out)]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code in (0, None)
    assert capsys.readouterr().out == f"{out}: weights; densities are in units of the data\n"
    flow = flows.load_flow(out).eval()
    stored = load_trained(tmp_path / "run").model.flow.state_dict()
    assert all(torch.equal(t, stored[name]) for name, t in flow.state_dict().items())
    assert flow.sample(2, quantized=True).dtype == torch.uint8


def test_what_cannot_be_exported_is_one_line(tmp_path):
    run = trained(tmp_path, "MAF", context_columns="3")
    with pytest.raises(ConfigError, match="has context columns"):
        export_weights(run, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"weights go to a \.safetensors file"):
        export_weights(run, tmp_path / "w.pt")
    (tmp_path / "f.safetensors").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        export_weights(run, tmp_path / "f.safetensors")
    with pytest.raises(ConfigError, match="no such file"):
        export_weights(tmp_path / "nothing.ckpt", tmp_path / "w.safetensors")
