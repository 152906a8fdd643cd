"""Features of the trainer: warm-up, clipping, bf16, logs, the progress bar, early stopping."""

import math
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyflowkern import flows
from pyflowkern.train import FlowModule, TrainConfig, train
from pyflowkern.train.checkpoint import load_checkpoint
from pyflowkern.train.config import ConfigError

TINY = {
    "data": "digits",
    "flow": "Glow",
    "flow_args": {"levels": 1, "steps": 1, "hidden": 4},
    "batch_size": 16,
    "steps": 6,
    "every": 2,
    "warmup": 4,
}
FLOWS = sorted(
    name
    for name, value in vars(flows).items()
    if isinstance(value, type) and issubclass(value, flows.Flow) and value is not flows.Flow
)


def config(out, **changes):
    return TrainConfig.create({**TINY, "out": str(out), **changes})


@pytest.fixture
def steps_taken(monkeypatch):
    """Record learning rate, weight decay and norm of the gradient at each step of AdamW."""
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, closure=None):
        (group,) = self.param_groups
        norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        seen.append((group["lr"], group["weight_decay"], norm))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return seen


def test_warm_up_decay_and_clipping_reach_the_optimizer(tmp_path, steps_taken):
    # two runs that differ in the clip: above all gradients, then far below them
    train(config(tmp_path / "free", lr=0.1, clip=1e9, weight_decay=0.03, final_lr=0.5))
    free, steps_taken[:] = list(steps_taken), []
    train(config(tmp_path / "clipped", lr=0.1, clip=0.01, weight_decay=0.03, final_lr=0.5))
    assert [rate for rate, _, _ in free] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.075])
    assert {decay for _, decay, _ in free} == {0.03}
    assert all(norm > 0.02 for _, _, norm in free)
    assert [norm for _, _, norm in steps_taken] == pytest.approx([0.01] * 6, rel=1e-3)


SMALL = {
    "CNF": {"hidden": [8], "method": "rk4", "step_size": 0.5},
    "FFJORD": {"hidden": [8], "method": "rk4", "step_size": 0.5},
    "FlowMatching": {"hidden": [8], "method": "rk4", "step_size": 0.5},
    "MAF": {"transforms": 1},
    "IAF": {"transforms": 1},
}
VECTORS = {"MAF", "IAF"}


@pytest.mark.parametrize(
    ("name", "data"),
    [(n, d) for n in FLOWS for d in ("digits", "rows.csv") if d != "digits" or n not in VECTORS],
)
def test_every_flow_trains_by_its_name(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "rows.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    arguments = SMALL.get(name, {"levels": 1})
    run = train(config("run", flow=name, data=data, steps=2, every=1, flow_args=arguments))
    assert type(run.module.model.flow).__name__ == name
    assert math.isfinite(run.history[-1]["held_out"])


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_a_flow_of_vectors_refuses_images(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} is a flow of rows, digits has images"):
        train(config(tmp_path / "run", flow=name, flow_args={}))
    assert not (tmp_path / "run").exists()


def test_bf16_autocasts_the_conditioners(tmp_path):
    seen = set()

    def note(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            seen.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        train(config(tmp_path / "32", steps=1))
        assert seen == {torch.float32}
        seen.clear()
        train(config(tmp_path / "16", steps=1, precision="bf16-mixed"))
        assert torch.bfloat16 in seen
    finally:
        handle.remove()


def test_tensorboard_holds_scores_and_samples(tmp_path):
    run = train(config(tmp_path, every=1))
    log = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    log.Reload()
    assert {"train", "held_out"} <= set(log.Tags()["scalars"])
    logged = [event.value for event in log.Scalars("held_out")]
    assert logged == pytest.approx([row["held_out"] for row in run.history[1:]], rel=1e-5)
    assert [event.step for event in log.Images("samples")] == [1, 2, 3, 4, 5, 6]


def test_the_bar_shows_bits_per_dim(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(config(tmp_path))
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "train bits/dim=" in shown
    assert "held out bits/dim=" in shown
    assert "v_num" not in shown


def test_early_stopping_says_why_and_a_resumed_run_stays_stopped(tmp_path, capsys):
    options = config(tmp_path, steps=40, lr=1e-12, patience=2)
    stopped = train(options)
    last = int(stopped.history[-1]["step"])
    assert last < 40
    line = f"stopped at step {last}: the held-out score has not fallen in 2 evaluations"
    assert line in capsys.readouterr().out
    again = train(options, resume=True)
    assert again.history == stopped.history
    assert line in capsys.readouterr().out
    assert load_checkpoint(tmp_path)["pyflowkern"]["progress"][0] == last


def test_a_non_finite_evaluation_does_not_end_the_search_for_the_best(tmp_path, monkeypatch):
    mean = FlowModule._mean_held_out
    monkeypatch.setattr(
        FlowModule, "_mean_held_out", lambda self: math.nan if self.step == 2 else mean(self)
    )
    train(config(tmp_path))
    assert load_checkpoint(tmp_path / "best.ckpt")["pyflowkern"]["progress"][0] == 6


def test_early_stopping_names_a_non_finite_score(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FlowModule, "_mean_held_out", lambda self: math.nan)
    train(config(tmp_path, patience=2))
    assert "stopped at step 2: the held-out score is nan" in capsys.readouterr().out
