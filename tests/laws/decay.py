"""What several tests of solvers integrate."""

import torch
from torch import nn

ADAPTIVE = ["adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2", "tsit5"]
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Decay(nn.Module):
    """dy/dt = -a y, which counts and keeps the times of its evaluations."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.times = []

    def forward(self, t, y):
        self.times.append(t.item())
        return -self.a * y


def start(*shape):
    return torch.ones(shape, dtype=torch.float64)
