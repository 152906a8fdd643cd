"""Accelerated models of normflows keep what models keep: copies, files, hooks, modes, errors."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import normflows as nf
import pytest
import torch
from laws.normflows_models import (
    CLOSE,
    IMAGES,
    VECTORS,
    Autoregressive,
    Coupled,
    D,
    coupling,
    data,
    derivatives,
    flow,
    log_prob,
    make,
    nsf,
    pair,
)

import pyflowkern
from pyflowkern.nn.links import Door


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


@pytest.mark.parametrize("name", ["RealNVP", "conditional NSF", "MAF", "Glow"])
def test_modes_give_what_the_library_gives(name):
    model, twin = pair(name)
    x = data(model)
    want = log_prob(model, x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(log_prob(twin, x), want, **CLOSE)
    torch.testing.assert_close(log_prob(twin.float().double(), x), want, rtol=1e-4, atol=1e-4)
    model, twin, x = model.float(), twin.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(log_prob(twin, x), log_prob(model, x))
    torch.testing.assert_close(log_prob(twin, x), want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["RealNVP"])
def test_compilers_see_the_library(name):
    model, twin = pair(name)
    x = data(model)
    compiled = torch.compile(twin.log_prob, backend="eager")
    torch.testing.assert_close(compiled(x), model.log_prob(x), **CLOSE)


@pytest.mark.parametrize("name", ["RealNVP", "autoregressive NSF", "Glow"])
def test_averaged_copies_follow_their_own_parameters(name):
    model, twin = pair(name)
    x = data(model)
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (model, twin)]
    for m, average in zip((model, twin), averages, strict=True):
        average.update_parameters(m)
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(0.9)
        average.update_parameters(m)
    found = [log_prob(average.module, x) for average in averages]
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", ["RealNVP", "MAF", "Glow"])
def test_threads_do_not_disturb_each_other(name):
    model, twin = pair(name)
    batches = [data(model) * scale for scale in (0.5, 1.0, 1.5, 2.0)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: log_prob(twin, x), batches * 4))
        want = [log_prob(model, x) for x in batches] * 4
    torch.testing.assert_close(found, want, **CLOSE)


@pytest.mark.parametrize("layer", [Coupled, Autoregressive])
def test_active_dropout_is_the_librarys(layer):
    torch.manual_seed(0)
    model = nsf(layer, dropout_probability=0.5).double()
    twin = copy.deepcopy(model)
    pyflowkern.accelerate(twin)
    for train in (True, False, True):
        found = []
        for m in (model, twin):
            m.train(train)
            torch.manual_seed(4)
            found.append(derivatives(m, data(m)))
        torch.testing.assert_close(*found, **CLOSE)


def test_loaded_masks_and_permutations_count():
    def of(seed):
        torch.manual_seed(seed)
        permuted = Autoregressive(D, 1, 16, permute_mask=True)
        return flow(permuted, nf.flows.Permute(D), nf.flows.LULinearPermute(D)).double()

    model, twin = of(0), of(1)
    pyflowkern.accelerate(twin)
    twin.log_prob(data(twin))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        derivatives(twin, data(twin)), derivatives(model, data(model)), **CLOSE
    )


def test_what_is_not_known_is_said():
    circular = nf.flows.CircularAutoregressiveRationalQuadraticSpline(2, 1, 8, [1], tail_bound=3.0)
    checkered = coupling(split_mode="checkerboard")
    report = pyflowkern.accelerate(flow(coupling(), checkered, circular, nf.flows.Planar((D,))))
    assert {"flows.1", "flows.3"} == {e.name for e in report.left}
    assert "only couplings of channels" in report.left[0].note
    assert {"", "flows.0"} <= {e.name for e in report.accelerated}


def test_reverse_kl_and_shuffled_models_are_those_of_the_library():
    model, twin = pair("RealNVP")
    found = []
    for m in (model, twin):
        m.p = nf.distributions.DiagGaussian(D).double()
        torch.manual_seed(2)
        losses = [m.reverse_kld(5), m.reverse_kld(5, beta=0.5), m.reverse_kld(5, score_fn=False)]
        found.append(losses)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    for m in (model, twin):  # parts in another order
        m.flows = torch.nn.ModuleList([*m.flows][::-1])
    torch.testing.assert_close(log_prob(twin, data(twin)), log_prob(model, data(model)), **CLOSE)


def test_calls_that_the_library_refuses_are_refused_alike():
    model, twin = pair("RealNVP")
    for wrong in (torch.randn(5, D), torch.randn(5, D + 1).double(), [1.0]):
        seen = []
        for m in (model, twin):
            with pytest.raises(Exception) as error:  # noqa: PT011
                m.log_prob(wrong)
            seen.append((error.type, str(error.value)))
        assert seen[0] == seen[1]
