"""Preparing a corpus: every sample, hash, count and statistic is what the sources hold; unusable audio is listed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset

import bestrq2
from bestrq2.commands.prepare import prepare
from bestrq2.data.audio import read_audio
from bestrq2.data.prepare import run
from bestrq2.data.prepare.check import check_prepared
from bestrq2.data.prepare.summary import describe_summary, prepared_statistics
from bestrq2.data.sources import ArraySource
from bestrq2.errors import DataError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.progress import Progress
from example_sounds import RATE, scene


def samples(audio: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(audio), dtype="int16")[0]


def of(prepared, name: str) -> dict[float, np.ndarray]:
    """Samples of a recording's clips by start."""
    return {
        entry["start"]: samples(prepared.audio[key])
        for key, entry in prepared.json.items()
        if Path(entry["path"]).name == name
    }


def test_clips_hold_the_audio_of_their_recording_at_their_place(prepared_mixed, mixed):
    names = {Path(entry["path"]).name for entry in prepared_mixed.json.values()}
    assert names == {f"{name}" for name in (
        "a-plain.wav", "b-stereo.flac", "c-music.lame.mp3", "d-phone.m4a", "e-narrow.wav", "k-early.wav", "l-loud.wav",
        "m-pause.wav",
    )}  # fmt: skip
    for entry, audio in zip(prepared_mixed.json.values(), prepared_mixed.audio.values(), strict=True):
        found = samples(audio)
        whole = read_audio(entry["path"], RATE)
        start = round(entry["start"] * RATE)
        expected = np.clip(whole[start : start + len(found)], -1, 32767 / 32768)
        np.testing.assert_allclose(found / 32768, expected, atol=0.51 / 32768 + 1e-4 * ("mp3" in entry["path"]))
        assert entry["duration"] == len(found) / RATE
        assert entry["sampling_rate"] == RATE
        assert entry["original_sampling_rate"] == soundfile_rate(entry["path"])
        assert entry["content_hash"] == hashlib.blake2b(found.tobytes(), digest_size=16).hexdigest()


def soundfile_rate(path: str) -> int:
    return 44_100 if path.endswith("m4a") else soundfile.info(path).samplerate


def test_long_recordings_are_cut_whole_and_short_remainders_left_out(prepared_mixed):
    assert {start: len(clip) for start, clip in of(prepared_mixed, "e-narrow.wav").items()} == {
        0.0: RATE, 1.0: RATE, 2.0: RATE, 3.0: RATE,
    }  # fmt: skip
    assert len(of(prepared_mixed, "b-stereo.flac")[2.0]) == RATE // 2


def test_what_is_not_used_is_listed_with_its_reason(prepared_mixed, mixed):
    rejected = prepared_mixed.rejected
    assert [name for name, _ in rejected] == [
        "f-again.flac", "f-again.flac", "f-again.flac", "g-broken.wav", "h-silent.wav", "h-silent.wav", "i-short.wav",
        "j-cut.m4a", "m-pause.wav", "m-pause.wav",
    ]  # fmt: skip
    reasons = [reason for _, reason in rejected]
    assert reasons[0] == f"has the same content as {mixed / 'a-plain.wav'}."
    assert reasons[1] == f"from 1 s: has the same content as {mixed / 'a-plain.wav'} from 1 s on."
    assert "is not audio" in reasons[3]
    assert reasons[4].startswith("from 0 s: is silent")
    assert reasons[6] == "is too short: 0.25 s, at least 0.5 s are needed."
    assert "is not audio" in reasons[7]
    assert reasons[9].startswith("from 2 s: is silent")


def test_the_summary_counts_what_lies_in_the_folder(prepared_mixed, mixed):
    summary = prepared_mixed.summary
    kept = sum(entry["duration"] for entry in prepared_mixed.json.values())
    assert summary["recordings"] == 13
    assert summary["clips"] == len(prepared_mixed.json)
    assert summary["dropped"] == {"broken": 2, "silent": 4, "too short": 1, "duplicate": 3}
    assert summary["clipped"] == 2
    assert summary["hours_kept"] == pytest.approx(kept / 3600)
    decoded = [len(read_audio(path, RATE)) for path in sorted(mixed.iterdir()) if path.name[0] not in "gj"]
    assert summary["hours_in"] == pytest.approx(sum(decoded) / RATE / 3600)
    assert summary["shards"] == len(prepared_mixed.tars) > 3
    assert summary["bytes"] == sum(tar.stat().st_size for tar in prepared_mixed.tars)
    assert (summary["bestrq2"], summary["format"], summary["sampling_rate"]) == (bestrq2.__version__, "wav", RATE)
    assert summary["made_from"]["segment_seconds"] == 1.0
    assert all(tar.stat().st_size < 0.15e6 + 2 * 2 * RATE for tar in prepared_mixed.tars)


def test_recordings_that_end_early_are_used_and_listed(prepared_mixed, mixed):
    assert prepared_mixed.summary["shorter_than_announced"] == 1
    listed = (prepared_mixed.folder / "shorter.csv").read_text()
    assert listed == f"path,announced,found\n{mixed / 'k-early.wav'},3.000,2.000\n"
    assert sum(len(clip) for clip in of(prepared_mixed, "k-early.wav").values()) == 2 * RATE
    assert describe_summary(prepared_mixed.summary).endswith("; shorter than announced: 1, listed in shorter.csv")


def test_statistics_are_those_of_the_written_clips(prepared_mixed):
    """METHOD section 2 in numpy, in float64."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(1025, 128, 0.0, 8000.0, RATE, norm=None, mel_scale="htk")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    frames = []
    for audio in prepared_mixed.audio.values():
        clip = samples(audio) / 32768
        length = max(len(clip), 15 * 625)  # a patch at least, continued by reflection
        padded = np.pad(clip, (1024, 1024 + length - len(clip)), mode="reflect")
        pieces = np.stack([padded[at : at + 2048] * window for at in range(0, length + 1, 625)])
        power = np.abs(np.fft.rfft(pieces)) ** 2 / (window**2).sum()
        frames.append(10 * np.log10(np.maximum(power @ filters, 1e-10)))
    expected = np.concatenate(frames)
    mean, deviation = prepared_statistics(prepared_mixed.folder, BestRQ2Config())
    assert mean.dtype == deviation.dtype == torch.float32
    np.testing.assert_allclose(mean, expected.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(deviation, expected.std(axis=0), atol=2e-3)


def test_statistics_are_given_only_for_their_own_front_end_and_folder(prepared_mixed, mixed, tmp_path):
    assert prepared_statistics(str(prepared_mixed.folder), BestRQ2Config(hidden_size=192)) is not None
    assert prepared_statistics(prepared_mixed.folder, BestRQ2Config(hop_length=500)) is None
    assert prepared_statistics(prepared_mixed.folder, BestRQ2Config(mel_min_hz=20.0)) is None
    two_windows = BestRQ2Config(short_win_length=400, short_mel_bands=32)
    assert prepared_statistics(prepared_mixed.folder, two_windows) is None
    assert prepared_statistics(mixed, BestRQ2Config()) is None
    assert prepared_statistics("soundworld", BestRQ2Config()) is None
    (tmp_path / "summary.json").write_text('{"made_from": {}, "log_mel": [1]}')
    assert prepared_statistics(tmp_path, BestRQ2Config()) is None
    source = ArraySource(np.zeros((1, 9)), RATE, name=str(prepared_mixed.folder))
    assert prepared_statistics(source, BestRQ2Config()) is not None


def test_16_bit_pcm_at_the_same_rate_comes_out_bit_by_bit(tmp_path, prepared_folder):
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    every_value = rng.permutation(np.arange(-32768, 32768)).astype(np.int16)
    soundfile.write(folder / "every.wav", every_value, RATE)
    soundfile.write(folder / "scene.flac", scene(50_000, 1), RATE, subtype="PCM_16")
    for format in ("wav", "flac"):
        prepare(str(folder), tmp_path / format, format=format, segment_seconds=None, num_workers=1)
        out = prepared_folder(tmp_path / format)
        first, second = map(samples, out.audio.values())
        assert np.array_equal(first, every_value)
        assert np.array_equal(second, soundfile.read(folder / "scene.flac", dtype="int16")[0])
        assert out.summary["clipped"] == 0
        info = soundfile.info(io.BytesIO(next(iter(out.audio.values()))))
        assert (info.format, info.subtype, info.channels, info.samplerate) == (format.upper(), "PCM_16", 1, RATE)


def test_webdataset_reads_the_tars(prepared_mixed):
    dataset = webdataset.WebDataset([str(tar) for tar in prepared_mixed.tars], shardshuffle=False)
    found = {sample["__key__"]: (sample["wav"], json.loads(sample["json"])) for sample in dataset}
    assert found == {key: (prepared_mixed.audio[key], prepared_mixed.json[key]) for key in prepared_mixed.json}


def test_labels_of_a_list_stay_with_every_clip(tmp_path, prepared_folder):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", scene((20_000, 36_000, 60_000)[number], number), RATE)
    listing = tmp_path / "list.csv"
    listing.write_text("path,label\n0.wav,dog\n2.wav,cat\n1.wav,\n")
    prepare(str(listing), tmp_path / "out", segment_seconds=2.0, num_workers=1)
    entries = prepared_folder(tmp_path / "out").json.values()
    assert [(Path(entry["path"]).name, entry["start"], entry.get("label")) for entry in entries] == [
        ("0.wav", 0.0, "dog"),
        ("2.wav", 0.0, "cat"),
        ("2.wav", 2.0, "cat"),
        ("1.wav", 0.0, None),
    ]


@pytest.fixture(scope="module")
def long_file(tmp_path_factory) -> Path:
    """1499.25 s at 4 kHz."""
    path = tmp_path_factory.mktemp("long") / "long.flac"
    waveform = np.concatenate([scene(240_000, seed) for seed in range(25)])
    soundfile.write(path, waveform[: 1499 * 4000 + 1000], 4000, subtype="PCM_16")
    return path


@pytest.mark.parametrize("seconds", [7.0, 900.0, None])
def test_a_file_of_25_minutes_is_cut_without_gap_or_overlap(long_file, tmp_path, prepared_folder, seconds):
    original, rate = soundfile.read(long_file, dtype="int16")
    prepare(str(long_file), tmp_path / "out", rate, "wav", seconds, 1.5, 3.0, num_workers=2)
    out = prepared_folder(tmp_path / "out")
    clips = [samples(audio) for audio in out.audio.values()]
    if seconds == 7.0:
        original = original[: 1498 * rate]  # the last 1.25 s are below the shortest clip
    assert np.array_equal(np.concatenate(clips), original)
    assert [entry["start"] for entry in out.json.values()] == [(seconds or 0) * place for place in range(len(clips))]
    assert {len(clip) for clip in clips[:-1]} <= {round((seconds or 0) * rate)}


def test_odd_names_and_other_sources(tmp_path, prepared_folder):
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "1.wav", scene(RATE, 1), RATE)
    os.rename(folder / "1.wav", os.fsencode(folder) + b"/\xff\n.wav")
    prepare(str(folder), tmp_path / "out", num_workers=1)
    (entry,) = prepared_folder(tmp_path / "out").json.values()
    assert entry["path"] == f"{folder}/\\xff\n.wav"


def test_tars_can_be_prepared_again_and_keep_their_origin(prepared_mixed, prepared_folder, tmp_path):
    settings = {"sampling_rate": 8000, "format": "flac", "segment_seconds": 0.75, "min_seconds": 0.25}
    prepare(str(prepared_mixed.folder), tmp_path / "out", num_workers=2, **settings)
    out = prepared_folder(tmp_path / "out")
    origins = {(entry["path"], entry["start"]): len(samples(out.audio[key])) for key, entry in out.json.items()}
    assert len(origins) == len(out.json)
    for entry in prepared_mixed.json.values():
        parts = [origins.get((entry["path"], entry["start"] + part), 0) for part in (0.0, 0.75)]
        assert parts == [6000, 2000] if entry["duration"] == 1.0 else parts[0] > 0
    assert {entry["original_sampling_rate"] for entry in out.json.values()} == {8000, 16_000, 44_100}
    assert prepared_statistics(tmp_path / "out", BestRQ2Config()) is None
    assert prepared_statistics(tmp_path / "out", BestRQ2Config(sampling_rate=8000, mel_max_hz=4000.0)) is not None


def test_generated_audio_can_be_prepared(tmp_path, prepared_folder, monkeypatch):
    source = ArraySource([scene(30_000, 1), scene(20_000, 2)], RATE, name="generated")
    monkeypatch.setattr(run, "open_source", lambda _: source)
    prepare("generated", tmp_path / "out", num_workers=1)
    assert [entry["path"] for entry in prepared_folder(tmp_path / "out").json.values()] == [
        "generated clip 0",
        "generated clip 1",
    ]


def test_damage_in_the_middle_costs_only_the_segments_it_is_in(tmp_path, prepared_folder):
    soundfile.write(tmp_path / "a.wav", scene(5 * RATE, 1), RATE, subtype="FLOAT")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[-4 * 2 * RATE : -4 * 2 * RATE + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "a.wav").write_bytes(content)
    prepare(str(tmp_path / "a.wav"), tmp_path / "out", segment_seconds=1.0, num_workers=1)
    out = prepared_folder(tmp_path / "out")
    assert [entry["start"] for entry in out.json.values()] == [0.0, 1.0, 2.0, 4.0]
    assert out.rejected == [("a.wav", "from 3 s: holds NaN or infinite samples.")]


def write_tar(path: Path, metadata: list[str]) -> Path:
    """A tar of scenes with JSON beside them that somebody else wrote."""
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(metadata):
            wav = io.BytesIO()
            soundfile.write(wav, scene(RATE, number), RATE, format="WAV", subtype="PCM_16")
            for suffix, content in (("wav", wav.getvalue()), ("json", text.encode())):
                member = tarfile.TarInfo(f"{number:02d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_metadata_of_others_never_ends_the_job(tmp_path, prepared_folder):
    huge = "1" + "0" * 400
    tar = write_tar(
        tmp_path / "foreign.tar",
        [
            '{"start": "00:01", "path": 17, "original_sampling_rate": "44.1k", "note": "kept"}',
            '{"start": null, "path": ["a", "b"], "original_sampling_rate": null, "duration": Infinity}',
            '{"start": NaN, "path": "", "snr": Infinity, "tags": [1, NaN], "kept": {"b": [1, null], "a": 2}}',
            f'{{"start": {huge}, "path": "of/origin.wav", "original_sampling_rate": true}}',
            '{"start": 2, "path": "half \\ud800.wav", "original_sampling_rate": 8000}',
            "[1, 2]",
        ],
    )
    assert prepare(str(tar), tmp_path / "out", num_workers=1)["clips"] == 6
    assert check_prepared(tmp_path / "out", 1)["clips"] == 6
    entries = list(prepared_folder(tmp_path / "out").json.values())
    own = [f"{tar}/{number:02d}.wav" for number in range(6)]
    assert [entry["path"] for entry in entries] == [*own[:3], "of/origin.wav", "half \\ud800.wav", own[5]]
    assert [entry["start"] for entry in entries] == [0.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    assert [entry["original_sampling_rate"] for entry in entries] == [RATE, RATE, RATE, RATE, 8000, RATE]
    assert [entry.get("note") for entry in entries] == ["kept", *[None] * 5]
    assert entries[2]["kept"] == {"b": [1, None], "a": 2}
    assert not {"snr", "tags"} & set(entries[2])
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as made:
        for member in made:
            if member.name.endswith(".json"):
                json.loads(made.extractfile(member).read(), parse_constant=pytest.fail)


class OneByOne(ArraySource):
    """Counts how often it is asked for a name."""

    asked = 0

    def describe(self, index: int) -> str:
        OneByOne.asked += 1
        return super().describe(index)

    def names(self):
        return map(super().describe, range(len(self)))


def test_names_are_read_once_and_together(tmp_path, monkeypatch, capsys):
    source = OneByOne([scene(RATE, number) for number in range(3)], RATE, name="generated")
    monkeypatch.setattr(run, "open_source", lambda _: source)
    monkeypatch.setattr("bestrq2.data.spans._NAMES_SHOWN", 1)
    monkeypatch.setattr("bestrq2.data.spans.Progress", partial(Progress, lines_every_seconds=0))
    monkeypatch.setattr(
        run, "_pack", lambda packing, _: (packing.folder / "rejected.csv").write_text("path,reason\na,b")
    )
    with pytest.raises(DataError, match="not one of 3 recordings"):
        prepare("generated", tmp_path / "out", num_workers=1)
    assert OneByOne.asked == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" files")[0] for line in lines] == [f"prepare reads names: {done}/3" for done in range(3)]
