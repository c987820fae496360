from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from respiro import audio
from respiro.audio import waveforms
from respiro.errors import AudioError


def noise(frames: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(-30000, 30000, (frames, channels), dtype=np.int16)


def wav_bytes(samples: np.ndarray, rate: int = 8000, *, align: int = 2, data_size: int | None = None) -> bytes:
    """A mono 16-bit wav, byte by byte."""
    data = samples.astype("<i2").tobytes()
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, align, 16)
    chunks = fmt + struct.pack("<4sI", b"data", len(data) if data_size is None else data_size) + data
    return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WAVE") + chunks


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "rate", "encoding", "container"),
    [
        ("a.wav", 4000, "PCM_16", "WAV"),
        ("a.wav", 10000, "PCM_16", "WAV"),
        ("a.wav", 44100, "PCM_24", "WAV"),
        ("a.wav", 44100, "PCM_24", "WAVEX"),
        ("a.flac", 4000, "PCM_16", "FLAC"),
        ("a.flac", 44100, "PCM_24", "FLAC"),
        ("a.wav", 16000, "FLOAT", "WAV"),
    ],
    ids=["4k-16bit", "10k-16bit", "44k-24bit", "wave-extensible", "flac-16bit", "flac-24bit", "float"],
)
def test_published_forms_are_read_exactly(tmp_path: Path, name: str, rate: int, encoding: str, container: str) -> None:
    samples = noise(7999)  # odd: the data chunk of a 24-bit wav then needs a pad byte
    written = samples / np.float32(32768) if encoding == "FLOAT" else samples
    soundfile.write(tmp_path / name, written, rate, encoding, format=container)
    assert audio.read_header(tmp_path / name) == (rate, 7999, 1, encoding)
    waveform, rate_read = audio.read(str(tmp_path / name))
    assert rate_read == rate
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform, samples[:, 0] / np.float32(32768))


def padded(samples: np.ndarray) -> bytes:
    """An odd chunk with its pad byte before the data, and an odd data chunk without one at the end of the file."""
    plain = wav_bytes(samples)
    listed = plain[:36] + struct.pack("<4sI", b"LIST", 5) + b"INFOx\0" + plain[36:]
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 24000, 3, 24)
    data = b"".join((256 * int(s)).to_bytes(3, "little", signed=True) for s in samples[:101])
    return listed[:12] + fmt + listed[36:50] + struct.pack("<4sI", b"data", len(data)) + data


@pytest.mark.parametrize(
    ("content", "frames"),
    [
        (wav_bytes(noise(200)[:, 0], align=4), 200),
        (wav_bytes(noise(200)[:, 0], data_size=0xFFFFFFFF), 200),
        (padded(noise(200)[:, 0]), 101),
    ],
    ids=["block-align-4", "streamed", "odd-chunks"],
)
def test_odd_headers_are_read_exactly(tmp_path: Path, content: bytes, frames: int) -> None:
    path = tmp_path / "odd.wav"
    path.write_bytes(content)
    assert audio.read_header(path)[:3] == (8000, frames, 1)
    np.testing.assert_array_equal(audio.read(path)[0], noise(200)[:frames, 0] / np.float32(32768))


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_segment_is_the_slice_of_the_whole(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, noise(20000), 8000, "PCM_16")
    whole = audio.read(tmp_path / name)[0]
    for start, stop in [(0, 1), (5000, 12345), (19999, None), (7, 7)]:
        np.testing.assert_array_equal(audio.read(tmp_path / name, start, stop)[0], whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 101), (101, None)])
def test_a_segment_outside_the_file_is_refused(tmp_path: Path, start: int, stop: int | None) -> None:
    soundfile.write(tmp_path / "a.wav", noise(100), 8000)
    with pytest.raises(ValueError, match="the segment must lie in the 100 samples"):
        audio.read(tmp_path / "a.wav", start, stop)


def test_channels_are_averaged_with_a_warning(tmp_path: Path) -> None:
    samples = noise(500, channels=3)
    soundfile.write(tmp_path / "a.wav", samples, 8000)
    with pytest.warns(UserWarning, match=r"a\.wav: its 3 channels are averaged") as caught:
        waveform, _ = audio.read(tmp_path / "a.wav")
    assert caught[0].filename == __file__
    np.testing.assert_allclose(waveform, samples.mean(axis=1) / 32768, atol=1e-7)
    assert audio.read_header(tmp_path / "a.wav").channels == 3


def flac_bytes(folder: Path) -> bytes:
    soundfile.write(folder / "whole.flac", noise(20000), 8000)
    return (folder / "whole.flac").read_bytes()


def without_length(flac: bytes) -> bytes:
    """The form a FLAC encoder leaves when it writes to a pipe: 36 bits of the stream header are 0."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


WHOLE = wav_bytes(noise(8000)[:, 0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be opened \(No such file or directory\)"),
        (b"", "has 0 bytes"),
        (b"this is no sound\n" * 30, r"is not a sound file that libsndfile can read \(Format not recognised\)"),
        (WHOLE[:30], "is not a sound file that libsndfile can read"),
        (wav_bytes(noise(0)), r"holds no samples \(only a header"),
        (WHOLE[:44], "is truncated, its header promises 16044 bytes and 44 are there"),
        (WHOLE[:9000], "is truncated, its header promises 16044 bytes and 9000 are there"),
        (WHOLE[:-1], "is truncated, its header promises 16044 bytes and 16043 are there"),
    ],
    ids=["missing", "empty", "text", "half-a-header", "no-samples", "header-only", "truncated", "one-byte-short"],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    for use in (audio.read_header, audio.read):
        with pytest.raises(AudioError, match=rf"bad\.wav: {message}.*\. (Fetch|Check)"):
            use(path)


def test_a_folder_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="is not a file"):
        audio.read_header(tmp_path)


def test_a_truncated_flac_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    flac = flac_bytes(tmp_path)
    (tmp_path / "bad.flac").write_bytes(flac[: len(flac) // 2])
    with pytest.raises(AudioError, match=r"bad\.flac: is (damaged or )?truncated"):
        audio.read(tmp_path / "bad.flac")


def test_a_stream_without_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.flac").write_bytes(without_length(flac_bytes(tmp_path)))
    with pytest.raises(AudioError, match=r"bad\.flac: does not state its length"):
        audio.read_header(tmp_path / "bad.flac")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_found(tmp_path: Path, value: float) -> None:
    samples = np.zeros((1000, 2), dtype=np.float32)
    samples[[700, 800], 1] = value
    soundfile.write(tmp_path / "bad.wav", samples, 8000, "FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav: sample 700 is NaN or infinite"):
        audio.decode(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match=r"bad\.wav: sample 700 is NaN or infinite"):
        audio.decode(tmp_path / "bad.wav", start=300)
    assert audio.decode(tmp_path / "bad.wav", stop=700)[0].shape == (700,)


# -------------------------------------------------------------------------------------------------------- resampling


def loop_resample(waveform: np.ndarray, orig_rate: int, new_rate: int) -> np.ndarray:
    """The windowed sinc, sample by sample in float64."""
    divisor = math.gcd(orig_rate, new_rate)
    orig, new = orig_rate // divisor, new_rate // divisor
    base = 0.99 * min(orig, new)
    width = math.ceil(6 * orig / base)
    out = np.zeros(math.ceil(new * len(waveform) / orig))
    for i in range(len(out)):
        frame, phase = divmod(i, new)
        for k in range(-width, width + orig):
            if 0 <= (n := frame * orig + k) < len(waveform):
                t = min(max((k / orig - phase / new) * base, -6.0), 6.0)
                out[i] += waveform[n] * np.sinc(t) * math.cos(math.pi * t / 12) ** 2 * base / orig
    return out


@pytest.mark.parametrize(
    ("orig_rate", "new_rate", "frames"),
    [(4000, 16000, 61), (10000, 16000, 61), (44100, 16000, 450), (8000, 16000, 1), (16000, 4000, 62)],
)
def test_resample_matches_the_formula(orig_rate: int, new_rate: int, frames: int) -> None:
    waveform = noise(frames)[:, 0] / np.float32(32768)
    waveform.setflags(write=False)  # as a view of a store is
    result = audio.resample(waveform, orig_rate, new_rate)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, loop_resample(waveform, orig_rate, new_rate), atol=1e-5)


def test_resample_at_equal_rates_changes_nothing() -> None:
    waveform = noise(10)[:, 0] / np.float32(32768)
    assert audio.resample(waveform, 16000, 16000) is waveform


@pytest.mark.parametrize("frames", [880010, 880112, 882001, 880000])
def test_resample_keeps_the_last_sample_of_long_recordings(frames: int) -> None:
    """In float32, 160 * 880010 / 441 is a whole number; in truth, one more sample begins."""
    expected = math.ceil(160 * frames / 441)
    assert audio.resampled_length(frames, 44100, 16000) == expected
    assert len(audio.resample(np.zeros(frames, dtype=np.float32), 44100, 16000)) == expected


def test_resample_refuses_rates_whose_filter_would_not_fit_into_memory() -> None:
    with pytest.raises(AudioError, match=r"cannot be resampled from 44101 to 16000 Hz.*header"):
        audio.resample(np.zeros(10, dtype=np.float32), 44101, 16000)


@pytest.mark.parametrize("rounding", ["truncate", "milliseconds"])
def test_positions_match_a_loop(rounding: audio.Rounding) -> None:
    milliseconds = np.arange(20_000)
    for rate in (8000, 11025, 16000):
        expected = [int(ms / 1000 * rate) if rounding == "truncate" else int(ms) * rate // 1000 for ms in milliseconds]
        assert audio.positions(milliseconds / 1000, rate, rounding).tolist() == expected


@pytest.mark.parametrize("rates", [(0, 16000), (16000, -1)])
def test_resample_refuses_rates_that_are_none(rates: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="rates must be positive"):
        audio.resample(np.zeros(10, dtype=np.float32), *rates)


def test_torchaudio_is_imported_when_it_is_needed() -> None:
    script = "import sys, respiro.audio; sys.exit('torchaudio' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_torchaudio_that_does_not_fit_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(
        ImportError, match=r"same index: pip install 'torch>=2\.6,<2\.15' 'torchaudio>=2\.6'\. A CPU-only"
    ):
        waveforms._torchaudio()


# ----------------------------------------------------------------------------------------------------- fades, lengths


def loop_fade(waveform: np.ndarray, length: int) -> np.ndarray:
    length = min(length, len(waveform))
    ramp = [i / (length - 1) if length > 1 else 0.0 for i in range(length)]
    faded = [float(sample) for sample in waveform]
    for i, gain in enumerate(ramp):
        faded[i] *= gain
        faded[len(waveform) - length + i] *= 1 - gain
    return np.array(faded)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 12, 20, 30], ids=lambda n: f"fade-{n}")
def test_fading_a_part_is_fading_the_whole_and_cutting(length: int) -> None:
    recording = noise(20)[:, 0] / np.float32(32768)
    before = recording.copy()
    expected = loop_fade(recording, length)
    np.testing.assert_allclose(audio.fade(recording, length), expected, atol=1e-6)
    for begin in range(20):
        for end in range(begin, 21):
            part = audio.fade(recording[begin:end], length, begin=begin, total=20)
            np.testing.assert_allclose(part, expected[begin:end], atol=1e-6)
            assert part.dtype == np.float32
    np.testing.assert_array_equal(recording, before)


@pytest.mark.parametrize(
    ("length", "begin", "total", "message"),
    [(-1, 0, None, "length must not be negative"), (2, -1, None, "do not lie in"), (2, 3, 12, "do not lie in")],
)
def test_fade_refuses_a_part_outside_its_recording(length: int, begin: int, total: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audio.fade(np.zeros(10), length, begin, total)


def loop_fit(waveform: np.ndarray, size: int, pad: str, fade_out: int) -> np.ndarray:
    n, out = len(waveform), np.zeros(size)
    if n > size:
        return waveform[:size]
    for i in range(size):
        if pad == "repeat":
            out[i] = waveform[i % n]
        elif pad == "reflect":
            turn = i % max(2 * n - 2, 1)
            out[i] = waveform[turn if turn < n else 2 * n - 2 - turn]
        elif i < n:
            out[(size - n) // 2 + i] = waveform[i]
    fade_out = min(fade_out, size) if pad == "repeat" else 0
    for i in range(fade_out):
        out[size - fade_out + i] *= 1 - i / (fade_out - 1)
    return out


@pytest.mark.parametrize("pad", ["repeat", "zero", "reflect"])
@pytest.mark.parametrize("frames", [1, 2, 3, 9, 10, 11, 25])
@pytest.mark.parametrize("fade_out", [0, 4, 99])
def test_fit_length_matches_a_loop(pad: audio.Pad, frames: int, fade_out: int) -> None:
    waveform = noise(frames)[:, 0] / np.float32(32768)
    waveform.setflags(write=False)
    fitted = audio.fit_length(waveform, 10, pad, fade_out)
    assert fitted.dtype == np.float32
    assert not np.shares_memory(fitted, waveform)
    np.testing.assert_allclose(fitted, loop_fit(waveform, 10, pad, fade_out), atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "size", "pad", "message"),
    [
        (0, 10, "repeat", "an empty waveform"),
        (5, 0, "repeat", "size must be positive, got 0"),
        (5, 10, "aug", "pad must be one of 'repeat', 'zero', 'reflect', got 'aug'"),
    ],
)
def test_fit_length_refuses(frames: int, size: int, pad: audio.Pad, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audio.fit_length(np.zeros(frames), size, pad)


# ---------------------------------------------------------------------------------------- the chains of both papers


@pytest.mark.parametrize("name", ["r44100", "r4000"])
def test_patch_mix_chain(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Resample the recording, fade the whole of it, cut with int(t * rate), fit to 8 s (Bae et al., 2023)."""
    vectors = np.load(shared("golden/patchmix") / "preprocess.npz")
    soundfile.write(tmp_path / "a.wav", vectors[f"{name}_pcm"], int(vectors[f"{name}_sr"]))
    recording = audio.fade(audio.resample(*audio.read(tmp_path / "a.wav"), 16000), 1000)
    cycles = [recording[int(start * 16000) : int(end * 16000)] for start, end, *_ in vectors[f"{name}_ann"]]
    assert [len(cycle) for cycle in cycles] == vectors[f"{name}_slice_lengths"].tolist()
    for pad in ("repeat", "zero"):
        for row, expected in zip(vectors[f"{name}_{pad}_cycles"], vectors[f"{name}_{pad}"], strict=True):
            np.testing.assert_allclose(audio.fit_length(cycles[row], 128000, pad, 1000), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*channels are averaged")
@pytest.mark.parametrize("number", [0, 1, 2], ids=["44k", "4k-stereo-cut", "16k"])
def test_scl_chain(shared: Callable[[str], Path], tmp_path: Path, number: int) -> None:
    """Cut at the rate of the file, resample, fade the cycle, fit (Moummad & Farrugia, 2023)."""
    vectors = np.load(shared("golden/scl") / "preprocess.npz")
    rate = int(vectors[f"sr_{number}"])
    soundfile.write(tmp_path / "a.wav", vectors[f"raw_{number}"], rate)
    start, stop = (int(vectors[f"{border}_{number}"] * rate) for border in ("onset", "offset"))
    segment, rate = audio.read(tmp_path / "a.wav", start, stop)
    cycle = audio.fade(audio.resample(segment, rate, 16000), 1000)
    assert len(cycle) == vectors[f"cycle_samples_{number}"]
    size = 16000 * int(vectors[f"duration_{number}"])
    np.testing.assert_allclose(audio.fit_length(cycle, size, "repeat", 1000), vectors[f"circular_{number}"], atol=2e-6)
    if f"zero_{number}" in vectors:
        np.testing.assert_allclose(audio.fit_length(cycle, size, "zero"), vectors[f"zero_{number}"], atol=2e-6)
