from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import threading
import warnings
import wave
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile

from respiro.datasets import _sprsound_check, sprsound
from respiro.datasets._sprsound_check import Counts
from respiro.datasets.sprsound import SPRSound
from respiro.errors import (
    AnnotationError,
    AudioError,
    DatasetNotFoundError,
    PartialDatasetError,
    RespiroError,
    VerificationError,
)

SPLITS = ("train", "inter", "intra")
#: Folder of the annotations and of the sounds of train and of test, in each layout.
LAYOUTS = {
    "legacy": ("train_{}", "test_{}"),
    "classification": (
        "Classification/train_classification_{}",
        "Classification/valid_classification_{}/2022",
    ),
    "classification-test": (
        "Classification/train_classification_{}",
        "Classification/test_classification_{}/2022",
    ),
    "current": ("BioCAS2022/train2022_{}", "BioCAS2022/test2022_{}"),
    "releases": ("releases/BioCAS2022/train2022_{}", "releases/BioCAS2022/test2022_{}"),
    "release-folder": ("train2022_{}", "test2022_{}"),
}
TRAIN, INTER, INTRA = "40000001_3.4_1_p2_10", "40000002_0.9_0_p1_20", "40000001_3.4_1_p4_30"


def write_wav(path: Path, seconds: float = 4.0, block_align: int = 4, channels: int = 1) -> None:
    """Write 8 kHz 16-bit PCM; every published header has the block size 4 instead of 2."""
    samples = np.arange(round(seconds * 8000) * channels, dtype="<i2")
    data = samples.tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, channels, 8000, 16000,
                       block_align, 16, b"data", len(data))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + data)


def event(start: object, end: object, kind: object = "Normal") -> dict[str, object]:
    return {"start": start, "end": end, "type": kind}


def write_json(path: Path, events: list[dict[str, object]], **labels: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**labels, "event_annotation": events}), encoding="utf-8")


def write_set(root: Path, layout: str = "legacy") -> Path:
    """Write four recordings, with the oddities of the real ones: strings, no order, no events."""
    train, test = LAYOUTS[layout]
    plan: list[tuple[str, str, str, list[dict[str, object]], dict[str, object]]] = [
        (train, "", TRAIN, [event("2000", "3000", "Wheeze"), event("100", "1500")], {"record_annotation": "CAS"}),
        (train, "", "40000003_17.9_0_p3_11", [], {"record_annotation": "Poor Quality"}),
        (test, "/inter_test_json", INTER, [event(0, 500, "Fine Crackle")], {"recording_annotation": "DAS"}),
        (test, "/intra_test_json", INTRA, [event("5", "900", "Wheeze & Crackle")], {"record_annotation": "CAS&DAS"}),
    ]
    for folder, below, stem, events, labels in plan:
        write_json(root / (folder.format("json") + below) / f"{stem}.json", events, **labels)
        write_wav(root / folder.format("wav") / f"{stem}.wav")
    return root


def write_test_set(root: Path, year: int, stems: dict[str, list[dict[str, object]]]) -> Path:
    for stem, events in stems.items():
        write_json(root / f"BioCAS{year}/test{year}_json" / f"{stem}.json", events)
        write_wav(root / f"BioCAS{year}/test{year}_wav" / f"{stem}.wav")
    return root


SPR = partial(SPRSound, partial=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tables(tmp_path: Path, layout: str) -> None:
    data = SPR(write_set(tmp_path, layout), split="all")
    recordings = data.all_recordings.set_index("recording")
    assert recordings["split"].to_dict() == {
        TRAIN: "train",
        "40000003_17.9_0_p3_11": "train",
        INTER: "inter",
        INTRA: "intra",
    }
    assert recordings.loc[TRAIN, ["patient", "device", "location", "take", "sex", "age", "age_group"]].tolist() == [
        "40000001", "Yunting II", "p2", TRAIN, "F", 3.4, "child"]  # fmt: skip
    assert recordings.loc[TRAIN, ["sample_rate", "frames", "channels", "encoding"]].tolist() == [
        8000,
        32000,
        1,
        "PCM_16",
    ]
    assert recordings["record_label"].to_dict() == {
        TRAIN: "CAS", "40000003_17.9_0_p3_11": "Poor Quality", INTER: "DAS", INTRA: "CAS & DAS"}  # fmt: skip
    table = data.cycles[["recording", "cycle", "start", "end", "event", "event_position", "label", "class"]]
    assert table.to_numpy().tolist() == [
        [TRAIN, 0, 0.1, 1.5, "Normal", 1, 0, "normal"],
        [TRAIN, 1, 2.0, 3.0, "Wheeze", 0, 1, "adventitious"],
        [INTRA, 0, 0.005, 0.9, "Wheeze+Crackle", 0, 1, "adventitious"],
        [INTER, 0, 0.0, 0.5, "Fine Crackle", 0, 1, "adventitious"],
    ]
    assert data.partial
    assert data.without_events == ["40000003_17.9_0_p3_11"]


@pytest.mark.parametrize("folder", ["BioCAS2022", "Classification", "parent"])
def test_root_may_be_a_folder_of_the_repository_or_its_parent(tmp_path: Path, folder: str) -> None:
    write_set(tmp_path / "SPRSound-main", "classification" if folder == "Classification" else "current")
    root = tmp_path if folder == "parent" else tmp_path / "SPRSound-main" / folder
    assert len(SPR(root)) == 2


def test_detection_is_never_read(tmp_path: Path) -> None:
    write_set(tmp_path, "classification")
    write_json(tmp_path / "Detection/train_detection_json/40000009_1.0_0_p1_1.json", [event(0, 9)])
    assert len(SPR(tmp_path, split="all").all_recordings) == 4
    shutil.rmtree(tmp_path / "Classification")
    with pytest.raises(DatasetNotFoundError):
        SPR(tmp_path / "Detection")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", [TRAIN]),
        ("inter", [INTER]),
        ("intra", [INTRA]),
        ("test", [INTRA, INTER]),
        ("all", [TRAIN, INTRA, INTER]),
    ],
)
def test_splits(tmp_path: Path, split: Any, names: list[str]) -> None:
    assert SPR(write_set(tmp_path), split=split).cycles["recording"].unique().tolist() == names


@pytest.mark.parametrize(
    ("task", "classes", "expected"),
    [
        ("1-1", ("normal", "adventitious"), [0, 1, 1, 1]),
        (
            "1-2",
            ("normal", "rhonchi", "wheeze", "stridor", "coarse crackle", "fine crackle", "wheeze+crackle"),
            [0, 2, 6, 5],
        ),
        ("2-1", ("normal", "poor quality", "adventitious"), [2, 2, 2, 1]),
        ("2-2", ("normal", "poor quality", "cas", "das", "cas & das"), [2, 4, 3, 1]),
        ("icbhi4", ("normal", "crackle", "wheeze", "both"), [0, 2, 3, 1]),
        ("icbhi2", ("normal", "abnormal"), [0, 1, 1, 1]),
    ],
)
def test_tasks(tmp_path: Path, task: Any, classes: tuple[str, ...], expected: list[int]) -> None:
    data = SPR(write_set(tmp_path), split="all", task=task)
    assert data.classes == classes
    assert data.cycles["label"].tolist() == expected
    if task.startswith("2"):
        assert data.cycles[["cycle", "start", "end"]].drop_duplicates().to_numpy().tolist() == [[0, 0.0, 4.0]]


def test_rhonchi_and_stridor_are_wheeze_or_left_out(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_json(
        tmp_path / "train_json" / f"{TRAIN}.json", [event(0, 9, "Rhonchi"), event(9, 20, "Stridor"), event(30, 40)]
    )
    assert SPR(tmp_path, task="icbhi4").class_counts == [1, 0, 2, 0]
    dropped = SPR(tmp_path, task="icbhi4", rhonchi_stridor="drop")
    assert dropped.class_counts == [1, 0, 0, 0]
    assert dropped.left_out["event"].tolist() == ["Rhonchi", "Stridor"]
    assert SPR(tmp_path, task="icbhi2", rhonchi_stridor="drop").class_counts == [1, 2]


def test_later_releases_have_one_test_set_and_rebuilt_labels(tmp_path: Path) -> None:
    stems = {
        "00014365_3.0_1_p5_5001": [event(0, 800), event("700", "1500", "Coarse Crackle")],
        "_5.3_0_p8_34877": [event(0, 900, "Stridor"), event(100, 200), event(300, 400)],
        "_18.0_0_p6_34878": [],
    }
    write_set(write_test_set(tmp_path, 2025, stems), "current")
    with pytest.warns(
        UserWarning, match="3 pairs of events overlap and were kept.*5001 events 0 and 1, .*0 and 1, .*0 and 2$"
    ):
        data = SPR(tmp_path, split="test", task="2-2", year=2025)
    recordings = data.all_recordings[data.all_recordings["split"] == "test"].set_index("recording")
    assert recordings["record_label"].tolist() == ["DAS", "Poor Quality", "CAS"]
    assert recordings.loc["00014365_3.0_1_p5_5001", "patient"] == "00014365"
    assert recordings.loc["_5.3_0_p8_34877", "patient"] != recordings.loc["_5.3_0_p8_34877", "patient"]  # missing
    assert data.codes("patient").tolist() == [0, -1, -1]
    assert data.recordings["age_group"].tolist() == ["child", "adult", "child"]
    assert "inter" not in set(data.all_recordings["split"])
    with pytest.warns(UserWarning, match="overlap"):
        assert SPR(tmp_path, split="train", year=2025).cycles["recording"].unique().tolist() == [TRAIN]


@pytest.mark.parametrize("year", [2023, 2024, 2025])
@pytest.mark.parametrize("folder", ["BioCAS{0}/test{0}_{{}}", "releases/BioCAS{0}/test{0}_{{}}", "test{0}_{{}}",
                                    "Classification/valid_classification_{{}}/{0}"])  # fmt: skip
def test_later_layouts_without_train(tmp_path: Path, year: int, folder: str) -> None:
    names = folder.format(year)
    write_json(tmp_path / names.format("json") / "1_3.0_1_p5_5001.json", [event(0, 800)])
    write_wav(tmp_path / names.format("wav") / "1_3.0_1_p5_5001.wav")
    for split in ("test", "all"):
        assert len(SPR(tmp_path, split=split, year=year)) == 1
    with pytest.raises(DatasetNotFoundError, match=r"\(train\) not found.*train2022_json"):
        SPR(tmp_path, split="train", year=year)


def test_record_labels_that_contradict_the_events_are_named_and_not_believed(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_json(tmp_path / "train_json" / f"{TRAIN}.json", [event(0, 9, "Wheeze+Crackle")], record_annotation="CAS")
    with pytest.warns(UserWarning, match=rf"1 record labels contradict.*{TRAIN} \('CAS', not 'CAS & DAS'\)") as caught:
        data = SPR(tmp_path, task="2-2")
    assert caught[0].filename == __file__
    assert data.cycles["class"].tolist() == ["cas & das", "poor quality"]


def test_an_event_up_to_ten_milliseconds_too_long_is_cut_with_a_warning(tmp_path: Path) -> None:
    write_set(tmp_path)
    write_json(tmp_path / "train_json" / f"{TRAIN}.json", [event(0, 4010)])
    with pytest.warns(UserWarning, match="1 events end up to 10 ms after"):
        assert SPR(tmp_path).cycles["end"].tolist() == [4.0]


def to_flac(path: Path) -> Path:
    samples, rate = soundfile.read(path, dtype="int16")
    soundfile.write(path.with_suffix(".flac"), samples, rate)
    return path


def test_flac_is_read_like_wav(tmp_path: Path) -> None:
    kept, columns = SPR(write_set(tmp_path), split="all").all_recordings, ["recording", "frames", "encoding", "split"]
    for path in sorted(tmp_path.rglob("*.wav")):
        to_flac(path).unlink()
    data = SPR(tmp_path, split="all", fade="none", sample_rate=8000, cache_dir=str(tmp_path / "cache"))
    pd.testing.assert_frame_equal(data.all_recordings[columns], kept[columns])
    assert data.all_recordings["path"].str.endswith(".flac").all()
    expected = np.arange(800, 12000, dtype=np.float32) / 32768  # the train recording, 0.1 s to 1.5 s
    np.testing.assert_array_equal(data.waveform(0), expected)


Break = Callable[[Path], object]
ANNOTATION = Path("train_json") / f"{TRAIN}.json"


def events_are(*events: dict[str, object], **labels: object) -> Break:
    return lambda root: write_json(root / ANNOTATION, list(events), **labels)


def text_is(text: str) -> Break:
    return lambda root: (root / ANNOTATION).write_text(text)


def copies(**targets: str) -> Break:
    """Copy annotation and sound of the train recording to other names."""
    sources = {"json": ANNOTATION, "wav": Path(f"train_wav/{TRAIN}.wav")}
    return lambda root: [shutil.copy(root / sources[kind], root / target) for kind, target in targets.items()]


def doubled(root: Path) -> None:
    (root / "train_json" / "copy").mkdir()
    shutil.copy(root / ANNOTATION, root / "train_json" / "copy")


BROKEN: dict[str, tuple[Break, type[RespiroError], str]] = {
    "not-json": (text_is("{"), AnnotationError, "is not a JSON file"),
    "not-an-object": (text_is("[]"), AnnotationError, "no list of events"),
    "no-events-key": (text_is('{"record_annotation": "Normal"}'), AnnotationError, "no list of events"),
    "events-not-objects": (text_is('{"event_annotation": [1]}'), AnnotationError, "no list of events"),
    "unknown-event": (events_are(event(0, 9, "Squawk")), AnnotationError, "event 0: unknown label 'Squawk'; known are"),
    "no-type": (events_are({"start": 0, "end": 5}), AnnotationError, "unknown label None"),
    "unknown-record-label": (events_are(record_annotation="Fine"), AnnotationError, "unknown label 'Fine'"),
    "time-is-text": (events_are(event("x", 9)), AnnotationError, "event 0: 'start' must be a whole number"),
    "time-is-missing": (events_are({"start": 0, "type": "Normal"}), AnnotationError, "'end' must be a whole number"),
    "time-is-true": (events_are(event(0, True)), AnnotationError, "got True"),
    "time-is-infinite": (events_are(event(0, "inf")), AnnotationError, "got 'inf'"),
    "fraction": (events_are(event(0, 1.5)), AnnotationError, r"got 1\.5"),
    "negative": (events_are(event(-5, 9)), AnnotationError, "got -5"),
    "end-before-start": (events_are(event(0, 9), event(700, 600)), AnnotationError, r"event 1 ends \(0\.600 s\)"),
    "no-length": (events_are(event(600, 600)), AnnotationError, "event 0 ends"),
    "past-the-end": (events_are(event(0, 4011)), AnnotationError, r"ends at 4\.011 s, after the end .*\(4\.000 s\)"),
    "overlap": (events_are(event(500, 900), event(0, 501)), AnnotationError, "events 1 and 0 overlap"),
    "no-wav": (lambda root: (root / f"train_wav/{TRAIN}.wav").unlink(), AnnotationError, f"no .wav.*{TRAIN}"),
    "wav-and-flac": (
        lambda root: to_flac(root / f"train_wav/{TRAIN}.wav"),
        AnnotationError, rf"{TRAIN}\.wav and .*{TRAIN}\.flac have the same name; keep one"),
    "no-json": (lambda root: (root / ANNOTATION).unlink(), AnnotationError, f"no .json.*{TRAIN}"),
    "twice-in-a-folder": (doubled, AnnotationError, "have the same name"),
    "in-two-splits": (
        copies(json=f"test_json/inter_test_json/{TRAIN}.json", wav=f"test_wav/{TRAIN}.wav"),
        AnnotationError, f"1 recordings are in more than one split: {TRAIN}"),
    "strange-name": (
        copies(json="train_json/a_1_p1_2.json", wav="train_wav/a_1_p1_2.wav"),
        AnnotationError, r"a_1_p1_2\.json: its name is not patient_age"),
    "not-a-sound": (lambda root: (root / f"train_wav/{TRAIN}.wav").write_text("no"), AudioError, TRAIN),
    "stereo": (lambda root: write_wav(root / f"train_wav/{TRAIN}.wav", channels=2), AudioError, "not mono"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(tmp_path: Path, case: str) -> None:
    damage, error, message = BROKEN[case]
    damage(write_set(tmp_path))
    with pytest.raises(error, match=message) as caught:
        SPR(tmp_path)
    assert TRAIN in str(caught.value) or "a_1_p1_2" in str(caught.value)
    if error is AnnotationError:
        assert re.search("[Ff]etch|keep one|published name", str(caught.value)), "no way out"


def test_files_that_systems_leave_behind_are_ignored(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train_wav" / f"._{TRAIN}.wav").write_bytes(b"")
    (tmp_path / "train_json" / ".DS_Store").write_bytes(b"")
    assert len(SPR(tmp_path)) == 2


def test_one_test_set_alone_is_enough(tmp_path: Path) -> None:
    shutil.rmtree(write_set(tmp_path) / "test_json" / "intra_test_json")
    shutil.rmtree(tmp_path / "train_wav")
    assert SPR(tmp_path, split="inter").all_recordings["recording"].tolist() == [INTER]
    with pytest.raises(DatasetNotFoundError, match=r"\(intra\).*test_json/intra_test_json in it holds"):
        SPR(tmp_path, split="test")
    with pytest.raises(DatasetNotFoundError, match="train_wav does not exist"):
        SPR(tmp_path)
    with pytest.raises(DatasetNotFoundError, match="train_wav does not exist"):  # annotations without sound
        SPR(tmp_path, split="all")
    shutil.rmtree(tmp_path / "train_json")
    assert SPR(tmp_path, split="all").all_recordings["recording"].tolist() == [INTER]
    assert SPR(tmp_path, split="all").partial
    with pytest.raises(DatasetNotFoundError, match=r"\(train\) not found"):
        SPRSound(tmp_path, split="all")


@pytest.mark.parametrize("root", ["", "absent"], ids=["empty", "absent"])
def test_nothing_there_says_what_was_looked_for_and_where_to_get_it(tmp_path: Path, root: str) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"not found.*download=True, or clone https://github\.com/SJTU"):
        SPRSound(tmp_path / root)


def test_a_part_of_the_set_must_be_asked_for(tmp_path: Path) -> None:
    write_set(tmp_path)
    message = "2 of 1949 train recordings, 1 of 355 inter recordings, 1 of 379 intra recordings found"
    with pytest.raises(PartialDatasetError, match=f"{message}.*Pass partial=True"):
        SPRSound(tmp_path)
    with pytest.raises(PartialDatasetError, match="cannot verify a partial copy: 2 of 1949"):
        SPR(tmp_path).verify()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split must be one of 'train', 'inter', 'intra', 'test', 'all', got 'val'"),
        ({"split": "inter", "year": 2024}, r"'all' \(the release of 2024 is one test set\), got 'inter'"),
        ({"task": "3-1"}, "task must be one of '1-1'.*got '3-1'"),
        ({"year": 2021}, "year must be one of 2022, 2023, 2024, 2025, got 2021"),
        ({"rhonchi_stridor": "keep"}, "rhonchi_stridor must be one of 'wheeze', 'drop'"),
    ],
)
def test_arguments_are_checked_before_the_disk(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPRSound(tmp_path / "absent", **arguments)


def test_the_wrong_block_size_of_the_published_headers_changes_no_sample(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = SPR(tmp_path, sample_rate=8000, fade="none", cache_dir=str(tmp_path / "cache"))
    expected = np.arange(32000, dtype="<i2") / np.float32(32768)
    np.testing.assert_array_equal(data.waveform(0), expected[800:12000])
    np.testing.assert_array_equal(data.waveform(1), expected[16000:24000])


def test_the_commit_is_read_from_the_folder_or_the_clone(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    assert SPR(write_set(tmp_path / f"SPRSound-{commit}")).commit == commit
    clone = write_set(tmp_path / "clone")
    assert SPR(clone).commit is None
    (clone / ".git" / "refs").mkdir(parents=True)
    (clone / ".git" / "HEAD").write_text("ref: refs/main\n")
    (clone / ".git" / "refs" / "main").write_text(f"{commit}\n")
    (clone / ".git" / "config").write_text("url = https://example.org/my-project.git")
    assert SPR(clone).commit is None
    (clone / ".git" / "config").write_text("url = https://github.com/SJTU-YONGFU-RESEARCH-GRP/SPRSound.git")
    assert SPR(clone).commit == commit
    (clone / ".git" / "HEAD").write_text(f"{commit[::-1]}\n")
    assert SPR(clone).commit == commit[::-1]


def test_download_fetches_and_unpacks_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    top = f"SPRSound-{sprsound.COMMIT}"
    source = write_set(tmp_path / "server" / top, "current")
    with zipfile.ZipFile(tmp_path / "server" / "archive.zip", "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "server"))
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "server")))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for _ in range(2):
        SPRSound.download(tmp_path / "data", url=f"http://127.0.0.1:{server.server_port}/archive.zip")
    server.shutdown()
    server.server_close()
    assert asked == ["/archive.zip"]
    data = SPR(tmp_path / "data", download=True)
    assert len(data) == 2
    assert data.commit == sprsound.COMMIT
    assert re.fullmatch(r"https://codeload\.github\.com/.*/zip/[0-9a-f]{40}", sprsound.ARCHIVE_URL)


def test_summary_counts_what_no_task_on_events_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SPR(write_set(tmp_path)).summary()
    assert "recordings without events (poor quality), not in this task: 1" in capsys.readouterr().out
    SPR(tmp_path, task="2-1").summary()
    assert "without events" not in capsys.readouterr().out


# ---- real recordings


@pytest.fixture(scope="module")
def mini(shared: Callable[[str], Path]) -> Path:
    return shared("data/sprsound_mini")


@pytest.fixture(scope="module")
def expected(mini: Path) -> dict[str, Any]:
    return json.loads((mini / "expected_counts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def real(mini: Path) -> SPRSound:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in the published files is odd
        return SPRSound(mini, split="all", task="1-2", partial=True)


@pytest.mark.parametrize("split", SPLITS)
def test_real_counts(real: SPRSound, expected: dict[str, Any], split: str) -> None:
    side = real.all_recordings[real.all_recordings["split"] == split]
    events = real.events[real.events["recording"].isin(side["recording"])]
    published = expected["splits"][split]
    assert len(side) == published["recordings"]
    assert side["patient"].nunique() == published["patients"]
    assert {"male": (side["sex"] == "M").sum(), "female": (side["sex"] == "F").sum()} == published[
        "recordings_by_gender"
    ]
    assert side["location"].value_counts().to_dict() == published["recordings_by_location"]
    assert [side["age"].min(), side["age"].max()] == published["age_years"]
    assert side["frames"].sum() == published["samples_total"]
    assert side["record_label"].value_counts().to_dict() == published["records"]
    assert {kind: (events["event"] == kind).sum() for kind in published["events"]} == published["events"]
    assert len(set(real.without_events) & set(side["recording"])) == published["recordings_without_events"]
    length = ((events["end"] - events["start"]) * 1000).round()
    assert [length.min(), length.max(), length.sum()] == [published["event_ms"][key] for key in ("min", "max", "total")]
    unsorted = events.sort_values(["recording", "event_position"]).groupby("recording")["start"]
    assert (~unsorted.apply(lambda start: start.is_monotonic_increasing)).sum() == published[
        "recordings_with_unsorted_events"
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_real_digests(real: SPRSound, expected: dict[str, Any], split: str) -> None:
    side = real.all_recordings[real.all_recordings["split"] == split]
    events = real.events[real.events["recording"].isin(side["recording"])].sort_values(["recording", "event_position"])
    digests = expected["splits"][split]["sha256"]
    assert _sprsound_check.event_ids_digest(events, split) == digests["event_ids"]
    lines = [f"{e.recording},{e.start * 1000:.0f},{e.end * 1000:.0f},{e.event}\n" for e in events.itertuples()]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == digests["events"]
    lines = [f"{r.recording},{r.record_label}\n" for r in side.itertuples()]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == digests["records"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["1-1", "1-2", "2-1", "2-2", "icbhi4/wheeze", "icbhi4/drop", "icbhi2"])
def test_real_class_counts(mini: Path, expected: dict[str, Any], split: Any, task: str) -> None:
    published = expected["splits"][split]
    counts = {"1-2": published["events"], "2-2": published["records"]} | published["tasks"] | published["label_maps"]
    name, _, policy = task.partition("/")
    data = SPR(mini, split=split, task=name, rhonchi_stridor=policy or "wheeze")
    found = dict(zip(data.classes, data.class_counts, strict=True))
    assert found == {key.lower(): count for key, count in counts[task].items() if key != "dropped"}
    assert (data.left_out["split"] == split).sum() == counts[task].get("dropped", 0)


def test_real_samples_are_those_between_the_published_milliseconds(mini: Path, tmp_path: Path) -> None:
    data = SPR(mini, split="inter", sample_rate=8000, fade="none", cache_dir=str(tmp_path))
    for row, cycle in enumerate(data.cycles.itertuples()):
        annotation = json.loads((mini / f"test_json/inter_test_json/{cycle.recording}.json").read_text())
        published = annotation["event_annotation"][cycle.event_position]
        first, last = (int(published[key]) * 8000 // 1000 for key in ("start", "end"))
        with wave.open(str(mini / f"test_wav/{cycle.recording}.wav")) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        np.testing.assert_array_equal(data.waveform(row), samples[first:last] / np.float32(32768))


def test_real_verification(real: SPRSound, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the subset in the place of those of the whole: accepted, and each wrong one is named."""
    splits = {
        split: Counts(side["patients"], tuple(side["records"][label] for label in sprsound.RECORD_LABELS),
                      tuple(side["events"][label] for label in sprsound.EVENTS))
        for split, side in expected["splits"].items()
    }  # fmt: skip
    recordings = {split: side["recordings"] for split, side in expected["splits"].items()}
    monkeypatch.setitem(_sprsound_check.RECORDINGS, 2022, recordings)
    monkeypatch.setattr(_sprsound_check, "SPLITS_2022", splits)
    monkeypatch.setattr(_sprsound_check, "INTER_EVENT_IDS", expected["splits"]["inter"]["sha256"]["event_ids"])
    complete = SPRSound(real.root, split="inter")
    assert not complete.partial
    complete.verify()
    monkeypatch.setitem(splits, "train", splits["train"]._replace(patients=80))
    monkeypatch.setattr(_sprsound_check, "INTER_EVENT_IDS", "0" * 64)
    with pytest.raises(VerificationError, match="in 2 numbers: train patients: expected 80, found 79; digest of"):
        complete.verify()


def test_published_numbers_add_up() -> None:
    for split, counts in _sprsound_check.SPLITS_2022.items():
        assert sum(counts.records) == _sprsound_check.RECORDINGS[2022][split]
    assert [sum(counts.events) for counts in _sprsound_check.SPLITS_2022.values()] == [6656, 1429, 1004]


def test_real_patients(real: SPRSound, expected: dict[str, Any]) -> None:
    patients = {split: set(side["patient"]) for split, side in real.all_recordings.groupby("split")}
    found = {
        f"{a}&{b}": len(patients[a] & patients[b])
        for a, b in (("train", "inter"), ("train", "intra"), ("inter", "intra"))
    }
    assert found == expected["patient_overlap"]
