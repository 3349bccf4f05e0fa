"""`import bestrq2` is light, and makes the Auto classes of transformers know the models, whichever comes first."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bestrq2
from example_sounds import scenes

LOAD = """
folder = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(folder)
encoder = transformers.AutoModel.from_pretrained(folder)
pretraining = transformers.AutoModelForPreTraining.from_pretrained(folder)
extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
print(*[type(one).__module__ + "." + type(one).__name__ for one in (config, encoder, pretraining, extractor)])
import torch
clips = torch.load(folder + "/clips.pt")
torch.save(encoder.eval()(clips).pooler_output.detach(), folder + "/pooled.pt")
"""
PACKAGE_FIRST = (
    """
import sys
import bestrq2
heavy = {"torch", "transformers", "numpy", "lightning_fabric"} & set(sys.modules)
assert not heavy, f"import bestrq2 imported {heavy}"
assert "load" in dir(bestrq2) and bestrq2.__version__
import transformers
"""
    + LOAD
)
TRANSFORMERS_FIRST = (
    """
import sys
import transformers
from transformers import AutoModel
import bestrq2
"""
    + LOAD
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_pretraining) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = tiny_pretraining()
    model.save_pretrained(path)
    bestrq2.BestRQ2FeatureExtractor().save_pretrained(path)
    torch.save(scenes(2, 40_000), path / "clips.pt")
    torch.save(model.base_model(scenes(2, 40_000)).pooler_output.detach(), path / "expected.pt")
    return path


# Fresh interpreters: what is imported, and in which order, is the claim.
@pytest.mark.parametrize(
    "program",
    [pytest.param(PACKAGE_FIRST, id="package first"),
     pytest.param(TRANSFORMERS_FIRST, id="transformers first", marks=pytest.mark.slow)],
)  # fmt: skip
def test_auto_classes_load_the_models_whatever_is_imported_first(folder, program):
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "bestrq2.model.configuration_bestrq2.BestRQ2Config",
        "bestrq2.model.modeling_bestrq2.BestRQ2Model",
        "bestrq2.model.modeling_bestrq2.BestRQ2ForPreTraining",
        "bestrq2.model.feature_extraction_bestrq2.BestRQ2FeatureExtractor",
    ]
    torch.testing.assert_close(torch.load(folder / "pooled.pt"), torch.load(folder / "expected.pt"), atol=1e-6, rtol=0)


def test_public_names_are_not_shadowed_by_modules():
    """A module of the same name would take its place as soon as somebody imports it."""
    modules = {module.name for module in pkgutil.iter_modules(bestrq2.__path__)}
    assert not modules & set(bestrq2.__all__)
    for name in (*bestrq2.__all__, *bestrq2.__all__):
        assert not isinstance(getattr(bestrq2, name), ModuleType), name
    assert "best-rq-2" in bestrq2.recipes()
    assert set(bestrq2.__all__) <= set(dir(bestrq2))
    with pytest.raises(AttributeError, match="module 'bestrq2' has no attribute 'laod'"):
        _ = bestrq2.laod


@pytest.mark.slow
def test_audio_classes_of_transformers_work_with_a_broken_torchaudio(tmp_path):
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libc10_cuda.so: cannot open')\n")
    code = (
        "import bestrq2; from transformers import AutoFeatureExtractor, utils; bestrq2.BestRQ2FeatureExtractor(); "
        "print(utils.is_torchaudio_available())"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
