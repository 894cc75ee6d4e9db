"""What devices say to each other in a step, read from the text of its compiled program.

1. `_parse` cuts the text into computations and their instructions.
2. `_executions` follows calls from the entry and multiplies by the trip counts of loops.
3. `count` adds up operations, and the bytes that one device receives, by name.

The text is parsed, here and nowhere else, because no API of JAX or XLA gives the bytes of a
program by kind of collective (`cost_analysis` has none, and counts the body of a loop once). Tests
check it against programs whose messages are known by hand: each kind of operation, loops in loops,
and the forms that only the TPU compiler writes.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

_NAMES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
_OPERATION = re.compile(rf" ({_NAMES})(-start)?\(")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*)")
_CALLED = re.compile(
    r"[, ](?:calls|to_apply|condition|body|\w+_computations?)=(?:%([\w.-]+)|\{([^}]*)\})"
)
_WHILE = re.compile(r" while\(%([\w.-]+)\), condition=%([\w.-]+), body=%([\w.-]+)")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_RING = re.compile(r"windowed_dot_general_body_(ag|rs)")
_RING_NAMES = {"ag": "all-gather ring", "rs": "reduce-scatter ring"}


class Collective(NamedTuple):
    """All executions of one kind of operation in a step."""

    count: int
    bytes: int  # that one device receives


class _Computation(NamedTuple):
    instructions: dict[str, str]  # name → what is right of the equals sign
    root: str  # name of the result

    def operands(self, name: str) -> list[str]:
        """Names between the parentheses of an instruction."""
        text = self.instructions.get(name, "")
        found = re.search(r" [\w-]+\((%[^()]*)\)", text)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []

    def constant(self, name: str) -> int | None:
        """Value of a scalar constant, also through copies; None for anything else."""
        text = self.instructions.get(name, "")
        if found := re.search(r" constant\((\d+)\)", text):
            return int(found[1])
        is_copy = re.search(r" (copy|convert|bitcast)\(", text)
        return self.constant(self.operands(name)[0]) if is_copy else None


def count(text: str, *, num_devices: int, unknown_trip_count: int = 1) -> dict[str, Collective]:
    """Counts the collective operations of a compiled program, loops and all.

    A product that XLA overlaps with its communication is a loop of permutes around a ring; those
    are named by what the ring does, "all-gather ring" or "reduce-scatter ring".

    Args:
        text: `as_text()` of the compiled program.
        num_devices: devices that it runs on.
        unknown_trip_count: iterations of a loop that the data can end early.

    Returns:
        Name → count and bytes of those that occur.
    """
    computations, entry = _parse(text)
    executions = _executions(computations, entry, unknown_trip_count)
    found: dict[str, tuple[str, int, int]] = {}
    for caller, computation in computations.items():
        times = executions[caller]
        for instruction, line in computation.instructions.items():
            match = _OPERATION.search(line)
            if match is None or not times:
                continue
            name, size = match[1], _received(match, line, num_devices)
            ring = _RING.search(caller)
            if ring and name == "collective-permute":
                name = _RING_NAMES[ring[1]]
            # The TPU compiler writes a reduce-scatter as an all-reduce in a fusion of this name.
            if caller.startswith("all-reduce-scatter") and name == "all-reduce":
                name, size = "reduce-scatter", size // 2
            # XLA spreads one operation over several fusions, which share its channel, so that other
            # work overlaps it, even a whole loop: it happens as often as the outermost of them.
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else instruction
            if key not in found or times < found[key][1]:
                found[key] = (name, times, size)
    counts, sizes = Counter(), Counter()
    for name, times, size in found.values():
        counts[name] += times
        sizes[name] += times * size
    return {name: Collective(counts[name], sizes[name]) for name in sorted(counts)}


def _received(operation: re.Match[str], line: str, num_devices: int) -> int:
    """Bytes that one device receives in one execution; of an all-reduce, twice around a ring."""
    shapes = [
        (math.prod(map(int, filter(None, sizes.split(",")))) * _bits(letters, digits) // 8, sizes)
        for letters, digits, sizes in _SHAPE.findall(line[: operation.start()])
    ]
    name, is_start = operation[1], bool(operation[2])
    if is_start and name != "all-reduce":  # (operands, results and, it may be, scalars for itself)
        shapes = [shape for shape in shapes if shape[1]]
        shapes = shapes[len(shapes) // 2 :]
    result = sum(size for size, _ in shapes)
    if name == "collective-permute":
        return result
    members = _group_size(line, num_devices)
    if name == "reduce-scatter":
        return result * (members - 1)
    return result * (members - 1) * (2 if name == "all-reduce" else 1) // members


def _bits(letters: str, digits: str) -> int:
    return 8 if letters == "pred" else int(digits or 0)


def _group_size(line: str, num_devices: int) -> int:
    """Devices that take part together: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2] {'a'}`."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    return num_devices


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry = name = root = ""
    instructions: dict[str, str] = {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, instructions = found[2], {}
            entry = name if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            instructions[found[2]] = found[3]
            root = found[2] if found[1] else root
        elif line == "}":
            computations[name] = _Computation(instructions, root)
    return computations, entry


def _executions(
    computations: Mapping[str, _Computation], entry: str, unknown_trip_count: int
) -> Counter[str]:
    """How often each computation is executed when the entry is executed once."""
    executions: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        executions[name] += times
        for line in computations[name].instructions.values():
            loop = _WHILE.search(line)
            trips = 1
            if loop is not None:
                trips = _trip_count(computations, name, loop, line) or unknown_trip_count
            for single, several in _CALLED.findall(line):
                for callee in [single] if single else re.findall(r"%([\w.-]+)", several):
                    visit(callee, times * trips)

    visit(entry, 1)
    return executions


def _trip_count(
    computations: Mapping[str, _Computation], caller: str, loop: re.Match[str], line: str
) -> int | None:
    """Iterations of `for (i = start; i < stop; i += step)`; None where the loop is another."""
    if found := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(found[1])
    condition, body = computations[loop[2]], computations[loop[3]]
    test = condition.instructions[condition.root]
    if " compare(" not in test or "direction=LT" not in test:
        return None
    counter, limit = condition.operands(condition.root)
    stop = condition.constant(limit)
    place = re.search(r"get-tuple-element\(.*index=(\d+)", condition.instructions.get(counter, ""))
    if stop is None or place is None:
        return None
    index = int(place[1])
    first = computations[caller].operands(loop[1])
    start = computations[caller].constant(first[index]) if len(first) > index else None
    added = body.operands(body.operands(body.root)[index])
    steps = [step for step in map(body.constant, added) if step]
    return -(-(stop - (start or 0)) // (steps[0] if steps else 1))
