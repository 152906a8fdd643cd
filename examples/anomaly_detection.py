"""Anomaly detection: a flow learns the usual data, and a low log-likelihood marks unusual data.

On scikit-learn's breast cancer data a spline flow is trained on some of the benign cases only, and has to detect
the malignant ones among the rest.  The baseline is a Gaussian, and the measure the ROC curve.

    python examples/anomaly_detection.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import batches, fit, gaussian_log_prob, options, plt, save
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score, roc_curve

from pyflowkern import flows


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = options(__doc__, "anomaly_detection")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 80
    torch.manual_seed(args.seed)
    data = load_breast_cancer()
    rows = torch.tensor(data.data, dtype=torch.float32).log1p()  # sizes and areas have long tails
    benign, malignant = rows[data.target == 1], rows[data.target == 0]
    benign = benign[torch.randperm(len(benign))]
    train, usual = benign[:250], benign[250:]
    mean, deviation = train.mean(0), train.std(0)
    train, usual, unusual = ((part - mean) / deviation for part in (train, usual, malignant))

    flow = flows.NSF(30, transforms=3, hidden=(64, 64), bins=6, bound=5.0)
    draw = batches(train, 64)

    def loss() -> torch.Tensor:
        # without a little noise the flow overfits 250 rows in 30 dimensions
        x = draw()
        return -flow.log_prob(x + 0.2 * torch.randn_like(x)).mean()

    fit(loss, flow.parameters(), args.steps, lr=1e-3, weight_decay=1e-2, say="NSF")
    tested = torch.cat([usual, unusual])
    labels = torch.cat([torch.zeros(len(usual)), torch.ones(len(unusual))])
    with torch.no_grad():
        scores = {"NSF": -flow.log_prob(tested)}
    scores["Gaussian"] = -gaussian_log_prob(train.double(), tested.double())
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5))
    results = {}
    for name, score in scores.items():
        results[name] = float(roc_auc_score(labels, score))
        false, true, _ = roc_curve(labels, score)
        axes[0].plot(false, true, label=f"{name}: area {results[name]:.3f}")
        print(f"{name}: area under the ROC curve {results[name]:.3f}")
    axes[0].set(xlabel="benign cases flagged", ylabel="malignant cases found")
    axes[0].legend()
    shown = scores["NSF"].clamp(max=float(scores["NSF"].quantile(0.95)))
    axes[1].hist(
        [shown[labels == 0].numpy(), shown[labels == 1].numpy()],
        bins=30,
        label=["benign", "malignant"],
    )
    axes[1].set(xlabel="negative log-likelihood, nats")
    axes[1].legend()
    save(figure, args.out / "roc.png")
    return results


if __name__ == "__main__":
    main()
