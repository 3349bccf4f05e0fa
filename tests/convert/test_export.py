"""`bestrq2 export`: a folder that is the source, and one sentence for what cannot be exported."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bestrq2
from bestrq2 import cli
from bestrq2.convert.hub import write_model
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate import hear
from bestrq2.train.finetuning import make_classifier
from example_sounds import scene
from reference_layout import reference_config, reference_state


@pytest.fixture(scope="module")
def model(tiny_pretraining):
    return tiny_pretraining()


@pytest.fixture(scope="module")
def source(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("somewhere private") / "source"
    model.save_pretrained(folder)
    return folder


def test_the_command_writes_a_folder_that_embeds_alike(model, source, tmp_path, capsys):
    output = tmp_path / "new" / "encoder"
    assert cli.run(["export", str(source), str(output), "--license", "mit"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    clip = scene(60_000)
    expected = bestrq2.Embedder(model.base_model, "cpu").embed(clip)
    found = bestrq2.load(output, "cpu").embed(clip)
    np.testing.assert_allclose(found.frames, expected.frames, atol=1e-6)
    for file in output.iterdir():
        assert b"somewhere private" not in file.read_bytes(), file
    assert "# encoder" in (output / "README.md").read_text().splitlines()
    assert not list(output.parent.glob(".*"))


def test_an_exported_readout_is_that_of_every_command(model, source, tmp_path, capsys):
    options = ["--layers", "0:0.25,2:0.75", "--frequency", "concat", "--pooling", "mean+std"]
    assert cli.run(["export", str(source), str(tmp_path / "wide"), *options]) == 0
    clip, wide = scene(60_000), bestrq2.load(tmp_path / "wide", "cpu")
    expected = bestrq2.Embedder(model.base_model, "cpu").embed(
        clip, layers="0:0.25,2:0.75", frequency="concat", pooling="mean+std"
    )
    np.testing.assert_allclose(wide.embed(clip).frames, expected.frames, atol=1e-6)
    np.testing.assert_allclose(wide.embed(clip).clip, expected.clip, atol=1e-6)
    facts = bestrq2.info(tmp_path / "wide", cost=False)
    assert facts["frames"].endswith("256 values each, layers 0:0.25,2:0.75, frequency concat")
    assert facts["clips"] == "512 values each, pooling mean+std"
    assert "embeddings.clip  # [1, 512]" in (tmp_path / "wide" / "README.md").read_text()
    assert repr(wide).endswith("256 values per frame, 1.6 frames per second)")
    assert make_classifier(wide.model, ("bark", "meow"), False, 2.5, seed=0).classifier.in_features == 512
    hear_model = hear.load_model(str(tmp_path / "wide"))
    assert (hear_model.scene_embedding_size, hear_model.timestamp_embedding_size) == (512, 256)
    scenes = hear.get_scene_embeddings(torch.from_numpy(clip)[None], hear_model)
    np.testing.assert_allclose(scenes, expected.clip, atol=1e-6)
    assert hear.get_timestamp_embeddings(torch.from_numpy(clip)[None], hear_model)[0].shape[2] == 256


def test_with_predictor_exports_the_whole_model(model, source, tmp_path):
    bestrq2.export(source, tmp_path / "whole", with_predictor=True)
    bestrq2.export(tmp_path / "whole", tmp_path / "encoder")
    whole, encoder = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "encoder"))
    assert whole.keys() == model.state_dict().keys()
    assert encoder.keys() == model.base_model.state_dict().keys()
    assert "AutoModelForPreTraining" in json.loads((tmp_path / "whole" / "config.json").read_text())["auto_map"]
    assert "AutoModelForPreTraining" not in json.loads((tmp_path / "encoder" / "config.json").read_text())["auto_map"]
    assert "AutoModelForPreTraining" in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(CheckpointError, match="encoder: holds an encoder without the rest"):
        bestrq2.export(tmp_path / "encoder", tmp_path / "again", with_predictor=True)
    assert not (tmp_path / "again").exists()


@pytest.fixture
def finetuned(model, tmp_path) -> tuple[Path, bestrq2.BestRQ2ForAudioClassification]:
    """A run of `bestrq2 finetune`, as far as exporting reads it, and its classifier."""
    classifier = make_classifier(model.base_model, ("bark", "meow", "rain"), False, 2.5, seed=0).eval()
    write_model(tmp_path / "tuned" / "model", classifier)
    (tmp_path / "tuned" / "config.yaml").write_text("labelled: /somewhere/private/pets\nmodel: demo\nmode: linear\n")
    return tmp_path / "tuned", classifier


def test_a_fine_tuned_run_is_exported_as_a_classifier(finetuned, tmp_path, capsys):
    run, classifier = finetuned
    assert cli.run(["export", str(run), str(tmp_path / "out")]) == 0
    bestrq2.export(tmp_path / "out", tmp_path / "again")
    clip = scene(30_000)
    for folder in (tmp_path / "out", tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        name = "modeling_bestrq2.BestRQ2ForAudioClassification"
        assert config["auto_map"]["AutoModelForAudioClassification"] == name
        assert config["id2label"] == {"0": "bark", "1": "meow", "2": "rain"}
        assert "AutoModelForPreTraining" not in config["auto_map"]
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == classifier.state_dict().keys()
        assert all(torch.equal(weights[key], value) for key, value in classifier.state_dict().items())
        expected = bestrq2.Embedder(classifier.base_model, "cpu").embed(clip)
        np.testing.assert_allclose(bestrq2.load(folder, "cpu").embed(clip).clip, expected.clip, atol=1e-6)
        assert "pipeline_tag: audio-classification" in (folder / "README.md").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuned from the untrained model of the recipe `demo` on `pets`" in card
    assert "private" not in card
    assert not list((tmp_path / "out").glob("*.png"))
    assert cli.run(["export", str(run), str(tmp_path / "whole"), "--with-predictor"]) == 2
    assert "tuned: is a fine-tuned classifier, which has no predictor" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "whole").exists()


def test_a_fine_tuned_run_is_pushed_as_a_classifier(finetuned, monkeypatch):
    uploaded = {}

    def keep(folder: Path, *_: object) -> str:
        uploaded.update({file.name: file.read_bytes() for file in folder.iterdir()})
        return "url"

    monkeypatch.setattr("bestrq2.convert.export.check_upload", lambda repository: None)
    monkeypatch.setattr("bestrq2.convert.export.upload", keep)
    assert bestrq2.push(finetuned[0], "user/pets") == "url"
    assert json.loads(uploaded["config.json"])["architectures"] == ["BestRQ2ForAudioClassification"]
    assert b'bestrq2 predict "user/pets"' in uploaded["README.md"]


def test_the_layout_of_the_reference_takes_the_encoder_of_a_fine_tuned_run(finetuned, tmp_path):
    run, classifier = finetuned
    bestrq2.export(run, tmp_path / "tuned.safetensors", format="reference")
    found = bestrq2.load(tmp_path / "tuned.safetensors", "cpu").model.state_dict()
    expected = classifier.base_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_reference_checkpoint_is_exported(model, tmp_path):
    save_file(reference_state(model), tmp_path / "reference.safetensors")
    (tmp_path / "reference.json").write_text(json.dumps(reference_config(model)))
    bestrq2.export(tmp_path / "reference.safetensors", tmp_path / "out", with_predictor=True)
    found = bestrq2.BestRQ2ForPreTraining.from_pretrained(tmp_path / "out")
    assert torch.equal(found.head.weight, model.head.weight)
    assert "`reference.safetensors`" in (tmp_path / "out" / "README.md").read_text()


def test_an_output_folder_with_other_files_is_refused(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    bestrq2.export(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="empty: is not empty; name a new folder, or delete this one first"):
        bestrq2.export(source, tmp_path / "empty")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    bestrq2.export(source, Path())
    assert "# here" in (tmp_path / "here" / "README.md").read_text().splitlines()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: is a file; name a folder"):
        bestrq2.export(source, tmp_path / "file")


def test_the_code_in_the_documentation_runs(source, tmp_path, monkeypatch, capsys):
    bestrq2.export(source, tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "torch.Size([2, 32])"
    assert lines[-1] == "torch.Size([1, 4, 32])"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "onxx"}, "there is no format 'onxx'; did you mean 'onnx'?"),
        ({"format": "tflite9"}, "there is no format 'tflite9'; formats are hf, onnx, reference"),
        ({"format": "onnx", "license": "mit"}, "license belongs to format hf and has no effect on onnx"),
        ({"format": "onnx", "with_predictor": True}, "with_predictor belongs to format hf"),
        ({"int8": True}, "int8 belongs to format onnx and has no effect on hf; leave it out"),
        ({"layers": 3}, "layers must be 'output', 'mean' or whole numbers from -3 to 2"),
        ({"format": "reference", "pooling": "max"}, "pooling cannot be stored in the reference layout; leave it out"),
        ({"license": "MIT License"}, "license is 'MIT License'; write an identifier of the hub such as mit"),
    ],
)
def test_incompatible_options_are_refused(source, tmp_path, options, said):
    with pytest.raises(ConfigError) as error:
        bestrq2.export(source, tmp_path / "out", **options)
    assert str(error.value).startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_an_error_of_one_sentence(source, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert cli.run(["export", str(source), str(tmp_path / "locked" / "out")]) == 2
    assert "cannot be written (Permission denied); name another output" in capsys.readouterr().err


def test_a_failed_write_is_an_error_of_one_sentence(source, tmp_path, capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr("bestrq2.convert.export.write_folder", refuse)
    assert cli.run(["export", str(source), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"bestrq2 export: {tmp_path / 'out'}: cannot be written (Permission denied); name another output"]


def test_an_unreadable_checkpoint_is_an_error_of_one_sentence(source, tmp_path, capsys):
    for name, change, said in (
        ("header", lambda folder: _overwrite(folder / "model.safetensors"), "header: the model cannot be loaded: "),
        ("field", lambda folder: _add_field(folder / "config.json"), "has no field 'hiden_size'; did you mean 'hidden"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
        assert cli.run(["export", str(folder), str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]
        assert not (tmp_path / "out").exists()


def _overwrite(path: Path) -> None:
    path.write_bytes(b"\x20" + bytes(7) + b'{"weights": {"dtype": "F99"}}   ' + path.read_bytes()[:1000])


def _add_field(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "hiden_size": 3}))
