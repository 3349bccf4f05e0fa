"""HDF5 files in the reference's layout."""

from __future__ import annotations

import multiprocessing
import pickle
import sys

import numpy as np
import pytest
from recordings import noise
from shard_crops import batches, rejections

from bestrq2.data import hdf5
from bestrq2.data.hdf5 import HDF5Source
from bestrq2.data.open_source import open_source
from bestrq2.errors import AudioError, ConfigError, DataError

h5py = pytest.importorskip("h5py")

RATE = 16_000
LENGTHS = (16_000, 5_000, 16_000, 12_345, 0, 16_000)


def waveforms():
    """int16 [6, 16000]: clips of the lengths above, each followed by zeros."""
    rows = np.zeros((len(LENGTHS), RATE), np.int16)
    for number, length in enumerate(LENGTHS):
        rows[number, :length] = np.round(noise(1, RATE, number) * 32767)[:length]
        rows[number, max(0, length - 1)] = min(length, 7)
    return rows


def write(path, **changes):
    """A file as it should be, but for the changes; None leaves out."""
    names = [f"Y{number}.wav" for number in range(len(LENGTHS))]
    content = {
        "waveform": waveforms(),
        "audio_name": np.array(names, "S20"),
        "target": (np.arange(18).reshape(6, 3) % 4 == 1).astype(np.float32),
        **changes,
    }
    rate = content.pop("sample_rate", RATE)
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            if value is not None:
                file[name] = value
        if rate is not None:
            file.attrs["sample_rate"] = rate
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "audioset.h5")


def crop(source, index, seed=0, seconds=10.0, rate=RATE):
    return source.read(index, rate, np.random.default_rng(seed), seconds)


@pytest.mark.parametrize("kind", ["S20", "vlen"])
def test_names_read_in_blocks_are_those_of_each_clip(tmp_path, monkeypatch, kind):
    names = [f"clip {number:02d} é" for number in range(6)]
    values = np.char.encode(names, "utf-8") if kind == "S20" else np.array(names, h5py.string_dtype())
    path = write(tmp_path / "audioset.h5", audio_name=values)
    (tmp_path / "silent.csv").write_text("Index\n1\n2\n5\n")
    for spec in (str(path), f"{path}?exclude={tmp_path / 'silent.csv'}"):
        source = open_source(spec)
        for block in (1, 2, 4, 100):
            monkeypatch.setattr(hdf5, "_BLOCK", block)
            found = list(source.names())
            assert found == [source.describe(index) for index in range(len(source))]
    assert found == [f"{path}/{names[number]}" for number in (0, 3, 4)]


def test_clips_end_with_their_last_sample_that_is_not_zero(path):
    source = open_source(path)
    assert isinstance(source, HDF5Source)
    assert len(source) == 6
    for number in (0, 1, 2, 3, 5):
        found = crop(source, number)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, waveforms()[number, : LENGTHS[number]])
    with pytest.raises(AudioError, match=r"audioset\.h5/Y4\.wav: holds no samples"):
        crop(source, 4)


def test_names_and_targets_come_along(path):
    source = open_source(path)
    assert source.describe(3) == f"{path}/Y3.wav"
    assert source.metadata(3) == {"name": "Y3.wav", "target": [0]}
    plain = write(path.with_name("plain.hdf5"), target=None, audio_name=np.array(["ü"] * 6, h5py.string_dtype()))
    assert open_source(plain).metadata(0) == {"name": "ü"}


def test_only_the_crop_is_read(path, monkeypatch):
    """And the end of the row, to find where the clip ends."""
    source = open_source(path)
    read = []
    original = h5py.Dataset.__getitem__

    def counted(self, args, *rest):
        found = original(self, args, *rest)
        if self.name == "/waveform":
            read.append(found.size)
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    monkeypatch.setattr("bestrq2.data.hdf5._TAIL", 1000)
    found = crop(source, 2, seconds=0.1)
    assert read == [1000, 1600]
    positions = np.flatnonzero(waveforms()[2] == found[0])
    assert any(np.array_equal(waveforms()[2, at : at + 1600], found) for at in positions)


def test_another_rate_or_type_gives_float32(path, tmp_path):
    whole = waveforms()[0] / 32768
    at_half = crop(open_source(path), 0, rate=8_000)
    assert at_half.dtype == np.float32
    assert len(at_half) == 8000
    np.testing.assert_allclose(at_half[100:-100], whole[::2][100:-100], atol=2e-2)
    source = open_source(write(tmp_path / "float.h5", waveform=whole[None].repeat(6, 0)))
    np.testing.assert_allclose(crop(source, 1), whole, atol=1e-7)
    with source.opened(1) as decoder:
        np.testing.assert_allclose(decoder.read(100, 50), whole[100:150], atol=1e-7)


def test_int16_and_float_crops_are_the_same_sound(path):
    source = open_source(path)
    with source.opened(2) as decoder:
        np.testing.assert_array_equal(decoder.read(0, None), crop(source, 2).astype(np.float32) / 32768)


def test_workers_give_the_same_batches(path):
    found = []
    for workers in (0, 2):
        source = open_source(path)
        crop(source, 0)  # opened before the workers are made
        found.append(batches(source, workers, 5))
    for a, b in zip(*found, strict=True):
        assert a.recordings == b.recordings
        assert a.input_values.equal(b.input_values)
    assert rejections(source)
    assert 0.05 < float(found[0][0].to("cpu").input_values.abs().max()) < 1


def test_sources_travel_between_processes(path):
    source = open_source(path)
    crop(source, 0)
    np.testing.assert_array_equal(crop(pickle.loads(pickle.dumps(source)), 1), crop(source, 1))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for number, found in enumerate(pool.starmap(crop, [(source, n) for n in (0, 1, 2, 3)])):
            np.testing.assert_array_equal(found, crop(source, number))


def test_listed_rows_are_left_out(path, tmp_path):
    (tmp_path / "silent.csv").write_text("Index,Name\n4,Y4.wav\n0,Y0.wav\n")
    source = open_source(f"{path}?exclude={tmp_path}/silent.csv")
    assert [source.metadata(i)["name"] for i in range(len(source))] == ["Y1.wav", "Y2.wav", "Y3.wav", "Y5.wav"]
    np.testing.assert_array_equal(crop(source, 0), waveforms()[1, :5000])
    (tmp_path / "mix.yaml").write_text("sources:\n  - data: audioset.h5\n    exclude: silent.csv\n")
    assert len(open_source(tmp_path / "mix.yaml")) == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Row\n4\n", "has no column 'Index'; found 'Row'"),
        ("index\n4\n", r"has no column 'Index'; found 'index' \(did you mean 'index'\? rename it\)"),
        ("Index\n6\n", "Index '6' is not a row of .*audioset.h5; expected 0 to 5"),
        ("Index\n-1\n", "Index '-1' is not a row"),
        ("Index\nx\n", "Index 'x' is not a row"),
        ("Index\n" + "\n".join("012345"), "holds no clips but those that .*out.csv excludes"),
    ],
)
def test_what_is_wrong_with_the_list_is_named(path, tmp_path, text, reason):
    (tmp_path / "out.csv").write_text(text)
    with pytest.raises(DataError, match=reason):
        open_source(f"{path}?exclude={tmp_path}/out.csv")


def test_options_are_checked(path, tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv cannot be read \(No such file"):
        open_source(f"{path}?exclude=gone.csv")
    with pytest.raises(DataError, match=r"gone\.txt is not a list of rows to exclude"):
        open_source(f"{path}?exclude=gone.txt")
    with pytest.raises(ConfigError, match="there is no option 'exlude'; did you mean 'exclude'"):
        open_source(f"{path}?exlude=gone.csv")
    with pytest.raises(ConfigError, match="'exclude' is not an option; write"):
        open_source(f"{path}?exclude")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"waveform": None}, "has no dataset 'waveform'; found 'audio_name', 'target'"),
        ({"waveform": None, "audio_name": None, "target": None}, "no dataset 'waveform' or 'audio_name'; found none"),
        ({"waveform": np.zeros(9, np.int16)}, r"'waveform' is int16 \[9\]; expected \[clips, samples\]"),
        (
            {"waveform": np.zeros((6, 9), np.int64)},
            r"'waveform' is int64 \[6, 9\]; expected \[clips, samples\] of int16",
        ),
        ({"waveform": np.zeros((6, 9), "S3")}, "'waveform' is bytes24"),
        ({"waveform": np.zeros((5, 9), np.int16)}, r"'audio_name' has the shape \[6\]; expected 1 axis, .* length 5"),
        ({"target": np.zeros((7, 3))}, r"'target' has the shape \[7, 3\]; expected 2 axes, the first of length 6"),
        ({"sample_rate": None}, "has no attribute 'sample_rate'"),
        ({"sample_rate": 0}, "its attribute sample_rate is .*0.*; expected a number of Hz from 100"),
        ({"sample_rate": 99}, "its attribute sample_rate is .*99.*; expected a number of Hz from 100"),
        ({"sample_rate": np.inf}, "its attribute sample_rate is .*inf.*; expected a number of Hz"),
        ({"sample_rate": "16k"}, "its attribute sample_rate is '16k'; expected a number of Hz"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, changes, reason):
    with pytest.raises(DataError, match=reason) as error:
        open_source(write(tmp_path / "bad.h5", **changes))
    assert "\n" not in str(error.value)


def _external_link(file, other):
    file["waveform"] = h5py.ExternalLink(str(other), "/waveform")


def _dangling_link(file, other):
    file["waveform"] = h5py.ExternalLink("/no/such/file", "/waveform")


def _soft_link_to_an_external_one(file, other):
    file["group"] = h5py.ExternalLink(str(other), "/")
    file["waveform"] = h5py.SoftLink("/group/waveform")


def _external_storage(file, other):
    file.create_dataset("waveform", (6, 99), np.int16, external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def _virtual_dataset(file, other):
    layout = h5py.VirtualLayout((6, RATE), np.int16)
    layout[:] = h5py.VirtualSource(str(other), "waveform", (6, RATE))
    file.create_virtual_dataset("waveform", layout)


def _empty_claim(file, other):
    file.create_dataset("waveform", (10**12, 10**12), np.int16, chunks=(1, 1 << 14))


def _circle(file, other):
    file["waveform"] = h5py.SoftLink("/a")
    file["a"] = h5py.SoftLink("waveform")


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (_external_link, "'waveform' is a link to another file; copy the data into this file"),
        (_dangling_link, "'waveform' is a link to another file"),
        (_soft_link_to_an_external_one, "'waveform' is a link to another file"),
        (_external_storage, "the content of 'waveform' is in other files; copy it into this file"),
        (_virtual_dataset, "the content of 'waveform' is in other files"),
        (_circle, "'waveform' is a link to itself"),
        (_empty_claim, "'waveform' claims 1,000,000,000,000 clips of 1,000,000,000,000 samples, which do not fit in"),
    ],
)
def test_content_that_is_not_in_the_file_itself_is_refused(tmp_path, path, replace, reason):
    """A file from elsewhere could otherwise make any file of this machine part of an exported model."""
    bad = write(tmp_path / "bad.h5", waveform=None)
    with h5py.File(bad, "a") as file:
        replace(file, path)
    with pytest.raises(DataError, match=f"bad.h5: {reason}"):
        open_source(bad)


def test_links_within_a_file_are_followed_and_unused_ones_left_alone(tmp_path, path):
    linked = write(tmp_path / "linked.h5", waveform=None)
    with h5py.File(linked, "a") as file:
        file["deep/er/samples"] = waveforms()
        file["deep/shortcut"] = h5py.SoftLink("er")
        file["waveform"] = h5py.SoftLink("deep/shortcut/samples")
        file["notes"] = h5py.ExternalLink("/no/such/file", "/")
    np.testing.assert_array_equal(crop(open_source(linked), 0), waveforms()[0])


def test_the_rate_may_belong_to_the_waveforms(tmp_path):
    path = write(tmp_path / "a.h5", sample_rate=None)
    with h5py.File(path, "a") as file:
        file["waveform"].attrs["sample_rate"] = np.float64(32_000)
    assert open_source(path).rate == 32_000


def test_what_is_no_hdf5_or_half_of_it_is_named(path, tmp_path):
    (tmp_path / "text.h5").write_text("hello " * 99)
    (tmp_path / "empty.h5").touch()
    content = path.read_bytes()
    (tmp_path / "half.h5").write_bytes(content[: len(content) // 2])
    for name, reason in {"text": "file signature not found", "empty": "", "half": "truncated file"}.items():
        with pytest.raises(DataError, match=rf"{name}\.h5 cannot be opened as HDF5 \(.*{reason}") as error:
            open_source(tmp_path / f"{name}.h5")
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"gone\.h5 does not exist"):
        open_source(tmp_path / "gone.h5")


def test_a_damaged_row_is_rejected_and_others_are_read(tmp_path):
    path = tmp_path / "packed.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("waveform", data=waveforms(), chunks=(1, RATE), compression="gzip", fletcher32=True)
        file["audio_name"] = np.array([f"Y{n}.wav" for n in range(6)], "S20")
        file.attrs["sample_rate"] = RATE
        chunk = file["waveform"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 100 : chunk.byte_offset + 140] = bytes(40)
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(AudioError, match=r"packed\.h5/Y2\.wav: row 2 cannot be read"):
        crop(source, 2)
    assert len(crop(source, 3)) == 12_345


def test_a_clip_whose_name_is_damaged_is_called_by_its_row(tmp_path):
    path = tmp_path / "packed.h5"
    with h5py.File(path, "w") as file:
        file["waveform"] = waveforms()
        names = np.array([f"Y{n}.wav" for n in range(6)], "S20")
        file.create_dataset("audio_name", data=names, chunks=(2,), compression="gzip", fletcher32=True)
        file.attrs["sample_rate"] = RATE
        chunk = file["audio_name"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    source = open_source(path)
    assert [source.describe(n).rpartition("/")[2] for n in (1, 2, 3, 4)] == ["Y1.wav", "row 2", "row 3", "Y4.wav"]
    assert list(source.names()) == [source.describe(n) for n in range(6)]
    assert source.metadata(3) == {"name": "row 3"}
    np.testing.assert_array_equal(crop(source, 3), waveforms()[3, :12_345])


def test_a_missing_package_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"HDF5 needs h5py; pip install 'bestrq2\[hdf5\]'"):
        open_source(path)
