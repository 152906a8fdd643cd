"""Calls with chunk=: the same numbers and gradients, and memory for some rows at a time."""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pyflowkern import flows, nn

ROWS = 23
FLOWS = {
    "RealNVP": lambda: flows.RealNVP(4, steps=2, hidden=8),
    "MAF": lambda: flows.MAF(4, transforms=2, hidden=8),
    "MAF with contexts": lambda: flows.MAF(4, transforms=2, hidden=8, context_features=3),
    "IAF": lambda: flows.IAF(4, transforms=2, hidden=8),
    "NSF": lambda: flows.NSF(4, transforms=2, hidden=8, context_features=3),
    "angles": lambda: flows.NSF(4, transforms=2, hidden=8, circular=True),
    "mixture": lambda: flows.RealNVP(4, steps=1, hidden=8, base=flows.MixtureOfGaussians(4, 3)),
    "Glow": lambda: flows.Glow((2, 4, 4), levels=1, steps=1, hidden=8, bits=8),
    "FFJORD": lambda: flows.FFJORD(4, (8, 8), method="rk4", step_size=0.5),
    "labels": lambda: flows.FlowMatching(4, (8, 8), classes=3, method="rk4", step_size=0.5),
}
#: Their layers are products of torch, which rounds those of few rows in another order.
ROUNDED = ("NSF", "angles", "Glow", "FFJORD", "labels")


def case(name):
    torch.manual_seed(0)
    flow = FLOWS[name]()
    with torch.no_grad():  # new flows are the identity, nearly
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.rand(ROWS, *flow.event_shape)
    context = torch.randn(ROWS, 3) if flow.context_features else None
    if name == "labels":
        context = torch.arange(ROWS) % 3
    return flow.eval(), x, context


def assert_same(name, found, wanted):
    if name in ROUNDED:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("chunk", [1, 10, 23, 100])
@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_densities_and_samples_are_those_of_one_call(name, chunk):
    flow, x, context = case(name)
    assert_same(name, flow.log_prob(x, context, chunk=chunk), flow.log_prob(x, context))
    assert_same(name, flow.bits_per_dim(x, context, chunk=chunk), flow.bits_per_dim(x, context))
    for draw in (flow.sample, flow.rsample, lambda *a, **k: flow.sample_and_log_prob(*a, **k)[1]):
        drawn = [
            draw(ROWS, context, generator=torch.Generator().manual_seed(1), **given)
            for given in ({}, {"chunk": chunk})
        ]
        assert_same(name, drawn[1], drawn[0])


@pytest.mark.parametrize("name", ["MAF with contexts", "NSF", "labels"])
def test_gradients_are_those_of_one_call(name):
    flow, x, context = case(name)
    flow.double()
    wanted, found = [], []
    for given, into in (({}, wanted), ({"chunk": 10}, found)):
        flow.zero_grad()
        y = x.double().requires_grad_()
        c = context if name == "labels" else context.double().requires_grad_()
        flow.log_prob(y, c, **given).square().sum().backward()
        draws = flow.rsample(ROWS, c, generator=torch.Generator().manual_seed(1), **given)
        draws.square().sum().backward()
        into += [p.grad for p in (*flow.parameters(), y, c) if p.grad is not None]
    assert len(found) == len(wanted) > 3
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_is_the_same_when_a_chunk_is_computed_again(device):
    """That of pixels: gradients by other noise than that of the loss would be those of another loss."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    flow, _, _ = case("Glow")
    flow.to(device)
    pixels = torch.randint(256, (ROWS, 2, 4, 4), dtype=torch.uint8)
    found = []
    for given in ({}, {"chunk": ROWS}):
        flow.zero_grad()
        torch.manual_seed(0)
        flow.log_prob(pixels.to(device), **given).sum().backward()
        found.append([p.grad.clone() for p in flow.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_told_which_device_draws(monkeypatch):
    """It looks at tensors among its arguments for it, wherever the rows lie."""
    flow, x, _ = case("RealNVP")
    seen = []
    original = torch.utils.checkpoint._infer_device_type

    def noted(*given):
        seen.append(given)
        return original(*given)

    monkeypatch.setattr(torch.utils.checkpoint, "_infer_device_type", noted)
    flow.log_prob(x.numpy(), chunk=10)
    flow.rsample(ROWS, chunk=10)
    assert len(seen) >= 6
    assert all(any(t is flow._anchor for t in given) for given in seen)


def test_gradients_of_gradients_and_transforms_know_chunks():
    flow, x, context = case("MAF with contexts")
    flow.double()
    x, context = x.double(), context.double()

    def total(x, **chunk):
        return flow.log_prob(x, context, **chunk).sum()

    second = [
        torch.autograd.functional.hvp(lambda x, c=c: total(x, **c), x, torch.ones_like(x))[1]
        for c in ({}, {"chunk": 7})
    ]
    torch.testing.assert_close(second[1], second[0])
    torch.testing.assert_close(
        torch.func.grad(lambda x: total(x, chunk=7))(x), torch.func.grad(total)(x)
    )


def test_activations_of_a_few_rows_alone_are_kept():
    flow = flows.RealNVP(4, steps=3, hidden=32)
    flow.bijection[0].register_forward_hook(
        lambda *_: None
    )  # the layers, whose activations torch keeps
    flow.eval()
    x = torch.randn(4000, 4)

    def kept(**chunk):
        bytes_ = []
        with saved_tensors_hooks(lambda t: bytes_.append(t.nbytes) or t, lambda t: t):
            flow.log_prob(x, **chunk).sum().backward()
        return sum(bytes_)

    assert kept(chunk=100) < kept() / 20


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "f2"])
@torch.no_grad()
def test_arrays_that_lie_in_files(dtype, tmp_path):
    flow, x, context = case("MAF with contexts")
    for name, t in (("x", x), ("c", context)):
        np.save(tmp_path / f"{name}.npy", t.numpy().astype(dtype))
    x, context = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xc")
    own = [torch.from_numpy(a.astype(np.float32)) for a in (x, context)]
    assert torch.equal(flow.log_prob(x, context, chunk=5), flow.log_prob(*own))
    assert torch.equal(flow.log_prob(own[0], context, chunk=5), flow.log_prob(*own))
    one = flow.log_prob(own[0], own[1][0])
    assert torch.equal(flow.log_prob(x, context[0], chunk=5), one)
    assert torch.equal(flow.log_prob(x, own[1][0], chunk=5), one)
    three = own[0][:3]  # as many rows as a context has numbers
    found = flow.log_prob(three, context[0], chunk=2)
    assert torch.equal(found, flow.log_prob(three, own[1][0]))


@torch.no_grad()
def test_arrays_of_pixels_and_labels():
    flow, _, _ = case("Glow")
    pixels = torch.randint(256, (ROWS, 2, 4, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    found = flow.bits_per_dim(pixels.numpy(), chunk=ROWS)
    torch.manual_seed(0)
    assert torch.equal(found, flow.bits_per_dim(pixels))
    points = pixels / 256
    torch.testing.assert_close(
        flow.bits_per_dim(points.numpy(), chunk=5), flow.bits_per_dim(points)
    )
    flow, x, labels = case("labels")
    wanted = flow.log_prob(x, labels)
    torch.testing.assert_close(flow.log_prob(x.numpy(), labels.numpy(), chunk=5), wanted)
    for one in (torch.tensor(2), torch.tensor([2]), np.array(2)):
        found = flow.log_prob(x, one, chunk=5)
        torch.testing.assert_close(found, flow.log_prob(x, torch.full((ROWS,), 2)))


def test_distributions_take_chunks():
    flow, x, context = case("MAF with contexts")
    d = flow.distribution(context[:2])
    assert torch.equal(d.log_prob(x[:, None], chunk=5), d.log_prob(x[:, None]))
    torch.manual_seed(0)
    found = (
        d.sample((7,), chunk=4),
        d.rsample((7,), chunk=4),
        d.rsample_and_log_prob((7,), chunk=4),
    )
    torch.manual_seed(0)
    wanted = (d.sample((7,)), d.rsample((7,)), d.rsample_and_log_prob((7,)))
    for a, b in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True):
        assert torch.equal(a, b)


def test_no_rows():
    flow, x, context = case("MAF with contexts")
    assert flow.log_prob(x[:0], context[:0], chunk=5).shape == (0,)
    assert flow.log_prob(x[:0].numpy(), context[0], chunk=5).shape == (0,)
    assert flow.sample(0, context[:0], chunk=5).shape == (0, 4)


def test_what_is_wrong_is_named():
    flow, x, c = case("MAF with contexts")
    of_arrays = "x must be a torch.Tensor, got ndarray"
    of_lists = "x must be a torch.Tensor, or with chunk also a NumPy array, got list"
    for error, message, arguments in (
        (ValueError, "chunk must be at least 1, got 0", (x, c, 0)),
        (TypeError, "chunk must be an int, got float", (x, c, 1.5)),
        (ValueError, r"x must have shape \[N, 4\], got \(23, 3\)", (x[:, 1:], c, 5)),
        (TypeError, "x must be torch.float32 .* got torch.int64", (np.ones((23, 4), int), c, 5)),
        (TypeError, "must hold real numbers, got <U1", (np.full((23, 4), "x"), c, 5)),
        (TypeError, of_arrays, (x.numpy(), c, None)),
        (TypeError, of_lists, ([1], c, 5)),
        (ValueError, r"context must have shape \(23, 3\), got \(9, 3\)", (x, c[:9], 9)),
        (ValueError, r"shape \(23, 3\), got \(23, 2\)", (x, c[:, 1:].numpy(), 9)),
        (ValueError, r"context must have shape \(23, 3\), got None", (x, None, 9)),
    ):
        with pytest.raises(error, match=message):
            flow.log_prob(*arguments[:2], chunk=arguments[2])
    with pytest.raises(ValueError, match="chunk must be at least 1, got -1"):
        flow.sample(3, c[0], chunk=-1)


def test_rows_that_depend_on_each_other_are_refused():
    x = torch.randn(20, 4)
    layers = {"BatchNorm": nn.BatchNorm(4), "ActNorm": nn.ActNorm(4)}
    for name, layer in layers.items():
        flow = flows.Flow(nn.Sequential(layer), (4,))
        with pytest.raises(ValueError, match=rf"bijection\.layers\.0, a {name} in training mode"):
            flow.log_prob(x, chunk=5)
        assert torch.equal(flow.eval().log_prob(x, chunk=5), flow.log_prob(x))
        flow.train().log_prob(x)
        if name == "ActNorm":  # it has its statistics now
            assert torch.equal(flow.log_prob(x, chunk=5), flow.log_prob(x))
            flow.load_state_dict(flow.state_dict())
            assert torch.equal(flow.log_prob(x, chunk=5), flow.log_prob(x))
        else:
            flow.sample(9, chunk=5)  # by running statistics
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4))
    flow = flows.Flow(nn.Sequential(nn.AffineCoupling(4, lambda i, o: network)), (4,))
    for call in (lambda: flow.log_prob(x, chunk=5), lambda: flow.sample(9, chunk=5)):
        with pytest.raises(ValueError, match=r"a BatchNorm1d in training mode.* flow\.eval\(\)"):
            call()
    network[1].running_mean = network[1].running_var = None
    with pytest.raises(ValueError, match=r"a BatchNorm1d without running statistics"):
        flow.eval().log_prob(x, chunk=5)
