"""Whether a traced forward is the authors' layer or their activation, call by call and not only by its values."""

import copy

import torch
from torch import fx, nn

from dfformer.models.copies.match import cast_signal, stored_basis
from dfformer_kernels.graph.toolkit import (
    CASTS,
    VIEWS,
    NotFusableError,
    dynamic_filter,
    first_input,
    global_filter,
    has_hooks,
    make_traceable,
    name_of,
    trace,
    value_of,
)
from dfformer_kernels.tolerance import relative_error

_OPERATORS = (cast_signal, stored_basis, dynamic_filter, global_filter)
_CALLS = {*VIEWS, *CASTS, "mean", "shape", "size", "getitem"}
_PARTS = {"pwconv1", "act1", "reweight", "act2", "pwconv2"}
_SAME_FORMULA = 1e-9  # relative, in double precision


def is_authors(graph: fx.Graph) -> bool:
    """Whether a forward with our step is that of the authors' layers, given that its values are.

    It calls each part once and otherwise only moves values. The first and the last call are projections, so the dtypes
    of input and output are theirs.
    """
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    results = [first_input(node) for node in graph.nodes if node.op == "output"]
    [x] = [node for node in graph.nodes if node.op == "placeholder"]
    computing = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    return (
        len(called) == len({*called}) == len(_PARTS.intersection(called))
        and all(node.target in _OPERATORS or name_of(node) in _CALLS for node in computing)
        and getattr(results[0], "target", "") == "pwconv2"
        and all(name_of(user) in ("pwconv1", "mean", "shape", "size") for user in x.users)
    )


def is_star_relu(act: nn.Module) -> bool:
    """Whether a module computes ``scale * relu(x)**2 + bias`` for all x.

    Its graph is a polynomial of x, one relu(x), scale and bias. Such polynomials that agree on enough points are equal.
    """
    shapes = {name: p.numel() for name, p in act.named_parameters(remove_duplicate=False)}
    if shapes != {"scale": 1, "bias": 1} or any(map(has_hooks, act.modules())):
        return False
    x = torch.linspace(-3, 3, 61, dtype=torch.float64, device="cpu")
    scale, bias = x.new_tensor([0.7391]), x.new_tensor([-0.2837])
    for training in (False, True):
        try:
            module = copy.deepcopy(act).to("cpu", torch.float64).train(training)
            make_traceable(module)
            module.load_state_dict({"scale": scale, "bias": bias})
            traced = trace(module, [x.clone()], {})
        except (NotFusableError, RuntimeError):
            return False
        [result] = [first_input(node) for node in traced.graph.nodes if node.op == "output"]
        if traced.seen or not _is_polynomial(traced.graph, module):
            return False
        if not relative_error(value_of(result), scale * x.relu() ** 2 + bias) < _SAME_FORMULA:
            return False
    return True


def _is_polynomial(graph: fx.Graph, module: nn.Module) -> bool:
    """Whether ``graph`` only multiplies and adds its input, the input's relu, scale and bias."""

    def multiplies_or_adds(node: fx.Node) -> bool:
        if node.op == "get_attr":  # e.g. not a buffer, which may change
            return node.target in ("scale", "bias")
        name = name_of(node)
        if node.op == "call_module":
            name = "relu" if type(module.get_submodule(name)) is nn.ReLU else "another module"
        if name in ("relu", "relu_"):
            return first_input(node).op == "placeholder"
        return name in ("mul", "add", "square") or (name == "pow" and node.args[1:] == (2,))

    return all(multiplies_or_adds(node) for node in graph.nodes if node.op not in ("placeholder", "output"))
