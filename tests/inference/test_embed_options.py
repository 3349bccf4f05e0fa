"""Readouts, normalisation, precision, compilation, and batches that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bestrq2
from bestrq2 import Embedder
from bestrq2.convert.numpy_front_end import pool
from bestrq2.errors import ConfigError
from example_sounds import scene

CLIPS = [scene(length, index) for index, length in enumerate([40_000, 95_000, 20_000, 700, 50_000, 41_000])]


@pytest.fixture(scope="module")
def embedder(tiny_encoder) -> Embedder:
    return Embedder(tiny_encoder(max_seconds=2.5, num_hidden_layers=3), "cpu")


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("batch_seconds", [0.01, 5.0, 12.0])
def test_batches_of_any_size_give_the_same_numbers(embedder, batch_seconds):
    whole = embedder.embed(CLIPS, phases=2)
    small = Embedder(embedder.model, "cpu", batch_seconds=batch_seconds)
    sizes = []
    with small.model.register_forward_hook(lambda _, given, output: sizes.append(output.frame_attention_mask.shape)):
        found = small.embed(CLIPS, phases=2)
    close(found.frames, whole.frames)
    close(found.clip, whole.clip)
    assert all(rows == 1 or rows * frames * embedder.hop_seconds <= batch_seconds for rows, frames in sizes)


WIDE = {"layers": "0:0.3,2:0.7+output", "frequency": "concat", "pooling": "mean+std+quarters"}


@pytest.mark.parametrize("options", [{}, {"layers": 1, "pooling": "attention", "normalize": True, "phases": 3}, WIDE])
def test_neither_order_nor_company_changes_a_clip(embedder, options):
    together = embedder.embed(CLIPS, **options)
    order = [4, 2, 0, 5, 3, 1]
    shuffled = embedder.embed([CLIPS[index] for index in order], **options)
    close(shuffled.clip, together.clip[order])
    close(shuffled.frames, together.frames[order])
    for index, clip in enumerate(CLIPS):
        alone = embedder.embed(clip, **options)
        close(alone.clip[0], together.clip[index])
        close(alone.frames[0], together.frames[index, together.frame_mask[index]])


def test_layers_are_the_models_hidden_states(embedder):
    clip = scene(40_000)
    with torch.no_grad():
        states = embedder.model(torch.from_numpy(clip)[None], output_hidden_states=True).hidden_states
    frames = [state.unflatten(1, (8, -1)).mean(dim=1).numpy() for state in states]
    for layer in range(4):
        close(embedder.embed(clip, layers=layer).frames, frames[layer])
        close(embedder.embed(clip, layers=layer - 4).frames, frames[layer])
    close(embedder.embed(clip, layers=[0, -1]).frames, (frames[0] + frames[3]) / 2)
    close(embedder.embed(clip, layers="0, -1").frames, (frames[0] + frames[3]) / 2)
    close(embedder.embed(clip, layers="1:1,3:3").frames, (frames[1] + 3 * frames[3]) / 4)
    close(embedder.embed(clip, layers="1+0,3").frames, np.concatenate([frames[1], (frames[0] + frames[3]) / 2], axis=2))
    close(embedder.embed(clip, layers="mean").frames, (frames[1] + frames[2] + frames[3]) / 3)
    close(embedder.embed(clip, layers="output").frames, embedder.embed(clip).frames)
    close(embedder.embed(clip, layers=2).clip, frames[2].mean(axis=1))


def test_concatenated_rows_of_long_clips_average_to_the_mean_of_rows(embedder):
    clips = [scene(length, 1) for length in (95_000, 20_000)]  # of three windows, and of one
    wide = embedder.embed(clips, layers="1+output", frequency="concat", phases=2)
    assert wide.frames.shape[2] == 8 * 2 * 32
    assert wide.clip.shape[1] == 8 * 2 * 32
    mean = wide.frames.reshape(*wide.frames.shape[:2], 8, 64).mean(axis=2)
    close(mean[..., 32:], embedder.embed(clips, phases=2).frames)
    clip = scene(20_000)
    with torch.no_grad():
        states = embedder.model(torch.from_numpy(clip)[None]).patch_hidden_states[0].unflatten(0, (8, -1))
    close(embedder.embed(clip, frequency="concat").frames[0, 0], states[:, 0].flatten().numpy())


@pytest.mark.parametrize("recipe", sorted(name for name in bestrq2.recipes() if name.endswith("-tiny")))
def test_every_recipe_embeds_with_every_option(recipe):
    embedder = bestrq2.load(recipe, "cpu")
    clips = [scene(170_000), scene(9_000, 1)]
    embeddings = embedder.embed(clips, phases=2, layers="mean", frequency="concat", pooling="mean+max", normalize=True)
    assert embeddings.clip.shape == (2, 2 * embedder.config.patch_rows * embedder.config.hidden_size)
    assert np.isfinite(embeddings.clip).all()
    alone = embedder.embed(clips[1], phases=2, layers="mean", frequency="concat", pooling="mean+max", normalize=True)
    close(alone.clip[0], embeddings.clip[1], 2e-5)
    last = embedder.embed(clips[0])
    assert last.timestamps[0] == pytest.approx((np.arange(last.frames.shape[1]) + 0.5) * embedder.hop_seconds)


@pytest.mark.parametrize("layers", [4, -5, [], [0, 9], "last", "", "1+", "1:0", "1:-1", 1.5, True, [0, "1"], {1}])
def test_layers_that_are_not_there_are_refused(embedder, layers):
    with pytest.raises(ConfigError, match="layers must be 'output', 'mean' or whole numbers from -4 to 3"):
        embedder.embed(scene(20_000), layers=layers)


def test_poolings_are_what_they_say():
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((7, 16)).astype(np.float32) + 0.7
    mean = frames.mean(axis=0)
    close(pool(frames, "mean"), mean)
    close(pool(frames, "mean+max"), np.concatenate([mean, frames.max(axis=0)]))
    close(pool(frames, "std"), frames.std(axis=0))
    quarters = [frames[first:end].mean(axis=0) for first, end in ((0, 1), (1, 3), (3, 5), (5, 7))]
    close(pool(frames, "quarters+mean"), np.concatenate([*quarters, mean]))
    cosines = torch.nn.functional.cosine_similarity(torch.from_numpy(frames), torch.from_numpy(mean)[None]).numpy()
    weights = np.exp(4 * cosines) / np.exp(4 * cosines).sum()
    close(pool(frames, "attention"), (weights[:, None] * frames).sum(axis=0))
    close(pool(1000 * frames, "attention"), 1000 * pool(frames, "attention"), 1e-2)
    same = np.repeat(frames[:1], 5, axis=0)
    close(pool(same, "attention"), frames[0])
    assert np.array_equal(pool(np.zeros((3, 4), np.float32), "attention"), np.zeros(4))
    close(pool(frames[:1], "mean+std+quarters"), np.concatenate([frames[0], 0 * frames[0], *4 * [frames[0]]]))


def test_attention_counts_the_odd_frame_less():
    frames = np.tile(np.eye(8, dtype=np.float32)[0], (9, 1))
    frames[4] = np.eye(8)[1]
    assert pool(frames, "attention")[1] < 0.5 * pool(frames, "mean")[1]


@pytest.mark.parametrize("pooling", ["mean", "mean+max", "std+quarters", "attention"])
def test_pooling_takes_valid_frames_only(embedder, pooling):
    together = embedder.embed(CLIPS, pooling=pooling)
    for index in range(len(CLIPS)):
        close(together.clip[index], pool(together.frames[index, together.frame_mask[index]], pooling))


def test_normalised_vectors_have_length_1_and_the_same_direction(embedder):
    plain, unit = embedder.embed(CLIPS), embedder.embed(CLIPS, normalize=True)
    close(np.linalg.norm(unit.clip, axis=1), 1)
    close(np.linalg.norm(unit.frames[unit.frame_mask], axis=1), 1)
    assert not unit.frames[~unit.frame_mask].any()
    close(unit.clip, plain.clip / np.linalg.norm(plain.clip, axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "median"}, r"pooling must be one of mean, std, max, quarters, attention, or several joined by \+"),
        ({"pooling": "mean+mean"}, "pooling must be one of"),
        ({"frequency": "max"}, "frequency must be one of mean, concat, got 'max'"),
        ({"overlap": 0.6}, "overlap must be from 0 to 0.5, got 0.6"),
        ({"overlap": float("nan")}, "overlap must be from 0 to 0.5"),
        ({"overlap": "half"}, "overlap must be from 0 to 0.5"),
        ({"layers": np.array([0, 1])}, "layers must be 'output', 'mean' or whole numbers"),
    ],
)
def test_impossible_options_are_refused(embedder, options, message):
    with pytest.raises(ConfigError, match=message):
        embedder.embed(scene(20_000), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"batch_seconds": 0}, "batch_seconds must be a number above 0, got 0"),
        ({"batch_seconds": "all"}, "batch_seconds must be a number above 0, got 'all'"),
        ({"batch_seconds": float("inf")}, "batch_seconds must be a number above 0, got inf"),
        ({"device": "gpu"}, "device must be such as 'cpu' or 'cuda:0', got 'gpu'"),
        ({"device": "cuda:99"}, r"device 'cuda:99': this machine has \d+ CUDA devices"),
        ({"device": "ipu"}, r"device 'ipu': this machine has none, or torch cannot use it"),
        ({"source": None}, "a model is named by a path, a recipe or a hub id, got None"),
    ],
)
def test_impossible_ways_to_run_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        bestrq2.load(**{"source": "best-rq-2-tiny", "device": "cpu", **options})


def test_16_bit_weights_run_in_their_own_precision(tiny_encoder, tmp_path):
    model = tiny_encoder(max_seconds=2.5)
    exact = Embedder(model, "cpu").embed([scene(95_000), np.zeros(20_000)], pooling="attention")
    model.save_pretrained(tmp_path)
    for dtype, error in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        narrow = bestrq2.BestRQ2Model.from_pretrained(tmp_path, dtype=dtype)
        for given in (None, dtype):
            rough = Embedder(narrow, "cpu", dtype=given).embed([scene(95_000), np.zeros(20_000)], pooling="attention")
            assert np.linalg.norm(rough.clip - exact.clip) < error * np.linalg.norm(exact.clip)
    with pytest.raises(ConfigError, match=r"dtype is float16, but the weights are torch\.bfloat16; leave it out"):
        Embedder(narrow, "cpu", dtype="float16")


@pytest.mark.parametrize("recipe", ["best-rq-2-tiny", "best-rq-2.1-tiny", "best-rq-conformer-tiny"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16_stays_close_to_float32(recipe, dtype):
    half = bestrq2.load(recipe, "cpu", dtype=dtype)
    clips = [scene(100_000), scene(30_000, 1)]
    exact, found = bestrq2.load(recipe, "cpu").embed(clips), half.embed(clips)
    assert found.frames.dtype == np.float32
    error = np.linalg.norm(found.clip - exact.clip, axis=1) / np.linalg.norm(exact.clip, axis=1)
    assert 1e-5 < error.max() < 0.01
    assert next(half.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("recipe", ["best-rq-2.1-tiny", pytest.param("best-rq-conformer-tiny", marks=pytest.mark.slow)])
def test_compiled_encoders_give_the_same_numbers(monkeypatch, recipe):
    import torch._dynamo

    original = torch.nn.Module.compile
    # Traced as for a user, but without the half minute of generating code.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda block, **how: original(block, **{**how, "backend": "aot_eager"})
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = bestrq2.load(recipe, "cpu"), bestrq2.load(recipe, "cpu", compile=True)
    for clips in (CLIPS[:4], CLIPS[1:3], CLIPS[:1], CLIPS[1:2]):
        close(compiled.embed(clips).frames, plain.embed(clips).frames)
    close(compiled.embed(CLIPS, layers="mean").frames, plain.embed(CLIPS, layers="mean").frames)
    assert (
        1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    )  # with and without padding, one clip or more
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


def test_embedding_leaves_training_possible(tiny_encoder):
    model = tiny_encoder(max_seconds=2.5)
    Embedder(model, "cpu").embed(scene(40_000), layers="mean")
    model(torch.from_numpy(scene(40_000))[None]).pooler_output.sum().backward()
    assert model.patch_embedding.weight.grad is not None
