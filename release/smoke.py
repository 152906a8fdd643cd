"""Short checks of an installed wheel: ``python -P release/smoke.py``.  They need torch alone and take seconds.

The libraries are loaded, all flows below give the numbers of the pure-PyTorch reference, and a training step works.
With a torch built for CUDA the CUDA library must load, too, also where there is no GPU.
"""

import json
from importlib import metadata
from pathlib import Path

import torch

import pyflowkern
from pyflowkern import flows, ops, use_reference

FLOWS = {
    "NSF": lambda: flows.NSF(4, transforms=2, hidden=(16, 16)),
    "RealNVP": lambda: flows.RealNVP(4, hidden=16),
    "MAF": lambda: flows.MAF(4, transforms=2, hidden=(16, 16)),
    "autoregressive NSF": lambda: flows.NSF(4, transforms=2, hidden=(16, 16), autoregressive=True),
}


def check_place() -> None:
    """The package is the installed one and has a bill of materials."""
    dist = metadata.distribution("pyflowkern")
    assert Path(str(dist.locate_file("pyflowkern"))) == Path(pyflowkern.__file__).parent
    (bill,) = (f for f in dist.files or [] if f.match("*.dist-info/sboms/pyflowkern.cdx.json"))
    document = json.loads(Path(str(dist.locate_file(bill))).read_text())
    assert document["metadata"]["component"]["version"] == pyflowkern.__version__


def check_libraries() -> None:
    """Kernels serve the CPU, and CUDA where torch knows it; the page of facts says what is there."""
    page = pyflowkern.show_config()
    print(page)
    assert "\ncpu: kernels (" in page
    assert "\nSIMD levels: baseline" in page
    if torch.version.cuda is not None and "\nCUDA: none" not in page:
        assert "\ncuda: kernels from" in page


def check_flow(name: str) -> None:
    """Densities, gradients and samples with kernels are those of the reference; a step changes the loss."""
    torch.manual_seed(0)
    flow, x = FLOWS[name](), torch.randn(64, 4)
    ours = flow.log_prob(x)
    parameters = list(flow.parameters())
    gradients = torch.autograd.grad(ours.mean(), parameters, allow_unused=True)
    with use_reference():
        torch.manual_seed(0)
        again = FLOWS[name]()
        again.load_state_dict(flow.state_dict())
        theirs = again.log_prob(x)
        expected = torch.autograd.grad(theirs.mean(), list(again.parameters()), allow_unused=True)
    # float32 through a few layers, and sums of 64 samples
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    (-flow.log_prob(x).mean()).backward()
    optimizer.step()
    assert torch.isfinite(flow.sample(8)).all()
    assert -flow.log_prob(x).mean() < -ours.mean()


def check_image_op() -> None:
    """An op on images and its gradient, with the kernel and without."""
    torch.manual_seed(0)
    x, p = torch.randn(3, 6, 8, 8, requires_grad=True), torch.randn(3, 6, 8, 8)
    for a, b in zip(ops.affine_coupling(x, p), _reference(x, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)  # log-dets are sums of 192 terms
    (gradient,) = torch.autograd.grad(ops.affine_coupling(x, p)[0].sum(), x)
    (expected,) = torch.autograd.grad(_reference(x, p)[0].sum(), x)
    torch.testing.assert_close(gradient, expected)


def _reference(x: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with use_reference():
        y, log_det = ops.affine_coupling(x, p)
    return y, log_det


def main() -> None:
    """Run all checks."""
    check_place()
    check_libraries()
    check_image_op()
    for name in FLOWS:
        check_flow(name)
    print(f"smoke: {2 + 1 + len(FLOWS)} checks passed with torch {torch.__version__}")


if __name__ == "__main__":
    main()
