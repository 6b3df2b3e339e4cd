"""What kernels are compiled for: each of these is one ``tl.constexpr`` parameter, filled in by the launchers.

They have fields and nothing else: Triton's cache knows a compiled kernel by their values, and would not notice that a
property or a method has changed. What follows from several fields is computed in the kernels. There a field is a Python
number; where Triton 3.6 wants a constexpr of it, as in shapes and ``tl.static_range``, it gets a name of its own first:
``V: tl.constexpr = layout.V``.
"""

from typing import Any, NamedTuple


class LRN(NamedTuple):
    """``x * (K + SCALE * sum(x**2))**-(QUARTERS/4 + REST)``, summed over BEFORE + 1 + AFTER channels."""

    BEFORE: int
    AFTER: int
    SCALE: float
    K: float
    QUARTERS: int
    REST: float


class Pool(NamedTuple):
    """Windows of (KH, KW) elements: strides, padding, dilation; PADDED where some are partly outside of the map."""

    KH: int
    KW: int
    SH: int
    SW: int
    PH: int
    PW: int
    DH: int
    DW: int
    PADDED: bool = False


class Convolution(NamedTuple):
    """GROUPS convolutions of C channels with OC outputs; a row of weights has ROW elements, zeros at its end."""

    GROUPS: int
    C: int
    OC: int
    KH: int
    KW: int
    SH: int
    SW: int
    PH: int
    PW: int
    DH: int
    DW: int
    ROW: int


class Layout(NamedTuple):
    """How programs of BLOCK lanes share out a tensor of C channels, in groups of CHANNELS that LRN does not cross.

    A lane owns V channels of a group at a time, which it loads in vectors of VECTOR: 1 in NCHW. Neighbouring pixels are
    PIXEL elements apart. INDEX counts lanes, ACC is the dtype of sums; both are Triton's.
    """

    C: int
    CHANNELS: int
    V: int
    VECTOR: int
    PIXEL: int
    CHANNELS_LAST: bool
    BLOCK: int
    INDEX: Any
    ACC: Any


class Tiles(NamedTuple):
    """How programs share out a tensor of C channels: in tiles of BP pixels with BC channels, 1 in NCHW.

    INDEX counts elements, ACC is the dtype of sums; both are Triton's.
    """

    C: int
    BP: int
    BC: int
    CHANNELS_LAST: bool
    INDEX: Any
    ACC: Any


class Augmentation(NamedTuple):
    """The factors of the channels, and how programs share out a crop: ROWS rows of BLOCK elements.

    Of so many rows AT_ONCE are loaded before any is stored.

    RESIZED where pictures are; ACC is Triton's dtype of what is computed.
    """

    RED: float
    GREEN: float
    BLUE: float
    CHANNELS_LAST: bool
    RESIZED: bool
    ROWS: int
    AT_ONCE: int
    BLOCK: int
    ACC: Any
