"""Machine code, executed without a GPU: what a launch computes, and what it costs.

:func:`execute` runs some blocks of a launch with its own parameters, all threads of them in step with each other where
they are at the same instruction. It counts what a multiprocessor would have to do: how often each instruction is issued
to a warp, and how many 32-byte sectors, 128-byte lines and shared-memory wavefronts the lanes' addresses touch. Only
what our memory-bound kernels consist of is understood; anything else is refused, not guessed.
"""

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sass import TRUE, UNIFORM, ZERO, Address, Constant, Immediate, Instruction, Operand, Predicate, Register, Special

WARP = 32
PARAMETERS = 0x210  # where constant bank 0 has the parameters, on sm_90
_DONE = np.iinfo(np.int64).max
_REGISTERS, _PREDICATES = UNIFORM[0] + 64, UNIFORM[1] + 8
Array = NDArray[Any]


class Memory:
    """Global memory: buffers at addresses far from each other.

    A buffer may be shorter than the tensor that it stands for: then it repeats. Its length is a power of two.
    """

    _SPACING = 40  # bits of an address within a buffer

    def __init__(self) -> None:
        self._buffers: list[Array] = []
        self._sizes: list[int] = []

    def add(self, contents: Array, size: int | None = None) -> int:
        """The address of a new buffer, of ``size`` bytes where its contents repeat."""
        padded = np.zeros(1 << max(4, (contents.nbytes - 1).bit_length()), np.uint8)
        padded[: contents.nbytes] = contents.reshape(-1).view(np.uint8)
        self._buffers.append(padded)
        self._sizes.append(contents.nbytes if size is None else size)
        return len(self._buffers) << self._SPACING

    def contents(self, address: int) -> Array:
        number = (address >> self._SPACING) - 1
        return self._buffers[number][: self._sizes[number]]

    def find(self, addresses: Array, width: int) -> tuple[Array, Array]:
        """The buffer that all of these are in, and where in it they are.

        Raises:
            IndexError: there is no memory, or it is not aligned.
        """
        number = int(addresses[0] >> self._SPACING)
        if not 0 < number <= len(self._buffers) or (addresses >> self._SPACING != number).any():
            raise IndexError(f"no memory at {addresses[0]:#x}")
        offsets = addresses & ((1 << self._SPACING) - 1)
        if (offsets % width).any() or int(offsets.max()) + width > self._sizes[number - 1]:
            raise IndexError(f"{width} bytes at {int(offsets.max()):#x} of a buffer of {self._sizes[number - 1]:#x}")
        buffer = self._buffers[number - 1]
        return buffer, offsets & (len(buffer) - 1)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is launched with.

    Args:
        code: all of its instructions.
        grid: blocks along x, y and z.
        block: threads along x, y and z.
        parameters: as they are in constant memory.
        shared: bytes of shared memory, static and dynamic.
    """

    code: Sequence[Instruction] = field(repr=False)
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes = field(repr=False)
    shared: int

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def warps(self) -> int:
        """Of a block."""
        return -(-self.threads // WARP)


@dataclass
class Counts:
    """What some warps of a launch did.

    Args:
        warps: how many they are.
        issued: opcode -> instructions issued to a warp.
        load_lines, store_lines: 128-byte lines of global memory that loads and stores touch, each counted once for an
            instruction.
        load_sectors: 32-byte sectors of it that a block loads, each counted once for a block.
        load_touched, store_sectors: those that loads and stores touch, each counted once for an instruction.
        shared: wavefronts, in each of which every bank of shared memory gives or takes one word.
        conflicts: those of them that lanes would not need if their words were in different banks.
        waits: how often a warp comes to an instruction that needs a load or a copy which is under way.
    """

    warps: int = 0
    issued: Counter[str] = field(default_factory=Counter)
    load_lines: int = 0
    store_lines: int = 0
    load_sectors: int = 0
    load_touched: int = 0
    store_sectors: int = 0
    shared: int = 0
    conflicts: int = 0
    waits: int = 0


def execute(launch: Launch, memory: Memory, blocks: Sequence[int]) -> Counts:
    """Run these blocks of the launch, to their end; ``memory`` has their results afterwards.

    Raises:
        NotImplementedError: there is an instruction that this does not understand.
        IndexError: an address is outside of every buffer.
    """
    with np.errstate(all="ignore"):
        return _Execution(launch, memory, blocks).run()


def _words(x: Array) -> Array:
    return x.view(np.uint32)


class _Execution:
    """The threads of some blocks, a column of each array for each."""

    def __init__(self, launch: Launch, memory: Memory, blocks: Sequence[int]) -> None:
        self.launch, self.memory = launch, memory
        lanes = launch.warps * WARP  # of a block
        count = lanes * len(blocks)
        thread = np.arange(count) % lanes
        self.block = np.arange(count) // lanes
        x, y, _ = launch.block
        gx, gy, _ = launch.grid
        number = np.asarray(blocks)[self.block]
        self.special = {
            "SR_TID.X": thread % x,
            "SR_TID.Y": thread // x % y,
            "SR_TID.Z": thread // x // y,
            "SR_CTAID.X": number % gx,
            "SR_CTAID.Y": number // gx % gy,
            "SR_CTAID.Z": number // gx // gy,
            "SR_LANEID": thread % WARP,
            "SR_CgaCtaId": np.zeros_like(thread),
            "SRZ": np.zeros_like(thread),
        }
        self.r = np.full((_REGISTERS, count), 0xFFFFFFFF, np.uint32)  # what nothing was written to is no number
        self.r[[ZERO, UNIFORM[0] + 63]] = 0
        self.p = np.zeros((_PREDICATES, count), bool)
        self.p[TRUE] = self.p[UNIFORM[1] + TRUE] = True
        self.shared = np.zeros((len(blocks), launch.shared + 1024 & ~15), np.uint8)
        self.local: dict[int, Array] = {}
        self.constants = np.zeros(PARAMETERS + len(launch.parameters) + 16, np.uint8)
        self.constants[PARAMETERS : PARAMETERS + len(launch.parameters)] = np.frombuffer(launch.parameters, np.uint8)
        for at, value in ((0x0, x), (0x4, y), (0x8, launch.block[2]), (0xC, gx), (0x10, gy), (0x14, launch.grid[2])):
            self.constants[at : at + 4] = np.frombuffer(struct.pack("<i", value), np.uint8)
        self.index = {instruction.address: i for i, instruction in enumerate(launch.code)}
        self.counts = Counts(warps=launch.warps * len(blocks))
        self.loaded: list[Array] = []
        self.pc = np.where(thread < launch.threads, 0, _DONE)
        self.at_barrier = np.zeros(count, bool)
        self.active = self.pc == 0
        self.pending: set[int] = set()  # registers that loads under way will write
        self.copies = np.zeros(count, np.int64)  # a bit for each group with copies under way; the lowest takes new ones

    # -- control ------------------------------------------------------------------------------------------------------

    def run(self) -> Counts:
        code = self.launch.code
        methods = [getattr(self, f"_{i.name}", None) for i in code]
        issued = np.zeros(len(code), np.int64)
        while True:
            runnable = np.where(self.at_barrier, _DONE, self.pc)
            at = int(runnable.min())
            if at == _DONE:
                if not self.at_barrier.any():
                    break
                self._release()
                continue
            self.active = runnable == at
            others = runnable[~self.active]
            merge = int(others.min()) if others.size else _DONE
            warps = self._count(self.active)
            uniform = self._whole_warps(self.active)
            while True:
                instruction = code[at]
                issued[at] += warps
                self._wait(instruction)
                lanes = uniform if instruction.uniform else self.active
                guard = instruction.guard
                if guard.number != TRUE or guard.negated:
                    lanes = lanes & self._predicate(guard)
                method = methods[at]
                if method is None:
                    raise NotImplementedError(f"{instruction.opcode} at {instruction.address:#x}")
                at += 1
                if method(instruction, lanes):  # it may have gone elsewhere
                    self.pc[self.active & (self.pc == self._moved)] = at
                    break
                if at == merge:
                    self.pc[self.active] = at
                    break
        for instruction, count in zip(code, issued.tolist(), strict=True):
            if count:
                self.counts.issued[instruction.opcode] += count
        if self.loaded:
            self.counts.load_sectors = len(np.unique(np.concatenate(self.loaded)))
        return self.counts

    _moved = -1  # the pc of lanes that a branch leaves where they are

    def _count(self, lanes: Array) -> int:
        """Warps that any of the lanes is in."""
        return int(lanes.reshape(-1, WARP).any(1).sum())

    def _whole_warps(self, lanes: Array) -> Array:
        return np.repeat(lanes.reshape(-1, WARP).any(1), WARP)

    def _go(self, lanes: Array, target: Any) -> bool:
        self.pc[self.active] = self._moved
        self.pc[lanes] = target
        return True

    def _release(self) -> None:
        """Let go the blocks all of whose threads have come to the barrier or ended."""
        self.at_barrier[:] = False

    def _wait(self, instruction: Instruction) -> None:
        if not self.pending:
            return
        for operand in instruction.operands:
            registers = [operand] if isinstance(operand, Register) else []
            if isinstance(operand, Address):
                registers = [operand.base]
            if any(r.number in self.pending for r in registers):
                self._arrive(self.active)
                return

    def _arrive(self, lanes: Array) -> None:
        """Their warps wait as long as a load takes, in which everything arrives that is under way."""
        self.counts.waits += self._count(lanes)
        self.pending.clear()
        self.copies[self._whole_warps(lanes)] = 0

    def _BRA(self, i: Instruction, lanes: Array) -> bool:
        *conditions, target = i.operands
        for condition in conditions:
            assert isinstance(condition, Predicate)
            lanes = lanes & self._predicate(condition)
        assert isinstance(target, Immediate)
        return self._go(lanes, self.index[target.bits])

    _CALL = _BRA

    def _RET(self, i: Instruction, lanes: Array) -> bool:
        register = i.operands[0]
        assert isinstance(register, Register)
        targets = self.r[register.number][lanes]
        return self._go(lanes, [self.index[int(t)] for t in targets])

    def _EXIT(self, i: Instruction, lanes: Array) -> bool:
        return self._go(lanes, _DONE)

    def _BAR(self, i: Instruction, lanes: Array) -> bool:
        self.at_barrier |= lanes
        self.pc[self.active] = self._moved
        return True

    def _nothing(self, i: Instruction, lanes: Array) -> None:
        pass

    _NOP = _BSSY = _BSYNC = _BREAK = _WARPSYNC = _nothing

    # -- operands -----------------------------------------------------------------------------------------------------

    def _predicate(self, operand: Operand) -> Array:
        assert isinstance(operand, Predicate)
        value = self.p[operand.number]
        return ~value if operand.negated else value

    def _bits(self, operand: Operand) -> Array:
        """The 32 bits of a source, its sign as it is."""
        if isinstance(operand, Register):
            return self.r[operand.number]
        if isinstance(operand, Immediate):
            return np.array([operand.bits], np.uint32)
        if isinstance(operand, Constant):
            return self._constant(operand, 4)[0]
        raise NotImplementedError(f"operand {operand}")

    def _constant(self, operand: Constant, width: int) -> list[Array]:
        if operand.bank != 0:
            raise NotImplementedError(f"operand {operand}")
        offsets = np.array([operand.offset])
        if operand.base is not None:
            offsets = operand.offset + self.r[operand.base.number].view(np.int32).astype(np.int64)
            offsets = np.clip(offsets, 0, len(self.constants) - width)
        if width == 1:
            return [self.constants[offsets].astype(np.uint32)]
        if width == 2:
            return [self.constants.view(np.uint16)[offsets // 2].astype(np.uint32)]
        return [self.constants.view(np.uint32)[offsets // 4 + k] for k in range(width // 4)]

    def _int(self, operand: Operand) -> Array:
        """As an integer modulo 2**32."""
        bits = self._bits(operand)
        sign = getattr(operand, "negated", "")
        if getattr(operand, "absolute", False):
            bits = _words(np.abs(bits.view(np.int32)))
        if sign == "-":
            return np.uint32(0) - bits
        return ~bits if sign == "~" else bits

    def _wide(self, operand: Operand) -> Array:
        """As an unsigned integer of 33 bits, in 64: adding ``-b`` is adding its complement and 1, with their carry."""
        bits = self._bits(operand).astype(np.uint64)
        sign = getattr(operand, "negated", "")
        if sign == "-":
            return np.uint64(1 << 32) - bits
        return np.uint64(0xFFFFFFFF) - bits if sign == "~" else bits

    def _pair(self, operand: Operand) -> Array:
        """Sixty-four bits."""
        if isinstance(operand, Register):
            if operand.number in (ZERO, UNIFORM[0] + 63):
                return np.zeros(1, np.uint64)
            low, high = self.r[operand.number], self.r[operand.number + 1]
        elif isinstance(operand, Constant):
            low, high = self._constant(operand, 8)
        else:
            bits = self._int(operand).view(np.int32).astype(np.int64)
            return bits.view(np.uint64)
        value = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return np.uint64(0) - value if getattr(operand, "negated", "") == "-" else value

    def _float(self, operand: Operand) -> Array:
        value = self._bits(operand).view(np.float32)
        if getattr(operand, "absolute", False):
            value = np.abs(value)
        return -value if getattr(operand, "negated", "") == "-" else value

    def _double(self, operand: Operand) -> Array:
        if isinstance(operand, Immediate):  # the upper half
            return np.array([operand.bits << 32], np.uint64).view(np.float64)
        assert isinstance(operand, (Register, Constant))
        value = self._pair(replace(operand, negated="")).view(np.float64)
        if getattr(operand, "absolute", False):
            value = np.abs(value)
        return -value if getattr(operand, "negated", "") == "-" else value

    def _halves(self, operand: Operand, bf16: bool) -> tuple[Array, Array]:
        """The two 16-bit floats of a word, the lower first, as float32."""
        bits = self._bits(operand)
        part = getattr(operand, "part", "")
        low, high = bits & np.uint32(0xFFFF), bits >> np.uint32(16)
        if isinstance(operand, Immediate):
            low = high = bits & np.uint32(0xFFFF)
        if part == "H0_H0":
            high = low
        elif part == "H1_H1":
            low = high
        values = []
        for half in (low, high):
            value = (
                (half << np.uint32(16)).view(np.float32)
                if bf16
                else half.astype(np.uint16).view(np.float16).astype(np.float32)
            )
            if getattr(operand, "absolute", False):
                value = np.abs(value)
            values.append(-value if getattr(operand, "negated", "") == "-" else value)
        return values[0], values[1]

    # -- results ------------------------------------------------------------------------------------------------------

    def _set(self, operand: Operand, value: Array, lanes: Array) -> None:
        assert isinstance(operand, Register)
        if operand.number not in (ZERO, UNIFORM[0] + 63):
            np.copyto(self.r[operand.number], value, where=lanes, casting="unsafe")

    def _set_pair(self, operand: Operand, value: Array, lanes: Array) -> None:
        assert isinstance(operand, Register)
        if operand.number not in (ZERO, UNIFORM[0] + 63):
            np.copyto(self.r[operand.number], value & np.uint64(0xFFFFFFFF), where=lanes, casting="unsafe")
            np.copyto(self.r[operand.number + 1], value >> np.uint64(32), where=lanes, casting="unsafe")

    def _set_float(self, operand: Operand, value: Array, lanes: Array) -> None:
        self._set(operand, np.asarray(value, np.float32).view(np.uint32), lanes)

    def _set_double(self, operand: Operand, value: Array, lanes: Array) -> None:
        self._set_pair(operand, np.asarray(value, np.float64).view(np.uint64), lanes)

    def _set_predicate(self, operand: Operand, value: Array, lanes: Array) -> None:
        assert isinstance(operand, Predicate)
        if operand.number not in (TRUE, UNIFORM[1] + TRUE):
            np.copyto(self.p[operand.number], value, where=lanes)

    # -- integers -----------------------------------------------------------------------------------------------------

    def _split(self, i: Instruction) -> tuple[Operand, list[Predicate], list[Operand], list[Predicate]]:
        """Result, carries out, sources, carries in."""
        result, *rest = i.operands
        out: list[Predicate] = []
        sources: list[Operand] = []
        into: list[Predicate] = []
        for operand in rest:
            if isinstance(operand, Predicate):
                (into if sources else out).append(operand)
            else:
                sources.append(operand)
        return result, out, sources, into

    def _carry(self, carries: Sequence[Predicate], sum: Array, lanes: Array) -> None:
        for least, carry in enumerate(carries, 1):
            self._set_predicate(carry, sum >> np.uint64(32) >= np.uint64(least), lanes)

    def _IADD3(self, i: Instruction, lanes: Array) -> None:
        result, out, sources, into = self._split(i)
        sum = self._wide(sources[0]) + self._wide(sources[1]) + self._wide(sources[2])
        for carry in into:
            sum = sum + self._predicate(carry)
        self._set(result, sum & np.uint64(0xFFFFFFFF), lanes)
        self._carry(out, sum, lanes)

    _UIADD3 = _IADD3

    def _VIADD(self, i: Instruction, lanes: Array) -> None:
        result, a, b = i.operands
        self._set(result, self._int(a) + self._int(b), lanes)

    def _least(self, i: Instruction, a: Array, b: Array, which: Operand) -> Array:
        if "U32" not in i.modifiers:
            a, b = a.view(np.int32), b.view(np.int32)
        return np.where(self._predicate(which), np.minimum(a, b), np.maximum(a, b)).astype(np.int64) & 0xFFFFFFFF

    def _VIMNMX(self, i: Instruction, lanes: Array) -> None:
        result, a, b, which = i.operands
        self._set(result, self._least(i, self._int(a), self._int(b), which), lanes)

    def _VIADDMNMX(self, i: Instruction, lanes: Array) -> None:
        result, a, b, c, which = i.operands
        self._set(result, self._least(i, self._int(a) + self._int(b), self._int(c), which), lanes)

    def _IABS(self, i: Instruction, lanes: Array) -> None:
        self._set(i.operands[0], _words(np.abs(self._int(i.operands[1]).view(np.int32))), lanes)

    def _IMAD(self, i: Instruction, lanes: Array) -> None:
        result, out, sources, into = self._split(i)
        if "WIDE" in i.modifiers or "HI" in i.modifiers:
            c = self._pair(sources[2])
            a, b = self._int(sources[0]), self._int(sources[1])
            if "U32" in i.modifiers:
                product = a.astype(np.uint64) * b.astype(np.uint64)
            else:
                product = (a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)).view(np.uint64)
            sum = product + c
            if "HI" in i.modifiers:
                self._set(result, sum >> np.uint64(32), lanes)
            else:
                self._set_pair(result, sum, lanes)
            for carry in out:
                self._set_predicate(carry, sum < c, lanes)
            return
        wide = self._int(sources[0]).astype(np.uint64) * self._int(sources[1]).astype(np.uint64) & np.uint64(0xFFFFFFFF)
        sum = wide + self._wide(sources[2])
        for carry in into:
            sum = sum + self._predicate(carry)
        self._set(result, sum & np.uint64(0xFFFFFFFF), lanes)
        self._carry(out, sum, lanes)

    _UIMAD = _IMAD

    def _LEA(self, i: Instruction, lanes: Array) -> None:
        result, out, sources, into = self._split(i)
        *sources, shift = sources
        assert isinstance(shift, Immediate)
        s = np.uint64(shift.bits)
        if "HI" in i.modifiers:
            if "SX32" in i.modifiers:
                a = self._int(sources[0]).view(np.int32).astype(np.int64).view(np.uint64)
            else:
                a = self._int(sources[0]).astype(np.uint64) | self._int(sources[2]).astype(np.uint64) << np.uint64(32)
            shifted = (a << s) >> np.uint64(32)
        else:
            shifted = self._int(sources[0]).astype(np.uint64) << s & np.uint64(0xFFFFFFFF)
        sum = shifted + self._wide(sources[1])
        for carry in into:
            sum = sum + self._predicate(carry)
        self._set(result, sum & np.uint64(0xFFFFFFFF), lanes)
        self._carry(out, sum, lanes)

    _ULEA = _LEA

    def _SHF(self, i: Instruction, lanes: Array) -> None:
        result, low, shift, high = i.operands
        a, c = self._int(low).astype(np.uint64), self._int(high).astype(np.uint64)
        s = self._int(shift).astype(np.uint64)
        s = s & np.uint64(31) if "W" in i.modifiers else np.minimum(s, np.uint64(63))
        if "L" in i.modifiers:
            value = (a | c << np.uint64(32)) << s >> np.uint64(32) if "U64" in i.modifiers else a << s
        elif "U64" in i.modifiers or "S64" in i.modifiers:
            value = (a | c << np.uint64(32)) >> s
        elif "S32" in i.modifiers:
            value = (c.astype(np.uint32).view(np.int32).astype(np.int64) >> s.astype(np.int64)).view(np.uint64)
        else:
            value = c >> s
        self._set(result, value & np.uint64(0xFFFFFFFF), lanes)

    _USHF = _SHF

    def _LOP3(self, i: Instruction, lanes: Array) -> None:
        result, out, sources, into = self._split(i)
        if isinstance(result, Predicate):
            out, (result, *sources) = [result], sources
        a, b, c, table = sources
        assert isinstance(table, Immediate)
        bits = [self._int(operand) for operand in (a, b, c)]
        value = np.zeros(np.broadcast_shapes(*(x.shape for x in bits)), np.uint32)
        for row in range(8):
            if table.bits >> row & 1:
                term = ~np.uint32(0) & (bits[0] if row & 4 else ~bits[0])
                value = value | term & (bits[1] if row & 2 else ~bits[1]) & (bits[2] if row & 1 else ~bits[2])
        self._set(result, value, lanes)
        for predicate in out:
            self._set_predicate(predicate, (value != 0) | self._predicate(into[0]), lanes)

    _ULOP3 = _LOP3

    def _PLOP3(self, i: Instruction, lanes: Array) -> None:
        first, second, *inputs, table, other = i.operands
        a, b, c = map(self._predicate, inputs)
        row = a * 4 + b * 2 + c * 1
        for result, bits in ((first, table), (second, other)):
            assert isinstance(bits, Immediate)
            self._set_predicate(result, (bits.bits >> row & 1).astype(bool), lanes)

    _UPLOP3 = _PLOP3

    def _ISETP(self, i: Instruction, lanes: Array) -> None:
        comparison, combination = i.modifiers[0], _combination(i)
        first, second, a, b, *inputs = i.operands
        x, y = self._int(a), self._int(b)
        if "U32" not in i.modifiers:
            x, y = x.view(np.int32), y.view(np.int32)
        value = _COMPARE[comparison](x, y)
        if "EX" in i.modifiers:
            below = self._predicate(inputs[1])
            if comparison in ("EQ", "NE"):
                value = value & below if comparison == "EQ" else value | below
            else:
                value = _COMPARE[comparison[0] + "T"](x, y) | (x == y) & below
        self._combine(combination, first, second, value, inputs[0], lanes)

    _UISETP = _ISETP

    def _combine(self, how: str, first: Operand, second: Operand, value: Array, other: Operand, lanes: Array) -> None:
        with_ = self._predicate(other)
        join = _COMBINE[how]
        one, two = join(value, with_), join(~value, with_)
        self._set_predicate(first, one, lanes)
        self._set_predicate(second, two, lanes)

    def _SEL(self, i: Instruction, lanes: Array) -> None:
        result, a, b, which = i.operands
        self._set(result, np.where(self._predicate(which), self._int(a), self._int(b)), lanes)

    _USEL = _SEL

    def _PRMT(self, i: Instruction, lanes: Array) -> None:
        if i.modifiers:
            raise NotImplementedError(i.opcode)
        result, a, selector, c = i.operands
        both = self._int(a).astype(np.uint64) | self._int(c).astype(np.uint64) << np.uint64(32)
        select = self._int(selector).astype(np.uint64)
        value = np.uint64(0)
        for k in range(4):
            nibble = select >> np.uint64(4 * k) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            value = value | byte << np.uint64(8 * k)
        self._set(result, value, lanes)

    _UPRMT = _PRMT

    def _SGXT(self, i: Instruction, lanes: Array) -> None:
        result, a, width = i.operands
        assert isinstance(width, Immediate)
        shift = np.uint32(32 - width.bits)
        bits = self._int(a) << shift
        self._set(
            result, bits >> shift if "U32" in i.modifiers else _words(bits.view(np.int32) >> np.int32(shift)), lanes
        )

    def _P2R(self, i: Instruction, lanes: Array) -> None:
        result, _, a, mask = i.operands
        assert isinstance(mask, Immediate)
        shift = 8 * int(i.modifiers[0][1]) if i.modifiers else 0
        predicates = sum((self.p[k].astype(np.uint32) << np.uint32(k + shift) for k in range(TRUE)), np.uint32(0))
        kept = np.uint32(mask.bits << shift)
        self._set(result, self._int(a) & ~kept | predicates & kept, lanes)

    def _R2P(self, i: Instruction, lanes: Array) -> None:
        _, a, mask = i.operands
        assert isinstance(a, Register)
        assert isinstance(mask, Immediate)
        shift = 8 * int(a.part[1]) if a.part else 0
        bits = self.r[a.number] >> np.uint32(shift)
        for k in range(TRUE):
            if mask.bits >> k & 1:
                self._set_predicate(Predicate(k), (bits >> np.uint32(k) & np.uint32(1)).astype(bool), lanes)

    def _MOV(self, i: Instruction, lanes: Array) -> None:
        self._set(i.operands[0], self._int(i.operands[1]), lanes)

    _UMOV = _MOV

    def _CS2R(self, i: Instruction, lanes: Array) -> None:
        self._set_pair(i.operands[0], np.zeros(1, np.uint64), lanes)

    def _S2R(self, i: Instruction, lanes: Array) -> None:
        result, special = i.operands
        assert isinstance(special, Special)
        self._set(result, self.special[special.name].astype(np.uint32), lanes)

    def _S2UR(self, i: Instruction, lanes: Array) -> None:
        self._S2R(i, self._whole_warps(lanes))

    def _R2UR(self, i: Instruction, lanes: Array) -> None:
        result, a = i.operands
        value, warps = self._int(a).reshape(-1, WARP), lanes.reshape(-1, WARP)
        first = np.take_along_axis(value, warps.argmax(1)[:, None], 1)
        self._set(result, np.repeat(first[:, 0], WARP), self._whole_warps(lanes))

    # -- floats -------------------------------------------------------------------------------------------------------

    def _FADD(self, i: Instruction, lanes: Array) -> None:
        self._set_float(i.operands[0], self._float(i.operands[1]) + self._float(i.operands[2]), lanes)

    def _FMUL(self, i: Instruction, lanes: Array) -> None:
        self._set_float(i.operands[0], self._float(i.operands[1]) * self._float(i.operands[2]), lanes)

    def _FFMA(self, i: Instruction, lanes: Array) -> None:
        a, b, c = (self._float(operand).astype(np.float64) for operand in i.operands[1:])
        self._set_float(i.operands[0], a * b + c, lanes)

    def _FMNMX(self, i: Instruction, lanes: Array) -> None:
        result, a, b, which = i.operands
        x, y = self._float(a), self._float(b)
        low, high = (np.minimum, np.maximum) if "NAN" in i.modifiers else (np.fmin, np.fmax)
        self._set_float(result, np.where(self._predicate(which), low(x, y), high(x, y)), lanes)

    def _FSEL(self, i: Instruction, lanes: Array) -> None:
        result, a, b, which = i.operands
        self._set_float(result, np.where(self._predicate(which), self._float(a), self._float(b)), lanes)

    def _FSETP(self, i: Instruction, lanes: Array) -> None:
        first, second, a, b, other = i.operands
        value = _float_compare(i.modifiers[0], self._float(a), self._float(b))
        self._combine(_combination(i), first, second, value, other, lanes)

    def _FCHK(self, i: Instruction, lanes: Array) -> None:
        """Whether a quotient needs the slow path: where an operand, the result, or what is between may be no number or
        subnormal."""
        result, a, b = i.operands
        (x, n), (y, m) = (np.frexp(self._float(operand)) for operand in (a, b))
        usual = (x == 0) | (np.abs(n) < 100) & (np.abs(n - m) < 100)
        self._set_predicate(result, ~(np.isfinite(x) & np.isfinite(y) & (y != 0) & (np.abs(m) < 100) & usual), lanes)

    def _HSETP2(self, i: Instruction, lanes: Array) -> None:
        first, second, a, *bs, other = i.operands
        bf16, comparison = "BF16_V2" in i.modifiers, next(m for m in i.modifiers if m in _FLOAT_COMPARISONS)
        x, y = self._halves(a, bf16), self._halves(bs[0], bf16)
        join = _COMBINE[_combination(i)]
        for k, result in enumerate((first, second)):
            value = _float_compare(comparison, x[k], y[k])
            self._set_predicate(result, join(value, self._predicate(other)), lanes)

    def _HSET2(self, i: Instruction, lanes: Array) -> None:
        """All bits of a half are set where it holds."""
        result, a, *bs, other = i.operands
        if "BF" in i.modifiers:
            raise NotImplementedError(i.opcode)
        bf16, comparison = "BF16_V2" in i.modifiers, next(m for m in i.modifiers if m in _FLOAT_COMPARISONS)
        x, y = self._halves(a, bf16), self._halves(bs[0], bf16)
        join = _COMBINE[_combination(i)]
        low, high = (join(_float_compare(comparison, x[k], y[k]), self._predicate(other)) for k in (0, 1))
        self._set(result, low * np.uint32(0xFFFF) | high * np.uint32(0xFFFF0000), lanes)

    def _set_halves(self, operand: Operand, low: Array, high: Array, bf16: bool, lanes: Array) -> None:
        self._set(operand, _narrow(low, bf16) | _narrow(high, bf16) << np.uint32(16), lanes)

    def _HFMA2(self, i: Instruction, lanes: Array) -> None:
        result, a, b, *rest = i.operands
        bf16 = "BF16_V2" in i.modifiers
        if isinstance(rest[-1], Immediate):  # two of them are one word
            if not (isinstance(b, Register) and b.number == ZERO):
                raise NotImplementedError(i.opcode)
            self._set(result, np.array([rest[-1].bits], np.uint32), lanes)
            return
        x, y, z = self._halves(a, bf16), self._halves(b, bf16), self._halves(rest[-1], bf16)
        self._set_halves(result, x[0] * y[0] + z[0], x[1] * y[1] + z[1], bf16, lanes)

    def _HADD2(self, i: Instruction, lanes: Array) -> None:
        result, a, b = i.operands
        if "F32" in i.modifiers:  # only the lower half counts
            self._set_float(result, self._halves(a, False)[0] + self._halves(b, False)[0], lanes)
            return
        bf16 = "BF16_V2" in i.modifiers
        x, y = self._halves(a, bf16), self._halves(b, bf16)
        self._set_halves(result, x[0] + y[0], x[1] + y[1], bf16, lanes)

    def _HMUL2(self, i: Instruction, lanes: Array) -> None:
        result, a, b = i.operands
        bf16 = "BF16_V2" in i.modifiers
        x, y = self._halves(a, bf16), self._halves(b, bf16)
        self._set_halves(result, x[0] * y[0], x[1] * y[1], bf16, lanes)

    def _HMNMX2(self, i: Instruction, lanes: Array) -> None:
        result, a, *bs, which = i.operands
        bf16 = "BF16_V2" in i.modifiers or "BF16" in i.modifiers
        x, y = self._halves(a, bf16), self._halves(bs[0], bf16)
        low, high = (np.minimum, np.maximum) if "NAN" in i.modifiers else (np.fmin, np.fmax)
        values = [np.where(self._predicate(which), low(x[k], y[k]), high(x[k], y[k])) for k in (0, 1)]
        self._set_halves(result, values[0], values[1], bf16, lanes)

    def _VHMNMX(self, i: Instruction, lanes: Array) -> None:
        result, a, b, c, *which = i.operands
        bf16 = any("BF16" in modifier for modifier in i.modifiers)
        x, y, z = (self._halves(operand, bf16) for operand in (a, b, c))
        low, high = (np.minimum, np.maximum) if "NAN" in i.modifiers else (np.fmin, np.fmax)
        least = self._predicate(which[0])
        values = [np.where(least, low(low(x[k], y[k]), z[k]), high(high(x[k], y[k]), z[k])) for k in (0, 1)]
        self._set_halves(result, values[0], values[1], bf16, lanes)

    def _F2FP(self, i: Instruction, lanes: Array) -> None:
        result, high, low = i.operands
        if "PACK_AB" not in i.modifiers:
            raise NotImplementedError(i.opcode)
        self._set_halves(result, self._float(low), self._float(high), "BF16" in i.modifiers, lanes)

    def _DADD(self, i: Instruction, lanes: Array) -> None:
        self._set_double(i.operands[0], self._double(i.operands[1]) + self._double(i.operands[2]), lanes)

    def _DMUL(self, i: Instruction, lanes: Array) -> None:
        self._set_double(i.operands[0], self._double(i.operands[1]) * self._double(i.operands[2]), lanes)

    def _DFMA(self, i: Instruction, lanes: Array) -> None:
        """With a product of 64 bits, which is not exact: the last bit may be another."""
        a, b, c = (self._double(operand).astype(np.longdouble) for operand in i.operands[1:])
        self._set_double(i.operands[0], a * b + c, lanes)

    def _DSETP(self, i: Instruction, lanes: Array) -> None:
        first, second, a, b, other = i.operands
        value = _float_compare(i.modifiers[0], self._double(a), self._double(b))
        self._combine(_combination(i), first, second, value, other, lanes)

    def _F2F(self, i: Instruction, lanes: Array) -> None:
        if i.modifiers == ("F32", "F64"):
            self._set_float(i.operands[0], self._double(i.operands[1]), lanes)
        elif i.modifiers == ("F64", "F32"):
            self._set_double(i.operands[0], self._float(i.operands[1]), lanes)
        else:
            raise NotImplementedError(i.opcode)

    def _MUFU(self, i: Instruction, lanes: Array) -> None:
        if i.modifiers[0] in ("RCP64H", "RSQ64H"):  # of the upper halves of doubles
            x = (self._bits(i.operands[1]).astype(np.uint64) << np.uint64(32)).view(np.float64)
            x = -x if getattr(i.operands[1], "negated", "") == "-" else x
            half = np.asarray(_FUNCTIONS[i.modifiers[0].removesuffix("64H")](x)).view(np.uint64) >> np.uint64(32)
            self._set(i.operands[0], half, lanes)
            return
        x = self._float(i.operands[1]).astype(np.float64)
        self._set_float(i.operands[0], _FUNCTIONS[i.modifiers[0]](x), lanes)

    def _I2F(self, i: Instruction, lanes: Array) -> None:
        """Rounded up, as divisions have it."""
        source = i.operands[1]
        if "U64" in i.modifiers:
            exact = self._pair(source)
        else:
            exact = self._int(source)
            exact = exact if "U32" in i.modifiers else exact.view(np.int32)
        if "F64" in i.modifiers:
            self._set_double(i.operands[0], exact, lanes)
            return
        value = exact.astype(np.float32)
        short = value.astype(np.float64) < exact.astype(np.float64)
        value = np.where(short & ("RP" in i.modifiers), np.nextafter(value, np.float32(np.inf)), value)
        self._set_float(i.operands[0], value, lanes)

    def _I2FP(self, i: Instruction, lanes: Array) -> None:
        value = self._int(i.operands[1])
        self._set_float(i.operands[0], value if "U32" in i.modifiers else value.view(np.int32), lanes)

    def _F2I(self, i: Instruction, lanes: Array) -> None:
        value = np.trunc(self._float(i.operands[1]).astype(np.float64))
        if "TRUNC" not in i.modifiers:
            raise NotImplementedError(i.opcode)
        if "U64" in i.modifiers:
            self._set_pair(i.operands[0], np.clip(value, 0, 2.0**64 - 2048).astype(np.uint64), lanes)
        elif "U32" in i.modifiers:
            self._set(i.operands[0], np.clip(value, 0, 2.0**32 - 1).astype(np.uint64), lanes)
        else:
            raise NotImplementedError(i.opcode)

    # -- memory -------------------------------------------------------------------------------------------------------

    def _LDC(self, i: Instruction, lanes: Array) -> None:
        result, constant = i.operands
        assert isinstance(result, Register)
        assert isinstance(constant, Constant)
        width = _width(i)
        for k, word in enumerate(self._constant(constant, width)):
            self._set(Register(result.number + k), word, lanes)

    _ULDC = _LDC

    def _addresses(self, address: Operand) -> Array:
        assert isinstance(address, Address)
        narrow = self._bits(address.base).astype(np.int64)
        value = self._pair(address.base).view(np.int64) if address.wide else narrow
        if address.uniform.number != ZERO:
            value = value + self._bits(address.uniform).astype(np.int64)
        return np.broadcast_to(value + address.offset, self.pc.shape)

    def _LDG(self, i: Instruction, lanes: Array) -> None:
        result, address = (o for o in i.operands if not isinstance(o, Predicate))
        assert isinstance(result, Register)
        width = _width(i)
        self.pending.update(range(result.number, result.number + max(1, width // 4)))
        if lanes.any():
            for k, word in enumerate(self._load(i, address, lanes)):
                self.r[result.number + k][lanes] = word

    def _load(self, i: Instruction, address: Operand, lanes: Array) -> list[Array]:
        """Words of these lanes, from global memory."""
        addresses, width = self._addresses(address), _width(i)
        self.counts.load_touched += _distinct(addresses >> 5, lanes)
        self.counts.load_lines += _distinct(addresses >> 7, lanes)
        sectors = addresses[lanes] >> 5 | self.block[lanes].astype(np.int64) << 48
        self.loaded.append(np.unique(sectors))
        buffer, at = self.memory.find(addresses[lanes], width)
        return _read(buffer, at, width, i)

    def _LDGSTS(self, i: Instruction, lanes: Array) -> None:
        """A copy to shared memory, done at once; of zeros where a predicate says that the source does not exist.

        Where only a part of it exists, the address is not aligned, which is an error.
        """
        to, source, *predicates = i.operands
        exists, width = lanes, _width(i)
        for predicate in predicates:
            exists = exists & self._predicate(predicate)
        words = np.zeros((width // 4, self.pc.size), np.uint32)
        if exists.any():
            words[:, exists] = self._load(i, source, exists)
        if lanes.any():
            at = self._shared_at(to, lanes, width)
            _write(self.shared.reshape(-1), at, width, list(words[:, lanes]))
        self.copies[exists] |= 1

    def _LDGDEPBAR(self, i: Instruction, lanes: Array) -> None:
        """What was copied since the last one is a group."""
        self.copies[lanes] <<= 1

    def _DEPBAR(self, i: Instruction, lanes: Array) -> None:
        """Until at most so many groups of copies are under way; they have scoreboard 0."""
        board, most = i.operands
        assert isinstance(most, Immediate)
        late = lanes & (self.copies >> most.bits + 1 != 0)
        if board == Special("SB0") and late.any():
            self._arrive(late)

    def _STG(self, i: Instruction, lanes: Array) -> None:
        if not lanes.any():
            return
        address, value = i.operands
        assert isinstance(value, Register)
        width = _width(i)
        addresses = self._addresses(address)
        self.counts.store_lines += _distinct(addresses >> 7, lanes)
        self.counts.store_sectors += _distinct(addresses >> 5, lanes)
        buffer, at = self.memory.find(addresses[lanes], width)
        _write(buffer, at, width, [self._bits(Register(_next(value, k)))[lanes] for k in range(max(1, width // 4))])

    def _shared_at(self, address: Operand, lanes: Array, width: int) -> Array:
        addresses = self._addresses(address) & 0xFFFFFF  # above is the window that shared memory has among addresses
        wavefronts = _wavefronts(addresses, lanes, width)
        self.counts.shared += int(wavefronts.sum())
        self.counts.conflicts += int((wavefronts[wavefronts > 0] - 1).sum())
        if (addresses[lanes] % width).any() or (addresses[lanes] + width > self.shared.shape[1]).any():
            raise IndexError(f"no shared memory at {int(addresses[lanes].max()):#x}")
        return addresses[lanes] + self.block[lanes] * self.shared.shape[1]

    def _LDS(self, i: Instruction, lanes: Array) -> None:
        result, address = i.operands
        assert isinstance(result, Register)
        width = _width(i)
        if lanes.any():
            at = self._shared_at(address, lanes, width)
            for k, word in enumerate(_read(self.shared.reshape(-1), at, width, i)):
                self.r[result.number + k][lanes] = word

    def _STS(self, i: Instruction, lanes: Array) -> None:
        address, value = i.operands
        assert isinstance(value, Register)
        width = _width(i)
        if lanes.any():
            at = self._shared_at(address, lanes, width)
            words = [self._bits(Register(_next(value, k)))[lanes] for k in range(max(1, width // 4))]
            _write(self.shared.reshape(-1), at, width, words)

    def _local_at(self, address: Operand) -> int:
        assert isinstance(address, Address)
        return address.offset

    def _LDL(self, i: Instruction, lanes: Array) -> None:
        result, address = i.operands
        assert isinstance(result, Register)
        for k in range(_width(i) // 4):
            self._set(Register(result.number + k), self.local[self._local_at(address) + 4 * k], lanes)

    def _STL(self, i: Instruction, lanes: Array) -> None:
        address, value = i.operands
        assert isinstance(value, Register)
        for k in range(_width(i) // 4):
            slot = self.local.setdefault(self._local_at(address) + 4 * k, np.zeros_like(self.r[0]))
            np.copyto(slot, self.r[_next(value, k)], where=lanes)

    def _LDSM(self, i: Instruction, lanes: Array) -> None:
        """Matrices of 8 rows of 16 bytes, at addresses of the first lanes: lane k gets word k % 4 of row k // 4."""
        if i.modifiers[:2] != ("16", "M88") or not lanes.all():
            raise NotImplementedError(i.opcode)
        result, address = i.operands
        assert isinstance(result, Register)
        count = int(i.modifiers[2]) if len(i.modifiers) > 2 else 1
        lane = np.arange(self.pc.size) % WARP
        at = self._shared_at(address, lane < 8 * count, 16).reshape(-1, count, 8)
        words = self.shared.reshape(-1).view(np.uint32)[at[..., None] // 4 + np.arange(4)]
        for k in range(count):
            self._set(Register(result.number + k), words[:, k].reshape(-1), lanes)

    def _SHFL(self, i: Instruction, lanes: Array) -> None:
        inside, result, a, by, _ = i.operands
        value = self._int(a).reshape(-1, WARP)
        lane = np.arange(WARP)
        distance = np.broadcast_to(self._int(by).astype(np.int64), self.pc.shape).reshape(-1, WARP)
        source = {"BFLY": lane ^ distance, "IDX": distance, "UP": lane - distance, "DOWN": lane + distance}[
            i.modifiers[0]
        ]
        exists = (source >= 0) & (source < WARP)
        taken = np.take_along_axis(value, np.where(exists, source, lane), 1)
        self._set(result, taken.reshape(-1), lanes)
        self._set_predicate(inside, exists.reshape(-1), lanes)


_COMPARE = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
_FLOAT_COMPARISONS = {*_COMPARE, *(f"{name}U" for name in _COMPARE), "NAN", "NUM"}
_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "RCP": lambda x: 1 / x,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _combination(i: Instruction) -> str:
    """How the result of a comparison is combined with another predicate."""
    return next(modifier for modifier in i.modifiers if modifier in _COMBINE)


def _float_compare(name: str, a: Array, b: Array) -> Array:
    """Those that end in U hold where either is NaN, the others do not."""
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("NAN", "NUM"):
        return unordered if name == "NAN" else ~unordered
    if name.endswith("U"):
        return _COMPARE[name[:-1]](a, b) | unordered
    return _COMPARE[name](a, b) & ~unordered


def _narrow(value: Array, bf16: bool) -> Array:
    """float32 as the bits of a 16-bit float: to nearest, ties to even; a NaN is 0x7fff."""
    if not bf16:
        half = value.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        half = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), half)


def _width(i: Instruction) -> int:
    """Bytes that each lane moves."""
    return next((_WIDTHS[modifier] for modifier in i.modifiers if modifier in _WIDTHS), 4)


def _next(register: Register, k: int) -> int:
    return register.number if register.number == ZERO else register.number + k


def _read(buffer: Array, at: Array, width: int, i: Instruction) -> list[Array]:
    if width >= 4:
        return [buffer.view(np.uint32)[at // 4 + k] for k in range(width // 4)]
    value = buffer[at] if width == 1 else buffer.view(np.uint16)[at // 2]
    if "S8" in i.modifiers or "S16" in i.modifiers:
        value = value.view(np.int8 if width == 1 else np.int16).astype(np.int32).view(np.uint32)
    return [value.astype(np.uint32)]


def _write(buffer: Array, at: Array, width: int, words: Sequence[Array]) -> None:
    if width >= 4:
        for k, word in enumerate(words):
            buffer.view(np.uint32)[at // 4 + k] = word
    elif width == 2:
        buffer.view(np.uint16)[at // 2] = words[0] & np.uint32(0xFFFF)
    else:
        buffer[at] = words[0] & np.uint32(0xFF)


def _distinct(keys: Array, lanes: Array) -> int:
    """How many different ones the lanes of each warp have, added up."""
    keys = np.where(lanes, keys, -1).reshape(-1, WARP)
    ordered = np.sort(keys, 1)
    new = np.diff(ordered, axis=1, prepend=np.full((len(ordered), 1), -1)) != 0
    return int(new.sum())


def _wavefronts(addresses: Array, lanes: Array, width: int) -> Array:
    """Of shared memory, for each group of lanes: in one, a bank serves one word, to any number of lanes.

    Groups are warps; for accesses of 8 and 16 bytes halves and quarters of them. So one would do for any group.
    """
    words = max(1, width // 4)
    word = np.where(lanes, addresses >> 2, -1).reshape(-1, words, WARP // words)
    per_lane = np.where(word[..., None] < 0, -1, word[..., None] + np.arange(words)).reshape(*word.shape[:2], -1)
    ordered = np.sort(per_lane, -1)
    first = np.diff(ordered, axis=-1, prepend=np.full((*ordered.shape[:2], 1), -1)) != 0
    first &= ordered >= 0
    group = np.arange(ordered.shape[0] * ordered.shape[1]).reshape(*ordered.shape[:2], 1)
    banks = np.bincount((group * 32 + ordered % 32)[first], minlength=ordered.shape[0] * ordered.shape[1] * 32).reshape(
        -1, 32
    )
    return banks.max(1)
