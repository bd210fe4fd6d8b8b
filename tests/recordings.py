"""What stands in for a CUDA graph where there is no GPU, and sees what none could hold."""

import weakref

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


class Operators(TorchDispatchMode):
    """Each operator that is called, with its arguments and what it returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Tape(Again):
    """Calls the operators again that the function called, on the very tensors that they had, and nothing else of it: as
    a graph it goes on to read what is no longer the model's.

    What it made lies in the pool's memory, which holds rubbish before a run and behind it, as if others had used it.
    """

    def __init__(self, function, device, pool):
        super().__init__(function, device, pool)
        with torch.inference_mode(False), torch.no_grad(), Operators() as operators:
            function()
        self.function, self.calls = None, operators.calls
        pool.append(weakref.ref(self))

    @staticmethod
    def make_pool(device, *, products=True):
        return []

    def begin(self):
        super().begin()
        self._spoil()

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if not _is_in_place(func):
                for mine, fresh in zip(_tensors(result), _tensors(again)):
                    mine.copy_(fresh)

    def end(self):
        super().end()
        self._spoil()

    @torch.no_grad()
    def _spoil(self):
        for func, _, _, result in [call for tape in self.pool if tape() for call in tape().calls]:
            for tensor in [] if _is_in_place(func) else _tensors(result):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


def _is_in_place(func):
    """Whether an operator writes where its arguments lie, or makes a view of them."""
    return any(one.alias_info is not None for one in func._schema.returns)


def _tensors(values):
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def record_on_a_cpu(monkeypatch, recording=Again):
    """Steps and passes of models are recorded by `recording`, without the compiler's minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", recording)
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
