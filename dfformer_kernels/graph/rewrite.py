"""Rewrites a graph in place: replaces each chain that is proven to be the step; reports a finding for every chain."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from dfformer_kernels.graph.chain import Chain, find, inverse_transforms, is_question
from dfformer_kernels.graph.report import Finding
from dfformer_kernels.graph.step import PYTHON, Operators, StepMatch, match
from dfformer_kernels.graph.trace import DifferentFormulaError, ancestors
from dfformer_kernels.graph.vocabulary import VALUES, is_mutating, name_of

Adapt = Callable[[fx.Graph, Chain, StepMatch], tuple[Chain, StepMatch]]


def rewrite(
    graph: fx.Graph,
    operators: Operators,
    where: Callable[[fx.Node], str],
    adapt: Adapt = lambda graph, chain, step: (chain, step),
) -> list[Finding]:
    """Replaces the chains of ``graph`` by calls of ``operators``; ``where`` names a node for the report.

    ``adapt`` may insert nodes that other tensors for the step come from, or raise DifferentFormulaError.
    """
    found = []
    for inverse in inverse_transforms(graph):
        try:
            chain, step = adapt(graph, *match(find(graph, inverse)))
        except (DifferentFormulaError, ValueError) as error:
            found.append(Finding(where(inverse), reason=str(error)))
            continue
        found.append(Finding(where(inverse), operator=PYTHON[step.kind][0].__name__))
        replaced = ancestors(inverse)
        _emit(graph, chain, step, operators)
        _erase(graph, chain, replaced)
    graph.lint()
    return found


def _emit(graph: fx.Graph, chain: Chain, step: StepMatch, operators: Operators) -> None:
    """Turns ``chain.inverse`` into the last node of the step. It keeps its name, which a signature may refer to."""
    inverse = chain.inverse
    call = partial(add_call, graph, inverse)
    routing = chain.logits if step.kind == "softmax" else chain.routing
    with graph.inserting_before(inverse):
        last = step.build(call, operators, chain.x, routing, chain.filters)
    inverse.op, inverse.target = "call_function", last.target
    inverse.args, inverse.kwargs, inverse.meta = last.args, last.kwargs, last.meta
    graph.erase_node(last)


def add_call(graph: fx.Graph, like: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a node that calls ``function``, with its value, and what else the graph keeps of the node ``like``."""
    node = graph.call_function(function, args, kwargs)
    node.meta = dict(like.meta)
    key = next(key for key in VALUES if key in like.meta)
    known, named = fx.map_arg((args, kwargs), lambda n: n.meta[key])
    with torch.no_grad():
        node.meta[key] = function(*known, **named)
    return node


def _erase(graph: fx.Graph, chain: Chain, replaced: set[fx.Node]) -> None:
    """Erases unused nodes of ``replaced``; questions about a spectrum that only they need go to the chain's input."""
    outside = [user for user in chain.forward.users if user not in chain.nodes]
    if outside and all(map(is_question, outside)):
        with graph.inserting_before(chain.forward):
            unevaluated = graph.call_function(unevaluated_spectrum, (chain.x, chain.channels_first))
        replaced.add(unevaluated)
        for question in outside:
            replaced.add(question)
            question.replace_input_with(chain.forward, chain.x if name_of(question) == "device" else unevaluated)
    for node in reversed(graph.nodes):
        erasable = node in chain.nodes or (node in replaced and node.op != "placeholder" and not is_mutating(node))
        if erasable and not node.users:
            graph.erase_node(node)


def unevaluated_spectrum(x: Tensor, channels_first: bool) -> Tensor:
    """A tensor on the meta device with the shape and dtype of x's spectrum."""
    return torch.fft.rfft2(torch.empty_like(x, device="meta"), dim=(2, 3) if channels_first else (1, 2))
