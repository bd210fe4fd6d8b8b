"""The text of a PTX kernel as blocks of instructions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

# Bytes of a register or an element by the last part of its type's name.
SIZES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "s16x2": 4, "u16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8,
}  # fmt: skip
# Comments, and lines for debuggers, which end without a semicolon.
UNREAD = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*\.(?:loc|file)\s[^\n]*", re.S | re.M)
PARAMETER = re.compile(r"\.param\s+((?:\.\w+\s+(?:\d+\s+)?)+)(\w+)(?:\[(\d+)\])?")
CLUSTER = re.compile(r"\.reqnctapercluster\s+(\d+)")
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
LABEL = re.compile(r"[\w$]+$")


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register or a symbol."""

    base: str
    offset: int


Operand = "str | Address | tuple[str, ...]"


@dataclass(frozen=True)
class Instruction:
    """One statement. `parts` is the name split at its dots; `guard` is (predicate, whether it is negated)."""

    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str


@dataclass
class Program:
    """Instructions by block, the block of each label, bytes of each register, parameters and shared symbols.

    parameters: name to (where it begins in the bytes of a launch, bytes), in order. shared: name to offset; the array
    of no length lies behind the others. cluster: blocks that share their memory.
    """

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    cluster: int = 1


def waits_for_all(instruction: Instruction) -> bool:
    """Whether it is a barrier of a block or of a cluster, which then is the first instruction of its basic block."""
    return instruction.parts[0] in ("bar", "barrier") and instruction.parts[1] != "warp"


def _split(text: str) -> list[str]:
    """At the commas outside of brackets and braces."""
    pieces, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def number(text: str) -> int:
    """An integer literal."""
    text = text.rstrip("U")
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    return sign * int(digits, 16 if digits.lower().startswith("0x") else 10)


def _operand(text: str, names: dict[str, str]) -> Operand:
    if text.startswith("{"):
        return tuple(names.get(piece, piece) for piece in _split(text[1:-1]))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(names.get(base, base), number(offset) if offset else 0)
    return names.get(text, text)


class _Parser:
    def __init__(self, name: str):
        self.program = Program(name)
        # Names that an inner scope declares, as inline assembly does, to names of their own.
        self.scopes: list[dict[str, str]] = [{}]

    def names(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for scope in self.scopes:
            found |= scope
        return found

    def declare(self, kind: str, declared: str) -> None:
        for piece in _split(declared):
            stem, _, count = piece.partition("<")
            for i in range(int(count[:-1])) if count else (None,):
                plain = stem if i is None else f"{stem}{i}"
                unique = plain if len(self.scopes) == 1 else f"{plain}@{len(self.program.registers)}"
                self.scopes[-1][plain] = unique
                self.program.registers[unique] = SIZES[kind]

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, declared = text.split(None, 2)
            self.declare(kind[1:], declared)
            return
        if text.startswith("."):
            if text.startswith(".pragma"):
                return
            raise NotImplementedError(f"{self.program.name}: {text}")
        names = self.names() if len(self.scopes) > 1 else {}
        guard, rest = None, text
        if text.startswith("@"):
            predicate, rest = text[1:].split(None, 1)
            negated = predicate.startswith("!")
            guard = names.get(predicate.lstrip("!"), predicate.lstrip("!")), negated
        opcode, _, operands = rest.partition(" ") if " " in rest else (rest, "", "")
        instruction = Instruction(
            tuple(opcode.split(".")),
            tuple(_operand(piece, names) for piece in _split(operands)),
            guard,
            text,
        )
        if waits_for_all(instruction) and self.program.blocks[-1]:
            self.program.blocks.append([])
        self.program.blocks[-1].append(instruction)
        if instruction.parts[0] in ("bra", "ret", "exit"):
            self.program.blocks.append([])

    def label(self, name: str) -> None:
        if self.program.blocks[-1]:
            self.program.blocks.append([])
        if len(self.scopes) > 1:
            # Of inline assembly, which may stand there several times; its branches go back.
            self.scopes[-1][name] = name = f"{name}@{len(self.program.labels)}"
        self.program.labels[name] = len(self.program.blocks) - 1

    def body(self, text: str) -> None:
        start, depth = 0, 0
        for found in re.finditer(r"[{};:]", text):
            character, i = found[0], found.start()
            before = text[start:i].strip()
            if character == "{" and not before:
                self.scopes.append({})
            elif character == "{":
                depth += 1
                continue
            elif character == "}" and depth:
                depth -= 1
                continue
            elif character == "}":
                self.scopes.pop()
            elif character == ":" and not LABEL.match(before):
                continue
            elif character == ":":
                self.label(before)
            elif before:
                self.statement(" ".join(before.split()))
            start = i + 1


def _unrounded(instruction: Instruction, bases: tuple[str, ...]) -> bool:
    return (
        instruction.parts[0] in bases
        and instruction.parts[-1] == "f32"
        and set(instruction.parts[1:-1]) <= {"ftz"}
        and instruction.guard is None
    )


def contracted(block: list[Instruction]) -> list[Instruction]:
    """The block with products and sums fused wherever the assembler is free to: where neither names a rounding.

    "fms" and "fnma", which PTX has not, are a * b - c and c - a * b.
    """
    result, products = [], {}
    for instruction in block:
        fused = instruction
        if _unrounded(instruction, ("add", "sub")):
            target, left, right = instruction.operands
            for product, other, name in (
                (left, right, "fma" if instruction.parts[0] == "add" else "fms"),
                (right, left, "fma" if instruction.parts[0] == "add" else "fnma"),
            ):
                found = products.get(product)
                if found is not None and found.parts[1:] == instruction.parts[1:]:
                    parts = (name, "rn", *instruction.parts[1:])
                    operands = (target, *found.operands[1:], other)
                    fused = Instruction(parts, operands, None, f"{instruction.text}, fused with {found.text}")
                    break
        written = {
            name
            for operand in instruction.operands[:1]
            for name in (operand if isinstance(operand, tuple) else (operand,))
        }
        products = {
            name: product
            for name, product in products.items()
            if name not in written and not written & set(product.operands[1:])
        }
        if _unrounded(instruction, ("mul",)):
            products[instruction.operands[0]] = instruction
        result.append(fused)
    return result


def _inside(text: str) -> str:
    """What stands between the first brace and the one that closes it."""
    start, depth = text.index("{") + 1, 0
    for found in re.finditer(r"[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[start : found.start()]
    raise ValueError("a brace is not closed")


def _parse_entry(text: str, head: str) -> Program:
    """A kernel, from its name on; `head` is what the module declares before all of them."""
    name, _, rest = text.partition("(")
    declared, _, rest = rest.partition(")")
    parser = _Parser(name.strip())
    program = parser.program
    end = 0
    for attributes, parameter, count in PARAMETER.findall(declared):
        words = attributes.replace(".", " ").split()
        kind = next(word for word in words if word in SIZES)
        size = int(count or 1) * SIZES[kind]
        # Those of a struct name their alignment; that of ".ptr" is about what a pointer points to.
        align = int(words[words.index("align") + 1]) if count else size
        start = -(-end // align) * align
        program.parameters[parameter] = start, size
        end = start + size
    found = CLUSTER.search(rest[: rest.index("{")])
    program.cluster = int(found[1]) if found else 1
    body = _inside(rest)
    for align, symbol, size in SHARED.findall(head + body):
        program.shared[symbol] = -(-program.static_shared // int(align)) * int(align)
        program.static_shared = program.shared[symbol] + int(size or 0)
    parser.body(SHARED.sub("", body))
    program.blocks = [contracted(block) for block in program.blocks]
    return program


def entries_of(text: str) -> dict[str, Callable[[], Program]]:
    """The kernels of a PTX module by name, each parsed when it is called for: of a library few are ever launched."""
    head, *entries = UNREAD.sub("", text).split(".entry")
    return {
        entry.partition("(")[0].strip(): functools.partial(_parse_entry, entry, head) for entry in entries
    }


def parse(text: str) -> Program:
    """The one kernel of a PTX module."""
    (entry,) = entries_of(text).values()
    return entry()
