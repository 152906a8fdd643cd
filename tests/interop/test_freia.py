"""Networks of FrEIA: what runs in the place of their transforms gives what the library gives."""

import copy
import importlib.util
import pickle
import sys
import threading
import types
import warnings

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from laws.chains import calls  # noqa: F401
from laws.draws import normal
from laws.freia_models import (
    GLOW,
    MODELS,
    ONE,
    WITH,
    D,
    Elementwise,
    Linear,
    N,
    blocks,
    fc,
    graph,
    sequence,
)
from torch.utils._python_dispatch import TorchDispatchMode

import pyflowkern
from pyflowkern.nn.links import Door

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
#: Those that can be pickled: functions within functions cannot.
PICKLED = ["GLOW given"]


def data(model, dtype=torch.float64):
    return normal(N, *model.dims_in[0], dtype=dtype)


def conditions(model, dtype=torch.float64):
    sizes = [shape[0] for shape in model.dims_c] if isinstance(model, ff.GraphINN) else [3, 2]
    return [normal(N, size, dtype=dtype, seed=i + 1) for i, size in enumerate(sizes)]


def make(name, dtype=torch.float64):
    """Return a model whose parameters are not those it starts with."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        run(model, data(model, torch.float32))  # ActNorms start here
        for p in model.parameters():
            if p.is_floating_point() and p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.to(dtype)


def pair(name, dtype=torch.float64):
    """Return a model as it is, and an accelerated copy."""
    model = make(name, dtype)
    twin = copy.deepcopy(model)
    assert pyflowkern.accelerate(twin).accelerated
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    return model, twin


def run(model, x=None, rev=False, **options):
    if x is None:
        x = data(model)
    z, log_det = model(x, c=conditions(model, x.dtype), rev=rev, **options)
    return z, log_det


def inputs(model, rev):
    with torch.no_grad():
        return run(model)[0] if rev else data(model)


def derivatives(model, x, rev):
    """Return both results, and the gradients of the input, all conditions and all parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *conditions(model))]
    z, log_det = model(leaves[0], c=leaves[1:], rev=rev)
    loss = (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)).sum()
    if isinstance(log_det, torch.Tensor):
        loss = loss + (log_det * torch.arange(1, 1 + N)).sum()
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    return [
        z,
        log_det,
        *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True),
    ]


@pytest.fixture(params=[n for n in MODELS if n != "branches"])
def name(request):
    return request.param


@pytest.mark.parametrize("rev", [False, True])
def test_results_and_gradients_are_those_of_the_library(name, rev):
    model, twin = pair(name)
    x = inputs(model, rev)
    got, want = (derivatives(m, x, rev) for m in (twin, model))
    assert type(got[1]) is type(want[1])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("rev", [False, True])
def test_float32_is_as_near_as_the_library(name, rev):
    model, twin = pair(name, torch.float32)
    x = inputs(make(name), rev).float()
    exact = run(make(name), x.double(), rev)[0]
    theirs = (run(model, x, rev)[0] - exact).abs().max()
    assert (run(twin, x, rev)[0] - exact).abs().max() <= 4 * theirs + 1e-5


@pytest.mark.parametrize("name", ONE)
def test_a_network_is_one_op(name, calls):  # noqa: F811
    _, twin = pair(name)
    for rev in (False, True):
        calls.clear()
        run(twin, rev=rev)
        assert len(calls) == 1


def test_runs_between_other_transforms_are_one_op_each(calls):  # noqa: F811
    _, twin = pair("two conditions")
    calls.clear()
    run(twin)
    assert len(calls) == 2


@pytest.mark.parametrize("rev", [False, True])
def test_graphs_that_branch_run_their_nodes_by_ops(rev):
    model, twin = pair("branches")
    x = inputs(model, False) if not rev else run(model)[0]
    got, want = (m(x, c=conditions(model), rev=rev) for m in (twin, model))
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("name", ONE)
def test_single_transforms_return_what_the_library_returns(name):
    model, twin = pair(name)
    for one, other in zip(model.module_list, twin.module_list, strict=True):
        given = {"c": [normal(N, *s, dtype=torch.float64) for s in one.dims_c]}
        given = given if one.dims_c else {}
        for rev in (False, True):
            x = (normal(N, D, dtype=torch.float64),)
            want, got = one(x, rev=rev, **given), other(x, rev=rev, **given)
            assert type(got[1]) is type(want[1])
            torch.testing.assert_close(got[0][0], want[0][0], **CLOSE)
            torch.testing.assert_close(got[1], want[1], **CLOSE)


@pytest.mark.parametrize("name", ["GLOW", "NICE", "graph", "graph given"])
def test_without_log_determinants(name):
    model, twin = pair(name)
    got, want = run(twin, jac=False), run(model, jac=False)
    assert type(got[1]) is type(want[1])
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("size", [D - 1, D + 1])
def test_wrong_input_raises_as_before(size):
    _, twin = pair("AllInOne given")
    x = normal(N, size)
    with pytest.raises(RuntimeError):
        twin(x, c=conditions(twin))
    with pytest.raises(RuntimeError):
        twin(data(twin), c=[normal(N, 4)])
    _, twin = pair("graph")
    with pytest.raises(RuntimeError, match="encountered an error"):
        twin(x)
    with pytest.raises(ValueError, match="conditions"):
        twin(data(twin), c=[data(twin)])


def test_training_goes_as_without(name):
    losses = []
    for model in pair(name):
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learned, 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            z, log_det = run(model)
            loss = (0.5 * z.square().flatten(1).sum(1) - log_det).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-8)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[(n, copy.deepcopy) for n in ("GLOW", "AllInOne given", "graph given", "GLOW images")],
        *[(n, lambda m: pickle.loads(pickle.dumps(m))) for n in PICKLED],
    ],
)
def test_copies_share_nothing(name, how):
    model, twin = pair(name)
    other = how(twin)
    for changed, same in ((other, twin), (model, other)):
        want = run(same)
        with torch.no_grad():
            for p in changed.parameters():
                if p.requires_grad:
                    p.zero_()
        if same is twin:
            torch.testing.assert_close(run(twin), want, **CLOSE)
    torch.testing.assert_close(run(other), run(model), **CLOSE)


@pytest.mark.parametrize(
    "name", ["GLOW", "AllInOne given", "others", "graph given", "GLOW images"]
)
def test_keys_stay_and_new_values_count(name):
    model, twin = pair(name)
    assert model.state_dict().keys() == twin.state_dict().keys()
    torch.manual_seed(9)
    other = MODELS[name]().double()  # other permutations, too
    run(twin)
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(twin), run(other), **CLOSE)
    for m in (twin, other):
        for p in m.parameters():
            if p.requires_grad:
                p.data.fill_(0.1)
    torch.testing.assert_close(run(twin), run(other), **CLOSE)


@pytest.mark.parametrize("first", [torch.float32])
def test_an_accelerated_network_starts_itself_as_the_library_does(first):
    torch.manual_seed(0)
    model = ONE["ActNorm"]()
    twin = copy.deepcopy(model)
    pyflowkern.accelerate(twin)
    for _ in range(2):
        torch.testing.assert_close(run(twin, data(model, first)), run(model, data(model, first)))
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["GLOW", "AllInOne given", "graph", "GLOW images"])
def test_hooks_and_methods_of_instances_are_called(name):
    _, twin = pair(name)
    seen = []
    net = next(m for m in twin.modules() if isinstance(m, torch.nn.Sequential))
    for module in (net, net[0], twin.module_list[0]):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        run(twin)
        assert seen
        handle.remove()
        seen.clear()
    net[0].forward = lambda h: seen.append(2) or type(net[0]).forward(net[0], h)
    run(twin)
    assert seen == [2]


def test_dropout_runs_the_library():
    model = blocks(
        fm.AllInOneBlock, net=lambda a, b: fc(a, b, between=[torch.nn.Dropout(0.5)])
    ).double()
    twin = copy.deepcopy(model)
    assert pyflowkern.accelerate(twin).accelerated
    for training in (True, False):
        found = []
        for m in (model, twin):
            m.train(training)
            torch.manual_seed(3)
            found.append(run(m))
        torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", ["AllInOne given", "graph given"])
def test_inference_mode_threads_and_averages(name):
    model, twin = pair(name)
    want = run(model)
    with torch.inference_mode():
        torch.testing.assert_close(run(twin), want, **CLOSE)
    torch.testing.assert_close(run(twin), want, **CLOSE)
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(twin))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, [want] * 4, **CLOSE)
    average = torch.optim.swa_utils.AveragedModel(twin)
    average.update_parameters(twin)
    torch.testing.assert_close(run(average.module), want, **CLOSE)
    torch.testing.assert_close(
        run(copy.deepcopy(twin).float().double()), run(copy.deepcopy(model).float().double())
    )


def test_a_compiled_network_gives_the_same():
    model, twin = pair("GLOW given")
    compiled = torch.compile(twin, backend="eager")
    torch.testing.assert_close(compiled(data(model), c=conditions(model)), run(model), **CLOSE)


def test_restore_gives_the_methods_back():
    _, twin = pair("AllInOne given")
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for m in twin.modules() for v in m.__dict__.values())


def test_subclasses_and_functions_of_users_are_left_alone():
    class Mine(GLOW):
        def _coupling1(self, x1, u2, rev=False):
            return x1, 0.0

    model = sequence(
        (Mine, None, WITH), (GLOW, None, {**WITH, "clamp_activation": torch.sin}), (GLOW, 0, WITH)
    ).double()
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert [e.name for e in report.left] == ["module_list.0", "module_list.1"]
    torch.testing.assert_close(run(twin), run(model), **CLOSE)


def test_splines_of_a_condition_are_of_single_precision(calls):  # noqa: F811
    torch.manual_seed(0)
    model = sequence((Elementwise, 0, WITH), (GLOW, 0, WITH))
    twin = copy.deepcopy(model)
    assert not pyflowkern.accelerate(twin).left
    for rev in (False, True):
        calls.clear()
        x = data(model, torch.float32)
        torch.testing.assert_close(run(twin, x, rev), run(model, x, rev), rtol=1e-4, atol=1e-4)
        assert len(calls) == 1


def test_what_has_no_op_is_reported():
    one_bin = (Linear, None, {**WITH, "bins": 1, "default_domain": (-3.0, 3.0, -3.0, 3.0)})
    report = pyflowkern.accelerate(sequence(one_bin, (Linear, None, WITH)))
    assert [(e.name, e.note) for e in report.left] == [
        ("module_list.0", "its form is not known, or its halves are not those of an op")
    ]


@pytest.mark.parametrize("name", ["linear splines", "linear splines of images"])
def test_linear_splines_are_two_ops_each_half(name):
    """One goes from positions to bins of the same width, the other from there to heights."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    model, twin = pair(name)
    assert {e.runs for e in pyflowkern.accelerate(copy.deepcopy(model)).entries} == {"own op"}
    x = data(model) * torch.linspace(0.1, 6, N, dtype=torch.float64).view(
        N, *[1] * (data(model).dim() - 1)
    )
    for rev in (False, True):
        torch.testing.assert_close(run(twin, x, rev), run(model, x, rev), **CLOSE)
        seen.clear()
        with Seen(), torch.no_grad():
            run(twin, x, rev)
        assert sum(name.startswith("pyflowkern::spline") for name in seen) == 4 * len(
            model.module_list
        )


def test_deprecated_networks_run_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inn = graph()
        nodes = [*inn.node_list, *inn.out_nodes, *inn.in_nodes]
        old = ff.ReversibleGraphNet(list(dict.fromkeys(nodes)), verbose=False).double()
        want = old(data(old))
        assert "" in [e.name for e in pyflowkern.accelerate(old).accelerated]
        torch.testing.assert_close(old(data(old)), want, **CLOSE)


def test_the_copy_in_anomalib_is_known(monkeypatch):
    name = "anomalib.models.components.flow"
    package = types.ModuleType(name)
    package.InvertibleModule = fm.InvertibleModule
    monkeypatch.setitem(sys.modules, name, package)
    spec = importlib.util.spec_from_file_location(
        f"{name}.all_in_one_block", sys.modules[fm.AllInOneBlock.__module__].__file__
    )
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    block = copied.AllInOneBlock([(D,)], subnet_constructor=fc).double()
    twin = copy.deepcopy(block)
    (entry,) = pyflowkern.accelerate(twin).accelerated
    assert entry.runs == "one op"
    x = (normal(N, D),)
    torch.testing.assert_close(twin(x), block(x), **CLOSE)
