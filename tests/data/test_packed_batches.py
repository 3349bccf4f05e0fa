"""Batches of packed rows: every second once, the same whatever makes them, and nothing else in a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recordings import announce, noise, write
from shard_crops import RATE, clips, fields, loader

from bestrq2.data.audio import read_audio
from bestrq2.data.batch import fixed_batches
from bestrq2.data.loader import AllRejectedError, end_workers, training_rows
from bestrq2.data.mixture import MixtureSource
from bestrq2.data.open_source import open_source
from bestrq2.data.sources import ArraySource, FileSource
from bestrq2.data.splits import BalancedSource
from bestrq2.errors import DataError
from bestrq2.model.log_mel import LogMel

SCALE = 2**21


def conformer(max_seconds=1.0):
    masks = {"mask_ratio": [0.6, 0.6], "mask_fill": "noise", "input_normalization": "clip"}
    kind = {"encoder_type": "conformer", "objective": "one_stage", "position_embedding": "relative"}
    return fields(max_seconds, patch_size=(128, 4), **kind, **masks)


def epoch(source, config, number=0, rows=8):
    """Batches that hold all rows of one epoch, and no other."""
    length = len(training_rows(source, config, 5))
    step = next(size for size in range(min(rows, length), 0, -1) if length % size == 0)
    count = length // step
    return list(loader(source, steps=(number + 1) * count, config=config, rows=step, start_step=number * count))


def ramp(recording, samples):
    """A waveform whose every sample tells the recording and its place; 2^24 values are exact in float32."""
    return ((np.arange(samples) + recording * 2**21) / SCALE).astype(np.float32)


def test_each_second_of_an_uneven_corpus_is_heard_once_an_epoch():
    waveforms = [ramp(0, 100 * RATE), *(ramp(1 + number / 8, RATE) for number in range(10))]
    source, config = ArraySource(waveforms, RATE), fields(4.0)
    rows = training_rows(source, config, 5)
    assert (rows.clips, rows.seconds, len(rows)) == (35, 110.0, 28)
    seen = []
    for number in (0, 1):
        heard = [np.zeros(len(waveform), int) for waveform in waveforms]
        batches = epoch(source, config, number)
        for name, samples, length in (clip for batch in batches for clip in clips(batch, config)):
            recording = int(name.rpartition(" ")[2])
            assert len(samples) == length
            place = round((float(samples[0]) - float(waveforms[recording][0])) * SCALE)
            np.testing.assert_array_equal(samples, waveforms[recording][place : place + length])
            heard[recording][place : place + length] += 1
        assert all((one == 1).all() for one in heard)
        seen.append([batch.recordings for batch in batches])
    assert seen[0] != seen[1]


def test_cuts_move_from_epoch_to_epoch_and_the_shapes_do_not():
    source, config = ArraySource([ramp(0, 5 * RATE + 5000), ramp(1, 3000)], RATE), fields(1.0)
    starts, shapes = [], set()
    for number in range(6):
        batches = epoch(source, config, number, rows=2)
        starts.append(sorted(float(samples[0]) for batch in batches for _, samples, _ in clips(batch, config)))
        shapes |= {(batch.input_values.shape, batch.packing.segments.shape) for batch in batches}
    assert len({tuple(one) for one in starts}) > 2
    assert len(shapes) == 1


def test_a_clip_in_a_row_has_the_spectrogram_of_the_clip_alone():
    rng = np.random.default_rng(0)
    # Of two clips, reflection has to repeat; one has a sample more than whole patches.
    waveforms = [rng.normal(0, 0.1, size).astype(np.float32) for size in (16_000, 5_000, 9, 200, 3_361, 6_400)]
    config = fields(1.0)
    log_mel = LogMel(config)
    (batch,) = epoch(ArraySource(waveforms, RATE), config)
    spectrogram = log_mel.packed(batch.input_values, batch.packing.frames)
    width = config.patch_size[1]
    names = iter(batch.recordings)
    for row, numbers in enumerate(batch.packing.segments.tolist()):
        for number in range(1, max(numbers) + 1):
            alone, _ = log_mel(torch.from_numpy(waveforms[int(next(names).rpartition(" ")[2])])[None])
            first, count = numbers.index(number), numbers.count(number)
            found = spectrogram[row, :, first * width : (first + count) * width]
            torch.testing.assert_close(found, alone[0, :, : count * width], atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of several formats and lengths, and one of every way to be broken."""
    root = tmp_path_factory.mktemp("mixed")
    write(root / "a.wav", noise(3.3, 16_000, 1), 16_000)
    write(root / "b.flac", np.stack([noise(2, 44_100, 2), noise(2, 44_100, 3)]), 44_100)
    write(root / "c.mp3", noise(4, 16_000, 4), 16_000)
    write(root / "d.flac", noise(0.2, 8_000, 5), 8_000)
    write(root / "partly.wav", np.concatenate([noise(2, 16_000, 6), np.zeros(32_000)]), 16_000)
    announce(write(root / "early.wav", noise(0.5, RATE), RATE), RATE)
    (root / "empty.wav").touch()
    (root / "text.mp3").write_text("no audio " * 99)
    write(root / "silent.wav", np.zeros(4_000), 8_000)
    write(root / "short.wav", noise(0.01, 16_000, 8), 16_000)
    return root


def draw_mask(segments, step, places):
    rows = [torch.rand(8, generator=torch.Generator().manual_seed(1000 * step + int(place))) for place in places]
    return torch.stack(rows) < 0.5


def of_mixed(root, workers=0, steps=5, start=0, rank=0, world=1, config=None):
    # Clips of less than 70 ms are a single patch, which cannot be masked.
    config = config or fields(1.0, patch_size=(128, 4))
    found = loader(
        open_source(root), workers, steps, config, start_step=start, rank=rank, world_size=world, draw_mask=draw_mask
    )
    batches = list(found)
    end_workers(found)
    return batches


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in ("input_values", "lengths", "places", "hidden_mask"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        for name in ("segments", "positions", "frames"):
            assert torch.equal(getattr(a.packing, name), getattr(b.packing, name)), name
        for name in ("step", "recordings", "rejected", "shorter"):
            assert getattr(a, name) == getattr(b, name), name


@pytest.mark.parametrize("config", [None, conformer()], ids=["packed", "conformer"])
def test_workers_and_resumption_change_nothing(mixed, config):
    alone = of_mixed(mixed, config=config)
    assert [batch.step for batch in alone] == list(range(5))
    assert_same(alone, of_mixed(mixed, workers=2, config=config))
    assert_same(alone[3:], of_mixed(mixed, start=3, config=config))


def test_processes_share_the_batch_of_one(mixed):
    whole = of_mixed(mixed)
    for rank in range(2):
        for full, share in zip(whole, of_mixed(mixed, rank=rank, world=2), strict=True):
            assert share.places.tolist() == [rank, rank + 2]
            for row, place in enumerate(share.places.tolist()):
                assert torch.equal(share.to("cpu").input_values[row], full.to("cpu").input_values[place])
                assert torch.equal(share.packing.frames[row], full.packing.frames[place])
                assert torch.equal(share.hidden_mask[row], full.hidden_mask[place])


def test_segments_that_cannot_be_used_are_left_out_and_listed(mixed):
    config = fields(1.0, patch_size=(128, 4))
    source = open_source(mixed)
    rows = training_rows(source, config, 5)
    listed = {name.rpartition("/")[2]: reason for name, reason in rows.rejected}
    assert listed == {
        "empty.wav": "the file is empty (0 bytes).",
        "text.mp3": "is not audio that libsndfile or FFmpeg can read.",
        "short.wav": "is too short: 0.01 s, the model needs 0.07 s.",
    }
    batches = epoch(source, config)
    found = [(name.rpartition("/")[2], reason) for batch in batches for name, reason in batch.rejected]
    assert sorted(found) == [
        ("partly.wav", "from 2 s on: is silent: no sample exceeds 0.0001 of full scale."),
        ("partly.wav", "from 3 s on: is silent: no sample exceeds 0.0001 of full scale."),
        ("silent.wav", "is silent: no sample exceeds 0.0001 of full scale."),
    ]
    assert {one for batch in batches for one in batch.shorter} == {(str(mixed / "early.wav"), 1.0, 0.5)}
    usable = {"a.wav": 3.3, "b.flac": 2, "c.mp3": 4, "d.flac": 0.2, "partly.wav": 2, "early.wav": 0.5}
    heard = dict.fromkeys(usable, 0)
    for name, samples, length in (clip for batch in batches for clip in clips(batch, config)):
        heard[name.rpartition("/")[2]] += length / RATE
        assert samples.std() > 0.01
    for name, seconds in usable.items():
        assert heard[name] == pytest.approx(seconds, abs=0.2 if name == "c.mp3" else 0.01)


def test_a_batch_without_a_usable_clip_is_empty_unless_nothing_is_usable():
    config = fields(1.0)
    silence, sound = np.zeros((9, RATE), np.float32), noise(1, RATE, 1)[None].astype(np.float32)
    batches = list(loader(ArraySource(np.concatenate([silence, sound]), RATE), steps=10, config=config, rows=1))
    assert sorted(len(batch) for batch in batches) == [0] * 9 + [1]
    empty = next(batch for batch in batches if not len(batch))
    assert not empty.packing.segments.any()
    assert not empty.input_values.any()
    with pytest.raises(AllRejectedError, match=r"^x: all 9 recordings were rejected; first: x clip"):
        list(loader(ArraySource(silence, RATE, "x"), steps=1, config=config, rows=1))
    with pytest.raises(AllRejectedError, match="1,000 clips in a row were rejected"):
        list(loader(ArraySource(np.zeros((1500, RATE), np.float32), RATE), steps=1, config=config, rows=1))
    with pytest.raises(AllRejectedError, match=r"its only recording was rejected; first: .*is too short: 0\.00 s"):
        training_rows(ArraySource([noise(0.002, RATE, 1)], RATE), conformer(), 0)


@pytest.mark.parametrize("floats", [0, 1, 3])
def test_rows_of_16_bit_clips_stay_16_bit_and_others_are_float32(floats):
    stored = np.round(np.stack([noise(0.4, RATE, seed) for seed in range(4)]) * 32767).astype(np.int16)

    class Stored(ArraySource):
        def segment(self, index, start, samples, sampling_rate):
            found = self.waveforms[index][start : start + samples]
            return found / np.float32(32768) if 3 - index < floats else found

    config = fields(1.0)
    (batch,) = epoch(Stored(stored, RATE), config)
    assert batch.input_values.dtype == (torch.float32 if floats else torch.int16)
    for name, samples, length in clips(batch, config):
        expected = stored[int(name.rpartition(" ")[2])] / np.float32(32768)
        np.testing.assert_array_equal(samples, expected[: len(samples)])
        assert length == 6400


def test_batches_of_a_conformer_are_as_wide_as_their_longest_clip_and_of_similar_length():
    lengths = np.random.default_rng(0).integers(1200, RATE, 400)
    source = ArraySource([ramp(number / 64, int(size)) for number, size in enumerate(lengths)], RATE)
    config = conformer()
    widths = []
    for batch in epoch(source, config, rows=8):
        assert batch.packing.clips().tolist() == [1] * 8
        columns = [config.columns(int(length)) for length in batch.lengths]
        assert batch.packing.segments.shape[1] == max(columns)
        widths.append((min(columns), max(columns)))
        clips(batch, config)
    assert np.mean([high - low for low, high in widths]) < 1.5
    assert widths != sorted(widths)


def test_components_of_a_mixture_have_their_shares_of_the_audio():
    long, short = (
        ArraySource([ramp(0, 60 * RATE)], RATE, "long"),
        ArraySource([ramp(1, RATE // 4)] * 120, RATE, "short"),
    )
    source, config = MixtureSource("mix", (long, short), (3.0, 1.0)), fields(1.0)
    rows = training_rows(source, config, 5)
    assert rows.clips == 180
    heard = {"long": 0.0, "short": 0.0}
    for batch in loader(source, steps=50, config=config, rows=20):
        for name, samples, length in clips(batch, config):
            heard[name.partition(" ")[0]] += length / RATE
            place = samples * SCALE
            assert (place >= 2**21).all() == name.startswith("short")
    assert heard["long"] == pytest.approx(750)
    assert heard["short"] == pytest.approx(250, rel=0.05)


def test_classes_are_drawn_by_their_probabilities_whatever_their_lengths():
    waveforms = [ramp(number / 64, RATE // 2 if number < 80 else 3 * RATE) for number in range(100)]
    shares = np.where(np.arange(100) < 80, 0.5 / 80, 0.5 / 20)
    source = BalancedSource(ArraySource(waveforms, RATE), np.arange(100), "x", shares)
    config = fields(1.0)
    rows = training_rows(source, config, 5)
    drawn = [
        segment.recording for epoch in range(20) for row in range(len(rows)) for segment in rows.segments(epoch, row)
    ]
    assert np.mean(np.array(drawn) < 80) == pytest.approx(0.5, abs=0.01)
    assert len(drawn) == 20 * 140
    assert len(set(drawn)) == 100


def test_fixed_clips_are_packed_in_any_number_of_rows():
    waveforms = [ramp(number / 64, size) for number, size in enumerate((16_000, 8_000, 7_000, 1_000))]
    for config, count in ((fields(1.0), 2), (conformer(), 4)):
        batches = fixed_batches(waveforms, config, 1)
        found = [clip for batch in batches for clip in clips(batch, config)]
        assert [len(batch.places) for batch in batches] == [1] * count
        assert sorted(length for _, _, length in found) == sorted(map(len, waveforms))
    assert fixed_batches([], fields(1.0), 4) == []


def test_a_source_without_recordings_is_refused():
    with pytest.raises(DataError, match="holds no recordings"):
        training_rows(ArraySource([], RATE), fields(), 0)


def test_segments_of_files_are_parts_of_the_whole_file(mixed):
    source = FileSource("x", [mixed / "b.flac", mixed / "c.mp3"])
    for index, path in enumerate(source.files):
        whole = read_audio(path, RATE)
        np.testing.assert_allclose(source.segment(index, 12_345, 9_000, RATE), whole[12_345:21_345], atol=1e-6)
