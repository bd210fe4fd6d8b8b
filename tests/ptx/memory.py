"""Global and shared memory of the machine: loads, stores and atomic operations with their checks."""

from __future__ import annotations

import ctypes

import numpy as np

POISON = 0xFF
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Where the window over the process's memory begins; address 0 has no buffer.
_ORIGIN = 4096


class MemoryFault(RuntimeError):
    """An access that a GPU would refuse, or that would read or write what is not the kernel's."""


class Memory:
    """Bytes at addresses in stretches [start, end), seen as elements of any size."""

    def __init__(self, name: str, window: np.ndarray, origin: int, stretches: list[tuple[int, int]]):
        self.name = name
        self.origin = origin
        self.windows = {
            size: window[: window.size // size * size].view(kind) for size, kind in UNSIGNED.items()
        }
        merged: list[list[int]] = []
        for start, end in sorted(stretches):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged] or [0], dtype=np.int64)
        self.ends = np.array([end for _, end in merged] or [0], dtype=np.int64)

    def _element(self, addresses: np.ndarray, size: int, aligned: int, what: str) -> np.ndarray:
        """The numbers of the elements at addresses, of which `aligned` bytes are read or written at once."""
        addresses = addresses.astype(np.int64)
        if (addresses % aligned).any():
            bad = addresses[addresses % aligned != 0]
            raise MemoryFault(
                f"{what}: {bad.size} addresses in {self.name} memory are no multiples of {aligned}"
            )
        stretch = np.maximum(np.searchsorted(self.starts, addresses, side="right") - 1, 0)
        outside = (addresses < self.starts[stretch]) | (addresses + aligned > self.ends[stretch])
        if outside.any():
            first = int(addresses[outside][0])
            near = int(stretch[outside][0])
            raise MemoryFault(
                f"{what}: {int(outside.sum())} addresses outside of {self.name} memory, the first at "
                f"{first - int(self.starts[near])} of {int(self.ends[near] - self.starts[near])} bytes"
            )
        return (addresses - self.origin) // size

    def load(self, addresses: np.ndarray, size: int, count: int, what: str) -> list[np.ndarray]:
        first = self._element(addresses, size, size * count, what)
        return [self.windows[size][first + i] for i in range(count)]

    def store(self, addresses: np.ndarray, values: list[np.ndarray], size: int, what: str) -> None:
        first = self._element(addresses, size, size * len(values), what)
        for i, value in enumerate(values):
            self.windows[size][first + i] = value

    def update(self, addresses: np.ndarray, operation, values: np.ndarray, what: str) -> np.ndarray:
        """Each element in turn becomes operation(element, value); what was there before."""
        size = values.dtype.itemsize
        window = self.windows[size].view(values.dtype)
        elements = self._element(addresses, size, size, what)
        before = np.empty_like(values)
        for i, (element, value) in enumerate(zip(elements, values)):
            before[i] = window[element]
            window[element] = operation(before[i], value)
        return before


def global_memory(stretches: list[tuple[int, int]]) -> Memory:
    """The process's own memory, of which the stretches may be touched."""
    whole = (ctypes.c_char * ((1 << 47) - _ORIGIN)).from_address(_ORIGIN)
    return Memory("global", np.frombuffer(whole, dtype=np.uint8), _ORIGIN, stretches)


def shared_memory(blocks: int, size: int) -> tuple[Memory, int]:
    """Shared memory of several blocks, poisoned, and the distance from one block's to the next."""
    # What lies between two blocks' belongs to neither. A swizzled matrix starts at a multiple of 1024 bytes.
    pitch = -(-(size + 16) // 1024) * 1024
    raw = np.full(max(blocks * pitch, 1024), POISON, dtype=np.uint8)
    stretches = [(i * pitch, i * pitch + size) for i in range(blocks)]
    return Memory("shared", raw, 0, stretches), pitch
