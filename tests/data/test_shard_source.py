"""Shards as a source: the same crops as from files, and one bad clip or tar never stops a run."""

from __future__ import annotations

import gc
import io
import logging
import multiprocessing
import os
import pickle
import resource
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import noise, write, write_with_ffmpeg
from tars import clip, encoded, pack, shard

from bestrq2.data.audio import check_usable, read_span
from bestrq2.data.batches import AllRejectedError, Crop, CropDataset, collate, make_loader
from bestrq2.data.decoder import UnreadableAudioError, put_samples, to_float32
from bestrq2.data.feeding import fixed_crops
from bestrq2.data.opening import open_source
from bestrq2.data.schedule import BatchSchedule, CropKey
from bestrq2.data.shards import maps
from bestrq2.data.shards.building import load_index
from bestrq2.data.shards.maps import TarMaps
from bestrq2.data.shards.shard_source import open_shards
from bestrq2.errors import AudioError, DataError

RATE = 16_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))


def crop(source, index=0, seed=0, seconds=1.0, rate=RATE):
    return source.read(index, rate, np.random.default_rng(seed), seconds)


def described(source, root):
    return [source.describe(i).removeprefix(f"{root}/") for i in range(len(source))]


def batches(source, workers=0, steps=4):
    data = CropDataset(source, RATE, 1.0, seed=5)
    return list(make_loader(data, BatchSchedule(data.order, 4, max_steps=steps), workers))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same eight clips, one of them short, as a folder of FLAC, two FLAC shards and two PCM shards."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "folder").mkdir()
    waveforms = [np.int16(32767 * noise(0.6 if seed == 3 else 3, RATE, seed)) for seed in range(8)]
    for kind in ("wav", "flac"):
        (root / kind).mkdir()
        for part in range(2):
            members = [
                (f"{seed}.{kind}", encoded(waveforms[seed], RATE, kind.upper()))
                for seed in range(4 * part, 4 * part + 4)
            ]
            pack(root / kind / f"{part}.tar", members)
    for seed, waveform in enumerate(waveforms):
        (root / "folder" / f"{seed}.flac").write_bytes(encoded(waveform, RATE, "FLAC"))
    return {name: open_source(root / name) for name in ("folder", "flac", "wav")}


def test_folder_flac_shards_and_pcm_shards_give_the_same_batches(corpora):
    wanted = batches(corpora["folder"])
    for name in ("flac", "wav"):
        for batch, other in zip(wanted, batches(corpora[name]), strict=True):
            assert torch.equal(batch.to("cpu").input_values, other.to("cpu").input_values)
            assert torch.equal(batch.lengths, other.lengths)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.9999, 3.0, 10.0])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_crops_are_the_same_whatever_holds_the_clip(corpora, rate, seconds):
    for index in (0, 3, 7):
        wanted = crop(corpora["folder"], index, index, seconds, rate)
        for name in ("flac", "wav"):
            np.testing.assert_array_equal(to_float32(crop(corpora[name], index, index, seconds, rate)), wanted)


def test_pcm_at_the_wanted_rate_comes_as_int16_of_the_crop_alone(corpora, monkeypatch):
    sizes = []
    original = TarMaps.view
    monkeypatch.setattr(
        TarMaps, "view", lambda maps, tar, start, size: sizes.append(size) or original(maps, tar, start, size)
    )
    found = crop(corpora["wav"], 0)
    assert found.dtype == np.int16
    assert found.shape == (RATE,)
    assert sizes == [2 * RATE]
    assert crop(corpora["wav"], 0, rate=8_000).dtype == np.float32


def test_decoders_of_pcm_read_float32(corpora):
    with corpora["wav"].opened(0) as decoder:
        samples = read_span(decoder, 5_000, 1_000, RATE)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, noise(3, RATE, 0)[5_000:6_000], atol=2 / 32768)


def test_workers_and_pickles_give_the_same_batches(corpora):
    source = corpora["wav"]
    assert len(source.maps) > 0
    again = pickle.loads(pickle.dumps(source))
    assert len(again.maps) == 0
    wanted = batches(source)
    for other in (batches(again), batches(source, 1), batches(source, 2)):
        for first, second in zip(wanted, other, strict=True):
            assert torch.equal(first.input_values, second.input_values)


def six_tars(root):
    root.mkdir()
    return open_shards([shard(root / f"{n}.tar", [n, n + 10], seconds=0.5) for n in range(6)], "x")


def test_few_maps_are_open_at_once_in_all_sources_and_crops_outlive_them(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "OPEN", maps.OpenMaps(3))
    sources = [six_tars(tmp_path / name) for name in "ab"]
    crops = [crop(source, index) for index in range(12) for source in sources]
    assert sum(len(source.maps) for source in sources) == len(maps.OPEN.maps) == 3
    for place, found in enumerate(crops):
        index = place // 2
        np.testing.assert_allclose(found / 32768, noise(0.5, RATE, index // 2 + index % 2 * 10), atol=1 / 32768)
    del sources[1]
    gc.collect()
    assert len(maps.OPEN.maps) == len(sources[0].maps)


def test_a_quarter_of_the_files_a_process_may_open_is_for_tars(monkeypatch):
    for limit, wanted in ((1024, 256), (40, 10), (2, 1), (1 << 20, 512), (resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(maps.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert maps.most_open() == wanted


@contextmanager
def no_more_files():
    """A process that has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    taken = []
    try:
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for handle in taken:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["x.tar", "a.flac", "b.mp3", "c.m4a"])
def test_too_many_open_files_are_no_fault_of_the_recording(tmp_path, name):
    if name == "x.tar":
        shard(tmp_path / name, [0])
    else:
        write(tmp_path / name, noise(2, RATE), RATE)
    data = CropDataset(open_source(tmp_path / name), RATE, 1.0, seed=0)
    key = CropKey(0, 0, 0, 0)
    data[key]
    maps.OPEN.maps.clear()
    with no_more_files(), pytest.raises(AllRejectedError, match=r"cannot be opened \(Too many open files\)"):
        data[key]
    assert len(data[key].waveform) == RATE


def test_a_tar_that_finds_no_room_for_its_map_takes_that_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "OPEN", maps.OpenMaps(5))
    source = six_tars(tmp_path / "a")
    for index in range(0, 8, 2):
        crop(source, index)
    with no_more_files():
        assert len(crop(source, 10)) == RATE // 2
    assert maps.OPEN.most == 2


def test_clips_of_every_kind_and_rate_lie_in_one_tar(tmp_path):
    stereo = np.stack([noise(2, 44_100, 1), noise(2, 44_100, 2)])
    m4a = write_with_ffmpeg(tmp_path / "e.m4a", noise(2, 44_100, 5), 44_100, "aac")
    members = [
        ("a.wav", encoded(stereo, 44_100)),
        ("b.wav", encoded(noise(2, 8_000), 8_000, subtype="PCM_24")),
        ("c.wav", encoded(noise(2, RATE), RATE, subtype="FLOAT")),
        ("d.wav", encoded(noise(2, 22_050, 4), 22_050)),
        ("e.m4a", m4a.read_bytes()),
        ("f.mp3", encoded(noise(2, RATE, 6), RATE, "MP3", "MPEG_LAYER_III")),
        ("g.ogg", encoded(noise(2, RATE, 7), RATE, "OGG", "VORBIS")),
    ]
    (tmp_path / "files").mkdir()
    for name, content in members:
        (tmp_path / "files" / name).write_bytes(content)
    source, files = open_source(pack(tmp_path / "x.tar", members)), open_source(tmp_path / "files")
    assert described(source, tmp_path) == [f"x.tar/{name}" for name, _ in members]
    assert source.index.sampling_rate.tolist() == [0, 0, 0, 22_050, 0, 0, 0]
    for index in range(len(members)):
        wanted = crop(files, index, seed=index)
        assert len(wanted) == RATE
        np.testing.assert_allclose(to_float32(crop(source, index, seed=index)), wanted, atol=1e-6)


def test_metadata_is_the_json_member(tmp_path):
    members = [("a.wav", clip()), ("a.json", b'{"label": "\xc3\xbc", "n": [1]}'), ("b.wav", clip())]
    members += [("c.wav", clip()), ("c.json", b'{"half'), ("d.json", b"[1, 2]"), ("d.wav", clip())]
    source = open_source(pack(tmp_path / "x.tar", members))
    assert [source.metadata(i) for i in range(4)] == [{"label": "ü", "n": [1]}, {}, {}, {}]


def lying_wav():
    content = bytearray(clip())
    struct.pack_into("<I", content, 40, 10**6)
    struct.pack_into("<I", content, 4, 10**6 + 36)
    return bytes(content)


BAD = {
    "text.wav": (b"not audio", "is not audio that libsndfile or FFmpeg can read."),
    "empty.wav": (b"", "the file is empty (0 bytes)."),
    "silent.wav": (encoded(np.zeros(RATE, np.float32), RATE), "is silent: no sample exceeds 0.0001 of full scale."),
    "none.wav": (encoded(np.zeros(0, np.float32), RATE), "holds no samples."),
    "cut.flac": (clip(kind="FLAC")[:20_000], "truncated"),
    "lies.wav": (lying_wav(), "the file is truncated: its headers promise 1,000,000 bytes, 64,000 are there"),
    "../out.wav": (clip(), "its name in the tar is no plain one"),
    "good.flac": (clip(kind="FLAC"), "an earlier clip in the tar has the same key"),
}


def test_bad_clips_are_rejected_by_name_and_replaced(tmp_path, caplog):
    members = [("good.wav", clip()), *((name, content) for name, (content, _) in BAD.items())]
    tar = pack(tmp_path / "x.tar", members)
    with caplog.at_level(logging.WARNING):
        source = open_source(tar)
    assert len(caplog.messages) == 1
    assert "2 of 9 clips left out; first: " in caplog.messages[0]
    data = CropDataset(source, RATE, 1.0, seed=0)
    rejected = {}
    for index in range(len(data)):
        found = data[CropKey(0, index, 0, 0)]
        np.testing.assert_array_less(0.01, np.abs(to_float32(found.waveform)).max())
        rejected |= dict(found.rejected)
    assert len(rejected) == len(BAD)
    for name, (_, reason) in BAD.items():
        shown = next(path for path in rejected if path.startswith(f"{tar}/") and (name in path or "member" in path))
        if not name.startswith(".."):
            shown = f"{tar}/{name}"
        assert reason.removesuffix(".") in rejected[shown]
        assert "x.tar" not in rejected[shown]
    assert not any(".." in path for path in rejected)


def test_a_silent_crop_is_no_bad_clip_and_is_named(tmp_path):
    quiet = np.concatenate([noise(1, RATE), np.zeros(60 * RATE, np.float32)])
    source = open_source(pack(tmp_path / "x.tar", [("a.wav", encoded(quiet, RATE))]))
    with pytest.raises(AudioError, match=r"x\.tar/a\.wav: is silent") as error:
        crop(source, seed=1)
    assert not isinstance(error.value, UnreadableAudioError)


def test_equal_keys_in_different_tars_are_different_clips(tmp_path):
    source = open_shards([shard(tmp_path / f"{name}.tar", [1, 2]) for name in "ab"], "x")
    assert described(source, tmp_path) == ["a.tar/0001.wav", "a.tar/0002.wav", "b.tar/0001.wav", "b.tar/0002.wav"]
    assert all(len(crop(source, i)) == RATE for i in range(4))


def cut_tar(tar, share=0.5):
    tar.write_bytes(tar.read_bytes()[: int(share * tar.stat().st_size)])
    return tar


def test_a_bad_tar_among_good_ones_is_one_rejected_clip(tmp_path, caplog):
    tars = [shard(tmp_path / f"{n}.tar", [2 * n, 2 * n + 1]) for n in range(4)]
    cut_tar(tars[1], 0.2)
    tars[2].write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert caplog.messages[0].startswith(
        f"{tmp_path}: 2 of 4 tars left out, whole or in part; first: {tars[1]}: the tar is truncated"
    )
    assert described(source, tmp_path) == [
        *("0.tar/0000.wav", "0.tar/0001.wav", "1.tar", "2.tar", "3.tar/0006.wav", "3.tar/0007.wav")
    ]
    rejected = {entry for batch in batches(source) for entry in batch.rejected}
    assert {path for path, _ in rejected} == {str(tars[1]), str(tars[2])}
    assert dict(rejected)[str(tars[2])] == "the tar is empty (0 bytes); copy or download it again."
    assert source.metadata(2) == {}


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_of_a_truncated_tar_the_whole_clips_are_used_as_from_a_stream_and_the_damage_is_one_rejected_entry(
    tmp_path, caplog, kind
):
    tar = cut_tar(shard(tmp_path / "x.tar", range(10), kind=kind), 0.55)
    assert len(fixed_crops(open_source(tar.as_uri()), 64, 0, RATE, 1.0)) == 5
    for _ in range(2):
        caplog.clear()
        source = open_source(tar)
        assert described(source, tmp_path) == [*(f"x.tar/{n:04d}.{kind.lower()}" for n in range(5)), "x.tar"]
        (warning,) = caplog.messages
        assert f"1 of 1 tar left out, whole or in part; first: {tar}: the tar is truncated: its member" in warning
        rejected = {entry for batch in batches(source, steps=6) for entry in batch.rejected}
        ((path, reason),) = rejected
        assert path == str(tar)
        assert f"the file ends at {tar.stat().st_size:,}; copy or download it again; only its 5 clips" in reason
        assert source.metadata(5) == {}
        assert source.metadata(4) == {"seed": 4}


def test_if_all_tars_are_bad_one_sentence_says_so(tmp_path):
    tars = [cut_tar(shard(tmp_path / f"{n}.tar", [n])) for n in range(3)]
    with pytest.raises(
        DataError, match=r"0\.tar: the tar is truncated: .* \(and none of the other 2 tars can be used"
    ) as e:
        open_source(tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match=r"1\.tar: the tar is truncated: its member '0001.wav' reaches to byte"):
        open_source(tars[1])


def test_a_tar_cut_short_while_in_use_is_a_rejected_clip_and_no_crash(tmp_path):
    tar = shard(tmp_path / "x.tar", range(4))
    source = open_source(tar)
    assert len(crop(source, 3)) == RATE
    os.truncate(tar, 4096)
    for index in (3, 0):
        with pytest.raises(
            UnreadableAudioError, match=r"x\.tar/000\d\.wav: its tar changed since it was indexed; start again"
        ):
            crop(source, index)
    with pytest.raises(UnreadableAudioError, match="changed since"):
        source.metadata(0)


def test_a_tar_that_was_only_touched_while_in_use_is_read_on(tmp_path, monkeypatch):
    tar = shard(tmp_path / "x.tar", range(4))
    source = open_source(tar)
    before = [crop(source, index) for index in range(4)]
    scans = []
    monkeypatch.setattr(maps, "load_index", lambda path: scans.append(path) or load_index(path))
    for time in (1_000, 4_000_000_000):
        os.utime(tar, (0, time))
        for index in range(4):
            maps.OPEN.maps.clear()
            np.testing.assert_array_equal(crop(source, index), before[index])
    assert len(scans) == 2


def test_a_tar_with_another_content_of_the_same_size_is_found_out_with_one_look(tmp_path, monkeypatch):
    tar = shard(tmp_path / "x.tar", range(4))
    source = open_source(tar)
    size = tar.stat().st_size
    shard(tar, range(5, 9))
    os.utime(tar, (0, 1_000))
    assert tar.stat().st_size == size
    scans = []
    monkeypatch.setattr(maps, "load_index", lambda path: scans.append(path) or load_index(path))
    for index in range(4):
        with pytest.raises(UnreadableAudioError, match="changed since"):
            crop(source, index)
    assert len(scans) == 1


def batch_of_a_vanishing_tar(tar):
    data = CropDataset(open_source(tar), RATE, 1.0, seed=0)
    keys = [CropKey(0, index, 0, index) for index in range(2)]
    items, together = [data[key] for key in keys], data.__getitems__(keys)
    os.truncate(tar, 0)
    alone, values = (collate(part).to("cpu").input_values.numpy() for part in (items, together))
    np.testing.assert_array_equal(alone, values)
    for row, item in zip(values, items, strict=True):
        np.testing.assert_array_equal(row, to_float32(item.waveform))
        assert row.std() > 0.05


def test_a_tar_that_vanishes_between_an_item_and_its_batch_ends_no_process(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=batch_of_a_vanishing_tar, args=(shard(tmp_path / "x.tar", range(2)),)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def cut_and_read(tar):
    with open_source(tar).opened(1) as decoder:
        os.truncate(tar, 4096)
        decoder.read(100_000, RATE)


def read_of_a_vanishing_tar(tar):
    with pytest.raises(AudioError, match=r"x\.tar/0001\.\w+: its tar changed since"):
        cut_and_read(tar)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_tar_that_vanishes_while_a_decoder_is_open_ends_no_process(tmp_path, kind):
    process = multiprocessing.get_context("fork").Process(
        target=read_of_a_vanishing_tar, args=(shard(tmp_path / "x.tar", range(3), seconds=10, kind=kind),)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_validation_crops_of_pcm_shards_are_float32_and_those_of_the_same_files(corpora):
    found, wanted = (fixed_crops(corpora[name], 6, 3, RATE, 1.0) for name in ("wav", "folder"))
    assert len(found) == len(wanted) == 6
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def test_a_tar_replaced_while_in_use_is_read_as_it_was_or_rejected(tmp_path):
    tar = shard(tmp_path / "x.tar", range(4))
    source, late = open_source(tar), open_source(tar)
    before = crop(source, 2).copy()
    shard(tmp_path / "new.tar", range(10, 16)).replace(tar)
    np.testing.assert_array_equal(crop(source, 2), before)
    with pytest.raises(UnreadableAudioError, match="changed since"):
        crop(late, 2)
    tar.unlink()
    with pytest.raises(UnreadableAudioError, match=r"x\.tar/0002\.wav: its tar cannot be opened \(No such file"):
        crop(pickle.loads(pickle.dumps(source)), 2)
    assert len(open_source(shard(tar, range(10, 16)))) == 6


@pytest.mark.parametrize(
    "spec", ["{root}/t-{{0..2}}.tar", "{root}/t-*.tar", "{root}/t-[012].tar", "{root}", "{root}/l.txt"]
)
def test_patterns_folders_and_lists_of_tars_are_shards(tmp_path, spec):
    for number in range(3):
        shard(tmp_path / f"t-{number}.tar", [number], seconds=0.2)
    if spec.endswith("l.txt"):
        (tmp_path / "l.txt").write_text("t-0.tar\nt-1.tar\n./t-2.tar\n")
    source = open_source(spec.format(root=tmp_path))
    assert [name.rpartition("/")[2] for name in described(source, tmp_path)] == ["0000.wav", "0001.wav", "0002.wav"]
    assert spec.format(root=tmp_path) in source.name


def test_csv_lists_and_folders_within_folders(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shard(tmp_path / "in" / "deep" / "a.TAR", [1], seconds=0.2)
    shard(tmp_path / "in" / ".hidden.tar", [2], seconds=0.2)
    (tmp_path / "in" / "notes.txt").touch()
    assert described(open_source(tmp_path / "in"), tmp_path) == ["in/deep/a.TAR/0001.wav"]
    (tmp_path / "l.csv").write_text("path,label\nin/deep/a.TAR,x\n")
    assert len(open_source(tmp_path / "l.csv")) == 1


def test_patterns_of_audio_files_are_files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(clip(seed=number, kind="FLAC"))
    assert described(open_source(str(tmp_path / "*.flac")), tmp_path) == ["0.flac", "1.flac", "2.flac"]
    assert described(open_source(str(tmp_path / "{2,0}.flac")), tmp_path) == ["2.flac", "0.flac"]


def test_what_is_wrong_with_patterns_and_mixtures_is_named(tmp_path):
    shard(tmp_path / "t-0.tar", [0], seconds=0.2)
    for spec, reason in [
        ("t-{0..1}.tar", r"t-1\.tar does not exist, or nothing fits it; check the pattern .*t-\{0\.\.1\}\.tar"),
        ("u-*.tar", r"u-\*\.tar does not exist, or nothing fits it"),
        ("t-{0..1.tar", "braces are not balanced"),
    ]:
        with pytest.raises(DataError, match=reason):
            open_source(str(tmp_path / spec))
    (tmp_path / "l.txt").write_text("t-0.tar\nt-1.tar\n")
    with pytest.raises(DataError, match=r"t-1\.tar: the shard does not exist; check the list or pattern"):
        open_source(tmp_path / "l.txt")
    (tmp_path / "a.wav").write_bytes(clip())
    with pytest.raises(
        DataError, match="holds 1 audio file and 1 tar; put them into folders of their own and name the"
    ):
        open_source(tmp_path)
    (tmp_path / "l.txt").write_text("t-0.tar\na.wav\n")
    with pytest.raises(DataError, match=r"names 1 tars and other files \(.*a\.wav\); name the two kinds apart"):
        open_source(tmp_path / "l.txt")


SAMPLES = st.lists(st.one_of(st.integers(-8, 8), st.integers(-32768, 32767)), min_size=1, max_size=50)


@settings(max_examples=200, deadline=None)
@given(SAMPLES, st.integers(-32768, 32767))
def test_int16_is_judged_and_converted_as_float_is(samples, offset):
    pcm = np.clip(np.array(samples) + offset, -32768, 32767).astype(np.int16)
    verdicts = []
    for waveform in (pcm, to_float32(pcm)):
        try:
            check_usable(waveform)
            verdicts.append("")
        except AudioError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]
    row = np.full(len(pcm), np.nan, np.float32)
    put_samples(pcm, row)
    np.testing.assert_array_equal(row, to_float32(pcm))
    file = io.BytesIO()
    soundfile.write(file, pcm, RATE, format="WAV")
    np.testing.assert_array_equal(row, soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0])


def test_the_edge_of_silence_is_the_same_for_both():
    """3.28 steps from the mean are heard; the quick answer needs half the range to reach them."""
    pcm = np.zeros(1000, np.int16)
    for step, silent in ((3, True), (4, False), (6, False)):
        pcm[500] = step
        for waveform in (pcm, to_float32(pcm)):
            if silent:
                with pytest.raises(AudioError, match="is silent"):
                    check_usable(waveform)
            else:
                check_usable(waveform)


def test_batches_of_both_kinds_are_padded_with_zeros():
    waveforms = [np.arange(-50, 50, dtype=np.int16) * 300, noise(0.02, RATE)]
    batch = collate([Crop(CropKey(0, i, 0, i), waveform) for i, waveform in enumerate(waveforms)])
    assert batch.input_values.dtype == torch.float32
    np.testing.assert_array_equal(batch.input_values[0, :100].numpy(), waveforms[0] / np.float32(32768))
    assert not batch.input_values[0, 100:].any()
    np.testing.assert_array_equal(batch.input_values[1].numpy(), waveforms[1])
