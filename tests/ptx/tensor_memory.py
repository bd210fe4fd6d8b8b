"""Tensor memory and the matrix products of sm_100 (tcgen05), for one block at a time.

A block has 128 lanes of 512 columns of 32 bits. An address has the lane in its upper half and the column in the lower
one. Products are carried out where they are issued, so barriers that announce their end have nothing to wait for.

Sources: the PTX ISA; CUTLASS's `InstrDescriptor` (cute/arch/mma_sm100_desc.hpp) for the fields of the instruction
descriptor and its copy traits for the threads of the shape 16x32bx2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import matrix
from .arithmetic import Unsupported
from .machine import Diverged, Machine
from .memory import MemoryFault
from .operands import reader
from .program import Address, Instruction, Program, number

LANES, COLUMNS = 128, 512
# Of the instruction descriptor's field of a matrix's numbers.
KINDS = {0: "f16", 1: "bf16"}


class TensorMemory:
    """The tensor memory of the blocks that run at once."""

    def __init__(self, blocks: int):
        self.cells = np.full((blocks, LANES, COLUMNS), 0xFFFFFFFF, dtype=np.uint32)
        self.taken = np.zeros(blocks, dtype=np.int64)


def memory_of(machine: Machine) -> TensorMemory:
    if machine.tensor_memory is None:
        machine.tensor_memory = TensorMemory(machine.count // machine.threads)
    return machine.tensor_memory


def _of_active(machine: Machine, values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values, len(machine.running()))


def _address(program: Program, operand: Address) -> Callable[[Machine], np.ndarray]:
    base = reader(program, operand.base, "u32")
    return lambda machine: _of_active(machine, base(machine)).astype(np.int64) + operand.offset


def allocate(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """tcgen05.alloc: the address of the columns goes to shared memory."""
    target, count = instruction.operands
    base, columns = reader(program, target.base, "s32"), number(count)

    def take(machine: Machine) -> None:
        machine.whole_warps(instruction)
        memory = memory_of(machine)
        for thread in machine.running()[::32]:
            block = thread // machine.threads
            start = memory.taken[block]
            if start + columns > COLUMNS:
                raise MemoryFault(f"{instruction.text}: {start} of {COLUMNS} columns are taken")
            memory.taken[block] += columns
            where = (
                np.ravel(base(machine))[:1].astype(np.int64) + target.offset + machine.shared_start[thread]
            )
            machine.shared.store(where, [np.array([start], np.uint32)], 4, instruction.text)

    return take


def transfer(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """tcgen05.ld and tcgen05.st of the shapes 32x32b and 16x32bx2."""
    parts = instruction.parts
    shape, load = next(part for part in parts if part[0].isdigit()), parts[1] == "ld"
    if (
        shape not in ("32x32b", "16x32bx2")
        or parts[-1] != "b32"
        or "pack::16b" in parts
        or "unpack::16b" in parts
    ):
        raise Unsupported(instruction.text)
    if load:
        registers, address, *split = instruction.operands
    elif shape == "16x32bx2":
        address, *split, registers = instruction.operands
    else:
        (address, registers), split = instruction.operands, ()
    apart = number(split[0]) if split else 0
    at, names = _address(program, address), registers
    readers = [reader(program, name, "b32") for name in names]

    def places(machine: Machine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        machine.whole_warps(instruction)
        threads, where = machine.running(), at(machine)
        lane, column = where >> 16, where & 0xFFFF
        if (lane // 32 != threads % machine.threads // 32 % 4).any():
            raise MemoryFault(f"{instruction.text}: a warp at another warp's lanes")
        if shape == "32x32b":
            lane = lane + threads % 32
        else:
            lane, column = lane + threads % 16, column + threads % 32 // 16 * apart
        if (column + len(names) > COLUMNS).any() or (lane >= LANES).any():
            raise MemoryFault(f"{instruction.text}: outside of tensor memory")
        return threads // machine.threads, lane, column

    def execute(machine: Machine) -> None:
        block, lane, column = places(machine)
        cells = memory_of(machine).cells
        for i, name in enumerate(names):
            if load:
                machine.write(name, cells[block, lane, column + i])
            else:
                cells[block, lane, column + i] = readers[i](machine)

    return execute


def _lanes(first: int, rows: int) -> np.ndarray:
    """Where the rows of a matrix lie: 64 of them in the first 16 of every 32 lanes."""
    row = np.arange(rows)
    return first + (row if rows == LANES else row // 16 * 32 + row % 16)


def multiply(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """tcgen05.mma of 16-bit floats: m x n x 16, A from shared or tensor memory, B from shared memory."""
    if instruction.parts[2:] != ("cta_group::1", "kind::f16") or len(instruction.operands) != 5:
        raise Unsupported(instruction.text)
    target, left, right, described_by, keeps = instruction.operands
    at_d = _address(program, target)
    in_tensor_memory = isinstance(left, Address)
    read_a = _address(program, left) if in_tensor_memory else reader(program, left, "u64")
    read_b, read_i = reader(program, right, "u64"), reader(program, described_by, "u32")
    keep = reader(program, keeps, "pred")
    depth = 16

    def one(machine: Machine, thread: int, d: int, a: int, b: int, code: int, kept: bool) -> None:
        kind_a, kind_b = KINDS.get(code >> 7 & 7), KINDS.get(code >> 10 & 7)
        # Sparse, saturated, not fp32, negated.
        if kind_a is None or kind_b is None or code & 0xF or code >> 4 & 3 != 1 or code >> 13 & 3:
            raise Unsupported(f"{instruction.text}: descriptor {code:#x}")
        n, m = (code >> 17 & 0x3F) * 8, (code >> 24 & 0x1F) * 16
        if m not in (64, 128):
            raise Unsupported(f"{instruction.text}: {m} rows")
        pitch = int(machine.shared_start[thread])
        cells = memory_of(machine).cells[thread // machine.threads]
        columns = matrix.described(machine.shared, b, pitch, n, depth, kind_b, not code >> 16 & 1)
        if in_tensor_memory:
            packed = cells[_lanes(a >> 16, m)][:, (a & 0xFFFF) + np.arange(depth // 2)]
            rows = matrix.elements(np.ascontiguousarray(packed).view(np.uint16), kind_a)
        else:
            rows = matrix.described(machine.shared, a, pitch, m, depth, kind_a, not code >> 15 & 1)
        lanes, first = _lanes(d >> 16, m), d & 0xFFFF
        if lanes[-1] >= LANES or first + n > COLUMNS:
            raise MemoryFault(f"{instruction.text}: outside of tensor memory")
        window = cells[lanes][:, first : first + n].view(np.float32)
        total = matrix.product(rows, columns.T, window if kept else np.zeros_like(window))
        cells[lanes[:, None], first + np.arange(n)] = total.view(np.uint32)

    def execute(machine: Machine) -> None:
        threads = machine.running()
        if len(np.unique(threads // machine.threads)) != len(threads):
            raise Diverged(f"several threads of a block issue {instruction.text}")
        given = [_of_active(machine, read(machine)) for read in (at_d, read_a, read_b, read_i, keep)]
        for thread, d, a, b, code, kept in zip(threads, *given):
            one(machine, int(thread), int(d), int(a), int(b), int(code), bool(kept))

    return execute


def elect(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """elect.sync: the first lane of each warp."""
    target, chosen = instruction.operands[0].split("|")

    def execute(machine: Machine) -> None:
        machine.whole_warps(instruction)
        first = machine.running() % 32 == 0
        machine.write(chosen, first)
        machine.write(target, np.zeros(len(first), np.uint32))

    return execute


def waited(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """mbarrier.try_wait: what it waits for has happened."""
    target = instruction.operands[0]
    return lambda machine: machine.write(target, np.ones(len(machine.running()), np.bool_))
