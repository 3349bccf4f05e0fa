"""The manifest of the packages for pretraining only, beside that of realworld-1.

    python benchmarks/make_realworld_more.py PACKAGES

PACKAGES holds each package of src/bestrq2/realworld/packages.csv and more_packages.csv, unpacked by `dpkg-deb -x` into
a folder of its name. Writes more_recordings.parquet beside those tables: the recordings that can be decoded, are not
silent, last 0.1 s or more, have the bytes of no other recording, and sound like none of the list or the tasks.
"""

from __future__ import annotations

import csv
import re
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from make_realworld import HERE, SHORTEST

from bestrq2.data.audio import AUDIO_SUFFIXES, SILENCE_PEAK
from bestrq2.data.decoders import ArrayDecoder, open_decoder
from bestrq2.data.places import AudioBytes
from bestrq2.errors import BestRQ2Error
from bestrq2.realworld import Recording, load_manifest
from bestrq2.realworld.fetch import read_recording

PACKAGES = [row["package"] for row in csv.DictReader((HERE / "more_packages.csv").open())]
# CC Sampling Plus, the licence of one of its recordings, does not allow selling copies.
LEFT_OUT = "usr/share/gcompris-qt/rcc/instruments.rcc"
SIGNATURES = re.compile(rb"RIFF....WAVE|OggS\x00\x02", re.DOTALL)
BEGINNING = 10
"""Seconds of a recording that are decoded, and compared with other recordings; those of tasks are no longer."""
BANDS, PARTS = np.geomspace(150, 3700, 21), 32
ALIKE, SAME_LENGTH = 0.97, 0.05
"""Correlation of two fingerprints, and relative difference of two durations, from which they are of one sound."""


# --- recordings in packages ---


def found(root: Path, package: str) -> Iterator[Recording]:
    """Recordings of a package: audio files, and the parts of files that hold many."""
    folder = (root / package).resolve()
    for file in sorted(folder.rglob("*")):
        path, suffix = file.relative_to(folder).as_posix(), file.suffix.lower()
        if not file.is_file() or file.is_symlink() or path == LEFT_OUT:
            continue
        if suffix in AUDIO_SUFFIXES:
            yield Recording(package, path, 0, 0, file.stat().st_size, 0.0, "")
        elif suffix in (".zip", ".pk3", ".wz"):
            yield from (Recording(package, path, *one) for one in archived(file))
        elif suffix in (".rcc", ".res"):
            yield from (Recording(package, path, *one) for one in embedded(file))
        elif file.name == "queen.1c":
            yield from (Recording(package, path, *one) for one in lines(file))


Part = tuple[int, int, int, float, str, str, bool]
"""begin, rate, size, seconds, sha256, name and deflated of a `Recording`."""


def archived(file: Path) -> Iterator[Part]:
    """Audio files of a ZIP archive."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        for member in sorted(archive.infolist(), key=lambda one: one.filename):
            if Path(member.filename).suffix.lower() in AUDIO_SUFFIXES:
                opened.seek(member.header_offset + 26)
                begin = member.header_offset + 30 + sum(struct.unpack("<HH", opened.read(4)))
                name = f"{file.stem}/{member.filename}"
                yield begin, 0, member.file_size, 0.0, "", name, member.compress_type == zipfile.ZIP_DEFLATED


def embedded(file: Path) -> Iterator[Part]:
    """WAV and Ogg files anywhere in a file, such as Qt resources."""
    data, at = file.read_bytes(), 0
    while match := SIGNATURES.search(data, at):
        begin = at = match.start()
        if data[at : at + 4] == b"RIFF":
            at += 8 + struct.unpack_from("<I", data, at + 4)[0]
        else:
            last = False
            while data[at : at + 4] == b"OggS" and not last:
                last = bool(data[at + 5] & 4)
                at += 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        name = f"{file.stem}/{begin}{'.wav' if data[begin : begin + 1] == b'R' else '.ogg'}"
        yield begin, 0, at - begin, 0.0, "", name, False


def lines(file: Path) -> Iterator[Part]:
    """Spoken lines of Flight of the Amazon Queen, MP3 files that a table of names and places precedes."""
    data = file.read_bytes()
    for number in range(struct.unpack_from(">H", data, 13)[0]):
        name, _, begin, size = struct.unpack_from(">12sBII", data, 15 + 21 * number)
        if name.rstrip(b"\0").endswith(b".SB"):
            yield begin, 0, size, 0.0, "", f"{name.split(b'.')[0].decode()}.mp3", False


# --- sounds ---


def heard(file: Path, recording: Recording, content: bytes) -> tuple[float, np.ndarray] | None:
    """Duration in seconds and fingerprint; None where it is silent or cannot be decoded."""
    try:
        if recording.rate:
            decoder = ArrayDecoder(np.frombuffer(content, "<i2"), recording.rate)
        else:
            decoder = open_decoder(AudioBytes(Path(recording.place).name, content) if recording.begin else file)
        waveform = decoder.read(0, BEGINNING * decoder.rate)
        seconds = (decoder.frames or decoder.measure()) / decoder.rate
        rate = decoder.rate
        decoder.close()
    except BestRQ2Error as error:
        print("left out:", recording.place, error)
        return None
    if not len(waveform) or np.abs(waveform).max() < SILENCE_PEAK:
        return None
    return round(seconds, 3), fingerprint(waveform, rate)


def fingerprint(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Log energy in 20 bands of 32 equal parts of a sound, without pauses around it; unit norm, for correlations."""
    size = 2 ** round(np.log2(0.03 * rate))
    waveform = np.pad(waveform, (0, max(0, size - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(waveform, size)[:: size // 2]
    band = np.searchsorted(BANDS, np.fft.rfftfreq(size, 1 / rate)) - 1
    members = (band[:, None] == np.arange(len(BANDS) - 1)).astype(np.float32)
    energy = np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32))) ** 2 @ members
    total = energy.sum(1)
    loud = np.flatnonzero(total > 1e-4 * total.max())
    if not len(loud):
        return np.zeros(PARTS * members.shape[1], np.float32)
    energy = energy[loud[0] : loud[-1] + 1]
    level = np.log(energy + 1e-6 * energy.max())
    sums = np.concatenate([np.zeros((1, level.shape[1])), np.cumsum(level, 0)])
    edges = np.linspace(0, len(level), PARTS + 1)
    parts = np.diff([np.interp(edges, np.arange(len(sums)), column) for column in sums.T]).ravel()
    parts -= parts.mean()
    return (parts / max(np.linalg.norm(parts), 1e-9)).astype(np.float32)


class Known:
    """Fingerprints of recordings, to find one of the same sound."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.prints: list[np.ndarray] = []
        self.names: list[str] = []

    def add(self, seconds: float, fingerprint: np.ndarray, name: str) -> None:
        self.seconds.append(seconds)
        self.prints.append(fingerprint)
        self.names.append(name)

    def find(self, seconds: float, fingerprint: np.ndarray) -> str | None:
        """The most similar recording of about the same length, where it is similar enough."""
        near = np.flatnonzero(np.abs(np.array(self.seconds) - seconds) <= SAME_LENGTH * seconds)
        if not len(near):
            return None
        alike = np.stack([self.prints[place] for place in near]) @ fingerprint
        best = int(alike.argmax())
        return self.names[near[best]] if alike[best] >= ALIKE else None


def main(root: Path) -> None:
    base, known = load_manifest(), Known()
    contents = {recording.sha256 for recording in base.recordings}
    for number in sorted(base.tested):
        recording = base.recordings[number]
        file = root / recording.package / recording.path
        if (result := heard(file, recording, read_recording(file, recording))) is not None:
            known.add(*result, recording.place)
    kept, hours, dropped = [], Counter(), Counter()
    for package in PACKAGES:
        for recording in found(root, package):
            file = root / package / recording.path
            content = read_recording(file, recording)
            digest = sha256(content).hexdigest()[:16]
            result = None if digest in contents else heard(file, recording, content)
            contents.add(digest)
            if result is None or result[0] < SHORTEST:
                dropped[package] += 1
            elif (other := known.find(*result)) is not None:
                print("left out:", recording.place, "sounds like", other)
                dropped[package] += 1
            else:
                known.add(*result, recording.place)
                kept.append(replace(recording, seconds=result[0], sha256=digest))
                hours[package] += result[0] / 3600
        print(f"{package}: {sum(one.package == package for one in kept)} recordings, {hours[package]:.2f} h")
    names = ["bytes" if field.name == "size" else field.name for field in fields(Recording)]
    table = pa.table(dict(zip(names, zip(*map(astuple, kept), strict=True), strict=True)))
    pq.write_table(table, HERE / "more_recordings.parquet", compression="zstd", compression_level=19)
    print(f"{len(kept)} recordings, {sum(hours.values()):.2f} h; {sum(dropped.values())} left out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
