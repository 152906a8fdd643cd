"""conv_network: values and derivatives of convolutions and ReLUs, image by image, at every SIMD level."""

import pytest
import torch
from cases.conv_network import FORMS, sample
from laws import check_batched_gradients, hold, normal
from torch.utils._pytree import tree_leaves

from pyflowkern.ops import conv_network, conv_network_reference

SPACE = (5, 4)


def test_more_pixels_than_a_run_of_sums(backend):
    large = sample("residual", 40, (16, 16), torch.float32)
    hold(conv_network, conv_network_reference, large, floor=32)


def test_the_result_has_the_memory_format_of_x(backend):
    for last in (False, True):
        args = sample("Glow", 3, SPACE, torch.float32, last)
        x = args.tensors["x"].requires_grad_()
        out = conv_network(**args.tensors)
        layout = torch.channels_last if last else torch.contiguous_format
        assert out.is_contiguous(memory_format=layout)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.is_contiguous(memory_format=layout)


def test_some_channels_of_images_are_read_where_they_lie(backend):
    args = sample("Glow", 3, SPACE)
    x = args.tensors["x"]
    whole = torch.cat([x, normal(3, 2, *SPACE)], 1)
    for images in (whole, whole.contiguous(memory_format=torch.channels_last)):
        args.tensors["x"] = images[:, :3]
        found = conv_network(**args.tensors)
        args.tensors["x"] = x
        torch.testing.assert_close(found, conv_network(**args.tensors))


class Exported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 7, 3), torch.nn.Conv2d(7, 2, 1)

    def forward(self, x):
        layers = self.first, self.last
        return conv_network(x, [y.weight for y in layers], [y.bias for y in layers])


def test_a_graph_exported_without_gradients_still_has_them():
    module, x = Exported(), normal(5, 3, *SPACE, dtype=torch.float32, seed=1).requires_grad_()
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    (found,) = torch.autograd.grad(exported(x).sum(), x)
    (want,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found, want)


def changed(name, change):
    def apply(args):
        args[name] = change(args[name])

    return apply


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (changed("x", lambda x: x[0]), ValueError, r"x must have shape \[N, in, H, W\]"),
        (changed("x", lambda x: x[..., :0]), ValueError, "at least one channel and pixel"),
        (
            changed("weights", lambda w: [w[0], w[1].mT.expand(6, 7, 3, 1), w[2]]),
            ValueError,
            r"weights\[1\] must have shape \[out, 7, k, k\] with k 1 or 3",
        ),
        (changed("weights", lambda w: [w[0][:0], *w[1:]]), ValueError, r"weights\[0\] must have"),
        (
            changed("biases", lambda b: [b[0], b[1].float(), b[2]]),
            TypeError,
            r"biases\[1\] must have the dtype",
        ),
        (changed("context", lambda c: c.float()), TypeError, "context must have the dtype"),
        (changed("context", lambda c: c[:, 1:]), ValueError, "context must have shape"),
    ],
)
def test_wrong_arguments_are_named(change, error, text):
    args = sample("Glow", 5, SPACE).tensors
    change(args)
    with pytest.raises(error, match=text):
        conv_network(**args)


def test_wrong_forms_are_named():
    args = sample("Glow", 5, SPACE).tensors
    with pytest.raises(ValueError, match="pairs of layers"):
        conv_network(**args, residual=True)
    with pytest.raises(ValueError, match="activate_last=False"):
        conv_network(**args, activate_last=False)


@pytest.mark.parametrize("form", FORMS)
def test_batched_gradients_are_those_one_by_one(backend, form):
    args = sample(form, 3, SPACE)
    leaves = [t.requires_grad_() for t in tree_leaves(args.tensors) if t is not None]
    check_batched_gradients(conv_network(**args.tensors, **args.fixed), leaves)
