"""Random choices that follow from one seed: sizes, dtypes, layouts, numbers, and what nobody should pass."""

import random

import numpy as np
import torch

#: Small sizes around the widths of vectors and tiles; 0 and 1 are where loops break.
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65)
#: What stands in for an argument to see that it is refused: never a crash, never another kind of error.
HOSTILE = (
    lambda: None,
    lambda: "tanh",
    lambda: "",
    lambda: 2,
    lambda: -1,
    lambda: 10**30,
    lambda: 1.5,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: True,
    lambda: 1j,
    list,
    lambda: [1, 2],
    lambda: (3,),
    dict,
    lambda: object(),
    lambda: np.int64(3),
    lambda: np.float32(0.5),
    lambda: np.zeros((2, 3), np.float32),
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(2, 3),
    lambda: torch.zeros(2, 3, 4, 4),
    lambda: torch.zeros(2, 3, dtype=torch.int64),
    lambda: torch.zeros(3, dtype=torch.bool),
    lambda: torch.zeros(2, 3, dtype=torch.complex64),
    lambda: torch.zeros(2, 3).to_sparse(),
    lambda: torch.zeros(2, 3, device="meta"),
    lambda: [torch.zeros(2, 3)],
    lambda: torch.nn.Linear(2, 2),
    lambda: torch.float32,
)
MODES = ("plain", "wide", "edges", "extreme")


class Draw:
    """Choices from one seed."""

    def __init__(self, seed, mode="plain", dtype=None):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.mode = mode
        self.dtype = dtype or self.choice(
            (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
        )

    def choice(self, options):
        return self.random.choice(tuple(options))

    def flag(self):
        return self.random.random() < 0.5

    def size(self, least=0, most=65):
        return self.choice(n for n in SIZES if least <= n <= most)

    def number(self, low, high):
        return self.random.uniform(low, high)

    def space(self):
        """Axes behind the channels: none, a line, an image, a volume."""
        least = 0 if self.random.random() < 0.1 else 1
        return [self.size(least, 9) for _ in range(self.choice((0, 0, 1, 2, 2, 3)))]

    def tensor(self, *shape, scale=1.0):
        """Draw numbers of the mode, in the dtype, in some layout."""
        t = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.mode == "wide":
            t = t * torch.exp(3 * torch.randn(shape, generator=self.generator).double())
        elif self.mode == "edges":
            special = torch.tensor(
                [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 0.5, 5.0, 1e-30], dtype=t.dtype
            )
            which = torch.randint(0, 18, shape, generator=self.generator)
            t = torch.where(which < 9, special[which.clamp_max(8)], t)
        elif self.mode == "extreme":
            power = 6 * torch.randn(shape, generator=self.generator).double()
            t = t * torch.pow(10.0, power.clamp(-25, 12))  # squares fit float32
        limit = torch.finfo(self.dtype).max / 4
        return self.layout(t.clamp(-limit, limit).to(self.dtype))

    def layout(self, t):
        """Return the same numbers with other strides."""
        kind = self.random.randrange(7)
        if kind == 0 and t.dim() > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == 1:
            return torch.stack((t, t), -1)[..., 0]
        if kind == 2:  # not aligned to a vector
            return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
        if kind == 3 and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if kind == 4 and t.dim() > 1 and t.shape[1] > 1:
            return torch.cat((t, t), 1)[:, : t.shape[1]]
        return t

    def hostile(self):
        return self.choice(HOSTILE)()
