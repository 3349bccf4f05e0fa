"""Long audio: windows overlap, their borders do not show, and only a few are in memory."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

import bestrq2
from bestrq2 import Embedder
from bestrq2.inference.windows import WindowGrid, plan_batches, plan_rows
from example_sounds import RATE, scene

WINDOW = 40_000  # 2.5 s: four frames of 0.625 s
HOP = 10_000


@pytest.fixture(scope="module")
def embedder(tiny_encoder) -> Embedder:
    return Embedder(tiny_encoder(max_seconds=2.5), "cpu")


def joined_by_hand(embedder: Embedder, clip: np.ndarray, starts: list[int]) -> np.ndarray:
    """Windows of four frames that begin at those frames, cross-faded over two."""
    columns = (1 + len(clip) // 625) // 16
    total, weights = np.zeros((columns, 32)), np.zeros((columns, 1))
    for start in starts:
        piece = clip[start * HOP : None if start == starts[-1] else start * HOP + WINDOW]
        own = np.ones(4)
        if start != starts[0]:
            own[:2] = [1 / 3, 2 / 3]
        if start != starts[-1]:
            own[2:] = [2 / 3, 1 / 3]
        total[start : start + 4] += own[:, None] * embedder.embed(piece).frames[0]
        weights[start : start + 4] += own[:, None]
    return total / weights


@pytest.mark.parametrize(
    ("samples", "starts"),
    [
        (12 * HOP, [0, 2, 4, 6, 8]),
        (11 * HOP + 700, [0, 2, 4, 6, 7]),  # the last window is full, and ends with the clip
        (5 * HOP - 625, [0, 1]),
        (5 * HOP - 626, [0]),  # what follows four frames is no whole patch
    ],
)
def test_windows_are_cross_faded(embedder, samples, starts):
    clip = scene(samples)
    embeddings = embedder.embed(clip)
    expected = joined_by_hand(embedder, clip, starts)
    np.testing.assert_allclose(embeddings.frames[0], expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.clip[0], expected.mean(axis=0), atol=1e-5)
    assert embeddings.timestamps[0] == pytest.approx(0.3125 + 0.625 * np.arange(len(expected)))


def test_without_overlap_windows_stand_side_by_side(embedder):
    clip = scene(12 * HOP)
    frames = embedder.embed(clip, overlap=0).frames[0]
    for start in range(0, 12, 4):
        alone = embedder.embed(clip[start * HOP : start * HOP + WINDOW]).frames[0]
        np.testing.assert_allclose(frames[start : start + 4], alone, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 9_000, 25_000, WINDOW])
def test_what_fits_into_one_window_is_embedded_in_one(embedder, samples):
    clip = scene(samples)
    whole = embedder.embed(clip).frames
    assert np.array_equal(embedder.embed(clip, overlap=0).frames, whole)


@pytest.mark.parametrize("patch_width", [1, 4, 16])
@pytest.mark.parametrize("phases", [1, 3])
@pytest.mark.parametrize("overlap", [0, 0.3, 0.5])
def test_windows_cover_every_frame_once_and_never_exceed_the_models_length(tiny_config, patch_width, phases, overlap):
    config = tiny_config(max_seconds=2.6, patch_size=[16, patch_width])
    phases = min(phases, patch_width)
    for samples in [*range(100_000, 122_000, 997), 41_600, 41_601, 1]:
        grid = WindowGrid(config, phases, overlap)
        blocks = iter(np.array_split(np.arange(samples, dtype=np.float32), 1 + samples // 7_000))
        weight = [np.zeros(config.columns(samples)) for _ in range(phases)]
        for window in grid.cut(blocks):
            assert window.columns <= config.columns(config.max_samples)
            assert config.columns(len(window.waveform)) == window.columns
            first = grid.offsets[window.phase] + window.first * config.frame_hop_samples
            assert window.waveform[0] == first
            if not window.is_last:
                assert len(window.waveform) <= config.max_samples
            else:
                assert window.waveform[-1] == samples - 1
            weight[window.phase][window.first : window.first + window.columns] += grid.weights(window)
        for phase, offset in enumerate(grid.offsets):
            columns = config.columns(samples - offset) if samples - offset >= 625 * patch_width - 625 else 0
            columns = columns if phase else config.columns(samples)
            assert np.all(weight[phase][:columns] > 0.3)
            assert np.all(weight[phase][columns:] == 0)


def disagreement(embedder: Embedder, clip: np.ndarray, overlap: float) -> tuple[float, float]:
    """How much frames depend on where windows lie: root mean square and largest distance over the frames' deviation.

    The same sound is embedded twice, once from half a stride later, which shifts all borders; frames within a window
    of either end are left out, since those ends are not in the same place.
    """
    grid = WindowGrid(embedder.config, 1, overlap)
    shift = grid.stride // 2
    whole = embedder.embed(clip, overlap=overlap).frames[0][shift:]
    later = embedder.embed(clip[shift * embedder.config.frame_hop_samples :], overlap=overlap).frames[0]
    count = len(later)
    inner = slice(grid.columns, count - grid.columns)
    distance = np.linalg.norm(whole[:count] - later, axis=1)[inner]
    deviation = np.sqrt(np.square(whole - whole.mean(axis=0)).sum(axis=1).mean())
    return float(np.sqrt(np.square(distance).mean()) / deviation), float(distance.max() / deviation)


# The Conformer normalises each window by its own mean and deviation, which differ a little from window to window.
@pytest.mark.parametrize(
    ("recipe", "most"), [("best-rq-2-tiny", 0.08), ("best-rq-2.1-tiny", 0.08), ("best-rq-conformer-tiny", 0.2)]
)
def test_borders_of_windows_do_not_show(recipe, most):
    embedder = bestrq2.load(recipe, "cpu")
    clip = scene(45 * RATE)
    typical, worst = disagreement(embedder, clip, 0.5)
    typical_without, worst_without = disagreement(embedder, clip, 0)
    assert typical < most
    assert worst < 0.25
    assert typical_without > 1.9 * typical
    assert worst_without > 2.5 * worst


def test_batches_hold_like_with_like_within_the_budget():
    lengths = [5, 90, 30, 31, 100, 29, 250, 4]
    assert plan_batches(lengths, 100, most_padding=100) == [[6], [4], [1], [3, 2, 5], [0, 7]]
    assert plan_batches([], 100, most_padding=100) == []


def test_batches_pad_by_no_more_than_another_batch_would_cost():
    lengths = [10, 9, 8, 5, 4, 4, 1]
    assert plan_batches(lengths, 100, most_padding=0) == [[0], [1], [2], [3], [4, 5], [6]]
    assert plan_batches(lengths, 100, most_padding=3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert plan_batches(lengths, 100, most_padding=99) == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(
    ("columns", "widest", "width", "count"),
    [
        ([16] * 5, 100, 16, 5),
        ([9] * 5, 100, 9, 5),
        (list(range(1, 17)), 100, 17, 8),
        ([16, 3], 100, 19, 1),
        ([16, 3], 18, 16, 2),  # learned positions end there
        ([16, 3], 1, 16, 2),
        ([1], 100, 1, 1),
    ],
)
def test_rows_are_as_wide_as_leaves_little_room(tiny_config, columns, widest, width, count):
    rows, found = plan_rows(columns, tiny_config(), widest)
    assert (found, len(rows)) == (width, count)
    assert sorted(index for row in rows for index in row) == list(range(len(columns)))
    assert max(sum(columns[index] for index in row) for row in rows) <= width


def test_rows_stay_narrow_where_attention_would_cost_more_than_padding(tiny_config):
    """A row of 19 columns has no room left, but each token attends to twice as many others."""
    assert plan_rows([10, 9], tiny_config(), 100)[1] == 10


MEASURE = """
import resource, sys
import numpy as np
import bestrq2

embedder = bestrq2.load(sys.argv[1], "cpu")
embedder.embed(np.linspace(-0.5, 0.5, 16_000, dtype=np.float32) ** 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
embeddings = embedder.embed(sys.argv[2])
print(embeddings.frames.shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


# At the model's rate the samples of two hours are 461 MB, at the rate of the file 1.4 GB.
@pytest.mark.parametrize(("minutes", "megabytes"), [(30, 150), pytest.param(120, 300, marks=pytest.mark.slow)])
def test_long_files_are_never_completely_in_memory(tiny_encoder, run_python, tmp_path, minutes, megabytes):
    tiny_encoder(num_hidden_layers=1, max_seconds=10.0, n_fft=1024, win_length=1024).save_pretrained(tmp_path / "model")
    path = tmp_path / "long.wav"
    block = np.stack([scene(10 * 24_000), scene(10 * 24_000, 1)], axis=1)
    with soundfile.SoundFile(path, "w", 24_000, 2, subtype="PCM_16") as file:
        for _ in range(6 * minutes):
            file.write(block)
    finished = run_python(["-c", MEASURE, tmp_path / "model", path])
    assert finished.returncode == 0, finished.stderr
    frames, kilobytes = map(int, finished.stdout.split())
    assert frames == minutes * 60 / 0.625
    assert kilobytes < megabytes * 1000
