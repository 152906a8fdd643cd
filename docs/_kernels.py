"""What each kernel reads, keeps and writes: the data of the pictures in docs/mathematics."""

from typing import NamedTuple


class Pass(NamedTuple):
    """A pass: tensors it reads, what it does, tensors it writes, and what the backward pass finds."""

    read: tuple[str, ...]
    kernel: tuple[str, ...]
    written: tuple[str, ...]
    kept: tuple[str, ...] = ()
    reads: str = "read once"


FORWARD, BACKWARD = "forward or inverse", "backward"

KERNELS: dict[str, dict[str, Pass]] = {
    "affine": {
        FORWARD: Pass(
            ("x [N, C, space]", "params: shift, raw scale"),
            ("vector of elements in registers:", "s(u), log s, s x + t", "log s summed by sample"),
            ("y like x", "log_det [N]"),
            ("x (or y: save='output'), params", "no intermediate results"),
        ),
        BACKWARD: Pass(
            ("grad y, grad log_det", "x or y, raw scale", "shift, where the formula has it"),
            ("s(u) and its slope once more", "three gradients of each element"),
            ("grad x", "grad params"),
        ),
    },
    "actnorm": {
        FORWARD: Pass(
            ("x [N, C, space]", "log_scale, bias [C]"),
            ("scale and bias of a channel", "a (x + b)"),
            ("y like x", "log_det [N]"),
            ("x, log_scale, bias",),
        ),
        BACKWARD: Pass(
            ("grad y, x", "grad log_det [N]"),
            (
                "a grad y; in the same pass",
                "two sums of a channel, by task",
                "tasks added in order",
            ),
            ("grad x", "grad log_scale, grad bias [C]"),
        ),
    },
    "linear": {
        FORWARD: Pass(
            ("x [N, C, space]", "W [C, C], scale, bias [C]"),
            ("a tile of pixels:", "A (x + pre) + post", "A = W diag(e) in cache"),
            ("y like x", "log_det [N]"),
            ("x, W, log_scale, bias",),
        ),
        BACKWARD: Pass(
            ("grad y, x", "W, log_scale, bias"),
            ("grad x = A^T grad y", "G = sum grad y (x + pre)^T", "of a task, added in order"),
            ("grad x", "grad W, scale, bias"),
        ),
    },
    "matrix": {
        FORWARD: Pass(
            ("slogdet_inverse: W [C, C]", "plu_matrix: L, U, d, sign, P"),
            ("Gauss-Jordan in place,", "or a product of triangles,", "or substitution"),
            ("sign, log|det|, inverse", "or W = P L (U + D)"),
            ("the inverse matrix,", "or the factors"),
        ),
        BACKWARD: Pass(
            ("grad log|det| and grad inverse,", "or grad W", "what was kept"),
            ("products with the inverse,", "or substitution by triangles"),
            ("grad W", "or grad L, U, d"),
        ),
    },
    "spline": {
        FORWARD: Pass(
            ("x [N, D, ...]", "params: K widths, K heights,", "derivatives of each element"),
            (
                "tile: parameters by columns",
                "softmax, knots, search in one go",
                "value and log slope",
            ),
            ("y like x", "log_det [N] or of elements"),
            ("x, params: no knots, no bins",),
        ),
        BACKWARD: Pass(
            ("grad y, grad log_det", "x, params"),
            (
                "knots and bin once more;",
                "gradients take the place of",
                "the parameters in the tile",
            ),
            ("grad x", "grad params"),
        ),
    },
    "autoregressive": {
        "inverse": Pass(
            ("z [N, D]", "weights, biases, gates", "masks, as counts by degree"),
            (
                "a vector of samples at a time:",
                "units of degree t, then feature t",
                "values of units stay in cache",
            ),
            ("x [N, D]", "log_det [N]"),
            ("z, x, weights, biases, gates",),
        ),
        BACKWARD: Pass(
            ("grad x, grad log_det", "x, weights, biases, gates"),
            (
                "no kernel, torch on all devices:",
                "the network at x once more, then",
                "a triangular system by levels",
            ),
            ("grad z", "grad weights, biases, gates"),
            reads="read",
        ),
    },
    "chain": {
        FORWARD: Pass(
            ("x [N, D], context [N, K]", "tensors of all steps"),
            (
                "a tile of samples goes through",
                "all steps and their networks",
                "while it is in cache",
            ),
            ("z [N, D]", "log_det or log_prob [N]"),
            ("the input of each step that is no", "permutation, and z, by tiles"),
        ),
        BACKWARD: Pass(
            ("grad z, grad log_det", "inputs of the steps", "tensors of all steps"),
            (
                "tile by tile, last step first:",
                "networks once more, then VJPs",
                "sums of weights by task",
            ),
            ("grad x, grad context", "gradients of all tensors"),
        ),
    },
    "density": {
        FORWARD: Pass(
            ("z [N, ...]", "mean, log_std: shared or not", "log_det [N] so far"),
            ("d = (z - mean) / std", "-d^2/2 - log_std", "summed by sample"),
            ("log_prob [N]",),
            ("z, mean, log_std",),
        ),
        BACKWARD: Pass(
            ("grad [N]", "z, mean, log_std"),
            ("d once more", "sums of shared parameters"),
            ("grad z", "grad mean, grad log_std"),
        ),
    },
    "preprocess": {
        FORWARD: Pass(
            ("dequantize: bytes [N, ...], seed", "logit: x [N, ...]"),
            ("16 random bits (Philox)", "p, q, log p - log q", "log-det summed by sample"),
            ("y like x", "log_det [N]"),
            ("logit: its input", "dequantize: nothing"),
        ),
        BACKWARD: Pass(
            ("grad y, grad log_det", "the input"),
            ("p and q once more",),
            ("grad x",),
        ),
    },
    "diffusion": {
        FORWARD: Pass(
            ("x, drift (and a second one)", "seed: one number"),
            ("normal numbers (Philox)", "x + h u + s z"),
            ("the next x",),
            ("nothing: steps are numbers",),
        ),
        BACKWARD: Pass(
            ("grad out",),
            ("no kernel: x has grad out,", "a drift h times it"),
            ("grad x, grad drifts",),
        ),
    },
    "field": {
        FORWARD: Pass(
            ("x, probe [N, D]", "weights, biases, gates"),
            (
                "about 50 stacked rows in cache:",
                "values and tangents together",
                "through all layers",
            ),
            ("velocity [N, D]", "trace [N]"),
            ("states, probe, products of", "every second hidden layer"),
        ),
        BACKWARD: Pass(
            ("grad velocity, grad trace", "what was kept, weights"),
            ("other products once more", "cotangents of all layers", "weights summed by task"),
            ("grad x", "grad weights, biases, gates"),
        ),
    },
    "field_layer": {
        FORWARD: Pass(
            ("p [(1 + K) N, C, space]", "bias, gate"),
            ("primal and its tangents together", "f(g p + b), f'(a) g p."),
            ("h, same shape",),
            ("one tensor: h where f allows", "it (tanh, softplus), else p"),
        ),
        BACKWARD: Pass(
            ("grad h", "what was kept"),
            ("f' and f'' of each element", "sums of bias and gate"),
            ("grad p", "grad bias, grad gate"),
        ),
    },
    "field_time": {
        FORWARD: Pass(
            ("time", "biases, rows of all layers"),
            ("one launch for all layers", "g = sigmoid(c + t u)", "b' = t v + g b"),
            ("biases, gates of all layers",),
            ("time, biases, rows",),
        ),
        BACKWARD: Pass(
            ("grad biases, grad gates", "time, biases, rows"),
            ("gates once more", "one sum for the time"),
            ("grad time", "grad biases, grad rows"),
        ),
    },
    "field_loss": {
        "forward and backward at once": Pass(
            ("x, target, joined inputs", "weights, biases, rows"),
            (
                "a tile of samples goes forward",
                "and backward while in cache",
                "sums of parameters by task",
            ),
            ("loss: a scalar",),
            ("gradients of all parameters", "and inputs, for grad loss = 1"),
        ),
        BACKWARD: Pass(
            ("grad loss: a scalar", "the gradients"),
            ("multiplied by grad loss",),
            ("gradients, given away",),
        ),
    },
    "runge_kutta": {
        "rk_combine": Pass(
            ("y, slopes whose weight is not 0", "the fresh slope of the field"),
            ("y + h sum w k", "one load of each slope"),
            ("argument of the next stage", "the fresh slope, in its row"),
            ("slopes (the buffer), weights, step",),
        ),
        "backward of rk_combine": Pass(
            ("grad of the argument", "slopes, weights, step"),
            ("no kernel: sums of torch", "h w grad; grad . sum w k"),
            ("grad y: the same tensor", "grad slopes, grad step"),
            reads="read",
        ),
        "rk_error": Pass(
            ("y, y1, slopes",),
            ("ratio of change and tolerance", "squares summed by row"),
            ("norm: a number, or [N]",),
            ("nothing: it has no gradient",),
        ),
    },
    "transport": {
        "half an iteration": Pass(
            ("x [B, n, d], y [B, m, d]", "masses, potentials"),
            (
                "tile of scores: <x_i, y_j>",
                "2^score, sums of rows",
                "n x m is kept up to 4 MiB alone",
            ),
            ("new potentials, float64", "error of the marginals"),
            ("x, y, masses, potentials",),
            reads="by tiles",
        ),
        BACKWARD: Pass(
            ("what was kept", "grad cost [B]"),
            ("P y by tiles, made again:", "envelope theorem"),
            ("grad x, grad y", "grad masses: potentials"),
            reads="by tiles",
        ),
    },
    "conv_network": {
        FORWARD: Pass(
            ("x [N, C, H, W]", "filters, biases, context"),
            ("a few images in cache", "3 shifted copies of the rows", "a product for each layer"),
            ("out [N, C', H, W]",),
            ("x, and the inputs of all other", "layers, after the ReLU"),
        ),
        BACKWARD: Pass(
            ("grad out", "x and inputs of layers"),
            (
                "group by group: cotangents and",
                "filters, last layer first;",
                "filters: sums of <= 16 tasks",
            ),
            ("grad x, grad context", "grad filters, biases"),
        ),
    },
    "relu_network": {
        FORWARD: Pass(
            ("x [N, in], context", "weights, biases"),
            ("a tile of <= 96 samples in cache", "through all layers"),
            ("out [N, out]",),
            ("x, and the inputs of all other", "layers: N numbers a unit"),
        ),
        BACKWARD: Pass(
            ("grad out", "x and inputs of layers"),
            (
                "waves of 8192 samples: cotangents,",
                "last layer first; after them",
                "G^T times the input, runs of 512",
            ),
            ("grad x, grad context", "grad weights, biases"),
        ),
    },
}
