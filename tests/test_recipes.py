"""Every recipe trains, from its name to a checkpoint, with a smaller model on a synthetic data set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import respiro
from respiro.cli import main

RECIPES = sorted(path.stem for path in (Path(respiro.__file__).parent / "recipes").glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((Path(respiro.__file__).parent / "recipes" / f"{name}.yaml").read_text())
    return content


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, icbhi_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smaller = ["--model.init_args.backbone.init_args.size", "tiny224", "--data.duration", "1.0"]
    smaller += ["--model.init_args.backbone.init_args.frames", "98"]
    smaller += ["--model.init_args.augment.init_args.time_width", "60"]
    if "head" in read(name)["model"]["init_args"]:
        smaller += ["--model.init_args.head.init_args.in_features", "192"]
    # Half precision needs a GPU, and the published weights a network.
    machine = ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--weights", "null"]
    data = ["--data.root", os.fspath(icbhi_root), "--data.batch_size", "2", "--data.num_workers", "0"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    main(["fit", "--config", name, *smaller, *machine, *data, *limits, *quiet])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["respiro"]["class_path"] == read(name)["model"]["class_path"]
    assert kept["respiro"]["history"][-1]["select_on"] == ("val" if name.endswith("_corrected") else "test")


def common(corrected: bool) -> dict[str, Any]:
    """Hyper-parameter card of the paper's scripts: what every recipe shares."""
    return {
        "seed_everything": 1,
        "weights": "AST_AUDIOSET",
        "trainer": {"max_epochs": 50, "precision": "bf16-mixed" if corrected else "16-mixed"},
        "backbone": {
            "size": "base384",
            "num_mel_bins": 128,
            "frames": 798,
            "pos_embed_mode": "correct" if corrected else "reference",
        },
        "augment": {"policy": "icbhi_ast_sup"} | ({} if corrected else {"gate": "normal"}),
        "optimizer": "adam",
        "lr": 5e-5 if corrected else 2.5e-5,  # the released moving average of 0.5 halves every step
        "weight_decay": 1e-6,
        "schedule": "cosine" if corrected else "epoch-cosine",
        "lr_floor": 1e-3,
        "data": {
            "root": "data/icbhi",
            "protocol": "official",
            "labels": "4-class",
            "select_on": "val" if corrected else "test",
            "duration": 8.0,
            "pad": "repeat",
            "fade": "recording",
            "batch_size": 8,
        },
    }


OWN: dict[str, dict[str, Any]] = {
    "ast_ce": {"loss": {"weight": "balanced"}, "head": {"in_features": 768, "num_classes": 4, "layer_norm": True}},
    "patchmix_ce": {"patch_mix": {"mode": "patch", "beta": 1.0}},
    "patchmix_cl": {
        "patch_mix": {"mode": "patch", "beta": 1.0},
        "contrastive": {"temperature": 0.06, "negatives": "all"},
        "target": "grad_block",
        "contrastive_weight": 1.0,
    },
}
CLASSES = {"ast_ce": "SoundClassifier", "patchmix_ce": "PatchMixCE", "patchmix_cl": "PatchMixCL"}
PUBLISHED = {
    "ast_ce": ["77.14", "41.97", "59.55"],
    "patchmix_ce": ["no gain over fine-tuning"],
    "patchmix_cl": ["81.66 ± 3.83", "43.07 ± 2.80", "62.37 ± 0.61", "68.71", "60.19"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_card_of_the_paper(name: str) -> None:
    key, corrected = name.removeprefix("bae2023_").removesuffix("_corrected"), name.endswith("_corrected")
    found = read(name)
    assert found["model"]["class_path"] == f"respiro.methods.{CLASSES[key]}"
    settings = {
        part: value.get("init_args") if isinstance(value, dict) else value
        for part, value in found["model"]["init_args"].items()
    }
    settings["lr"], settings["weight_decay"], settings["lr_floor"] = (
        float(settings[part]) for part in ("lr", "weight_decay", "lr_floor")
    )
    assert settings.pop("features") is None  # KaldiFbank's defaults are the paper's
    data = found["data"]["init_args"]
    assert data.pop("drop_last") is (name != "bae2023_ast_ce_corrected")
    assert data.pop("num_workers") == 4
    whole = {"seed_everything": found["seed_everything"], "weights": found["weights"], "trainer": found["trainer"]}
    assert whole | settings | {"data": data} == common(corrected) | OWN[key]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_was_published(name: str) -> None:
    whole = (Path(respiro.__file__).parent / "recipes" / f"{name}.yaml").read_text()
    text = whole.split("seed_everything")[0].replace("# ", "").replace("\n", " ")
    for number in PUBLISHED[name.removeprefix("bae2023_").removesuffix("_corrected")]:
        assert number in text
    assert "TEST SET" in text
    assert f"respiro fit --config {name} " in text
