"""U-Nets as fields: against reverse-mode products and whole Jacobians, on images of any size."""

import pytest
import torch
from laws import check_batched_gradients, check_gradients, normal, randomize
from torch.nn.utils import parametrizations, prune

from pyflowkern import flows, nn, ops, transport
from pyflowkern.nn import _stacked


def make(widths=(4, 6), activation="silu", context=0, dtype=torch.float64, **options):
    torch.manual_seed(0)
    field = nn.VectorFieldUNet(2, widths, activation, context_features=context, **options)
    return randomize(field, 0.3).to(dtype)


def states(n=3, height=5, width=3, seed=0, dtype=torch.float64):
    return normal(n, 2, height, width, seed=seed, dtype=dtype)


def by_products(field, context=0):
    return nn.VectorField(field, context_features=context)


def test_a_new_field_is_zero_and_its_last_layer_learns():
    field, x = nn.VectorFieldUNet(2, (4, 6)), states(dtype=torch.float32)
    assert not field(0.3, x).any()
    (field(0.3, x) - 1).square().sum().backward()
    assert field.last.weight.grad.any()


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (5, 3), (7, 8), (9, 4)], ids=str)
@pytest.mark.parametrize("widths", [(3,), (4, 6), (4, 8, 8)], ids=str)
def test_images_of_any_size(size, widths):
    field, x = make(widths, blocks=2), states(2, *size)
    e = states(2, *size, seed=1)
    found = field.velocity_and_divergence(0.3, x, probe=e)
    expected = by_products(field).velocity_and_divergence(0.3, x, probe=e)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert found[0].shape == x.shape
    assert found[0].is_contiguous()


@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu", "gelu"])
@pytest.mark.parametrize("context", [0, 3])
def test_values_and_derivatives_are_those_of_reverse_mode(activation, context):
    """First and second derivatives in parameters, state, time and context; times shared and of each sample."""
    field, e = make(activation=activation, context=context), states(seed=1)
    for time in (torch.tensor(0.4).double(), normal(3, seed=4)):
        found = []
        for f in (field, by_products(field, context)):
            x, t = states().requires_grad_(), time.clone().requires_grad_()
            c = normal(3, context, seed=2).requires_grad_() if context else None
            given = {} if c is None else {"context": c}
            y, divergence = f.velocity_and_divergence(t, x, probe=e, **given)
            wanted = [x, t, *([] if c is None else [c]), *field.parameters()]
            loss = y.square().sum() + divergence.square().sum()
            options = {"allow_unused": True, "materialize_grads": True}
            first = torch.autograd.grad(loss, wanted, create_graph=True, **options)
            again = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, **options)
            found.append([y, divergence, *first, *again])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    given = {"context": c.detach()} if context else {}
    pair = field.velocity_and_divergence(0.4, states(), probe=e, **given)
    check_gradients(field, sum(map(torch.sum, pair)))


def test_exact_is_the_trace_of_the_jacobian_in_chunks(monkeypatch):
    field, x = make(), states(2, 3, 3)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: field(0.4, v[None])[0]))(x)
    matrix = jacobian.reshape(2, 18, 18)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    for most in (_stacked.MOST, 1, 1000):
        monkeypatch.setattr(_stacked, "MOST", most)
        leaf = x.clone().requires_grad_()
        y, divergence, kinetic, frobenius = field.velocity_and_divergence(
            0.4, leaf, method="exact", regularizers=True
        )
        torch.testing.assert_close(divergence, trace, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(frobenius, matrix.square().sum((1, 2)), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(kinetic, y.square().sum((1, 2, 3)))
        divergence.sum().backward()
        if most == _stacked.MOST:
            whole = leaf.grad
        torch.testing.assert_close(leaf.grad, whole, rtol=1e-10, atol=1e-11)


def test_exact_takes_bounded_memory():
    seen = []
    field, x = nn.VectorFieldUNet(3, (16, 16)), torch.randn(1, 3, 16, 16)
    run = field._run
    field._run = lambda t, x, e, c: seen.append(e.shape[0]) or run(t, x, e, c)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stacked, "MOST", 2**21)
        field.velocity_and_divergence(0.0, x, method="exact")
    assert sum(seen) == 768
    assert (1 + max(seen)) * 2 * 16 * 256 <= 2**21


def test_probes_are_seeds_or_tensors_and_average():
    field, x = make(), states()
    e = ops.rademacher(torch.tensor(5), (4, 3, 30), torch.float64).view(4, *x.shape)
    each = field.velocity_and_divergence(0.1, x, probe=torch.tensor(5), probes=4, per_probe=True)
    again = field.velocity_and_divergence(0.1, x, probe=e, per_probe=True)
    mean = field.velocity_and_divergence(0.1, x, probe=e)[1]
    torch.testing.assert_close(each, again)
    torch.testing.assert_close(mean, each[1].mean(0))


def test_batched_gradients_and_function_transforms():
    field, x = make(), states().requires_grad_()
    _, divergence = field.velocity_and_divergence(0.4, x, probe=states(seed=1))
    check_batched_gradients(divergence, [x, *field.parameters()])
    single, several = make(dtype=torch.float32), torch.stack([states(), states(seed=1)]).float()
    found = torch.func.vmap(lambda v: single(0.4, v))(several)
    torch.testing.assert_close(found, torch.stack([single(0.4, v) for v in several]))
    y, moved = torch.func.jvp(lambda v: field(0.4, v), (x.detach(),), (states(seed=1),))
    assert moved.shape == y.shape


def test_a_bad_sample_stays_alone():
    field, x, e = (
        make(context=2, dtype=torch.float32),
        states(5).float(),
        states(5, seed=1).float(),
    )
    c = normal(5, 2, seed=2).float()
    good = field.velocity_and_divergence(0.2, x, probe=e, context=c)
    others = torch.arange(5) != 2
    for tensor, poison in ((x, torch.nan), (x, torch.inf), (c, torch.nan)):
        spoilt = tensor.clone()
        spoilt[2].view(-1)[-1] = poison
        given = (spoilt, c) if tensor is x else (x, spoilt)
        found = field.velocity_and_divergence(0.2, given[0], probe=e, context=given[1])
        for a, b in zip(found, good, strict=True):
            assert torch.equal(a[others], b[others])
            assert not a[2].isfinite().all()


def test_no_samples_and_layouts():
    field, x = make(), states(0)
    y, divergence = field.velocity_and_divergence(0.0, x, probe=ops.draw_probe(x, seed=0))
    assert (y.shape, divergence.shape) == (x.shape, (0,))
    assert field.velocity_and_divergence(0.0, x, method="exact")[1].shape == (0,)
    field, x = make(dtype=torch.float32), states().float()
    for layout in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        torch.testing.assert_close(field(0.1, layout), field(0.1, x), rtol=1e-4, atol=1e-5)


def test_half_states_and_autocast():
    """Divergences are float32 throughout; the velocity alone takes autocast's half convolutions."""
    field, x = make(dtype=torch.float32), states(dtype=torch.bfloat16)
    probe = ops.draw_probe(x, seed=1)
    y, divergence = field.velocity_and_divergence(0.1, x, probe=probe)
    assert (y.dtype, divergence.dtype) == (torch.bfloat16, torch.float32)
    whole = field.velocity_and_divergence(0.1, x.float(), probe=probe)
    torch.testing.assert_close(divergence, whole[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = field.velocity_and_divergence(0.1, x.float(), probe=probe)
        velocity = field(0.1, x.float())
    for a, b in zip(under, whole, strict=True):
        assert torch.equal(a, b)
    assert velocity.dtype == torch.float32
    assert 0 < (velocity - whole[0]).abs().max() < 0.1 * whole[0].abs().max()
    half = make(dtype=torch.bfloat16)
    assert half(0.1, x).dtype == torch.bfloat16


def test_compiles():
    field, e = make(dtype=torch.float32, context=2), states(seed=1).float()
    x, c = states().float().requires_grad_(), normal(3, 2, seed=2).float()

    def loss(x):
        y, divergence = field.velocity_and_divergence(0.2, x, probe=e, context=c)
        return y.square().sum() + divergence.sum() + field(0.3, x, c).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


@pytest.mark.parametrize(("channels", "widths"), [(1, (32, 64)), (1, (8, 512)), (64, (4,))])
def test_the_widest_layer_is_known(channels, widths):
    """The chunks of an exact trace are of as many tangents as fit by it."""
    field, found = nn.VectorFieldUNet(channels, widths), []
    for module in field.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, x, y: found.extend([x[0].numel(), y.numel()]))
    field(0.5, torch.zeros(1, channels, 9, 7))
    assert field._widest(9, 7) == max(found)


CHANGES = {
    "hook": lambda field: field.up[0][0].conv1.register_forward_hook(
        lambda m, args, out: out.tanh()
    ),
    "prune": lambda field: prune.l1_unstructured(field.first, "weight", 0.5),
    "weight_norm": lambda field: parametrizations.weight_norm(field.down[0][0].conv1),
    "replaced": lambda field: setattr(field, "last", torch.nn.Sequential(field.last)),
    "bias": lambda field: replace_first(field, bias=True),
    "circular": lambda field: replace_first(field, padding_mode="circular", bias=False),
    "affine": lambda field: setattr(field, "norm", affine(field.norm)),
}


def replace_first(field, **options):
    old = field.first
    new = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, **options).double()
    field.first = new


def affine(norm):
    new = torch.nn.GroupNorm(norm.num_groups, norm.num_channels).double()
    torch.nn.init.normal_(new.weight)
    return new


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_changed_layers_are_called(name):
    field, x, e = make(context=2), states(), states(seed=1)
    c = normal(3, 2, seed=2)
    before = field.velocity_and_divergence(0.3, x, probe=e, context=c)
    CHANGES[name](field)
    found = field.velocity_and_divergence(0.3, x, probe=e, context=c)
    hook = field.of_time[0].register_forward_hook(lambda *_: None)  # all are called for certain
    expected = by_products(field, 2).velocity_and_divergence(0.3, x, probe=e, context=c)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    hook.remove()
    same = name in ("weight_norm", "replaced")
    assert torch.allclose(found[0], before[0], rtol=1e-8, atol=1e-9) == same
    found[1].sum().backward()
    assert all(p.grad is not None for p in field.halve.parameters())


def test_flows_and_bridges_of_it():
    solver = {"method": "rk4", "step_size": 0.5}
    flow = flows.CNF((2, 4, 3), (4, 4), conv="unet", **solver)
    assert isinstance(next(flow.blocks()).field, nn.VectorFieldUNet)
    assert next(flow.blocks()).field.activation == "silu"
    assert flow.log_prob(states(2, 4, 3).float()).shape == (2,)
    several = flows.FFJORD((1, 4, 4), (4,), levels=2, conv="unet", bits=8, **solver)
    assert sum(isinstance(b.field, nn.VectorFieldUNet) for b in several.blocks()) == 3
    several.bits_per_dim(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)).mean().backward()
    bridge = transport.SchrodingerBridge(
        (1, 4, 4), sigma=0.5, network=lambda channels: nn.VectorFieldUNet(channels, (4, 4))
    )
    x0, x1 = torch.randn(2, 6, 1, 4, 4)
    bridge.loss(x0, x1).backward()
    assert bridge.sample(x0, 3).shape == (4, 6, 1, 4, 4)
    base = flows.StandardNormal(16)
    density = lambda x: base.log_prob(x.flatten(1))  # noqa: E731
    assert bridge.log_prob(x1, density, method="rk4", step_size=0.5).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.VectorFieldUNet(0), ValueError, "channels must be at least 1"),
        (lambda: nn.VectorFieldUNet(1.0), TypeError, "channels must be an int"),
        (lambda: nn.VectorFieldUNet(1, 8), TypeError, "widths must be a sequence"),
        (lambda: nn.VectorFieldUNet(1, ()), ValueError, "widths must have a width"),
        (lambda: nn.VectorFieldUNet(1, (8, 0)), ValueError, "widths must be at least 1"),
        (
            lambda: nn.VectorFieldUNet(1, activation="relu"),
            ValueError,
            "activation must be one of",
        ),
        (lambda: nn.VectorFieldUNet(1, blocks=0), ValueError, "blocks must be at least 1"),
        (lambda: nn.VectorFieldUNet(1, context_features=-1), ValueError, "context_features"),
        (lambda: make()(0.0, states()[:, :1]), ValueError, r"x must have shape \[N, 2, H, W\]"),
        (lambda: make()(normal(2), states()), ValueError, "t must be"),
        (lambda: make()(0.0, states(), normal(3, 2)), ValueError, "context must be None"),
        (lambda: make(context=2)(0.0, states()), ValueError, r"context must have shape \(3, 2\)"),
        (lambda: flows.CNF((1, 4, 4), conv="net"), ValueError, "conv must be True, False, 'unet'"),
        (lambda: flows.CNF((1, 4, 4), conv=1.0), TypeError, "conv must be True, False, 'unet'"),
        (lambda: flows.CNF(4, conv="unet"), ValueError, r"event_shape must be \(C, H, W\)"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
