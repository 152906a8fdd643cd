"""What compilers are given."""

import torch

__all__ = ["graphs_of"]


def graphs_of(run, *calls):
    """Compile a function; return its results for the arguments of each call, and how many graphs were made by then."""
    torch._dynamo.reset()
    made, found, counts = [], [], []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    compiled = torch.compile(run, backend=backend)
    for arguments in calls:
        found.append(compiled(*arguments))
        counts.append(len(made))
    return found, counts
