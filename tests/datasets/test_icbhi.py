from __future__ import annotations

import functools
import http.server
import math
import shutil
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from respiro.datasets._tables import mark_clean
from respiro.datasets.icbhi import CLASSES, ICBHI
from respiro.errors import (
    AnnotationError,
    AudioError,
    DatasetNotFoundError,
    DownloadError,
    MetadataError,
    PartialDatasetError,
    VerificationError,
)

FIRST = "101_1b1_Al_sc_Meditron"
RATE = 4000
SECONDS = 4.0
# 156 stands on both sides, 223 is unknown, 226 has two devices, as in the real database.
SIDES = {
    "101_1b1_Al_sc_Meditron": "test",
    "102_1b1_Ar_sc_Litt3200": "train",
    "156_2b3_Al_mc_AKGC417L": "train",
    "156_2b3_Ar_mc_AKGC417L": "test",
    "223_1b1_Tc_sc_Meditron": "test",
    "226_1b1_Ll_sc_LittC2SE": "train",
}
DEMOGRAPHICS = {
    "101": "3 F NA 19 99",
    "102": "0.75 F NA 9.8 73",
    "156": "80 M 27.5 NA NA",
    "223": "NA NA NA NA NA",
    "226": "4 M NA 16.7 103",
}
DIAGNOSIS = {"101": "URTI", "102": "Healthy", "156": "COPD", "223": "COPD", "226": "Pneumonia"}
CYCLES = "0.5\t1.25\t0\t0\n1.25\t2\t1\t0\n2\t3\t0\t1\n3\t3.7\t1\t1\n"
SIDE_NAMES = {
    "official": (
        "ICBHI_challenge_train_test.txt",
        "ICBHI_Challenge_demographic_information.txt",
        "ICBHI_Challenge_diagnosis.txt",
    ),
    "kaggle": ("ICBHI_challenge_train_test.txt", "demographic_info.txt", "patient_diagnosis.csv"),
    "patchmix": ("official_split.txt", "metadata.txt", "patient_diagnosis.txt"),
}


def write_sounds(folder: Path, stems: list[str] | None = None, suffix: str = ".wav") -> None:
    """Sines of 4 s, each of its own frequency, and annotations of four cycles."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, stem in enumerate(stems or list(SIDES)):
        wave = 0.5 * np.sin(2 * np.pi * (100 + 10 * number) * np.arange(int(SECONDS * RATE)) / RATE)
        soundfile.write(folder / f"{stem}{suffix}", wave, RATE, subtype="PCM_16")
        (folder / f"{stem}.txt").write_bytes(CYCLES.encode())


def split_text(sides: dict[str, str] = SIDES, end: str = "\r\n") -> str:
    return "".join(f"{stem}\t{side}{end}" for stem, side in sides.items())


def demographics_text(separator: str = "\t", end: str = "\r\n") -> str:
    return "".join(separator.join([patient, *text.split()]) + end for patient, text in DEMOGRAPHICS.items())


def diagnosis_text(separator: str = "\t", end: str = "\n") -> str:
    return "".join(f"{patient}{separator}{name}{end}" for patient, name in DIAGNOSIS.items())


def write_side_files(split: Path, demographics: Path, diagnosis: Path) -> None:
    for path, text in ((split, split_text()), (demographics, demographics_text()), (diagnosis, diagnosis_text())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def write_official(root: Path, stems: list[str] | None = None, suffix: str = ".wav") -> Path:
    write_sounds(root / "ICBHI_final_database", stems, suffix)
    write_side_files(*(root / name for name in SIDE_NAMES["official"]))
    return root


def layout_official(root: Path) -> Path:
    return write_official(root)


def layout_one_folder(root: Path) -> Path:
    write_sounds(root)
    write_side_files(*(root / name for name in SIDE_NAMES["official"]))
    return root


def layout_sound_folder(root: Path) -> Path:
    return write_official(root) / "ICBHI_final_database"


def layout_contained(root: Path) -> Path:
    write_official(root / "downloads" / "icbhi")
    return root


def layout_flac(root: Path) -> Path:
    return write_official(root, suffix=".flac")


def layout_capitals(root: Path) -> Path:
    write_sounds(root / "audio", suffix=".WAV")
    write_side_files(*(root / name.upper() for name in SIDE_NAMES["official"]))
    return root


def layout_kaggle(root: Path) -> Path:
    tree = root / "Respiratory_Sound_Database"
    write_sounds(tree / "audio_and_txt_files")
    split, demographics, diagnosis = SIDE_NAMES["kaggle"]
    write_side_files(root / split, root / demographics, tree / diagnosis)
    return root


def layout_kaggle_nested(root: Path) -> Path:
    layout_kaggle(root / "Respiratory_Sound_Database")
    return root


def layout_patchmix(root: Path) -> Path:
    folder = root / "icbhi_dataset"
    write_sounds(folder / "audio_test_data")
    write_side_files(*(folder / name for name in SIDE_NAMES["patchmix"]))
    (folder / "patient_list_foldwise.txt").write_text("101 0\n")
    return folder


def layout_linked(root: Path) -> Path:
    """The sound on another disk, and a link that leads in a circle."""
    write_sounds(root / "disk")
    data = root / "data"
    write_side_files(*(data / name for name in SIDE_NAMES["official"]))
    (data / "ICBHI_final_database").symlink_to(root / "disk", target_is_directory=True)
    (data / "again").symlink_to(data, target_is_directory=True)
    return data


LAYOUTS = [
    layout_official,
    layout_one_folder,
    layout_sound_folder,
    layout_contained,
    layout_flac,
    layout_capitals,
    layout_kaggle,
    layout_kaggle_nested,
    layout_patchmix,
    layout_linked,
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_official(tmp_path)


@pytest.fixture(autouse=True)
def _unexpected_warnings_fail() -> Iterator[None]:
    """Nothing is said without need: a test that expects a note asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*226_1b1_Pl_sc_LittC2SE")  # every real copy has it
        yield


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.removeprefix("layout_"))
def test_reads_every_layout(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    dataset = ICBHI(layout(tmp_path), split="all")
    assert dict(zip(dataset.recordings["recording"], dataset.recordings["split"], strict=True)) == SIDES
    assert not dataset.partial
    assert len(dataset.cycles) == 4 * len(SIDES)


def test_tables_have_what_the_files_say(root: Path) -> None:
    dataset = ICBHI(root, split="all")
    row = dataset.recordings.iloc[0]
    assert row[["patient", "take", "location", "mode", "device"]].tolist() == ["101", "101_1b1", "Al", "sc", "Meditron"]
    assert row[["sex", "age", "age_group", "weight", "height", "diagnosis"]].tolist() == [
        "F",
        3,
        "child",
        19,
        99,
        "URTI",
    ]
    assert math.isnan(row["bmi"])
    assert row[["sample_rate", "frames", "channels", "encoding"]].tolist() == [RATE, SECONDS * RATE, 1, "PCM_16"]
    cycles = dataset.cycles[dataset.cycles["recording"] == row["recording"]]
    expected = [(0.5, 1.25, 0, 0, 0), (1.25, 2, 1, 0, 1), (2, 3, 0, 1, 2), (3, 3.7, 1, 1, 3)]
    assert list(cycles[["start", "end", "crackle", "wheeze", "label"]].itertuples(index=False, name=None)) == expected
    assert cycles["cycle"].tolist() == [0, 1, 2, 3]
    assert isinstance(dataset.all_recordings.index, pd.RangeIndex)
    assert dataset.all_recordings["recording"].is_monotonic_increasing


def test_unknown_stays_unknown(root: Path) -> None:
    dataset = ICBHI(root, split="all")
    unknown = dataset.all_recordings.set_index("patient").loc["223"]
    assert unknown[["age", "sex", "age_group", "bmi", "weight", "height"]].isna().all()
    is_unknown = (dataset.cycles["patient"] == "223").to_numpy()
    assert (dataset.codes("sex")[is_unknown] == -1).all()
    assert (dataset.codes("age_group")[is_unknown] == -1).all()
    assert (dataset.codes("sex")[~is_unknown] >= 0).all()


def test_sample_of_a_batch(root: Path) -> None:
    dataset = ICBHI(root, split="test", duration=2.0)
    sample = dataset[1]
    assert sample["waveform"].shape == (32000,)
    assert sample["label"].item() == 1
    assert sample["length"].item() == 12000  # 0.75 s


def test_official_split_file_completes_the_kaggle_copy(tmp_path: Path) -> None:
    layout_kaggle(tmp_path)
    (tmp_path / "ICBHI_challenge_train_test.txt").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"ICBHI_challenge_train_test\.txt.*Kaggle.*\n.*download=True"):
        ICBHI(tmp_path)


@pytest.mark.parametrize("kind", [1, 2], ids=["demographics", "diagnosis"])
def test_missing_side_file(root: Path, kind: int) -> None:
    name = SIDE_NAMES["official"][kind]
    (root / name).unlink()
    with pytest.raises(DatasetNotFoundError, match=rf"no \w+ file \({name}") as error:
        ICBHI(root)
    assert "bhichallenge" in str(error.value)


def test_missing_root_and_missing_recordings(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="is not a folder"):
        ICBHI(tmp_path / "nowhere")
    write_side_files(*(tmp_path / name for name in SIDE_NAMES["official"]))
    with pytest.raises(DatasetNotFoundError, match="no recordings"):
        ICBHI(tmp_path, partial=True)


# ---------------------------------------------------------------- recordings: twice, foreign, missing, alone


def test_recording_twice_with_the_same_bytes_is_used_once(tmp_path: Path) -> None:
    layout_kaggle(tmp_path)
    tree = tmp_path / "Respiratory_Sound_Database"
    shutil.copytree(tree, tmp_path / "respiratory_sound_database_2")
    with pytest.warns(UserWarning, match="more than once") as notes:
        dataset = ICBHI(tmp_path, split="all")
    assert len(notes) == 2  # recordings and annotations
    assert "6 files" in str(notes[0].message)
    assert len(dataset.recordings) == len(SIDES)
    assert dataset.recordings["path"].str.startswith(str(tree) + "/").all()


@pytest.mark.parametrize(
    ("name", "error"),
    [("101_1b1_Al_sc_Meditron.wav", AudioError), ("101_1b1_Al_sc_Meditron.txt", AnnotationError)],
    ids=["sound", "annotation"],
)
def test_recording_twice_with_different_bytes(root: Path, name: str, error: type[Exception]) -> None:
    first = root / "ICBHI_final_database" / name
    (root / "z").mkdir()
    (root / "z" / name).write_bytes(first.read_bytes() + b"\n")
    with pytest.raises(error, match=f"{first}.*different content"):
        ICBHI(root)


def test_wav_and_flac_of_one_recording(root: Path) -> None:
    write_sounds(root / "flac", ["101_1b1_Al_sc_Meditron"], ".flac")
    with pytest.raises(AudioError, match=r"Meditron\.wav and .*Meditron\.flac"):
        ICBHI(root)


@pytest.mark.parametrize("length", [4.0, 60.0], ids=["less-than-a-block", "more-than-a-block"])
def test_one_sound_under_two_names(root: Path, length: float) -> None:
    folder = root / "ICBHI_final_database"
    first, second = folder / f"{FIRST}.wav", folder / "156_2b3_Ar_mc_AKGC417L.wav"
    samples = np.random.default_rng(0).integers(-9999, 9999, int(length * RATE), dtype=np.int16)
    soundfile.write(first, samples, RATE, subtype="PCM_16")
    shutil.copy(first, second)
    with pytest.raises(AudioError, match=rf"{first.name} and .*{second.name} are two recordings.*remove both"):
        ICBHI(root)
    samples[3] += 1  # same size, same middle, another sound
    soundfile.write(second, samples, RATE, subtype="PCM_16")
    assert len(ICBHI(root, split="all").recordings) == len(SIDES)


def test_lock_files_do_not_disturb(root: Path) -> None:
    for path in [*root.glob("*.txt"), *(root / "ICBHI_final_database").iterdir(), root / ".respiro-unpack"]:
        path.with_name(f"{path.name}.lock").touch()
    write_sounds(root / ".respiro-unpack", ["199_1b1_Al_sc_Meditron"])
    assert len(ICBHI(root, split="all").recordings) == len(SIDES)


def test_partial_copy(root: Path) -> None:
    for suffix in (".wav", ".txt"):
        (root / "ICBHI_final_database" / f"156_2b3_Al_mc_AKGC417L{suffix}").unlink()
    message = r"5 of 6 recordings found under .*first missing: 156_2b3_Al_mc_AKGC417L.*partial=True"
    with pytest.raises(PartialDatasetError, match=message):
        ICBHI(root)
    dataset = ICBHI(root, split="all", partial=True)
    assert dataset.partial
    assert dataset.missing == ["156_2b3_Al_mc_AKGC417L"]
    assert dataset.vocabularies["patient"] == tuple(DEMOGRAPHICS)
    with pytest.raises(PartialDatasetError, match="cannot verify a partial copy: 1 of 6"):
        dataset.verify()


def test_complete_copy_is_not_partial(root: Path) -> None:
    assert not ICBHI(root, partial=True).partial


def test_recording_that_the_split_does_not_list(root: Path) -> None:
    write_sounds(root / "more", ["199_1b1_Al_sc_Meditron"])
    with pytest.raises(MetadataError, match=r"1 recordings .*train_test\.txt: 199_1b1_Al_sc_Meditron"):
        ICBHI(root, partial=True)


def test_other_sound_files_are_ignored_and_counted(root: Path) -> None:
    for name in ("cough.wav", "101_1b1_Xl_sc_Meditron.flac", "._101_1b1_Al_sc_Meditron.wav"):
        (root / name).write_bytes(b"not read")
    with pytest.warns(UserWarning, match="3 sound files .* are ignored"):
        dataset = ICBHI(root)
    assert [path.name for path in dataset.ignored] == sorted(path.name for path in dataset.ignored)
    assert len(dataset.ignored) == 3


def test_hidden_folders_are_not_searched(root: Path) -> None:
    write_sounds(root / ".unpack-1", ["101_1b1_Al_sc_Meditron", "199_1b1_Al_sc_Meditron"])
    assert len(ICBHI(root, split="all").recordings) == len(SIDES)


@pytest.mark.parametrize("suffix", [".wav", ".txt"], ids=["annotation-alone", "sound-alone"])
def test_sound_and_annotation_need_each_other(root: Path, suffix: str) -> None:
    stems = ["101_1b1_Al_sc_Meditron", "156_2b3_Ar_mc_AKGC417L"]
    for stem in stems:
        (root / "ICBHI_final_database" / f"{stem}{suffix}").unlink()
    with pytest.raises(AnnotationError, match=r"2 files .* stand alone") as error:
        ICBHI(root, partial=True)
    assert all(stem in str(error.value) for stem in stems)


def test_damaged_sound(root: Path) -> None:
    path = root / "ICBHI_final_database" / "102_1b1_Ar_sc_Litt3200.wav"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AudioError, match=path.name):
        ICBHI(root)


def test_stereo_needs_any_encoding(root: Path) -> None:
    path = root / "ICBHI_final_database" / "102_1b1_Ar_sc_Litt3200.wav"
    soundfile.write(path, np.zeros((int(SECONDS * RATE), 2)), RATE, subtype="PCM_16")
    with pytest.raises(AudioError, match="not mono"):
        ICBHI(root)
    assert ICBHI(root, any_encoding=True).recordings["channels"].max() == 2


# ---------------------------------------------------------------- names and devices


@pytest.mark.parametrize("differences", [True, False], ids=["with-list", "without-list"])
def test_old_names_are_read_under_the_new_one(root: Path, differences: bool) -> None:
    sides = {stem.replace("Litt3200", "Meditron").replace("AKGC417L", "Meditron"): side for stem, side in SIDES.items()}
    (root / SIDE_NAMES["official"][0]).write_text(split_text(sides))
    folder = root / "ICBHI_final_database"
    for suffix in (".wav", ".txt"):
        old = folder / f"102_1b1_Ar_sc_Litt3200{suffix}"
        old.rename(folder / f"102_1b1_Ar_sc_LittC2SE{suffix}")
    if differences:
        (root / "filename_differences.txt").write_text("'102_1b1_Ar_sc_LittC2SE'\n'156_2b3_Ar_mc_AKGC417L'\n")
    with pytest.warns(UserWarning, match="3 recordings lie under an old name") as notes:
        dataset = ICBHI(root, split="all")
    assert len(notes) == 1
    assert sorted(dataset.recordings["recording"]) == sorted(sides)
    assert (dataset.recordings["device"].iloc[1:4] == "Meditron").all()
    assert (folder / "102_1b1_Ar_sc_LittC2SE.wav").exists()


@pytest.mark.parametrize("differences", [True, False], ids=["with-list", "without-list"])
def test_old_names_in_files_and_split_are_known_by_the_list_alone(root: Path, differences: bool) -> None:
    old = "226_1b1_Ll_sc_LittC2SE"
    if differences:
        (root / "filename_differences.txt").write_text(f"'{old}'\r\n'101_1b1_Al_sc_AKGC417L'\r\n")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        recordings = ICBHI(root / "ICBHI_final_database", split="all").recordings  # the list lies beside it
    assert ["1 recordings lie under an old name" in str(note.message) for note in notes] == [True] * differences
    device = "Meditron" if differences else "LittC2SE"
    assert recordings.iloc[-1][["recording", "device"]].tolist() == [f"226_1b1_Ll_sc_{device}", device]


def test_list_of_old_names_that_makes_no_sense(root: Path) -> None:
    (root / "filename_differences.txt").write_text("'226_1b1_Ll_sc_LittC2SE'\n<html>\n")
    with pytest.raises(MetadataError, match=r"differences\.txt, line 2: .*Correct the file, or fetch"):
        ICBHI(root)


@pytest.mark.parametrize("listed", ["Meditron", "LittC2SE"])
def test_226_keeps_the_device_of_its_file(tmp_path: Path, listed: str) -> None:
    write_official(tmp_path, [*SIDES, "226_1b1_Pl_sc_LittC2SE"])
    (tmp_path / SIDE_NAMES["official"][0]).write_text(split_text(SIDES | {f"226_1b1_Pl_sc_{listed}": "train"}))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        dataset = ICBHI(tmp_path, split="all")
    assert len(notes) == (listed == "Meditron")
    assert dataset.recordings.iloc[-1][["recording", "device"]].tolist() == ["226_1b1_Pl_sc_LittC2SE", "LittC2SE"]


# ---------------------------------------------------------------- side files


@pytest.mark.parametrize(
    "text",
    [
        split_text(),
        split_text(end="\n"),
        split_text(end="\r"),
        split_text(end="\n")[:-1],
        split_text() + "\r\n",
        "\ufeff" + split_text(),
        "recording\tset\n" + split_text(),
        split_text().replace("\t", ","),
        split_text().replace("\t", "   "),
        "\n".join(f'"{stem}","{side}"' for stem, side in SIDES.items()),
    ],
    ids=["official", "lf", "cr", "no-last-newline", "blank-last-line", "bom", "header", "comma", "blanks", "quoted"],
)
def test_forms_of_the_split_file(root: Path, text: str) -> None:
    (root / SIDE_NAMES["official"][0]).write_bytes(text.encode())
    recordings = ICBHI(root, split="all").recordings
    assert dict(zip(recordings["recording"], recordings["split"], strict=True)) == SIDES


KAGGLE = demographics_text(" ", "\n")


@pytest.mark.parametrize(
    "text",
    [
        demographics_text(),
        "\n" + KAGGLE[:-1],
        "\r\n" + KAGGLE.replace("\n", "\r\n")[:-2],
        "PATIENT_ID AGE SEX BMI WEIGHT HEIGHT\n" + KAGGLE,
        "\ufeffPATIENT_ID,AGE,SEX,BMI,WEIGHT,HEIGHT\n" + KAGGLE.replace(" ", ",").replace("NA", ""),
        demographics_text().replace("NA", ""),
        demographics_text(end="\tAl\n").replace("\t3\t", "\t3.0\t").replace("\t19\t", "\t19.0\t"),
    ],
    ids=["official", "kaggle-lf", "kaggle-crlf", "header", "csv-empty-fields", "tabs-empty-fields", "patchmix-floats"],
)
def test_forms_of_the_demographics(root: Path, text: str) -> None:
    columns = ["patient", "age", "sex", "bmi", "weight", "height"]
    expected = ICBHI(root, split="all").recordings[columns]
    (root / SIDE_NAMES["official"][1]).write_bytes(text.encode())
    pd.testing.assert_frame_equal(ICBHI(root, split="all").recordings[columns], expected)


@pytest.mark.parametrize(
    "text",
    [
        diagnosis_text(),
        diagnosis_text(",", "\r\n")[:-2],
        diagnosis_text(",")[:-1],
        "PATIENT_ID,DISEASE\n" + diagnosis_text(","),
    ],
    ids=["official", "kaggle-crlf", "kaggle-lf", "header"],
)
def test_forms_of_the_diagnosis(root: Path, text: str) -> None:
    (root / SIDE_NAMES["official"][2]).write_bytes(text.encode())
    recordings = ICBHI(root, split="all").recordings
    assert dict(zip(recordings["patient"], recordings["diagnosis"], strict=True)) == DIAGNOSIS


MARKERS = f"<<<<<<< HEAD\n{split_text(end=chr(10))}=======\n{split_text(end=chr(10))}>>>>>>> other\n"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (0, split_text().replace("train", "valid"), "line 2: unknown side of the split 'valid'"),
        (0, MARKERS, "line 1: .*'<<<<<<< HEAD'"),
        (0, MARKERS.removeprefix("<<<<<<< HEAD\n"), "line 7: .*'======='"),
        (0, split_text().replace(FIRST, "101_1b1_Al_sc_Meditrn"), "line 1: .*'101_1b1_Al_sc_Meditrn'"),
        (0, "l" + split_text()[1:], "line 1: cannot make sense of the first field 'l01_1b1_Al_sc_Meditron'"),
        (1, "l" + demographics_text()[1:], "line 1: cannot make sense of the first field 'l01'"),
        (1, "l01 ? M ? ? ?\n" + demographics_text(), "line 1: cannot make sense of the first field 'l01'"),
        (1, "l01 ? ? NA ? ?\n" + demographics_text(), "line 1: cannot make sense of the first field 'l01'"),
        (2, "l" + diagnosis_text()[1:], "line 1: cannot make sense of the first field 'l01'"),
        (0, "a b\nc d\n" + split_text(), "line 2: cannot make sense"),
        (0, split_text() + f"{FIRST}\ttrain\n", r"line 7: 101_1b1_Al_sc stands already in .*line 1"),
        (0, split_text() + "101_1b1_Al_sc_LittC2SE\ttrain\n", "line 7: 101_1b1_Al_sc stands already"),
        (0, split_text().replace("\ttest", ""), "line 1: expected 2 fields, found 1"),
        (0, "\n\n", "no line to read"),
        (1, demographics_text().replace("\tM\t", "\tX\t"), "line 3: unknown sex 'X'"),
        (1, demographics_text().replace("27.5", "27,5"), "line 3: cannot make sense"),
        (1, demographics_text().replace("27.5", "fat"), "line 3: 'fat' is not a number"),
        (1, demographics_text().replace("27.5", "inf"), "line 3: 'inf' is not a finite number"),
        (1, demographics_text() + "101\t4\tF\tNA\t19\t99\n", "line 6: 101 stands already"),
        (1, demographics_text().replace("226\t", "225\t"), "no line for patient 226"),
        (2, diagnosis_text().replace("URTI", "Flu"), r"line 1: unknown diagnosis 'Flu' \(known: Healthy, COPD"),
        (2, diagnosis_text() + "226\tCOPD\n", "line 6: 226 stands already .*line 5"),
        (2, diagnosis_text().replace("226\t", "225\t"), "no line for patient 226"),
    ],
    ids=[
        "unknown-side", "conflict-marker", "conflict-later", "damaged-first-stem", "split-no-header",
        "ages-no-header", "sex-no-header", "unknown-no-header", "diagnosis-no-header", "two-headers", "other-side",
        "other-name-other-side", "field-count", "empty-split", "unknown-sex", "decimal-comma", "no-number", "infinite",
        "other-age", "no-demographics", "unknown-diagnosis", "other-diagnosis", "no-diagnosis",
    ],
)  # fmt: skip
def test_side_file_that_makes_no_sense(root: Path, kind: int, text: str, message: str) -> None:
    path = root / SIDE_NAMES["official"][kind]
    path.write_bytes(text.encode())
    with pytest.raises(MetadataError, match=message) as error:
        ICBHI(root)
    assert str(path) in str(error.value)
    assert "fetch" in str(error.value)


def test_side_file_that_is_no_text(root: Path) -> None:
    (root / SIDE_NAMES["official"][2]).write_bytes(b"101\t\xff\xfe\n")
    with pytest.raises(MetadataError, match="not UTF-8"):
        ICBHI(root)


@pytest.mark.parametrize("name", [FIRST, "101_1b1_Al_sc_LittC2SE"], ids=["same-name", "other-device"])
def test_line_that_stands_twice_counts_once(root: Path, name: str) -> None:
    with (root / SIDE_NAMES["official"][0]).open("a") as file:
        file.write(f"{name}\ttest\n")
    with pytest.warns(UserWarning, match=r"train_test\.txt: 1 entries stand twice .*line 7") as notes:
        dataset = ICBHI(root, split="all")
    assert len(notes) == 1
    assert dataset.recordings["recording"].tolist() == sorted(SIDES)


def test_two_side_files_that_agree_and_that_do_not(root: Path) -> None:
    (root / "patient_diagnosis.csv").write_text(diagnosis_text(","))
    assert len(ICBHI(root, split="all").recordings) == len(SIDES)
    (root / "patient_diagnosis.csv").write_text(diagnosis_text(",").replace("101,URTI", "101,LRTI"))
    with pytest.raises(MetadataError, match=r"patient_diagnosis\.csv, line 1: 101 stands already in .*_diagnosis\.txt"):
        ICBHI(root)


# ---------------------------------------------------------------- annotations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1 0\n", "line 1: expected 4 fields"),
        ("0 1 0 0 0\n", "line 1: expected 4 fields"),
        ("0 1 0 0\n1 2 2 0\n", "line 2: crackle and wheeze must be 0 or 1, got '2'"),
        ("0 1 0 nan\n", "line 1: crackle and wheeze"),
        ("0 1 0 0\n\n2 1.5 0 0\n", r"line 3: cycle ends \(1.5 s\) before it starts \(2 s\)"),
        ("1 1 0 0\n", "line 1: cycle ends"),
        ("-0.1 1 0 0\n", "line 1: cycle starts before the recording"),
        ("0 4.011 0 0\n", r"line 1: cycle ends \(4.011 s\) after the recording \(4 s\)"),
        ("4.002 4.005 0 0\n", "line 1: cycle ends"),
        ("0 1 0 0\n0.999 2 0 0\n", r"line 2: cycle starts \(0.999 s\) before the previous one ends \(1 s\)"),
        ("0 1 0 0\n0 1 0 0\n", "line 2: cycle starts"),
        ("zero 1 0 0\n", "line 1: could not convert string to float: 'zero'"),
        ("nan 1 0 0\n", "line 1: times must be finite"),
        ("0 inf 0 0\n", "line 1: times must be finite"),
        ("", "no cycle"),
        (" \n\r\n", "no cycle"),
    ],
    ids=[
        "three-fields", "five-fields", "flag-2", "flag-nan", "backwards", "empty-cycle", "negative", "beyond",
        "clipped-away", "overlap", "twice", "no-number", "nan", "infinite", "empty", "blank",
    ],
)  # fmt: skip
def test_annotation_that_makes_no_sense(root: Path, text: str, message: str) -> None:
    path = root / "ICBHI_final_database" / f"{FIRST}.txt"
    path.write_bytes(text.encode())
    with pytest.raises(AnnotationError, match=message) as error:
        ICBHI(root)
    assert str(path) in str(error.value)
    assert "fetch the" in str(error.value)


def test_annotation_that_is_no_text(root: Path) -> None:
    (root / "ICBHI_final_database" / f"{FIRST}.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(AnnotationError, match="is not text"):
        ICBHI(root)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5\t1\t0\t1\r\n\r\n1\t2.25\t1\t0\r\n", [(0.5, 1, 2), (1, 2.25, 1)]),
        ("\ufeff0.5  1 0 1\n1 2.25 1 0", [(0.5, 1, 2), (1, 2.25, 1)]),
        ("1 2.25 1 0\n0.5 1 0 1\n", [(0.5, 1, 2), (1, 2.25, 1)]),
        ("0 4.0099 1 1\n", [(0, 4, 3)]),
    ],
    ids=["crlf", "bom-blanks", "unsorted", "clipped"],
)
def test_forms_of_the_annotation(root: Path, text: str, expected: list[tuple[float, float, int]]) -> None:
    (root / "ICBHI_final_database" / f"{FIRST}.txt").write_bytes(text.encode())
    cycles = ICBHI(root, split="test").cycles.query("recording == @FIRST")
    assert list(cycles[["start", "end", "label"]].itertuples(index=False, name=None)) == expected


# ---------------------------------------------------------------- splits, labels, arguments


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("4-class", [0, 1, 2, 3]), ("2-class", [0, 1, 1, 1]), ("diagnosis", [2] * 4), ("diagnosis-2-class", [1] * 4)],
)
def test_labels(root: Path, labels: str, expected: list[int]) -> None:
    dataset = ICBHI(root, split="test", labels=labels)  # type: ignore[arg-type]
    assert dataset.cycles.query("recording == @FIRST")["label"].tolist() == expected
    assert dataset.classes == CLASSES[labels]
    healthy = ICBHI(root, labels=labels).cycles.query("patient == '102'")["class"]  # type: ignore[arg-type]
    assert healthy.iloc[0] == dataset.classes[0]


def test_official_clean_leaves_train_of_shared_patients_out(root: Path) -> None:
    shared_train = "156_2b3_Al_mc_AKGC417L"
    official, clean = ICBHI(root), ICBHI(root, protocol="official-clean")
    assert set(official.recordings["recording"]) - set(clean.recordings["recording"]) == {shared_train}
    assert clean.all_recordings.set_index("recording").loc[shared_train, "split"] == "left-out"
    test = ICBHI(root, split="test", protocol="official-clean").recordings
    assert test["recording"].tolist() == ICBHI(root, split="test").recordings["recording"].tolist()
    everything = ICBHI(root, split="all", protocol="official-clean")
    assert len(everything.recordings) == len(SIDES) - 1


def test_mark_clean_takes_any_test_split_and_keeps_its_input() -> None:
    table = pd.DataFrame(
        {"patient": ["1", "2", None, "1", "2", None], "split": ["train"] * 3 + ["inter", "intra", "intra"]}
    )
    before = table.copy()
    assert mark_clean(table, ("inter",))["split"].tolist() == ["left-out", "train", "train", "inter", "intra", "intra"]
    assert mark_clean(table, ("inter", "intra"))["split"].tolist()[:3] == ["left-out", "left-out", "train"]
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("split", "valid"), ("protocol", "offical"), ("labels", "5-class"), ("pad", "wrap"), ("sample_rate", 0)],
)
def test_argument_without_meaning(root: Path, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} must be .*{value!r}"):
        ICBHI(root, **{argument: value})  # type: ignore[arg-type]


def test_verify_names_number_expected_found_and_cause(root: Path) -> None:
    with pytest.raises(VerificationError) as error:
        ICBHI(root).verify()
    message = str(error.value)
    assert "train recordings: expected 539, found 3 (likeliest cause: a partial unpack" in message
    assert "Litt3200 recordings: expected 60, found 1" in message
    assert "diagnosis SHA-256: expected 7441ccf5" in message


# ---------------------------------------------------------------- download


class Server(http.server.ThreadingHTTPServer):
    """A folder on a local port that remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path.strip("/"))
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Side files, and an archive that lacks one recording."""
    folder = tmp_path / "server"
    write_official(folder)
    sounds = folder / "ICBHI_final_database"
    with zipfile.ZipFile(folder / "ICBHI_final_database.zip", "w") as archive:
        for path in sorted(sounds.iterdir()):
            if not path.stem.startswith("226"):
                archive.write(path, f"ICBHI_final_database/{path.name}")
    shutil.rmtree(sounds)
    with Server(folder) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


def test_download(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "data" / "icbhi"
    ICBHI.download(root, url=server.url)
    assert sorted(server.asked) == sorted([*SIDE_NAMES["official"], "ICBHI_final_database.zip"])
    dataset = ICBHI(root, split="all", partial=True)
    assert dataset.missing == ["226_1b1_Ll_sc_LittC2SE"]
    server.asked.clear()
    ICBHI.download(root, url=server.url)
    assert server.asked == []  # the archive is still there


def test_download_fetches_only_what_is_missing(server: Server, tmp_path: Path) -> None:
    root = layout_kaggle(tmp_path / "kaggle")
    (root / "ICBHI_challenge_train_test.txt").unlink()
    ICBHI.download(root, url=server.url + "/")
    assert server.asked == ["ICBHI_challenge_train_test.txt"]
    assert len(ICBHI(root, split="all").recordings) == len(SIDES)


def test_download_completes_an_interrupted_unpack(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_sounds(root / "ICBHI_final_database", [FIRST])
    (root / "ICBHI_final_database" / f"{FIRST}.txt").unlink()
    ICBHI.download(root, url=server.url)
    assert len(ICBHI(root, split="all", partial=True).recordings) == len(SIDES) - 1


PAGE = "<!DOCTYPE html>\n<html><body>busy, come again</body></html>\n"


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["split", "demographics", "diagnosis"])
@pytest.mark.parametrize("answer", [PAGE, "", "Sorry\n" + PAGE], ids=["page", "nothing", "text"])
def test_download_keeps_no_page_that_comes_in_place_of_a_side_file(
    server: Server, tmp_path: Path, kind: int, answer: str
) -> None:
    name = SIDE_NAMES["official"][kind]
    published = tmp_path / "server" / name
    good = published.read_bytes()
    published.write_text(answer)
    with pytest.raises(DownloadError, match=rf"(?s){name}: the server answered with something else.*by hand") as error:
        ICBHI.download(tmp_path / "data", url=server.url)
    assert server.url in str(error.value)
    published.write_bytes(good)
    ICBHI.download(tmp_path / "data", url=server.url)
    assert (tmp_path / "data" / name).read_bytes() == good


def test_download_that_fails_says_how_to_fetch_by_hand(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="404") as error:
        ICBHI.download(tmp_path / "data", url=f"{server.url}/moved")
    for name in (*SIDE_NAMES["official"], "ICBHI_final_database.zip"):
        assert f"{server.url}/moved/{name}" in str(error.value)


def test_what_was_downloaded_is_verified(root: Path) -> None:
    with pytest.raises(VerificationError, match="recordings: expected 920, found 6"):
        ICBHI(root, download=True)  # complete by its own split file, so nothing is fetched
