from __future__ import annotations

import hashlib
import json
import re
import struct
import wave
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from scipy.signal import stft
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

from respiro.datasets import ICBHI, SPRSound, _breath, write_synthetic_icbhi, write_synthetic_sprsound

ICBHI_NAME = re.compile(r"^(\d{3})_(\d[bp]\d)_(Tc|[APL][lr])_(mc|sc)_(AKGC417L|LittC2SE|Litt3200|Meditron)$")
SPRSOUND_NAME = re.compile(r"^(?P<patient>\d*)_(?P<age>\d+(?:\.\d+)?)_(?P<gender>[01])_(?P<loc>p[1-8])_(?P<rec>\d+)$")
EVENT_TYPES = {"Normal", "Rhonchi", "Wheeze", "Stridor", "Coarse Crackle", "Fine Crackle", "Wheeze+Crackle"}


class Row(NamedTuple):
    recording: str
    patient: str
    side: str
    label: int
    start: str
    end: str


def read_rows(root: Path) -> list[Row]:
    """Read the cycles by hand, so that writer and loader do not share a mistake."""
    sides = dict(line.split("\t") for line in (root / "ICBHI_challenge_train_test.txt").read_text().splitlines())
    rows = []
    for path in sorted((root / "ICBHI_final_database").glob("*.txt")):
        for line in path.read_text().splitlines():
            start, end, crackle, wheeze = line.split("\t")
            rows.append(Row(path.stem, path.stem[:3], sides[path.stem], int(crackle) + 2 * int(wheeze), start, end))
    return rows


def read_cycles(root: Path, rows: list[Row]) -> Iterator[tuple[np.ndarray, int]]:
    for row in rows:
        samples, rate = soundfile.read(root / "ICBHI_final_database" / f"{row.recording}.wav")
        yield samples[int(float(row.start) * rate) : int(float(row.end) * rate)], rate


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def icbhi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_icbhi(tmp_path_factory.mktemp("synthetic") / "icbhi")


@pytest.fixture(scope="module")
def sprsound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_sprsound(tmp_path_factory.mktemp("synthetic") / "sprsound")


# ---------------------------------------------------------------------------------------------------------- ICBHI


def test_icbhi_has_the_published_layout(icbhi: Path) -> None:
    sounds = sorted((icbhi / "ICBHI_final_database").glob("*.wav"))
    stems = [path.stem for path in sounds]
    assert len(stems) == 24 * 3
    assert sorted(path.stem for path in (icbhi / "ICBHI_final_database").glob("*.txt")) == stems
    fields = [ICBHI_NAME.match(stem) for stem in stems]
    assert all(fields)
    assert len({match.groups()[:4] for match in fields if match}) == len(stems)
    assert {stem[:3] for stem in stems} == {str(number) for number in range(101, 125)}

    split = (icbhi / "ICBHI_challenge_train_test.txt").read_bytes().decode("ascii")
    assert all(re.fullmatch(r"\S+\t(train|test)\r\n", line) for line in split.splitlines(keepends=True))
    assert sorted(line.split("\t")[0] for line in split.splitlines()) == stems
    assert sum(path.stat().st_size for path in sounds) < 60e6


def test_icbhi_annotations_are_contiguous_and_end_within_the_sound(icbhi: Path) -> None:
    rows = read_rows(icbhi)
    assert 300 <= len(rows) <= 450
    for first, second in pairwise(rows):
        assert float(first.start) < float(first.end)
        if first.recording == second.recording:
            assert first.end == second.start
    for row in rows:
        sound = soundfile.info(icbhi / "ICBHI_final_database" / f"{row.recording}.wav")
        assert float(row.end) <= sound.duration


def test_icbhi_headers_are_those_of_the_devices(icbhi: Path) -> None:
    found: dict[str, set[tuple[int, str]]] = {}
    for path in (icbhi / "ICBHI_final_database").glob("*.wav"):
        data = path.read_bytes()
        assert (data[:4], data[8:16], data[36:40]) == (b"RIFF", b"WAVEfmt ", b"data")
        assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
        info = soundfile.info(path)
        assert info.channels == 1
        found.setdefault(path.stem.split("_")[-1], set()).add((info.samplerate, info.subtype))
    assert found == {
        "AKGC417L": {(44100, "PCM_24"), (44100, "PCM_16")},
        "LittC2SE": {(44100, "PCM_24")},
        "Litt3200": {(4000, "PCM_16")},
        "Meditron": {(44100, "PCM_16"), (10000, "PCM_16"), (4000, "PCM_16")},
    }


def test_icbhi_demographics_have_gaps(icbhi: Path) -> None:
    text = (icbhi / "ICBHI_Challenge_demographic_information.txt").read_bytes().decode("ascii")
    assert text.count("\r\n") == text.count("\n") == 24
    lines = [line.split("\t") for line in text.splitlines()]
    assert {len(line) for line in lines} == {6}
    unknown = [line for line in lines if line[1:] == ["NA"] * 5]
    assert len(unknown) == 1
    for _, age, sex, bmi, weight, height in (line for line in lines if line not in unknown):
        assert sex in {"M", "F"}
        assert not 16 < float(age) < 19
        if float(age) >= 19:
            assert (weight, height) == ("NA", "NA")
        else:
            assert bmi == "NA"
    assert any(float(line[1]) >= 19 and line[3] == "NA" for line in lines if line not in unknown)
    assert any(float(line[1]) < 19 and line[5] == "NA" for line in lines if line not in unknown)
    diagnoses = dict(line.split("\t") for line in (icbhi / "ICBHI_Challenge_diagnosis.txt").read_text().splitlines())
    assert sorted(diagnoses) == [line[0] for line in lines]


@pytest.mark.parametrize(
    ("num_patients", "seed", "train_patients"),
    [(4, 0, 2), (5, 1, 2), (8, 2, 2), (12, 0, 3)],
    ids=lambda value: str(value),
)
def test_all_classes_are_on_both_sides(num_patients: int, seed: int, train_patients: int, tmp_path: Path) -> None:
    root = write_synthetic_icbhi(tmp_path / "icbhi", num_patients, seed, recordings_per_patient=2)
    check_classes(root, train_patients, shared=int(num_patients >= 12))


def test_default_size_has_four_train_patients_for_each_class(icbhi: Path) -> None:
    check_classes(icbhi, train_patients=4, shared=1)


def check_classes(root: Path, train_patients: int, shared: int) -> None:
    rows = read_rows(root)
    both_sides = {row.patient for row in rows if row.side == "train"} & {
        row.patient for row in rows if row.side == "test"
    }
    assert len(both_sides) == shared
    for label in range(4):
        on_side = {
            side: {row.patient for row in rows if row.label == label and row.side == side} for side in ("train", "test")
        }
        assert len(on_side["train"] - both_sides) >= train_patients
        assert on_side["test"] - both_sides


def test_official_split_deals_one_simultaneous_take_to_both_sides(icbhi: Path) -> None:
    train, test = ICBHI(icbhi, "train"), ICBHI(icbhi, "test")
    shared = set(train.recordings["take"]) & set(test.recordings["take"])
    assert len(shared) == 1
    here = [data.cycles[data.cycles["take"].isin(shared)] for data in (train, test)]
    assert set(here[0]["mode"]) == {"mc"}
    assert here[0][["start", "end", "label"]].values.tolist() == here[1][["start", "end", "label"]].values.tolist()
    clean = ICBHI(icbhi, "train", protocol="official-clean")
    assert not set(clean.recordings["patient"]) & set(test.recordings["patient"])
    assert set(clean.cycles["label"]) == {0, 1, 2, 3}


def test_simultaneous_recordings_hear_the_same_events_and_other_noise(icbhi: Path) -> None:
    takes: dict[str, list[Row]] = {}
    for row in read_rows(icbhi):
        takes.setdefault("_".join(row.recording.split("_")[:2]) + row.recording.split("_")[3], []).append(row)
    for name, rows in takes.items():
        parts = [[row[3:] for row in rows if row.recording == stem] for stem in sorted({row.recording for row in rows})]
        if len(parts) == 2:
            assert (parts[0] == parts[1]) == name.endswith("mc")


def test_loader_reads_every_device(icbhi: Path) -> None:
    data = ICBHI(icbhi, "all")
    assert not data.partial
    assert len(data) == len(read_rows(icbhi))
    assert data.all_recordings["age"].isna().sum() == 3  # the three recordings of one patient
    for _, rows in data.cycles.reset_index(drop=True).groupby("device"):
        waveform = data[int(rows.index[0])]["waveform"]
        assert waveform.shape == (8 * 16000,)
        assert 0.001 < waveform.std() < 1


# ------------------------------------------------------------------------------------------------------- SPRSound


def read_records(root: Path) -> dict[str, dict[str, dict]]:
    folders = {"train": "train_json", "inter": "test_json/inter_test_json", "intra": "test_json/intra_test_json"}
    return {
        side: {path.stem: json.loads(path.read_text()) for path in sorted((root / folder).glob("*.json"))}
        for side, folder in folders.items()
    }


def test_sprsound_has_the_layout_of_2022(sprsound: Path) -> None:
    records = read_records(sprsound)
    train, test = ({path.stem for path in (sprsound / f"{side}_wav").iterdir()} for side in ("train", "test"))
    assert set(records["train"]) == train
    assert set(records["inter"]) | set(records["intra"]) == test
    names = {side: [SPRSOUND_NAME.match(stem) for stem in stems] for side, stems in records.items()}
    assert all(match for matches in names.values() for match in matches)
    patients = {side: {match["patient"] for match in matches if match} for side, matches in names.items()}
    assert patients["intra"] == patients["train"]
    assert not patients["inter"] & patients["train"]
    numbers = [match["rec"] for matches in names.values() for match in matches if match]
    assert len(set(numbers)) == len(numbers)


def test_sprsound_headers_have_the_published_fault(sprsound: Path) -> None:
    for path in [*(sprsound / "train_wav").iterdir(), *(sprsound / "test_wav").iterdir()]:
        assert struct.unpack("<HHIIHH", path.read_bytes()[20:36]) == (1, 1, 8000, 16000, 4, 16)
        with wave.open(str(path)) as sound:
            assert (sound.getnchannels(), sound.getframerate(), sound.getsampwidth()) == (1, 8000, 2)
            assert sound.getnframes() in {73728, 122880}


def test_sprsound_annotations_keep_the_rules(sprsound: Path) -> None:
    records = read_records(sprsound)
    unsorted = 0
    for record in [record for side in records.values() for record in side.values()]:
        times = [(event["start"], event["end"]) for event in record["event_annotation"]]
        assert all(isinstance(time, str) and time.isdigit() for pair in times for time in pair)
        ordered = sorted((int(start), int(end)) for start, end in times)
        unsorted += ordered != [(int(start), int(end)) for start, end in times]
        assert all(start < end for start, end in ordered)
        assert all(first[1] <= second[0] for first, second in pairwise(ordered))
        types = {event["type"] for event in record["event_annotation"]}
        continuous = types & {"Rhonchi", "Wheeze", "Stridor", "Wheeze+Crackle"}
        crackles = types & {"Coarse Crackle", "Fine Crackle", "Wheeze+Crackle"}
        expected = {
            (True, True): "CAS & DAS",
            (True, False): "CAS",
            (False, True): "DAS",
            (False, False): "Normal" if types else "Poor Quality",
        }[bool(continuous), bool(crackles)]
        assert record["record_annotation"] == expected
    assert unsorted > 10
    for side in records.values():
        assert {"Normal", "Poor Quality"} <= {record["record_annotation"] for record in side.values()}


@pytest.mark.parametrize(("num_patients", "seed"), [(4, 0), (4, 5), (8, 1)], ids=lambda value: str(value))
def test_sprsound_has_all_types_in_train(num_patients: int, seed: int, tmp_path: Path) -> None:
    root = write_synthetic_sprsound(tmp_path / "sprsound", num_patients, seed, recordings_per_patient=3)
    records = read_records(root)
    types = {
        side: {event["type"] for record in records[side].values() for event in record["event_annotation"]}
        for side in records
    }
    assert types["train"] == EVENT_TYPES
    assert len(types["inter"]) > 1
    assert len(types["intra"]) > 1


def test_rare_types_are_rarer(sprsound: Path) -> None:
    counts = SPRSound(sprsound, task="1-2", partial=True).counts().loc[("train", "all")]
    assert counts["normal"] > counts["wheeze"] > counts["rhonchi"] > 0
    assert counts["fine crackle"] > counts["coarse crackle"] > 0
    assert 0 < counts["stridor"] < counts["wheeze"]


@pytest.mark.parametrize("split", ["train", "inter", "intra"])
def test_loader_reads_sprsound(split: str, sprsound: Path) -> None:
    events = SPRSound(sprsound, split=split, partial=True)
    assert set(events.cycles["label"]) == {0, 1}
    assert events[0]["waveform"].isfinite().all()
    records = SPRSound(sprsound, split=split, task="2-2", partial=True)
    assert len(records) == len(read_records(sprsound)[split])


# ----------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("write", [write_synthetic_icbhi, write_synthetic_sprsound], ids=["icbhi", "sprsound"])
class TestWriting:
    def test_same_arguments_give_the_same_bytes(self, write, tmp_path: Path) -> None:
        assert digests(write(tmp_path / "a", 4, seed=3)) == digests(write(tmp_path / "b", 4, seed=3))

    def test_other_seeds_give_other_sounds(self, write, tmp_path: Path) -> None:
        first, second = digests(write(tmp_path / "a", 4, seed=0)), digests(write(tmp_path / "b", 4, seed=1))
        sounds = [{digest for name, digest in files.items() if name.endswith(".wav")} for files in (first, second)]
        assert not sounds[0] & sounds[1]

    def test_finished_set_is_left_as_it_is(self, write, tmp_path: Path) -> None:
        root = write(tmp_path / "new" / "set", 4)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        assert write(root, 4) == root
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
        assert list(root.parent.iterdir()) == [root]  # nothing temporary is left

    def test_empty_folder_is_filled(self, write, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        assert any(write(tmp_path / "set", 4).iterdir())

    def test_anything_else_is_not_touched(self, write, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"holds something else.*name another folder"):
            write(tmp_path, 4)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_other_arguments_are_named(self, write, tmp_path: Path) -> None:
        write(tmp_path / "set", 4)
        with pytest.raises(ValueError, match=r"other arguments.*'seed': 0"):
            write(tmp_path / "set", 4, seed=1)

    def test_interrupted_write_leaves_nothing(self, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "set", 4)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_patients": 3}, "num_patients must be at least 4, got 3"),
            ({"num_patients": 1000}, "num_patients must be at most"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
            ({"recordings_per_patient": 1}, "recordings_per_patient must be at least"),
        ],
        ids=["too few", "too many", "seed", "recordings"],
    )
    def test_bad_arguments_are_named(self, write, arguments: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "set", **arguments)


# -------------------------------------------------------------------------------------------------------- physics

PERSON = _breath.Person(pitch=1.0, period=2.4, pulse=1.2, crackle="fine")


@pytest.mark.parametrize(("name", "shortest", "longest"), [("fine", 5, 10), ("coarse", 10, 20)])
def test_crackles_last_5_to_20_ms(name: str, shortest: float, longest: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        wave = _breath.burst(_breath.SOUNDS[name], 1.0, rng)
        assert shortest <= 1000 * len(wave) / _breath.RATE <= longest
        third = len(wave) // 3
        assert np.abs(wave[:third]).max() == 1  # it begins at once ...
        assert np.abs(wave[2 * third :]).max() < 0.2  # ... and dies away


def test_fine_crackles_are_higher_than_coarse_ones() -> None:
    rng = np.random.default_rng(0)
    peaks = {
        name: [np.abs(np.fft.rfft(_breath.burst(_breath.SOUNDS[name], 1.0, rng), 8000)).argmax() for _ in range(50)]
        for name in ("fine", "coarse")
    }
    assert min(peaks["fine"]) > max(peaks["coarse"])


@pytest.mark.parametrize("name", ["wheeze", "rhonchus", "stridor"])
@pytest.mark.parametrize("pitch", [0.9, 1.4], ids=["low", "high"])
def test_tones_stay_within_100_to_1000_hz_for_over_80_ms(name: str, pitch: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        wave = _breath.tone(_breath.SOUNDS[name], 2.0, pitch, rng)
        assert len(wave) / _breath.RATE > 0.08
        frequency, _, bins = stft(wave, _breath.RATE, nperseg=512, noverlap=448)
        loudest = frequency[np.abs(bins).argmax(0)][4:-4]
        assert np.all((loudest > 80) & (loudest < 1020))


def test_deal_rounds_by_largest_remainder() -> None:
    dealt = _breath.deal((0.5, 0.3, 0.2), 7, np.random.default_rng(0))
    assert np.bincount(dealt).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4


@pytest.mark.parametrize("rate", [4000, 10000, 44100])
def test_record_keeps_a_tone_at_its_place_in_time_and_frequency(rate: int) -> None:
    time = np.arange(_breath.whole_samples(1.9)) / _breath.RATE
    device = _breath.Device("any", rate, 16, (1, 4000), level=-20, floor=-120)
    heard = _breath.record(np.sin(2 * np.pi * 500 * time), device, np.random.default_rng(0))
    assert len(heard) == 2 * rate
    expected = np.sin(2 * np.pi * 500 * np.arange(2 * rate) / rate)
    assert np.corrcoef(heard, expected)[0, 1] > 0.999


def longest_tone(samples: np.ndarray, rate: int) -> float:
    """Longest time (s) for which one narrow peak in 100-1000 Hz stands out and moves steadily."""
    hop = 0.01
    frequency, _, bins = stft(samples - samples.mean(), rate, nperseg=int(0.06 * rate), noverlap=int(0.05 * rate))
    power = np.abs(bins[(frequency >= 100) & (frequency <= 1000)]) ** 2 + 1e-15
    peak = power.argmax(0)
    clear = 10 * np.log10(power.max(0) / np.median(power, 0)) > 15
    best = run = 0
    for i in range(1, len(peak)):
        run = run + 1 if clear[i] and clear[i - 1] and abs(peak[i] - peak[i - 1]) <= 1 else 0
        best = max(best, run)
    return best * hop


def test_wheeze_cycles_have_lasting_peaks_more_often_than_others(icbhi: Path) -> None:
    rows = read_rows(icbhi)
    lasting = np.array([longest_tone(samples, rate) >= 0.08 for samples, rate in read_cycles(icbhi, rows)])
    labels = np.array([row.label for row in rows])
    with_wheeze, without = lasting[labels >= 2].mean(), lasting[labels < 2].mean()
    assert with_wheeze > 0.6
    assert with_wheeze > without + 0.4


# ---------------------------------------------------------------------------------------------------- learnability


def band_levels(samples: np.ndarray, rate: int, window: float, edges: tuple[float, ...]) -> list[np.ndarray]:
    """Log power of the bins of each band: a list of ``(bins, frames)``."""
    size = int(window * rate)
    frequency, _, bins = stft(samples - samples.mean(), rate, nperseg=size, noverlap=size * 3 // 4)
    level = np.log(np.abs(bins) ** 2 + 1e-14)
    return [level[(frequency >= low) & (frequency < high)] for low, high in pairwise(edges)]


def features(samples: np.ndarray, rate: int) -> list[float]:
    """How far tones stand out of their band, how suddenly bands become loud, and the spectrum relative to its mean."""
    tonal = [band.max(0) - np.median(band, 0) for band in band_levels(samples, rate, 0.1, (100, 250, 450, 700, 1100))]
    levels = [band.mean(0) for band in band_levels(samples, rate, 0.016, (150, 350, 600, 1000, 1700))]
    sudden = [np.maximum(np.diff(level), 0) for level in levels]
    spectrum = [band.mean(0) for band in band_levels(samples, rate, 0.064, (60, 150, 250, 400, 700, 1100, 1900))]
    mean = np.mean([band.mean() for band in spectrum])
    return [
        *(value for tone in tonal for value in (np.median(tone), np.quantile(tone, 0.9), tone.max())),
        *(value for rise in sudden for value in (rise.mean(), np.quantile(rise, 0.98), rise.max())),
        *(value for band in spectrum for value in (band.mean() - mean, band.std())),
    ]


def test_classes_can_be_learnt_but_are_not_trivial(icbhi: Path) -> None:
    rows = read_rows(icbhi)
    x = np.array([features(samples, rate) for samples, rate in read_cycles(icbhi, rows)])
    y, side = np.array([row.label for row in rows]), np.array([row.side for row in rows])
    tested = {row.patient for row in rows if row.side == "test"}
    train = np.array([row.patient not in tested for row in rows])
    forest = RandomForestClassifier(200, min_samples_leaf=2, class_weight="balanced", random_state=0, n_jobs=2)
    predicted = forest.fit(x[train], y[train]).predict(x[side == "test"])
    counts = confusion_matrix(y[side == "test"], predicted, labels=range(4))
    sensitivity, specificity = counts.diagonal()[1:].sum() / counts[1:].sum(), counts[0, 0] / counts[0].sum()
    assert 0.65 < (sensitivity + specificity) / 2 < 0.95
