"""Bytes that a compiled program sends between chips, parsed from its HLO text.

jaxlib ships no protobuf definitions of HLO, so the text is the only form that needs no further package.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes per element; types that are missing (token, opaque) hold no data.
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_SIZES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 1, "u4": 1}

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one chip in one run of a program, by kind.

    Attributes:
        operands: bytes that the chip passes to collectives.
        received: bytes that it receives over its links. In an all-gather of n shards it receives n - 1 of them.
        counts: number of executions.
        unknown_loops: loops with collectives whose trip count is unknown; they are counted once.
    """

    operands: dict[str, int]
    received: dict[str, int]
    counts: dict[str, int]
    unknown_loops: int = 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    is_root: bool


def shape_bytes(text: str) -> int:
    """Return the bytes of an HLO type such as `bf16[2,8]{1,0}`, or of all parts of a tuple."""
    total = 0
    for kind, sides in _SHAPE.findall(text):
        total += _SIZES.get(kind, 0) * math.prod(int(side) for side in sides.split(",") if side)
    return total


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text) - 1


def _parse_instruction(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    name, rest = match.groups()
    # Types of tuples and layouts, as T(8,128), contain parentheses too.
    after = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    operation = _OPERATION.search(rest, max(0, after))
    if operation is None:
        return None
    opening = operation.end() - 1
    end = _closing(rest, opening)
    arguments = rest[opening + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments)) or tuple(
        word.split()[-1] for word in arguments.split(", ") if word.strip()
    )
    return _Instruction(
        name, rest[: operation.start() + 1], operation[1], operands, rest[end + 1 :], arguments, "ROOT" in line[:8]
    )


def computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Parse a program.

    Returns:
        (instructions of each computation, name of the entry computation).
    """
    parsed: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = parsed.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _parse_instruction(line)):
            current.append(instruction)
    return parsed, entry


def _names(attributes: str, key: str) -> list[str]:
    match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes)
    return re.findall(r"[\w.\-]+", match[1]) if match else []


def _group(attributes: str, devices: int) -> int:
    """Return the number of chips that take part in one collective, from any notation of replica groups."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=(?:@\w+|mesh)\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sides = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sides.get(axis, 1)) for axis in re.findall(r"'([^']+)'", match[2]))
    return devices


def _received(kind: str, operand: int, group: int) -> int:
    """Return the bytes that a chip receives in a ring algorithm, the least that any algorithm needs."""
    if group < 2 and kind not in ("collective-permute", "collective-broadcast"):
        return 0
    match kind:
        case "all-gather":
            return operand * (group - 1)
        case "all-reduce":
            return 2 * operand * (group - 1) // group
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return operand * (group - 1) // group
    return operand


def _trip_count(loop: _Instruction, program: dict[str, list[_Instruction]]) -> int | None:
    """Return how often a loop runs: its annotation, or the limit in its condition over the counter's step in its body.

    Counters start at 0 in every loop that JAX and the partitioner write. Where the partitioner unrolled, they step by 2.
    """
    if match := re.search(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)', loop.attributes):
        return int(match[1])
    condition = [one for name in _names(loop.attributes, "condition") for one in program.get(name, [])]
    limits = [limit for one in condition if (limit := _constant(one)) is not None]
    if len(limits) != 1:
        return None
    counters = {index for one in condition if (index := _tuple_index(one)) is not None}
    steps = []
    for name in _names(loop.attributes, "body"):
        body = {one.name: one for one in program.get(name, [])}
        root = next((one for one in body.values() if one.is_root), None)
        for index in counters:
            if root is not None and root.operation == "tuple" and index < len(root.operands):
                update = body.get(root.operands[index])
                if update is not None and update.operation == "add":
                    steps += [_constant(body[operand]) for operand in update.operands if operand in body]
    step = next((step for step in steps if step), 1)
    return -(-limits[0] // step)


def _constant(instruction: _Instruction) -> int | None:
    is_integer = instruction.operation == "constant" and re.fullmatch(r"\d+", instruction.arguments)
    return int(instruction.arguments) if is_integer else None


def _tuple_index(instruction: _Instruction) -> int | None:
    match = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(match[1]) if match and instruction.operation == "get-tuple-element" else None


def traffic(text: str, devices: int) -> Traffic:
    """Count the collectives of a compiled program, each as often as the loops around it run.

    Args:
        text: `compiled.as_text()`; its shapes are those of one chip.
        devices: chips that run the program.
    """
    program, entry = computations(text)
    totals: dict[str, list[int]] = {}
    unknown = 0

    def walk(name: str, times: int, chained: set[str]) -> None:
        nonlocal unknown
        sizes = {instruction.name: shape_bytes(instruction.shape) for instruction in program.get(name, [])}
        for instruction in program.get(name, []):
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                # The TPU compiler spreads one collective over several fusions, to overlap it with their computation.
                if "chain_id=" in instruction.attributes:
                    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                    if channel is not None and channel[1] in chained:
                        continue
                    chained |= {channel[1]} if channel else set()
                operand = sum(sizes.get(name, 0) for name in instruction.operands)
                total = totals.setdefault(kind, [0, 0, 0])
                total[0] += times * operand
                total[1] += times * _received(kind, operand, _group(instruction.attributes, devices))
                total[2] += times
            elif kind == "while":
                trips = _trip_count(instruction, program)
                before = sum(total[2] for total in totals.values())
                for body in _names(instruction.attributes, "body"):
                    walk(body, times * (1 if trips is None else trips), set())
                unknown += trips is None and sum(total[2] for total in totals.values()) > before
            else:
                for called in _called(instruction):
                    walk(called, times, chained)

    walk(entry, 1, set())
    operands, received, counts = ({kind: total[index] for kind, total in sorted(totals.items())} for index in range(3))
    return Traffic(operands, received, counts, unknown)


def _called(instruction: _Instruction) -> Iterator[str]:
    """Yield the computations that an instruction runs: of fusions, calls, asynchronous wrappers and all branches."""
    if instruction.operation.endswith(("-done", "-update")) or instruction.operation in ("reduce", "sort", "scatter"):
        return
    for match in _CALLED.finditer(instruction.attributes):
        yield from _names(instruction.attributes[match.start() :], match[0].removesuffix("="))
