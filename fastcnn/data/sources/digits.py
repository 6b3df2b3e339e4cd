"""scikit-learn's 1,797 handwritten digits of 8x8 pixels, which are installed with it."""

from __future__ import annotations

import torch

from ..dataset import Arrays, Dataset

VALIDATION = 360


def splits() -> dict[str, Dataset]:
    """The last 360 are the validation split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("digits are scikit-learn's, which is not installed: pip install fastcnn[data]") from None
    pictures, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    pixels = (pictures.reshape(-1, 8, 8, 1) * 255 / 16).round().to(torch.uint8)  # of 17 levels
    classes = [str(digit) for digit in range(10)]
    first = len(labels) - VALIDATION

    def split(name: str, rule: str, part: slice) -> Dataset:
        return Arrays("digits", name, rule, classes, labels[part], [pixels[part]])

    return {
        "train": split("train", f"the first {first:,} digits", slice(first)),
        "validation": split("validation", f"the last {VALIDATION} digits", slice(first, None)),
    }
