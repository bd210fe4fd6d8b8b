"""A kernel and its launches: blocks in lockstep, the threads that branched apart one group after the other."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from .instructions import decoded
from .machine import Diverged, Machine
from .memory import Memory, global_memory
from .program import Program, waits_for_all

# Where tests look for what launches have read and stored: (kernel, its global memory), while it is a list.
traffic: list[tuple[str, Memory]] | None = None
# Threads that run at once at most, and the block number that ended threads have.
THREADS_AT_ONCE = 4096
ENDED = np.iinfo(np.int64).max


def in_flow(program: Program) -> list[int]:
    """The program's blocks in an order in which what can follow a block comes behind it, but for loops' ways back.

    In the text the end of branches may stand between them: threads that reach it first would not wait for the others.
    Of two ways the one that is further down in the text comes last: out of a loop, not through it once more.
    """

    def ways(number: int) -> list[int]:
        found = set()
        for instruction in program.blocks[number]:
            if instruction.parts[0] == "bra":
                found.add(program.labels[instruction.operands[0]])
            if instruction.parts[0] in ("bra", "ret", "exit") and instruction.guard is None:
                return sorted(found)
        if number + 1 < len(program.blocks):
            found.add(number + 1)
        return sorted(found)

    seen, ended, path = {0}, [], [(0, ways(0))]
    while path:
        left = path[-1][1]
        if left:
            way = left.pop()
            if way not in seen:
                seen.add(way)
                path.append((way, ways(way)))
        else:
            ended.append(path.pop()[0])
    return ended[::-1]


class Kernel:
    """A parsed kernel, every instruction decoded once."""

    def __init__(self, program: Program):
        self.program = program
        order = in_flow(program)
        place = {number: i for i, number in enumerate(order)}
        self.blocks = [
            [(instruction, None if instruction.parts[0] in ("bra", "ret", "exit") else decoded(program, instruction))
             for instruction in program.blocks[number]]
            for number in order
        ]  # fmt: skip
        # Behind each block the one that follows it in the text.
        self.following = [place.get(number + 1, ENDED) for number in order]
        self.labels = {name: place[number] for name, number in program.labels.items() if number in place}
        self.barriers = {i for i, block in enumerate(self.blocks) if block and waits_for_all(block[0][0])}

    def arguments(self, values: list[bytes]) -> bytes:
        """The launch's parameters as one string, each where the kernel reads it."""
        parameters = self.program.parameters
        if len(values) != len(parameters):
            raise ValueError(f"{len(parameters)} parameters expected, got {len(values)}")
        packed = b""
        for (name, (start, size)), value in zip(parameters.items(), values):
            if len(value) != size:
                raise ValueError(f"{name} takes {size} bytes, got {len(value)}")
            packed += b"\0" * (start - len(packed)) + value
        return packed

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared: int, values: list[bytes],
        stretches: list[tuple[int, int]],
    ) -> None:  # fmt: skip
        """Runs all blocks of a grid; `stretches` are the addresses [start, end) that it may touch."""
        total, cluster = grid[0] * grid[1] * grid[2], self.program.cluster
        if grid[0] % cluster:
            raise ValueError(f"{self.program.name}: {grid[0]} blocks are no clusters of {cluster}")
        at_once = max(1, THREADS_AT_ONCE // threads // cluster) * cluster
        memory, arguments = global_memory(stretches), self.arguments(values)
        if traffic is not None:
            traffic.append((self.program.name, memory))
        for first in range(0, total, at_once):
            blocks = np.arange(first, min(first + at_once, total))
            machine = Machine(self.program, arguments, blocks, grid, threads, shared, memory)
            with np.errstate(all="ignore"):
                self.run(machine)

    def run(self, machine: Machine) -> None:
        """`places` has the block of instructions that each thread is about to run."""
        places = np.zeros(machine.count, dtype=np.int64)
        while groups := self.next(places, machine.threads):
            for machine.has_met, (number, here) in enumerate(groups):
                machine.active = None if here.all() else np.flatnonzero(here)
                self.run_block(machine, number, places)
            machine.has_met = False
        machine.products.end()

    def next(self, places: np.ndarray, threads: int) -> list[tuple[int, np.ndarray]]:
        """[(the instructions that run next, by which threads)]; none where all have ended.

        Who is behind goes first, so that threads meet again where their branches end (see `in_flow`). At a barrier they
        wait for the others of their block, whose warps may come to it at another place of the program.
        """
        lowest = int(places.min())
        if lowest >= len(self.blocks):
            return []
        if lowest not in self.barriers:
            return [(lowest, places == lowest)]
        for number in np.unique(places):
            if number >= len(self.blocks):
                break
            here = places == number
            if number in self.barriers:
                here &= here.reshape(-1, threads).all(axis=1).repeat(threads)
            if here.any():
                return [(int(number), here)]
        text = self.blocks[lowest][0][0].text
        for of_block in places.reshape(-1, threads):
            found = np.unique(of_block)
            whole_warps = (of_block.reshape(-1, 32) == of_block[::32, None]).all()
            alike = all(n in self.barriers and self.blocks[n][0][0].text == text for n in found)
            if whole_warps and alike:
                same = (places.reshape(-1, threads) == of_block).all(axis=1).repeat(threads)
                return [(int(number), same & (places == number)) for number in found]
        raise Diverged(f"{self.program.name}: only a part of a block reaches {text}")

    def run_block(self, machine: Machine, block: int, places: np.ndarray) -> None:
        everyone = machine.active
        for instruction, execute in self.blocks[block]:
            machine.active = everyone
            if instruction.guard is not None:
                name, negated = instruction.guard
                holds = (machine.register(name) != 0) != negated
                if everyone is not None:
                    holds = holds[everyone]
                if not holds.any():
                    continue
                if not holds.all():
                    machine.active = np.flatnonzero(holds) if everyone is None else everyone[holds]
            kind = instruction.parts[0]
            if kind == "bra":
                target = self.labels[instruction.operands[0]]
            elif kind in ("ret", "exit"):
                target = ENDED
            else:
                target = None
            if target is not None:
                _go(places, everyone, self.following[block])
                _go(places, machine.active, target)
                return
            if execute is not None:
                execute(machine)
        _go(places, everyone, self.following[block])


def _go(places: np.ndarray, who: np.ndarray | None, where: int) -> None:
    places[slice(None) if who is None else who] = where


def pack(kind: str, value) -> bytes:
    """A launch's argument as bytes; `kind` as Triton writes it: "*fp32", "i32", "fp32", "u1", ..."""
    if kind.startswith("*"):
        return struct.pack("<Q", 0 if value is None else value.data_ptr())
    if kind in ("fp32", "f32"):
        return struct.pack("<f", float(value))
    if kind in ("fp64", "f64"):
        return struct.pack("<d", float(value))
    form = {"i1": "<b", "u1": "<b", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I",
            "i64": "<q", "u64": "<Q"}[kind]  # fmt: skip
    return struct.pack(form, int(value))


def stretches_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The addresses of the elements of tensors, with the gaps that strides leave."""
    found = []
    for tensor in tensors:
        start = tensor.data_ptr()
        if start and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            found.append((start, start + (last + 1) * tensor.element_size()))
    return found
