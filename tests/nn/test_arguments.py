"""Wrong arguments of layers raise errors that name the argument, what was wanted and what was given."""

from functools import partial

import numpy as np
import pytest
import torch

from pyflowkern import nn


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: nn.AffineCoupling(4, nn.MLP, swap=2), "swap"),
        (lambda: nn.SplineCoupling(4, nn.MLP, unconditional=1), "unconditional"),
        (lambda: nn.CircularShift(2, learned=None), "learned"),
        (lambda: nn.MaskedMLP(3, 2, residual=2), "residual"),
        (lambda: nn.InvertibleLinear(2).matrix(inverse=2), "inverse"),
        (
            lambda: nn.VectorFieldMLP(2, (4,)).velocity_and_divergence(
                0.0, torch.zeros(1, 2), probe=torch.tensor(3), regularizers=2
            ),
            "regularizers",
        ),
        (
            lambda: nn.VectorFieldConv(2, (4,)).velocity_and_divergence(
                0.0, torch.zeros(1, 2, 3, 3), method="exact", per_probe=4
            ),
            "per_probe",
        ),
        (
            lambda: nn.VectorField(nn.VectorFieldMLP(2, (4,))).velocity_and_divergence(
                0.0, torch.zeros(1, 2), method="exact", regularizers=2
            ),
            "regularizers",
        ),
    ],
)
def test_flags_are_true_or_false(build, name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
        build()


def test_integers_of_numpy_are_integers():
    two = np.int64(2)
    x = torch.randn(3, 2)
    for layer in (
        nn.ActNorm(two),
        nn.InvertibleLinear(two),
        nn.Permutation(two),
        nn.GlowStep(two),
    ):
        assert type(layer.channels) is int
        assert layer(x)[0].shape == (3, 2)
    assert nn.Squeeze(two).factor == 2
    assert nn.AffineCoupling(two, nn.MLP)(x)[0].shape == (3, 2)
    assert nn.MaskedAutoregressive(two, (np.int32(4),))(x)[0].shape == (3, 2)


TWO = np.int64(2)
NETWORKS = {
    "MLP": lambda: nn.MLP(TWO, TWO, hidden=TWO, layers=TWO, context_features=TWO),
    "MLP of widths": lambda: nn.MLP(TWO, TWO, hidden=np.array([3, 4]), context_features=TWO),
    "ResidualMLP": lambda: nn.ResidualMLP(TWO, TWO, hidden=TWO, blocks=TWO, context_features=TWO),
    "ConvNet": lambda: nn.ConvNet(TWO, TWO, hidden=TWO, context_features=TWO, spatial_dims=1),
    "ResidualConvNet": lambda: nn.ResidualConvNet(
        TWO, TWO, hidden=TWO, blocks=TWO, context_features=TWO, spatial_dims=1
    ),
    "PeriodicInput": lambda: nn.PeriodicInput(TWO, TWO, partial(nn.MLP, context_features=TWO)),
    "MaskedMLP": lambda: nn.MaskedMLP(TWO, TWO, (TWO, TWO), context_features=TWO),
}
FIELDS = {
    "VectorFieldMLP": lambda: nn.VectorFieldMLP(TWO, np.array([3]), context_features=TWO),
    "VectorFieldConv": lambda: nn.VectorFieldConv(TWO, (TWO,), context_features=TWO),
    "VectorFieldUNet": lambda: nn.VectorFieldUNet(
        TWO, np.array([2, 4]), blocks=np.int64(1), context_features=TWO
    ),
    "VectorField": lambda: nn.VectorField(torch.nn.Identity(), context_features=TWO),
}


@pytest.mark.parametrize("name", {**NETWORKS, **FIELDS})
def test_no_integer_of_numpy_stays_in_a_network(name):
    network = {**NETWORKS, **FIELDS}[name]()
    for module in network.modules():
        for value in vars(module).values():
            for entry in value if isinstance(value, tuple) else (value,):
                assert not isinstance(entry, np.generic)
    if name in NETWORKS:
        space = (5,) if "Conv" in name else ()
        out = network(torch.randn(3, 2, *space), torch.randn(3, 2))
        assert out.shape[:2] == (3, 2)


class Plain(torch.nn.Module):
    """A network that knows nothing of contexts."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.net = torch.nn.Linear(inputs, outputs)

    def forward(self, h):
        return self.net(h)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.AffineCoupling(4, Plain),
        nn.SplineCoupling(4, Plain),
        nn.SplineCoupling(4, torch.nn.Linear(2, 2 * 23)),
        nn.SplineCoupling(4, partial(nn.PeriodicInput, conditioner=Plain), tails="circular"),
        nn.MaskedAutoregressive(4, conditioner=torch.nn.Sequential(Plain(4, 8))),
        nn.Split(4, Plain),
    ],
    ids=["affine", "spline", "linear", "periodic", "autoregressive", "split"],
)
def test_a_network_without_contexts_says_what_to_do(layer, direction):
    with pytest.raises(TypeError, match=r"context was given, but .* takes only x: give it a forw"):
        getattr(layer, direction)(torch.zeros(3, 4), torch.zeros(3, 2))


def test_an_error_inside_a_network_with_contexts_stays_what_it_is():
    class Wrong(Plain):
        def forward(self, h, context):
            return self.net(h) + len(3)

    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        nn.AffineCoupling(4, Wrong)(torch.zeros(3, 4), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.ActNorm(2.5), TypeError, "channels must be an int, got float"),
        (lambda: nn.InvertibleLinear(2.0), TypeError, "channels must be an int, got float"),
        (lambda: nn.AffineCoupling(4.0, nn.MLP), TypeError, "channels must be an int"),
        (lambda: nn.Permutation(-1), ValueError, "permutation must be at least 1, got -1"),
        (lambda: nn.Permutation(True), TypeError, "permutation must be a list, got bool"),
        (lambda: nn.Permutation([0.0, 1.0]), ValueError, "permutation must order"),
        (lambda: nn.Reverse(2.0), TypeError, "channels must be an int, got float"),
        (lambda: nn.Reverse(0), ValueError, "channels must be at least 1, got 0"),
        (
            lambda: nn.channel_mask(2, interleaved=2),
            TypeError,
            "interleaved must be True or False",
        ),
        (lambda: nn.Squeeze(2.5), TypeError, "factor must be an int, got float"),
        (lambda: nn.Dequantize(2.5), TypeError, "bits must be an int, got float"),
        (lambda: nn.Dequantize(0), ValueError, "bits must be at least 1, got 0"),
        (lambda: nn.ResidualMLP(2, 2, blocks=-1), ValueError, "blocks must be at least 0"),
        (lambda: nn.ResidualConvNet(2, 2, blocks=-1), ValueError, "blocks must be at least 0"),
        (lambda: nn.channel_mask(-1), ValueError, "channels must be at least 1, got -1"),
        (lambda: nn.CircularShift(2.0), TypeError, "channels must be an int, got float"),
        (
            lambda: nn.PeriodicInput(2, 4, nn.MLP, bound=torch.zeros(2, 3).to_sparse()),
            TypeError,
            "bound must be a number, got Tensor",
        ),
        (
            lambda: nn.PeriodicInput(2, 4, nn.MLP, bound=0),
            ValueError,
            "bound must be positive and finite, got 0",
        ),
        (
            lambda: nn.CircularShift(2, shift=torch.zeros(2, dtype=torch.complex64)),
            TypeError,
            "shift must be real, got torch.complex64",
        ),
        (
            lambda: nn.CircularShift(2, shift=torch.zeros(3)),
            ValueError,
            r"shift must be a number or have shape \(2,\), got \(3,\)",
        ),
        (lambda: nn.MaskedMLP(3.0, 2), TypeError, "features must be an int, got float"),
        (lambda: nn.MaskedMLP(3, 2, hidden=8), TypeError, "hidden must be a sequence .* got int"),
        (lambda: nn.MaskedMLP(3, 2, (1.5,)), TypeError, "hidden widths must be an int, got float"),
        (lambda: nn.MaskedMLP(3, 2, order=[0.5, 1, 2]), ValueError, "order must be a permutation"),
        (lambda: nn.MaskedMLP(3, 2)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda: nn.MaskedMLP(3, 2)(torch.ones(2, 3, dtype=torch.int64)),
            TypeError,
            "x must be a floating-point tensor .* got torch.int64",
        ),
        (
            lambda: nn.MaskedMLP(3, 2, context_features=1)(torch.zeros(1, 3), [1.0]),
            TypeError,
            "context must be a torch.Tensor, got list",
        ),
        (lambda: nn.MaskedAutoregressive(3.0), TypeError, "features must be an int, got float"),
        (
            lambda: nn.MaskedAutoregressive(3, conditioner=3),
            TypeError,
            "conditioner must be a torch.nn.Module, got int",
        ),
        (
            lambda: nn.jacobi_inverse(nn.MaskedMLP(3, 2), torch.zeros(3)),
            ValueError,
            r"z must have shape \[N, D\], got \(3,\)",
        ),
    ],
)
def test_layers(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_context_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"context must be a torch.Tensor, got list"):
        nn.MLP(3, 3, hidden=4, context_features=2)(torch.zeros(1, 3), [1, 2])


LAYERS = {
    "MaskedAutoregressive": lambda: nn.MaskedAutoregressive(4, (6,), context_features=2),
    "SplineCoupling": lambda: nn.SplineCoupling(4, partial(nn.MLP, context_features=2)),
    "AffineCoupling": lambda: nn.AffineCoupling(4, partial(nn.ResidualMLP, context_features=2)),
    "convolutions": lambda: nn.SplineCoupling(
        4, partial(nn.ConvNet, context_features=2, spatial_dims=1)
    ),
    "residual convolutions": lambda: nn.AffineCoupling(
        4, partial(nn.ResidualConvNet, context_features=2, spatial_dims=1)
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize(
    ("own", "given"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_a_dtype_that_differs_from_that_of_the_parameters(name, direction, own, given):
    layer = LAYERS[name]().to(own)
    call = getattr(layer, direction)
    x = torch.randn(3, 4, 5 if "convolutions" in name else 1).squeeze(-1)
    context = torch.randn(3, 2)
    for dtypes, who in (((given, own), "[xz]"), ((own, given), "context"), ((given, given), "")):
        with pytest.raises(
            TypeError, match=f"{who}.* must have the network's dtype {own}, got {given}"
        ):
            call(x.to(dtypes[0]), context.to(dtypes[1]))
    call(x.to(own), context.to(own))
    with torch.autocast("cpu", torch.bfloat16):
        if torch.float64 not in (own, given):
            y, log_det = call(x.to(given), context.to(given))
            assert (y.dtype, log_det.dtype) == (given, torch.float32)
        else:  # autocast does not convert float64
            with pytest.raises(TypeError, match="must have the network's dtype"):
                call(x.to(given), context.to(given))


def test_a_network_of_the_user_may_convert_dtypes():
    class Widening(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.net = nn.MLP(inputs, outputs).double()

        def forward(self, x):
            return self.net(x.double()).to(x.dtype)

    x = torch.randn(3, 4)
    assert nn.SplineCoupling(4, Widening)(x)[0].dtype == torch.float32
