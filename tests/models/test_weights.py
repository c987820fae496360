from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from respiro import download
from respiro.datamodules import ICBHIDataModule
from respiro.download import file_sha256
from respiro.errors import DownloadError, WeightsError
from respiro.losses import CrossEntropy
from respiro.methods import SoundClassifier
from respiro.models import CNN6, TimmBackbone
from respiro.models._ast_weights import fit_positions
from respiro.models.ast import AST
from respiro.models.heads import LinearHead
from respiro.models.weights import Weights, WeightsFile, load_weights
from respiro.transforms import KaldiFbank, LogMelSpectrogram

Tensors = dict[str, Tensor]


@functools.cache
def built(**options: Any) -> AST:
    """A small AST, and for speed with two of its twelve blocks; all twelve are in test_ast_golden.py."""
    model = AST(**{"size": "tiny224", "frames": 98, **options}).eval()
    model.v.blocks = model.v.blocks[:2]
    return model


def ast(seed: int = 0, **options: Any) -> AST:
    model = copy.deepcopy(built(**options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def classifier(seed: int = 0, layer_norm: bool = True, **options: Any) -> SoundClassifier:
    backbone = ast(seed, **options)
    head = LinearHead(backbone.num_features, 4, layer_norm=layer_norm)
    return SoundClassifier(backbone, features=KaldiFbank(), head=head).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def state(model: nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- the published forms, made from a model


def with_unused_heads(tensors: Tensors) -> Tensors:
    """Add ImageNet's two classifiers, named as in the released code."""
    width = tensors["v.cls_token"].shape[-1]
    shapes = {"weight": (10, width), "bias": (10,)}
    return tensors | {f"v.{head}.{kind}": noise(*shapes[kind]) for head in ("head", "head_dist") for kind in shapes}


def released(tensors: Tensors) -> Tensors:
    width = tensors["v.cls_token"].shape[-1]
    tensors = with_unused_heads(tensors) | {"v.pos_embed": noise(1, 2 + 12 * 101, width)}
    tensors |= {f"mlp_head.{part}": noise(5) for part in ("0.weight", "0.bias", "1.weight", "1.bias")}
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def hugging_face(tensors: Tensors, keymap: dict[str, Any]) -> Tensors:
    source = {name.removeprefix("module."): tensor for name, tensor in released(tensors).items()}
    entries = [(name, entry) for name, entry in sorted(keymap.items()) if entry["orig"] in source]
    parts = {name: (source[entry["orig"]], entry["qkv_chunk"]) for name, entry in entries}
    return {name: (t if part is None else t.chunk(3)[part].clone()).contiguous() for name, (t, part) in parts.items()}


def deit(tensors: Tensors) -> Tensors:
    tensors = with_unused_heads(tensors)
    red, green = noise(*tensors["v.patch_embed.proj.weight"].shape), 0.5
    colours = torch.cat([red, torch.full_like(red, green), tensors["v.patch_embed.proj.weight"] - red - green], dim=1)
    width = tensors["v.cls_token"].shape[-1]
    tensors |= {"v.patch_embed.proj.weight": colours, "v.pos_embed": noise(1, 2 + 14 * 14, width)}
    return {name.removeprefix("v."): tensor for name, tensor in tensors.items()}


def patch_mix(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """What the released Patch-Mix code saves of a method."""
    tensors = state(model)
    encoder = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    encoder = with_unused_heads(encoder) | {"mlp_head.0.weight": noise(5)}
    places = {"head.norm.": "0.", "head.linear.": "1."}
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    adam = torch.optim.Adam([parameter])
    adam.step()
    return {
        "args": argparse.Namespace(method="patchmix_cl", seed=1, cls_list=["normal", "crackle"], resume=None),
        "model": {f"{prefix}{name}": tensor for name, tensor in encoder.items()},
        "optimizer": adam.state_dict(),
        "epoch": 50,
        "classifier": {
            f"{places[own]}{name.removeprefix(own)}": tensor
            for name, tensor in tensors.items()
            for own in places
            if name.startswith(own)
        },
    }


@pytest.fixture(scope="module")
def keymap(golden: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((golden / "patchmix" / "keymap_hf_to_original.json").read_text())
    return loaded


# ---------------------------------------------------------------- every form is loaded whole


def middle(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The class tokens' positions, and those of the middle rows and columns."""
    rows, columns = [
        range(size // 2 - new // 2, size // 2 - new // 2 + new) for size, new in zip(source, target, strict=True)
    ]
    chosen = [0, 1, *(2 + row * source[1] + column for row in rows for column in columns)]
    return table[:, chosen]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["state-dict", "released", "hugging-face", "deit", "deit-facebook"])
def test_every_published_form(form: str, suffix: str, keymap: dict[str, Any], tmp_path: Path) -> None:
    source, model = ast(1), ast(2)
    assert model.grid == (12, 9)
    tensors, expected = state(source), state(source)
    makers: dict[str, Callable[[], Tensors]] = {
        "state-dict": lambda: tensors,
        "released": lambda: released(tensors),
        "hugging-face": lambda: hugging_face(tensors, keymap),
        "deit": lambda: deit(tensors),
        "deit-facebook": lambda: {f"model.{name}": tensor for name, tensor in deit(tensors).items()},
    }
    content = makers[form]()
    table = next((t for name, t in content.items() if re.search("pos.*_embed", name)), None)
    assert table is not None
    grid = {"state-dict": (12, 9), "deit": (14, 14), "deit-facebook": (14, 14)}.get(form, (12, 101))
    expected["v.pos_embed"] = middle(table, grid, (12, 9))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        nested = {name.removeprefix("model."): tensor for name, tensor in content.items()}
        torch.save({"model": nested} if form == "deit-facebook" else content, path)
    else:
        save_file(content, path)
    report = load_weights(model, path)
    new = state(model)
    for name, tensor in expected.items():
        torch.testing.assert_close(new[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert sorted(report.matched) == sorted(new)
    assert report.missing == []
    assert set(report.unexpected) == {
        name for name in content if re.search(r"mlp_head|head_dist|head\.|classifier", name)
    }
    assert model.pretrained == {"source": str(path), "sha256": file_sha256(path)}
    assert (report.source, report.sha256) == (str(path), file_sha256(path))


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "data-parallel"])
@pytest.mark.parametrize("mode", ["correct", "reference"])
@torch.no_grad()
def test_a_checkpoint_of_patch_mix_restores_encoder_and_classifier(prefix: str, mode: str, tmp_path: Path) -> None:
    source, model = classifier(1), classifier(2, pos_embed_mode=mode)
    torch.save(patch_mix(source, prefix), tmp_path / "best.pth")
    report = load_weights(model, tmp_path / "best.pth")
    x = noise(2, 16000)
    torch.testing.assert_close(model(x), source(x))
    assert torch.equal(model.backbone.v.pos_embed, source.backbone.v.pos_embed)  # trained as it is, in either mode
    assert len(report.matched) == 31 + 4
    assert report.missing == []
    assert len(report.unexpected) == 5
    assert model.backbone.pretrained["source"].endswith("best.pth")


def test_the_encoder_of_patch_mix_alone(tmp_path: Path) -> None:
    source, model = classifier(1), ast(2)
    torch.save(patch_mix(source), tmp_path / "best.pth")
    report = load_weights(model, tmp_path / "best.pth")
    assert same(state(model), state(source.backbone))
    parts = {f"classifier.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert parts <= set(report.unexpected)


def test_a_method_keeps_its_head_where_the_file_has_none_of_its_kind(tmp_path: Path) -> None:
    model = classifier(2)
    before = state(model)
    torch.save(released(state(ast(1))), tmp_path / "audioset.pth")
    report = load_weights(model, tmp_path / "audioset.pth")
    after = state(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} <= set(report.matched)
    assert report.missing == ["head.norm.weight", "head.norm.bias", "head.linear.weight", "head.linear.bias"]
    assert all(name.startswith("backbone.v.") for name in report.matched)


def test_a_method_with_another_head_takes_the_encoder_of_patch_mix(tmp_path: Path) -> None:
    source, model = classifier(1), classifier(2, layer_norm=False)
    torch.save(patch_mix(source), tmp_path / "best.pth")
    with pytest.raises(WeightsError, match=r"2 unknown: head.norm.weight, head.norm.bias.*pass model\.backbone"):
        load_weights(model, tmp_path / "best.pth")
    load_weights(model.backbone, tmp_path / "best.pth")
    assert same(state(model.backbone), state(source.backbone))


def test_half_precision_and_old_files(tmp_path: Path) -> None:
    source, model = ast(1), ast(2)
    half = {name: tensor.half() for name, tensor in state(source).items()}
    torch.save(half, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert same(state(model), {name: tensor.float() for name, tensor in half.items()})


def test_what_is_read_is_not_allowed_elsewhere(tmp_path: Path) -> None:
    torch.save(patch_mix(classifier(1)), tmp_path / "best.pth")
    load_weights(ast(2), tmp_path / "best.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_the_report_in_words(tmp_path: Path) -> None:
    torch.save(released(state(ast(1))), tmp_path / "audioset.pth")
    text = str(load_weights(classifier(2), tmp_path / "audioset.pth"))
    digest = file_sha256(tmp_path / "audioset.pth")
    assert text == (
        f"{tmp_path}/audioset.pth: 31 tensors loaded; not in the file: head.norm.weight, head.norm.bias, "
        f"head.linear.weight and 1 more; not used: module.v.head.weight, module.v.head.bias, "
        f"module.v.head_dist.weight and 5 more; sha256 {digest[:16]}"
    )


# ---------------------------------------------------------------- positions


def bilinear(image: Tensor, dim: int, size: int) -> Tensor:
    """Stretch one axis: a loop over its new places, each between the two nearest old ones."""
    old, slices = image.shape[dim], []
    for place in range(size):
        at = min(max((place + 0.5) * old / size - 0.5, 0.0), old - 1.0)
        low = math.floor(at)
        high = min(low + 1, old - 1)
        slices.append(image.select(dim, low) * (1 - (at - low)) + image.select(dim, high) * (at - low))
    return torch.stack(slices, dim)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((12, 101), (12, 101)),
        ((12, 101), (5, 8)),
        ((12, 101), (12, 30)),
        ((12, 101), (20, 60)),
        ((12, 101), (79, 12)),
        ((14, 14), (14, 14)),
        ((24, 24), (12, 79)),
        ((24, 24), (49, 24)),
        ((3, 4), (1, 1)),
    ],
    ids=lambda grid: f"{grid[0]}x{grid[1]}",
)
def test_positions_are_cut_or_stretched(source: tuple[int, int], target: tuple[int, int]) -> None:
    table = noise(1, 2 + math.prod(source), 3)
    image = table[0, 2:].reshape(*source, 3)
    for dim in (1, 0):
        size, new = source[dim], target[dim]
        start = size // 2 - new // 2
        image = image.narrow(dim, start, new) if new <= size else bilinear(image, dim, new)
    expected = torch.cat([table[0, :2], image.reshape(-1, 3)])
    torch.testing.assert_close(fit_positions(table, source, target)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["released", "deit"])
def test_the_reference_mode_takes_the_transposed_grid(form: str) -> None:
    make, source = {"released": (released, (12, 101)), "deit": (deit, (14, 14))}[form]
    tensors = make(state(ast(1)))
    model = ast(2, frames=198, pos_embed_mode="reference")
    assert model.grid == (12, 19)
    table = tensors["module.v.pos_embed" if form == "released" else "pos_embed"]
    new = model.convert_weights(tensors).encoder["v.pos_embed"]
    torch.testing.assert_close(new, fit_positions(table, source, (19, 12)))
    assert not torch.allclose(new, fit_positions(table, source, (12, 19)))


# ---------------------------------------------------------------- what does not fit changes nothing


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(**new: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in new.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("module.v.blocks.1.attn.qkv.weight"), r"30 of 31 .*\(1 missing: v\.blocks\.1\.attn\.qkv\.weight\)"),
        (changed(module__v__extra=noise(2)), r"31 of 31 .*\(1 unknown: v\.extra\)"),
        (changed(module__v__norm__bias=torch.full((192,), math.nan)), r"31 of 31 .*\(1 not finite: v\.norm\.bias\)"),
        (changed(module__v__norm__bias=torch.full((192,), math.inf)), r"1 not finite: v\.norm\.bias"),
        (changed(module__v__norm__bias=noise(100)), r"of another size: v\.norm\.bias \(100,\) instead of \(192,\)"),
        (
            changed(module__v__norm__bias=torch.ones(192, dtype=torch.int32)),
            r"of another type: v\.norm\.bias torch\.int32",
        ),
        (changed(module__v__pos_embed=noise(1, 500, 192)), r"v\.pos_embed \(1, 500, 192\) instead of \(1, 110, 192\)"),
        (changed(module__v__pos_embed=noise(3)), r"v\.pos_embed \(3,\) instead of"),
        (changed(module__v__cls_token=noise(1)[0]), r"v\.cls_token \(\) instead of"),
        (without("module.v.cls_token"), r"matches 0 of 31 tensors of AST\(size='tiny224', frames=98\) \(31 missing"),
        (
            lambda _: released(state(ast(1, size="small224"))),
            r"looks like the released AudioSet file, size small \(384 features\)",
        ),
        (
            lambda _: {"conv_block1.conv1.weight": noise(64, 1, 5, 5), "fc1.weight": noise(512, 512)},
            r"matches 0 of 31 .*2 unknown: conv_block1\.conv1\.weight, fc1\.weight",
        ),
    ],
    ids=[
        "missing",
        "unknown",
        "nan",
        "inf",
        "size",
        "type",
        "positions",
        "flat-positions",
        "scalar",
        "form",
        "small",
        "panns",
    ],
)
def test_another_file_is_refused(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    torch.save(change(released(state(ast(1)))), tmp_path / "file.pth")
    model = ast(2)
    before = state(model)
    with pytest.raises(WeightsError, match=rf"file\.pth .*{message}.*Nothing was loaded\."):
        load_weights(model, tmp_path / "file.pth")
    assert same(state(model), before)
    assert model.pretrained is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("audio_spectrogram_transformer.encoder.layer.0.attention.attention.value.bias"), "2 unknown: .*query"),
        (
            changed(
                audio_spectrogram_transformer__encoder__layer__0__attention__attention__key__bias=noise(7),
            ),
            "1 missing: v.blocks.0.attn.qkv.bias; 3 unknown",
        ),
    ],
    ids=["missing", "size"],
)
def test_incomplete_attention_is_refused(
    change: Callable[[Tensors], Tensors], message: str, keymap: dict[str, Any], tmp_path: Path
) -> None:
    save_file(change(hugging_face(state(ast(1)), keymap)), tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_weights(ast(2), tmp_path / "file.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["classifier"].update({"1.weight": noise(2, 192)}), r"head\.linear\.weight \(2, 192\)"),
        (lambda content: content["classifier"].update({"1.bias": torch.full((4,), math.nan)}), "1 not finite: head"),
        (
            lambda content: content["classifier"].pop("0.bias"),
            r"34 of 35 .* and its head.*1 missing: head\.norm\.bia",
        ),
        (lambda content: content["model"].update({"v.pos_embed": noise(1, 950, 192)}), r"\(1, 950, 192\) instead of"),
    ],
    ids=["classes", "nan", "missing", "duration"],
)
def test_a_checkpoint_of_patch_mix_that_does_not_fit(
    spoil: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    content = patch_mix(classifier(1))
    spoil(content)
    torch.save(content, tmp_path / "best.pth")
    model = classifier(2)
    before = state(model)
    with pytest.raises(WeightsError, match=message) as refused:
        load_weights(model, tmp_path / "best.pth")
    assert "looks like a checkpoint of the released Patch-Mix code, size tiny" in str(refused.value)
    assert same(state(model), before)


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def spoil(path: Path) -> None:
    """Overwrite numbers in the middle: torch itself would load them."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pth", lambda path: (torch.save(state(ast()), path), spoil(path)), "damaged .*checksum of "),
        ("a.pth", lambda path: torch.save({"v.cls_token": RunsCode(path.parent / "made")}, path), "could run code"),
        ("a.pth", lambda path: (torch.save(state(ast()), path), cut(path)), "damaged or incomplete"),
        ("a.safetensors", lambda path: (save_file(state(ast()), path), cut(path)), "damaged or incomplete"),
        ("a.pth", lambda path: path.write_bytes(b""), "damaged or incomplete"),
        ("a.pth", lambda path: path.write_text("<html>not found</html>"), "damaged or incomplete"),
        ("a.safetensors", lambda path: path.write_text("<html>not found</html>"), "damaged or incomplete"),
        ("a.pth", lambda path: torch.save([noise(3)], path), "no tensors with a name"),
        ("a.pth", lambda path: torch.save({"epoch": 3}, path), "no tensors with a name"),
        ("a.pth", lambda path: path.mkdir(), r"no weights: .*a\.pth is not a file"),
        (
            "a.pth",
            lambda path: None,
            r"no weights: .*a\.pth is not a file, nor one of the published AST_AUDIOSET, AST_AUDIOS",
        ),
    ],
    ids=[
        "spoilt",
        "code",
        "cut",
        "cut-safetensors",
        "empty",
        "html",
        "html-safetensors",
        "list",
        "no-tensor",
        "folder",
        "absent",
    ],
)
def test_what_is_no_file_of_weights(name: str, write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=message):
        load_weights(ast(), tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_a_model_that_takes_no_published_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="Linear takes no published weights"):
        load_weights(nn.Linear(2, 2), "AST_AUDIOSET", cache_dir=tmp_path)


# ---------------------------------------------------------------- checkpoints of our own methods


SILENT: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


def timm(**parts: Any) -> SoundClassifier:
    return SoundClassifier(TimmBackbone("resnet10t"), features=LogMelSpectrogram(n_mels=32), **parts)


@pytest.fixture(scope="module")
def trained(icbhi_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SoundClassifier, Path]:
    """A method after one step, and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    model = timm(loss=CrossEntropy([1.0, 2.0, 3.0, 4.0]))
    data = ICBHIDataModule(icbhi_root, batch_size=4, duration=1.0, select_on="test")
    trainer = Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, default_root_dir=folder, **SILENT)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(folder / "run.ckpt")
    return model, folder / "run.ckpt"


def test_a_checkpoint_of_ours_fills_any_backbone(trained: tuple[SoundClassifier, Path]) -> None:
    source, path = trained
    backbone = TimmBackbone("resnet10t")
    report = load_weights(backbone, path)
    assert same(state(backbone), state(source.backbone))
    assert sorted(report.matched) == sorted(state(source.backbone))
    assert report.missing == []
    assert {"state_dict.head.linear.weight", "state_dict.head.linear.bias"} <= set(report.unexpected)
    assert all(name.startswith("state_dict.") and ".backbone." not in name for name in report.unexpected)
    assert backbone.pretrained == {
        "source": str(path),
        "sha256": file_sha256(path),
        "features": source.features.spec(),
    }


def test_a_checkpoint_of_ours_fills_a_method_and_its_head(trained: tuple[SoundClassifier, Path]) -> None:
    source, path = trained
    model = timm()
    report = load_weights(model, path)
    assert same(state(model.backbone), state(source.backbone))
    assert same(state(model.head), state(source.head))
    assert report.missing == []
    assert all(name.startswith(("backbone.", "head.")) for name in report.matched)


def test_a_stamp_once_earned_stays_with_the_backbone(trained: tuple[SoundClassifier, Path]) -> None:
    source, path = trained
    assert [record["select_on"] for record in source.history] == ["test"]
    backbone = TimmBackbone("resnet10t")
    load_weights(backbone, path)
    assert backbone.history == source.history
    assert backbone.history is not source.history
    own = {"select_on": "val", "seed": 7}
    backbone.history = [own]
    load_weights(backbone, path)
    load_weights(backbone, path)
    assert backbone.history == [*source.history, own]


def test_other_weights_bring_no_records(tmp_path: Path) -> None:
    model = ast(2)
    torch.save(released(state(ast(1))), tmp_path / "audioset.pth")
    load_weights(model, tmp_path / "audioset.pth")
    assert list(model.history) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN6(), r"0 of 24 tensors of CNN6\(\); .* checkpoint of SoundClassifier with TimmBackbone"),
        (
            lambda: TimmBackbone("resnet10t", in_channels=3),
            r"encoder\.conv1\.\S+ \(\d+, 1, 3, 3\) instead of \(\d+, 3,",
        ),
        (lambda: timm(classes=["no", "yes"]), r"head\.linear\.bias \(4,\) instead of \(2,\).*pass model\.backbone"),
    ],
    ids=["network", "channels", "classes"],
)
def test_a_checkpoint_of_another_network_of_ours(
    make: Callable[[], nn.Module], message: str, trained: tuple[SoundClassifier, Path]
) -> None:
    model = make()
    before = state(model)
    with pytest.raises(WeightsError, match=rf"run\.ckpt matches .*{message}"):
        load_weights(model, trained[1])
    assert same(state(model), before)
    assert list(getattr(model, "backbone", model).history) == []


def test_a_backbone_without_published_weights_says_what_it_takes(tmp_path: Path) -> None:
    torch.save(state(TimmBackbone("resnet10t")), tmp_path / "timm.pth")
    with pytest.raises(WeightsError, match=r"TimmBackbone takes no published weights.*checkpoint of a respiro method"):
        load_weights(TimmBackbone("resnet10t"), tmp_path / "timm.pth")


# ---------------------------------------------------------------- published files


class Site:
    """A server of one file that counts who asks for it, and may break off."""

    def __init__(self, body: bytes) -> None:
        self.body, self.sent, self.asked = body, len(body), 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(site.body)))
                self.end_headers()
                self.wfile.write(site.body[: site.sent])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/weights"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "_WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")
    save_file(released(state(ast(1))), tmp_path / "original.safetensors")
    site = Site((tmp_path / "original.safetensors").read_bytes())
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def published(site: Site, tmp_path: Path) -> WeightsFile:
    digest = file_sha256(tmp_path / "original.safetensors")
    return WeightsFile(site.url, "tiny.safetensors", digest[:8], "MIT", "Nobody, 2000", len(site.body))


def test_a_published_file_is_fetched_once(
    site: Site, published: WeightsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ast(2)
    report = load_weights(model, published, cache_dir=tmp_path / "cache", progress=False)
    kept = tmp_path / "cache" / "weights" / "tiny.safetensors"
    assert kept.read_bytes() == site.body
    assert model.pretrained == {"source": "tiny.safetensors", "sha256": file_sha256(kept)}
    assert report.source == "tiny.safetensors"
    monkeypatch.setenv("RESPIRO_CACHE", str(tmp_path / "cache"))
    load_weights(ast(3), published)
    assert site.asked == 1
    kept.write_bytes(b"spoilt")
    load_weights(ast(3), published, progress=False)
    assert site.asked == 2


def test_a_download_that_breaks_off(site: Site, published: WeightsFile, tmp_path: Path) -> None:
    site.sent = 1000
    model = ast(2)
    before = state(model)
    with pytest.raises(DownloadError, match=r"ended after 1000 of \d+ bytes"):
        load_weights(model, published, cache_dir=tmp_path, progress=False)
    assert same(state(model), before)


def test_a_download_of_something_else(published: WeightsFile, tmp_path: Path) -> None:
    model = ast(2)
    before = state(model)
    with pytest.raises(DownloadError, match="published is 00000000"):
        load_weights(model, replace(published, sha256="0" * 8), cache_dir=tmp_path, progress=False)
    assert same(state(model), before)
    assert not (tmp_path / "weights" / "tiny.safetensors").exists()


def test_a_file_known_by_its_md5(site: Site, published: WeightsFile, tmp_path: Path) -> None:
    digest = hashlib.md5(site.body).hexdigest()
    model = ast(2)
    report = load_weights(model, replace(published, sha256=None, md5=digest), cache_dir=tmp_path, progress=False)
    assert report.sha256 == hashlib.sha256(site.body).hexdigest()
    with pytest.raises(DownloadError, match=f"md5 is {digest}, published is {'0' * 32}"):
        load_weights(model, replace(published, sha256=None, md5="0" * 32), cache_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"'tiny.safetensors' needs a digest"):
        replace(published, sha256=None)


def test_a_whole_digest_is_the_one_noted(site: Site, published: WeightsFile, tmp_path: Path) -> None:
    digest = hashlib.sha256(site.body).hexdigest()
    report = load_weights(ast(2), replace(published, sha256=digest.upper()), cache_dir=tmp_path, progress=False)
    assert report.sha256 == digest


@pytest.mark.parametrize("source", [Weights.AST_AUDIOSET, "AST_AUDIOSET"], ids=["entry", "name"])
def test_a_name_is_an_address_unless_it_is_a_file(
    source: Weights | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_WAITS", (0.0,))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there: nothing leaves this computer
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match=r"https://huggingface\.co/MIT/.*curl -L"):
        load_weights(ast(), source, cache_dir=tmp_path)
    torch.save(state(ast(1)), tmp_path / "AST_AUDIOSET")
    if isinstance(source, str):
        assert load_weights(ast(), source, cache_dir=tmp_path).source == "AST_AUDIOSET"


def test_the_registry() -> None:
    files = [entry.value for entry in Weights]
    assert len({file.name for file in files}) == len({file.sha256 or file.md5 for file in files}) == len(Weights)
    for file in files:
        assert file.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", file.sha256 or "0" * 64)
        assert file.sha256 is None or len(file.sha256) == 64 or f"-{file.sha256}.pth" in file.url
        assert re.fullmatch("[0-9a-f]{32}", file.md5 or "0" * 32)
        assert file.licence in {"BSD-3-Clause", "Apache-2.0", "CC-BY-4.0"}
        assert re.search(r"et al\..*20\d\d", file.paper)
