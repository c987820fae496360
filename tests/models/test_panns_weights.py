"""Weights for CNN6, CNN10 and CNN14: every form they come in, what does not fit, and what lies beside them."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from respiro.errors import WeightsError
from respiro.methods import SoundClassifier
from respiro.models import CNN6, CNN10, CNN14, load_weights
from respiro.models._reading import read

Tensors = dict[str, Tensor]
NETWORKS: dict[str, Any] = {"CNN6": CNN6, "CNN10": CNN10, "CNN14": CNN14}
LAYOUT = json.loads((Path(__file__).parents[1] / "golden" / "scl" / "state_dict_layout.json").read_text())


def recipe(key: str, shape: list[int]) -> Tensor:
    """Weights as the README of the reference vectors makes them from their key."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    x = np.random.default_rng(zlib.crc32(f"dev:{key}".encode())).standard_normal(shape)
    if key.endswith("running_mean"):
        x = -30 + 5 * x if key.startswith("bn0") else 0.3 * x
    elif key.endswith("running_var"):
        x = 100 * np.exp(0.3 * x) if key.startswith("bn0") else np.exp(0.3 * x)
    elif key.endswith("bias"):
        x = 0.1 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    else:
        x = x * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(x.astype(np.float32))


def constant(key: str, shape: list[int]) -> Tensor:
    """A tensor of one number, another for each key, which takes no room in a file."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    return torch.tensor(zlib.crc32(key.encode()) / 2**32).expand(shape)


def tensors(network: str, fill: Callable[[str, list[int]], Tensor] = constant, group: str = "panns") -> Tensors:
    """All that a file of PANNs holds, or one of the released code of Moummad and Farrugia (group ``"scl"``)."""
    keys = LAYOUT[group][network.capitalize() if group == "panns" else network]["keys"]
    return {key: fill(key, shape) for key, (shape, _) in keys.items()}


@functools.cache
def recipes(group: str = "panns") -> Tensors:
    return tensors("CNN6", recipe, group)


@functools.cache
def built(network: str, bn0: bool = False) -> Any:
    """A model of zeros to load into; the tests change nothing of it but its tensors."""
    with torch.device("meta"):
        model = NETWORKS[network](bn0=bn0)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def encoder(file: Tensors, bn0: bool = False) -> Tensors:
    wanted = ("conv_block", "bn0.") if bn0 else ("conv_block",)
    return {key: tensor for key, tensor in file.items() if key.startswith(wanted)}


def state(model: torch.nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpoint(model: Tensors, sampler: Any = None) -> dict[str, Any]:
    return {"iteration": 600000, "model": model, "sampler": sampler or {}}


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("bn0", [False, True], ids=["", "bn0"])
@pytest.mark.parametrize(("network", "matched"), [("CNN6", 24), ("CNN10", 48), ("CNN14", 72)])
def test_a_checkpoint_of_panns_fills_the_network(network: str, matched: int, bn0: bool, tmp_path: Path) -> None:
    file, model = tensors(network), built(network, bn0)
    torch.save(checkpoint(file), tmp_path / "panns.pth")
    report = load_weights(model, tmp_path / "panns.pth")
    expected = encoder(file, bn0)
    assert same(model.state_dict(), expected)
    assert sorted(report.matched) == sorted(expected)
    assert len(report.matched) == matched + 5 * bn0
    assert report.missing == []
    assert sorted(report.unexpected) == sorted(f"model.{key}" for key in file.keys() - expected.keys())
    assert len(report.unexpected) == 12 - 5 * bn0


@torch.no_grad()
def test_the_reference_embeddings_in_both_orientations(golden: Path, tmp_path: Path) -> None:
    expected = np.load(golden / "scl" / "cnn6_forward.npz")
    features = torch.from_numpy(np.load(golden / "scl" / "frontend.npz")["standardized"])[:, 0].mT
    file = recipes() | recipes("scl")
    for key, total in zip(expected["weight_keys"], expected["weight_sums"], strict=True):
        assert file[str(key)].double().sum().item() == pytest.approx(float(total), abs=1e-6), key
    torch.save(checkpoint(recipes()), tmp_path / "panns.pth")
    model = CNN6().eval()
    load_weights(model, tmp_path / "panns.pth")
    np.testing.assert_allclose(model(features), expected["embedding"], rtol=1e-4, atol=1e-4)
    short = model(features[:, :100])
    np.testing.assert_allclose(short, expected["embedding_first100frames"], rtol=1e-4, atol=1e-4)
    turned = CNN6("time_first").eval()
    load_weights(turned, tmp_path / "panns.pth")
    torch.testing.assert_close(turned(features[:, :100].mT), short)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("", ".pth"),
        ("", ".safetensors"),
        ("module.", ".old.pth"),
        ("model.module.", ".pth"),
        ("cnn6.", ".safetensors"),
        ("backbone.", ".old.pth"),
        ("state_dict.encoder.cnn6.", ".pth"),
    ],
)
def test_any_prefix_in_any_kind_of_file(prefix: str, suffix: str, tmp_path: Path) -> None:
    file, model, path = tensors("CNN6"), built("CNN6"), tmp_path / f"weights{suffix}"
    content = {f"{prefix}{key}": tensor for key, tensor in file.items()}
    if suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix == ".pth")
    report = load_weights(model, path)
    assert same(model.state_dict(), encoder(file))
    assert sorted(report.unexpected) == sorted(f"{prefix}{key}" for key in file.keys() - encoder(file).keys())
    assert model.pretrained["source"] == str(path)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(half: torch.dtype, tmp_path: Path) -> None:
    file = {key: tensor.to(half) if tensor.is_floating_point() else tensor for key, tensor in tensors("CNN6").items()}
    torch.save(file, tmp_path / "half.pth")
    model = built("CNN6")
    load_weights(model, tmp_path / "half.pth")
    expected = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in file.items()}
    assert same(model.state_dict(), encoder(expected))


# ---------------------------------------------------------------- the released code of Moummad and Farrugia


def released(file: Tensors, path: Path) -> None:
    """A file of an encoder in its wrapper, and of a projector, whose layers have two names each."""
    projector = {
        f"{name}.{kind}": torch.ones(size)
        for layer, width in (("1", 512), ("2", 128))
        for name in (f"linear{layer}", f"projector.{2 * int(layer) - 2}")
        for kind, size in (("weight", (width, 512)), ("bias", (width,)))
    } | {f"bn.{kind}": torch.ones(512) for kind in ("weight", "bias", "running_mean", "running_var")}
    torch.save({f"cnn6.{key}": tensor for key, tensor in file.items()} | projector, path)


@torch.no_grad()
def test_encoder_and_classifier_of_a_released_model(golden: Path, tmp_path: Path) -> None:
    expected = np.load(golden / "scl" / "cnn6_forward.npz")
    features = torch.from_numpy(np.load(golden / "scl" / "frontend.npz")["standardized"])[:1, 0].mT
    released(recipes("scl"), tmp_path / "scl.pth")
    model: Any = SoundClassifier(CNN6()).eval()
    report = load_weights(model, tmp_path / "scl.pth")
    np.testing.assert_allclose(model.head(model.backbone(features)), expected["logits"][:1], rtol=1e-4, atol=1e-4)
    assert len(report.matched) == 24 + 2
    assert {"head.linear.weight", "head.linear.bias"} <= set(report.matched)
    assert report.missing == []
    assert len(report.unexpected) == 8 + 4
    assert all(name.startswith(("linear1.", "linear2.", "projector.", "bn.")) for name in report.unexpected)


def test_the_encoder_of_a_released_model_alone(tmp_path: Path) -> None:
    file, model = tensors("CNN6", group="scl"), built("CNN6")
    released(file, tmp_path / "scl.pth")
    report = load_weights(model, tmp_path / "scl.pth")
    assert same(model.state_dict(), encoder(file))
    assert {"cnn6.linear.weight", "cnn6.linear.bias"} <= set(report.unexpected)


def test_a_projector_without_a_prefix_beside_it(tmp_path: Path) -> None:
    file = {**tensors("CNN6", group="scl"), "linear1.weight": torch.ones(512, 512), "bn.bias": torch.ones(512)}
    torch.save(file, tmp_path / "scl.pth")
    report = load_weights(built("CNN6"), tmp_path / "scl.pth")
    assert sorted(report.unexpected) == ["bn.bias", "linear.bias", "linear.weight", "linear1.weight"]


def test_a_method_with_another_head_takes_the_encoder_alone(tmp_path: Path) -> None:
    released(tensors("CNN6", group="scl"), tmp_path / "scl.pth")
    model = SoundClassifier(CNN6(), classes=["normal", "adventitious"])
    before = state(model)
    message = r"matches 24 of 26 .* and its head; .*head\.linear\.weight \(4, 512\) instead of \(2, 512\)"
    with pytest.raises(WeightsError, match=rf"{message}.*pass model\.backbone"):
        load_weights(model, tmp_path / "scl.pth")
    assert same(state(model), before)
    load_weights(model.backbone, tmp_path / "scl.pth")
    assert same(model.backbone.state_dict(), encoder(tensors("CNN6")))


def test_a_method_keeps_its_head_where_the_file_has_none(tmp_path: Path) -> None:
    torch.save(checkpoint(tensors("CNN6")), tmp_path / "panns.pth")
    model = SoundClassifier(CNN6())
    before = model.head.linear.weight.clone()
    report = load_weights(model, tmp_path / "panns.pth")
    assert report.missing == ["head.linear.weight", "head.linear.bias"]
    assert torch.equal(model.head.linear.weight, before)
    assert "model.fc_audioset.weight" in report.unexpected


# ---------------------------------------------------------------- what does not fit changes nothing


def refused(model: Any, content: Any, message: str, folder: Path) -> None:
    torch.save(content, folder / "file.pth")
    before = state(model)
    with pytest.raises(WeightsError, match=rf"file\.pth .*{message}"):
        load_weights(model, folder / "file.pth")
    assert same(state(model), before)


@pytest.mark.parametrize(("network", "other"), list(itertools.permutations(NETWORKS, 2)))
def test_the_wrong_network_is_named(network: str, other: str, tmp_path: Path) -> None:
    message = rf"tensors of {network}\(\); it looks like a checkpoint of {other} .*Nothing was loaded\."
    refused(built(network), checkpoint(tensors(other)), message, tmp_path)


def test_a_network_of_panns_that_we_do_not_have(tmp_path: Path) -> None:
    file = {key.replace("conv_block2", "resnet.layer1"): tensor for key, tensor in tensors("CNN10").items()}
    refused(built("CNN10"), file, r"matches 36 of 48 tensors of CNN10\(\) \(12 missing.* 12 unknown: resnet", tmp_path)


def without(file: Tensors, *names: str) -> Tensors:
    return {key: tensor for key, tensor in file.items() if not key.startswith(names)}


@pytest.mark.parametrize(
    ("change", "bn0", "message"),
    [
        (
            lambda file: without(file, "conv_block3.bn1.bias"),
            False,
            r"matches 23 of 24 .*missing: conv_block3\.bn1\.bias",
        ),
        (lambda file: without(file, "conv_block1.conv1"), False, r"23 of 24 .*1 missing: conv_block1\.conv1\.weight"),
        (lambda file: without(file, "bn0."), True, r"24 of 29 tensors of CNN6\(bn0=True\).*5 missing: bn0\.weight"),
        (lambda file: file | {"bn0.bias": torch.ones(128)}, True, r"bn0\.bias \(128,\) instead of \(64,\)"),
        (lambda file: file | {"conv_block5.extra": torch.ones(1)}, False, r"1 unknown: conv_block5\.extra"),
        (
            lambda file: file | {"conv_block1.bn1.running_var": torch.full((64,), torch.nan)},
            False,
            r"1 not finite: conv_block1\.bn1\.running_var",
        ),
        (
            lambda file: file | {"conv_block1.bn1.weight": torch.ones(64, dtype=torch.int64)},
            False,
            r"1 of another type: conv_block1\.bn1\.weight torch\.int64 instead of torch\.float32",
        ),
        (
            lambda file: file | {"conv_block1.bn1.num_batches_tracked": torch.tensor(1.5)},
            False,
            r"1 of another type: .*num_batches_tracked torch\.float32 instead of torch\.int64",
        ),
        (lambda file: file | {"conv_block1.conv1.weight": torch.tensor(1.0)}, False, r"conv1\.weight \(\) instead of"),
        (
            lambda file: {"model": file, "average": file},
            False,
            r"matches 0 of 24 .*looks like a file of 2 networks, under 'model\.', 'average\.'",
        ),
        (lambda file: {"v.cls_token": torch.ones(1, 1, 192)}, False, r"24 missing: .*1 unknown: v\.cls_token"),
    ],
    ids=[
        "missing",
        "first-missing",
        "no-bn0",
        "size-of-bn0",
        "unknown",
        "nan",
        "integers",
        "fractions",
        "scalar",
        "two-networks",
        "nothing-matches",
    ],
)
def test_another_file_is_refused(change: Callable[[Tensors], Any], bn0: bool, message: str, tmp_path: Path) -> None:
    refused(built("CNN6", bn0), change(tensors("CNN6")), message, tmp_path)


# ---------------------------------------------------------------- what lies beside the weights


def sampler() -> dict[str, Any]:
    """What PANNs' sampler keeps, and whatever else of numpy a training may leave in its files."""
    state = np.random.RandomState(0)
    return {
        "indexes": np.arange(20_000, dtype=np.int64),
        "queue": [np.int64(3), np.float32(0.5), np.bool_(True)],
        "pointers_of_classes": {np.int64(0): np.zeros((2, 3), np.uint8), "one": np.ones((2, 3), np.float16, order="F")},
        "names": np.array(["Speech", "Cough"]),
        "objects": np.array([1, None, "wheeze"], dtype=object),
        "table": np.zeros(2, [("start", "f4"), ("end", "f8")]),
        "dtype": np.dtype("<f4"),
        "random": state,
        "random_state": state.get_state(),
    }


def renamed(content: bytes, to: str) -> bytes:
    """Give numpy's functions the names they have in numpy 1 or 2, whichever is installed."""
    return content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", to.encode())


def save(content: Any, path: Path, core: str, archive: bool) -> None:
    memory = io.BytesIO()
    torch.save(content, memory, _use_new_zipfile_serialization=archive)
    if not archive:
        path.write_bytes(renamed(memory.getvalue(), core))
        return
    with zipfile.ZipFile(memory) as written, zipfile.ZipFile(path, "w") as file:
        for entry in written.namelist():
            data = written.read(entry)
            file.writestr(entry, renamed(data, core) if entry.endswith("data.pkl") else data)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("core", ["numpy.core.", "numpy._core."], ids=["numpy1", "numpy2"])
def test_arrays_beside_the_weights(core: str, archive: bool, tmp_path: Path) -> None:
    path, file, model = tmp_path / "panns.pth", tensors("CNN6"), built("CNN6")
    allowed = set(torch.serialization.get_safe_globals())
    save(checkpoint(file, sampler()), path, core, archive)
    assert f"{core}multiarray".encode() in path.read_bytes()
    load_weights(model, path)
    assert same(model.state_dict(), encoder(file))
    content, found = read(path)
    assert found.keys() == {f"model.{key}" for key in file}
    beside = content["sampler"]
    assert beside.keys() == sampler().keys()
    assert not isinstance(beside["indexes"], np.ndarray)
    assert set(torch.serialization.get_safe_globals()) == allowed


class Runs:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("hide", "name"),
    [
        (lambda path: Runs(os.mkdir, path), r"\w+\.mkdir"),
        (lambda path: np.array([Runs(os.mkdir, path)], dtype=object), r"\w+\.mkdir"),
        (lambda path: {np.int64(1): [Runs(os.mkdir, path)]}, r"\w+\.mkdir"),
        (lambda path: Runs(np.save, f"{path}.npy", [1.0]), r"numpy\.save"),
        (lambda path: np.random.default_rng(0), r"numpy\.random\."),
        (lambda path: np.ma.array([1.0]), r"numpy\.ma\."),
    ],
    ids=["bare", "in-an-array", "beside-a-number", "numpy-function", "generator", "masked-array"],
)
def test_code_beside_the_weights_does_not_run(
    hide: Callable[[str], Any], name: str, archive: bool, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    model = built("CNN6")
    before = state(model)
    content = checkpoint(tensors("CNN6"), {"indexes": hide(str(made))})
    torch.save(content, tmp_path / "panns.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(
        WeightsError, match=rf"could run code and is not read \(it names {name}.*save the state dict alone"
    ):
        load_weights(model, tmp_path / "panns.pth")
    assert list(tmp_path.iterdir()) == [tmp_path / "panns.pth"]
    assert same(state(model), before)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file(archive: bool, tmp_path: Path) -> None:
    path, model = tmp_path / "panns.pth", built("CNN6")
    before = state(model)
    torch.save(checkpoint(tensors("CNN6"), sampler()), path, _use_new_zipfile_serialization=archive)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        load_weights(model, path)
    assert same(state(model), before)
