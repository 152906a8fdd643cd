"""Models that packages build over nflows and zuko, by glasflow, nessai and sbi: what they give and what they keep."""

import copy
import importlib.util
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from laws.draws import normal

import pyflowkern
from pyflowkern.nn.links import Door

D, K, N = 4, 3, 9
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def of_glasflow(kind, **options):
    from glasflow import flows

    return getattr(flows, kind)(D, 2, n_neurons=8, **options)


def of_glasflow_masked(kind):
    from glasflow.flows import autoregressive

    options = {} if kind == "Affine" else {"num_bins": 4, "tails": "linear", "tail_bound": 5.0}
    name = f"Masked{kind}AutoregressiveFlow"
    return getattr(autoregressive, name)(D, 2, n_neurons=8, **options)


def of_nessai(kind):
    from nessai.flows import utils

    sizes = {"n_inputs": D, "n_neurons": 8, "n_blocks": 2, "n_layers": 2}
    return utils.configure_model({"ftype": kind, **sizes})


def of_sbi(kind):
    from sbi.neural_nets.net_builders import flow

    theta, x = 2 * normal(50, D).float() + 1, 5 * normal(50, K, seed=1).float()
    sizes = {"hidden_features": 8, "num_transforms": 2}
    return getattr(flow, f"build_{kind}")(theta, x, **sizes)


MODELS = {
    "glasflow RealNVP": lambda: of_glasflow("RealNVP", linear_transform="lu"),
    "glasflow NSF": lambda: of_glasflow("CouplingNSF", linear_transform="svd"),
    "glasflow MAF": lambda: of_glasflow_masked("Affine"),
    "glasflow NSF (AR)": lambda: of_glasflow_masked("PiecewiseRationalQuadratic"),
    "nessai RealNVP": lambda: of_nessai("realnvp"),
    "nessai NSF": lambda: of_nessai("nsf"),
    "sbi maf": lambda: of_sbi("maf"),
    "sbi nsf": lambda: of_sbi("nsf"),
    "sbi maf_rqs": lambda: of_sbi("maf_rqs"),
    "sbi zuko_maf": lambda: of_sbi("zuko_maf"),
    "sbi zuko_nsf": lambda: of_sbi("zuko_nsf"),
}


@pytest.fixture(params=MODELS)
def name(request):
    package = request.param.split()[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not here")
    return request.param


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    log_prob(name, model)  # batch norm of variance 0 would leave no digits
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def pair(name, training=False):
    """Return a model as it is, and accelerated, with weights as after some training."""
    model = made(name).train(training)
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert report.accelerated
    assert not report.left
    return model, twin


def log_prob(name, model, dtype=torch.float64):
    for part in model.modules():
        if hasattr(part, "cache"):  # the library keeps matrices that are no more
            part.cache.invalidate()
    x, c = normal(N, D).to(dtype), normal(N, K, seed=1).to(dtype)
    return -model.loss(x, c) if name.startswith("sbi") else model.log_prob(x)


def gradients(name, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(log_prob(name, model).sum(), parameters, allow_unused=True)


def test_densities_and_gradients_are_those_of_the_library(name):
    model, twin = pair(name)
    torch.testing.assert_close(log_prob(name, twin), log_prob(name, model), **CLOSE)
    for got, want in zip(gradients(name, twin), gradients(name, model), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing(name, how):
    model, twin = pair(name)
    log_prob(name, twin)
    try:
        how(model)
    except (pickle.PicklingError, AttributeError):  # with functions that have no name
        with pytest.raises((pickle.PicklingError, AttributeError)):
            how(twin)
        return
    other = how(twin)
    assert any(isinstance(v, Door) for m in other.modules() for v in m.__dict__.values())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(log_prob(name, twin), log_prob(name, model), **CLOSE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(log_prob(name, other), log_prob(name, model), **CLOSE)


def test_training_goes_on_from_a_state_that_is_loaded(name):
    """As sbi does, which goes back to the best weights at the end."""
    losses = []
    for model in pair(name, training=True):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses.append([])
        state = copy.deepcopy(model.state_dict())
        for step in range(6):
            if step == 3:
                model.load_state_dict(state)
            optimizer.zero_grad()
            loss = -log_prob(name, model).mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    # gradients that differ by rounding, six steps later
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=1e-7)


def test_modes_and_dtypes(name):
    model, twin = pair(name)
    want = log_prob(name, model)
    for guard in (torch.inference_mode, torch.no_grad):
        with guard():
            torch.testing.assert_close(log_prob(name, twin), want, **CLOSE)
    single = [log_prob(name, m.float(), torch.float32) for m in (twin, model)]
    torch.testing.assert_close(*single, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        log_prob(name, twin.double()), log_prob(name, model.double()), **CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glasflow RealNVP", "nessai RealNVP", "sbi maf"], indirect=True)
def test_a_compiled_model_gives_the_same(name):
    model, twin = pair(name)
    want = log_prob(name, model)
    compiled = torch.compile(log_prob, backend="eager")
    torch.testing.assert_close(compiled(name, twin), want, **CLOSE)


def test_threads_share_a_model(name):
    model, twin = pair(name)
    want, x, c = log_prob(name, model), normal(N, D), normal(N, K, seed=1)

    @torch.no_grad()
    def run(_):
        return -twin.loss(x, c) if name.startswith("sbi") else twin.log_prob(x)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, range(20)):
            torch.testing.assert_close(got, want, **CLOSE)


def test_restore_gives_the_methods_back(name):
    _, twin = pair(name)
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for m in twin.modules() for v in m.__dict__.values())


def test_the_one_line_for_the_process(name):
    want = log_prob(name, pair(name)[0])
    with pyflowkern.accelerate():
        model = made(name).eval()
        got = log_prob(name, model)
        assert any(isinstance(v, Door) for m in model.modules() for v in m.__dict__.values())
    torch.testing.assert_close(got, want, **CLOSE)
    assert not any(isinstance(v, Door) for m in model.modules() for v in m.__dict__.values())
