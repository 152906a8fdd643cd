"""The subsystems of PyTorch that flows are used with, a check each; tests/flows/test_subsystems.py has the table."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from threading import Barrier

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from laws.draws import normal
from laws.modules import randomize
from laws.op_checks import TWO_FORMULAS
from pyflowkern import use_reference

#: Any number of samples is to take two compilations: of the first number, and of every other one.
BATCHES = (7, 32, 33, 100, 1000)
#: Of one float64 quantity computed by two formulas, through a flow of several ops.
SEVERAL_OPS = 10 * TWO_FORMULAS
close = partial(torch.testing.assert_close, rtol=SEVERAL_OPS, atol=SEVERAL_OPS)


class Method(torch.nn.Module):
    """A method of a flow as a module's ``forward``, which is what exporters and functional calls take."""

    def __init__(self, flow, name):
        super().__init__()
        self.flow, self.name = flow, name

    def forward(self, *args):
        return getattr(self.flow, self.name)(*args)


def rows(n, *tensors):
    return [None if t is None else t[:n] for t in tensors]


# --- torch.compile ---


def counted(function, backend="eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def check_compiled_training(case):
    """The loss is one graph, which gives the gradients of each step; then the density is one without them."""
    flow, x, context = case.make(max(BATCHES))
    flow.train()(x, context)  # as ActNorm starts
    plain = copy.deepcopy(flow)
    compiled, counter = counted(partial(loss_of, flow))
    results = []
    for model, loss in ((plain, partial(loss_of, plain)), (flow, compiled)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses = []
        for n in BATCHES:
            torch.manual_seed(n)
            optimizer.zero_grad()
            losses.append(loss(*rows(n, x, context)))
            losses[-1].backward()
            optimizer.step()
        results.append([*losses, *model.parameters()])
    close(*results)
    assert counter.frame_count <= 2


@torch.no_grad()
def check_compiled_density(case):
    flow, x, context = case.make(max(BATCHES))
    compiled, counter = counted(flow.log_prob)
    for n in BATCHES:
        close(compiled(*rows(n, x, context)), flow.log_prob(*rows(n, x, context)))
    assert counter.frame_count <= 2


def check_compiled_samples(case):
    flow, _, context = case.make(max(BATCHES))
    compiled, counter = counted(flow.sample)
    for n in BATCHES:
        results = []
        for sample in (flow.sample, compiled):
            torch.manual_seed(n)
            results.append(sample(n, *rows(n, context)))
        close(*results)
    assert counter.frame_count <= 2


def loss_of(flow, x, context):
    """Return what a flow is trained by."""
    return flow.loss(x, context) if hasattr(flow, "loss") else -flow.log_prob(x, context).mean()


# --- torch.func ---


def check_derivatives(case):
    """``jvp``, ``jacrev`` and ``hessian`` of densities are those of autograd."""
    flow, x, context = case.make(2)

    def density(x):
        return flow.log_prob(x, context).sum()

    leaf, tangent = x.clone().requires_grad_(), normal(*x.shape, seed=5)
    slope = torch.autograd.grad(density(leaf), leaf)[0]
    close(jvp(density, (x,), (tangent,))[1], (slope * tangent).sum())
    close(jacrev(density)(x), slope)
    close(hessian(density)(x), torch.autograd.functional.hessian(density, x))


def check_ensembles(case):
    """Several flows are one call of a flow without memory of its own."""
    flow, x, context = case.make()
    models = [Method(randomize(copy.deepcopy(flow), seed=k), "log_prob").eval() for k in (1, 2, 3)]
    state = stack_module_state(models)
    one = copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda *state: functional_call(one, state, (x, context)))(*state)
    close(found, torch.stack([model(x, context) for model in models]))


def check_second_derivatives(case):
    flow, x, context = case.make(2)
    method = Method(flow, "log_prob")
    names = [name for name, _ in method.named_parameters()][::-2][:4]

    def density(x, *params):
        return functional_call(method, dict(zip(names, params, strict=True)), (x, context))

    leaves = (x.requires_grad_(), *map(method.get_parameter, names))
    torch.autograd.gradgradcheck(density, leaves, fast_mode=True)


# --- CUDA graphs ---


def check_no_waits(case):
    """Nothing asks what a tensor holds, as nothing may in a captured graph: those on the meta device hold nothing."""
    flow, x, context = (None if t is None else t.to("meta") for t in case.make(5, torch.float32))
    loss_of(flow.train(), x, context).backward()
    assert all(p.grad.is_meta for name, p in flow.named_parameters() if name not in case.idle)
    assert flow.eval().log_prob(x, context).is_meta
    assert flow.sample(5, context).is_meta


# --- modules, averages, state ---

#: What changes the weights of a layer, and what makes the changed ones the layer's own.
WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": partial(prune.l1_unstructured, name="weight", amount=0.4),
}
NETWORKS = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)


def check_parametrizations(case):
    """A flow with wrapped weights is the flow with the weights that they have, and learns through the wrapping."""
    for wrap in WRAPPERS.values():
        flow, x, context = case.make()
        layers = [name for name, m in flow.named_modules() if isinstance(m, NETWORKS)]
        assert layers
        for name in layers:
            wrap(flow.get_submodule(name))
        flow.eval()
        plain = case.make()[0]
        with torch.no_grad():
            for name in layers:
                plain.get_submodule(name).weight.copy_(flow.get_submodule(name).weight)
        z = plain(x, context)[0].detach()
        close(flow(x, context)[1], plain(x, context)[1])
        close(flow.inverse(z, context)[0], plain.inverse(z, context)[0])
        before = flow.log_prob(x, context)
        before.sum().backward()
        for name, p in flow.named_parameters():
            assert p.grad is not None or not p.numel() or name in case.idle, name
            p.data -= 0.1 * (0 if p.grad is None else p.grad)
        assert (flow.log_prob(x, context) - before).abs().max() > 0


def check_averages(case):
    """An average has its own numbers after each update, whatever was computed before."""
    flow, x, context = case.make()
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    wanted = {k: v.clone() for k, v in flow.state_dict().items()}
    for k in range(3):
        average.module.log_prob(x, context)
        randomize(flow, 0.1, seed=k)
        average.update_parameters(flow)
        for name, p in flow.named_parameters():
            wanted[name] = torch.lerp(wanted[name], p.detach(), 0.25 if k else 1.0)
    plain = case.build().double().eval()
    plain.load_state_dict(wanted)
    close(average.module.log_prob(x, context), plain.log_prob(x, context))


def check_saved(case):
    """Whole flows, and states of nothing but tensors and numbers."""
    flow, x, context = case.make()
    expected = flow.log_prob(x, context)
    assert torch.equal(through_file(flow, weights_only=False).log_prob(x, context), expected)
    for assign in (False, True):
        other = case.build().double().eval()
        other.load_state_dict(through_file(flow.state_dict(), weights_only=True), assign=assign)
        assert torch.equal(other.log_prob(x, context), expected)


def through_file(what, **options):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, **options)


# --- processes, threads, settings of torch ---


def everything(flow, x, context, seed=0):
    """Return densities, their gradients, and samples."""
    leaves = [x.detach().requires_grad_(), *flow.parameters()]
    density = flow.log_prob(leaves[0], context)
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(density.sum(), leaves, **options)
    sample = flow.sample(len(x), context, generator=torch.Generator("cpu").manual_seed(seed))
    return [density.detach(), *gradients, sample]


class Densities(torch.utils.data.Dataset):
    """What workers compute: an item is the name of a case and its results."""

    def __init__(self, cases):
        self.items = [(case.name, case.make(8, torch.float32)) for case in cases]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name, given = self.items[i]
        return name, everything(*given)


def in_workers(cases):
    """Return the results that forked workers and this process have, by the names of cases."""
    dataset = Densities(cases)
    torch.set_num_threads(2)  # threads that a fork does not have
    try:
        ours = dict(map(dataset.__getitem__, range(len(dataset))))
    finally:
        torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
    )
    return {name: (found, ours[name]) for name, found in loader}


THREADS = 8


def check_threads(case):
    """Threads that use one flow at once get what they would get alone."""
    flow, x, context = case.make(4 * THREADS, torch.float32)
    same, together = copy.deepcopy(flow), Barrier(THREADS)
    given = [(x[4 * k : 4 * k + 4], *rows(4, context)) for k in range(THREADS)]

    def work(k):
        together.wait()
        return everything(flow, *given[k], seed=k)

    with ThreadPoolExecutor(THREADS) as threads:
        found = [list(threads.map(work, range(THREADS))) for _ in range(3)]
    wanted = [everything(same, *given[k], seed=k) for k in range(THREADS)]
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=0, atol=0)


def check_deterministic(case):
    """Where torch refuses what is not deterministic, and fills new memory with NaN."""
    given = case.make(8, torch.float32)
    expected = everything(*given)
    torch.use_deterministic_algorithms(True)
    try:
        found = everything(*given)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_defaults(case):
    """Flows follow their own dtype and device: another default of torch's changes nothing."""
    given = case.make(8, torch.float32)
    expected = everything(*given)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = everything(*given)
        torch.set_default_device("cpu")
        flow = case.build().eval()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    floating = [t for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()]
    _, x, context = case.make(8)
    assert flow.log_prob(x, context).dtype == torch.float64
    kept = {t.dtype for t in floating}
    assert torch.float64 in kept


# --- programs that run elsewhere ---


class Samples(torch.nn.Module):
    """Samples of a flow for each context."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, context):
        return self.flow.sample(context.shape[0], context)


@torch.no_grad()
def exported(case, name):
    """Return a program of a flow's ``log_prob`` or ``sample`` for any number of samples, and arguments for it."""
    flow, x, context = case.make(5, torch.float32)
    module, args = (
        (Samples(flow), (context,)) if name == "sample" else (Method(flow, name), (x, context))
    )
    n = torch.export.Dim("n", min=2)
    shapes = (({0: n},) * 2,) if name == "log_prob" else ({0: n},)
    program = torch.export.export(module, args, strict=False, dynamic_shapes=shapes)
    more = tuple(torch.cat([t, t, t[:1]]) for t in args)
    torch.manual_seed(0)
    return program, more, module(*more).detach()


#: Runs exported programs in a process that has torch and the two libraries, and not the package.
WITHOUT_THE_PACKAGE = """
import sys
import torch

folder, libraries = sys.argv[1:]
for name in ("schemas", "cpu"):
    torch.ops.load_library(f"{libraries}/libpyflowkern_{name}.so")
found = {}
with torch.no_grad():
    for name, args in torch.load(f"{folder}/arguments.pt").items():
        if name == "compiled":
            run = torch._inductor.aoti_load_package(f"{folder}/{name}.pt2")
        else:
            run = torch.export.load(f"{folder}/{name}.pt2").module()
        torch.manual_seed(0)
        found[name] = run(*args)
assert "pyflowkern" not in sys.modules
torch.save(found, f"{folder}/found.pt")
"""


def check_without_ops(case):
    """On the reference a density consists of torch's own operators; ONNX Runtime runs it, where it is installed."""
    with use_reference():
        program, args, expected = exported(case, "log_prob")
    assert not {str(n.target) for n in program.graph.nodes if "pyflowkern" in str(n.target)}
    if all(find_spec(name) for name in ("onnxscript", "onnxruntime")):
        run_by_onnx(program, args, expected)


def run_by_onnx(program, args, expected):
    import onnxruntime

    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (t.numpy() for t in args), strict=True)))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
