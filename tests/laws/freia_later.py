"""Transforms that only FrEIA's sources after version 0.2 have: written from their formulas, under the library's names.

The library's own stand in their place where those sources are imported.
"""

import math

import FrEIA.modules as fm
import torch
from torch.nn.functional import softplus

__all__ = [
    "ActNorm",
    "ElementwiseRationalQuadraticSpline",
    "LinearSpline",
    "RationalQuadraticSpline",
]

ONE = math.log(math.e - 1)  # whose softplus is 1


class _Interval(fm.InvertibleModule):
    """A spline over an interval that raw numbers say: widths, heights, where it lies, derivatives at inner knots."""

    smooth = True

    def __init__(self, dims_in, dims_c=(), bins=10, min_bin_sizes=(0.1, 0.1), default_domain=(-3.0, 3.0, -3.0, 3.0),
                 identity_tails=False, domain_clamping=None):  # fmt: skip
        super().__init__(dims_in, dims_c)
        self.register_buffer("bins", torch.tensor(bins, dtype=torch.int32))
        self.register_buffer("min_bin_sizes", torch.tensor(min_bin_sizes))
        self.register_buffer("default_domain", torch.tensor(default_domain))
        self.register_buffer("identity_tails", torch.tensor(identity_tails))
        self.register_buffer("default_width", torch.tensor(default_domain[1] - default_domain[0]))
        self.domain_clamping = domain_clamping
        where = {"total_width": 1} if identity_tails else {"bottom": 1, "left": 1}
        self.parameter_counts = {"widths": bins, "heights": bins, **where}
        if self.smooth:
            self.parameter_counts["deltas"] = bins - 1

    def _clamped(self, size):
        c = self.domain_clamping
        return size if c is None else c * torch.tanh(size / c)

    def _axis(self, raw, start, axis):
        low, high = self.default_domain[2 * axis : 2 * axis + 2]
        least = self.min_bin_sizes[axis]
        usual = torch.log(torch.expm1((high - low) / self.bins - least))
        sizes = least + softplus(raw + usual)
        ratio = self._clamped(sizes.sum(-1, keepdim=True)) / sizes.sum(-1, keepdim=True)
        return ratio * sizes, ratio * (start + low)

    def transform(self, x, raw, rev):
        """Return values and log-derivatives of ``x [...]``, given ``raw [..., P]``."""
        raw = dict(
            zip(
                self.parameter_counts,
                raw.split([*self.parameter_counts.values()], -1),
                strict=True,
            )
        )
        if self.identity_tails:
            size = self._clamped(self.default_width * softplus(raw["total_width"] + ONE))
            widths, heights = (size * torch.softmax(raw[k], -1) for k in ("widths", "heights"))
            left = bottom = -size / 2
        else:
            widths, left = self._axis(raw["widths"], raw["left"], 0)
            heights, bottom = self._axis(raw["heights"], raw["bottom"], 1)
        slope = heights.sum(-1, keepdim=True) / widths.sum(-1, keepdim=True)
        knots = [
            torch.cat([start, start + sizes.cumsum(-1)], -1)
            for start, sizes in ((left, widths), (bottom, heights))
        ]
        if self.smooth:
            deltas = torch.cat([slope, softplus(raw["deltas"] + ONE), slope], -1)
            inner, log_slope = _in_bins(x, *knots, deltas, rev)
        else:
            inner, log_slope = _in_segments(x, *knots, rev)
        ends = knots[int(rev)]
        inside = (ends[..., 0] < x) & (x <= ends[..., -1])
        slope, shift = slope[..., 0], (bottom - slope * left)[..., 0]
        straight = (x - shift) / slope if rev else slope * x + shift
        log_slope = torch.where(inside, log_slope, slope.log())
        return torch.where(inside, inner, straight), -log_slope if rev else log_slope


class _Segments(_Interval):
    """A spline that is straight in each bin."""

    smooth = False


def _in_segments(x, xs, ys, rev):
    """Return the straight line between the knots of each bin, and the logarithm of its slope."""
    at = torch.searchsorted((ys if rev else xs)[..., 1:-1].contiguous(), x[..., None].contiguous())
    x0, y0, x1, y1 = (t.gather(-1, at + i)[..., 0] for i in (0, 1) for t in (xs, ys))
    slope = (y1 - y0) / (x1 - x0)
    return x0 + (x - y0) / slope if rev else y0 + (x - x0) * slope, slope.log()


def _in_bins(x, xs, ys, deltas, rev):
    """Return the rational-quadratic function (Durkan et al., 2019) of each bin, and the logarithm of its derivative."""
    ends = ys if rev else xs
    at = torch.searchsorted(ends[..., 1:-1].contiguous(), x[..., None].contiguous())
    x0, y0, d0 = (t.gather(-1, at)[..., 0] for t in (xs, ys, deltas))
    x1, y1, d1 = (t.gather(-1, at + 1)[..., 0] for t in (xs, ys, deltas))
    x = torch.minimum(torch.maximum(x, ends[..., 0]), ends[..., -1])
    w, h = x1 - x0, y1 - y0
    s = h / w
    bend = d0 + d1 - 2 * s
    if rev:
        a, b, c = h * (s - d0) + (x - y0) * bend, h * d0 - (x - y0) * bend, -s * (x - y0)
        xi = 2 * c / (-b - torch.sqrt(b * b - 4 * a * c))
        value = x0 + xi * w
    else:
        xi = (x - x0) / w
        value = y0 + h * (s * xi * xi + d0 * xi * (1 - xi)) / (s + bend * xi * (1 - xi))
    above = s * s * (d1 * xi * xi + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2)
    return value, above.log() - 2 * (s + bend * xi * (1 - xi)).log()


class RationalQuadraticSpline(fm.coupling_layers._BaseCouplingBlock):
    """A coupling of two halves by splines."""

    base = _Interval

    def __init__(self, dims_in, dims_c=(), subnet_constructor=None, split_len=0.5, **options):
        dims_c = list(dims_c)
        super().__init__(dims_in, dims_c, 0.0, lambda u: u, split_len=split_len)
        self.spline_base = self.base(dims_in, dims_c, **options)
        numbers, given = sum(self.spline_base.parameter_counts.values()), self.condition_length
        self.subnet1 = subnet_constructor(self.split_len2 + given, self.split_len1 * numbers)
        self.subnet2 = subnet_constructor(self.split_len1 + given, self.split_len2 * numbers)

    def _coupling1(self, x1, u2, rev=False):
        return self._half(x1, self.subnet1(u2), rev)

    def _coupling2(self, x2, u1, rev=False):
        return self._half(x2, self.subnet2(u1), rev)

    def _half(self, x, raw, rev):
        raw = raw.unflatten(1, (x.shape[1], -1)).movedim(2, -1)
        y, log_slope = self.spline_base.transform(x, raw, rev)
        return y, log_slope.flatten(1).sum(1)


class LinearSpline(RationalQuadraticSpline):
    """A coupling of two halves by splines that are straight in each bin."""

    base = _Segments


class ElementwiseRationalQuadraticSpline(_Interval):
    """A spline of each feature, of learned numbers, or of those that a network makes of the condition."""

    def __init__(self, dims_in, dims_c=(), subnet_constructor=None, **options):
        super().__init__(dims_in, list(dims_c), **options)
        self.channels, self.conditional = dims_in[0][0], bool(dims_c)
        numbers = self.channels * sum(self.parameter_counts.values())
        if self.conditional:
            self.subnet = subnet_constructor(sum(shape[0] for shape in dims_c), numbers)
        else:
            self.spline_parameters = torch.nn.Parameter(torch.zeros(numbers))

    def forward(self, x, c=None, rev=False, jac=True):
        """Transform both directions."""
        x = x[0]
        if self.conditional:
            raw = self.subnet(torch.cat(list(c), 1).float())
        else:
            raw = self.spline_parameters.expand(len(x), -1)
        y, log_slope = self.transform(x, raw.unflatten(1, (self.channels, -1)), rev)
        return (y,), log_slope.sum(1)

    def output_dims(self, input_dims):
        """Return the same."""
        return input_dims


class ActNorm(fm.InvertibleModule):
    """Scales and shifts that start as those of the first batch."""

    def __init__(self, dims_in, dims_c=None):
        super().__init__(dims_in, dims_c)
        self.register_buffer("is_initialized", torch.tensor(False))
        self.log_scale = torch.nn.Parameter(torch.empty(1, dims_in[0][0]))
        self.loc = torch.nn.Parameter(torch.empty(1, dims_in[0][0]))

    def forward(self, x, c=None, rev=False, jac=True):
        """Transform both directions."""
        x = x[0]
        if not self.is_initialized:
            self.log_scale.data[:] = x.std(0, keepdim=True).log()
            self.loc.data[:] = x.mean(0, keepdim=True)
            self.is_initialized.data = torch.tensor(True)
        y = x * self.log_scale.exp() + self.loc if rev else (x - self.loc) / self.log_scale.exp()
        return (y,), (1 if rev else -1) * self.log_scale.sum().expand(1)

    def output_dims(self, input_dims):
        """Return the same."""
        return input_dims


for _cls, _module in (
    (RationalQuadraticSpline, "splines.rational_quadratic"),
    (ElementwiseRationalQuadraticSpline, "splines.rational_quadratic"),
    (LinearSpline, "splines.linear"),
    (ActNorm, "invertible_resnet"),
):
    _cls.__module__ = f"FrEIA.modules.{_module}"
