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
    assert kept["hyper_parameters"]["lr"] == float(read(name)["model"]["init_args"]["lr"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_was_published(name: str) -> None:
    whole = (Path(respiro.__file__).parent / "recipes" / f"{name}.yaml").read_text()
    text = " ".join(whole.split("seed_everything")[0].split())
    assert "# Published: " in text
    assert "TEST SET" in text
    assert f"respiro fit --config {name} " in text


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("_corrected")])
def test_a_recipe_has_a_corrected_twin(name: str) -> None:
    """They differ in the slips alone."""
    released, corrected = read(name), read(f"{name}_corrected")
    models = released["model"]["init_args"], corrected["model"]["init_args"]
    assert [model["backbone"]["init_args"]["pos_embed_mode"] for model in models] == ["reference", "correct"]
    for model in models:
        del model["backbone"]["init_args"]["pos_embed_mode"], model["lr"], model["schedule"]
        model["augment"]["init_args"].pop("reference_gate", None)
    assert models[0] == models[1]
    assert released["data"]["init_args"]["select_on"] == "test"
