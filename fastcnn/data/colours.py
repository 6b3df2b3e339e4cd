"""Mean, deviation and principal components of the colours of many pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import Tensor

Triple = tuple[float, float, float]
_PAIRS = [(i, j) for i in range(3) for j in range(i, 3)]


@dataclass(frozen=True)
class Statistics:
    """Sums over pixels (r, g, b), from 0 to 255, as integers: whoever adds them up in whatever order gets the same.

    Mean and covariances derived from them are correctly rounded.

    Args:
        pixels: how many.
        sums: of r, g, b.
        products: of rr, rg, rb, gg, gb, bb.
    """

    pixels: int = 0
    sums: tuple[int, ...] = (0,) * 3
    products: tuple[int, ...] = (0,) * 6

    @classmethod
    def of(cls, picture: Tensor) -> Statistics:
        """Of a uint8 tensor of shape (..., 3) with fewer than 2**36 pixels."""
        pixels = picture.reshape(-1, 3).double()  # products of bytes and their sums are exact below 2**53
        products = (pixels.T @ pixels).tolist()
        return cls(len(pixels), tuple(map(int, pixels.sum(0).tolist())), tuple(int(products[i][j]) for i, j in _PAIRS))

    @classmethod
    def from_json(cls, sums: dict[str, Any]) -> Statistics:
        """Back from a file, such as ``packed.json``."""
        return cls(int(sums["pixels"]), tuple(map(int, sums["sums"])), tuple(map(int, sums["products"])))

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.pixels + other.pixels,
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(a + b for a, b in zip(self.products, other.products, strict=True)),
        )

    @property
    def mean(self) -> Triple:
        """Of each channel, from 0 to 255."""
        r, g, b = (float(Fraction(total, self.pixels)) for total in self.sums)
        return r, g, b

    @property
    def std(self) -> Triple:
        """Standard deviation of each channel."""
        covariance = self._covariance
        return math.sqrt(covariance[0][0]), math.sqrt(covariance[1][1]), math.sqrt(covariance[2][2])

    @property
    def eigenvalues(self) -> Triple:
        """Variances along the principal components of the pixels minus their mean, the largest first."""
        return self._components[0]

    @property
    def eigenvectors(self) -> tuple[Triple, Triple, Triple]:
        """The principal components, of length 1; the largest of each one's coordinates, the first of equals, is
        positive."""
        return self._components[1]

    @property
    def _covariance(self) -> list[list[float]]:
        covariance = [[0.0] * 3 for _ in range(3)]
        for (i, j), product in zip(_PAIRS, self.products, strict=True):
            exact = Fraction(self.pixels * product - self.sums[i] * self.sums[j], self.pixels**2)
            covariance[i][j] = covariance[j][i] = float(exact)
        return covariance

    @cached_property
    def _components(self) -> tuple[Triple, tuple[Triple, Triple, Triple]]:
        values, vectors = _eigen(self._covariance)
        first, second, third = sorted(range(3), key=lambda k: -values[k])
        a, b, c = (_with_sign(vectors[k]) for k in (first, second, third))
        return (max(values[first], 0.0), max(values[second], 0.0), max(values[third], 0.0)), (a, b, c)


def total(parts: Iterable[Statistics]) -> Statistics:
    """Their sum."""
    return sum(parts, Statistics())


def _with_sign(vector: list[float]) -> Triple:
    largest = max(vector, key=abs)
    r, g, b = (math.copysign(1.0, largest) * x for x in vector)
    return r, g, b


def _eigen(matrix: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Eigenvalues and eigenvectors of a symmetric 3x3 matrix by Jacobi's rotations.

    LAPACK's last bits depend on the machine; those of sums, products, quotients and square roots do not.
    """
    a = [list(row) for row in matrix]
    v = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # its rows become the vectors
    for p, q in [(0, 1), (0, 2), (1, 2)] * 12:
        if a[p][q] == 0.0:
            continue
        theta = (a[q][q] - a[p][p]) / (2 * a[p][q])
        t = math.copysign(1.0, theta) / (abs(theta) + math.sqrt(theta * theta + 1))
        c = 1 / math.sqrt(t * t + 1)
        s = t * c
        for k in range(3):  # columns p and q
            a[k][p], a[k][q] = c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]
        for k in range(3):  # rows p and q, and the vectors with them
            a[p][k], a[q][k] = c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]
            v[p][k], v[q][k] = c * v[p][k] - s * v[q][k], s * v[p][k] + c * v[q][k]
        a[p][q] = a[q][p] = 0.0
    return [a[k][k] for k in range(3)], v
