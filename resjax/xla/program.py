"""Counts the kernels, memory traffic, FLOPs and collectives of a compiled program.

The numbers are read from the text of the optimized program, `Compiled.as_text()`, in which every
instruction of the entry computation and of a loop's body is one kernel or one transfer. The body of
a loop counts once per iteration. XLA's own `cost_analysis` counts it once, and is empty on GPUs.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from resjax.xla.topologies import Chip

BITS = {"pred": 8, "s4": 4, "u4": 4}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "add-dependency"),
}
UNKNOWN_CYCLES = 2**63 - 1  # the estimate for a kernel on a TPU's SparseCore (libtpu 0.0.50)
KINDS = (
    *("convolution", "matrix product", "collective", "reduction", "transpose", "copy"),
    *("prefetch", "scalar", "other"),
)


class Buffer(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: XLA's name of the type, such as f32.
      shape: the shape without padding.
      bytes: the size with the padding of a TPU's tiles.
      fast: whether the array lies in on-chip memory and not in the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    fast: bool

    @property
    def traffic(self) -> int:
        """The number of bytes in main memory."""
        return 0 if self.fast else self.bytes


class Instruction(NamedTuple):
    """A line of a computation: `name = results opcode(operands), attributes`."""

    name: str
    opcode: str
    results: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")


class Kernel(NamedTuple):
    """An instruction that runs on the device.

    Attributes:
      kind: one of `KINDS`; a prefetch moves an array into the fast memory of a TPU while other
        kernels run, and a scalar is computed beside them.
      name: the name of the instruction.
      times: the number of runs per run of the program.
      flops: the FLOPs of its convolutions and matrix products, per run of the kernel.
      traffic: the bytes that one run reads from and writes to main memory.
      sent: the bytes of the results of one run of a collective; 0 for other kernels.
      source: the operation in the traced program, such as jit(f)/while/body/dot_general.
      dtypes: the types of the operands of its convolutions and matrix products.
      cycles: the cycles of one run that the compiler of TPUs expects; 0 if it reports none.
    """

    kind: str
    name: str
    times: int
    flops: int
    traffic: int
    sent: int
    source: str
    dtypes: tuple[str, ...]
    cycles: int

    def seconds(self, chip: Chip, dtype: str) -> float:
        """Predicts the time of one run; 0 for a kernel that runs beside others."""
        if self.kind in ("prefetch", "scalar"):
            return 0.0
        work = max(self.flops / chip.flops[dtype], self.traffic / chip.bandwidth, chip.launch)
        if chip.clock:
            work = max(work, self.cycles / chip.clock)
        if self.kind == "collective":
            work += chip.latency + self.sent / chip.link
        return work


class Program:
    """The instructions of a compiled program, parsed from its text."""

    def __init__(self, text: str):
        self._computations, self._entry = _parse(text)
        self._tiled = ":T(" in text  # arrays of a TPU lie in tiles

    @cached_property
    def kernels(self) -> list[Kernel]:
        """All kernels and transfers in order; a kernel of a loop's body is listed once."""
        return list(self._kernels(self._entry, 1))

    def seconds(self, chip: Chip, dtype: str) -> float:
        """Predicts the time of the program.

        A kernel takes the longest of four times: its arithmetic at the peak rate, its memory
        traffic at full bandwidth, a launch, and the cycles that the compiler of TPUs expects. A
        collective also takes a latency and the time of sending its results. Only prefetches and
        scalars overlap with other kernels.
        """
        total = sum(kernel.times * kernel.seconds(chip, dtype) for kernel in self.kernels)
        moved = sum(kernel.times * kernel.traffic for kernel in self.kernels)
        return max(total, moved / chip.bandwidth)

    def _kernels(self, computation: str, times: int) -> Iterator[Kernel]:
        instructions = self._computations[computation]
        buffers = {each.name: each.results for each in instructions.values()}
        for each in instructions.values():
            if each.opcode == "while":
                body = each.attribute(r"body=%?([\w.\-]+)")
                assert body is not None, each.attributes
                yield from self._kernels(body, times * self._trips(each))
            elif each.opcode in ("call", "conditional"):
                branches = each.attribute(r"branch_computations={([^}]*)}") or each.called or ""
                for branch in re.findall(r"[\w.\-]+", branches):
                    yield from self._kernels(branch, times)
            elif each.opcode not in NO_KERNEL and not self._ends(each):
                operands = [buffers[name] for name in each.operands if name in buffers]
                yield self._kernel(self._collective_started_by(each) or each, operands, times)

    def _ends(self, each: Instruction) -> bool:
        """Returns whether an instruction waits for an asynchronous one, which is counted."""
        return each.opcode.endswith("-done") or self._custom_call(each, "AsyncCollectiveDone")

    def _collective_started_by(self, each: Instruction) -> Instruction | None:
        """Returns the collective that a fusion starts on a TPU; kernels that follow advance it.

        The results of the fusion are operands, results and context of the collective.
        """
        if not self._custom_call(each, "AsyncCollectiveStart"):
            return None
        [found] = (one for one in self._inside(each.called) if one.opcode in COLLECTIVES)
        results = each.results[len(found.results) : 2 * len(found.results)]
        return found._replace(results=results, operands=each.operands)

    def _custom_call(self, each: Instruction, target: str) -> bool:
        return each.opcode == "fusion" and any(
            one.opcode == "custom-call" and f'"{target}"' in one.attributes
            for one in self._inside(each.called)
        )

    def _trips(self, loop: Instruction) -> int:
        """Returns the iterations of a loop; a TPU's program has them only in the condition."""
        if known := loop.attribute(r'"known_trip_count":{"n":"(\d+)"}'):
            return int(known)
        constants = [
            int(each.operands[0])
            for each in self._inside(loop.attribute(r"condition=%?([\w.\-]+)"))
            if each.opcode == "constant" and each.operands and each.operands[0].isdecimal()
        ]
        return max(constants, default=1)

    def _kernel(self, each: Instruction, operands: list[tuple[Buffer, ...]], times: int) -> Kernel:
        inside = [each, *self._inside(each.called)] if each.opcode != "all-reduce" else [each]
        kind = _kind(each, inside)
        if self._tiled and kind == "other" and each.opcode not in ("fusion", "custom-call"):
            kind = "scalar" if all(math.prod(b.shape) == 1 for b in each.results) else kind
        products = list(self._products(each, operands))
        cycles = int(each.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        return Kernel(
            kind=kind,
            name=each.name,
            times=times,
            flops=sum(flops for flops, _ in products),
            traffic=self._traffic(each, operands),
            sent=sum(map(_unpadded, each.results)) if kind == "collective" else 0,
            source=each.attribute(r'op_name="([^"]*)"') or "",
            dtypes=tuple(sorted({dtype for _, dtypes in products for dtype in dtypes})),
            cycles=0 if cycles == UNKNOWN_CYCLES else cycles,
        )

    def _inside(self, computation: str | None) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of those that it calls."""
        for each in self._computations.get(computation or "", {}).values():
            yield each
            yield from self._inside(each.called)

    def _products(
        self, each: Instruction, operands: list[tuple[Buffer, ...]]
    ) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yields FLOPs and operand types of the convolutions and matrix products of a kernel."""
        arrays = [buffers[0] for buffers in operands if buffers]
        if each.opcode == "convolution" or "$conv" in each.attributes:
            yield _convolution_flops(each, arrays), tuple(b.dtype for b in arrays[:2])
        elif each.opcode == "dot" or "__cublas" in each.attributes:
            contracted = each.attribute(r"lhs_contracting_dims={([\d,]+)}")
            contracted = contracted or each.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
            axes = map(int, re.findall(r"\d+", contracted or ""))
            summed = math.prod(arrays[0].shape[axis] for axis in axes)
            flops = 2 * math.prod(each.results[0].shape) * summed
            yield flops, tuple(b.dtype for b in arrays[:2])
        elif (called := each.called) and each.opcode == "fusion":
            inner = self._computations[called]
            buffers = {one.name: one.results for one in inner.values()}
            for one in inner.values():
                known = [buffers[name] for name in one.operands if name in buffers]
                yield from self._products(one, known)

    def _traffic(self, each: Instruction, operands: list[tuple[Buffer, ...]]) -> int:
        """Returns the bytes of main memory that a kernel reads and writes.

        If a kernel reads or updates a slice of an array, only the slice counts.
        """
        if each.opcode in ("copy-start", "slice-start"):
            result, (source, *_) = each.results[0], operands[0]
            return result.traffic + (0 if source.fast else result.bytes)
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return sum(buffer.traffic for buffer in each.results) * 2
        inner = self._unaliased(each.called or "") if each.opcode == "fusion" else {}
        parameters = [one for one in inner.values() if one.opcode == "parameter"]
        numbers = {int(one.operands[0]): one.name for one in parameters if one.operands}
        total, updated = 0, 0
        for number, buffers in enumerate(operands):
            users = [one for one in inner.values() if numbers.get(number) in one.operands]
            sliced = self._sliced(inner, numbers.get(number, "")) if users else None
            if sliced is not None:
                total += min(sliced, sum(b.bytes for b in buffers)) * (not buffers[0].fast)
            elif users and all(_updates(one, numbers[number]) for one in users):
                size = sum(_update_size(one, inner) for one in users)
                total += size * (not buffers[0].fast)
                updated += buffers[0].traffic - size * (not buffers[0].fast)
            else:
                total += sum(buffer.traffic for buffer in buffers)
        written = sum(buffer.traffic for buffer in each.results)
        return total + max(written - updated, 0)

    def _unaliased(self, computation: str) -> dict[str, Instruction]:
        """Returns a computation's instructions, without fusions that only change an array's tiling.

        On a TPU such a fusion within another one shares the memory of its operand.
        """
        inner = self._computations.get(computation, {})
        aliases = {
            one.name: one.operands[0]
            for one in inner.values()
            if one.opcode == "fusion" and "output_to_operand_aliasing" in one.attributes
            if {each.opcode for each in self._inside(one.called)} <= {"parameter", "copy"}
        }
        return {
            one.name: one._replace(operands=tuple(aliases.get(o, o) for o in one.operands))
            for one in inner.values()
            if one.name not in aliases
        }

    def _sliced(self, inner: dict[str, Instruction], name: str) -> int | None:
        """Returns the bytes of the slices of an array that a computation reads.

        Fusions on a TPU contain fusions, which are searched too. None means that the computation
        reads the whole array.
        """
        total = 0
        for one in inner.values():
            sizes: list[int | None] = []
            if one.opcode in ("dynamic-slice", "slice", "gather") and one.operands[0] == name:
                sizes = [one.results[0].bytes]
            elif one.opcode == "bitcast" and name in one.operands:
                sizes = [self._sliced(inner, one.name)]
            elif one.opcode == "fusion":
                within = self._unaliased(one.called or "")
                parameters = [each for each in within.values() if each.opcode == "parameter"]
                sizes = [
                    self._sliced(within, each.name)
                    for each in parameters
                    if one.operands[int(each.operands[0])] == name
                ]
            elif name in one.operands:
                return None
            for size in sizes:
                if size is None:
                    return None
                total += size
        return total


def _unpadded(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * _bits(buffer.dtype) // 8


def _updates(user: Instruction, name: str | None) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name


def _update_size(user: Instruction, inner: dict[str, Instruction]) -> int:
    return inner[user.operands[1]].results[0].bytes


def _kind(each: Instruction, inside: list[Instruction]) -> str:
    opcodes = {one.opcode for one in inside}
    if each.opcode in COLLECTIVES:
        return "collective"
    if each.opcode in ("copy-start", "slice-start"):
        return "prefetch"
    convolutions = [one for one in inside if one.opcode == "convolution"]
    if "$conv" in each.attributes or any(_spatial(one) for one in convolutions):
        return "convolution"
    if convolutions or "dot" in opcodes or "__cublas" in each.attributes:
        return "matrix product"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    moving = opcodes - {"parameter", "constant", "bitcast", "fusion", "tuple", "convert", "reverse"}
    if moving == {"transpose"}:
        return "transpose"
    return "copy" if moving == {"copy"} else "other"


def _spatial(convolution: Instruction) -> bool:
    """Returns whether a convolution has spatial axes; without them it is a matrix product."""
    return bool(re.search(r"dim_labels=\w*\d", convolution.attributes))


def _convolution_flops(each: Instruction, arrays: list[Buffer]) -> int:
    """Returns the FLOPs of a convolution, two per multiply-add.

    Zeros that dilate the input are not multiplied. A kernel of cuDNN for a gradient has the labels
    of the forward convolution.
    """
    labels = each.attribute(r"dim_labels=\w+?_(\w+?)->")
    assert labels is not None, each.attributes
    images, kernel = each.results[0], arrays[1]
    if "convBackwardFilter" in each.attributes:
        images, kernel = arrays[1], each.results[0]
    elif "convBackwardInput" in each.attributes:
        images = arrays[0]
    products = math.prod(images.shape) * math.prod(kernel.shape) // kernel.shape[labels.index("o")]
    dilations = re.findall(r"\d+", each.attribute(r"lhs_dilate=([\dx]+)") or "")
    return 2 * products // math.prod(map(int, dilations))


_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:{([^{}]*)})?")


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the instructions of each computation by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (head := _NAME.match(line)):
            made = _instruction(head[1], line[head.end() :])
            current[made.name] = made
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else re.search(r" [\w\-]+\(", rest).start()  # type: ignore[union-attr]
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest[len(opcode) :]) + len(opcode)
    inside = rest[len(opcode) + 1 : end - 1]
    operands = re.findall(r"%([\w.\-]+)", inside) or [inside]
    if opcode.endswith("-start"):
        opcode, shape = _started(opcode, shape)
    buffers = tuple(_buffer(*found) for found in _ARRAY.findall(shape))
    return Instruction(name, opcode, buffers, tuple(operands), rest[end:])


def _started(opcode: str, shape: str) -> tuple[str, str]:
    """Returns the operation that an asynchronous instruction starts, and the shape of its results.

    Most instructions have a tuple of operands, results and context, such as `((f32[8], s32[]),
    f32[4], u32[])`, and the operands may be a single array. A copy begins with its result. An
    all-reduce has its results alone.
    """
    if opcode == "copy-start":
        return opcode, _element(shape, 0)
    if shape.startswith("((") or opcode in ("all-gather-start", "collective-permute-start"):
        shape = _element(shape, 1)
    return opcode if opcode == "slice-start" else opcode.removesuffix("-start"), shape


def _element(shape: str, index: int) -> str:
    """Returns an element of the shape of a tuple."""
    start, depth, number = 1, 0, 0
    for position, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or not depth:
            if number == index:
                return shape[start:position].strip()
            start, number = position + 1, number + 1
    raise ValueError(f"no element {index}: {shape[:80]}")


def _closing(text: str) -> int:
    """Returns the position after the parenthesis that closes the one at the beginning."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return position + 1
    raise ValueError(f"unbalanced: {text[:80]}")


def _bits(dtype: str) -> int:
    """Returns the bits of one number of a type: 16 for bf16; 0 for a token."""
    return BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])


def _buffer(dtype: str, sides: str, layout: str) -> Buffer:
    """Returns an array; a layout is {3,2,1,0:T(8,128)(2,1)S(1)}: order, tiles and memory."""
    shape = tuple(int(side) for side in sides.split(",") if side)
    order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis]
    padded = list(shape)
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        sizes = reversed([int(size) for size in tile[1].split(",")])
        for axis, size in zip(order, sizes, strict=False):  # the first axes vary fastest
            padded[axis] = -(-padded[axis] // size) * size
    space = re.search(r"S\((\d+)\)", layout)
    return Buffer(
        dtype, shape, math.prod(padded) * _bits(dtype) // 8, bool(space and space[1] != "0")
    )
