"""A value of a wrong kind for any optional argument is a TypeError or ValueError that names the argument."""

import inspect
from functools import partial

import pytest
import torch

from pyflowkern import estimation, flows, nn, ode, ops, transport

X = torch.linspace(-2, 2, 32).reshape(8, 4)
PIXELS = torch.arange(256).reshape(4, 1, 8, 8).to(torch.uint8)
VALUES = ["x", object(), 3 + 2j, torch.ones(2, 3)]


def _flow():
    return flows.NSF(4, transforms=2, hidden=(8,)).eval()


def _images():
    return flows.Glow((1, 8, 8), levels=1, steps=1, hidden=4, bits=8).eval()


def _decay(t, y):
    return -y


#: what is called, and the arguments that it cannot do without
CALLS = {
    "sample": lambda: (_flow().sample, (3,)),
    "sample_and_log_prob": lambda: (_flow().sample_and_log_prob, (3,)),
    "rsample": lambda: (_flow().rsample, (3,)),
    "log_prob": lambda: (_flow().log_prob, (X,)),
    "interpolate": lambda: (_images().interpolate, (PIXELS[:2], PIXELS[2:], 3)),
    "bits_per_dim": lambda: (_images().bits_per_dim, (PIXELS,)),
    "bridge": lambda: (transport.SchrodingerBridge(4, sigma=0.5, hidden=(8,)).sample, (X,)),
    "energy_test": lambda: (partial(estimation.energy_test, permutations=9), (X, X)),
    "mmd_test": lambda: (partial(estimation.mmd_test, permutations=9), (X, X)),
    "sliced_test": lambda: (partial(estimation.sliced_test, permutations=9), (X, X)),
    "classifier_test": lambda: (partial(estimation.classifier_test, steps=1), (X, X)),
    "importance": lambda: (estimation.importance_sampling, (lambda x: x[:, 0], _flow(), 10)),
    "bounds": lambda: (estimation.likelihood_bounds, (_images(), PIXELS)),
    "sinkhorn": lambda: (partial(transport.sinkhorn, epsilon=0.1), (X, X)),
    "wasserstein": lambda: (transport.wasserstein, (X, X)),
    "solve": lambda: (ode.solve, (_decay, X, [0.0, 1.0])),
    "odeint": lambda: (ode.odeint, (_decay, X, [0.0, 1.0])),
    "dequantize": lambda: (ops.dequantize, (PIXELS,)),
    "euler_maruyama": lambda: (ops.euler_maruyama, (X, X, 0.1, 0.2)),
    "SplineMap": lambda: (ops.SplineMap, ()),
    "ScaleMap": lambda: (ops.ScaleMap, ("sigmoid",)),
    "AffineCoupling": lambda: (nn.AffineCoupling, (4, nn.MLP)),
    "SplineCoupling": lambda: (nn.SplineCoupling, (4, nn.MLP)),
    "MaskedAutoregressive": lambda: (nn.MaskedAutoregressive, (4,)),
    "InvertibleLinear": lambda: (nn.InvertibleLinear, (4,)),
    **{
        kind.__name__: partial(lambda kind: (kind, (4,)), kind)
        for kind in (flows.RealNVP, flows.Glow, flows.MAF, flows.IAF, flows.NSF, flows.FFJORD)
    },
}


def _optional(function, given):
    """Return the names of arguments that have a default, without those of the call."""
    parameters = list(inspect.signature(function).parameters.values())
    return [
        p.name
        for i, p in enumerate(parameters)
        if p.default is not p.empty
        and (i >= len(given) or p.kind is p.KEYWORD_ONLY)
        and p.kind is not p.VAR_KEYWORD
    ]


def _refusal(call):
    """Return what is said of a call that is refused, None for one that is not."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def test_an_option_of_another_kind_of_layer_is_refused_with_those_that_are_known():
    with pytest.raises(
        TypeError,
        match=r"SplineCoupling takes no argument 'hidden'; of splines it takes kind, bins, ",
    ):
        nn.SplineCoupling(4, nn.MLP, hidden=8)


@pytest.mark.parametrize("temperature", [torch.tensor(1j), torch.ones(2), torch.tensor(-1.0)])
def test_a_temperature_that_is_a_tensor_is_one_real_number_from_zero_on(temperature):
    with pytest.raises((TypeError, ValueError), match=r"temperature must be"):
        _flow().sample(2, temperature=temperature)
    assert torch.equal(
        _flow().sample(2, temperature=torch.zeros(())).diff(dim=0), torch.zeros(1, 4)
    )


@pytest.mark.parametrize("jump_t", [None, [0.5]])
@pytest.mark.parametrize("params", [torch.ones(3), torch.tensor(1.0), 1.0, [1.0]])
def test_params_of_an_ode_are_a_sequence_of_tensors(params, jump_t):
    """The rows of one tensor are not what a field depends on: their gradients would be zero."""
    with pytest.raises(TypeError, match="params must be"):
        ode.solve(_decay, X, [0.0, 1.0], params=params, jump_t=jump_t)


@pytest.mark.filterwarnings("ignore")
def test_tracing_names_what_stands_in_its_place():
    layer = nn.AffineCoupling(4, nn.MLP)
    with pytest.raises(TypeError, match=r"torch.jit.trace makes sizes tensors, use torch.export"):
        torch.jit.trace(layer, X)


@pytest.mark.parametrize("name", CALLS)
def test_a_value_of_a_wrong_kind_is_refused_by_the_name_of_its_argument(name):
    function, given = CALLS[name]()
    for argument in _optional(function, given):
        for value in VALUES:
            message = _refusal(partial(function, *given, **{argument: value}))
            assert message, (argument, value)
            assert argument in message, (value, message)
