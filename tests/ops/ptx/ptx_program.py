"""PTX text as a program: entries, their parameters, shared memory, registers and instructions.

Only what nvcc emits for csrc/cuda is understood; anything else is an error, never a guess.
Source of the notation: PTX ISA 9.0, chapters 4 (syntax), 5 (state spaces) and 10 (directives).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
BYTES |= {"b64": 8, "u64": 8, "s64": 8}
SHARED_ALIGNMENT = 128
"""Dynamic shared memory begins after the static kind, at a multiple of this."""


@dataclass(frozen=True)
class Instruction:
    """One statement: ``@!%p1 opcode.a.b x, {y, z}, [w+4];`` and the line it stands on, counted within its entry."""

    opcode: str
    operands: tuple[str, ...] = ()
    guard: str = ""
    negated: bool = False
    line: int = 0

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.opcode} (line {self.line})"


NOTHING = Instruction("nothing")
"""Takes an instruction's place in a mutated kernel."""


@dataclass(frozen=True)
class Kernel:
    """One entry."""

    name: str
    threads: int
    """Of a block (``.maxntid``: csrc/cuda starts its kernels with exactly that many)."""
    parameters: tuple[tuple[str, int, int], ...]
    """Name, offset and bytes of each, in order."""
    symbols: dict[str, int]
    """Addresses of parameters, constants and shared arrays, each within its own space."""
    constants: bytes
    static_shared: int
    registers: dict[str, tuple[str, int]]
    """Type and count by prefix: ``%rd -> (b64, 24)``."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def where(self, pattern: str) -> list[int]:
        """Places of the instructions whose opcode matches."""
        return [i for i, one in enumerate(self.instructions) if re.search(pattern, one.opcode)]

    def mutated(self, place: int, instruction: Instruction) -> Kernel:
        """The kernel with another instruction at ``place``, under the guard of the old one."""
        changed = list(self.instructions)
        old = changed[place]
        changed[place] = replace(instruction, guard=old.guard, negated=old.negated, line=old.line)
        return replace(self, instructions=tuple(changed))


_ENTRY = re.compile(r"\.entry (?P<name>\w+)\((?P<parameters>.*?)\)\s*(?P<hints>.*?)\n\{(?P<body>.*?)\n\}", re.S)
_PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]")
_CONSTANT = re.compile(r"\.const \.align \d+ \.b8 (\w+)\[\d+\] = \{(.*?)\}", re.S)
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%[a-z]+)<(\d+)>")
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", re.S)


def kernels(text: str) -> dict[str, Kernel]:
    """All entries of a module by name."""
    symbols, constants = {}, b""
    for name, values in _CONSTANT.findall(text):
        symbols[name] = len(constants)
        constants += bytes(int(value) for value in values.split(","))
    dynamic = [name for _, name, size in _SHARED.findall(text) if not size]
    return {m["name"]: _kernel(m, symbols, constants, dynamic) for m in _ENTRY.finditer(text)}


def _kernel(entry: re.Match[str], symbols: dict[str, int], constants: bytes, dynamic: list[str]) -> Kernel:
    parameters = _parameters(entry["parameters"])
    places = {**symbols, **{name: offset for name, offset, _ in parameters}}
    shared = 0
    for alignment, name, size in _SHARED.findall(entry["body"]):
        places[name] = _rounded(shared, int(alignment))
        shared = places[name] + int(size)
    static = _rounded(shared, SHARED_ALIGNMENT)
    places.update(dict.fromkeys(dynamic, static))
    threads = re.search(r"\.maxntid (\d+)", entry["hints"])
    assert threads is not None, f"{entry['name']} has no launch bounds"
    registers = {prefix: (kind, int(count)) for kind, prefix, count in _REGISTERS.findall(entry["body"])}
    instructions, labels = _instructions(entry["body"])
    return Kernel(
        entry["name"], int(threads[1]), parameters, places, constants, static, registers, instructions, labels
    )


def _rounded(value: int, to: int) -> int:
    return -(-value // to) * to


def _parameters(text: str) -> tuple[tuple[str, int, int], ...]:
    found, offset = [], 0
    for alignment, kind, name, count in _PARAMETER.findall(text):
        size = BYTES[kind] * int(count or 1)
        offset = _rounded(offset, int(alignment or size))
        found.append((name, offset, size))
        offset += size
    return tuple(found)


def _instructions(body: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(body.split("\n")):
        for text in line.split("//")[0].split(";"):
            statement = text.strip()
            if statement.endswith(":"):
                labels[statement[:-1]] = len(instructions)
            elif statement and statement[0] not in ".{}":
                instructions.append(_instruction(statement, number))
    return tuple(instructions), labels


def _instruction(statement: str, line: int) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    assert match is not None, statement
    negated, guard, opcode, rest = match.groups()
    operands = tuple(part.strip() for part in re.split(r",(?![^{]*\})", rest)) if rest else ()
    return Instruction(opcode, operands, guard or "", negated == "!", line)
