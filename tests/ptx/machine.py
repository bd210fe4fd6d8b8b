"""The state of the blocks of a launch that run at once: registers, memory and who is active."""

from __future__ import annotations

import numpy as np

from .memory import POISON, UNSIGNED, Copies, Memory, Products, SharedMemory
from .program import Instruction, Program


class Diverged(RuntimeError):
    """An instruction of a whole warp or block that a part of its threads has reached."""


class Machine:
    """Some blocks of a launch. `active` is None where all threads run, else the numbers of those that do."""

    def __init__(
        self,
        program: Program,
        arguments: bytes,
        blocks: np.ndarray,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        memory: Memory,
    ):
        self.program, self.threads, self.memory = program, threads, memory
        self.parameters = Memory(
            "parameter", np.frombuffer(arguments + b"\0" * 16, np.uint8), 0, [(0, len(arguments))]
        )
        self.count = len(blocks) * threads
        self.shared = SharedMemory(len(blocks), max(shared, program.static_shared))
        self.shared_start = np.repeat(np.arange(len(blocks), dtype=np.int64) * self.shared.pitch, threads)
        self.copies, self.products = Copies(self.count), Products(self.count)
        self.registers: dict[str, np.ndarray] = {}
        self.active: np.ndarray | None = None
        # Warps of the same blocks have passed the barrier at another place.
        self.has_met = False
        # Made where it is first used.
        self.tensor_memory = None
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32, "%ntid.x": threads}
        places = np.unravel_index(blocks, tuple(reversed(grid)))
        for axis, place, size in zip("xyz", reversed(places), grid):
            self.special[f"%ctaid.{axis}"] = np.repeat(place.astype(np.uint32), threads)
            self.special[f"%nctaid.{axis}"] = size
            if axis != "x":
                self.special[f"%tid.{axis}"], self.special[f"%ntid.{axis}"] = 0, 1
        # Clusters are cut along x.
        rank = self.special["%ctaid.x"] % program.cluster
        self.special |= {
            "%cluster_ctarank": rank,
            "%cluster_ctaid.x": rank,
            "%cluster_nctaid.x": program.cluster,
        }
        self.special = {
            name: np.broadcast_to(value, self.count).astype(np.uint32) for name, value in self.special.items()
        }

    def of_active(self, values: np.ndarray) -> np.ndarray:
        return values if self.active is None else values[self.active]

    def running(self) -> np.ndarray:
        """The numbers of the active threads."""
        return np.arange(self.count) if self.active is None else self.active

    def register(self, name: str) -> np.ndarray:
        """What all threads have in a register."""
        found = self.registers.get(name)
        if found is None:
            size = self.program.registers[name]
            found = np.full(self.count * size, POISON, dtype=np.uint8).view(UNSIGNED[size])
            self.registers[name] = found
        return found

    def write(self, name: str, values: np.ndarray) -> None:
        if name == "_":
            return
        size = self.program.registers[name]
        if values.dtype.itemsize == size:
            values = values.view(UNSIGNED[size])
        else:
            # With its sign, or with zeros.
            signed = values.dtype.kind == "i"
            values = values.astype(np.dtype(f"{'i' if signed else 'u'}{size}")).view(UNSIGNED[size])
        if self.active is None:
            self.registers[name] = np.array(np.broadcast_to(values, self.count))
        else:
            kept = self.register(name).copy()
            kept[self.active] = values
            self.registers[name] = kept

    def whole_warps(self, instruction: Instruction) -> int:
        """How many warps run; each has to run whole."""
        if self.active is None:
            return self.count // 32
        warps, here = np.unique(self.active // 32, return_counts=True)
        if (here != 32).any():
            raise Diverged(f"a part of a warp reaches {instruction.text}")
        return len(warps)

    def barrier(self) -> None:
        """What these blocks did before is ordered with what they do from now on."""
        if not self.has_met:
            self.shared.barriers[np.unique(self.running() // self.threads)] += 1
