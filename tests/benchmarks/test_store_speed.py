"""Speed and memory of the waveform cache on all 6,898 ICBHI cycles (4 kHz copy), against keeping everything in RAM.

Run with ``pytest -m benchmark -s tests/benchmarks/test_store_speed.py``. Each row is a process of
its own, which this file becomes when it is run as a script. "Cold" means that there is no store: the sound files
themselves are in the page cache of the system after the first row. The plain way uses one core, the build all.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

RATE = 16000
SIZE = 8 * RATE
ROUNDS = 3


@pytest.mark.benchmark
def test_store_speed(shared: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segments = read_segments(shared("data/icbhi_4k") / "ICBHI_final_database")
    segments.to_pickle(tmp_path / "segments.pickle")
    tenth = segments["path"].isin(segments["path"].unique()[::10])
    segments[tenth].to_pickle(tmp_path / "tenth.pickle")
    works = {
        "plain: read, resample, cut, pad, keep in RAM": "plain",
        "store: cold build": "build",
        "store: warm open": "warm",
        "store: warm open, then one pass (fade, fit)": "sweep",
        "store: verify": "verify",
    }
    # Interleaved, so that whatever else the machine does meets every row.
    rounds = [{label: measure(work, tmp_path) for label, work in works.items()} for _ in range(ROUNDS)]
    rows = {label: summary([one[label] for one in rounds]) for label in works}
    rows["plain and Kaldi fbank, a TENTH of the recordings"] = summary([measure("plain_fbank", tmp_path)])
    with capsys.disabled():
        print(f"\n{len(segments)} cycles of {segments['path'].nunique()} recordings, {psutil.cpu_count()} cores")
        print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format))


def read_segments(folder: Path) -> pd.DataFrame:
    names = ["start", "end", "crackle", "wheeze"]
    tables = [
        pd.read_csv(path, sep="\t", names=names).assign(path=str(path.with_suffix(".flac")))
        for path in sorted(folder.glob("*.txt"))
    ]
    return pd.concat(tables, ignore_index=True)


def measure(work: str, folder: Path) -> dict[str, float]:
    """Run one of the functions below in a fresh process."""
    if work == "build":
        shutil.rmtree(folder / "waveforms", ignore_errors=True)
    done = subprocess.run([sys.executable, __file__, work, str(folder)], stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    seconds = [one["seconds"] for one in rounds]
    peak = max(one["peak_mib"] for one in rounds)
    return {"best_s": min(seconds), "worst_s": max(seconds), "before_mib": rounds[0]["before_mib"], "peak_mib": peak}


# ------------------------------------------------------------------------------------------------ in a fresh process


def plain(segments: pd.DataFrame, folder: Path, features: bool = False) -> Any:
    import soundfile
    import torch
    import torchaudio

    kept = []
    resamplers: dict[int, torch.nn.Module] = {}
    for path, spans in segments.groupby("path", sort=False):
        samples, rate = soundfile.read(path, dtype="float32")
        if rate not in resamplers:
            resamplers[rate] = torchaudio.transforms.Resample(rate, RATE)
        recording = resamplers[rate](torch.from_numpy(samples))
        for start, end in zip(spans["start"], spans["end"], strict=True):
            cycle = recording[int(start * RATE) : int(end * RATE)]
            clip = cycle.repeat(-(-SIZE // len(cycle)))[None, :SIZE]
            options = {"sample_frequency": RATE, "window_type": "hanning", "num_mel_bins": 128, "htk_compat": True}
            kept.append(torchaudio.compliance.kaldi.fbank(clip, **options) if features else clip.clone())
    return kept


def plain_fbank(segments: pd.DataFrame, folder: Path) -> Any:
    return plain(segments, folder, features=True)


def build(segments: pd.DataFrame, folder: Path) -> Any:
    from respiro.store import WaveformStore

    return WaveformStore.open(segments, RATE, cache_dir=folder, progress=False)


warm = build  # the second time, the store is there


def sweep(segments: pd.DataFrame, folder: Path) -> Any:
    from respiro import audio

    store = build(segments, folder)
    total = 0.0
    for samples, begin, length in store:
        clip = audio.fit_length(audio.fade(samples, RATE // 16, begin, length), SIZE, "repeat", RATE // 16)
        total += float(clip[-1])
    return total


def verify(segments: pd.DataFrame, folder: Path) -> Any:
    build(segments, folder).verify()


@contextmanager
def peak_of_own_memory(result: dict[str, float]) -> Iterator[None]:
    """Watch the memory that no file backs (the pages of a memory map are the system's to drop)."""
    process = psutil.Process()
    done = threading.Event()

    def own() -> float:
        info = process.memory_info()
        return float(info.rss - info.shared) / 2**20

    def watch() -> None:
        while not done.wait(0.01):
            result["peak_mib"] = max(result["peak_mib"], own())

    result["before_mib"] = result["peak_mib"] = own()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        result["peak_mib"] = max(result["peak_mib"], own())
        done.set()
        watcher.join()


def main(work: str, folder: Path) -> None:
    import torch
    import torchaudio  # noqa: F401  # so that the time of the imports is not counted

    import respiro.store  # noqa: F401

    segments = pd.read_pickle(folder / ("tenth.pickle" if work == "plain_fbank" else "segments.pickle"))
    # More torch threads on cores that others use wait for each other: the plain way then took up to 30 times as long,
    # which says nothing about the cache.
    torch.set_num_threads(1)
    result: dict[str, float] = {}
    with peak_of_own_memory(result):
        begun = time.perf_counter()
        kept = globals()[work](segments, folder)
        result["seconds"] = time.perf_counter() - begun
    del kept
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
