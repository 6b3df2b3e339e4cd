"""AlexNet as published, and its relatives.

Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks" (2012).
"""

from dataclasses import replace
from typing import Any

from ..params import LRNParams, PoolParams
from ._checks import check_choice
from .convnet import ConvNet
from .initialize import Gaussian, Initializer, kaiming
from .preprocessing import CAFFE, RAW, TORCHVISION
from .registry import register_model
from .stages import Stage, map_sizes

LRN = LRNParams(5, alpha=1e-4, beta=0.75, k=2.0)
POOL = PoolParams(3, 2)

BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")
CAFFE_STDS = {"fc6": 0.005, "fc7": 0.005}
INITS: dict[str, Initializer] = {
    "paper": Gaussian(bias=1.0, biased=BIASED),
    "as_run": Gaussian(bias=1.0, biased=BIASED, stds={"conv3": 0.03, "conv4": 0.03, "conv5": 0.03}),
    "caffe": Gaussian(bias=0.1, biased=BIASED, stds=CAFFE_STDS),
    "kaiming": kaiming,
}


@register_model(input_size=227, dropout="paper", init="paper", width=1.0)
def alexnet(*, lrn_groups: int = 2, **common: Any) -> ConvNet:
    """AlexNet as published: two towers (``groups=2``), LRN, overlapping pools; 60,965,224 parameters.

    Each of its first, second and last stages is convolution -> ReLU -> LRN (not the last) -> max-pool, in this order.

    Args:
        num_classes: number of logits.
        input_size: height and width of the images, at least 64: 227; or 224 as the paper says. As in the authors' code
            the convolutions of conv1 go on to the last pixel: where their stride does not lead there, zeros are added
            on the right and at the bottom (3 for 224, none for 227), so that both sizes give 55x55 maps.
        dropout: "paper" masks in training and multiplies by 0.5 at test; "inverted" is torch's: it multiplies by 2 in
            training, as Caffe does (so for weights trained there). Both on fc6 and fc7, p=0.5.
        init: "paper": weights N(0, .01^2), bias 1 in conv2, conv4, conv5, fc6 and fc7 and 0 elsewhere. "as_run", the
            authors' configuration: conv3 to conv5 from N(0, .03^2). "caffe": as the paper but fc6 and fc7 from
            N(0, .005^2), and .1 in place of the bias 1. "kaiming": He's normal initialization (fan in), biases 0.
            All but the last need pixels on their raw scale, 0 to 255 minus the mean: with inputs of unit variance the
            logits hardly depend on the image (they differ by less than 1e-4 in "paper"), and training sticks at a loss
            of ln(num_classes).
        width: factor of all numbers of channels and hidden units, see :class:`ConvNet`.
        plain: build it from the layers of torch, none fused.
        lrn_groups: 2 normalizes within each tower, as the published network ran on two GPUs; 1 across both, as Caffe's
            single-GPU port does (so for weights trained there).

    Shape, errors: see :class:`fastcnn.models.ConvNet`.

    Source: Krizhevsky et al. (2012), 3.2 (towers), 3.3 (LRN), 3.4 (pooling), 3.5 (layers), 4.2 (dropout) and 5
    (initialization). LRN has ``alpha=1e-4`` times the window's *mean* square, as in the authors' code.
    """
    check_choice("alexnet", "lrn_groups", lrn_groups, (1, 2))
    return ConvNet(
        "alexnet",
        lambda size: _stages(size, groups=2, lrn=replace(LRN, groups=lrn_groups)),
        inits=INITS,
        preprocessing=RAW,
        **common,
    )


@register_model(input_size=227, dropout="paper", init="paper", width=1.0)
def alexnet_one_tower(**common: Any) -> ConvNet:
    """AlexNet's layers without the split: 96-256-384-384-256 maps, LRN, no groups; 62,378,344 parameters.

    The arguments are those of :func:`alexnet`.
    """
    return ConvNet(
        "alexnet_one_tower", lambda size: _stages(size, groups=1, lrn=LRN), inits=INITS, preprocessing=RAW, **common
    )


@register_model(input_size=227, dropout="inverted", init="caffe", width=1.0)
def caffenet(**common: Any) -> ConvNet:
    """CaffeNet, Caffe's reference model: AlexNet with each pool in front of its LRN; 60,965,224 parameters.

    LRN runs across both towers and has k=1. The arguments are those of :func:`alexnet`, but for ``init``: "caffe" is
    CaffeNet's own, weights N(0, .01^2), in fc6 and fc7 N(0, .005^2), and a bias of 1 where AlexNet has one.

    Source: Caffe, models/bvlc_reference_caffenet.
    """
    return ConvNet(
        "caffenet",
        lambda size: _stages(size, groups=2, lrn=replace(LRN, k=1.0), pool_first=True),
        inits={"caffe": Gaussian(bias=1.0, biased=BIASED, stds=CAFFE_STDS), "kaiming": kaiming},
        preprocessing=CAFFE,
        **common,
    )


@register_model(input_size=227, dropout="inverted", init="kaiming", width=1.0)
def alexnet_bn(*, head: str = "avg", **common: Any) -> ConvNet:
    """AlexNet's two towers with batch norm instead of LRN, and a global pool instead of the last one.

    Each stage is convolution (without bias) -> batch norm -> ReLU, the first two with a max-pool behind.

    Args:
        num_classes, input_size, dropout, init, width, plain: as for :func:`alexnet`, but the network learns from inputs
            of any scale.
        head: what becomes of the last map in front of the fully connected layers: its "avg" or its "max".
    """
    check_choice("alexnet_bn", "head", head, ("avg", "max"))

    def stages(size: int) -> list[Stage]:
        stages = [replace(s, bias=False, batch_norm=True) for s in _stages(size, groups=2, lrn=None)]
        last = map_sizes(stages, size).get("conv5", 0)
        return [*stages[:-1], replace(stages[-1], pool=PoolParams(last) if head == "max" and last > 0 else None)]

    return ConvNet("alexnet_bn", stages, inits=INITS, preprocessing=TORCHVISION, average=head == "avg", **common)


@register_model(input_size=224, dropout="inverted", init="kaiming", width=1.0)
def alexnet_owt(**common: Any) -> ConvNet:
    """The one-tower AlexNet of torchvision, without LRN: 64-192-384-256-256 maps; 61,100,840 parameters.

    Its ``state_dict`` has torchvision's keys. The arguments are those of :func:`alexnet`; fc6 takes the map that is
    left of ``input_size`` (torchvision averages any map to 6x6, which 224 has).

    Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014); torchvision's alexnet.
    """

    def stages(size: int) -> list[Stage]:
        return [
            Stage("1", 3, 64, 11, stride=4, padding=2, pool=POOL),
            Stage("2", 64, 192, 5, padding=2, pool=POOL),
            Stage("3", 192, 384, 3, padding=1),
            Stage("4", 384, 256, 3, padding=1),
            Stage("5", 256, 256, 3, padding=1, pool=POOL),
        ]

    return ConvNet(
        "alexnet_owt", stages, inits=INITS, preprocessing=TORCHVISION, numbered=True, dropout_first=True, **common
    )


def _stages(input_size: int, *, groups: int, lrn: LRNParams | None, pool_first: bool = False) -> list[Stage]:
    to_last_pixel = -(input_size - 11) % 4
    return [
        Stage("1", 3, 96, 11, stride=4, pad_end=to_last_pixel, lrn=lrn, pool=POOL, pool_first=pool_first),
        Stage("2", 96, 256, 5, padding=2, groups=groups, lrn=lrn, pool=POOL, pool_first=pool_first),
        Stage("3", 256, 384, 3, padding=1),
        Stage("4", 384, 384, 3, padding=1, groups=groups),
        Stage("5", 384, 256, 3, padding=1, groups=groups, pool=POOL),
    ]
