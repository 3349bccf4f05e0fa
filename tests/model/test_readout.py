"""A model with another readout: its frames and clips, alone, padded and packed, saved, and as a classifier."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bestrq2 import BestRQ2Config, BestRQ2ForAudioClassification, BestRQ2Model, Embedder
from bestrq2.inference.windows import packed, padded
from example_sounds import scene

CLIPS = [scene(length, index) for index, length in enumerate([40_000, 70_000, 20_000, 700, 31_000])]
READOUTS = [
    {"pooling": "mean+std+quarters"},
    {"layers": "0+1:0.2,output:0.8", "frequency": "concat", "pooling": "max+attention"},
]


@pytest.mark.parametrize("readout", READOUTS)
def test_neither_padding_nor_packing_changes_frames_and_clips(tiny_encoder, readout):
    model = tiny_encoder(input_normalization="clip")
    model.set_readout(**readout)
    expected = Embedder(model, "cpu").embed(CLIPS)
    with torch.no_grad():
        batch, mask = padded(CLIPS)
        together = model(batch, mask)
        rows, packing = packed(model.config, [CLIPS[:3], CLIPS[3:]])
        in_rows = model(rows, packing=packing)
    for index in range(len(CLIPS)):
        frames = expected.frames[index, expected.frame_mask[index]]
        inside = together.frame_attention_mask[index]
        np.testing.assert_allclose(together.last_hidden_state[index, inside], frames, atol=2e-5)
        assert not together.last_hidden_state[index, ~inside].any()
        np.testing.assert_allclose(together.pooler_output[index], expected.clip[index], atol=2e-5)
        np.testing.assert_allclose(in_rows.pooler_output[index], expected.clip[index], atol=2e-5)
    assert together.hidden_states is None
    assert in_rows.last_hidden_state.shape[2] == expected.frames.shape[2]


def test_the_readout_is_saved_with_the_model_and_others_stay_as_they_were(tiny_encoder, tmp_path):
    model = tiny_encoder()
    model.save_pretrained(tmp_path / "plain")
    assert "readout" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model.set_readout(layers=[0, -1], pooling="mean+std")
    model.save_pretrained(tmp_path / "other")
    loaded = BestRQ2Model.from_pretrained(tmp_path / "other").eval()
    assert loaded.config.readout == {"layers": "0,-1", "pooling": "mean+std"}
    clip = scene(30_000)
    expected = Embedder(tiny_encoder(), "cpu").embed(clip, layers=[0, -1], pooling="mean+std").clip
    np.testing.assert_allclose(Embedder(loaded, "cpu").embed(clip).clip, expected, atol=1e-5)
    plain = Embedder(loaded, "cpu").embed(clip, layers="output", pooling="mean").clip
    np.testing.assert_allclose(plain, Embedder(tiny_encoder(), "cpu").embed(clip).clip, atol=1e-5)
    model.set_readout(layers="output", pooling="mean")
    assert "readout" not in model.config.to_dict()


def test_a_classifier_reads_wide_clips_and_has_finite_gradients(tiny_config):
    config = tiny_config(readout={"frequency": "concat", "pooling": "mean+std"}, num_labels=3)
    classifier = BestRQ2ForAudioClassification(config)
    assert classifier.classifier.in_features == 8 * 32 * 2
    loss = classifier(torch.from_numpy(CLIPS[3])[None], labels=torch.tensor([1])).loss  # one frame: no deviation
    loss.backward()
    assert all(torch.isfinite(one.grad).all() for one in classifier.parameters() if one.grad is not None)


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        ({"layers": "3"}, "layers must be 'output', 'mean' or whole numbers from -3 to 2"),
        ({"layers": f"1:{'9' * 400}"}, "layers must be 'output', 'mean' or whole numbers from -3 to 2"),
        ({"pooling": 2}, "pooling must be one of"),
        ({"rows": "mean"}, "readout must be a mapping with layers, frequency or pooling"),
        ("mean", "readout must be a mapping with layers, frequency or pooling"),
    ],
)
def test_configurations_with_another_readout_are_refused(tiny_config, readout, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(readout=readout)
    assert BestRQ2Config().readout is None
