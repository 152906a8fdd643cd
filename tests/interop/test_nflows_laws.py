"""What accelerated models of nflows keep: copies, hooks, modes, dtypes, threads, compilers."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interop.test_nflows import CLOSE, context_of, data, make, pair
from laws.chains import calls  # noqa: F401
from laws.nflows_models import VECTORS
from nflows import transforms

import pyflowkern
from pyflowkern.nn.links import Door

NAMES = ["NSF of sbi", "MAF of sbi", "RealNVP of nessai"]


def log_prob(name, model):
    for part in model.modules():
        if hasattr(part, "cache"):  # the library keeps matrices that are no more
            part.cache.invalidate()
    return model.log_prob(data(name), context_of(model))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing(name, how):
    model, twin = pair(name)
    log_prob(name, twin)
    other = how(twin)
    assert isinstance(other.__dict__["_log_prob"], Door)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.testing.assert_close(log_prob(name, twin), log_prob(name, model), **CLOSE)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(log_prob(name, other), log_prob(name, model), **CLOSE)


def test_keys_stay_and_new_values_count(name):
    model, twin = pair(name)
    assert model.state_dict().keys() == twin.state_dict().keys()
    log_prob(name, twin)
    other = make(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(log_prob(name, twin), log_prob(name, other), **CLOSE)
    for m in (twin, other):
        for part in m._transform.modules():
            for p in part._parameters.values():
                p.data.fill_(0.1)
    torch.testing.assert_close(log_prob(name, twin), log_prob(name, other), **CLOSE)


def test_averages_of_weights_are_accelerated_too(name, calls):  # noqa: F811
    model, twin = pair(name)
    averaged = [torch.optim.swa_utils.AveragedModel(m) for m in (model, twin)]
    for m, average in zip((model, twin), averaged, strict=True):
        with torch.no_grad():
            for p in m.parameters():
                p.add_(0.1)
        average.update_parameters(m)
    calls.clear()
    want, got = (log_prob(name, average.module) for average in averaged)
    torch.testing.assert_close(got, want, **CLOSE)
    assert len(calls) == 1


def test_hooks_and_methods_of_instances_are_called(name):
    model, twin = pair(name)
    seen = []
    linear = next(m for m in twin.modules() if type(m).__name__ in ("Linear", "MaskedLinear"))
    parts = [twin._transform, twin._transform._transforms[1], linear]
    for part in parts:
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(log_prob(name, twin), log_prob(name, model), **CLOSE)
        assert len(seen) == 1
        handle.remove()
        log_prob(name, twin)
        assert len(seen) == 1
        seen.clear()
    linear.forward = lambda h: seen.append(2) or type(linear).forward(linear, h)
    log_prob(name, twin)
    assert seen


def test_an_accelerated_model_serves_every_mode(name):
    model, twin = pair(name)
    want = log_prob(name, model)
    for guard in (torch.inference_mode, torch.no_grad):
        with guard():
            torch.testing.assert_close(log_prob(name, twin), want, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (log_prob(name, m) for m in (twin, model))
    torch.testing.assert_close(got, want)
    single = make(name).float(), twin.float()
    x, context = data(name), context_of(model)
    given = x.float(), None if context is None else context.float()
    torch.testing.assert_close(
        single[1].log_prob(*given), single[0].log_prob(*given), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        log_prob(name, twin.double()), log_prob(name, single[0].double()), **CLOSE
    )


def test_compilers_see_the_library():
    model, twin = pair("MAF of sbi")
    log_prob("MAF of sbi", twin)
    x, context = data("MAF of sbi"), context_of(model)
    compiled = torch.compile(twin._transform, backend="eager")
    torch.testing.assert_close(compiled(x, context), model._transform(x, context), **CLOSE)


def test_threads_share_a_model(name):
    model, twin = pair(name)
    want = log_prob(name, model)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: log_prob(name, twin), range(20)):
            torch.testing.assert_close(got, want, **CLOSE)


def test_restore_gives_the_methods_back(name):
    _, twin = pair(name)
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for m in twin.modules() for v in m.__dict__.values())


def test_models_of_the_process_are_accelerated_at_their_first_call(name, calls):  # noqa: F811
    with pyflowkern.accelerate():
        model = make(name)
        calls.clear()
        got = log_prob(name, model)
        assert len(calls) == 1
    torch.testing.assert_close(got, log_prob(name, make(name)), **CLOSE)


def test_parts_that_are_put_in_later_count():
    model, twin = pair("NSF")
    x = data("NSF")
    torch.manual_seed(2)
    other = VECTORS["NSF"]().double()
    twin.log_prob(x)
    for m in (model, twin):
        net = copy.deepcopy(other._transform._transforms[0].transform_net)
        m._transform._transforms[0].transform_net = net
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)
    for m in (model, twin):
        m._transform._transforms[2] = copy.deepcopy(other._transform._transforms[2])
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)
    for m in (model, twin):
        m._transform._transforms[0].tail_bound = 1.0
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)


def test_log_determinants_add_up_in_the_dtype_of_the_input():
    shift, scale = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 2.0))
    model = transforms.CompositeTransform(
        [transforms.PointwiseAffineTransform(shift, scale), transforms.LULinear(4)]
    )
    x = torch.randn(5, 4)
    want = [*model(x), *model.inverse(x)]
    pyflowkern.accelerate(model)
    got = [*model(x), *model.inverse(x)]
    assert [t.dtype for t in got] == [t.dtype for t in want] == [torch.float32] * 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
