"""NVIDIA's machine code (SASS, of sm_75 and later) as ``cuobjdump -sass`` prints it, taken apart."""

import re
from dataclasses import dataclass

ZERO = 255  # RZ; the number of a register that is always zero
TRUE = 7  # PT; the number of a predicate that is always true
UNIFORM = 256, 8  # where uniform registers and uniform predicates are numbered from
_URZ, _UPT = "URZ", "UPT"

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@(!?)(U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;\s+/\* 0x([0-9a-f]{16}) \*/$")
_REGISTER = re.compile(r"^([-~]?)(\|?)(U?)R(Z|\d+)\|?((?:\.\w+)*)\|?$")
_PREDICATE = re.compile(r"^(!?)(U?)P(T|\d)$")
_CONSTANT = re.compile(r"^([-~]?)(\|?)c\[(0x[0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]\|?((?:\.\w+)*)$")
_ADDRESS = re.compile(r"\[([^\]]*)\]$")


@dataclass(frozen=True)
class Register:
    """A general register, uniform ones from ``UNIFORM[0]`` on.

    Args:
        number: ``ZERO`` of RZ.
        negated: "-", "~" (its bits inverted), or nothing.
        absolute: its absolute value is taken, then negated.
        part: ``.64``, ``.H0_H0``, ``.B1`` and the like, without the dot.
    """

    number: int
    negated: str = ""
    absolute: bool = False
    part: str = ""


@dataclass(frozen=True)
class Predicate:
    """A predicate, uniform ones from ``UNIFORM[1]`` on."""

    number: int
    negated: bool = False


@dataclass(frozen=True)
class Constant:
    """A word of a constant bank; in bank 0, the launch's parameters follow what the system has there."""

    bank: int
    offset: int
    base: Register | None = None
    negated: str = ""
    absolute: bool = False


@dataclass(frozen=True)
class Immediate:
    """Thirty-two bits, and the text that they were printed as."""

    bits: int
    text: str


@dataclass(frozen=True)
class Address:
    """``base + uniform + offset``; of 64 bits where ``wide``."""

    base: Register
    uniform: Register
    offset: int
    wide: bool


@dataclass(frozen=True)
class Special:
    """What an instruction reads under a name of its own, such as SR_TID.X."""

    name: str


Operand = Register | Predicate | Constant | Immediate | Address | Special


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        address: in bytes from the kernel's first.
        guard: it has an effect only in lanes where this holds.
        name: its opcode without modifiers.
        modifiers: in their order.
        operands: results come first.
    """

    address: int
    guard: Predicate
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    @property
    def uniform(self) -> bool:
        """Whether it is done once for a warp, not by its lanes."""
        return self.name.startswith("U")


def instructions(sass: str) -> list[Instruction]:
    """All instructions of one kernel, in their order in memory.

    Raises:
        ValueError: there is one that this does not understand.
    """
    return [_instruction(found) for line in sass.splitlines() if (found := _LINE.match(line))]


def _instruction(found: re.Match[str]) -> Instruction:
    address, negated, guard, opcode, operands, encoding = found.groups()
    name, *modifiers = opcode.split(".")
    predicate = _predicate(guard, bool(negated)) if guard else Predicate(TRUE)
    texts = _texts(operands or "")
    if name == "RET":  # RET.REL.NODEC R2 0x0
        texts = texts[0].split()
    try:
        read = tuple(_operand(text, int(encoding, 16) >> 32) for text in texts)
    except ValueError as error:
        raise ValueError(f"{opcode} {operands}: {error}") from None
    return Instruction(int(address, 16), predicate, name, tuple(modifiers), read)


def _texts(operands: str) -> list[str]:
    return [text.strip() for text in operands.split(",")] if operands else []


def _predicate(name: str, negated: bool) -> Predicate:
    found = _PREDICATE.match(name)
    if not found:
        raise ValueError(f"no predicate: {name}")
    _, uniform, number = found.groups()
    return Predicate((UNIFORM[1] if uniform else 0) + (TRUE if number == "T" else int(number)), negated)


def register(text: str) -> Register:
    """A register, from such as ``-|R5|.H0_H0`` or ``UR4.64``."""
    found = _REGISTER.match(text)
    if not found:
        raise ValueError(f"no register: {text}")
    sign, absolute, uniform, number, part = found.groups()
    if number == "Z":
        return Register(ZERO, sign, bool(absolute), part[1:])
    return Register(int(number) + (UNIFORM[0] if uniform else 0), sign, bool(absolute), part[1:])


def _operand(text: str, high_half: int) -> Operand:
    """``high_half``: of the encoding's first word, where a literal is."""
    text = text.replace(".reuse", "")
    if _PREDICATE.match(text):
        return _predicate(text.lstrip("!"), text.startswith("!"))
    if _REGISTER.match(text):
        return register(text)
    if found := _CONSTANT.match(text):
        sign, absolute, bank, base, offset, _ = found.groups()
        at = register(base) if base else None
        return Constant(int(bank, 16), int(offset or "0", 16), at, sign, bool(absolute))
    if text.endswith("]") and (inner := _ADDRESS.search(text)):
        return _address(inner[1])
    if re.match(r"^[-+]?(0x[0-9a-f]+|\d|INF|QNAN|SNAN)", text):
        integer = re.match(r"^-?0x[0-9a-f]+$", text)
        return Immediate(int(text, 16) & 0xFFFFFFFF if integer else high_half, text)
    if re.match(r"^(SR\w*[\w.]*|PR|B\d+|SB\d+|SRZ)$", text):
        return Special(text)
    raise ValueError(f"no operand: {text}")


def _address(text: str) -> Address:
    """``R2.64+UR4+-0x10``, in which anything may be absent."""
    base = uniform = Register(ZERO)
    offset, wide = 0, False
    for term in text.split("+"):
        if term.startswith("UR"):
            uniform = register(term)
        elif term.startswith("R"):
            base = register(term)
            wide = base.part == "64"
            if base.part not in ("", "64", "U32"):
                raise ValueError(f"no address: {text}")
        elif term:
            offset = int(term, 16)
    return Address(base, uniform, offset, wide)
