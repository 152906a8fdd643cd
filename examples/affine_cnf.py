"""A continuous flow with a known solution: the field A x + b changes log-densities by -T tr A.

    python examples/affine_cnf.py            # seconds; writes affine_cnf.png

Along dx/dt = A x + b every volume grows by exp(T tr A), so the log-density of each sample falls by exactly
T tr A.  With the exact trace a solver gives this for any step size; Hutchinson's estimate e^T A e gives it only
on average, with standard deviation sqrt(2 (|S|^2 - sum S_ii^2)) over probes, S being the symmetric part of A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import options, plt, save

from pyflowkern import flows, nn

DURATION = 1.5


class Affine(torch.nn.Module):
    """The field A x + b, which rotates, stretches and moves."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[0.4, -1.5], [1.0, -0.9]]))
        self.shift = torch.nn.Parameter(torch.tensor([0.5, 0.2]))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.t() + self.shift


def main(argv: Sequence[str] | None = None) -> float:
    """Compare the change of the log-density with -T tr A; return the largest error of the exact trace."""
    args = options(__doc__, "affine_cnf").parse_args(argv)
    torch.manual_seed(args.seed)
    field, x = Affine(), torch.randn(64 if args.quick else 2000, 2)
    solver = {"duration": DURATION, "method": "rk4", "step_size": 0.1}
    trace = float(field.matrix.trace().detach())
    with torch.no_grad():
        exact = flows.ContinuousBijection(nn.VectorField(field), divergence="exact", **solver)
        z, log_det = exact(x)
        error = float((log_det - DURATION * trace).abs().max())
        estimate = flows.ContinuousBijection(nn.VectorField(field), probes=8, **solver)(x)[1]
        # the solution with the matrix exponential of [[A, b], [0, 0]]
        whole = torch.zeros(3, 3)
        whole[:2, :2], whole[:2, 2] = field.matrix, field.shift
        flow = torch.linalg.matrix_exp(DURATION * whole)
        states = float((z - (x @ flow[:2, :2].t() + flow[:2, 2])).abs().max())
    print(
        f"log-density changes by {-DURATION * trace:.6f}; exact trace off by at most {error:.1e}"
    )
    print(f"8 probes: mean {float(-estimate.mean()):.4f}, spread {float(estimate.std()):.4f}")
    print(f"states off by at most {states:.1e}")
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2))
    for points, name in ((x, "data"), (z, "latent")):
        axes[0].plot(*points.t().numpy(), ".", markersize=2, label=name)
    axes[0].legend(fontsize=7)
    axes[1].hist((estimate - DURATION * trace).numpy(), bins=9)
    axes[1].set(title="error of the log-det, 8 probes", xlabel="nats")
    save(figure, args.out / "affine_cnf.png")
    return max(error, states)


if __name__ == "__main__":
    main()
