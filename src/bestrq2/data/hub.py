"""Datasets of the Hugging Face Hub, or local folders and Parquet files in its layout."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from bestrq2.data.audio import errors_named, open_audio
from bestrq2.data.decoders import Decoder
from bestrq2.data.places import AudioBytes, UnreadableAudioError
from bestrq2.data.sources import Source, Stamp
from bestrq2.data.specs import check_keys, split_options
from bestrq2.errors import ConfigError, DataError

PREFIX = "hub:"
# Names read at once: one by one, millions of them take minutes.
_BLOCK = 1 << 14
OPTIONS = ("split", "config", "revision", "column")


class HubSource(Source):
    """One split of a dataset that has a column of audio.

    The whole dataset is downloaded into the cache of `datasets` (HF_HOME) and read from there.

    Args:
        spec: "hub:NAME", NAME being "user/dataset" on the Hub, or a local folder or Parquet file; behind a question
            mark may follow split (default train), config, revision, and column (default: the one that holds audio).

    Raises:
        ConfigError: an unknown option, split, config or column.
        DataError: `datasets` is missing, the dataset is missing, gated or cannot be reached, or it has no audio.
    """

    def __init__(self, spec: str) -> None:
        bare, options = split_options(spec)
        check_keys(bare, options, OPTIONS)
        self.name = spec
        self.split_name = options.get("split", "train")
        self._place = f"{bare}/{self.split_name}"
        dataset = _load(bare, self.split_name, options.get("config"), options.get("revision"))
        column = _audio_column(bare, dataset.features, options.get("column"))
        from datasets import Audio, ClassLabel, Value

        kinds = {
            name: feature
            for name, feature in dataset.features.items()
            if name != column and (isinstance(feature, ClassLabel) or feature == Value("string"))
        }
        self._classes = {name: feature for name, feature in kinds.items() if isinstance(feature, ClassLabel)}
        self._labels = dataset.select_columns(list(kinds)) if kinds else None
        try:
            encoded = dataset.select_columns([column]).cast_column(column, Audio(decode=False)).flatten()
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"{bare}: column {column!r} holds no audio ({_sentence(error)})") from error
        self._content = encoded.select_columns([f"{column}.bytes"]).rename_column(f"{column}.bytes", "bytes")
        self._paths = encoded.select_columns([f"{column}.path"]).rename_column(f"{column}.path", "path")
        if not len(self):
            raise DataError(f"{self._place} holds no recordings.")

    def __len__(self) -> int:
        return len(self._paths)

    def describe(self, index: int) -> str:
        """Dataset, split, number of the row and name of the file; only the path of a local file."""
        return self._description(index, self._paths[index]["path"])

    def names(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            for index, path in enumerate(self._paths[start : start + _BLOCK]["path"], start):
                yield self._description(index, path)

    def _description(self, index: int, path: str | None) -> str:
        if path and Path(path).is_absolute():
            return str(path)
        return f"{self._place}/{index}" + (f"/{PurePosixPath(path).name}" if path else "")

    def encoded(self, index: int) -> Path | AudioBytes:
        """The audio file of one recording.

        Raises:
            UnreadableAudioError: the dataset does not hold it.
        """
        content, name = self._content[index]["bytes"], self.describe(index)
        if content is not None:
            return AudioBytes(name, content)
        if not Path(name).is_absolute():
            raise UnreadableAudioError(f"{name}: the dataset holds neither its bytes nor a file.")
        return Path(name)

    @contextmanager
    def opened(self, index: int) -> Iterator[Decoder]:
        with errors_named(self.describe(index)), open_audio(self.encoded(index)) as decoder:
            yield decoder

    def stamp(self, index: int) -> Stamp:
        """Name of the dataset as `datasets` recognises its content, and number of the row."""
        return Stamp(f"{self._place}@{self._paths._fingerprint}/{index}")

    def metadata(self, index: int) -> dict[str, Any]:
        """Values of the columns that hold classes (by name) or text."""
        if self._labels is None:
            return {}
        row = {name: value for name, value in self._labels[index].items() if value is not None}
        for name, feature in self._classes.items():
            if 0 <= row.get(name, -1) < feature.num_classes:
                row[name] = feature.int2str(row[name])
        return row


def _load(bare: str, split: str, config: str | None, revision: str | None) -> Any:
    """Load the dataset, leaving its audio encoded."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{bare}: Hub datasets need a package; pip install 'bestrq2[hub]'.") from error
    name = bare.removeprefix(PREFIX)
    local = Path(name).expanduser()
    if not name or (not os.path.exists(local) and (name.startswith(("/", ".", "~")) or name.count("/") > 1)):
        raise DataError(f"{bare} does not exist; write hub:USER/DATASET, or hub: and a local folder or Parquet file.")
    try:
        with _audio_left_encoded(), _client_quiet():
            if any(os.path.exists(local / kind) for kind in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(str(local))
                return _of_saved(bare, saved, split)
            if os.path.isfile(local):
                return datasets.load_dataset("parquet", data_files={split: str(local)}, split=split)
            source = str(local.absolute()) if os.path.exists(local) else name
            return datasets.load_dataset(source, config, split=split, revision=revision)
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise _explained(bare, error) from error


def _of_saved(bare: str, saved: Any, split: str) -> Any:
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ConfigError(f"{bare}: there is no split {split!r}; it has {', '.join(saved)}")
    return saved[split]


def _explained(bare: str, error: Exception) -> ConfigError | DataError:
    """Turn errors of `datasets` and the Hub's client into one sentence."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        text = str(error)
        if "gated" in text:
            return DataError(f"{bare} is gated; request access on its page on the Hub, then log in by `hf auth login`.")
        if "Revision" in text:
            return ConfigError(f"{bare}: {_sentence(error)}")
        return DataError(f"{bare} is not on the Hub, or private; check the name, or log in by `hf auth login`.")
    if isinstance(error, ConnectionError) or "check your connection" in str(error):
        return DataError(f"{bare}: the Hub cannot be reached; check the network, or give a local copy.")
    if isinstance(error, ValueError) and ("split" in str(error) or "onfig" in str(error)):
        return ConfigError(f"{bare}: {_sentence(error)}")
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        return DataError(f"{bare} cannot be read ({_sentence(error.__cause__)}).")
    return DataError(f"{bare} cannot be loaded ({_sentence(error)}).")


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _audio_column(bare: str, features: Any, wanted: str | None) -> str:
    from datasets import Audio

    if wanted is not None:
        check_keys(f"{bare}, column", [wanted], features)
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, Audio)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(features)
    if not found:
        raise DataError(
            f"{bare} has no column of audio; found {columns}; if one holds encoded files, add ?column=NAME."
        )
    raise ConfigError(f"{bare} has several columns of audio ({', '.join(found)}); add ?column=NAME")


@contextmanager
def _client_quiet() -> Iterator[None]:
    """Silence the retries of the Hub's client; the final error is reported in one sentence."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _audio_left_encoded() -> Iterator[None]:
    """Let `datasets` list audio files where torchcodec is not installed.

    Its audio feature imports torchcodec's encoder even if nothing is encoded (datasets 5.2), so the block replaces the
    module by an empty one.
    """
    if importlib.util.find_spec("torchcodec") is not None:
        yield
        return
    package, encoders = ModuleType("torchcodec"), ModuleType("torchcodec.encoders")
    for module in (package, encoders):
        module.__spec__ = ModuleSpec(module.__name__, None)
    encoders.AudioEncoder = None  # type: ignore[attr-defined]
    package.encoders = encoders  # type: ignore[attr-defined]
    modules = {"torchcodec": package, "torchcodec.encoders": encoders}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
