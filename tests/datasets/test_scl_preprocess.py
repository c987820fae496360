"""ICBHI as the released code of Moummad and Farrugia reads it: from files on disk to the waveform of a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile

from respiro.datasets import ICBHI

STEMS = ("101_1b1_Al_sc_Meditron", "102_1b1_Ar_sc_Litt3200", "103_2b2_Tc_mc_LittC2SE")
NUMBERS = [pytest.param(number, id=name) for number, name in enumerate(("44k", "4k-stereo-cut", "16k"))]
pytestmark = pytest.mark.filterwarnings("ignore:1 of 3 recordings have several channels, which are averaged")


class Copy(NamedTuple):
    """A copy of ICBHI that holds the recordings of the reference vectors."""

    root: Path
    expected: Any

    def sample(self, number: int, pad: Any) -> dict[str, Any]:
        duration = float(self.expected[f"duration_{number}"])
        data = ICBHI(
            self.root,
            "train",
            duration=duration,
            pad=pad,
            fade="cycle",
            resample="cycle",
            any_encoding=True,  # one recording is stereo
            cache_dir=self.root / "cache",
        )
        return data[data.cycles["recording"].tolist().index(STEMS[number])]


@pytest.fixture(scope="module")
def files(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Copy:
    expected, root = np.load(shared("golden/scl") / "preprocess.npz"), tmp_path_factory.mktemp("icbhi")
    for number, stem in enumerate(STEMS):
        soundfile.write(root / f"{stem}.wav", expected[f"raw_{number}"], int(expected[f"sr_{number}"]))
        columns = [expected[f"{name}_{number}"].item() for name in ("onset", "offset", "crackles", "wheezes")]
        (root / f"{stem}.txt").write_text("\t".join(map(str, columns)) + "\n")
    (root / "ICBHI_challenge_train_test.txt").write_text("".join(f"{stem}\ttrain\n" for stem in STEMS))
    patients = [stem[:3] for stem in STEMS]
    demographics = "".join(f"{patient}\t60\tF\t25\tNA\tNA\n" for patient in patients)
    (root / "ICBHI_Challenge_demographic_information.txt").write_text(demographics)
    (root / "ICBHI_Challenge_diagnosis.txt").write_text("".join(f"{patient}\tHealthy\n" for patient in patients))
    return Copy(root, expected)


@pytest.mark.parametrize("number", NUMBERS)
def test_repeated_cycles_are_the_reference_waveforms(files: Copy, number: int) -> None:
    """The times were chosen so that rounding instead of truncating would give other samples."""
    sample = files.sample(number, "repeat")
    np.testing.assert_allclose(sample["waveform"], files.expected[f"circular_{number}"], rtol=0, atol=2e-6)
    assert sample["label"] == files.expected[f"label_{number}"]
    assert sample["length"] == min(files.expected[f"cycle_samples_{number}"], len(sample["waveform"]))


@pytest.mark.parametrize("number", [NUMBERS[0], NUMBERS[2]])
def test_padded_cycles_are_the_reference_waveforms(files: Copy, number: int) -> None:
    sample = files.sample(number, "zero")
    np.testing.assert_allclose(sample["waveform"], files.expected[f"zero_{number}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("pad", ["repeat", "zero"])
def test_a_cycle_that_is_cut_gets_no_new_fade(files: Copy, pad: str) -> None:
    waveform = files.sample(1, pad)["waveform"]
    np.testing.assert_allclose(waveform, files.expected["circular_1"], rtol=0, atol=2e-6)
    assert waveform[-1000:].abs().max() > 0.5 * waveform.abs().max()
