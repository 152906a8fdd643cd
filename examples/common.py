"""What the example scripts share: their options, a training loop, and pictures."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

mpl.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["batches", "density_picture", "fit", "options", "plt", "save"]


def options(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return the parser that every example starts from."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("out/examples") / name, help="folder of pictures"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def batches(rows: Tensor, size: int) -> Callable[[], Tensor]:
    """Return a function that draws a batch of rows."""
    return lambda: rows[torch.randint(len(rows), (min(size, len(rows)),))]


def fit(
    loss: Callable[[], Tensor],
    parameters: Iterable[torch.nn.Parameter],
    steps: int,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    say: str = "",
    *,
    cosine: bool = True,
    minutes: float = math.inf,
    look: Callable[[int, float], None] | None = None,
    looks: int = 20,
    module: torch.nn.Module | None = None,
    checkpoint: Path | None = None,
) -> list[float]:
    """Minimise ``loss()`` with AdamW and clipped gradients; return its values.

    It ends after so many ``steps``, or ``minutes`` of CPU time; the learning rate follows a cosine over
    whichever ends first.  ``look(step, minutes)`` is called ``looks`` times.  With a ``checkpoint`` all that
    ``module`` and optimizer need to go on is written there after each look, and read where the file exists.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
    course: list[float] = []
    step, spent = _restore(checkpoint, module, optimizer)
    began, done = time.process_time() - 60 * spent, max(step / steps, spent / minutes)
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done)) if cosine else lr
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        course.append(float(value.detach()))
        step, spent = step + 1, (time.process_time() - began) / 60
        before, done = done, max(step / steps, spent / minutes)
        if say and int(5 * done) > int(5 * before):
            print(f"{say}: step {step}, loss {course[-1]:.3f}", flush=True)
        if look is not None and int(looks * done) > int(looks * before):
            look(step, spent)
            if checkpoint is not None and module is not None:
                _keep(checkpoint, module, optimizer, step, (time.process_time() - began) / 60)
    return course


def _keep(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    minutes: float,
) -> None:
    """Write where a run stands; a run that is killed meanwhile leaves the file before."""
    now = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "minutes": minutes,
        "random": torch.get_rng_state(),
    }
    beside = path.with_name(f"{path.name}.new")
    torch.save(now, beside)
    os.replace(beside, path)


def _restore(
    path: Path | None, module: torch.nn.Module | None, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Return the steps and minutes of a run that is taken up again, zero for a new one."""
    if path is None or module is None or not path.is_file():
        return 0, 0.0
    kept = torch.load(path, weights_only=True)
    module.load_state_dict(kept["module"])
    optimizer.load_state_dict(kept["optimizer"])
    torch.set_rng_state(kept["random"])
    return kept["step"], kept["minutes"]


@torch.no_grad()
def density_picture(
    axes: plt.Axes,
    log_prob: Callable[[Tensor], Tensor],
    extent: Sequence[float],
    title: str,
    n: int = 150,
) -> None:
    """Show a density of the plane over ``extent`` (left, right, bottom, top)."""
    left, right, bottom, top = extent
    x, y = torch.linspace(left, right, n), torch.linspace(bottom, top, n)
    points = torch.cartesian_prod(x, y)
    density = torch.cat([log_prob(part).exp() for part in points.split(10_000)]).view(n, n)
    axes.imshow(
        density.T.numpy(), origin="lower", extent=(left, right, bottom, top), cmap="viridis"
    )
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture, and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def gaussian_log_prob(train: Tensor, rows: Tensor) -> Tensor:
    """Return the log-density of ``rows`` under the Gaussian that fits ``train`` best."""
    mean, covariance = train.mean(0), torch.cov(train.T, correction=0)
    factor = torch.linalg.cholesky(covariance)
    d = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
    log_det = factor.diagonal().log().sum()
    return -0.5 * d.square().sum(0) - log_det - 0.5 * train.shape[1] * math.log(2 * math.pi)
