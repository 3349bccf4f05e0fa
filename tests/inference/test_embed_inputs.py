"""Audio in every form an embedder takes, and one sentence for each that it cannot."""

from __future__ import annotations

import gzip
import io
import os
from array import array
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch

from bestrq2 import Embedder
from bestrq2.errors import AudioError, ConfigError
from bestrq2.inference import inputs
from bestrq2.inference.inputs import mono_blocks
from example_sounds import RATE, scene


@pytest.fixture(scope="module")
def embedder(tiny_encoder) -> Embedder:
    return Embedder(tiny_encoder(max_seconds=2.5), "cpu")


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance)


def wav_bytes(waveform: np.ndarray, rate: int = RATE, subtype: str = "FLOAT", format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform.T, rate, subtype=subtype, format=format)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int8, np.int16, np.int32])
def test_samples_of_any_type_are_the_same_sound(embedder, dtype):
    whole = np.round(scene(30_000) * 127) / 128
    samples = whole.astype(dtype)
    if np.issubdtype(dtype, np.integer):
        samples = (whole * 2.0 ** (8 * np.dtype(dtype).itemsize - 1)).astype(dtype)
    close(embedder.embed(samples).frames, embedder.embed(whole.astype(np.float32)).frames)


@pytest.mark.parametrize("extreme", [np.iinfo(np.int16).min, np.iinfo(np.int16).max])
def test_the_ends_of_integer_ranges_do_not_overflow(embedder, extreme):
    samples = (32767 * scene(30_000)).astype(np.int16)
    samples[5_000:5_100] = extreme
    both = np.stack([samples, samples])
    expected = embedder.embed(samples.astype(np.float64) / 32768).frames
    close(embedder.embed(samples).frames, expected)
    close(embedder.embed(both).frames, expected)
    unsigned = (samples // 256 + 128).astype(np.uint8)
    close(embedder.embed(unsigned).frames, embedder.embed((samples // 256) / 128.0).frames)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_type_with_or_without_gradient(embedder, dtype):
    clip = torch.from_numpy(scene(30_000)).to(dtype)
    close(embedder.embed(clip.requires_grad_()).frames, embedder.embed(clip.detach().float().numpy()).frames)


def test_open_files_and_bytes_give_what_their_path_gives(embedder, tmp_path):
    content = wav_bytes(scene(60_000), 44_100, "PCM_16")
    path = tmp_path / "clip.wav"
    path.write_bytes(content)
    expected = embedder.embed(path).frames
    memory = io.BytesIO(content)
    memory.seek(1_000)
    with path.open("rb") as file, path.open("rb", buffering=0) as raw, gzip.open(tmp_path / "clip.gz", "wb") as packed:
        packed.write(content)
        file.seek(100)
        mixed = embedder.embed([file, raw, memory, content, memoryview(content), str(path)])
        assert (file.tell(), memory.tell()) == (100, 1_000)
        path.unlink()
        assert np.array_equal(embedder.embed(file).frames, expected)  # deleted, but still open
    for frames in mixed.frames:
        close(frames, expected[0])
    with gzip.open(tmp_path / "clip.gz") as unpacked:
        close(embedder.embed(unpacked).frames, expected)


def test_objects_of_other_libraries_that_hold_samples(embedder):
    pandas = pytest.importorskip("pandas")
    samples = (32768 * scene(30_000)).astype(np.int16)
    expected = embedder.embed(samples).clip
    strided = np.stack([samples, samples], axis=1)[:, 0]
    for same in (
        pandas.Series(samples),
        memoryview(samples),
        array("h", samples),
        list(samples),
        strided,
        samples.byteswap().view(">i2"),
    ):
        close(embedder.embed(same).clip, expected)


def test_audio_of_datasets_carries_its_rate(embedder, tmp_path):
    samples = (32768 * scene(60_000)).astype(np.int16)
    content = wav_bytes(samples, 44_100, "PCM_16")
    (tmp_path / "clip.wav").write_bytes(content)
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(samples / 32768)[None], sample_rate=44_100)
    )
    items = [
        {"path": None, "array": samples, "sampling_rate": 44_100},
        {"raw": torch.from_numpy(samples), "sampling_rate": torch.tensor(44_100)},
        {"bytes": content, "path": "clip.wav"},
        {"bytes": None, "path": str(tmp_path / "clip.wav")},
        decoder,
    ]
    expected = embedder.embed(samples, 44_100).clip
    close(embedder.embed(items, 8_000).clip, np.repeat(expected, len(items), axis=0))
    close(embedder.embed(items[0]).clip, expected)


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_compressed_files_in_memory(embedder, format):
    subtype = {"FLAC": "PCM_16", "OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}[format]
    content = wav_bytes(scene(60_000), RATE, subtype, format)
    decoded, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    found = embedder.embed(io.BytesIO(content), 8_000)
    tolerance = 0.2 if format == "MP3" else 1e-5  # another decoder
    close(found.clip, embedder.embed(decoded, rate).clip, tolerance)


@pytest.mark.parametrize("rate", [8_000, 22_050.0, 22_050.5, Fraction(44_100), np.int64(48_000), np.float32(96_000)])
@pytest.mark.parametrize("block", [1_000, 1 << 22])
def test_blocks_are_the_audio_resampled_in_one_go(monkeypatch, rate, block):
    monkeypatch.setattr(inputs, "_BLOCK_SAMPLES", block)
    stereo = np.stack([scene(50_000), scene(50_000, 1)])
    found = np.concatenate(list(mono_blocks("audio", stereo, float(rate), RATE)))
    expected = soxr.resample(stereo.mean(axis=0), float(rate), RATE, quality="HQ")
    assert np.array_equal(found, expected)
    assert abs(len(found) - 50_000 * RATE / rate) < 1


@pytest.mark.parametrize("rate", [RATE, 48_000, 8_000.0, 10_000_000])
def test_one_sample_is_enough(embedder, rate):
    embeddings = embedder.embed(np.array([0.25], np.float32), rate)
    assert embeddings.frames.shape == (1, 1, 32)
    assert np.isfinite(embeddings.frames).all()


def test_a_header_that_promises_a_little_too_much_does_no_harm(monkeypatch):
    waveform = scene(100_000)
    monkeypatch.setattr(inputs.array_decoder(waveform, RATE).__class__, "measure", lambda _: 100_700)
    assert np.array_equal(np.concatenate(list(mono_blocks("audio", waveform, RATE, RATE))), waveform)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("16000", r"must be a number of Hz, got '16000' \(str\)"),
        (True, r"must be a number of Hz, got True \(bool\)"),
        ([16_000], r"must be a number of Hz, got \[16000\] \(list\)"),
        (16_000j, "must be a number of Hz"),
        (0, "must be from 100 to 10000000 Hz, got 0"),
        (-16_000, "must be from 100 to 10000000 Hz, got -16000"),
        (44.1, "must be from 100 to 10000000 Hz, got 44.1"),
        (float("nan"), "must be from 100 to 10000000 Hz, got nan"),
        (float("inf"), "must be from 100 to 10000000 Hz, got inf"),
        (10**400, "must be from 100 to 10000000 Hz, got 1000"),
    ],
)
def test_impossible_rates_are_refused(embedder, rate, message):
    with pytest.raises(ConfigError, match=f"^sampling_rate {message}"):
        embedder.embed(scene(20_000), rate)


LOUD = np.float64(1e300) * scene(1_000)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros(0, np.float32), "is empty"),
        (np.zeros((2, 0)), "is empty"),
        ([], "is empty"),
        (np.array([0.1, np.nan], np.float32), "NaN or infinite"),
        (np.array([0.1, -np.inf]), "NaN or infinite"),
        (np.array([[0.1, np.inf], [0.1, -np.inf]]), "NaN or infinite"),
        (LOUD, "NaN or infinite"),
        (np.float32(32768) * scene(1_000), r"holds samples of \d+.*far outside \[-1, 1\]; divide"),
        ((1000 * scene(1_000)).astype(np.int64), "int64 have no defined full scale"),
        (scene(100) > 0, "values of type bool, expected floats"),
        (scene(100) + 1j, "values of type complex"),
        (np.array(["a.wav", "b.wav"]), "values of type <U5"),
        (np.array([None, 1]), "values of type object"),
        (np.zeros((1_000, 2)), "more channels than samples"),
        (np.zeros((100, 1_000)), r"shape \[100, 1000\].*pass a batch as list\(batch\)"),
        (np.zeros((2, 2, 1_000)), r"shape \[2, 2, 1000\] is not audio"),
        (np.float32(0.5), "a float32 is not audio"),
        (None, "a NoneType is not audio"),
        (7, "a int is not audio"),
        ([0.1, "x"], "values of type <U"),
        ([1, 200, -3], "int64 have no defined full scale"),
        (np.array(0.5), r"shape \[\] is not audio"),
        ({"array": scene(100)}, "is a dictionary with the keys 'array'; expected 'array' and 'sampling_rate', or"),
        ({"array": scene(100), "sampling_rate": "16k"}, "sampling_rate must be a number of Hz, got '16k'"),
        ({"array": scene(100), "sampling_rate": 16}, "sampling_rate must be from 100 to"),
        ({"array": np.array([0.1, np.nan]), "sampling_rate": RATE}, "NaN or infinite"),
        ({"bytes": None, "path": "/no/such/file.wav"}, "/no/such/file.wav: the file does not exist"),
        ([[0.1, 0.2], [0.3]], "is not a waveform"),
        (torch.ones(3, 4).to_sparse(), "is not a waveform"),
        (b"", r"empty \(0 bytes\)"),
        (b"not audio at all\n" * 100, "is not audio"),
        (os.urandom(5_000), "is not audio|no audio"),
        (io.BytesIO(), r"empty \(0 bytes\)"),
        (io.StringIO("text"), "opened as text; open it in mode 'rb'"),
        ("/no/such/file.wav", "does not exist"),
        ("", "is a folder"),
        ("a\0b", "cannot be opened"),
    ],
)
def test_unusable_audio_is_refused_and_named(embedder, item, message):
    name = str(Path(item)) if isinstance(item, str) else r"audio\[1\]"
    with pytest.raises(AudioError, match=f"^{name}: .*({message})") as caught:
        embedder.embed([scene(100), item])
    assert str(caught.value).count("audio[1]") <= 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_samples_at_the_ends_of_what_is_accepted_give_finite_embeddings(tiny_encoder, dtype):
    embedder = Embedder(tiny_encoder(max_seconds=2.5), "cpu", dtype=dtype)
    sound = scene(20_000)
    square = np.where(np.arange(20_000) // 40 % 2, 16.0, -16.0)
    clips = [square, 1e-30 * sound, 1e-45 * sound, np.zeros(20_000), np.full(20_000, 16.0), 16 * np.eye(1, 20_000)[0]]
    for rate in (RATE, 44_100):
        found = embedder.embed(clips, rate)
        assert np.isfinite(found.clip).all()
        assert np.isfinite(found.frames[found.frame_mask]).all()


def test_what_is_no_list_is_refused(embedder):
    for nothing in ([], (), iter(())):
        with pytest.raises(AudioError, match="there is no audio to embed: the list is empty"):
            embedder.embed(nothing)
    for item in (None, 3, 0.5):
        with pytest.raises(AudioError, match="is not audio; give a waveform, a path, or a file"):
            embedder.embed(item)
    closed = io.BytesIO(b"RIFF")
    closed.close()
    with pytest.raises(AudioError, match="closed file"):
        embedder.embed(closed)


def test_files_that_are_no_audio_are_refused_by_name(embedder, tmp_path):
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match=message) as caught:
            embedder.embed([scene(100), tmp_path / name])
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert str(caught.value).count(name) == 1

    sound = wav_bytes(scene(20_000))
    refused("notes.wav", b"not audio at all\n" * 100, "is not audio")
    refused("notes.au", b"not audio at all\n" * 100, "is not audio")  # raw samples, if one went by the name
    refused("empty.wav", b"", "empty")
    refused("none.wav", sound[:44], "is not audio")
    refused(
        "slow.wav",
        sound[:24] + (5).to_bytes(4, "little") + sound[28:],
        "sampling rate of 5 Hz is impossible, expected 100 to",
    )
    refused("fast.wav", sound[:24] + (2**31 - 1).to_bytes(4, "little") + sound[28:], "sampling rate of 2147483647 Hz")
    refused("nan.wav", wav_bytes(np.full(1_000, np.nan)), "NaN or infinite")
    refused("loud.wav", wav_bytes(np.full(1_000, 1e30, np.float32)), r"holds samples of 1e\+30")
    with pytest.raises(AudioError, match="is a folder"):
        embedder.embed(tmp_path)


def test_a_file_deleted_during_the_run_is_named(tiny_encoder, tmp_path):
    embedder = Embedder(tiny_encoder(max_seconds=2.5), "cpu", batch_seconds=2.5)
    paths = [tmp_path / f"{index}.wav" for index in range(40)]
    for path in paths:
        path.write_bytes(wav_bytes(scene(20_000)))
    with embedder.model.register_forward_pre_hook(lambda *_: paths[-1].unlink(missing_ok=True)):
        with pytest.raises(AudioError, match=r"39\.wav: the file does not exist"):
            embedder.embed(paths)
        # One that is being read is read to its end.
        paths[-1].write_bytes(wav_bytes(scene(400_000)))
        assert embedder.embed(paths[-1]).frames.shape == (1, 40, 32)
        assert not paths[-1].exists()


def test_lists_of_paths_are_decoded_a_few_at_a_time(tiny_encoder, tmp_path, monkeypatch):
    path = tmp_path / "clip.wav"
    path.write_bytes(wav_bytes(scene(20_000)))
    small = Embedder(tiny_encoder(max_seconds=2.5), "cpu", batch_seconds=5.0)
    decoded, seen = [], []
    original = inputs.open_audio
    monkeypatch.setattr(inputs, "open_audio", lambda place: decoded.append(place) or original(place))
    with small.model.register_forward_pre_hook(lambda *_: seen.append(len(decoded))):
        embeddings = small.embed([path] * 200)
    assert np.ptp(embeddings.clip, axis=0).max() < 1e-6
    assert seen[0] == 8 * 80_000 // 20_000  # eight batches
    assert len(decoded) == 200
