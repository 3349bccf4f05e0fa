"""One rule for every reader of recordings: whatever is wrong with one of them is its own rejection, by name."""

from __future__ import annotations

import io
import json
import re
import struct
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soxr
from recordings import noise
from shard_crops import RATE, crop, fields, rejections
from tars import encoded, pack

from bestrq2.data import audio
from bestrq2.data.decoders import SoundFileDecoder
from bestrq2.data.hdf5 import _Row
from bestrq2.data.labels import load_labelled
from bestrq2.data.loader import AllRejectedError, fixed_crops
from bestrq2.data.open_source import open_source
from bestrq2.data.places import AudioBytes
from bestrq2.data.prepare.cutting import Options, cut, read_pieces
from bestrq2.data.shards.files import TarFiles
from bestrq2.data.sources import ArraySource, SubsetSource
from bestrq2.data.spans import SpanReader, Task, reason_of, sample_reader
from bestrq2.errors import AudioError, BestRQ2Error
from bestrq2.evaluate.task_probe import embed_split
from bestrq2.inference.embedder import Embeddings
from bestrq2.inference.inputs import mono_blocks

pytestmark = pytest.mark.usefixtures("own_cache")

FILE_READERS = ["folder", "list", "tar", "subset", "mixture", "hub"]


def open_files(reader, root, contents):
    """A source of these files, in the order of their names."""
    root.mkdir()
    names = sorted(contents)
    for name in names:
        (root / name).write_bytes(contents[name])
    if reader == "list":
        (root / "list.csv").write_text("path\n" + "\n".join(names))
        return open_source(root / "list.csv")
    if reader == "tar":
        return open_source(pack(root / "x.tar", [(name, contents[name]) for name in names]))
    if reader == "mixture":
        (root / "mix.yaml").write_text(f"sources: [{', '.join(f'{{data: {name}}}' for name in names)}]")
        return open_source(root / "mix.yaml")
    if reader == "hub":
        pytest.importorskip("datasets")
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = pa.array([{"bytes": contents[name], "path": name} for name in names], kind)
        pq.write_table(pa.table({"audio": rows}), root / "x.parquet")
        return open_source(f"hub:{root / 'x.parquet'}?column=audio")
    source = open_source(root)
    return SubsetSource(source, np.arange(len(source)), "part") if reader == "subset" else source


def open_waveforms(reader, root, waveforms):
    """A source of float32 waveforms [samples] of one length."""
    if reader == "array":
        return ArraySource(waveforms, RATE, "mine")
    if reader == "hdf5":
        h5py = pytest.importorskip("h5py")
        root.mkdir()
        with h5py.File(root / "x.h5", "w") as file:
            file["waveform"], file.attrs["sample_rate"] = np.stack(waveforms), RATE
            file["audio_name"] = np.array([f"{number}" for number in range(len(waveforms))], "S9")
        return open_source(root / "x.h5")
    if reader == "pcm tar":
        contents = {f"{number}.wav": encoded(one, RATE) for number, one in enumerate(waveforms)}
        return open_files("tar", root, contents)
    contents = {f"{number}.wav": encoded(one, RATE, subtype="DOUBLE") for number, one in enumerate(waveforms)}
    return open_files(reader, root, contents)


def problems(source, rate=RATE):
    """Reasons why training, validation, `embed` and `predict`, and `prepare` reject each recording; "" for none."""
    found = []
    for index in range(len(source)):
        name, one = source.describe(index), SubsetSource(source, np.array([index]), "one")
        rejected = []
        config = fields(sampling_rate=rate, mel_max_hz=rate / 2)
        fixed_crops(one, 1, config, seed=0, rejected=rejected)
        try:
            rejected += rejections(one, config)[:1]
        except AllRejectedError:
            with pytest.raises(AudioError, match=f"^{re.escape(name)}: ") as error:
                crop(source, index, rate=rate)
            rejected.append((name, reason_of(error.value, name)))
        assert {path for path, _ in rejected} <= {name}
        options = Options(rate, "wav", 10.0, 0.5, 100.0)
        embedded = sample_reader(source, rate)(Task(index)).problem
        prepared = SpanReader(source, rate, options.span_samples, partial(cut, source, options))(Task(index))
        pieces = [] if prepared.content is None else [piece.reason for piece in read_pieces(prepared.content)]
        found.append([*(reason for _, reason in rejected), embedded, prepared.problem or pieces[0]])
    return found


class CodecError(Exception):
    """An error of a library that knows nothing of this package."""


ERRORS = [MemoryError(), ZeroDivisionError("by zero"), OverflowError(), RecursionError("too deep"), CodecError("a\nb")]
PLACES = [(soxr, "resample"), (audio, "check_usable"), (audio, "array_decoder"), (audio, "open_decoder")]
PLACES += [(SoundFileDecoder, "read"), (SoundFileDecoder, "close"), (_Row, "read"), (TarFiles, "read_into")]


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("reader", [*FILE_READERS, "array", "hdf5", "pcm tar"])
def test_whatever_is_raised_on_a_recording_is_its_rejection(reader, tmp_path, monkeypatch):
    source = open_waveforms(reader, tmp_path / "x", [noise(1, RATE, seed) for seed in range(2)])
    assert problems(source, 8_000) == [["", ""]] * 2
    for error, (owner, name) in zip(ERRORS * 2, PLACES, strict=False):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(error))
            found = problems(source, 8_000)
        if owner is soxr:
            sentence = re.escape(" ".join(f"cannot be used ({type(error).__name__}: {error}".split()).removesuffix(":"))
            assert all(re.fullmatch(rf"{sentence}\)\.", reason) for reasons in found for reason in reasons)
            assert [len(reasons) for reasons in found] == [4, 4]


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_is_raised_on_an_input_of_embed_names_it(error, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(content := encoded(noise(1, RATE), RATE))
    monkeypatch.setattr(soxr, "ResampleStream", failing(error))
    waveform = noise(1, RATE)
    forms = [tmp_path / "a.wav", content, AudioBytes("x", content), io.BytesIO(content), waveform, waveform.tolist()]
    for form in forms:
        with pytest.raises(AudioError, match=rf"^it: .*cannot be used \({type(error).__name__}") as caught:
            list(mono_blocks("it", form, RATE, 8_000))
        assert "\n" not in str(caught.value)


def _spoilt(*values):
    waveform = noise(1, RATE).astype(np.float64)
    waveform[5_000 : 5_000 + len(values)] = values
    return waveform


BAD_FLOATS = {
    "NaN": (_spoilt(np.nan), "holds NaN or infinite samples"),
    "infinite": (_spoilt(-np.inf), "holds NaN or infinite samples"),
    "infinite as float32": (1e300 * _spoilt(), "holds NaN or infinite samples"),
    "overflowing in the resampler": (_spoilt(*[3e38, -3e38] * 99), "holds (samples of 3e.38, far|NaN or infinite)"),
    "integers as floats": (_spoilt(12_000.0, -11_966.0), r"holds samples of 1.2e.04, far outside \[-1, 1\]; divide"),
    "16 times full scale": (_spoilt(-16.1), "holds samples of 16.1, far outside"),
}


@pytest.mark.parametrize("rate", [RATE, 22_050])
@pytest.mark.parametrize("reader", [*FILE_READERS, "array", "hdf5", "embed"])
def test_samples_that_are_no_audio_are_rejected_by_every_reader(reader, rate, tmp_path):
    waveforms = [waveform for waveform, _ in BAD_FLOATS.values()]
    if reader == "embed":
        for waveform, (_, reason) in zip(waveforms, BAD_FLOATS.values(), strict=True):
            for form in (waveform, np.stack([waveform, waveform]), encoded(waveform, RATE, subtype="DOUBLE")):
                with pytest.raises(AudioError, match=f"^it: {reason}"):
                    list(mono_blocks("it", form, RATE, rate))
        return
    *found, good = problems(open_waveforms(reader, tmp_path / "x", [*waveforms, _spoilt(4.0, -4.0)]), rate)
    assert good == ["", ""]
    for reasons, (_, wanted) in zip(found, BAD_FLOATS.values(), strict=True):
        assert all(re.search(wanted, reason) for reason in reasons), reasons


@pytest.mark.parametrize("reader", [*FILE_READERS, "array", "hdf5", "pcm tar"])
def test_nothing_that_a_resampler_makes_of_good_samples_is_used_unchecked(reader, tmp_path, monkeypatch):
    source = open_waveforms(reader, tmp_path / "x", [noise(1, RATE, seed) for seed in range(2)])
    monkeypatch.setattr(soxr, "resample", lambda *_, **__: np.full(8_000, np.nan, np.float32))
    for reasons in problems(source, 8_000):
        assert all("holds NaN or infinite samples" in reason for reason in reasons), reasons


IMPOSSIBLE_RATES = (0, 1, 99, 10_000_001)


@pytest.mark.parametrize("reader", FILE_READERS)
@pytest.mark.parametrize("kind", ["WAV", "AU"])
def test_impossible_rates_are_rejected_by_every_reader(reader, kind, tmp_path):
    """1 Hz would make 513 MB of a file of 32 KB."""
    files = {}
    for number, rate in enumerate(IMPOSSIBLE_RATES):
        content = bytearray(encoded(noise(1, RATE), RATE, kind))
        struct.pack_into("<I" if kind == "WAV" else ">I", content, 24 if kind == "WAV" else 16, rate)
        files[f"{number}.{kind.lower()}"] = bytes(content)
    *found, good = problems(open_files(reader, tmp_path / "x", {**files, "good.wav": encoded(noise(1, RATE), RATE)}))
    assert good == ["", ""]
    for reasons, rate in zip(found, IMPOSSIBLE_RATES, strict=True):
        assert all(f"sampling rate of {rate} Hz" in reason or not rate for reason in reasons), reasons


@pytest.mark.parametrize("codec_error", [None, AudioError("damaged"), ValueError("no header"), MemoryError()])
def test_an_error_of_the_tar_comes_before_what_a_codec_makes_of_it(codec_error):
    content = AudioBytes("x.tar/a.wav", encoded(noise(1, RATE), RATE))

    def read():
        with audio.open_audio(content):
            content.failures.append(BestRQ2Error("x.tar cannot be fetched."))
            if codec_error is not None:
                raise codec_error

    with pytest.raises(BestRQ2Error, match=r"^x\.tar cannot be fetched\.$"):
        read()


class _Samples:
    """Features that read every clip from beginning to end, as an encoder does."""

    name = "samples"

    def embed(self, audio, sampling_rate=None):
        clips = [np.concatenate(list(mono_blocks(str(one), one, RATE, RATE))) for one in audio]
        vectors = np.array([[clip.mean(), clip.std()] for clip in clips], np.float32)
        shape = (len(clips), 1)
        return Embeddings(vectors, vectors[:, None], np.ones(shape, bool), np.zeros(shape))


@pytest.mark.parametrize("reader", ["folder", "tar", "hub"])
def test_a_labelled_clip_that_cannot_be_looked_up_or_read_is_left_out_of_a_probe(reader, tmp_path):
    root, names = tmp_path / "x", [f"{number}.flac" for number in range(8)]
    contents = {name: encoded(noise(1, RATE, seed), RATE, "FLAC") for seed, name in enumerate(names)}
    contents["7.flac"] = b"not audio at all"
    if reader == "folder":
        for number, name in enumerate(names):
            (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            (root / "ab"[number % 2] / name).write_bytes(contents[name])
    elif reader == "tar":
        root.mkdir()
        labels = {f"{number}.json": json.dumps({"label": "ab"[number % 2]}).encode() for number in range(8)}
        pack(root / "x.tar", [*contents.items(), *labels.items()])
    else:
        pytest.importorskip("datasets")
        root.mkdir()
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [{"bytes": None if name == "6.flac" else contents[name], "path": name} for name in names]
        table = pa.table({"audio": pa.array(rows, kind), "label": ["ab"[number % 2] for number in range(8)]})
        pq.write_table(table, root / "x.parquet")
        root = f"hub:{root / 'x.parquet'}?column=audio"
    (task,) = load_labelled(root)
    rows = [embed_split(_Samples(), task, split) for split in ("train", "test")]
    skipped = sorted(reason.split(": ")[1].rpartition("/")[2] for split in rows for reason in split.skipped)
    assert skipped == ["6.flac", "7.flac"][reader != "hub" :]
    assert sum(len(split.features) for split in rows) == 8 - len(skipped)


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile real.wav\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1.0,\nreal.wav\n#EXT-X-ENDLIST\n",
    "m3u": "#EXTM3U\n#EXTINF:1,title\nreal.wav\n",
    "pls": "[playlist]\nFile1=real.wav\nNumberOfEntries=1\nVersion=2\n",
    "cue": 'FILE "real.wav" WAVE\n  TRACK 01 AUDIO\n    INDEX 01 00:00:00\n',
    "xspf": '<?xml version="1.0"?><playlist version="1" xmlns="http://xspf.org/ns/0/"><trackList><track>'
    "<location>real.wav</location></track></trackList></playlist>",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="audio/mp4"><Representation id="0"><BaseURL>real.wav</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "asx": '<asx version="3.0"><entry><ref href="real.wav"/></entry></asx>',
    "ram": "rtsp://127.0.0.1/real.wav\n",
}


@pytest.mark.parametrize("reader", FILE_READERS)
@pytest.mark.parametrize("suffix", ["wav", "mp3", "own"])
def test_playlists_are_refused_whatever_they_are_called(reader, suffix, tmp_path):
    """They name other files, which could be any of this machine."""
    files = {
        f"{number}-{kind}.{'ogg' if suffix == 'own' else suffix}": text.encode()
        for number, (kind, text) in enumerate(PLAYLISTS.items())
    }
    source = open_files(reader, tmp_path / "x", {**files, "real.wav": encoded(noise(1, RATE), RATE)})
    *refused, real = problems(source)
    assert real == ["", ""]
    for name, reasons in zip(files, refused, strict=True):
        assert all(re.search("is not audio|no audio track|no readable codec", reason) for reason in reasons), (
            name,
            reasons,
        )
