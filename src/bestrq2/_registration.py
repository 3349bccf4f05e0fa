"""Registration with the Auto classes of transformers, without importing transformers before the user does."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from bestrq2._torchaudio import hide_broken_torchaudio

_AUTO = "transformers.models.auto."


def _register_config(module: ModuleType) -> None:
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config

    module.AutoConfig.register(BestRQ2Config.model_type, BestRQ2Config, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config
    from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2Model

    module.AutoModel.register(BestRQ2Config, BestRQ2Model, exist_ok=True)
    module.AutoModelForPreTraining.register(BestRQ2Config, BestRQ2ForPreTraining, exist_ok=True)
    module.AutoModelForAudioClassification.register(BestRQ2Config, BestRQ2ForAudioClassification, exist_ok=True)


def _register_feature_extractor(module: ModuleType) -> None:
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config
    from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor

    module.AutoFeatureExtractor.register(BestRQ2Config, BestRQ2FeatureExtractor, exist_ok=True)


_CALLBACKS: dict[str, Callable[[ModuleType], None]] = {
    _AUTO + "configuration_auto": _register_config,
    _AUTO + "modeling_auto": _register_models,
    _AUTO + "feature_extraction_auto": _register_feature_extractor,
}


_BEFORE: dict[str, Callable[[], None]] = {"transformers.audio_utils": hide_broken_torchaudio}

# `modeling_layers` imports the Auto classes, and these modules import it: registering in between would find them half
# imported.
_ON_THE_WAY = {
    "transformers.modeling_layers",
    *("bestrq2.model." + name for name in ("conformer", "transformer", "modeling_bestrq2")),
}


class _Unfinished(threading.local):
    """Number of watched modules that this thread is importing, and what is called when all are imported."""

    def __init__(self) -> None:
        self.count = 0
        self.calls: list[Callable[[], None]] = []


_unfinished = _Unfinished()


class _AroundImport(MetaPathFinder):
    """Import hook that calls functions right before some modules are imported, or once they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Removed first: the search below calls this method again.
        before, after = _BEFORE.pop(fullname, None), _CALLBACKS.pop(fullname, None)
        if before is None and after is None and fullname not in _ON_THE_WAY:
            return None
        _ON_THE_WAY.discard(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Calling(spec.loader, before, after)
        return spec


class _Calling(Loader):
    """Loader that calls functions before a module is executed, and after the outermost watched one is."""

    def __init__(
        self, loader: Loader, before: Callable[[], None] | None, after: Callable[[ModuleType], None] | None
    ) -> None:
        self._loader, self._before, self._after = loader, before, after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self._before is not None:
            self._before()
        _unfinished.count += 1
        try:
            self._loader.exec_module(module)
        finally:
            _unfinished.count -= 1
        if self._after is not None:
            _unfinished.calls.append(partial(self._after, module))
        while _unfinished.calls and _unfinished.count == 0:
            _unfinished.calls.pop(0)()


def register() -> None:
    """Register with the modules of transformers that are imported, and with the others when they are."""
    # First of all, because registering itself imports parts of transformers.
    sys.meta_path.insert(0, _AroundImport())
    for name in list(_CALLBACKS):
        if name in sys.modules:
            _CALLBACKS.pop(name)(sys.modules[name])
