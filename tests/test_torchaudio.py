"""Replacement of a torchaudio that does not work."""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import _torchaudio as stand_in


@pytest.fixture(autouse=True)
def modules_as_before(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]


def write_broken_torchaudio(folder, code: str) -> None:
    (folder / "torchaudio").mkdir()
    (folder / "torchaudio" / "_extension.py").write_text("")
    (folder / "torchaudio" / "__init__.py").write_text(code)


def test_a_torchaudio_that_cannot_load_is_replaced_in_this_process_alone(tmp_path, monkeypatch):
    code = "from torchaudio import _extension\nraise OSError('libc10_cuda.so: cannot open shared object file')\n"
    write_broken_torchaudio(tmp_path, code)
    monkeypatch.syspath_prepend(tmp_path)
    assert stand_in.provide_torchaudio() == "bestrq2's stand-in"
    import torchaudio

    assert torchaudio.load is stand_in.load
    assert "torchaudio._extension" not in sys.modules
    assert importlib.util.find_spec("torchaudio") is not None  # transformers asks
    assert (tmp_path / "torchaudio" / "__init__.py").read_text() == code


def test_a_torchaudio_without_a_decoder_keeps_its_resampling(tmp_path, monkeypatch):
    write_broken_torchaudio(
        tmp_path,
        "import types\n__version__ = '2.9.0'\nfunctional = types.SimpleNamespace(resample='theirs')\n"
        "def load(*_):\n    raise ImportError('torchcodec')\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert stand_in.provide_torchaudio() == "torchaudio 2.9.0 with bestrq2's decoder"
    import torchaudio

    assert torchaudio.functional.resample == "theirs"
    assert torchaudio.load is stand_in.load


def test_a_torchaudio_that_works_is_left_alone(monkeypatch):
    real = types.ModuleType("torchaudio")
    vars(real).update(__version__="2.8.0", load=lambda file: (torch.zeros(1, 3), 16_000))
    monkeypatch.setitem(sys.modules, "torchaudio", real)
    assert stand_in.provide_torchaudio() == "torchaudio 2.8.0"
    assert sys.modules["torchaudio"] is real


def test_it_decodes_to_one_channel_and_resamples_a_tone(tmp_path):
    time = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "tone.flac", np.stack([tone, 0 * tone], axis=1), 44_100)
    waveform, rate = stand_in.load(str(tmp_path / "tone.flac"))
    assert (tuple(waveform.shape), waveform.dtype, rate) == ((1, 44_100), torch.float32, 44_100)
    converted = stand_in.resample(waveform, rate, 16_000)
    assert converted.shape == (1, 16_000)
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(converted[0].numpy() - expected)[200:-200].max() < 1e-3
    assert stand_in.resample(waveform, rate, rate) is waveform
