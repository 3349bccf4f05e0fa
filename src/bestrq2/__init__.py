"""BEST-RQ-2: self-supervised audio encoders by contextualize-then-predict.

Importing the package is fast; its names are imported when first used.
"""

from __future__ import annotations

import os
import signal
import sys

# Ctrl-C ends the command itself without a stack trace from here on, long before `bestrq2.cli` can handle it.
if os.path.basename(sys.argv[0]) in ("bestrq2", "-m") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib
from typing import TYPE_CHECKING, Any

from bestrq2 import _registration
from bestrq2._version import __version__

if TYPE_CHECKING:
    from bestrq2.commands.compare import compare
    from bestrq2.commands.demo import demo
    from bestrq2.commands.embed import embed
    from bestrq2.commands.explore import explore
    from bestrq2.commands.export import export
    from bestrq2.commands.finetune import finetune
    from bestrq2.commands.info import info
    from bestrq2.commands.predict import predict
    from bestrq2.commands.prepare import prepare
    from bestrq2.commands.pretrain import pretrain
    from bestrq2.commands.probe import probe
    from bestrq2.commands.push import push
    from bestrq2.commands.realworld import fetch_realworld
    from bestrq2.commands.replay import replay
    from bestrq2.commands.search import search_embeddings
    from bestrq2.commands.soundworld import write_soundworld
    from bestrq2.commands.xares import xares
    from bestrq2.commands.xares_llm import xares_llm
    from bestrq2.convert.reference import load_reference
    from bestrq2.inference.embedder import Embedder, Embeddings, load
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config
    from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor
    from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2Model
    from bestrq2.recipe_book import recipe, recipes
    from bestrq2.search.table import EmbeddingTable

__all__ = [
    "BestRQ2Config",
    "BestRQ2FeatureExtractor",
    "BestRQ2ForAudioClassification",
    "BestRQ2ForPreTraining",
    "BestRQ2Model",
    "Embedder",
    "EmbeddingTable",
    "Embeddings",
    "__version__",
    "compare",
    "demo",
    "embed",
    "explore",
    "export",
    "fetch_realworld",
    "finetune",
    "info",
    "load",
    "load_reference",
    "predict",
    "prepare",
    "pretrain",
    "probe",
    "push",
    "recipe",
    "recipes",
    "replay",
    "search_embeddings",
    "write_soundworld",
    "xares",
    "xares_llm",
]

_MODULES = {
    "BestRQ2Config": "model.configuration_bestrq2",
    "BestRQ2FeatureExtractor": "model.feature_extraction_bestrq2",
    "BestRQ2ForAudioClassification": "model.modeling_bestrq2",
    "BestRQ2ForPreTraining": "model.modeling_bestrq2",
    "BestRQ2Model": "model.modeling_bestrq2",
    "Embedder": "inference.embedder",
    "EmbeddingTable": "search.table",
    "Embeddings": "inference.embedder",
    "compare": "commands.compare",
    "demo": "commands.demo",
    "embed": "commands.embed",
    "explore": "commands.explore",
    "export": "commands.export",
    "fetch_realworld": "commands.realworld",
    "finetune": "commands.finetune",
    "info": "commands.info",
    "load": "inference.embedder",
    "load_reference": "convert.reference",
    "predict": "commands.predict",
    "prepare": "commands.prepare",
    "pretrain": "commands.pretrain",
    "probe": "commands.probe",
    "push": "commands.push",
    "recipe": "recipe_book",
    "recipes": "recipe_book",
    "replay": "commands.replay",
    "search_embeddings": "commands.search",
    "write_soundworld": "commands.soundworld",
    "xares": "commands.xares",
    "xares_llm": "commands.xares_llm",
}

_registration.register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'bestrq2' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"bestrq2.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
