"""Models of normflows: what runs in the place of their transforms gives what the library gives."""

import copy
import pickle

import normflows as nf
import pytest
import torch
from laws.chains import calls  # noqa: F401
from laws.draws import normal

import pyflowkern
from pyflowkern.nn.links import Door

D = 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def coupling(sizes=(2, 16, 16, 4), **options):
    return nf.flows.AffineCouplingBlock(nf.nets.MLP(list(sizes)), **options)


def flow(*flows, base=None):
    return nf.NormalizingFlow(base or nf.distributions.DiagGaussian(D), list(flows))


def masked(mask, **options):
    nets = {name: nf.nets.MLP([D, 8, D]) for name in "st"}
    return nf.flows.MaskedAffineFlow(torch.tensor(mask), **{**nets, **options})


def made(**options):
    return nf.flows.MaskedAffineAutoregressive(D, 16, **options)


def nsf(layer, **options):
    flows = [layer(D, 2, 16, **options), nf.flows.LULinearPermute(D), layer(D, 1, 16, **options)]
    return flow(*flows, base=nf.distributions.DiagGaussian(D, trainable=False))


def conditional(*flows):
    return nf.ConditionalNormalizingFlow(nf.distributions.DiagGaussian(D), [*flows])


K = 3
Coupled, Autoregressive = (
    nf.flows.CoupledRationalQuadraticSpline,
    nf.flows.AutoregressiveRationalQuadraticSpline,
)
#: Flows of vectors, each of which is one op with its base.
VECTORS = {
    "RealNVP": lambda: flow(
        coupling(), nf.flows.Permute(D), coupling(), nf.flows.Permute(D, "swap")
    ),
    "sigmoid": lambda: flow(coupling(scale_map="sigmoid"), coupling(scale_map="sigmoid_inv")),
    "NICE": lambda: flow(coupling((2, 8, 2), scale=False), coupling(split_mode="channel_inv")),
    "ActNorm": lambda: flow(nf.flows.ActNorm(D), coupling(), nf.flows.AffineConstFlow((D,))),
    "matrices": lambda: flow(
        nf.flows.InvertibleAffine(D), coupling(), nf.flows.InvertibleAffine(D, use_lu=False)
    ),
    "fixed base": lambda: flow(coupling(), base=nf.distributions.DiagGaussian(D, trainable=False)),
    "masks": lambda: flow(
        masked([1.0, 0, 1, 0]),
        nf.flows.ActNorm(D),
        masked([0, 1, 1, 1]),
        masked([1, 0, 0, 0], s=None),
    ),
    "NSF": lambda: nsf(Coupled),
    "NSF with reversed masks": lambda: nsf(Coupled, reverse_mask=True, activation=torch.nn.SiLU),
    "autoregressive NSF": lambda: nsf(Autoregressive),
    "permuted degrees": lambda: nsf(Autoregressive, permute_mask=True, num_bins=5, tail_bound=2),
    "MAF": lambda: flow(
        made(), nf.flows.Permute(D), nf.flows.ActNorm(D), made(activation=torch.tanh)
    ),
    "MAF with matrices": lambda: flow(
        made(), nf.flows.LULinearPermute(D), nf.flows.InvertibleAffine(D), made(num_blocks=1)
    ),
    "MAF turned round": lambda: flow(
        nf.flows.Reverse(made()), nf.flows.LULinearPermute(D), nf.flows.Reverse(made())
    ),
    "LU alone": lambda: flow(nf.flows.LULinearPermute(D)),
    "conditional MAF": lambda: conditional(
        made(context_features=K), nf.flows.LULinearPermute(D), made(context_features=K)
    ),
    "conditional NSF": lambda: conditional(
        Coupled(D, 2, 16, K), nf.flows.LULinearPermute(D), Coupled(D, 1, 16, K)
    ),
    "conditional autoregressive NSF": lambda: conditional(
        Autoregressive(D, 2, 16, K), nf.flows.LULinearPermute(D), Autoregressive(D, 1, 16, K)
    ),
}


def glow(levels=2, steps=2, hidden=8, side=8, **options):
    bases, flows, merges = [], [], []
    for i in range(levels):
        channels = 3 * 2 ** (levels + 1 - i)
        blocks = [nf.flows.GlowBlock(channels, hidden, **options) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if i:
            merges.append(nf.flows.Merge())
        shape = (
            3 * 2 ** (levels - i + (i == 0)),
            side // 2 ** (levels - i),
            side // 2 ** (levels - i),
        )
        bases.append(nf.distributions.GlowBase(shape))
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


IMAGES = {
    "Glow": glow,
    "dense": lambda: glow(use_lu=False),
    "exp": lambda: glow(scale_map="exp", split_mode="channel_inv"),
    "additive": lambda: glow(scale=False, leaky=0.1),
    "ActNorm in the network": lambda: glow(net_actnorm=True),
}


def context_of(model, count=6):
    """Return the context that a model needs, as a list of none or one."""
    if not isinstance(model, nf.ConditionalNormalizingFlow):
        return []
    return [normal(count, K, seed=2).to(next(model.parameters()))]


def log_prob(model, x):
    if isinstance(model, nf.MultiscaleFlow):
        return model.log_prob(x, None)
    return model.log_prob(x, *context_of(model))


def data(model, dtype=torch.float64):
    shape = (6, 3, 8, 8) if isinstance(model, nf.MultiscaleFlow) else (6, D)
    return normal(*shape, dtype=dtype)


def make(name, dtype=torch.float64):
    """Return a model whose parameters are not those it starts with."""
    torch.manual_seed(0)
    model = {**VECTORS, **IMAGES}[name]().to(dtype)
    log_prob(model, data(model, dtype))  # ActNorms start here
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if name in VECTORS else 0.01)
    return model


def pair(name, dtype=torch.float64):
    """Return a model as it is, and an accelerated copy."""
    model = make(name, dtype)
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert report.accelerated
    return model, twin


def derivatives(model, x):
    x = x.detach().clone().requires_grad_()
    found = log_prob(model, x)
    loss = (found * torch.arange(1, 1 + len(x))).sum()
    wanted = [x, *model.parameters()]
    return [found, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


@pytest.fixture(params=[*VECTORS, *IMAGES])
def name(request):
    return request.param


def test_log_densities_and_gradients_are_those_of_the_library(name):
    model, twin = pair(name)
    torch.testing.assert_close(
        derivatives(twin, data(twin)), derivatives(model, data(model)), **CLOSE
    )


def test_samples_are_drawn_alike(name):
    model, twin = pair(name)
    found = []
    for m in (model, twin):
        torch.manual_seed(5)
        found.append(m.sample(6, *context_of(m)))
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", VECTORS)
def test_other_methods_are_those_of_the_library(name):
    model, twin = pair(name)
    x = data(model)
    for method in (
        "forward",
        "inverse",
        "forward_and_log_det",
        "inverse_and_log_det",
        "forward_kld",
    ):
        given = [x, *context_of(model)]
        want = getattr(model, method)(*given)
        # log-dets of a model in float64 come in float32, as from the library
        torch.testing.assert_close(getattr(twin, method)(*given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VECTORS)
def test_a_flow_is_one_op(name, calls):  # noqa: F811
    _, twin = pair(name)
    x = data(twin)
    calls.clear()
    log_prob(twin, x)
    assert len(calls) == 1
    twin.sample(6, *context_of(twin))
    assert len(calls) == 2


def test_training_goes_as_without(name):
    losses = []
    for model in pair(name):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x = data(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -log_prob(model, x).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-8)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["RealNVP", "Glow"])
def test_copies_share_nothing(name, how):
    model, twin = pair(name)
    x = data(model)
    other = how(twin)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.testing.assert_close(log_prob(twin, x), log_prob(model, x), **CLOSE)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(log_prob(other, x), log_prob(model, x), **CLOSE)


@pytest.mark.parametrize("name", ["RealNVP", "Glow"])
def test_keys_stay_and_new_values_count(name):
    model, twin = pair(name)
    x = data(model)
    assert model.state_dict().keys() == twin.state_dict().keys()
    other = make(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    log_prob(twin, x)
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(log_prob(twin, x), log_prob(other, x), **CLOSE)
    for p, q in zip(twin.parameters(), other.parameters(), strict=True):
        p.data.fill_(0.1)
        q.data.fill_(0.1)
    torch.testing.assert_close(log_prob(twin, x), log_prob(other, x), **CLOSE)


@pytest.mark.parametrize("name", ["RealNVP", "ActNorm", "MAF", "Glow"])
def test_an_accelerated_model_starts_itself_as_the_library_does(name):
    torch.manual_seed(0)
    model = {**VECTORS, **IMAGES}[name]().double()
    twin = copy.deepcopy(model)
    pyflowkern.accelerate(twin)
    for _ in range(2):
        torch.testing.assert_close(
            log_prob(twin, data(twin)), log_prob(model, data(model)), **CLOSE
        )
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["RealNVP", "Glow"])
def test_hooks_and_methods_of_instances_are_called(name):
    _, twin = pair(name)
    x = data(twin)
    seen = []
    net = next(m for m in twin.modules() if isinstance(m, (nf.nets.MLP, nf.nets.ConvNet2d)))
    handle = net.net[0].register_forward_hook(lambda *_: seen.append(1))
    log_prob(twin, x)
    assert seen
    handle.remove()
    net.net[0].forward = lambda h: seen.append(2) or type(net.net[0]).forward(net.net[0], h)
    log_prob(twin, x)
    assert seen[-1] == 2


@pytest.mark.parametrize("name", ["RealNVP", "Glow"])
def test_restore_gives_the_methods_back(name):
    _, twin = pair(name)
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for m in twin.modules() for v in m.__dict__.values())


def test_subclasses_are_left_alone():
    class Mine(nf.flows.AffineCouplingBlock):
        def inverse(self, z):
            z, log_det = super().inverse(z)
            return 2 * z, log_det

    model = flow(Mine(nf.nets.MLP([2, 8, 4])), coupling()).double()
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert [e.name for e in report.left] == ["flows.0"]
    torch.testing.assert_close(twin.log_prob(data(twin)), model.log_prob(data(model)), **CLOSE)


def test_networks_that_are_not_known_are_called():
    class Net(torch.nn.Sequential):
        pass

    net = Net(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    model = flow(nf.flows.AffineCouplingBlock(net)).double()
    twin = copy.deepcopy(model)
    (entry,) = [e for e in pyflowkern.accelerate(twin).entries if e.name == "flows.0"]
    assert entry.runs == "own op"
    torch.testing.assert_close(
        derivatives(twin, data(twin)), derivatives(model, data(model)), **CLOSE
    )
