"""``outside_graphs`` is ``torch.compiler.disable`` that does not import the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyflowkern
from pyflowkern.core.outside_graphs import outside_graphs


def test_a_process_that_compiles_nothing_does_not_import_the_compiler():
    code = (
        "import sys\n"
        "import torch\n"
        "from pyflowkern import flows, interop, ode, transport\n"
        "flow = flows.FFJORD(2, (4,))\n"
        "flow.log_prob(torch.randn(3, 2)).sum().backward()\n"
        "flow.eval().sample(2)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    root = str(Path(pyflowkern.__file__).parents[1])  # may be installed, or only on our path
    done = subprocess.run(  # a process that has imported nothing
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def _inner(x):
    return x.cos() * x.sum()


MINE = outside_graphs("it is left out")(_inner)
TORCHS = torch.compiler.disable(_inner, reason="it is left out")


def test_without_the_parts_of_torch_that_it_needs_it_is_torchs_own(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(torch._C._dynamo, "eval_frame")
        called = outside_graphs("it is left out")(_inner)
    assert called.__code__ is TORCHS.__code__
    assert called(torch.tensor(0.0)) == 0


@pytest.mark.parametrize("called", [MINE, TORCHS])
def test_a_compiler_sees_what_is_before_and_after_and_nothing_of_the_function(called):
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op == "call_method"])
        return graph.forward

    def whole(x):
        return called(x.sin()).tanh()

    x = torch.linspace(0, 1, 5)
    compiled = torch.compile(whole, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), whole(x), rtol=0, atol=0)
    assert graphs == [["sin"], ["tanh"]]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it is left out"):
        torch.compile(whole, backend="eager", fullgraph=True)(x)


def test_the_first_compiled_call_breaks_the_graph_once_and_says_why():
    """Of functions that ran never before: later calls find what the first one has made."""
    fresh, other = (outside_graphs("it is left out")(lambda x: x.cos()) for _ in range(2))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="it is left out"):
        torch.compile(lambda x: fresh(x.sin()), backend="eager", fullgraph=True)(torch.ones(3))
    torch._dynamo.utils.counters.clear()
    torch.compile(lambda x: other(x.sin()).tanh(), backend="eager")(torch.ones(3))
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1
