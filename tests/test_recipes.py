"""Every recipe is the card of its paper, and trains, from its name to a checkpoint, on a small synthetic data set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import respiro
from respiro.cli import main
from respiro.models import Weights

FOLDER = Path(respiro.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# What the header of every row must name, among it the published numbers.
PUBLISHED = {
    "bae2023_ast_ce": ["77.14", "41.97", "59.55"],
    "bae2023_patchmix_ce": ["no gain over fine-tuning"],
    "bae2023_patchmix_cl": ["81.66 ± 3.83", "43.07 ± 2.80", "62.37 ± 0.61", "68.71", "60.19"],
    "moummad2022_ce_scratch": ["table 1", "from scratch", "76.72 ± 3.97", "31.12 ± 3.72", "53.92 ± 0.71"],
    "moummad2022_scl_scratch": ["table 1", "from scratch", "76.17 ± 3.84", "27.97 ± 3.92", "52.08 ± 1.06"],
    "moummad2022_hybrid_scratch": ["table 1", "from scratch", "75.35 ± 5.47", "33.84 ± 5.67", "54.74 ± 0.50"],
    "moummad2022_ce": ["table 1", "from AudioSet", "70.09 ± 3.08", "40.39 ± 2.97", "55.24 ± 0.43"],
    "moummad2022_scl": ["table 1", "from AudioSet", "75.95 ± 2.31", "39.15 ± 1.89", "57.55 ± 0.81"],
    "moummad2022_hybrid": ["table 1", "from AudioSet", "70.47 ± 2.07", "43.29 ± 1.83", "56.89 ± 0.55"],
    "moummad2022_simclr": ["table 2", "not known", "59.75 ± 5.81", "36.93 ± 5.71", "48.34 ± 0.87"],
    "moummad2022_scl_sex_age": ["table 2", "223", "71.25 ± 2.79", "39.32 ± 3.35", "55.29 ± 0.80"],
    "moummad2022_scl_age_class": ["table 2", "223", "70.84 ± 3.19", "40.47 ± 3.84", "55.65 ± 1.27"],
    "moummad2022_scl_sex_class": ["table 2", "223", "71.00 ± 4.52", "39.72 ± 3.13", "55.36 ± 1.00"],
    "moummad2022_scl_sex_age_class": ["table 2", "223", "71.56 ± 4.03", "40.06 ± 3.09", "55.81 ± 0.88"],
    "moummad2022_mscl": ["table 2", "223", "76.93 ± 2.99", "39.15 ± 2.84", "58.04 ± 0.94"],
}

# No code was released, so there is nothing to correct: each row has one recipe.
MARGINS = ("arcface", "cosface", "adaface", "ldam", "logit_adjusted")
COMBINATIONS = ("concat", "mean", "learned", "gated", "product", "gammatone", "cwt")
RECONSTRUCTED = {
    "ngo2023_1-1": ["task 1-1", "9.7 points above the challenge baseline"],
    "ngo2023_1-2": ["task 1-2", "15.8 points above the challenge baseline"],
    "ngo2023_2-1": ["task 2-1", "73.7 (first version), 74.5 (second)"],
    "ngo2023_2-2": ["task 2-2", "47.2 (first version), 53.9 (second)"],
    "kim2026_ce": ["59.55 ± 1.92"],
    "kim2026_fixed": ["59.72 ± 0.89"],
    "kim2026_quality": ["60.47 ± 0.96"],
    "kim2026_imbalance": ["60.56 ± 0.83"],
    "kim2026_qlung": ["81.90 ± 5.38", "42.12 ± 3.94", "62.01 ± 1.18"],
    "kim2026_qlung_sprsound": ["82.48 ± 8.35", "33.99 ± 8.21", "58.23 ± 3.83"],
    **{f"kim2026_{row}": ["no row of this kind"] for row in ("cosine", *MARGINS)},
    **{f"ngo2023_{task}_{row}": ["no row of this kind"] for task in ("1-2", "2-2") for row in COMBINATIONS},
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return content


def parsed(name: str) -> tuple[str, str, bool]:
    """Return the paper, the row, and whether the recipe is the corrected one."""
    paper, _, row = name.removesuffix("_corrected").partition("_")
    return paper, row, name.endswith("_corrected")


def part(class_path: str, **arguments: Any) -> dict[str, Any]:
    """Return a part as a config names it."""
    return {"class_path": f"respiro.{class_path}", **({"init_args": arguments} if arguments else {})}


def bae2023(row: str, corrected: bool) -> dict[str, Any]:
    """Hyper-parameter card of the scripts of Bae et al."""
    mix = {"patch_mix": part("transforms.PatchMix", mode="patch", beta=1.0)}
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "ast_ce": (
            "SoundClassifier",
            {
                "loss": part("losses.CrossEntropy", weight="balanced"),
                "head": part("models.LinearHead", in_features=768, num_classes=4, layer_norm=True),
            },
        ),
        "patchmix_ce": ("PatchMixCE", mix),
        "patchmix_cl": (
            "PatchMixCL",
            mix
            | {
                "contrastive": part("losses.PatchMixContrastiveLoss", temperature=0.06, negatives="all"),
                "target": "grad_block",
                "contrastive_weight": 1.0,
            },
        ),
    }
    method, own = rows[row]
    position = "correct" if corrected else "reference"
    return {
        "seed_everything": 1,
        "weights": "AST_AUDIOSET",
        "trainer": {"max_epochs": 50, "precision": "bf16-mixed" if corrected else "16-mixed"},
        "model": part(
            f"methods.{method}",
            backbone=part("models.AST", size="base384", num_mel_bins=128, frames=798, pos_embed_mode=position),
            features=part("transforms.KaldiFbank"),  # whose defaults are the paper's
            augment=part("transforms.SpecAugment", policy="icbhi_ast_sup", **({} if corrected else {"gate": "normal"})),
            optimizer="adam",
            lr=5e-5 if corrected else 2.5e-5,  # the released moving average of 0.5 halves every step
            weight_decay=1e-6,
            schedule="cosine" if corrected else "epoch-cosine",
            lr_floor=1e-3,
            **own,
        ),
        "data": part(
            "datamodules.ICBHIDataModule",
            root="data/icbhi",
            protocol="official",
            labels="4-class",
            select_on="val" if corrected else "test",
            duration=8.0,
            pad="repeat",
            fade="recording",
            batch_size=8,
            drop_last=row != "ast_ce" or not corrected,
            num_workers=4,
        ),
    }


# Each slip of the released code of Moummad and Farrugia is one option: as released, and put right.
ORIENTATION = ("freq_first", "time_first")
NORMALIZE = ("batch_minmax", "clip_minmax")
GATE: tuple[dict[str, Any], dict[str, Any]] = ({"gate": "normal-batch", "to_end": False}, {"gate": "uniform"})
SCHEDULE = ("cosine-40", "cosine")
PROBE = ("adam", "logistic")
CHECK_EVERY = (400, 10)  # epochs; the released probe takes the encoder of the last
SELECT_ON = ("test", "val")
PRECISION = ("32-true", "bf16-mixed")

#: Columns of the metadata label of each row that has one.
COLUMNS = {
    "scl_sex_age": ["sex", "age_group"],
    "scl_age_class": ["age_group", "class"],
    "scl_sex_class": ["sex", "class"],
    "scl_sex_age_class": ["sex", "age_group", "class"],
    "mscl": ["sex", "age_group"],
}


def moummad2022(row: str, corrected: bool) -> dict[str, Any]:
    """Hyper-parameter card of the released code of Moummad and Farrugia."""
    method, scratch = row.split("_")[0], row.endswith("_scratch")
    label = "sex_age" if method == "mscl" else row.removeprefix("scl_") if row in COLUMNS else "label"
    metadata = {"metadata": {label: COLUMNS[row]}} if row in COLUMNS else {}
    head = {"head": part("models.LinearHead", in_features=512, num_classes=4)}
    to_128 = part("models.Projector", in_features=512, out_features=128, batch_norm=False)
    views = {"projector": to_128, "view_forward": "separate"}
    probe = {"probe": PROBE[corrected]}
    contrast: dict[str, Any] = {"temperature": 0.06, "denominator": "all"}
    balance: dict[str, Any] = {"ce_weight": 0.5, "supcon_weight": 0.5, "weight": "balanced"}
    weights = {"class": 0.75, "sex_age": 0.25}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "ce": ("SoundClassifier", head | {"loss": part("losses.CrossEntropy", weight="balanced")}),
        "hybrid": ("HybridSCL", head | views | {"loss": part("losses.HybridSupConLoss", **balance, **contrast)}),
        "simclr": ("SimCLR", views | probe | {"loss": part("losses.NTXentLoss", temperature=0.06)}),
        "scl": ("SCL", views | probe | {"loss": part("losses.SupConLoss", **contrast), "label_key": label}),
        "mscl": (
            "MSCL",
            probe
            | {
                "projectors": {"class": to_128, "sex_age": to_128},
                "loss": part("losses.MultiSupConLoss", weights=weights, **contrast),
                "label_keys": {"class": "label", "sex_age": "sex_age"},
                "view_forward": "separate",
            },
        ),
    }
    name, own = methods[method]
    lr = 1e-3 if scratch else 1e-4
    return {
        "seed_everything": 0,
        **({} if scratch else {"weights": "PANNS_CNN6"}),
        "trainer": {
            "max_epochs": 400,
            "precision": PRECISION[corrected],
            **({"check_val_every_n_epoch": CHECK_EVERY[corrected]} if "probe" in own else {}),
        },
        "model": part(
            f"methods.{name}",
            backbone=part("models.CNN6", orientation=ORIENTATION[corrected], bn0=False),
            features=part("transforms.LogMelSpectrogram", normalize=NORMALIZE[corrected]),
            augment=part(
                "transforms.SpecAugment",
                policy="icbhi_sup",
                time_width=40,
                fill=pytest.approx(-0.3690 / 0.0255, rel=1e-12),  # 0, standardised
                **GATE[corrected],
            ),
            optimizer="adam",
            lr=lr,
            weight_decay=1e-4,
            schedule=SCHEDULE[corrected],
            lr_floor=pytest.approx(1e-6 / lr),
            **own,
        ),
        "data": part(
            "datamodules.ICBHIDataModule",
            root="data/icbhi",
            protocol="official",
            labels="4-class",
            select_on=SELECT_ON[corrected],
            duration=8.0,
            pad="repeat",
            fade="cycle",
            resample="cycle",
            **metadata,
            batch_size=128,
            drop_last=False,
            num_workers=4,
        ),
    }


def ngo2023(row: str, corrected: bool) -> dict[str, Any]:
    """Card of the reconstruction of the system of Ngo, Pham et al."""
    assert not corrected
    task, _, combination = row.partition("_")
    classes = {"1-1": 2, "1-2": 7, "2-1": 3, "2-2": 5}[task]
    band = {"sample_rate": 8000, "f_min": 50.0, "hop_length": 208}
    gammatone = part("transforms.GammatoneSpectrogram", num_bands=124, f_max=3900.0, **band)
    wavelet = part("transforms.MorletScalogram", num_scales=124, f_max=2000.0, **band)
    branch = part(
        "models.InceptionResidual",
        widths=[64, 128, 256, 512],
        num_features=512,
        num_heads=8,
        dropout=[0.1, 0.15, 0.2, 0.25],
        embedding_dropout=0.3,
    )
    single = {"gammatone": gammatone, "cwt": wavelet}.get(combination)
    fusion = part(
        "models.SpectrogramFusion",
        branches=[branch, branch],
        bins=[124, 124],
        combination=combination or "linear",
        num_features=512,
    )
    return {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 100,
            "precision": "bf16-mixed",
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                    "init_args": {"monitor": "val_score", "mode": "max", "patience": 20},
                }
            ],
        },
        "model": part(
            "methods.InceptionFusion",
            backbone=branch if single else fusion,
            features=single or part("transforms.StackedFeatures", features=[gammatone, wavelet]),
            augment=part(
                "transforms.SpecAugment",
                policy="icbhi_sup",
                freq_masks=2 if single else 4,
                freq_width=17,  # up to 16 and 24: the bounds are never drawn
                time_masks=2,
                time_width=25,
                roll=True,
            ),
            mix=part("transforms.Mixup", beta=0.4, per_sample=True, p=0.5),
            loss=part(
                "losses.MultiObjectiveLoss",
                classification=part("losses.MixedCrossEntropy"),
                center=part(
                    "losses.CenterLoss",
                    num_classes=classes,
                    num_features=1024 if combination in ("mean", "product") else 512,
                    rate=0.5,
                ),
                triplet=part("losses.TripletLoss", margin=0.3, mining="hard"),
                center_weight=0.005,
                triplet_weight=0.1,
                auxiliary_weight=0.3,
            ),
            optimizer="adamw",
            lr=1e-3,
            weight_decay=1e-4,
            schedule="cosine",
        ),
        "data": part(
            "datamodules.SPRSoundDataModule",
            root="data/sprsound",
            task=task,
            test_side="both",
            select_on="val",
            sample_rate=8000,
            duration=4.0 if task.startswith("1") else 15.36,
            pad="repeat",
            fade="none",
            batch_size=32,
            samples_per_class=4,
            feature_cache=True,
            num_workers=4,
        ),
    }


def kim2026(row: str, corrected: bool) -> dict[str, Any]:
    """Card of the reconstruction of QLung, of its ablation, and of the margins it is compared with."""
    assert not corrected
    linear = part("models.LinearHead", in_features=768, num_classes=4, layer_norm=True)
    ce = {"loss": part("losses.CrossEntropy")}
    both = {"ce_weight": 1.0, "margin_weight": 0.4}
    quality = {
        "quality": part("transforms.AudioQuality", sample_rate=16000, entropy="frame-mean", rms="train-percentile")
    }

    def cosine(scale: float) -> dict[str, Any]:
        return {"head": part("models.CosineHead", in_features=768, num_classes=4, scale=scale)}

    def dfam(gamma: float) -> dict[str, Any]:
        settings = {"kappa": 0.5, "gamma": gamma, "target_margin": 0.2, "scale": 15.0}
        return ce | both | quality | {"margin": part("losses.DualFactorAngularMarginLoss", **settings)}

    def alone(name: str, scale: float, **settings: Any) -> tuple[str, dict[str, Any]]:
        margin = {"margin": part(f"losses.{name}", scale=scale, **settings)}
        return "QLung", cosine(scale) | margin | {"ce_weight": 0.0, "margin_weight": 1.0}

    fixed = part("losses.ArcFaceLoss", scale=15.0, margin=0.2, beyond="clip")
    whole = ("QLung", cosine(37.0) | dfam(0.5))
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "ce": ("SoundClassifier", {"head": linear} | ce),
        "fixed": ("QLung", {"head": linear, "margin": fixed} | ce | both),
        "quality": ("QLung", {"head": linear} | dfam(1.0)),
        "imbalance": ("QLung", {"head": linear} | dfam(0.5)),
        "qlung": whole,
        "qlung_sprsound": whole,
        "cosine": ("SoundClassifier", cosine(37.0) | ce),
        "arcface": alone("ArcFaceLoss", 30.0, margin=0.2),
        "cosface": alone("CosFaceLoss", 30.0, margin=0.4),
        "adaface": alone("AdaFaceLoss", 64.0, margin=0.4, h=0.333, momentum=0.01),
        "ldam": alone("LDAMLoss", 30.0, max_margin=0.5),
        "logit_adjusted": (
            "SoundClassifier",
            {"head": linear, "loss": part("losses.LogitAdjustedCrossEntropy", tau=1.0)},
        ),
    }
    method, own = rows[row]
    reading = {"duration": 8.0, "pad": "repeat", "fade": "recording"}
    loading = {"select_on": "val", "batch_size": 8, "num_workers": 4}
    icbhi = part("datamodules.ICBHIDataModule", root="data/icbhi", protocol="official", labels="4-class", **reading)
    icbhi["init_args"] |= loading
    train = part("datamodules.ICBHIDataModule", root="data/icbhi")
    inter = part("datamodules.SPRSoundDataModule", root="data/sprsound", test_side="inter")
    cross = part("datamodules.CrossDatasetDataModule", train=train, test=[inter], label_map="qlung", **reading)
    cross["init_args"] |= loading
    return {
        "seed_everything": 0,
        "weights": "AST_AUDIOSET",
        "trainer": {"max_epochs": 50, "precision": "bf16-mixed"},
        "model": part(
            f"methods.{method}",
            backbone=part("models.AST", size="base384", num_mel_bins=128, frames=798),
            features=part("transforms.KaldiFbank"),
            augment=part("transforms.SpecAugment", policy="icbhi_ast_sup"),
            optimizer="adam",
            lr=5e-5,
            weight_decay=1e-6,
            schedule="cosine",
            lr_floor=1e-3,
            **own,
        ),
        "data": cross if row == "qlung_sprsound" else icbhi,
    }


CARDS = {"bae2023": bae2023, "kim2026": kim2026, "moummad2022": moummad2022, "ngo2023": ngo2023}


def smaller(name: str) -> list[str]:
    """Return the options that make the recipe small enough for clips of one second on a CPU."""
    option = "--model.init_args.{}.init_args.{}".format
    if name.startswith("ngo2023"):
        return [option("augment", "time_width"), "10", "--data.samples_per_class", "1", "--data.partial", "true"]
    if name.startswith("moummad2022"):
        return [option("augment", "time_width"), "10", "--trainer.check_val_every_n_epoch", "1"]
    found = [option("backbone", "size"), "tiny224", option("backbone", "frames"), "98"]
    found += [option("augment", "time_width"), "60"]
    with_head = "head" in read(name)["model"]["init_args"]
    return found + ([option("head", "in_features"), "192"] if with_head else [])


def test_every_row_has_both_recipes() -> None:
    assert sorted([*PUBLISHED, *(f"{row}_corrected" for row in PUBLISHED), *RECONSTRUCTED]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(
    name: str, icbhi_root: Path, sprsound_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "test" in read(name)["data"]["init_args"]:
        tested = {"root": os.fspath(sprsound_root), "test_side": "inter", "partial": True}
        roots = ["--data.train.init_args.root", os.fspath(icbhi_root)]
        roots += ["--data.test", json.dumps([part("datamodules.SPRSoundDataModule", **tested)])]
    else:
        roots = ["--data.root", os.fspath(sprsound_root if name.startswith("ngo2023") else icbhi_root)]
    # Half precision needs a GPU, and the published weights a network.
    machine = ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--weights", "null"]
    data = [*roots, "--data.duration", "1.0"]
    data += ["--data.batch_size", "2", "--data.num_workers", "0"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    light = ["--checkpoint.save_weights_only", "true", "--checkpoint.save_last", "link"]
    main(["fit", "--config", name, *smaller(name), *machine, *data, *limits, *quiet, *light])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["respiro"]["class_path"] == read(name)["model"]["class_path"]
    assert kept["respiro"]["history"][-1]["select_on"] == read(name)["data"]["init_args"]["select_on"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_card_of_the_paper(name: str) -> None:
    paper, row, corrected = parsed(name)
    assert read(name) == CARDS[paper](row, corrected)


@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_of_a_recipe_are_published_ones(name: str) -> None:
    assert read(name).get("weights", "AST_AUDIOSET") in Weights.__members__


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_was_published(name: str) -> None:
    whole = (FOLDER / f"{name}.yaml").read_text()
    text = whole.split("seed_everything")[0].replace("# ", "").replace("\n", " ")
    for number in (PUBLISHED | RECONSTRUCTED)[name.removesuffix("_corrected")]:
        assert number in text
    assert ("A RECONSTRUCTION" if name in RECONSTRUCTED else "TEST SET") in text
    assert f"respiro fit --config {name} " in text
