"""Datasets in the Hub's layout, decoded by this package, and a Hub that says no."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from recordings import noise, write
from shard_crops import batches

from bestrq2.data import hub
from bestrq2.data.open_source import open_source
from bestrq2.errors import AudioError, ConfigError, DataError

datasets = pytest.importorskip("datasets")

RATE = 16_000


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is left in the user's cache, and nothing is found there."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


def encoded(number, kind="FLAC"):
    file = io.BytesIO()
    soundfile.write(file, noise(0.5, RATE, number), RATE, format=kind)
    return file.getvalue()


def parquet(path, numbers, column="audio", typed=True):
    """A shard as the Hub's own tools write it: bytes and names, features in the metadata."""
    audio = [{"bytes": encoded(n), "path": f"{n}.flac"} for n in numbers]
    audio[-1]["bytes"] = b"no audio" * 99
    table = pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            column: pa.array(audio, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "genre": pa.array([n % 2 for n in numbers], pa.int64()),
            "title": [f"Étude {n}" for n in numbers],
        }
    )
    features = {
        "id": {"dtype": "int64", "_type": "Value"},
        column: {"_type": "Audio"},
        "genre": {"names": ["folk", "rock"], "_type": "ClassLabel"},
        "title": {"dtype": "string", "_type": "Value"},
    }
    if typed:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A local copy of a dataset with two splits."""
    root = tmp_path_factory.mktemp("hub") / "corpus"
    parquet(root / "data" / "train-00000-of-00002.parquet", [0, 1, 2])
    parquet(root / "data" / "train-00001-of-00002.parquet", [3, 4])
    parquet(root / "data" / "test-00000-of-00001.parquet", [9, 8, 7])
    return root


def crop(source, index, seconds=10.0):
    return source.read(index, RATE, np.random.default_rng(0), seconds)


def test_clips_are_decoded_by_this_package(corpus):
    source = open_source(f"hub:{corpus}")
    assert len(source) == 5
    assert source.name == f"hub:{corpus}"
    assert source.describe(3) == f"hub:{corpus}/train/3/3.flac"
    for number in (0, 1, 3):
        np.testing.assert_allclose(crop(source, number), noise(0.5, RATE, number), atol=4e-5)
    assert len(crop(source, 0, 0.1)) == 1600
    with pytest.raises(AudioError, match=r"train/2/2\.flac: holds no sound that can be decoded") as error:
        crop(source, 2)
    assert str(error.value).count("2.flac") == 1
    assert "torchcodec" not in sys.modules


def test_labels_come_along_by_name(corpus):
    source = open_source(f"hub:{corpus}?split=test&column=audio&config=default")
    assert [source.metadata(i) for i in range(2)] == [
        {"genre": "rock", "title": "Étude 9"},
        {"genre": "folk", "title": "Étude 8"},
    ]
    np.testing.assert_allclose(crop(source, 1), noise(0.5, RATE, 8), atol=4e-5)


def test_workers_and_processes_read_the_same(corpus):
    found = [batches(open_source(f"hub:{corpus}"), workers, 4) for workers in (0, 2)]
    for a, b in zip(*found, strict=True):
        assert a.recordings == b.recordings
        assert a.input_values.equal(b.input_values)
        assert a.rejected == b.rejected
    source = open_source(f"hub:{corpus}")
    np.testing.assert_array_equal(crop(pickle.loads(pickle.dumps(source)), 1), crop(source, 1))


def test_a_parquet_file_is_a_dataset(corpus, tmp_path):
    shard = corpus / "data" / "test-00000-of-00001.parquet"
    assert len(open_source(f"hub:{shard}")) == 3
    bare = parquet(tmp_path / "bare.parquet", [0, 1], column="sound", typed=False)
    with pytest.raises(DataError, match=r"no column of audio; found id, sound, genre, title; .* add \?column=NAME"):
        open_source(f"hub:{bare}")
    np.testing.assert_allclose(crop(open_source(f"hub:{bare}?column=sound"), 0), noise(0.5, RATE, 0), atol=4e-5)
    with pytest.raises(ConfigError, match="there is no option 'sond'; did you mean 'sound'"):
        open_source(f"hub:{bare}?column=sond")
    with pytest.raises(ConfigError, match="column 'id' holds no audio"):
        open_source(f"hub:{bare}?column=id")


@pytest.mark.parametrize("block", [1, 2, 5, 100])
def test_names_read_in_blocks_are_those_of_each_recording(corpus, monkeypatch, block):
    monkeypatch.setattr(hub, "_BLOCK", block)
    source = open_source(f"hub:{corpus}")
    assert list(source.names()) == [source.describe(index) for index in range(5)]


def test_a_folder_of_files_is_a_dataset_without_torchcodec(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for number in range(2):
            write(tmp_path / "pets" / kind / f"{number}.wav", noise(0.5, RATE, number), RATE)
    source = open_source(f"hub:{tmp_path}/pets")
    assert {source.metadata(i)["label"] for i in range(4)} == {"cat", "dog"}
    assert source.describe(0) == str(tmp_path / "pets" / "cat" / "0.wav")
    np.testing.assert_allclose(crop(source, 1), noise(0.5, RATE, 1), atol=4e-5)
    (tmp_path / "pets" / "cat" / "0.wav").unlink()
    with pytest.raises(AudioError, match=r"cat/0\.wav: the file does not exist"):
        crop(source, 0)


def test_what_was_saved_to_disk_is_a_dataset(corpus, tmp_path):
    loaded = datasets.load_dataset(str(corpus))
    loaded.save_to_disk(str(tmp_path / "all"))
    loaded["train"].save_to_disk(str(tmp_path / "one"))
    assert len(open_source(f"hub:{tmp_path}/all?split=test")) == 3
    assert len(open_source(f"hub:{tmp_path}/one")) == 5
    with pytest.raises(ConfigError, match="there is no split 'dev'; it has train, test"):
        open_source(f"hub:{tmp_path}/all?split=dev")


def test_a_mixture_gives_options_to_a_dataset(corpus, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"sources:\n  - data: hub:{corpus}\n    split: test\n")
    assert len(open_source(tmp_path / "mix.yaml")) == 3


@pytest.mark.parametrize(
    ("query", "kind", "reason"),
    [
        ("?split=dev", ConfigError, r'Unknown split "dev"\. Should be one of \[.train., .test.\]'),
        ("?config=big", ConfigError, r"BuilderConfig 'big' not found\. Available: \['default'\]"),
        ("?spilt=test", ConfigError, "there is no option 'spilt'; did you mean 'split'"),
        ("x", DataError, r"corpusx does not exist; write hub:USER/DATASET"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(corpus, query, kind, reason):
    with pytest.raises(kind, match=reason) as error:
        open_source(f"hub:{corpus}{query}")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"hub: does not exist"):
        open_source("hub:")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(DataError, match=r"a\.parquet cannot be loaded \(.*Parquet") as error:
        open_source(f"hub:{tmp_path}/a.parquet")
    assert "\n" not in str(error.value)


def test_two_columns_of_audio_need_a_choice():
    features = datasets.Features({"left": datasets.Audio(), "right": datasets.Audio()})
    with pytest.raises(ConfigError, match=r"several columns of audio \(left, right\); add \?column=NAME"):
        hub._audio_column("hub:x", features, None)


def test_no_network_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectTimeout)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"^hub:a/b: the Hub cannot be reached; check the network, or give a local copy\.$"
    ):
        open_source("hub:a/b")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"need a package; pip install 'bestrq2\[hub\]'"):
        open_source("hub:a/b")


class NoHub(BaseHTTPRequestHandler):
    """Answers as the Hub does for what is not there, and for what is gated."""

    def do_HEAD(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_what_the_hub_refuses_is_one_sentence(tmp_path):
    web = ThreadingHTTPServer(("127.0.0.1", 0), NoHub)
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{web.server_port}"
    program = (
        "from bestrq2.data.open_source import open_source\n"
        "from bestrq2.errors import DataError\n"
        "for name in ('missing', 'gated'):\n"
        "    try: open_source(f'hub:someone/{name}')\n"
        "    except DataError as error: print(error)"
    )
    try:
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        web.shutdown()
        web.server_close()
    missing, gated = result.stdout.splitlines()
    assert missing == "hub:someone/missing is not on the Hub, or private; check the name, or log in by `hf auth login`."
    assert gated.startswith("hub:someone/gated is gated; request access on its page")
