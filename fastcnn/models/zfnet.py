"""ZFNet: Zeiler, Fergus, "Visualizing and understanding convolutional networks" (2014)."""

from typing import Any

from ..params import LRNParams, PoolParams
from .convnet import ConvNet
from .initialize import Gaussian, Initializer, kaiming
from .preprocessing import CAFFE, RAW
from .registry import register_model
from .stages import Stage

INITS: dict[str, Initializer] = {"paper": Gaussian(), "kaiming": kaiming}


@register_model(input_size=224, dropout="inverted", init="paper", width=1.0)
def zfnet(**common: Any) -> ConvNet:
    """ZFNet as published: smaller and denser filters first, LRN behind the pools; 62,357,608 parameters.

    Args:
        num_classes: number of logits.
        input_size: height and width of the images, 224 in the paper: maps of 110, 55, 26, 13 and 6.
        dropout: "inverted" or "paper", see :func:`alexnet`; p=0.5.
        init: "paper": weights N(0, .01^2), biases 0, for pixels on their raw scale. "kaiming": He's normal
            initialization.
        width: factor of all numbers of channels and hidden units, see :class:`ConvNet`.
        plain: build it from the layers of torch, none fused.

    Shape, errors: see :class:`fastcnn.models.ConvNet`.

    Source: Zeiler and Fergus (2014), 3 (training) and figure 3 (layers). The paper does not say its contrast
    normalization's parameters: they are AlexNet's.
    """
    lrn, pool = LRNParams(5, alpha=1e-4, beta=0.75, k=2.0), PoolParams(3, 2, ceil_mode=True)
    stages = [
        Stage("1", 3, 96, 7, stride=2, padding=1, lrn=lrn, pool=pool, pool_first=True),
        Stage("2", 96, 256, 5, stride=2, lrn=lrn, pool=pool, pool_first=True),
        Stage("3", 256, 384, 3, padding=1),
        Stage("4", 384, 384, 3, padding=1),
        Stage("5", 384, 256, 3, padding=1, pool=PoolParams(3, 2)),
    ]
    return ConvNet("zfnet", lambda size: stages, inits=INITS, preprocessing=RAW, **common)


@register_model(input_size=224, dropout="inverted", init="paper", width=1.0)
def zfnet512(**common: Any) -> ConvNet:
    """ZFNet-512 of the ONNX model zoo: 512 maps in the last stages, 1024 units in fc7, LRN in front of the pools.

    The arguments are those of :func:`zfnet`. What its training images went through is not published;
    ``preprocessing`` is a guess.

    Source: the graph zfnet512, trained and exported by Caffe2.
    """
    lrn, pool = LRNParams(5, alpha=5e-4, beta=0.75, k=2.0), PoolParams(3, 2)
    stages = [
        Stage("1", 3, 96, 7, stride=2, lrn=lrn, pool=pool),
        Stage("2", 96, 256, 5, stride=2, lrn=lrn, pool=pool),
        Stage("3", 256, 512, 3, padding=1),
        Stage("4", 512, 512, 3, padding=1),
        Stage("5", 512, 512, 3, padding=1, pool=PoolParams(2)),
    ]
    return ConvNet("zfnet512", lambda size: stages, inits=INITS, preprocessing=CAFFE, hidden=(4096, 1024), **common)
