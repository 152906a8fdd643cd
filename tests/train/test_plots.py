"""Pictures from numbers: pair plots and densities."""

import numpy as np
import pytest
import torch
from picture_colours import BLUE, ORANGE, count, pixels

from pyflowkern.train import plots


def test_both_sets_of_a_pair_plot_are_seen(tmp_path):
    torch.manual_seed(0)
    sets = {"data": torch.randn(1000, 3), "samples": torch.randn(1000, 3) + 3}
    assert plots.save_pairs(tmp_path / "p.png", sets, ("a", "b", "c")) == ""
    seen = [count(tmp_path / "p.png", colour) for colour in (BLUE, ORANGE)]
    assert min(seen) > 3000
    assert max(seen) < 2 * min(seen)
    # the second one lies to the right
    columns = [
        np.argwhere(np.abs(pixels(tmp_path / "p.png").astype(int) - c).max(-1) < 40)[:, 1].mean()
        for c in (BLUE, ORANGE)
    ]
    assert columns[0] < columns[1]


@pytest.mark.parametrize(
    "rows",
    [
        torch.full((50, 2), torch.nan),
        torch.full((50, 2), 7.0),
        torch.zeros(1, 2),
        torch.cat([torch.full((200, 1), 1e30), torch.randn(200, 1)], 1),
    ],
)
def test_a_pair_plot_of_anything_is_drawn(tmp_path, rows):
    with torch.random.fork_rng():
        data = torch.randn(300, 2)
    plots.save_pairs(tmp_path / "p.png", {"data": data, "samples": rows})
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_contours_hold_their_share_of_a_set():
    torch.manual_seed(0)
    rows = torch.randn(20_000, 2).numpy()
    edges = [np.linspace(-4, 4, 81)] * 2
    mass = np.histogram2d(*rows.T, bins=edges)[0] / len(rows)
    levels = plots.levels_of(mass)
    held = [mass[mass >= level].sum() for level in levels]
    # the next bin would be less than a five-hundredth of all
    assert held == pytest.approx([0.9, 0.5], abs=0.01)
    assert len(plots.levels_of(np.zeros((4, 4)))) == 0


def test_rows_that_are_not_finite_are_counted(tmp_path):
    rows = torch.randn(10, 2)
    rows[3, 1], rows[4, 0] = torch.nan, torch.inf
    name, kept = plots.finite("samples", rows)
    assert name == "samples (8, 2 not finite)"
    assert kept.shape == (8, 2)


def test_a_density_is_bright_where_it_is_high(tmp_path):
    rows = torch.rand(200, 2)
    peak = torch.tensor([0.8, 0.7])
    path = tmp_path / "d.png"

    def log_prob(x):
        return torch.where(x[:, 0] < 0.1, torch.nan, -30 * (x - peak).square().sum(1))

    plots.save_density(path, log_prob, rows, ("a", "b"))
    image = pixels(path)[:, : int(5.6 * 120 * 0.75)].astype(int)  # without the bar of colours
    yellow = np.argwhere(np.abs(image - (253, 231, 37)).max(-1) < 30)
    dark = np.argwhere(np.abs(image - (68, 1, 84)).max(-1) < 5)
    assert len(yellow) > 20
    assert len(dark) > 1000
    # up is where the numbers of pixels are small
    assert yellow[:, 1].mean() > dark[:, 1].mean() + 100
    assert yellow[:, 0].mean() < image.shape[0] * 0.5
