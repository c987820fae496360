"""The command line, as a user would use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from respiro.cli import COMMANDS, main

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
    assert "fit" in capsys.readouterr().err


def test_python_m_respiro() -> None:
    done = subprocess.run([sys.executable, "-m", "respiro", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("respiro ")


def test_test_needs_only_the_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("test", checkpoint, *QUIET.split())
    assert "official" in capsys.readouterr().out
    report = checkpoint.parent / "report_test"
    result = json.loads((report / "result.json").read_text())
    assert result["protocol"]["select_on"] == "val"
    assert 0 <= result["metrics"]["score"] <= 1
    assert len(pd.read_csv(report / "predictions.csv")) > 10
    assert len(list(report.glob("*.png"))) == 3


def test_validate_and_another_root(checkpoint: Path, icbhi_root: Path, tmp_path: Path) -> None:
    run("validate", checkpoint, "--output", tmp_path / "out", "--data.root", icbhi_root, *QUIET.split())
    assert (tmp_path / "out" / "result.json").exists()


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "icbhi", "nowhere"), "DatasetNotFoundError"),
        (("test", "nowhere.ckpt"), "CheckpointError: no checkpoint"),
        (("predict", "nowhere.ckpt", "sound.wav"), "CheckpointError: no checkpoint"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_errors_are_one_clear_message(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
