"""Checkpoints as people have them: wrappers, nests, averages, shards, TorchScript, and files that mean harm."""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import struct
import textwrap
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fastcnn import models
from fastcnn.models import PREPROCESSINGS, Preprocessing, WeightsError, load_weights

safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Detected pickle protocol")


class Net(nn.Module):
    """The two parts of torchvision's AlexNet and VGG."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))

    def forward(self, input):
        return self.classifier(self.features(input).mean((2, 3)))


def assert_loaded(path, expected, model=None, **options):
    """The model has these values, bit for bit; the report."""
    model = Net(seed=1) if model is None else model
    report = load_weights(model, path, **options)
    own = model.state_dict()
    assert len(own) == len(expected) == report.tensors
    for value, wanted in zip(own.values(), expected.values(), strict=True):
        assert torch.equal(value, wanted)
    return report


def assert_refused(path, *said, model=None, **options):
    """A WeightsError that says all of this, and the model as it was."""
    model = Net() if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, path, **options)
    assert [words for words in said if words not in str(error.value)] == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(error.value)


@pytest.fixture
def state():
    return Net().state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pth.tar"


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def shifted(state):
    return {key: value + 1 for key, value in state.items()}


# -- wrappers and nests -----------------------------------------------------------------------------------------------


def parallel_parts(net):
    net.features = nn.DataParallel(net.features)
    return net


def compiled_parts(net):
    net.classifier = torch.compile(net.classifier)
    return net


WRAPPED = {
    "features in DataParallel": parallel_parts,
    "all of it": nn.DataParallel,
    "compiled": torch.compile,
    "compiled in DataParallel": lambda net: nn.DataParallel(torch.compile(net)),
    "parts compiled and parallel": lambda net: parallel_parts(compiled_parts(net)),
    "Lightning": lambda net: nn.ModuleDict({"model": net}),
    "twice": lambda net: nn.ModuleDict({"net": nn.ModuleDict({"model": net})}),
}


@pytest.mark.parametrize("theirs", WRAPPED)
@pytest.mark.parametrize("ours", ["plain", *WRAPPED])
def test_wrappers_on_either_side_do_not_count(path, state, theirs, ours):
    saved(path, WRAPPED[theirs](Net()).state_dict())
    model = Net(seed=1) if ours == "plain" else WRAPPED[ours](Net(seed=1))
    assert_loaded(path, state, model)


@pytest.mark.parametrize(
    "nested",
    [
        lambda s: s,
        lambda s: {"epoch": 90, "arch": "alexnet", "state_dict": s, "best_acc1": torch.tensor(56.5)},
        lambda s: {"model": s, "lr_scheduler": {"last_epoch": 3}},
        lambda s: {"net": s, "acc": 93.0},
        lambda s: {"any": {"name": {"at all": s}}},
        lambda s: OrderedDict(module=under("module.", s)),
        lambda s: {**s, "epoch": 3, "note": "beside the weights"},
        lambda s: {**s, "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3, 3, 3)}}, "param_groups": [{"lr": 1}]}},
        lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
        lambda s: {"state_dict": under("my.backbone.", s)},
    ],
)
def test_weights_are_found_wherever_they_are(path, state, nested):
    assert_loaded(saved(path, nested(state)), state)


def test_a_whole_training_checkpoint(path, state):
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "epoch": 3}
    report = assert_loaded(saved(path, content), net.state_dict())
    assert report.notes == ["from entry 'model'"]


def test_models_own_names_of_wrappers_are_kept(path):
    """One whose parts differ by such a name only."""
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "model": nn.ModuleDict({"net": nn.Linear(2, 2)})})
    model["weight"] = nn.Linear(2, 2)
    other = {key: value + 1 for key, value in model.state_dict().items()}
    assert_loaded(saved(path, other), other, model)
    del other["net.weight"]
    assert_refused(saved(path, under("module.", other)), "net.weight is missing in the file", model=model)


class Outer(nn.Module):
    """Of two layers of one name, the inner one in a part that is named like a wrapper."""

    def __init__(self, part, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.add_module(part, nn.ModuleDict({"fc": nn.Linear(2, 2), "conv1": nn.Conv2d(3, 4, 3)}))
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("part", ["model", "net", "module"])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.ModuleDict({"model": net}), nn.DataParallel])
def test_layers_are_not_confused_where_a_part_is_named_like_a_wrapper(path, part, wrap):
    expected = Outer(part).state_dict()
    saved(path, {"state_dict": wrap(Outer(part)).state_dict()})
    assert_loaded(path, expected, Outer(part, seed=1))


def test_what_could_be_either_is_refused(path):
    """The inner part is compiled: its layer and the outer one have one name without wrappers."""
    state = Outer("model").state_dict()
    compiled = {key.replace("model.", "model._orig_mod."): value for key, value in state.items()}
    assert_refused(saved(path, compiled), "model.fc.weight is missing in the file", model=Outer("model"))
    both = {**under("module.", state), **shifted(state)}
    said = "its keys fit with and without the prefix 'module'; entry='module' loads the former"
    assert_refused(saved(path, both), said, model=Outer("model"))
    assert_loaded(path, state, Outer("model", seed=1), entry="module")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_other_dtypes(tmp_path, state, dtype, suffix):
    other = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(other, path) if suffix == ".pth" else safetensors_torch.save_file(other, path)
    assert_loaded(path, {key: value.to(state[key].dtype) for key, value in other.items()})


def test_values_too_large_for_the_model_are_refused(path, state):
    state["classifier.1.weight"][0, 0] = 1e6
    state["features.0.bias"][0] = float("inf")  # which stays what it is
    said = "classifier.1.weight has values in the file that are too large for torch.float16"
    message = assert_refused(saved(path, state), said, model=Net().half())
    assert message.count("too large") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2, 4).to_sparse(), "is sparse in the file"),
        (torch.ones(2, 4, device="meta"), "is without values in the file"),
        (torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8), "is quantized in the file"),
        (torch.nested.nested_tensor([torch.ones(4), torch.ones(4)]), "is of type Tensor in the file"),
        (torch.ones(2, 4, dtype=torch.complex64), "is torch.complex64 in the file and torch.float32 in the model"),
    ],
    ids=["sparse", "meta", "quantized", "nested", "complex"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*uantize", "ignore:Sparse invariant")
def test_tensors_of_other_kinds_are_refused(path, state, value, said):
    state["classifier.1.weight"] = value
    assert_refused(saved(path, state), f"classifier.1.weight {said}")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torch.tensor([300]), torch.int8),
        (torch.tensor([-1]), torch.uint8),
        (torch.tensor([-1], dtype=torch.int8), torch.uint8),
        (torch.tensor([200], dtype=torch.uint8), torch.int8),
        (torch.tensor([2**64 - 1], dtype=torch.uint64), torch.int64),
        (torch.tensor([1e300 + 1j], dtype=torch.complex128).conj(), torch.complex64),
        (torch.tensor([1e300], dtype=torch.complex128), torch.complex64),
        (torch.tensor([1e300], dtype=torch.float64), torch.float32),
        (torch.tensor([5]), torch.bool),
        (torch.tensor([True]), torch.int64),
    ],
    ids=str,
)
def test_numbers_that_the_model_cannot_hold_are_refused(path, theirs, ours):
    model = nn.Module()
    model.register_buffer("number", torch.zeros(1, dtype=ours))
    message = assert_refused(saved(path, {"number": theirs}), model=model)
    bool_or_not = torch.bool in (ours, theirs.dtype)
    assert (f"too large for {ours}" in message) != bool_or_not


def test_tensors_that_are_one_in_the_model(path, state):
    """The last of two would count, for both."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    own = {key: value.clone() for key, value in model.state_dict().items()}
    assert_loaded(saved(path, shifted(own)), shifted(own), model)
    own["0.weight"][0, 0] = own["1.weight"][0, 0] = torch.nan
    load_weights(model, saved(path, own))
    own["1.weight"] += 1
    said = "0.weight and 1.weight are one tensor in the model, and differ in the file"
    with pytest.raises(WeightsError, match=said):
        load_weights(model, saved(path, own))
    model[1].weight = nn.Parameter(model[0].weight.data)  # of one storage only
    with pytest.raises(WeightsError, match=said):
        load_weights(model, path)
    own["0.weight"] = own["0.weight"].to_sparse()
    with pytest.raises(WeightsError, match=r"0\.weight is sparse in the file"):
        load_weights(model, saved(path, own))


def test_models_that_cannot_take_values(path):
    state = nn.Linear(2, 2).state_dict()
    saved(path, state)
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    assert_refused(path, "weight of the model was created in inference mode", model=model)
    with torch.inference_mode():
        assert_loaded(path, state, model)
    expanded = nn.Linear(2, 2)
    expanded.bias = nn.Parameter(torch.zeros(1).expand(2))
    assert_refused(path, "bias of the model is expanded", model=expanded)
    with pytest.raises(WeightsError, match="weight, bias of the model have no shape yet; run a forward first"):
        load_weights(nn.LazyLinear(2), path)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"scale": self.scale}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def test_state_that_is_no_tensor_is_refused_where_the_file_has_it(path):
    model = Extra(2, 2)
    model.scale = 1.0
    saved(path, {**nn.Linear(2, 2).state_dict(), "_extra_state": {"scale": 3.0}})
    with pytest.raises(WeightsError, match="_extra_state is not a tensor; load_weights"):
        load_weights(model, path)
    saved(path, under("module.", {**nn.Linear(2, 2).state_dict(), "_extra_state": {"scale": 3.0}}))
    with pytest.raises(WeightsError, match="_extra_state is not a tensor; load_weights"):
        load_weights(model, path)
    expected = nn.Linear(2, 2).state_dict()
    load_weights(model, saved(path, expected))
    assert torch.equal(model.weight, expected["weight"])
    assert model.scale == 1.0


# -- which of several -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model_ema", "ema", "state_dict_ema", "ema_state_dict", "params_ema", "swa_model", "modelEMA", "teacher"]
)
def test_averages_are_loaded_when_they_are_chosen(path, state, name):
    average = shifted(state)
    saved(path, {name: under("module.", average), "model": state})
    assert assert_loaded(path, state).notes[1:] == [f"the file also holds {name!r}, which fits: entry={name!r}"]
    assert_loaded(path, average, entry=name)
    assert_loaded(path, state, entry="model")
    assert_loaded(saved(path, {name: average}), average)  # there is nothing else


def test_averages_do_not_stand_in_for_a_network_that_does_not_fit(path, state):
    saved(path, {"model": {**state, "loss.weight": torch.ones(1)}, "model_ema": state})
    said = "loss.weight (1,) is in the file only", "the file also holds 'model_ema', which fits: entry='model_ema'"
    assert_refused(path, "entry 'model' of ", *said)
    assert_loaded(path, state, entry="model_ema")


def test_an_average_that_does_not_fit_is_told_of(path, state):
    """Of the entries without averages none has anything to do with the model."""
    saved(path, {"head": {"x": torch.ones(1)}, "model_ema": {**state, "loss.weight": torch.ones(1)}})
    assert_refused(path, "entry 'model_ema' of ", "loss.weight (1,) is in the file only")


def test_the_same_tensors_under_two_names_are_one(path, state):
    net = Net()
    saved(path, {"model": net.state_dict(), "state_dict": net.state_dict()})
    assert_loaded(path, net.state_dict())


def test_chosen_averages(path, state):
    """Among what has the chosen name, those that are no average in what follows it."""
    content = {"net": state, "ema_net": shifted(state)}
    saved(path, {"my_ema": content})
    assert_loaded(path, state, entry="my_ema")
    assert_loaded(path, shifted(state), entry="my_ema.ema_net")


def test_averages_among_the_keys(path, state):
    content = {**under("model.", state), **under("ema.module.", shifted(state)), "criterion.weight": torch.ones(9)}
    saved(path, {"state_dict": content})
    assert assert_loaded(path, state).notes == [
        "from entry 'state_dict.model'; 10 other tensors in 'state_dict' were ignored",
    ]
    assert_loaded(path, shifted(state), entry="state_dict.ema")


def test_several_that_fit_are_named(path, state):
    saved(path, {"generator": state, "critic": shifted(state), "again": state})
    assert_refused(path, "several entries fit: 'generator', 'critic'; choose one with entry=")
    assert_loaded(path, shifted(state), entry="critic")
    assert_refused(path, "no entry 'actor'; available: 'generator', 'critic'", entry="actor")


def test_parts_are_loaded_when_they_are_chosen(path, state):
    part = Net(seed=1).features
    expected = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    saved(path, {"state_dict": state})
    said = "the file also holds 'state_dict.features', which fits: entry='state_dict.features'"
    assert_refused(path, said, model=part)
    assert_refused(path, said, model=part, entry="state_dict")  # which is no part of it
    assert_loaded(path, expected, part, entry="state_dict.features")


# -- files that do not fit --------------------------------------------------------------------------------------------


def test_nearest_names_are_told(path, state):
    renamed = {key.replace("features.0", "features.conv1"): value for key, value in state.items()}
    message = assert_refused(
        saved(path, {"state_dict": renamed}),
        f"load_weights(): entry 'state_dict' of {path} does not fit the model:\n",
        "features.0.weight is missing in the file; it is (4, 3, 3, 3) in the model; "
        "nearest in the file: features.conv1.weight (4, 3, 3, 3)\n",
        "features.conv1.bias (4,) is in the file only; nearest in the model: features.0.bias (4,)",
    )
    assert message.count("\n") == 4


def test_nearest_names_are_of_the_same_shape_if_there_are_any(path):
    model = nn.ModuleDict({"fc1": nn.Linear(2, 3), "fc2": nn.Linear(3, 3)})
    state = {"fc1.weight2": torch.ones(3, 3), "first.weight": torch.ones(3, 2)}
    assert_refused(
        saved(path, state),
        "fc1.weight is missing in the file; it is (3, 2) in the model; nearest in the file: first.w",
        model=model,
    )


def test_the_smaller_of_two_that_fit_as_much_is_told_of(path, state):
    del state["features.0.bias"]
    content = {"a": {**state, "one more": torch.ones(1)}, "b": state, "c": {**state, "another": torch.ones(1)}}
    assert_refused(saved(path, content), "entry 'b' of ")


@pytest.mark.parametrize("length", [5_000, 200_000])
def test_huge_keys_are_not_compared_or_printed(path, length):
    saved(path, {f"{'key' * length}{i}": torch.ones(4) for i in range(5)})
    assert len(assert_refused(path)) < 5_000


def test_many_entries_are_not_all_listed(path, state):
    saved(path, {"model": state, "others": {str(i): {"x": torch.ones(1)} for i in range(500)}})
    assert_refused(path, "'others.8' and 491 more", entry="none")


def test_entry_that_is_no_tensor_is_named(path, state):
    state["features.0.bias"] = [0.0] * 4
    said = "features.0.bias is of type list in the file, not a tensor; it is (4,) in the model"
    assert_refused(saved(path, state), said)


def test_best_entry_is_the_one_that_is_told_of(path, state):
    del state["features.0.bias"]
    content = {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}},
        "model": state,
        "ema": {"decay": torch.ones(1)},
    }
    message = assert_refused(saved(path, content), "entry 'model' of ", "features.0.bias is missing")
    assert message.count("\n") == 1


def test_thousands_of_keys_are_listed_at_once(path):
    saved(path, {f"layer{i}.weight": torch.ones(1) for i in range(5000)})
    assert assert_refused(path).count("is in the file only") == 5000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n<!DOCTYPE html><title>404</title>", "it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "it is a Git LFS pointer",
        ),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file (e.g. from Keras)"),
        (b"\x93NUMPY\1\0" + bytes(99), "it is a NumPy array"),
        (b"\x1f\x8b\x08" + bytes(99), "it is compressed by gzip"),
    ],
    ids=["web page", "pointer", "HDF5", "npy", "gzip"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_often_taken_for_weights(tmp_path, content, said, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    kind = {"pth": "PyTorch checkpoint", "safetensors": "safetensors file"}[suffix]
    assert_refused(path, f"cannot be read as a {kind}: {said}")


def test_safetensors_whose_header_has_the_length_of_a_sign(tmp_path):
    """Its first byte is "<", as that of a web page."""
    text = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 316) + text.ljust(316) + struct.pack("<f", 3))
    assert path.read_bytes()[:1] == b"<"
    model = nn.PReLU()
    assert_loaded(path, {"weight": torch.tensor([3.0])}, model)


# -- objects in the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "number",
    ["float64(56.5)", "float32(1)", "int64(3)", "bool_(True)", "complex64(1j)", "str_('best')", "datetime64('2012')"],
)
def test_numbers_of_numpy_are_named_with_the_way_to_allow_them(path, state, legacy, number):
    """What the message says to do is done."""
    numpy = pytest.importorskip("numpy")
    value = eval(number, {name: getattr(numpy, name) for name in dir(numpy)})
    saved(path, {"state_dict": state, "best": value}, _use_new_zipfile_serialization=not legacy)
    message = assert_refused(path, "core.multiarray.scalar", "NumPy scalars are harmless", "safe_globals(allowed)")
    lines = message.partition(":\n    import")[2]
    code = textwrap.dedent(f"    import{lines}").replace("...", "load_weights(model, path)")
    model = Net(seed=1)
    exec(code, {"load_weights": load_weights, "model": model, "path": path})
    assert torch.equal(model.features[0].weight, state["features.0.weight"])


def test_numbers_of_an_older_numpy(path, state):
    """Their module had another name, and still has it in the file."""
    numpy = pytest.importorskip("numpy")
    saved(path, {"state_dict": state, "best": numpy.float64(1)})
    renamed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    path.write_bytes(renamed.getvalue())
    message = assert_refused(path, "numpy.core.multiarray.scalar")
    lines = message.partition(":\n    import")[2]
    code = textwrap.dedent(f"    import{lines}").replace("...", "load_weights(model, path)")
    model = Net(seed=1)
    exec(code, {"load_weights": load_weights, "model": model, "path": path})
    assert torch.equal(model.features[0].weight, state["features.0.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_whole_modules_and_other_objects_are_refused_not_made(path, state, legacy):
    options = {"_use_new_zipfile_serialization": not legacy}
    said = "If you trust the file, re-save only the weights"
    assert_refused(saved(path, nn.Sequential(nn.Linear(2, 2)), **options), "nn.modules.container.Sequential", said)
    assert_refused(saved(path, {"state_dict": state, "args": argparse.Namespace(lr=1)}, **options), "Namespace", said)


class Harm:
    """Of a file that runs a command when it is read by pickle."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("suffix", ["pth", "bin", "pt"])
def test_nothing_of_a_file_is_run(tmp_path, state, suffix):
    proof = tmp_path / "proof"
    legacy = {"_use_new_zipfile_serialization": False}
    for i, options in enumerate(({}, legacy, {"pickle_protocol": 4}, {**legacy, "pickle_protocol": 5})):
        path = saved(tmp_path / f"{i}.{suffix}", {"state_dict": state, "x": Harm(proof)}, **options)
        assert_refused(path, "re-save only the weights", *["system"][: i < 2])
    path = tmp_path / f"plain.{suffix}"
    path.write_bytes(pickle.dumps({"state_dict": {}, "x": Harm(proof)}))
    assert_refused(path, "cannot be read")
    assert not proof.exists()


def test_dictionaries_that_contain_themselves(path, state):
    content = {"state_dict": state}
    content["again"] = content
    assert_loaded(saved(path, content), state)
    content["list"] = [content, content["again"]]
    assert_loaded(saved(path, content), state)
    deep = {"state_dict": state}
    for _ in range(60):
        deep = {"a": deep}
    assert_refused(saved(path, deep), "no dictionary in it holds tensors, down to a depth of 8")


def test_ways_that_lead_to_the_same_dictionary(path, state):
    """10 ** 6 of them; it is looked at once."""
    content = {"state_dict": state}
    for _ in range(6):
        content = dict.fromkeys("abcdefghij", content)
    assert_loaded(saved(path, content), state)


def test_dictionaries_in_lists(path, state):
    assert assert_loaded(saved(path, {"models": [state]}), state).notes == ["from entry 'models.0'"]


def test_keys_that_are_no_strings(path, state):
    assert_loaded(saved(path, {**state, 0: torch.ones(1), "0": {"x": torch.ones(2)}}), state)


def test_compressed_records_are_refused(path, state):
    """A thousand times as large as the file."""
    saved(path, {"weight": torch.zeros(1000, 1000)})
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    assert_refused(rewritten(path, records, zipfile.ZIP_DEFLATED), "its records are compressed")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_altered_bytes_raise_nothing_else(tmp_path, state, suffix):
    """Only the values of tensors can change unnoticed."""
    path = tmp_path / f"weights.{suffix}"
    torch.save(state, path) if suffix == "pth" else safetensors_torch.save_file(state, path)
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        broken = bytearray(whole)
        near_the_end = generator.random() < 0.5
        broken[generator.randrange(len(whole) - 900 if near_the_end else 0, len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        with contextlib.suppress(WeightsError):
            load_weights(Net(), path)


# -- safetensors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, state):
    """Of two files, and their index."""
    keys = list(state)
    files = {"model-00001-of-00002.safetensors": keys[:3], "model-00002-of-00002.safetensors": keys[3:]}
    for file, held in files.items():
        safetensors_torch.save_file({key: state[key] for key in held}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: f for f, held in files.items() for k in held}}))
    return index


def test_shards(shards, state, tmp_path):
    assert assert_loaded(shards, state).format == "shards"
    for old in tmp_path.glob("*.safetensors"):
        torch.save(safetensors_torch.load_file(old), old.with_suffix(".bin"))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(shards.read_text().replace(".safetensors", ".bin"))
    assert_loaded(index, state)


def test_one_of_several_shards_is_named_as_that(shards, tmp_path):
    assert_refused(tmp_path / "model-00001-of-00002.safetensors", "is missing", "give load_weights() their .index.json")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model-00001", "absent", "shards are missing: absent-of-00002.safetensors"),
        ("model-00001", "../other", "the index names '../other-of-00002.safetensors', which is not a file beside"),
        ("model-00001", "/etc/model", "is not a file beside it"),
        ("features.0.weight", "features.9.weight", "'features.0.weight' is in model-00001"),
        ('"classifier', '"none": "model-00002-of-00002.safetensors", "classifier', "tensors are missing in"),
        ("weight_map", "map", "cannot be read as a sharded checkpoint: it is no index of shards: it has no weight_map"),
        ('{"metadata"', '[{"metadata"', "cannot be read"),
    ],
    ids=range(7),
)
def test_index_that_lies(shards, old, new, said):
    shards.write_text(shards.read_text().replace(old, new, 1 if old.startswith('"') else -1))
    assert_refused(shards, said)


def header(tensors, length=None, data=bytes(8)):
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        header({}, length=2**63),
        header({}, length=10**9),
        header(b"{" * 100_000),
        header(b'{"a": ' * 50_000 + b"1"),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}),
        header({k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, data=bytes(99)),
        header({"a": 3}),
        header([1]),
    ],
    ids=range(14),
)
def test_hostile_headers(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert_refused(path, "cannot be read as a safetensors file: ")


def test_safetensors_of_another_suffix(tmp_path, state):
    safetensors_torch.save_file(state, tmp_path / "weights.bin")
    assert assert_loaded(tmp_path / "weights.bin", state).format == "safetensors"


def test_shard_that_is_no_dictionary(tmp_path):
    torch.save([1], tmp_path / "a.bin")
    (tmp_path / "a.bin.index.json").write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    assert_refused(tmp_path / "a.bin.index.json", "a.bin holds a list, not a state_dict")


def test_key_of_a_million_names(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(header({"a." * 10**6: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}))
    assert_refused(path, "features.0.weight is missing")


# -- TorchScript ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_torchscript(tmp_path, dtype):
    net = Net().to(dtype).eval()
    for script in (torch.jit.script(net), torch.jit.trace(net, torch.randn(1, 3, 5, 5, dtype=dtype))):
        script.save(tmp_path / "net.pt")
        report = assert_loaded(tmp_path / "net.pt", net.state_dict(), Net(seed=1).to(dtype))
        assert report.format == "TorchScript"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "net.pt"
    torch.jit.script(Net().eval()).save(path)
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rewritten(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in records.items():
            file.writestr(name, content)
    return path


class Attributes(Net):
    """Of which a device and a complex number are pickled by functions of their own."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.device, self.number = torch.device("cpu"), 1 + 2j
        self.register_buffer("complex", torch.ones(2, dtype=torch.complex64))

    def forward(self, input):
        return super().forward(input.to(self.device)) * self.number.real


def test_torchscript_with_other_attributes(tmp_path):
    net = Attributes().eval()
    script = torch.jit.trace(net, torch.randn(1, 3, 5, 5))
    script.save(tmp_path / "traced.pt")
    assert_loaded(tmp_path / "traced.pt", net.state_dict(), Attributes(seed=1))


def test_torchscript_without_parameters(tmp_path):
    torch.jit.freeze(torch.jit.script(Net().eval())).save(tmp_path / "frozen.pt")
    assert_refused(tmp_path / "frozen.pt", "as a TorchScript archive", "freezing makes them constants")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"c__torch__.torch.nn.modules.conv\nConv2d", b"cposix\nsystem", "posix.system, which is not supported"),
        (b"ctorch._utils\n_rebuild_tensor_v2", b"cbuiltins\neval", "builtins.eval"),
        (b"ctorch\nFloatStorage", b"ctorch\nload", "torch.load"),
        (b"ctorch\nFloatStorage", b"ctorch\nDoubleStorage", "bytes; expected "),
        (b"K\x04K\x03K\x03K\x03t", b"K\x04K\x03K\x03K\x7ft", "out of bounds"),
        (b"storage", b"shortage", "cannot be read"),
    ],
)
def test_torchscript_that_asks_for_more(tmp_path, archive, old, new, said):
    """Other functions, and more memory than there is."""
    name = next(name for name in archive if name.endswith("/data.pkl"))
    assert old in archive[name]
    records = {**archive, name: archive[name].replace(old, new)}
    assert_refused(rewritten(tmp_path / "net.pt", records), "as a TorchScript archive: ", said)


def test_memory_that_a_pickle_asks_for(tmp_path, archive):
    """An index of 400 million in the memo, which is an array in pickle's C."""
    name = next(name for name in archive if name.endswith("/data.pkl"))
    content = b"\x80\x02Nr" + struct.pack("<I", 400_000_000) + b"."
    started = time.monotonic()
    assert_refused(rewritten(tmp_path / "net.pt", {**archive, name: content}), "it has no parameters")
    assert time.monotonic() - started < 5


def test_tensors_are_not_set_by_a_pickle(tmp_path, archive):
    """Of torch's own methods: to the memory of an empty storage, resized, whatever was there."""
    name = next(name for name in archive if name.endswith("/data.pkl"))
    folder = name.partition("/")[0]
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x00tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x00t(K\x01t\x89NtR"
    build = b"(" + storage + b"K\x00(M\x00\x10t(K\x01ttb"
    content = b"\x80\x02c__torch__.M\nM\n)\x81}" + text(b"weight") + tensor + build + b"sb."
    records = {**archive, name: content, f"{folder}/data/0": b""}
    assert_refused(
        rewritten(tmp_path / "net.pt", records), "cannot be read as a TorchScript archive", model=nn.PReLU(4096)
    )


def test_broken_torchscript(tmp_path, archive):
    folder = next(iter(archive)).partition("/")[0]
    assert_refused(rewritten(tmp_path / "a.pt", archive, zipfile.ZIP_DEFLATED), "is compressed")
    cut = {name: content[:-1] if "/data/" in name else content for name, content in archive.items()}
    assert_refused(rewritten(tmp_path / "b.pt", cut), "bytes; expected ")
    absent = {name: content for name, content in archive.items() if not name.endswith("/data/0")}
    assert_refused(rewritten(tmp_path / "c.pt", absent), f"{folder}/data/0")
    big = {**archive, f"{folder}/byteorder": b"big"}
    assert_refused(rewritten(tmp_path / "d.pt", big), "it was saved on a big-endian machine")


@pytest.mark.parametrize("kind", ["cycle", "tree"])
def test_torchscript_of_modules_without_end(tmp_path, archive, kind):
    """One that contains itself, and 2 ** 30 paths through thirty."""
    module = b"c__torch__.M\nM\n)\x81"  # an object of a class, then its attributes
    if kind == "cycle":
        content = b"\x80\x02" + module + b"q\x00}X\x04\0\0\0selfh\x00sb."
    else:
        content = b"\x80\x02" + module + b"}b"
        for i in range(30):
            store = b"q" + bytes([i]) + b"0"
            content += store + module + b"}(X\1\0\0\0ah" + bytes([i]) + b"X\1\0\0\0bh" + bytes([i]) + b"ub"
        content += b"."
    name = next(name for name in archive if name.endswith("/data.pkl"))
    path = rewritten(tmp_path / "net.pt", {**archive, name: content})
    assert_refused(path, "its modules are cyclic or too many")


# -- what the weights expect of images --------------------------------------------------------------------------------


def test_colours_are_said_by_the_user(path, state):
    model = Net(seed=1)
    report = assert_loaded(saved(path, state), state, model, preprocessing="caffe")
    assert model.preprocessing is PREPROCESSINGS["caffe"]
    assert "colours: BGR\n  mean: (104.0, 117.0, 123.0), of pixels 0 to 255" in str(report)
    own = Preprocessing("own", "BGR", 1 / 255, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    report = load_weights(model, path, preprocessing=own)
    assert (model.preprocessing, report.colours, report.pixels) == (own, "BGR", "0 to 1")


def test_wrong_options(path, state, tmp_path):
    saved(path, state)
    with pytest.raises(ValueError, match="must be one of raw, caffe, torchvision, not 'bgr'"):
        load_weights(Net(), path, preprocessing="bgr")
    with pytest.raises(TypeError, match="'preprocessing' must be str or Preprocessing, not list"):
        load_weights(Net(), path, preprocessing=["BGR"])
    with pytest.raises(TypeError, match="'entry' must be str, not int"):
        load_weights(Net(), path, entry=0)
    with pytest.raises(ValueError, match=r"adapt=True needs an ONNX file, but got .*checkpoint"):
        load_weights(Net(), path, adapt=True)
    (tmp_path / "net.onnx").touch()
    with pytest.raises(ValueError, match=r"entry='a' needs a file of another format, but got .*net\.onnx"):
        load_weights(Net(), tmp_path / "net.onnx", entry="a")
    model = models.create_model("vgg_a", num_classes=2, input_size=32)
    assert_refused(path, model=model, preprocessing="caffe")
    assert model.preprocessing is PREPROCESSINGS["raw"]  # as nothing was loaded
