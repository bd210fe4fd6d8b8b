"""How an instruction reads what it names: registers, literals, special registers, addresses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import DTYPES, Unsupported
from .machine import Machine
from .memory import UNSIGNED
from .program import Address, Program, number

Reader = Callable[[Machine], np.ndarray]


def literal(text: str, dtype: np.dtype) -> np.ndarray:
    if text.startswith(("0f", "0F")):
        value = np.uint32(int(text[2:], 16)).view(np.float32)
    elif text.startswith(("0d", "0D")):
        value = np.uint64(int(text[2:], 16)).view(np.float64)
    elif "." in text:
        value = np.float64(text)
    else:
        size = np.dtype(dtype).itemsize
        if np.dtype(dtype).kind == "f":
            return np.array(number(text), dtype=dtype)
        if dtype == np.bool_:
            return np.array(number(text) != 0)
        bits = number(text) & ((1 << 8 * size) - 1)
        return np.array(bits, dtype=UNSIGNED[size]).view(dtype)
    # Bits of a float where an integer type is asked for stay bits.
    return value.view(dtype) if np.dtype(dtype).kind != "f" else np.asarray(value, dtype=dtype)


def reader(program: Program, operand, kind: str) -> Reader:
    """Reads an operand as an array of the active threads; a literal has no dimension."""
    dtype = np.dtype(DTYPES[kind])
    if isinstance(operand, Address):
        raise Unsupported(f"an address as {kind}")
    if isinstance(operand, tuple):
        return _joined(program, operand, dtype)
    if operand in program.registers:
        size = program.registers[operand]

        def read(machine: Machine) -> np.ndarray:
            values = machine.of_active(machine.register(operand))
            if dtype == np.bool_:
                return values != 0
            if size != dtype.itemsize:
                values = values.astype(UNSIGNED[dtype.itemsize])
            return values.view(dtype)

        return read
    if operand.startswith("%"):
        return lambda machine: machine.of_active(machine.special[operand]).astype(dtype)
    symbols = program.shared | {name: start for name, (start, _) in program.parameters.items()}
    if operand in symbols:
        at = np.array(symbols[operand], dtype=dtype)
        return lambda machine: at
    value = literal(operand, dtype)
    return lambda machine: value


def _joined(program: Program, parts: tuple[str, ...], dtype: np.dtype) -> Reader:
    """{a, b, ...}: a is the lowest part."""
    size = dtype.itemsize // len(parts)
    kind = {1: "b8", 2: "b16", 4: "b32"}[size]
    readers = [reader(program, part, kind) for part in parts]

    def read(machine: Machine) -> np.ndarray:
        values = [read(machine) for read in readers]
        shape = np.broadcast_shapes(*(np.shape(value) for value in values)) or (1,)
        total = np.zeros(shape, UNSIGNED[dtype.itemsize])
        for i, value in enumerate(values):
            total |= value.astype(total.dtype) << total.dtype.type(8 * size * i)
        return total.view(dtype)

    return read


def addresses(program: Program, operand: Address, shared: bool) -> Reader:
    """Where a load or a store goes, as int64 [active threads]; in shared memory with the block's own start."""
    # Signed, since another block of a cluster may lie before this one.
    base = reader(program, operand.base, "s32" if shared else "u64")

    def read(machine: Machine) -> np.ndarray:
        start = machine.of_active(machine.shared_start)
        at = base(machine).astype(np.int64) + operand.offset
        return at + start if shared else np.broadcast_to(at, start.shape)

    return read
