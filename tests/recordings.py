"""What stands in for a CUDA graph where there is no GPU, and sees what none could hold."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dgemma_accel import cuda_graph


class Again:
    """Runs the function again; warms up as the CUDA graph does, which leaves its marks in the static tensors.

    made: one for each step, of its first half. stored: those of passes that store a finished canvas.
    """

    bytes = 1000
    made: list = []
    stored: list = []

    def __init__(self, function, device, pool):
        self.function, self.pool, self.replays, self.runs, self.waits = function, pool, 0, 0, 0
        for _ in range(cuda_graph.WARM_UP):
            function()
        if function.__name__ != "condition":
            (Again.stored if function.__name__ == "store_canvas" else Again.made).append(self)

    @staticmethod
    def make_pool(device, *, products=True):
        return object()

    def begin(self):
        self.runs += 1

    def replay(self):
        self.replays += 1
        self.function()

    def end(self):
        self.runs -= 1

    def wait(self):
        assert not self.runs
        self.waits += 1


def record_on_a_cpu(monkeypatch):
    """Steps and passes of models are recorded by `Again`, without the compiler's minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Again)
    for kind in ("made", "stored"):
        monkeypatch.setattr(Again, kind, [])


class Crossings(TorchDispatchMode):
    """Operators that see both the host and a device: a copy between them could not be captured in a CUDA graph.

    This package's take 0-d tensors of the host by value. numbers: PyTorch's may too, as they do where they are launched
    one by one; a compiler copies them.
    """

    def __init__(self, numbers=False):
        super().__init__()
        self.numbers, self.seen, self.operations = numbers, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [tensor for tensor in tree_iter((args, kwargs, result)) if isinstance(tensor, torch.Tensor)]
        host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        name = func.overloadpacket.__name__
        by_value = func.namespace == "dgemma" or (self.numbers and name not in ("_to_copy", "copy_"))
        if host and len(host) < len(tensors) and not (by_value and all(tensor.ndim == 0 for tensor in host)):
            self.seen.append(name)
        return result
