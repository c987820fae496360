"""The command line, as a user would use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from respiro.cli import COMMANDS, main
from respiro.datamodules import ICBHIDataModule
from respiro.methods._checkpoint import read_checkpoint
from respiro.models import AST
from respiro.splits import audit_leakage

QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false"


def run(*args: object) -> None:
    main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def checkpoint(icbhi_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short ``respiro fit`` leaves."""
    folder = tmp_path_factory.mktemp("fit")
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1 --data.batch_size 8"
    trainer = f"--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.default_root_dir {folder} {QUIET}"
    run("fit", *data.split(), *trainer.split())
    return next(folder.rglob("last.ckpt"))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    assert command in capsys.readouterr().out


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("fitt")
    assert stopped.value.code == 2
    assert "'audit'" in capsys.readouterr().err


def test_python_m_respiro() -> None:
    done = subprocess.run([sys.executable, "-m", "respiro", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("respiro ")


def test_fit_goes_on_from_a_checkpoint(checkpoint: Path, icbhi_root: Path, tmp_path: Path) -> None:
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1 --data.batch_size 8"
    trainer = f"--trainer.max_epochs 2 --trainer.limit_train_batches 2 --trainer.default_root_dir {tmp_path} {QUIET}"
    run("fit", "--ckpt_path", checkpoint, *data.split(), *trainer.split())
    resumed = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert (resumed["epoch"], resumed["global_step"]) == (1, 4)


def test_test_needs_only_the_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("test", checkpoint, "--device", "cpu")
    assert "official" in capsys.readouterr().out
    report = checkpoint.parent / "report_test"
    result = json.loads((report / "result.json").read_text())
    assert result["protocol"]["select_on"] == "val"
    assert 0 <= result["metrics"]["score"] <= 1
    assert len(pd.read_csv(report / "predictions.csv")) > 10
    assert len(list(report.glob("*.png"))) == 3


def test_validate_and_another_root(checkpoint: Path, icbhi_root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(icbhi_root, tmp_path / "copy")
    for path in copy.rglob("*_A*_*"):
        path.unlink()
    root = ["--data.root", copy, "--data.partial", "true"]
    run("validate", checkpoint, "--output", tmp_path / "out", "--device", "cpu", *root)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["protocol"]["partial"] is True
    assert "PARTIAL" in result["stamps"]


def test_selecting_on_test_is_stamped(icbhi_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1 --data.select_on test"
    trainer = f"--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.default_root_dir {tmp_path} {QUIET}"
    run("fit", *data.split(), *trainer.split())
    assert "TEST-SELECTED" in capsys.readouterr().out
    run("test", next(tmp_path.rglob("last.ckpt")), "--output", tmp_path / "out", "--data.select_on", "val")
    assert "TEST-SELECTED" in capsys.readouterr().out
    assert "TEST-SELECTED" in json.loads((tmp_path / "out" / "result.json").read_text())["stamps"]


def test_fit_without_a_validation_side(icbhi_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1 --data.val_fraction 0"
    trainer = f"--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.default_root_dir {tmp_path} {QUIET}"
    run("fit", *data.split(), *trainer.split())
    assert "last: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for the smallest AST on one second of sound."""
    path = tmp_path_factory.mktemp("weights") / "ast.pth"
    torch.save(AST("tiny224", frames=98, stride=16).state_dict(), path)
    return path


@pytest.fixture
def ast_config(icbhi_root: Path, tmp_path: Path) -> Path:
    """A config that trains that AST for one step which hardly changes it."""
    ast = {"class_path": "AST", "init_args": {"size": "tiny224", "frames": 98, "stride": 16}}
    model = {"backbone": ast, "features": {"class_path": "KaldiFbank"}, "lr": 1e-9}
    data = {"root": str(icbhi_root), "duration": 1.0, "batch_size": 4}
    config = {
        "model": {"class_path": "SoundClassifier", "init_args": model},
        "data": {"class_path": "ICBHIDataModule", "init_args": data},
        "trainer": {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "accelerator": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("place", ["option", "config"])
def test_fit_begins_with_pretrained_weights(
    place: str, ast_config: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == "config":
        ast_config.write_text(f"weights: {weights}\n{ast_config.read_text()}")
    option = ["--weights", weights] if place == "option" else []
    run("fit", "--config", ast_config, *option, "--trainer.default_root_dir", tmp_path)
    assert f"{weights}: 151 tensors loaded" in capsys.readouterr().out
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    trained = {name: t for name, t in read_checkpoint(checkpoint)["state_dict"].items() if "backbone" in name}
    for name, tensor in torch.load(weights, weights_only=True).items():
        torch.testing.assert_close(trained[f"backbone.{name}"], tensor, rtol=0, atol=1e-6)
    run(
        "fit", "--config", ast_config, *option, "--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path / "on"
    )
    text = capsys.readouterr().out
    assert "tensors loaded" not in text
    assert f"weights {weights} not loaded: the training goes on from {checkpoint}" in text


def test_fit_refuses_weights_of_another_model(
    icbhi_root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --trainer.default_root_dir {tmp_path}"
    with pytest.raises(SystemExit):
        run(
            "fit",
            "--weights",
            weights,
            *data.split(),
            "--model.backbone",
            "TimmBackbone",
            "--model.backbone.name",
            "resnet10t",
        )
    assert "WeightsError: TimmBackbone takes no published weights" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--config {}", "--config={}", "-c {}"], ids=["space", "equals", "short"])
def test_fit_takes_a_recipe_by_its_name(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run("fit", *option.format("bae2023_ast_ce").split(), "--print_config")
    assert stopped.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["weights"] == "AST_AUDIOSET"
    (tmp_path / "bae2023_ast_ce").write_text("weights: mine\n")
    with pytest.raises(SystemExit):
        run("fit", *option.format("bae2023_ast_ce").split(), "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["weights"] == "mine"


def test_a_whole_number_of_batches_is_a_number_of_batches(icbhi_root: Path, tmp_path: Path) -> None:
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1 --data.batch_size 8"
    limits = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 0.5"
    run("fit", *data.split(), *limits.split(), "--trainer.default_root_dir", tmp_path, *QUIET.split())
    config = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())["trainer"]
    assert (config["limit_train_batches"], config["limit_val_batches"]) == (1, 0.5)
    assert read_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] == 1


def test_fit_does_not_go_on_from_what_is_no_checkpoint(
    icbhi_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--data", "ICBHIDataModule", "--data.root", icbhi_root, "--ckpt_path", tmp_path / "other.ckpt")
    assert stopped.value.code == 2
    assert "was not written by a respiro method" in capsys.readouterr().err


def test_a_recipe_takes_a_fast_look(icbhi_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning sets max_steps itself then, which a schedule by epochs must bear."""
    monkeypatch.chdir(tmp_path)
    model = "--model.init_args.backbone.init_args.size tiny224 --model.init_args.backbone.init_args.frames 98"
    more = "--model.init_args.augment.init_args.time_width 60 --data.duration 1 --data.num_workers 0 --weights null"
    look = "--trainer.fast_dev_run true --trainer.precision 32-true"
    data = ["--data.root", icbhi_root]
    run("fit", "--config", "bae2023_patchmix_ce", *data, *model.split(), *more.split(), *look.split(), *QUIET.split())


def test_fit_on_sprsound(sprsound_root: Path, tmp_path: Path) -> None:
    data = (
        f"--data SPRSoundDataModule --data.root {sprsound_root} --data.task 2-1 --data.duration 1 --data.partial true"
    )
    trainer = f"--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.default_root_dir {tmp_path} {QUIET}"
    run("fit", *data.split(), *trainer.split())
    run("test", next(tmp_path.rglob("last.ckpt")), "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["classes"] == ["normal", "poor quality", "adventitious"]
    assert {"average_score", "harmonic_score"} <= set(result["metrics"])


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("demo", "--output", tmp_path, "--epochs", 1)
    assert "Synthetic sounds" in capsys.readouterr().out
    assert (tmp_path / "report" / "confusion.png").exists()


def test_a_part_of_somebody_else_is_named(
    icbhi_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = "class Loss(Base):\n    def forward(self, logits, labels):\n        return logits.mean()\n"
    (tmp_path / "mylab.py").write_text(f"from respiro.component import Loss as Base\n{loss}")
    monkeypatch.syspath_prepend(tmp_path)
    data = f"--data ICBHIDataModule --data.root {icbhi_root} --data.duration 1 --model.loss mylab.Loss"
    trainer = f"--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.default_root_dir {tmp_path} {QUIET}"
    run("fit", *data.split(), *trainer.split())
    path, recording = next(tmp_path.rglob("last.ckpt")), next(icbhi_root.rglob("*.wav"))
    with pytest.raises(SystemExit):
        run("predict", path, recording)
    assert "'mylab.Loss', which respiro did not write" in capsys.readouterr().err
    run("predict", path, recording, "--part", "loss=mylab.Loss")
    run("test", path, "--output", tmp_path / "out", "--part.loss", "mylab.Loss")


def test_predict_writes_a_table(checkpoint: Path, icbhi_root: Path, tmp_path: Path) -> None:
    recording = next(icbhi_root.rglob("*.wav"))
    run("predict", checkpoint, recording, "--cycles", recording.with_suffix(".txt"), "--output", tmp_path / "p.csv")
    table = pd.read_csv(tmp_path / "p.csv")
    assert len(table) == len(recording.with_suffix(".txt").read_text().splitlines())
    assert list(table.columns[:4]) == ["file", "start", "end", "prediction"]


def test_data_prints_the_counts(icbhi_root: Path, sprsound_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("data", "sprsound", sprsound_root, "--partial", "--task", "2-2")
    text = capsys.readouterr().out
    assert "inter" in text
    assert "cas & das" in text
    assert "PARTIAL" in text


def test_audit_prints_what_is_shared(icbhi_root: Path, sprsound_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("audit", "icbhi", icbhi_root)
    assert "official: train against test" in capsys.readouterr().out
    run("audit", "sprsound", sprsound_root, "--partial")
    assert "train against intra" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["official-clean", "patient-fold-1", "random-recording"])
def test_audit_looks_at_the_split_that_fit_uses(
    icbhi_root: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ICBHIDataModule(icbhi_root, protocol=protocol)
    sides = data.data.cycles.loc[data.split.train], data.data.cycles.loc[data.split.test]
    run("audit", "icbhi", icbhi_root, "--protocol", protocol)
    assert str(audit_leakage(*sides, data.data.all_recordings)) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "icbhi", "nowhere"), "DatasetNotFoundError"),
        (("test", "nowhere.ckpt"), "CheckpointError: no checkpoint"),
        (("predict", "nowhere.ckpt", "sound.wav"), "CheckpointError: no checkpoint"),
        (("predict", "nowhere.ckpt", "sound.wav", "--cycles", "nowhere.txt"), "nowhere.txt"),
        (("test", "--device", "cpu", "nowhere.ckpt"), "the checkpoint comes first"),
        (("data", "icbhi", "nowhere", "--labels", "5-class"), "labels must be one of"),
        (("audit", "icbhi", "nowhere", "--protocol", "offical"), "protocol must be one of"),
        (("fit", "--config", "bae2032"), "config 'bae2032' is neither a file nor a recipe; recipes: bae2023_"),
    ],
)
def test_errors_are_one_clear_message(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("test", checkpoint, "--device", "cuda")
    assert "device 'cuda' is not there: torch finds no GPU; use --device cpu" in capsys.readouterr().err
