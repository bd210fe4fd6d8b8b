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
    """Bytes at addresses in stretches [start, end), seen as elements of any size.

    `read` and `stored` count the bytes by stretch.
    """

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
        self.read, self.stored = np.zeros((2, len(self.starts)), dtype=np.int64)

    def _element(
        self, addresses: np.ndarray, size: int, aligned: int, what: str, count: np.ndarray
    ) -> np.ndarray:
        """The numbers of the elements at addresses, of which `aligned` bytes are read or written at once."""
        addresses = addresses.astype(np.int64)
        if (addresses % aligned).any():
            bad = addresses[addresses % aligned != 0]
            raise MemoryFault(
                f"{what}: {bad.size} addresses in {self.name} memory are no multiples of {aligned}"
            )
        if addresses.size:
            # Most often all are in one stretch, which the lowest and the highest show.
            lowest = int(addresses.min())
            place = int(np.searchsorted(self.starts, lowest, side="right")) - 1
            if place >= 0 and int(addresses.max()) + aligned <= self.ends[place]:
                count[place] += aligned * addresses.size
                return (addresses - self.origin) // size
        stretch = np.maximum(np.searchsorted(self.starts, addresses, side="right") - 1, 0)
        outside = (addresses < self.starts[stretch]) | (addresses + aligned > self.ends[stretch])
        if outside.any():
            first = int(addresses[outside][0])
            near = int(stretch[outside][0])
            raise MemoryFault(
                f"{what}: {int(outside.sum())} addresses outside of {self.name} memory, the first at "
                f"{first - int(self.starts[near])} of {int(self.ends[near] - self.starts[near])} bytes"
            )
        count += aligned * np.bincount(stretch, minlength=len(count))
        return (addresses - self.origin) // size

    def load(self, addresses: np.ndarray, size: int, count: int, what: str) -> list[np.ndarray]:
        first = self._element(addresses, size, size * count, what, self.read)
        return [self.windows[size][first + i] for i in range(count)]

    def store(self, addresses: np.ndarray, values: list[np.ndarray], size: int, what: str) -> None:
        first = self._element(addresses, size, size * len(values), what, self.stored)
        for i, value in enumerate(values):
            self.windows[size][first + i] = value

    def update(self, addresses: np.ndarray, operation, values: np.ndarray, what: str) -> np.ndarray:
        """Each element in turn becomes operation(element, value); what was there before."""
        size = values.dtype.itemsize
        window = self.windows[size].view(values.dtype)
        elements = self._element(addresses, size, size, what, self.stored)
        before = np.empty_like(values)
        for i, (element, value) in enumerate(zip(elements, values)):
            before[i] = window[element]
            window[element] = operation(before[i], value)
        return before


def global_memory(stretches: list[tuple[int, int]]) -> Memory:
    """The process's own memory, of which the stretches may be touched."""
    whole = (ctypes.c_char * ((1 << 47) - _ORIGIN)).from_address(_ORIGIN)
    return Memory("global", np.frombuffer(whole, dtype=np.uint8), _ORIGIN, stretches)


class Unordered(RuntimeError):
    """Two warps that touch the same shared memory, one of them writing, with no barrier between them."""


SEVERAL = -2


class SharedMemory(Memory):
    """Shared memory of several blocks, poisoned; each block's begins `pitch` bytes behind the one before it.

    Every byte knows who read and wrote it since which barrier of its block. Accesses say by whose warp they are, and
    those that do not are not looked at.
    """

    def __init__(self, blocks: int, size: int):
        # What lies between two blocks' belongs to neither. A swizzled matrix starts at a multiple of 1024 bytes.
        self.pitch = -(-(size + 16) // 1024) * 1024
        raw = np.full(blocks * self.pitch, POISON, dtype=np.uint8)
        super().__init__("shared", raw, 0, [(i * self.pitch, i * self.pitch + size) for i in range(blocks)])
        self.barriers = np.zeros(blocks, dtype=np.int32)
        self.written_at, self.read_at = np.full((2, raw.size), -1, dtype=np.int32)
        self.writer, self.reader = np.full((2, raw.size), SEVERAL, dtype=np.int32)

    def _bytes(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return (addresses.astype(np.int64)[:, None] + np.arange(size)).reshape(-1)

    def _note(
        self, at: np.ndarray, warp: np.ndarray, when: np.ndarray, since: np.ndarray, who: np.ndarray
    ) -> None:
        """Who touched bytes since the last barrier: one warp, or several."""
        by = np.where((since[at] == when) & (who[at] != warp), SEVERAL, warp)
        who[at] = by
        # A byte that several warps touch by one instruction has the last one's name.
        who[at[who[at] != by]] = SEVERAL
        since[at] = when

    def _ordered(self, addresses: np.ndarray, size: int, who: np.ndarray, writes: bool, what: str) -> None:
        at, warp = self._bytes(addresses, size), np.repeat(who.astype(np.int32), size)
        when = self.barriers[at // self.pitch]
        unordered = (self.written_at[at] == when) & (self.writer[at] != warp) & (self.writer[at] != SEVERAL)
        if writes:
            # Several warps may write one value that they all hold.
            unordered = (self.read_at[at] == when) & (self.reader[at] != warp)
        if unordered.any():
            first = int(at[unordered][0])
            other = int((self.reader if writes else self.writer)[first])
            raise Unordered(
                f"{what}: byte {first % self.pitch} of warp {int(warp[unordered][0])} and warp {other}, with no barrier"
            )
        since, by = (self.written_at, self.writer) if writes else (self.read_at, self.reader)
        self._note(at, warp, when, since, by)

    def load(self, addresses, size, count, what, who=None):
        found = super().load(addresses, size, count, what)
        if who is not None:
            self._ordered(addresses, size * count, who, False, what)
        return found

    def store(self, addresses, values, size, what, who=None):
        super().store(addresses, values, size, what)
        if who is not None:
            self._ordered(addresses, size * len(values), who, True, what)


class Copies:
    """Asynchronous copies under way: what they bring is there once it was waited for, and poison until then."""

    def __init__(self, threads: int):
        self.groups = np.zeros(threads, dtype=np.int64)
        self.waiting: list[tuple[np.ndarray, ...]] = []

    def add(self, threads: np.ndarray, addresses: np.ndarray, words: np.ndarray) -> None:
        """words [threads, words of 32 bits]"""
        self.waiting.append((threads, self.groups[threads], addresses, words))

    def commit(self, threads: np.ndarray) -> None:
        self.groups[threads] += 1

    def wait(self, threads: np.ndarray, under_way: int, memory: SharedMemory, what: str) -> None:
        """All but the last `under_way` groups of these threads have arrived; -1 means what is in no group too."""
        waits = np.zeros(len(self.groups), dtype=np.bool_)
        waits[threads] = True
        still = []
        for mine, group, addresses, words in self.waiting:
            done = waits[mine] & (group < self.groups[mine] - under_way)
            if done.any():
                columns = [words[done, i] for i in range(words.shape[1])]
                memory.store(addresses[done], columns, 4, what, mine[done] // 32)
            if not done.all():
                still.append((mine[~done], group[~done], addresses[~done], words[~done]))
        self.waiting = still


class Products:
    """Asynchronous matrix products under way (wgmma), which read shared memory until they were waited for."""

    def __init__(self, threads: int):
        self.groups = np.zeros(threads, dtype=np.int64)
        self.under_way: list[tuple[int, int, np.ndarray, np.ndarray, str]] = []

    def add(self, thread: int, reads: list[tuple[np.ndarray, np.ndarray]], what: str) -> None:
        """thread: the first of four warps."""
        self.under_way += [(thread, int(self.groups[thread]), *read, what) for read in reads]

    def commit(self, threads: np.ndarray) -> None:
        self.groups[threads] += 1

    def wait(self, threads: np.ndarray, under_way: int, memory: SharedMemory) -> None:
        waits, still = set(threads[::128].tolist()), []
        for product in self.under_way:
            thread, group, addresses, bits, what = product
            if thread not in waits or group >= self.groups[thread] - under_way:
                still.append(product)
            elif (memory.load(addresses, bits.itemsize, 1, what)[0] != bits).any():
                raise Unordered(f"{what}: its matrix was overwritten before it was waited for")
        self.under_way = still

    def end(self) -> None:
        """At the end of a kernel."""
        if self.under_way:
            raise Unordered(f"{self.under_way[0][-1]}: nobody waits for it")
