"""Bytes that tensors hold while a call runs, counted without holding them: on meta tensors."""

import contextlib

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of storages made inside it and still referenced; inputs from outside count nothing."""

    def __init__(self, *outside):
        super().__init__()
        self.outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.outside:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


class _Launches:
    """Stands for a Triton kernel; a launch does nothing, what its launcher allocated is there."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.count += 1

        return launch


@contextlib.contextmanager
def launchers_of(capability, multiprocessors, patch):
    """Inside, Triton launchers take the configurations of a GPU that is not there and allocate for it."""
    from dgemma_accel.triton_kernels import (
        block_attention,
        commit,
        common,
        head_stats,
        row_stats,
        soft_embedding,
    )

    counters = []
    patch.setattr(common, "target", capability)
    for module in (block_attention, commit, head_stats, row_stats, soft_embedding):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            counters.append(_Launches())
            patch.setattr(module, name, counters[-1])
        if hasattr(module, "multiprocessors"):
            patch.setattr(module, "multiprocessors", lambda tensor: multiprocessors)
    yield counters
