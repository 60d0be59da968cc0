"""What other packages may use of this folder, to trace, match, rewrite and compare modules themselves.

`__init__` does not import it, because ``import dfformer_kernels`` would take longer, and most programs fuse nothing.
"""

from dfformer_kernels.graph.chain import Chain
from dfformer_kernels.graph.compare import AGREEMENT, difference, isolated, results, tensors
from dfformer_kernels.graph.rewrite import add_call, rewrite
from dfformer_kernels.graph.step import PYTHON, StepMatch, called, dynamic_filter, global_filter, named_difference
from dfformer_kernels.graph.subclass import FusedModule, check_names, fused_class, is_fused_class
from dfformer_kernels.graph.trace import (
    ONE_AT_A_TIME,
    DifferentFormulaError,
    NotFusableError,
    ancestors,
    called_whole,
    common_graph,
    first_line,
    has_hooks,
    inputs_of,
    make_traceable,
    reached,
    trace,
    with_function,
)
from dfformer_kernels.graph.vocabulary import (
    CASTS,
    VIEWS,
    first_input,
    is_mutating,
    is_tensor,
    name_of,
    transform_of,
    value_of,
)
