"""What an accelerated model of zuko keeps, and what is left alone."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zuko
from laws.chains import calls  # noqa: F401
from laws.zuko_models import CLOSE, ONE_OP, D, K, context, data, make
from torch._subclasses.fake_tensor import FakeTensorMode
from zuko.flows import CNF, GF, MAF, NAF, NICE, NSF, SOSPF, Flow, MaskedAutoregressiveTransform

import pyflowkern
from pyflowkern.nn.links import Door

N = 7
NAMES = ["MAF", "NICE", "mixed", "NCSF", "one feature"]


def agree(flow, twin, size=K):
    x, c = data(flow, N), context(size, N)
    with torch.no_grad():
        torch.testing.assert_close(twin(c).log_prob(x), flow(c).log_prob(x), **CLOSE)


def zeroed(flow):
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(0.01)


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_accelerated_and_share_nothing(name, how, calls):  # noqa: F811
    flow, twin = make(name, K)
    agree(flow, twin)
    other = how(twin)
    zeroed(other)
    agree(flow, twin)
    zeroed(flow)
    calls.clear()
    agree(flow, other)
    assert len(calls) == (name in ONE_OP)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_can_be_copied(name):
    flow, twin = make(name, K)
    x, c = data(flow, N), context(K, N)
    with torch.no_grad():
        want, made = flow(c).log_prob(x), twin(c)
        for each in (copy.copy(made), pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            torch.testing.assert_close(each.log_prob(x), want, **CLOSE)
        z, part = made.transform(x), twin.transform(c)
        for each in (part, part.inv.inv, pickle.loads(pickle.dumps(part))):
            torch.testing.assert_close(each(x), z, **CLOSE)
        # torch itself takes what an inverse is the inverse of for a cache
        inverse = pickle.loads(pickle.dumps(twin.transform.transforms[1](c).inv))
        torch.testing.assert_close(inverse(x), flow.transform.transforms[1](c).inv(x), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_keys_stay_and_new_values_count(name):
    flow, twin = make(name, K)
    assert flow.state_dict().keys() == twin.state_dict().keys()
    assert [*map(type, flow.modules())] == [*map(type, twin.modules())]
    agree(flow, twin)
    zeroed(flow)
    twin.load_state_dict(flow.state_dict())
    agree(flow, twin)
    for each in (flow, twin):
        for p in each.parameters():
            p.data.fill_(0.1)
    agree(flow, twin)
    twin.float()
    twin(context(K, N, dtype=torch.float32)).log_prob(data(flow, N, dtype=torch.float32))
    agree(flow.float().double(), twin.double())


def test_masks_and_orders_that_are_loaded_count():
    """Steps follow from masks; those of another order must not run as the old ones."""
    for build in (lambda: MAF(D, randperm=True), lambda: NICE(D, randmask=True)):
        torch.manual_seed(0)
        twin = build().double()
        pyflowkern.accelerate(twin)
        agree(copy.deepcopy(pyflowkern.restore(twin) or twin), twin, 0)
        pyflowkern.accelerate(twin)
        agree(twin, twin, 0)
        other = build().double()
        while any(
            a.shape != b.shape
            for a, b in zip(other.state_dict().values(), twin.state_dict().values(), strict=True)
        ):
            other = build().double()
        twin.load_state_dict(other.state_dict())
        agree(other, twin, 0)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_as_without(name):
    losses = []
    for flow in make(name, K):
        optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
        average = torch.optim.swa_utils.AveragedModel(flow)
        for step in range(4):
            optimizer.zero_grad()
            loss = -flow(context(K, N)).log_prob(data(flow, N)).mean()
            loss.backward()
            optimizer.step()
            average.update_parameters(flow)
            losses += [loss.item()]
            if step == 1:
                flow.load_state_dict(
                    {
                        k: 0.9 * v if v.is_floating_point() else v
                        for k, v in flow.state_dict().items()
                    }
                )
        with torch.no_grad():
            losses.append(average(context(K, N)).log_prob(data(flow, N)).mean().item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_modes_of_torch(name):
    flow, twin = make(name, K)
    x, c = data(flow, N), context(K, N)
    with torch.inference_mode():
        torch.testing.assert_close(twin(c).log_prob(x), flow(c).log_prob(x), **CLOSE)
    got = torch.func.vmap(lambda x, c: twin(c).log_prob(x))(x, c)
    torch.testing.assert_close(got, flow(c).log_prob(x), **CLOSE)
    jacobians = [
        torch.autograd.functional.jacobian(each(c[0]).transform, x[0]) for each in (flow, twin)
    ]
    torch.testing.assert_close(*jacobians, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(twin(c).log_prob(x), flow(c).log_prob(x))
    twin.eval()
    agree(flow, twin)
    if name == "NICE":  # whose masks zuko looks at in each call
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert twin(c).log_prob(mode.from_tensor(x)).shape == (N,)
        assert twin.to("meta")(c.to("meta")).log_prob(x.to("meta")).shape == (N,)


def test_compiled_models_are_those_of_the_library():
    flow, twin = make("MAF", K)
    x, c = data(flow, N), context(K, N)
    run = torch.compile(lambda x, c: twin(c).log_prob(x), backend="eager")
    torch.testing.assert_close(run(x, c), flow(c).log_prob(x), **CLOSE)
    made = twin(c)
    torch.testing.assert_close(
        torch.compile(lambda x: made.log_prob(x), backend="eager")(x), flow(c).log_prob(x), **CLOSE
    )


def test_threads_do_not_disturb_each_other():
    flow, twin = make("NSF", K)
    x, c = data(flow, N), context(K, N)
    with torch.no_grad():
        want = flow(c).log_prob(x)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: twin(c).log_prob(x).detach(), range(32)):
                torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize(
    "part", ["", "transform", "transform.transforms.0", "transform.transforms.0.hyper", "base"]
)
def test_hooks_are_called(part):
    flow, twin = make("MAF", K)
    seen = []
    agree(flow, twin)
    handle = twin.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    agree(flow, twin)
    assert seen
    handle.remove()
    seen.clear()
    agree(flow, twin)
    assert not seen


def test_methods_of_instances_are_called(calls):  # noqa: F811
    flow, twin = make("MAF", K)
    layer = twin.transform.transforms[0].hyper[0]
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    with torch.no_grad():
        for p in (
            flow.transform.transforms[0].hyper[0].weight,
            flow.transform.transforms[0].hyper[0].bias,
        ):
            p.mul_(2)
    agree(flow, twin)
    del layer.forward
    zeroed(flow), zeroed(twin)
    calls.clear()
    agree(flow, twin)
    assert len(calls) == 1


def test_gradients_are_recorded_where_the_library_records_them():
    """Transforms of single elements read their parameters when they are made, others when they are used."""
    for name, recorded in (("MAF", True), ("one feature", False)):
        for each in make(name, K):
            with torch.no_grad():
                made = each(context(K, N))
            assert made.log_prob(data(each, N)).requires_grad == recorded


def test_restore_gives_the_methods_back():
    flow, twin = make("mixed", K)
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for m in twin.modules() for v in m.__dict__.values())
    assert type(twin(context(K, N))) is zuko.distributions.NormalizingFlow
    agree(flow, twin)


def test_models_of_the_whole_process(calls):  # noqa: F811
    flow, _ = make("MAF", K)
    twin = copy.deepcopy(flow)
    with pyflowkern.accelerate():
        agree(twin, twin)
        assert calls
    calls.clear()
    agree(flow, twin)
    assert not calls


def test_wrong_input_raises_what_zuko_raises():
    flow, twin = make("MAF", K)
    x, c = data(flow, N), context(K, N)
    for given, at in ((c[:, 1:], x), (c, x[:, 1:]), (None, x), (c[:3], x)):
        errors = []
        for each in (flow, twin):
            with pytest.raises(RuntimeError) as error:
                each(given).log_prob(at)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    # zuko joins both, and computes in the larger dtype
    torch.testing.assert_close(twin(c.float()).log_prob(x), flow(c.float()).log_prob(x), **CLOSE)


# --- what is left alone --------------------------------------------------------------------------


class Doubled(MaskedAutoregressiveTransform):
    def meta(self, c, x):
        return super().meta(c, 2 * x)


def test_subclasses_and_methods_of_instances_are_left_alone():
    torch.manual_seed(0)
    flow = Flow([Doubled(D, K), MaskedAutoregressiveTransform(D, K)], MAF(D).base).double()
    twin = copy.deepcopy(flow)
    report = pyflowkern.accelerate(twin)
    assert [(e.name, e.kind) for e in report.left] == [
        ("transform.transforms.0", f"{__name__}.Doubled")
    ]
    agree(flow, twin)
    flow = MaskedAutoregressiveTransform(D, K).double()
    flow.meta = functools.partial(Doubled.meta, flow)
    assert not pyflowkern.accelerate(flow).accelerated


class Affine(zuko.transforms.MonotonicAffineTransform):
    pass


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: NAF(3, K), "no op knows its univariate transform, MNN"),
        (lambda: SOSPF(3, K), "no op knows its univariate transform, ShiftedSOSPTransform"),
        (lambda: GF(3, K), "no op knows its univariate transform, GaussianizationTransform"),
        (lambda: MAF(3, K, univariate=Affine), "no op knows its univariate transform, Affine"),
        (
            lambda: MAF(3, K, residual=True, hidden_features=(8, 9)),
            "its form or a part of it is not known",
        ),
        (
            lambda: NICE(3, K, activation=torch.nn.Softsign),
            "its form or a part of it is not known",
        ),
    ],
)
def test_other_transforms_are_left_alone_and_said_so(build, why):
    torch.manual_seed(0)
    flow = build().double()
    twin = copy.deepcopy(flow)
    report = pyflowkern.accelerate(twin)
    clips = "no op knows its transform, SoftclipTransform"
    assert {e.note for e in report.left} - {clips} == {why}
    assert not report.accelerated
    agree(flow, twin)
    with pytest.raises(ValueError, match=why):
        pyflowkern.accelerate(twin, strict=True)


def test_masks_without_an_order_are_left_alone():
    """A graph in which features see others, none of which see each other, is no chain of more and more."""
    adjacency = torch.eye(4, dtype=torch.bool)
    adjacency[2, 0] = adjacency[3, 1] = True
    flow = Flow(MaskedAutoregressiveTransform(4, adjacency=adjacency), MAF(4).base).double()
    twin = copy.deepcopy(flow)
    assert not pyflowkern.accelerate(twin).accelerated
    agree(flow, twin, 0)
    adjacency = torch.ones(4, 4, dtype=torch.bool).tril()
    flow = Flow(MaskedAutoregressiveTransform(4, adjacency=adjacency), MAF(4).base).double()
    assert pyflowkern.accelerate(flow).accelerated


def test_too_few_passes_are_no_inverse():
    flow = MaskedAutoregressiveTransform(D).double()
    flow.passes = 2
    assert not pyflowkern.accelerate(flow).accelerated
    flow.passes = D
    twin = copy.deepcopy(flow)
    assert pyflowkern.accelerate(twin).accelerated
    z = data(MAF(D), N)
    torch.testing.assert_close(twin().inv(z), flow().inv(z), **CLOSE)
    flow.passes = twin.passes = 1
    torch.testing.assert_close(twin().inv(z), flow().inv(z), **CLOSE)


def test_unknown_transforms_between_known_ones_run_as_they_are():
    torch.manual_seed(0)
    flow = NSF(D, K, transforms=2)
    flow.transform.transforms.insert(
        1, zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform, bound=11.0)
    )
    flow = flow.double()
    twin = copy.deepcopy(flow)
    report = pyflowkern.accelerate(twin)
    assert [e.name for e in report.accelerated] == [f"transform.transforms.{i}" for i in (0, 2)]
    agree(flow, twin)


# --- continuous flows ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, K], ids=["", "given"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": False},
        {"activation": torch.nn.GELU},
        {"activation": torch.nn.Tanh, "hidden_features": (9,)},
        {"activation": torch.nn.SiLU, "hidden_features": (9, 8, 7), "freqs": 2},
        {"hidden_features": (), "exact": False},
        {"hidden_features": (9, 8, 7), "exact": False},
    ],
    ids=str,
)
def test_continuous_flows(options, size):
    torch.manual_seed(0)
    flow = CNF(3, size, **options).double()
    twin = copy.deepcopy(flow)
    (entry,) = pyflowkern.accelerate(twin).entries
    assert (entry.name, entry.runs) == ("transform", "own op")
    found = []
    for each in (flow, twin):
        for training in (True, False):
            each.train(training)
            x, c = data(flow, N).requires_grad_(), context(size, N)
            torch.manual_seed(1)
            made = each(c)
            log_prob = made.log_prob(x)
            drawn = made.rsample_and_log_prob((2,))
            leaves = [*each.parameters()] if training else []
            grads = torch.autograd.grad(log_prob.sum() + drawn[0].sum(), [x, *leaves])
            found.append([log_prob, *drawn, made.transform(x), *grads])
    torch.testing.assert_close(found[2:], found[:2], **CLOSE)


def test_continuous_flows_keep_what_they_are():
    torch.manual_seed(0)
    flow = CNF(3, K, hidden_features=(9, 8)).double()
    twin = copy.deepcopy(flow)
    pyflowkern.accelerate(twin)
    agree(flow, twin)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        zeroed(other)
        agree(flow, twin)
    assert isinstance(twin(context(K, N)).transform.inv, zuko.transforms.FreeFormJacobianTransform)
    seen = []
    twin.transform.ode[1].register_forward_hook(lambda *_: seen.append(1))
    agree(flow, twin)
    assert seen
    flow = CNF(3, activation=torch.nn.Mish)
    assert [e.note for e in pyflowkern.accelerate(flow).left] == [
        "its network is no MLP with an activation whose slope is known"
    ]
