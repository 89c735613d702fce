"""What an autograd graph is made of, and where it begins."""

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node

from bilevel.tree import Params


def graph_nodes(outputs: Iterable[Tensor]) -> set[Node]:
    """Every node that the graphs of `outputs` lead to."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen


def beginnings(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that require gradients at which the graphs of `outputs` begin."""
    outputs = list(outputs)
    # Nodes that end a graph at a leaf have it as their variable.
    ends = (getattr(node, "variable", None) for node in graph_nodes(outputs))
    own = [output for output in outputs if output.is_leaf and output.requires_grad]
    return [*own, *(end for end in ends if isinstance(end, Tensor))]


def reached(outputs: Iterable[Tensor], variables: Params) -> set[str]:
    """Names of the variables at which the graphs of `outputs` begin."""
    return named_among(beginnings(outputs), variables)


def named_among(leaves: Iterable[Tensor], variables: Params) -> set[str]:
    """Names of the variables that are among `leaves`, as objects."""
    names = {id(leaf): name for name, leaf in variables.items()}
    return {names[id(leaf)] for leaf in leaves if id(leaf) in names}
