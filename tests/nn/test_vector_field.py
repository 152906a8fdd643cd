"""Vector fields as modules: layers with time, and any network by reverse-mode products."""

import itertools

import pytest
import torch
from laws import check_batched_gradients, check_gradients, normal

from pyflowkern import nn, ops

TIMES = ("none", "concat", "concatsquash")


def make(time, hidden=(16, 12), activation="tanh", dims=3):
    torch.manual_seed(0)
    return nn.VectorFieldMLP(dims, hidden, activation, time).double()


def plain(field):
    """The same field as a module that autograd differentiates."""
    return nn.VectorField(field)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu", "gelu"])
def test_same_as_products_of_autograd(time, activation):
    field = make(time, activation=activation)
    x = normal(6, 3)
    for t in (0.3, torch.tensor(0.3), normal(6, seed=4)):
        for options in (
            {"probe": normal(6, 3, seed=1)},
            {"probe": normal(2, 6, 3, seed=1), "per_probe": True},
            {"probe": torch.tensor(3), "probes": 2},
            {"method": "exact"},
        ):
            found = field.velocity_and_divergence(t, x, **options, regularizers=True)
            expected = plain(field).velocity_and_divergence(t, x, **options, regularizers=True)
            if options.get("method") == "exact":
                closed = field.velocity_and_divergence(t, x, method="exact")
                torch.testing.assert_close(closed, found[:2], rtol=1e-11, atol=1e-12)
            else:  # |J e| and |e^T J| agree only in expectation
                found, expected = found[:3], expected[:3]
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(field(t, x), found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", TIMES)
def test_gradients(time):
    field, x = make(time), normal(6, 3)
    for method, own in itertools.product(("hutchinson", "exact"), (False, True)):
        options = {"method": method} | ({} if method == "exact" else {"probe": torch.tensor(1)})
        t = normal(6, seed=4) if own else torch.tensor(0.4).double()
        losses = []
        for f in (field, plain(field)):
            leaf, time_leaf = x.clone().requires_grad_(), t.clone().requires_grad_()
            y, divergence = f.velocity_and_divergence(time_leaf, leaf, **options)
            loss = y.square().sum() + divergence.square().sum()
            wanted = [leaf, *field.parameters(), *([] if time == "none" else [time_leaf])]
            losses.append(torch.autograd.grad(loss, wanted, allow_unused=True))
        for a, b in zip(*losses, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        if method == "hutchinson":
            check_gradients(
                field, sum(map(torch.sum, field.velocity_and_divergence(t, x, **options)))
            )


def test_concatsquash_is_the_layer_of_ffjord():
    """FFJORD's layer: (W x + b) sigmoid(gate(t)) + hyper_bias(t)."""
    field, x, t = make("concatsquash", hidden=()), normal(4, 3), 0.7
    layer, (u, c, v) = field.layers[0], field.times[0]
    expected = layer(x) * torch.sigmoid(u * t + c) + v * t
    torch.testing.assert_close(field(t, x), expected)


def test_concat_is_a_further_input():
    field, x, t = make("concat", hidden=()), normal(4, 3), 0.7
    weight = torch.cat([field.times[0].t(), field.layers[0].weight], 1)  # t first
    h = torch.cat([torch.full((4, 1), t).double(), x], 1)
    torch.testing.assert_close(field(t, x), h @ weight.t() + field.layers[0].bias)


def test_any_network_on_images():
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(2, 2, 3, padding=1).double()

        def forward(self, t, x):
            return torch.tanh(self.conv(x)) + t

    field, x = nn.VectorField(Net()), normal(3, 2, 4, 4)
    e = normal(3, 2, 4, 4, seed=1)
    y, divergence = field.velocity_and_divergence(0.1, x, probe=e)
    _, tangent = torch.func.jvp(lambda v: field(0.1, v), (x,), (e,))
    torch.testing.assert_close(divergence, (e * tangent).flatten(1).sum(1))
    assert y.shape == x.shape
    divergence.sum().backward()
    assert field.net.conv.weight.grad.abs().max() > 0
    with torch.no_grad():
        y, divergence = field.velocity_and_divergence(0.1, x, probe=e)
    assert not y.requires_grad
    assert not divergence.requires_grad


def test_times_of_each_sample_are_broadcast_with_the_states():
    class Net(torch.nn.Module):
        def forward(self, t, x):
            return t * x

    field, t = nn.VectorField(Net()), normal(3, seed=4)
    for shape in ((3, 2), (3, 3), (3, 2, 4, 4)):  # also where N = D
        x = normal(*shape)
        y, divergence = field.velocity_and_divergence(t, x, method="exact")
        torch.testing.assert_close(y, torch.stack([a * b for a, b in zip(t, x, strict=True)]))
        torch.testing.assert_close(divergence, t * x[0].numel())


def test_half_states_are_computed_in_float32():
    field = nn.VectorFieldMLP(3)
    x = normal(5, 3, dtype=torch.bfloat16)
    y, divergence = field.velocity_and_divergence(0.0, x, method="exact")
    assert (y.dtype, divergence.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_states_and_layers_of_several_dtypes(autocast):
    x = normal(5, 3, dtype=torch.float32)
    expected = make("concatsquash")(0.5, x.double())
    for dtypes in itertools.product((torch.float32, torch.float64), repeat=3):
        field = make("concatsquash")
        for layer, dtype in zip(field.layers, dtypes, strict=True):
            layer.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = field(0.5, x)
        tolerance = 0.1 if autocast else 1e-5
        torch.testing.assert_close(found, expected.float(), rtol=tolerance, atol=tolerance)
        found = field.velocity_and_divergence(0.5, x, method="exact")[0]
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time", TIMES)
def test_batched_gradients_are_those_one_by_one(time):
    field, x = make(time), normal(6, 3).requires_grad_()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for options in ({"probe": normal(6, 3, seed=1)}, {"method": "exact"}):
        for y in field.velocity_and_divergence(t, x, **options):
            leaves = [x, *field.parameters(), *([] if time == "none" else [t])]
            check_batched_gradients(y, leaves)


def test_replaced_layers_must_fit():
    for conv in (False, True):
        field = nn.VectorFieldConv(2, (4,)) if conv else nn.VectorFieldMLP(2, (4,))
        kind = (
            (lambda a, b, **k: torch.nn.Conv2d(a, b, 3, padding=1, **k))
            if conv
            else torch.nn.Linear
        )
        x, good = torch.zeros(1, 2, *((3, 3) if conv else ())), field.layers[0]
        for i, bad, words in (
            (0, kind(2, 7), r"layers\[1\] must take 7"),
            (0, kind(3, 4), r"layers\[0\] must take 2"),
            (0, kind(2, 4, bias=False), "have a bias"),
            (1, kind(4, 3), "must give 2, got 3"),
        ):
            last, field.layers[i] = field.layers[i], bad
            with pytest.raises(ValueError, match=words):
                field(0.0, x)
            field.layers[i] = last
        assert field.layers[0] is good


def test_wrong_arguments():
    field, x = nn.VectorFieldMLP(3), torch.zeros(4, 3)
    probe = ops.draw_probe(x)
    for error, message, call in (
        (ValueError, "dims and hidden", lambda: nn.VectorFieldMLP(0)),
        (ValueError, "activation", lambda: nn.VectorFieldMLP(3, activation="relu")),
        (ValueError, "time", lambda: nn.VectorFieldMLP(3, time="fourier")),
        (ValueError, "x must have shape", lambda: field(0.0, x[:, :2])),
        (ValueError, "t must be", lambda: nn.VectorFieldMLP(3, time="concat")(x[0], x)),
        (ValueError, "needs a probe", lambda: field.velocity_and_divergence(0.0, x)),
        (
            ValueError,
            "no probe",
            lambda: field.velocity_and_divergence(0.0, x, probe=probe, method="exact"),
        ),
        (
            ValueError,
            "method must",
            lambda: field.velocity_and_divergence(0.0, x, probe=probe, method="xtrace"),
        ),
        (TypeError, "net must", lambda: nn.VectorField(torch.tanh)),
        (ValueError, "net must return", lambda: nn.VectorField(Narrow())(1.0, x)),
    ):
        with pytest.raises(error, match=message):
            call()


class Narrow(torch.nn.Module):
    def forward(self, t, x):
        return x[:, :1]


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("hidden", [(7,), (16, 12), (8, 8, 8)], ids=str)
def test_context_is_a_further_input_of_every_layer(time, hidden):
    """Values and gradients against autograd, for the estimate and the exact trace."""
    torch.manual_seed(0)
    field = nn.VectorFieldMLP(3, hidden, "silu", time, context_features=2).double()
    x = normal(6, 3)
    for options in ({"probe": normal(6, 3, seed=1)}, {"method": "exact"}):
        found = []
        for f in (field, nn.VectorField(field, context_features=2)):
            context = normal(6, 2, seed=2).requires_grad_()
            values = f.velocity_and_divergence(0.4, x, context=context, **options)
            loss = values[0].square().sum() + values[1].square().sum()
            gradients = torch.autograd.grad(loss, [context, *field.parameters()])
            found.append([*values, *gradients])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(field(0.4, x, context), values[0])
    layer = nn.VectorFieldMLP(3, (), context_features=2).double()
    weight = torch.cat([layer.layers[0].weight, layer.contexts[0]], 1)
    expected = torch.cat([x, context], 1) @ weight.t() + layer.layers[0].bias
    torch.testing.assert_close(layer(0.0, x, context), expected)


def test_wrong_contexts():
    x, context = torch.zeros(4, 3), torch.zeros(4, 2)
    field, told = nn.VectorFieldMLP(3), nn.VectorFieldMLP(3, context_features=2)
    for error, message, call in (
        (ValueError, "context must be None", lambda: field(0.0, x, context)),
        (ValueError, r"context must have shape \(4, 2\), got None", lambda: told(0.0, x)),
        (ValueError, r"context must have shape \(4, 2\)", lambda: told(0.0, x, context[:3])),
        (ValueError, "context must be None", lambda: nn.VectorField(field)(0.0, x, context)),
        (ValueError, "context_features", lambda: nn.VectorFieldMLP(3, context_features=-1)),
        (TypeError, "context_features", lambda: nn.VectorField(field, context_features=1.0)),
    ):
        with pytest.raises(error, match=message):
            call()


def squared_errors(field, t, x, target, context=None, scale=1.0, weight=1.0):
    """The squared error and its gradients, by the method and by its formula."""
    given = () if context is None else (context,)
    losses = (
        field.squared_error(t, x, target, context, scale=scale, weight=weight),
        (weight * (scale * field(t, x, *given) - target).square()).mean(),
    )
    wanted = list(field.parameters())
    return [(v.detach(), *torch.autograd.grad(v, wanted, allow_unused=True)) for v in losses]


@pytest.mark.parametrize("context", [None, normal(6, 2, seed=9)])
@pytest.mark.parametrize("time", TIMES)
def test_the_squared_error_is_its_formula(time, context):
    torch.manual_seed(0)
    features = 0 if context is None else 2
    field = nn.VectorFieldMLP(3, (16, 12), "silu", time, context_features=features).double()
    x, target = normal(6, 3), normal(6, 3, seed=1)
    each = normal(6, 1, seed=2)
    for t in (0.3, torch.tensor(0.3), normal(6, seed=4)):
        for factors in ((1.0, 1.0), (each, each.exp()), (2.0, normal(6, 3, seed=5))):
            found, expected = squared_errors(field, t, x, target, context, *factors)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_the_squared_error_calls_what_has_hooks_and_what_a_subclass_changed():
    field, calls = make("concat"), []
    x, t = normal(6, 3), normal(6, seed=4)
    with torch.no_grad():
        field.squared_error(t, x, x)
        for module in (field, field.layers[1]):
            handle = module.register_forward_hook(lambda *_: calls.append(1))
            field.squared_error(t, x, x)
            handle.remove()
    assert len(calls) == 2

    class Doubled(nn.VectorFieldMLP):
        def forward(self, t, x, context=None):
            return 2 * super().forward(t, x, context)

    found, expected = squared_errors(Doubled(3, (8,), time="concat").double(), t, x, x)
    torch.testing.assert_close(found, expected)


def test_the_squared_error_of_learned_states_and_contexts():
    field = nn.VectorFieldMLP(3, (8,), time="concat", context_features=2).double()
    leaves = [normal(6, n, seed=n).requires_grad_() for n in (3, 2)] + [normal(6).requires_grad_()]
    x, context, t = leaves
    losses = (
        field.squared_error(t, x, 2 * x, context),
        (field(t, x, context) - 2 * x).square().mean(),
    )
    found, expected = (torch.autograd.grad(v, leaves) for v in losses)
    torch.testing.assert_close(found, expected)


def test_wrong_targets_of_the_squared_error_are_named():
    field, x = make("concat"), normal(6, 3)
    with pytest.raises(ValueError, match="target must have shape"):
        field.squared_error(0.5, x, x[:, :2])
    for pair in ((x, x.to("meta")), (x.to("meta"), x)):
        with pytest.raises(ValueError, match="all tensors must be on one device"):
            field.squared_error(0.5, *pair)
    with pytest.raises(TypeError, match="target must be"):
        field.squared_error(0.5, x, x.long())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_squared_error_runs_the_op_of_the_field_where_it_has_no_kernel(device, monkeypatch):
    """Layers too wide for the one pass, and other devices: the field is called, whose own op there is better."""
    field = nn.VectorFieldMLP(2, (600,), time="concat").to(device)
    calls = []
    monkeypatch.setattr(type(field), "forward", lambda self, t, x, c=None: calls.append(1) or x)
    x = torch.zeros(4, 2, device=device)
    field.squared_error(torch.zeros(4, device=device), x, x)
    assert calls
