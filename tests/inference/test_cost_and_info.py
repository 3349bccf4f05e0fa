"""What a model costs: the paper's figures, and counts that follow from the architecture."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bestrq2 import BestRQ2Config, BestRQ2ForPreTraining, recipe, recipes
from bestrq2.convert.export import export_reference
from bestrq2.errors import CheckpointError
from bestrq2.inference.cost import cost
from bestrq2.inference.info import model_info
from bestrq2.train.finetuning import make_classifier
from reference_layout import reference_config, reference_state


def test_the_papers_encoder_has_85_million_parameters_and_22_gflops():
    two_step, one_stage = (cost(BestRQ2Config(objective=objective)) for objective in ("two_step", "one_stage"))
    assert two_step.encoder_parameters / 1e6 == pytest.approx(85.25, abs=0.05)
    assert two_step.pretraining_parameters / 1e6 == pytest.approx(120, abs=1)
    assert two_step.inference_gflops == pytest.approx(22.5, abs=0.2)
    assert one_stage.inference_gflops == two_step.inference_gflops
    assert one_stage.encoder_parameters == two_step.encoder_parameters


def test_operations_follow_from_the_architecture(tiny_config):
    """Two a weight and token for linear maps, and the two products of attention."""

    def block(tokens: int, width: int, intermediate: int) -> int:
        return 2 * tokens * (4 * width**2 + 2 * width * intermediate) + 4 * tokens**2 * width

    config = tiny_config(mask_ratio=[0.5, 0.5], num_codebooks=2)
    found = cost(config)
    embedding = 2 * 64 * 256 * 32
    assert found.inference_gflops * 1e9 == pytest.approx(embedding + 2 * block(64, 32, 48))
    seen = embedding / 2 + 2 * block(32, 32, 48)
    predicted = 2 * 32 * 32 * 24 + block(64, 24, 40) + 2 * 32 * 24 * 2 * 64
    assert found.training_gflops * 1e9 == pytest.approx(3 * (seen + predicted))
    one_stage = cost(tiny_config(objective="one_stage", mask_ratio=[0.5, 0.5]))
    assert one_stage.training_gflops * 1e9 == pytest.approx(3 * (embedding + 2 * block(64, 32, 48) + 2 * 32 * 32 * 64))


@pytest.mark.parametrize("changes", [{}, {"position_embedding": "learned", "activation": "swiglu", "use_bias": False}])
def test_parameters_are_those_of_the_real_model(tiny_config, changes):
    config = tiny_config(**changes)
    model = BestRQ2ForPreTraining(config)
    found = cost(config)
    assert found.pretraining_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.encoder_parameters == sum(parameter.numel() for parameter in model.base_model.parameters())


def quick_if_tiny(names: list[str]) -> list:
    """Parameters for tests; all but the tiny sizes belong to the slow tier."""
    return [name if name.endswith("tiny") else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick_if_tiny(recipes()))
def test_every_recipe_can_be_costed_without_its_weights(name):
    config = BestRQ2Config(**recipe(name)["model"])
    before = torch.get_rng_state()
    found = cost(config)
    assert 0 < found.encoder_parameters < found.pretraining_parameters
    assert 0 < found.inference_gflops < 3 * found.training_gflops
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", quick_if_tiny(["base", "small", "tiny"]))
def test_encoders_of_all_recipes_of_a_size_agree_within_twelve_percent(size):
    of_size = [name for name in recipes() if name.endswith(f"-{size}")]
    assert len(of_size) >= 4
    counts = {name: cost(BestRQ2Config(**recipe(name)["model"])).encoder_parameters for name in of_size}
    assert max(counts.values()) <= 1.12 * min(counts.values()), counts


@pytest.mark.parametrize("size", quick_if_tiny(["base", "small", "tiny"]))
def test_two_steps_cost_at_inference_exactly_what_one_stage_does(size):
    two_step, one_stage = (
        cost(BestRQ2Config(**recipe(f"{name}-{size}")["model"])) for name in ("best-rq-2", "best-rq-vit")
    )
    assert two_step.inference_gflops == one_stage.inference_gflops
    assert two_step.training_gflops < one_stage.training_gflops


def test_best_rq_2_1_has_the_parameters_of_the_release():
    """The 85.48 M of the release count its window and mel filters too, which here are no parameters (nor buffers)."""
    config = BestRQ2Config(**recipe("best-rq-2.1-base")["model"])
    front_end = config.n_fft + (config.n_fft // 2 + 1) * config.num_mel_bands
    parameters = cost(config).encoder_parameters
    assert (parameters + front_end) / 1e6 == pytest.approx(85.48, abs=0.005)
    # 12 blocks of attention, SwiGLU and norms; the final norm; the patch projection.
    block = 4 * 768**2 + 3 * 768 * 2048 + 2 * 768 + 2 * 64
    assert parameters == 12 * block + 768 + 512 * 768


def test_the_conformer_at_its_published_size_and_the_cost_of_its_blocks():
    config = BestRQ2Config(**recipe("best-rq-conformer")["model"])
    found, tokens, width = cost(config), 250, 512
    assert found.encoder_parameters == 75_884_544 + 377_888
    linear = 4 * width * 2048 + 4 * width**2 + 3 * width**2 + 31 * width
    positions = (2 * tokens - 1) * width**2 + tokens * (2 * tokens - 1) * width
    blocks = 12 * 2 * (tokens * linear + positions + 2 * tokens**2 * width)
    convolutions = 2 * (500 * 40 * 9 * 128 + 250 * 20 * 9 * 128 * 32 + tokens * 640 * width)
    assert found.inference_gflops * 1e9 == pytest.approx(blocks + convolutions, rel=1e-9)


def test_facts_of_a_recipe_name_units_and_say_that_it_is_untrained():
    facts = model_info("best-rq-2-tiny")
    assert facts["objective"] == "two-step"
    assert facts["encoder"] == "ViT, 6 layers x 192, 3 heads, sincos positions"
    assert facts["mask"] == "40 to 60 % of the patches"
    assert facts["parameters in pretraining"].endswith("M (with predictor and head)")
    assert facts["input"] == "16000 Hz mono, 128 mel bands, one frame per 39.06 ms, normalised: none"
    assert facts["frames"] == "1.6 per second (every 625 ms), 192 values each (1536 with frequency concat)"
    assert facts["clips"] == "192 values each, pooling mean"
    assert facts["tokens"] == "12.8 per second of audio"
    assert facts["inference"].endswith("GFLOPs for 10 s")
    assert facts["trained"] == "no: a recipe, whose weights are random"


def test_facts_of_the_conformer_name_its_mask_and_noise():
    facts = model_info("best-rq-conformer-tiny")
    assert facts["encoder"] == "Conformer, 6 layers x 128, 4 heads, relative positions"
    assert facts["mask"] == "60 % of the patches, filled with noise"
    assert facts["tokens"] == "25 per second of audio"
    assert facts["parameters in pretraining"].endswith("M (with its head)")


def test_facts_of_a_run_tell_where_the_model_comes_from(tiny_pretraining, tmp_path):
    tiny_pretraining(objective="one_stage").save_pretrained(tmp_path / "model")
    settings = {
        "recipe": "best-rq-vit-tiny",
        "data": "/recordings",
        "seed": 3,
        "trainer": {"max_steps": 500},
        "loader": {"batch_size": 16},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "trained" not in model_info(tmp_path)
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss,train/excess_loss,probe/linear\n100,4.5,0.5,\n200,3.25,-0.75,\n250,,,0.4\n"
    )
    (tmp_path / "environment.json").write_text(json.dumps({"bestrq2": "0.1.0", "packages": {"torch": "2.9.0"}}))
    facts = model_info(tmp_path)
    assert (facts["recipe"], facts["data"], facts["seed"]) == ("best-rq-vit-tiny", "/recordings", "3")
    assert facts["trained"] == "200 of 500 steps of 160 s, training loss 3.250 (excess -0.750)"
    assert facts["made with"] == "bestrq2 0.1.0, torch 2.9.0"
    assert facts["objective"] == "one-stage"


def test_nothing_is_said_of_pretraining_where_its_model_is_not_in_the_source(tiny_pretraining, tmp_path):
    model = tiny_pretraining()
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "encoder")
    make_classifier(model.base_model, ("a", "b"), False, None, 0).save_pretrained(tmp_path / "classifier")
    save_file(reference_state(model), tmp_path / "reference.safetensors")
    (tmp_path / "reference.json").write_text(json.dumps(reference_config(model)))
    export_reference(str(tmp_path / "encoder"), tmp_path / "export.safetensors")
    of_pretraining = {"parameters in pretraining", "training step"}
    for name in ("whole", "reference.safetensors"):
        assert of_pretraining <= model_info(tmp_path / name).keys(), name
    for name in ("encoder", "classifier", "export.safetensors"):
        facts = model_info(tmp_path / name)
        assert not of_pretraining & facts.keys(), name
        assert ({"mask", "codes"} <= facts.keys()) == (name != "classifier")
        assert facts["encoder parameters"] == model_info(tmp_path / "whole")["encoder parameters"]


def test_there_are_no_facts_of_what_does_not_exist():
    with pytest.raises(CheckpointError, match="no such encoder or recipe, and no such file or folder"):
        model_info("best-rq-9")
