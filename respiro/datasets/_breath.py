"""Breath sounds made from scratch: coloured noise, wheezes, crackles, heart beats, and the devices that hear them.

A cartoon of the physics, not a model of any lung: enough to tell the classes apart by eye and ear, with the nuisances
(persons, places, devices, heart, noise) that make it work. Durations and frequencies follow the usual definitions:
wheezes last over 80 ms between 100 and 1000 Hz, rhonchi lie below about 200 Hz, crackles last 5 to 20 ms (Sovijarvi
et al., Eur. Respir. Rev. 10, 2000, 586-590).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float64]

#: Sounds are made at this rate (Hz) and brought to the device's own: chest sounds end well below 4 kHz.
RATE = 8000


@dataclass(frozen=True)
class Person:
    """What stays the same in all recordings of one person."""

    pitch: float  #: scales the frequencies; 1 = grown man
    period: float  #: mean length of a breath, s
    pulse: float  #: heart beats a second
    crackle: str  #: "fine" or "coarse"


class Breath(NamedTuple):
    """One breath: when it happens (s), and the names of the adventitious sounds in it."""

    start: float
    end: float
    sounds: tuple[str, ...] = ()


class Tone(NamedTuple):
    """Range of a continuous adventitious sound: frequency (Hz), duration (s), amplitudes of its harmonics."""

    frequency: tuple[float, float]
    duration: tuple[float, float]
    harmonics: tuple[float, ...]
    level: tuple[float, float] = (-4.0, 10.0)  #: dB relative to the breath noise


class Bursts(NamedTuple):
    """Range of a discontinuous adventitious sound: frequency (Hz), duration (s), number in a breath."""

    frequency: tuple[float, float]
    duration: tuple[float, float]
    number: tuple[int, int]
    level: tuple[float, float] = (10.0, 24.0)  #: dB, first peak relative to the breath noise


SOUNDS: dict[str, Tone | Bursts] = {
    "wheeze": Tone((180, 800), (0.15, 0.7), (1.0, 0.4, 0.15)),
    "rhonchus": Tone((100, 190), (0.25, 0.8), (1.0, 0.7, 0.5, 0.3)),
    "stridor": Tone((500, 950), (0.3, 0.9), (1.0, 0.6, 0.4), (2.0, 12.0)),
    "fine": Bursts((550, 1000), (0.005, 0.010), (6, 14)),
    "coarse": Bursts((180, 450), (0.010, 0.020), (4, 9)),
}


@dataclass(frozen=True)
class Device:
    """A stethoscope or microphone and the form of its files."""

    name: str
    sample_rate: int  #: Hz
    bits: int
    band: tuple[float, float]  #: corner frequencies, Hz
    level: float  #: RMS of a recording, dB of full scale
    floor: float  #: RMS of its own noise, dB of full scale
    mode: str = "sc"  #: "mc": hears several places at once
    offset: float = 0.0  #: constant added by the converter


def draw_person(age: float, sex: str, rng: np.random.Generator) -> Person:
    """Draw a person; children and women sound a little higher, children breathe faster."""
    youth = max(0.0, 1 - age / 16)
    pitch = (1 + 0.25 * youth) * (1.08 if sex == "F" else 1.0) * rng.uniform(0.93, 1.07)
    period = rng.uniform(1.8, 2.8) - 0.8 * youth
    return Person(pitch, period, rng.uniform(1.0, 1.5) + 0.5 * youth, str(rng.choice(["fine", "coarse"])))


def draw_borders(count: int, person: Person, rng: np.random.Generator) -> Signal:
    """Draw where *count* contiguous breaths begin and end: ``(count + 1,)`` seconds, in whole milliseconds."""
    lengths = person.period * rng.uniform(0.8, 1.2, count)
    borders: Signal = np.round(rng.uniform(0.1, 0.6) + np.concatenate([[0.0], np.cumsum(lengths)]), 3)
    return borders


def noise(samples: int, band: tuple[float, float], rng: np.random.Generator) -> Signal:
    """Draw noise of RMS 1 that falls by 12 dB an octave outside *band* (Hz): ``(samples,)``."""
    bins = samples // 2 + 1
    spectrum = (rng.standard_normal(bins) + 1j * rng.standard_normal(bins)) * response(samples, band)
    shaped: Signal = np.fft.irfft(spectrum, samples)
    shaped /= shaped.std()
    return shaped


def response(samples: int, band: tuple[float, float]) -> Signal:
    """Amplitude response at the rfft bins of *samples* at ``RATE``: second order at both corners of *band* (Hz)."""
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    low, high = band
    gain: Signal = frequency**2 / (frequency**2 + low**2) / (1 + (frequency / high) ** 2)
    return gain


def breath_noise(breaths: list[Breath], samples: int, brightness: float, rng: np.random.Generator) -> Signal:
    """Breath noise: a louder and brighter inspiration, expiration, a pause; RMS about 1 at its peaks."""
    inspiration, expiration = np.zeros(samples), np.zeros(samples)
    for start, end, _ in breaths:
        share_in, share_out = rng.uniform(0.36, 0.46), rng.uniform(0.3, 0.4)
        loudness = rng.uniform(0.7, 1.2)
        _add(inspiration, start, loudness * _swell(share_in * (end - start)))
        pause = 0.03 * (end - start)
        _add(expiration, start + share_in * (end - start) + pause, 0.6 * loudness * _swell(share_out * (end - start)))
    bright = noise(samples, (90, 420 * brightness), rng)
    dark = noise(samples, (80, 280 * brightness), rng)
    return bright * inspiration + dark * expiration + 0.06 * noise(samples, (60, 600), rng)


def adventitious(breaths: list[Breath], samples: int, person: Person, rng: np.random.Generator) -> Signal:
    """All wheezes, rhonchi, stridors and crackles of *breaths*, from faint to clear: ``(samples,)``."""
    signal = np.zeros(samples)
    for breath in breaths:
        for name in breath.sounds:
            sound = SOUNDS[name]
            loudness = 10 ** (rng.uniform(*sound.level) / 20)
            if isinstance(sound, Tone):
                pieces = _tones(sound, breath, person, rng)
            else:
                pieces = _train(sound, breath, person, rng)
            for start, wave in pieces:
                _add(signal, start, loudness * wave)
    return signal


def tone(sound: Tone, longest: float, pitch: float, rng: np.random.Generator) -> Signal:
    """Draw one drifting tone with harmonics, of amplitude 1 and at most *longest* seconds."""
    duration = min(rng.uniform(*sound.duration), longest)
    time = np.arange(round(duration * RATE)) / RATE
    centre = np.exp(rng.uniform(*np.log(sound.frequency))) * pitch
    drift = rng.uniform(-0.25, 0.25) * (time / duration - 0.5) + 0.02 * np.sin(2 * np.pi * rng.uniform(3, 6) * time)
    frequency = np.clip(centre * (1 + drift), 100, 1000)
    phase = 2 * np.pi * np.cumsum(frequency) / RATE + rng.uniform(0, 2 * np.pi)
    ramps: Signal = np.minimum(1, np.minimum(time, duration - time) / 0.03)
    return ramps * sum(share * np.sin(k * phase) for k, share in enumerate(sound.harmonics, 1))


def burst(sound: Bursts, pitch: float, rng: np.random.Generator) -> Signal:
    """Draw one crackle: a sinusoid that starts at once and is damped to 1/150 at its end; peak 1."""
    duration = rng.uniform(*sound.duration)
    time = np.arange(round(duration * RATE)) / RATE
    wave: Signal = np.exp(-5 * time / duration) * np.sin(2 * np.pi * rng.uniform(*sound.frequency) * pitch * time)
    wave /= np.abs(wave).max()
    return wave


def heart(samples: int, pulse: float, rng: np.random.Generator) -> Signal:
    """Heart beats heard through the chest: two low thumps a beat, of amplitude 1."""
    signal = np.zeros(samples)
    seconds = samples / RATE
    for beat in np.arange(rng.uniform(0, 1 / pulse), seconds, 1 / pulse):
        start = beat + rng.normal(0, 0.015)
        for delay, frequency, loudness in ((0.0, 45, 1.0), (0.32 / pulse, 60, 0.6)):
            time = np.arange(round(0.12 * RATE)) / RATE
            thump = np.sin(2 * np.pi * frequency * time) * np.sin(np.pi * time / 0.12) ** 2
            _add(signal, max(0.0, start + delay), loudness * thump)
    return signal


def handling(samples: int, number: int, rng: np.random.Generator) -> Signal:
    """Rubs and knocks of the hand that holds the device: broad swells of noise, about RMS 1 at their peaks."""
    envelope = np.zeros(samples)
    for _ in range(number):
        length = rng.uniform(0.05, 0.5)
        _add(envelope, rng.uniform(0, max(0.0, samples / RATE - length)), rng.uniform(0.4, 1) * _swell(length))
    return envelope * noise(samples, (60, 1500), rng)


def record(signal: Signal, device: Device, rng: np.random.Generator) -> NDArray[np.int32]:
    """Hear *signal* (at ``RATE``) with *device*: its band, rate, level, noise and converter, clipped at full scale.

    The number of samples times ``device.sample_rate / RATE`` must be whole.
    """
    samples = len(signal) * device.sample_rate // RATE
    spectrum = np.fft.rfft(signal) * response(len(signal), device.band)
    heard = np.fft.irfft(spectrum, samples)  # pads or cuts the spectrum: an exact change of rate
    heard *= 10 ** ((device.level + rng.uniform(-4, 4)) / 20) / heard.std()
    heard += 10 ** (device.floor / 20) * rng.standard_normal(samples) + device.offset
    full = 2 ** (device.bits - 1)
    quantised: NDArray[np.int32] = np.clip(np.round(heard * full), -full, full - 1).astype(np.int32)
    return quantised


def through_chest(
    breaths: list[Breath], events: Signal, person: Person, rng: np.random.Generator, brightness: float = 1.0
) -> Signal:
    """Mix what is heard at one place: breath noise, *events*, heart beats and handling noise.

    Args:
        breaths: The breaths to be heard.
        events: Their adventitious sounds: see :func:`adventitious`.
        person: Whose chest it is.
        rng: Draws everything that differs from place to place.
        brightness: Scales the upper end of the breath noise; about 2 at the trachea.

    Shape:
        events and result ``(samples,)`` at ``RATE``.
    """
    samples = len(events)
    mixed = breath_noise(breaths, samples, brightness * person.pitch, rng)
    mixed += rng.uniform(0.6, 1.1) * events
    mixed += rng.uniform(0.3, 1.5) * heart(samples, person.pulse, rng)
    mixed += rng.uniform(0.5, 1.5) * handling(samples, int(rng.integers(0, 4)), rng)
    return mixed


def deal(shares: Sequence[float], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return *count* labels in random order, as many of each as its share says (largest remainders are rounded up).

    Dealing rather than drawing is what makes the smallest sets hold every class.
    """
    exact = np.asarray(shares) * count
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: count - whole.sum()]] += 1
    return rng.permutation(np.repeat(np.arange(len(whole)), whole))


def whole_samples(seconds: float) -> int:
    """Round *seconds* up to quarters and return samples at ``RATE``: a whole number at every device's rate, too."""
    return int(np.ceil(seconds * 4)) * RATE // 4


def write_wav(path: Path, samples: NDArray[np.int32], device: Device, block_align: int | None = None) -> None:
    """Write mono PCM with the plain 44-byte header; *block_align* is what SPRSound's headers get wrong."""
    width = device.bits // 8
    data = samples.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    data += b"\0" * (len(data) % 2)
    rate = device.sample_rate
    form = struct.pack("<HHIIHH", 1, 1, rate, rate * width, block_align or width, device.bits)
    size = struct.pack("<I", 36 + len(data)), struct.pack("<I", len(samples) * width)
    path.write_bytes(b"RIFF" + size[0] + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + size[1] + data)


def _tones(sound: Tone, breath: Breath, person: Person, rng: np.random.Generator) -> Iterator[tuple[float, Signal]]:
    for _ in range(rng.integers(1, 3)):
        wave = tone(sound, 0.6 * (breath.end - breath.start), person.pitch, rng)
        airflow_ends = breath.start + 0.9 * (breath.end - breath.start)  # no air, no wheeze
        yield rng.uniform(breath.start, airflow_ends - len(wave) / RATE), wave


def _train(sound: Bursts, breath: Breath, person: Person, rng: np.random.Generator) -> Iterator[tuple[float, Signal]]:
    # Crackles come in trains, in one phase of the breath.
    length = breath.end - breath.start
    begin = breath.start + length * rng.choice([0.05, 0.25, 0.5])
    for _ in range(rng.integers(sound.number[0], sound.number[1] + 1)):
        yield begin + rng.uniform(0, 0.35) * length, rng.uniform(0.6, 1.0) * burst(sound, person.pitch, rng)


def _swell(seconds: float) -> Signal:
    samples = round(seconds * RATE)
    swell: Signal = np.sin(np.pi * (np.arange(samples) + 0.5) / samples) ** 0.7
    return swell


def _add(signal: Signal, start: float, wave: Signal) -> None:
    begin = round(start * RATE)
    part = wave[: max(0, len(signal) - begin)]
    signal[begin : begin + len(part)] += part
