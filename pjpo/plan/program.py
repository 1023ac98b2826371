"""What a compiled program does on each device, read off its text with every loop multiplied out.

XLA's own cost analysis counts the body of a loop once, however often it runs; here layers are a loop, and so are the
blocks of the output head. Counted are products (dot, convolution), traffic with the device's memory, and collectives.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "bf16": 16, **{f"{kind}{bits}": bits for kind in "fsu" for bits in (4, 8, 16, 32, 64)}}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota"),
    *("custom-call", "partition-id", "replica-id", "after-all", "opt-barrier", "async-start", "async-update"),
}
ARRAY = re.compile(r"([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # rather than in a memory on the chip, which TPU programs mark as spaces of their own

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * BITS.get(self.dtype, 8) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # attributes; of a constant its value

    def calls(self) -> list[str]:
        """Computations that run as often as this instruction, loops aside."""
        found = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", self.rest)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return found + (re.findall(r"[\w.-]+", branches[1]) if branches else [])


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` runs of it in one run of the program."""

    kind: str
    bytes: int  # of the whole array: what is gathered or summed, on one device
    devices: int  # that take part in one group
    count: int

    @property
    def sent(self) -> float:
        """Bytes that each device passes on in all runs, by the ring algorithms."""
        share = 1.0 if self.kind == "collective-permute" else (self.devices - 1) / self.devices
        return self.bytes * share * self.count * (2 if self.kind == "all-reduce" else 1)


class Program:
    """The text of a compiled program (`compiled.as_text()`), taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry, current = "", ""
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                current = header[2]
                self.computations[current] = {}
                self.entry = current if header[1] else self.entry
            elif current and (found := INSTRUCTION.match(line)):
                instruction = _instruction(found[2], found[3])
                self.computations[current][instruction.name] = instruction
                if found[1]:
                    self.roots[current] = instruction
            elif line == "}":  # a kernel's attributes go over several lines, some of which begin with one
                current = ""
        if not self.entry:
            raise ValueError("this is no text of a compiled program: it has no ENTRY")
        header = text.strip().partition("\n")[0]
        self.devices = math.prod(map(int, re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)))
        self.runs: collections.Counter[str] = collections.Counter()  # of each computation, in one run of the program
        self.inside: set[str] = set()  # computations inside one kernel, whose arrays never leave the chip
        self._count(self.entry, 1, False)

    def _count(self, name: str, times: int, inside: bool) -> None:
        self.runs[name] += times
        if inside:
            self.inside.add(name)
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                body, condition = (_search(rf"{x}=%?([\w.-]+)", instruction)[1] for x in ("body", "condition"))
                self._count(body, times * self._trips(instruction, body, condition), inside)
            else:
                for called in instruction.calls():
                    self._count(called, times, inside or instruction.opcode not in ("call", "conditional"))

    def _trips(self, loop: Instruction, body: str, condition: str) -> int:
        """How often a loop runs, an early end aside: as the compiler says, or up to its counter's limit."""
        if known := re.search(r'known_trip_count[^}]*"n":"(\d+)"', loop.rest):
            return int(known[1])
        limits = [value for _, value in self._constants(condition)]
        if not limits:
            raise ValueError(f"loop {loop.name}: its condition {condition} names no limit")
        counter = next((x for x in self.computations[condition].values() if x.opcode == "get-tuple-element"), None)
        step = 1
        if counter and (index := re.search(r"index=(\d+)", counter.rest)):
            steps = dict(self._constants(body))
            grown = self.computations[body].get(self.roots[body].operands[int(index[1])])
            if grown and grown.opcode == "add":
                step = max((steps[x] for x in grown.operands if steps.get(x, 0) > 0), default=1)
        return math.ceil(max(limits) / step)

    def _constants(self, name: str) -> Iterator[tuple[str, int]]:
        for instruction in self.computations[name].values():
            if instruction.opcode == "constant" and (found := re.fullmatch(r"(\d+)\b.*", instruction.rest)):
                yield instruction.name, int(found[1])
            for called in instruction.calls():
                yield from self._constants(called)

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, runs of it) of all that runs."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield name, instruction, times

    def arrays(self) -> set[Array]:
        """Every array that the program makes, those that stay inside a kernel aside."""
        return {x for name, i, _ in self.instructions() if name not in self.inside for x in i.outputs}

    @functools.cached_property
    def flops(self) -> int:
        """Of all products; a multiplication and an addition are two."""
        total = 0
        for name, instruction, times in self.instructions():
            if instruction.opcode in ("dot", "convolution"):
                left, right = (self.computations[name][x].outputs[0] for x in instruction.operands)
                count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
                total += times * count(instruction, left.shape, right.shape)
        return total

    @functools.cached_property
    def bytes(self) -> int:
        """Read from and written to the device's memory; a slice of an array counts as the slice."""
        total = 0
        for name, instruction, times in self.instructions():
            if (
                name not in self.inside
                and instruction.opcode not in NO_TRAFFIC
                and not instruction.opcode.endswith("-done")
            ):
                total += times * (self._read(name, instruction) + self._written(instruction))
        return total

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """All of them, those of one kind, size and group together; a copy of one whose pieces are spread is one.

        Raises:
            ValueError: groups of devices in a notation that is not known.
        """
        counts: collections.Counter[tuple[str, int, int]] = collections.Counter()
        seen = set()
        for name, instruction, times in self.instructions():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            whole = max(x.bytes for x in instruction.outputs) if "start" in instruction.opcode else 0
            whole = whole or sum(x.bytes for x in instruction.outputs)
            devices = _group_size(instruction, self.devices)
            if kind == "reduce-scatter":
                whole *= devices
            elif kind == "all-reduce" and name in self.inside and self.roots[name].opcode == "dynamic-slice":
                kind = "reduce-scatter"  # as a TPU's kernel is written
            # The kernels that a collective runs beside each hold a copy of it, with all that says where it comes from.
            # A channel alone does not, as all that are written by hand (`shard_map`) have number 1.
            origin = re.findall(r'(?:channel_id=|async_collective_name=|op_name=)("[^"]*"|\d+)', instruction.rest)
            piece = (kind, whole, *origin)
            if name in self.inside and kind != "collective-permute" and origin and piece in seen:
                continue
            seen.add(piece)
            if devices > 1:
                counts[kind, whole, devices] += times
        found = [Collective(*what, count) for what, count in counts.items()]
        return sorted(found, key=lambda x: -x.sent)

    def _read(self, name: str, instruction: Instruction) -> int:
        if instruction.opcode in ("slice", "dynamic-slice", "gather") or instruction.opcode.endswith("-start"):
            source = self.computations[name][instruction.operands[0]].outputs
            return _moved(instruction).bytes if source and source[0].in_hbm else 0
        if instruction.opcode == "dynamic-update-slice":
            return self.computations[name][instruction.operands[1]].outputs[0].bytes
        total = 0
        for place, operand in enumerate(instruction.operands):
            full = sum(x.bytes for x in self.computations[name][operand].outputs if x.in_hbm)
            if full and instruction.opcode == "fusion":
                full = min(full, self._used(instruction.calls()[0], place, full))
            total += full
        return total

    def _used(self, name: str, place: int, full: int) -> int:
        """Bytes that a kernel reads of its parameter number `place`."""
        computation = self.computations[name]
        waiting = [x.name for x in computation.values() if x.opcode == "parameter" and x.rest.startswith(f"{place})")]
        total = 0
        while waiting:
            value = waiting.pop()
            for user in computation.values():
                if value not in user.operands:
                    continue
                if user.opcode == "bitcast":
                    waiting.append(user.name)
                elif user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == value:
                    total += user.outputs[0].bytes
                elif user.opcode == "fusion":
                    total += self._used(user.calls()[0], user.operands.index(value), full)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != value:
                    return full
        return total

    def _written(self, instruction: Instruction) -> int:
        if instruction.opcode.endswith("-start"):
            moved = _moved(instruction)
            return moved.bytes if moved.in_hbm else 0
        full = sum(x.bytes for x in instruction.outputs if x.in_hbm)
        name, root = "", instruction
        while full and root.opcode in ("fusion", "bitcast"):
            name = root.calls()[0] if root.opcode == "fusion" else name
            root = self.roots[name] if root.opcode == "fusion" else self.computations[name].get(root.operands[0], root)
            if root.opcode == "dynamic-update-slice":
                return min(full, self.computations[name][root.operands[1]].outputs[0].bytes)
            if root.opcode == "parameter":
                break
        return full


def _instruction(name: str, text: str) -> Instruction:
    shape, rest = _split_shape(text)
    opcode, _, rest = rest.partition("(")
    depth, end = 1, len(rest)
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = place
            break
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.-]+)", rest[:end]))
    attributes = rest if opcode in ("constant", "parameter") else rest[end + 1 :]
    return Instruction(name, opcode.strip(), tuple(map(_array, ARRAY.finditer(shape))), operands, attributes)


def _split_shape(text: str) -> tuple[str, str]:
    """The type in front, a tuple's in parentheses, and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 2 :]
    raise ValueError(f"unbalanced type in {text[:80]!r}")


def _search(pattern: str, instruction: Instruction) -> re.Match:
    """
    Raises:
        ValueError: the instruction does not have what its kind always has.
    """
    if found := re.search(pattern, instruction.rest):
        return found
    raise ValueError(f"{instruction.opcode} {instruction.name} says nothing like {pattern!r}")


def _array(found: re.Match) -> Array:
    shape = tuple(int(size) for size in found[2].split(",") if size)
    return Array(found[1], shape, "S(" not in (found[3] or ""))


def _moved(instruction: Instruction) -> Array:
    """What an instruction brings along: of an asynchronous one the destination, which is not always first."""
    arrays = [x for x in instruction.outputs if x.shape or len(instruction.outputs) == 1]
    if instruction.opcode == "slice-start":
        return arrays[-1]
    return arrays[0] if instruction.opcode in ("copy-start", "slice", "dynamic-slice", "gather") else arrays[-1]


def _dot_flops(instruction: Instruction, left: tuple, right: tuple) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * math.prod(instruction.outputs[0].shape) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, left: tuple, right: tuple) -> int:
    """Only pairs of a place in the window and one in the input that exist count: a TPU's batch axes are windows too."""
    labels = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or [""])[0]))
    out = instruction.outputs[0].shape
    pairs = 1
    for axis in range(len(labels[2]) - 2):
        get = lambda name, default: window[name].split("x")[axis] if name in window else default  # noqa: E731, B023
        size = right[labels[2].index(str(axis))]
        low = int(get("pad", "0_0").split("_")[0])
        stride, spread, dilate = (int(get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        reach = (left[labels[1].index(str(axis))] - 1) * spread
        places = (o * stride + k * dilate - low for o in range(out[labels[3].index(str(axis))]) for k in range(size))
        pairs *= sum(0 <= place <= reach and place % spread == 0 for place in places)
    features = right[labels[2].index("i")] * right[labels[2].index("o")]
    return 2 * out[labels[3].index("b")] * features * pairs


def _group_size(instruction: Instruction, everyone: int) -> int:
    """Devices in one group of a collective, in any of the notations; 2, who gives and who takes, for a permutation.

    Raises:
        ValueError: another notation.
    """
    rest = instruction.rest
    if "source_target_pairs" in rest:
        return 2
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\([^{]*\))?\s*\{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if "replica_groups={}" in rest:
        return everyone
    groups = re.search(r"replica_groups=.{,60}", rest)
    raise ValueError(
        f"{instruction.opcode} {instruction.name}: the notation of its groups of devices is not known: "
        f"{groups[0] if groups else 'it has no replica_groups'}; known are {{{{0,1}},{{2,3}}}}, [2,2]<=[4], "
        "mesh['x'=2,'y'=2] {'x'} and {} for all devices, as JAX 0.10 to 0.12 write them"
    )
