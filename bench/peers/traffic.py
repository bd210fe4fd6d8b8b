"""How often a computation passes over its table: the bytes that its operators read and write, over the table's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXED = ("gather", "scatter_", "scatter_add_", "index_put_")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts in `bytes` what every operator reads and writes: each operand once, views nothing.

    A lower bound of the real traffic: an operator that goes over an operand twice (a softmax, a sort) counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        name = function.__name__.split(".")[0]
        read = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in INDEXED:
            # As many elements of the table are touched as there are indices.
            moved = 2 * sum(_bytes(tensor) for tensor in read[1:])
        elif name.startswith(("empty", "new_empty")):
            moved = 0
        else:
            reads = () if name.endswith("_like") or name == "zero_" else read
            moved = sum(_bytes(tensor) for tensor in (*reads, *written))
        self.bytes += moved
        return result


def passes(call: Callable[[], object], table: Tensor) -> float:
    """Bytes that the operators of `call` move, in units of the bytes of `table`."""
    with torch.no_grad(), Traffic() as traffic:
        call()
    return traffic.bytes / _bytes(table)
