"""A test of two samples by a classifier that tries to tell them apart."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.checks import check_count
from pyflowkern.estimation.means import random_numbers
from pyflowkern.estimation.two_sample import TwoSample, pooled_rows

__all__ = ["classifier_test"]

#: How the classifier is trained: rows a step, Adam's rate, and the decay of its weights.
_BATCH, _RATE, _DECAY = 256, 5e-3, 1e-3


def classifier_test(
    x: Tensor,
    y: Tensor,
    *,
    folds: int = 5,
    hidden: int = 32,
    steps: int = 200,
    generator: torch.Generator | None = None,
    chunk: int = 2**16,
) -> TwoSample:
    r"""Test by the accuracy of a classifier on rows that it was not trained on.

    The rows are divided into ``folds`` parts, with as many of ``x`` as of ``y`` in each.  A network with two hidden
    layers is trained on all parts but one and judges that one, for each in turn.  If both samples are of one law,
    its accuracy :math:`t` over all :math:`N` rows is about :math:`\mathcal N(1/2, 1/4N)`, hence

    .. math:: p = 1 - \Phi\!\left(2 \sqrt N \left(t - \tfrac12\right)\right).

    Of the larger sample only as many rows are taken, at random, as the smaller one has.  Columns are standardised.
    Accuracies say how far apart the laws are: 0.5 means that the classifier sees no difference, 1 that it sees one in
    every row.

    Args:
        x: ``[n, D]``.
        y: ``[m, D]``.
        folds: parts, 2 at least.
        hidden: units of a layer.
        steps: of training, with 256 rows of both samples each.
        generator: source of randomness.
        chunk: rows that are judged at a time.

    Returns:
        The accuracy and the p-value.

    Raises:
        TypeError: for anything but floating tensors, and arguments of another type.
        ValueError: for other shapes, fewer rows of a sample than folds, numbers that are not finite, or counts below
            their least.

    Source: Lopez-Paz and Oquab, Revisiting classifier two-sample tests (2017).

    Example:
        >>> from pyflowkern.estimation import classifier_test
        >>> import torch
        >>> seeded = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 300, 2, generator=seeded)
        >>> accuracy, p_value = classifier_test(x, y + 1.0, generator=seeded)
        >>> accuracy > 0.6, p_value < 0.01
        (True, True)
    """
    check_count("folds", folds, 2)
    check_count("hidden", hidden)
    check_count("steps", steps)
    check_count("chunk", chunk)
    pooled, n = pooled_rows(x, y, standardize=True)
    size = min(n, len(pooled) - n)
    if size < folds:
        raise ValueError(f"x and y must have {folds} rows at least, one a fold, got {size}")
    halves = (pooled[:n], pooled[n:])
    chosen = [half[_shuffled(len(half), generator)[:size].to(half.device)] for half in halves]
    rows = torch.cat(chosen).float()
    fold = (torch.arange(size) % folds).repeat(2).to(rows.device)
    label = (torch.arange(2 * size) >= size).to(rows)
    weights = _trained(rows, label, fold, folds, hidden, steps, generator)
    right = 0
    with torch.no_grad():
        for k in range(folds):
            of_fold = [w[k : k + 1] for w in weights]
            for some in (fold == k).nonzero()[:, 0].split(chunk):
                judged = _scores(of_fold, rows[some][None])[0] > 0
                right += int((judged == (label[some] > 0)).sum())
    accuracy = right / (2 * size)
    return TwoSample(accuracy, 0.5 * math.erfc(math.sqrt(4 * size) * (accuracy - 0.5)))


def _shuffled(n: int, generator: torch.Generator | None) -> Tensor:
    return random_numbers((n,), generator).argsort()


def _scores(weights: list[Tensor], rows: Tensor) -> Tensor:
    """Return the log-odds ``[folds, N]`` of being of the second sample, by the network of each fold."""
    for i in range(0, len(weights), 2):
        if i:
            rows = rows.relu()
        rows = torch.baddbmm(weights[i + 1], rows, weights[i])
    return rows[..., 0]


@torch.enable_grad()
def _trained(
    rows: Tensor,
    label: Tensor,
    fold: Tensor,
    folds: int,
    hidden: int,
    steps: int,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Train the networks of all folds at once, each on the other folds' rows; weights and biases by layer."""
    widths = (rows.shape[1], hidden, hidden, 1)
    weights: list[Tensor] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        bound = math.sqrt(3 / fan_in)
        start = (2 * random_numbers((folds, fan_in, fan_out), generator) - 1) * bound
        weights += [start.to(rows), rows.new_zeros(folds, 1, fan_out)]
    for w in weights:
        w.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    training = [(fold != k).nonzero()[:, 0] for k in range(folds)]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        drawn = random_numbers((folds, _BATCH), generator).to(rows.device)
        batch = torch.stack([t[(u * len(t)).long()] for t, u in zip(training, drawn, strict=True)])
        optimizer.zero_grad()
        scores = _scores(weights, rows[batch])
        functional.binary_cross_entropy_with_logits(scores, label[batch]).mul(folds).backward()
        optimizer.step()
    return weights
