from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from bestrq2.data.labels import LabelledClips, LabelledTask
from bestrq2.errors import AudioError
from bestrq2.evaluate.probe import LogMelStatistics
from bestrq2.evaluate.task_probe import probe_features

RATE = 16_000


@pytest.fixture(scope="module")
def features() -> LogMelStatistics:
    return LogMelStatistics()


def chirps(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Tones of changing pitch and loudness over a little noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = generator.uniform(200, 2000) * (1 + 0.3 * np.sin(2 * np.pi * generator.uniform(0.5, 3) * time))
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / rate) * (1 + np.sin(2 * np.pi * 1.7 * time))
    return (0.1 * tone + 0.003 * generator.normal(size=len(time))).astype(np.float32)


def reference_log_mel(waveform: np.ndarray) -> np.ndarray:
    """METHOD section 2 in numpy, float64 [frames, 128]."""
    from transformers.audio_utils import mel_filter_bank

    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    padded = np.pad(waveform.astype(np.float64), 1024, mode="reflect")
    starts = range(0, len(waveform) + 1, 625)
    spectrum = np.stack([np.fft.rfft(padded[start : start + 2048] * window) for start in starts])
    power = np.abs(spectrum) ** 2 / (window**2).sum()
    filters = mel_filter_bank(1025, 128, 0.0, 8000.0, RATE, norm=None, mel_scale="htk")
    return 10 * np.log10(np.maximum(power @ filters, 1e-10))


def test_frames_are_those_of_the_log_mel_spectrogram(features: LogMelStatistics) -> None:
    waveform = chirps(3.3)
    log_mel, embeddings = reference_log_mel(waveform), features.embed([waveform], RATE)
    np.testing.assert_allclose(embeddings.frames[0], log_mel, atol=2e-3)
    np.testing.assert_allclose(embeddings.clip[0], log_mel.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(embeddings.timestamps[0], np.arange(len(log_mel)) * 625 / RATE)


def test_a_batch_changes_nothing_and_marks_what_lies_outside_a_clip(features: LogMelStatistics) -> None:
    clips = [chirps(1.4, 1), chirps(10, 2), chirps(0.2, 3)]
    together = features.embed(clips, RATE)
    assert together.frame_mask.sum(axis=1).tolist() == [36, 257, 16]
    assert not together.frames[~together.frame_mask].any()
    assert np.isnan(together.timestamps[~together.frame_mask]).all()
    for row, clip in enumerate(clips):
        alone = features.embed([clip], RATE)
        np.testing.assert_array_equal(alone.clip[0], together.clip[row])
        np.testing.assert_array_equal(alone.frames[0], together.frames[row][together.frame_mask[row]])


def test_files_and_arrays_of_other_rates_give_the_same_numbers(features: LogMelStatistics, tmp_path: Path) -> None:
    waveform = chirps(2, rate=44_100)
    soundfile.write(tmp_path / "chirps.wav", waveform, 44_100, subtype="FLOAT")
    from_file = features.embed([tmp_path / "chirps.wav"])
    np.testing.assert_allclose(from_file.clip, features.embed([waveform], 44_100).clip, atol=1e-4)


@pytest.mark.parametrize("waveform", [np.zeros(0, np.float32), np.full(9000, np.nan, np.float32)])
def test_unusable_waveforms_are_rejected(features: LogMelStatistics, waveform: np.ndarray) -> None:
    with pytest.raises(AudioError):
        features.embed([chirps(1), waveform], RATE)


def test_unreadable_files_are_skipped_by_the_probe_and_the_rest_is_scored(
    features: LogMelStatistics, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)

    def split(name: str, n: int) -> LabelledClips:
        paths, labels = [], np.arange(n) % 2
        for place, label in enumerate(labels):
            paths.append(tmp_path / f"{name}{place}.wav")
            # the same spectrum on average; one kind comes in bursts, so that only the deviation tells
            bursts = np.repeat(generator.random(20) < 0.25, 800) if label else np.full(16_000, 0.5)
            soundfile.write(paths[-1], 0.1 * bursts * generator.normal(size=16_000), RATE)
        return LabelledClips(paths, labels)

    task = LabelledTask("bursts", "", "clip", ("steady", "bursts"), split("train", 40), split("test", 10))
    (tmp_path / "test3.wav").write_bytes(b"not audio")
    (score,) = probe_features(features, [task], methods=("statistics",))
    assert score.score == 1.0
    assert score.n_test == 9
    assert "test3.wav" in score.skipped[0]
