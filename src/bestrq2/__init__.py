"""BEST-RQ-2: self-supervised audio encoders by contextualize-then-predict.

Importing the package is fast; what its names stand for is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bestrq2 import _registration
from bestrq2._version import __version__

if TYPE_CHECKING:
    from bestrq2.convert.reference import load_reference
    from bestrq2.evaluate.command import probe
    from bestrq2.evaluate.xares.command import xares
    from bestrq2.exporting import export, push
    from bestrq2.inference.embedder import Embedder, Embeddings, load
    from bestrq2.inference.predicting import predict
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config
    from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor
    from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2Model
    from bestrq2.recipe_book import recipe, recipes
    from bestrq2.report.comparison import compare
    from bestrq2.train.finetuning import finetune
    from bestrq2.train.pretraining import pretrain

__all__ = [
    "BestRQ2Config",
    "BestRQ2FeatureExtractor",
    "BestRQ2ForAudioClassification",
    "BestRQ2ForPreTraining",
    "BestRQ2Model",
    "Embedder",
    "Embeddings",
    "__version__",
    "compare",
    "export",
    "finetune",
    "load",
    "load_reference",
    "predict",
    "pretrain",
    "probe",
    "push",
    "recipe",
    "recipes",
    "xares",
]

_HOMES = {
    "BestRQ2Config": "model.configuration_bestrq2",
    "BestRQ2FeatureExtractor": "model.feature_extraction_bestrq2",
    "BestRQ2ForAudioClassification": "model.modeling_bestrq2",
    "BestRQ2ForPreTraining": "model.modeling_bestrq2",
    "BestRQ2Model": "model.modeling_bestrq2",
    "Embedder": "inference.embedder",
    "Embeddings": "inference.embedder",
    "compare": "report.comparison",
    "export": "exporting",
    "finetune": "train.finetuning",
    "load": "inference.embedder",
    "load_reference": "convert.reference",
    "predict": "inference.predicting",
    "pretrain": "train.pretraining",
    "probe": "evaluate.command",
    "push": "exporting",
    "recipe": "recipe_book",
    "recipes": "recipe_book",
    "xares": "evaluate.xares.command",
}

_registration.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bestrq2' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"bestrq2.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
