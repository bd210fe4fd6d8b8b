"""What each instruction does to a machine: memory, warps and matrices here, the rest by `arithmetic`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import arithmetic, matrix, tensor_memory
from .arithmetic import DTYPES, Unsupported
from .machine import Diverged, Machine
from .memory import UNSIGNED, MemoryFault
from .operands import addresses, reader
from .program import SIZES, Instruction, Program, number

# They order what lockstep orders, or tell the hardware what it may do ahead of time.
NOTHING = (
    "fence", "membar", "wgmma.fence", "griddepcontrol", "setmaxnreg", "nanosleep", "prefetch",
    "mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "tcgen05.wait", "tcgen05.fence", "tcgen05.commit",
    "tcgen05.dealloc", "tcgen05.relinquish_alloc_permit",
)  # fmt: skip
ATOMIC = {
    "add": lambda old, new: old + new, "and": lambda old, new: old & new, "or": lambda old, new: old | new,
    "max": max, "min": min, "exch": lambda old, new: new,
}  # fmt: skip


def _as_tuple(operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _move(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    target, source = instruction.operands
    kind = instruction.parts[-1]
    if isinstance(target, tuple):
        read = reader(program, source, kind)
        bits = 8 * SIZES[kind] // len(target)

        def split(machine: Machine) -> None:
            values = read(machine).view(UNSIGNED[SIZES[kind]])
            for i, name in enumerate(target):
                part = values >> values.dtype.type(bits * i)
                machine.write(name, part.astype(UNSIGNED[bits // 8]))

        return split
    read = reader(program, source, kind)
    return lambda machine: machine.write(target, read(machine))


def _transfer(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """ld and st of global and shared memory."""
    parts = instruction.parts
    size, what = SIZES[parts[-1]], instruction.text
    shared = any(part.startswith("shared") for part in parts)
    if not shared and "global" not in parts:
        raise Unsupported(what)
    if parts[0] == "ld":
        targets, source = instruction.operands[:2]
        at, dtype = addresses(program, source, shared), DTYPES[parts[-1]]

        def load(machine: Machine) -> None:
            where = at(machine), size, len(_as_tuple(targets)), what
            if shared:
                found = machine.shared.load(*where, machine.running() // 32)
            else:
                found = machine.memory.load(*where)
            for name, values in zip(_as_tuple(targets), found):
                machine.write(name, values.view(dtype))

        return load
    target, sources = instruction.operands[:2]
    at = addresses(program, target, shared)
    kind = f"u{8 * size}"
    readers = [reader(program, source, kind) for source in _as_tuple(sources)]

    # A store into another block's memory is ordered by the cluster's barrier.
    elsewhere = any(part == "shared::cluster" for part in parts)

    def store(machine: Machine) -> None:
        given = at(machine), [read(machine) for read in readers], size, what
        if shared:
            machine.shared.store(*given, None if elsewhere else machine.running() // 32)
        else:
            machine.memory.store(*given)

    return store


def _parameter(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """ld.param: from the bytes of the launch."""
    targets, source = instruction.operands
    at, size = addresses(program, source, False), SIZES[instruction.parts[-1]]
    dtype = DTYPES[instruction.parts[-1]]

    def load(machine: Machine) -> None:
        found = machine.parameters.load(at(machine), size, len(_as_tuple(targets)), instruction.text)
        for name, values in zip(_as_tuple(targets), found):
            machine.write(name, values.view(dtype))

    return load


def _in_cluster(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """mapa: where an address of this block's shared memory would be in another block's of the cluster.

    Blocks of a cluster lie behind each other, so it is off by a multiple of their distance and may be negative.
    """
    target, address, rank = instruction.operands
    read, other = reader(program, address, "u32"), reader(program, rank, "u32")

    def map_address(machine: Machine) -> None:
        own = machine.of_active(machine.special["%cluster_ctarank"]).astype(np.int64)
        away = other(machine).astype(np.int64) - own
        if (other(machine) >= program.cluster).any():
            raise MemoryFault(f"{instruction.text}: a block that is not in the cluster")
        machine.write(target, (read(machine).astype(np.int64) + away * machine.shared.pitch).astype(np.int32))

    return map_address


def _copy(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """cp.async: as many bytes as are asked for, of which those beyond the source's are zeros."""
    target, source, size, *taken = instruction.operands
    size = number(size)
    to, come = addresses(program, target, True), addresses(program, source, False)
    read = reader(program, taken[0], "u32") if taken else lambda machine: np.array(size, np.uint32)

    def copy(machine: Machine) -> None:
        there, here = to(machine), come(machine)
        count = np.broadcast_to(read(machine), there.shape)
        if (here % size).any():
            raise MemoryFault(f"{instruction.text}: a source that is no multiple of {size}")
        if not np.isin(count, (0, size)).all():
            raise Unsupported("cp.async of a part")
        words = [np.zeros(len(there), np.uint32) for _ in range(size // 4)]
        some = count != 0
        if some.any():
            for word, found in zip(words, machine.memory.load(here[some], 4, size // 4, instruction.text)):
                word[some] = found
        poison = [np.full(len(there), 0xFFFFFFFF, np.uint32)] * len(words)
        machine.shared.store(there, poison, 4, instruction.text, machine.running() // 32)
        machine.copies.add(machine.running(), there, np.stack(words, axis=1))

    return copy


def _copies(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """cp.async.commit_group, cp.async.wait_group and cp.async.wait_all."""
    what, operands = instruction.parts[2], instruction.operands
    if what == "commit_group":
        return lambda machine: machine.copies.commit(machine.running())
    under_way = {"wait_group": number(operands[0]) if operands else 0, "wait_all": -1}[what]
    return lambda machine: machine.copies.wait(machine.running(), under_way, machine.shared, instruction.text)


def _atomic(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """atom and red."""
    parts = instruction.parts
    kind = parts[-1]
    shared = any(part.startswith("shared") for part in parts)
    name = next((part for part in parts[1:-1] if part in ATOMIC), None)
    if name is None:
        raise Unsupported(instruction.text)
    operands = instruction.operands
    target = operands[0] if parts[0] == "atom" else None
    address, values = operands[-2:]
    at = addresses(program, address, shared)
    readers = [reader(program, value, kind) for value in _as_tuple(values)]
    size, dtype = SIZES[kind], DTYPES[kind]

    def update(machine: Machine) -> None:
        memory = machine.shared if shared else machine.memory
        where = at(machine)
        for i, read in enumerate(readers):
            given = np.array(np.broadcast_to(read(machine), where.shape)).view(dtype)
            before = memory.update(where + i * size, ATOMIC[name], given, instruction.text)
            if target is not None:
                machine.write(_as_tuple(target)[i], before)

    return update


def _by_warp(machine: Machine, instruction: Instruction, values: np.ndarray) -> np.ndarray:
    """[warps, 32] of what the active threads have."""
    return np.broadcast_to(values, machine.whole_warps(instruction) * 32).reshape(-1, 32)


def _shuffle(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    mode = instruction.parts[2]
    target, source, offset, clamp, _ = instruction.operands
    if instruction.parts[-1] != "b32":
        raise Unsupported(instruction.text)
    target, _, came = target.partition("|")
    read, by, limits = (reader(program, operand, "u32") for operand in (source, offset, clamp))

    def shuffle(machine: Machine) -> None:
        values, amount = (_by_warp(machine, instruction, part(machine)) for part in (read, by))
        limit = int(np.ravel(limits(machine))[0])
        lane, amount = np.arange(32)[None, :], amount.astype(np.int64) & 31
        segment = limit >> 8 & 31
        least, most = lane & segment, (lane & segment) | (limit & 31 & ~segment)
        if mode == "up":
            chosen = lane - amount
            inside = chosen >= (lane & segment | (limit & 31))
        else:
            chosen = {"down": lane + amount, "bfly": lane ^ amount, "idx": least | (amount & ~segment)}[mode]
            inside = chosen <= most
        chosen = np.where(inside, chosen, lane)
        machine.write(target, np.take_along_axis(values, chosen, axis=1).reshape(-1))
        if came:
            machine.write(came, np.broadcast_to(inside, chosen.shape).reshape(-1))

    return shuffle


def _reduce(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """redux.sync over the lanes of a mask."""
    *_, name, kind = (part for part in instruction.parts if part != "NaN")
    target, source, members = instruction.operands
    read, mask = reader(program, source, kind), reader(program, members, "u32")
    operation = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]  # fmt: skip
    if kind == "f32" and "NaN" not in instruction.parts:
        operation = {"min": np.fmin, "max": np.fmax}[name]

    def reduce(machine: Machine) -> None:
        values, member = _by_warp(machine, instruction, read(machine)), mask(machine)
        if (member != np.uint32(0xFFFFFFFF)).any():
            raise Unsupported("redux of a part of a warp")
        total = operation.reduce(values, axis=1, dtype=values.dtype)
        machine.write(target, np.repeat(total, 32))

    return reduce


def _match(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """match.any.sync: the lanes whose value is that of the own one."""
    target, source, members = instruction.operands
    if instruction.parts[1] != "any":
        raise Unsupported(instruction.text)
    read, mask = reader(program, source, instruction.parts[-1]), reader(program, members, "u32")

    def match(machine: Machine) -> None:
        values = _by_warp(machine, instruction, read(machine))
        if (mask(machine) != np.uint32(0xFFFFFFFF)).any():
            raise Unsupported("match of a part of a warp")
        equal = values[:, :, None] == values[:, None, :]
        bits = (equal.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=2).astype(np.uint32)
        machine.write(target, bits.reshape(-1))

    return match


def _vote(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    mode = instruction.parts[2]
    target, source, _ = instruction.operands
    read = reader(program, source, "pred")

    def vote(machine: Machine) -> None:
        votes = _by_warp(machine, instruction, read(machine))
        if mode == "ballot":
            bits = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)
            machine.write(target, np.repeat(bits, 32))
        else:
            told = {"any": votes.any(axis=1), "all": votes.all(axis=1)}[mode]
            machine.write(target, np.repeat(told, 32))

    return vote


def _fragments(program: Program, names: tuple[str, ...]) -> Callable[[Machine], np.ndarray]:
    """The registers as [warps, 32, registers]."""
    readers = [reader(program, name, "b32") for name in names]

    def read(machine: Machine) -> np.ndarray:
        size = len(machine.running())
        values = [np.broadcast_to(read(machine), size) for read in readers]
        return np.stack(values, axis=1).reshape(-1, 32, len(names))

    return read


def _write_fragments(machine: Machine, names: tuple[str, ...], values: list[np.ndarray]) -> None:
    for name, value in zip(names, values):
        machine.write(name, np.ascontiguousarray(value).reshape(-1))


def _mma(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    parts = instruction.parts
    shape = next(part for part in parts if part.startswith("m16"))
    if parts[-4] != "f32" or parts[-1] != "f32":
        raise Unsupported(instruction.text)
    target, *sources = instruction.operands
    readers = [_fragments(program, source) for source in sources]

    def multiply(machine: Machine) -> None:
        machine.whole_warps(instruction)
        given = [read(machine) for read in readers]
        _write_fragments(machine, target, matrix.mma(shape, parts[-3], parts[-2], *given))

    return multiply


def _matrices(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """ldmatrix and stmatrix."""
    count = int(next(part for part in instruction.parts if part in ("x1", "x2", "x4"))[1:])
    transposed = "trans" in instruction.parts
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise Unsupported(instruction.text)

    def warps(machine: Machine) -> np.ndarray:
        return np.repeat(machine.running()[::32] // 32, 8)

    if instruction.parts[0] == "ldmatrix":
        target, address = instruction.operands
        at = addresses(program, address, True)

        def load(machine: Machine) -> None:
            rows = _by_warp(machine, instruction, at(machine))
            found = matrix.load_matrices(machine.shared, rows, count, transposed, warps(machine))
            _write_fragments(machine, target, found)

        return load
    address, sources = instruction.operands
    at, read = addresses(program, address, True), _fragments(program, sources)

    def store(machine: Machine) -> None:
        rows, values = _by_warp(machine, instruction, at(machine)), read(machine)
        matrix.store_matrices(
            machine.shared, rows, [values[:, :, i] for i in range(count)], transposed, warps(machine)
        )

    return store


def _warpgroup(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """wgmma.mma_async: m64nNk16 of four warps; B and maybe A come from shared memory by a descriptor."""
    parts = instruction.parts
    m, n, k = matrix.shape_of(parts)
    kinds = parts[-2], parts[-1]
    target, left, right, scale, sign_a, sign_b, *majors = instruction.operands
    from_registers = isinstance(left, tuple)
    if m != 64 or parts[-3] != "f32" or (sign_a, sign_b) != ("1", "1"):
        raise Unsupported(instruction.text)
    major_b = majors[-1] == "0" if majors else True
    major_a = majors[0] == "0" if majors else True
    read_c = _fragments(program, target)
    read_a = _fragments(program, left) if from_registers else reader(program, left, "u64")
    read_b, keep = reader(program, right, "u64"), reader(program, scale, "pred")

    def multiply(machine: Machine) -> None:
        warps = machine.whole_warps(instruction)
        first = np.arange(0, machine.count, 128) if machine.active is None else machine.active[::128]
        size = warps * 32
        if size % 128 or (first % 128).any():
            raise Diverged(f"a part of four warps reaches {instruction.text}")
        a, b = read_a(machine), np.broadcast_to(read_b(machine), size).reshape(-1, 128)
        c = matrix.accumulators(read_c(machine)).reshape(-1, 64, n)
        kept = np.broadcast_to(keep(machine), size).reshape(-1, 128)[:, :1, None]
        c = np.where(kept, c, np.float32(0))
        if from_registers:
            tiles = matrix.a_fragment(a, kinds[0]).reshape(-1, 64, k)
        else:
            a = np.broadcast_to(a, size).reshape(-1, 128)
        results = np.empty_like(c)
        for i, thread in enumerate(first):
            pitch = int(machine.shared_start[thread])
            if (b[i] != b[i, 0]).any():
                raise Diverged(f"threads disagree about a matrix in {instruction.text}")
            reads: list = []
            columns = matrix.described(machine.shared, int(b[i, 0]), pitch, n, k, kinds[1], major_b, reads)
            rows = tiles[i] if from_registers else matrix.described(
                machine.shared, int(a[i, 0]), pitch, m, k, kinds[0], major_a, reads)  # fmt: skip
            results[i] = matrix.product(rows, columns.T, c[i])
            machine.products.add(int(thread), reads, instruction.text)
        _write_fragments(machine, target, matrix.from_accumulators(results.reshape(-1, 16, n)))

    return multiply


def _products(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """wgmma.commit_group and wgmma.wait_group."""
    if instruction.parts[1] == "commit_group":
        return lambda machine: machine.products.commit(machine.running())
    under_way = number(instruction.operands[0])
    return lambda machine: machine.products.wait(machine.running(), under_way, machine.shared)


def _counting_barrier(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """bar.red.popc: in how many threads of the block a predicate holds."""
    target, number_of_barrier, source = instruction.operands
    if instruction.parts[2] != "popc" or number_of_barrier != "0":
        raise Unsupported(instruction.text)
    read = reader(program, source, "pred")

    def count(machine: Machine) -> None:
        machine.barrier()
        holds = np.broadcast_to(read(machine), len(machine.running())).reshape(-1, machine.threads)
        machine.write(target, np.repeat(holds.sum(axis=1, dtype=np.uint32), machine.threads))

    return count


def _barrier(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    if instruction.parts[1] == "warp":
        return lambda machine: machine.whole_warps(instruction)
    if instruction.parts[1] != "cluster" and instruction.operands != ("0",):
        raise Unsupported(instruction.text)
    return lambda machine: machine.barrier()


def _compare_halves(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """setp of two numbers of 16 bits in a register: the first predicate is that of the lower one."""
    targets, *sources = instruction.operands
    kind = instruction.parts[-1].removesuffix("x2")
    compare = arithmetic.comparison(instruction.parts[1], kind)
    readers = [reader(program, source, "u32") for source in sources]
    if len(readers) != 2:
        raise Unsupported(instruction.text)

    def both(machine: Machine) -> None:
        words = [read(machine) for read in readers]
        for shift, target in zip((0, 16), targets.split("|")):
            halves = [(word >> np.uint32(shift)).astype(np.uint16).view(DTYPES[kind]) for word in words]
            machine.write(target, np.asarray(compare(*halves)))

    return both


def _policy(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    """createpolicy: what a cache is told to keep changes no value."""
    target = instruction.operands[0]
    return lambda machine: machine.write(target, np.uint64(0))


def _compute(program: Program, instruction: Instruction) -> Callable[[Machine], None]:
    result, kinds, function = arithmetic.function(instruction.parts)
    target, *sources = instruction.operands
    if isinstance(kinds, str):
        kinds = (kinds,) * len(sources)
    readers = [reader(program, source, kind) for source, kind in zip(sources, kinds, strict=True)]
    dtype = DTYPES[result]

    def compute(machine: Machine) -> None:
        values = function(*(read(machine) for read in readers))
        machine.write(target, np.asarray(values).view(dtype))

    return compute


SPECIAL = {
    "mov": _move, "ld": _transfer, "st": _transfer, "atom": _atomic, "red": _atomic, "shfl": _shuffle,
    "redux": _reduce, "match": _match, "vote": _vote, "mma": _mma, "ldmatrix": _matrices, "stmatrix": _matrices,
    "bar": _barrier, "mapa": _in_cluster,
}  # fmt: skip


def decoded(program: Program, instruction: Instruction) -> Callable[[Machine], None] | None:
    """What an instruction does to a machine; None where that is nothing."""
    name = ".".join(instruction.parts)
    if name.startswith(NOTHING):
        return None
    if name.startswith("ld.param"):
        make = _parameter
    elif name.startswith(("cp.async.ca.", "cp.async.cg.")):
        make = _copy
    elif name.startswith(("cp.async.commit_group", "cp.async.wait_")):
        make = _copies
    elif name.startswith("wgmma.mma_async"):
        make = _warpgroup
    elif name.startswith(("wgmma.commit_group", "wgmma.wait_group")):
        make = _products
    elif name.startswith(("tcgen05.ld", "tcgen05.st")):
        make = tensor_memory.transfer
    elif name.startswith("tcgen05.mma."):
        make = tensor_memory.multiply
    elif name.startswith("tcgen05.alloc"):
        make = tensor_memory.allocate
    elif name.startswith("mbarrier.try_wait"):
        make = tensor_memory.waited
    elif name.startswith("elect.sync"):
        make = tensor_memory.elect
    elif name.startswith("bar.red"):
        make = _counting_barrier
    elif name.startswith("barrier."):
        make = _barrier
    elif instruction.parts[0] == "setp" and instruction.parts[-1] in ("f16x2", "bf16x2"):
        make = _compare_halves
    elif name.startswith("createpolicy"):
        make = _policy
    elif name.startswith("cvta"):
        make = _move
    else:
        make = SPECIAL.get(instruction.parts[0], _compute)
    try:
        return make(program, instruction)
    except (KeyError, ValueError, StopIteration) as error:
        raise Unsupported(f"{program.name}: {instruction.text}: {error!r}") from error
