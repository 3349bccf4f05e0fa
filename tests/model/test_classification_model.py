"""The classifier: its losses are the textbook's, padding changes nothing, and it starts from any stored encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForAudioClassification, AutoModelForPreTraining, pipeline

import bestrq2
from example_sounds import padded_batch, scenes

NAMES = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}


@pytest.fixture
def classifier(tiny_config):
    torch.manual_seed(0)
    return bestrq2.BestRQ2ForAudioClassification(tiny_config(**NAMES)).eval()


def test_logits_are_a_linear_map_of_the_pooled_frames(classifier):
    clips, mask = padded_batch([30_000, 50_000])
    pooled = classifier.bestrq2(clips, mask).pooler_output
    expected = pooled @ classifier.classifier.weight.T + classifier.classifier.bias
    output = classifier(clips, mask)
    assert output.logits.shape == (2, 3)
    assert output.loss is None
    torch.testing.assert_close(output.logits, expected)
    alone = classifier(clips[:1, :30_000]).logits
    torch.testing.assert_close(output.logits[:1], alone, atol=1e-5, rtol=0)


def test_the_loss_follows_the_kind_of_labels(classifier):
    clips = scenes(2, 40_000)
    logits = classifier(clips).logits.detach().double().numpy()
    single = classifier(clips, labels=torch.tensor([2, 0]))
    assert classifier.config.problem_type == "single_label_classification"
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert single.loss.item() == pytest.approx(-np.log(shares[[0, 1], [2, 0]]).mean(), abs=1e-6)

    classifier.config.problem_type = None
    labels = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    multi = classifier(clips, labels=torch.from_numpy(labels))
    assert classifier.config.problem_type == "multi_label_classification"
    chances = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(chances) + (1 - labels) * np.log(1 - chances)).mean()
    assert multi.loss.item() == pytest.approx(expected, abs=1e-6)

    classifier.config.problem_type = "regression"
    assert classifier(clips, labels=torch.from_numpy(labels)).loss.item() == pytest.approx(
        ((logits - labels) ** 2).mean(), abs=1e-6
    )
    classifier.config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"problem_type must be single_label_.*, got 'ranking'"):
        classifier(clips, labels=torch.tensor([2, 0]))


@pytest.mark.parametrize("whole", [True, False])
def test_a_classifier_loads_the_weights_of_a_stored_encoder_only(tiny_pretraining, tmp_path, whole):
    model = tiny_pretraining()
    (model if whole else model.base_model).save_pretrained(tmp_path)
    loaded, report = AutoModelForAudioClassification.from_pretrained(
        tmp_path, num_labels=4, problem_type="multi_label_classification", output_loading_info=True
    )
    assert isinstance(loaded, bestrq2.BestRQ2ForAudioClassification)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]
    assert loaded.classifier.weight.shape == (4, 32)
    assert loaded.config.problem_type == "multi_label_classification"
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(loaded.base_model.state_dict()[name], value), name


def test_a_saved_classifier_loads_and_embeds_identically(classifier, tmp_path):
    classifier.config.use_cache = False  # as the Trainer of transformers leaves it
    classifier.save_pretrained(tmp_path)
    loaded = AutoModelForAudioClassification.from_pretrained(tmp_path)
    clips = scenes(2, 40_000)
    assert torch.equal(loaded(clips).logits, classifier(clips).logits)
    assert loaded.config.id2label == NAMES["id2label"]
    embedder = bestrq2.load(tmp_path, "cpu")
    expected = classifier.bestrq2(clips[:1]).pooler_output[0].detach().numpy()
    np.testing.assert_allclose(embedder.embed(clips[0].numpy()).clip[0], expected, atol=1e-6)


def test_gradients_reach_encoder_and_head_unless_frozen(classifier):
    classifier.base_model.requires_grad_(False)
    classifier(scenes(2, 40_000), labels=torch.tensor([0, 1])).loss.backward()
    assert classifier.classifier.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in classifier.bestrq2.parameters())
    classifier.base_model.requires_grad_(True)
    classifier(scenes(2, 40_000), labels=torch.tensor([0, 1])).loss.backward()
    assert classifier.bestrq2.patch_embedding.weight.grad.abs().sum() > 0


def test_pretraining_from_a_classifier_initializes_new_heads(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    model, report = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {"head.weight", "mask_token", "quantizer.codebook"} <= set(report["missing_keys"])
    assert torch.equal(model.bestrq2.patch_embedding.weight, classifier.bestrq2.patch_embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_pipeline_classifies_16_bit_samples_as_floats(classifier, dtype):
    classifier.classifier.weight.data.normal_()
    clip = scenes(1, 40_000)[0]
    expected = classifier(clip[None]).logits[0].softmax(0).tolist()
    classify = pipeline(
        "audio-classification", model=classifier.to(dtype), feature_extractor=bestrq2.BestRQ2FeatureExtractor()
    )
    samples = (32768 * clip).round().short()
    for same in (clip.numpy(), samples.numpy(), samples, {"array": samples.numpy(), "sampling_rate": 16_000}):
        found = {one["label"]: one["score"] for one in classify(same)}
        assert [found[name] for name in ("cat", "dog", "owl")] == pytest.approx(expected, abs=0.02)
    with pytest.raises(ValueError, match="holds NaN or infinite samples"):
        classify(clip.numpy() * np.nan)
