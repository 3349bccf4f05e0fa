"""Task files of XARES-LLM, and what a task needs before days of training: its tars and its models."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import braceexpand
import torch

from bestrq2.errors import ConfigError, DataError
from bestrq2.run_records import read_yaml
from bestrq2.text import nearest

logger = logging.getLogger(__name__)

JOINT_TASKS = ("task1", "task2", "all")
DECODER = "HuggingFaceTB/SmolLM2-135M"
"""The benchmark's language model where neither the task nor the settings name another."""

# The metrics of captions compare sentences by one model and look for errors by another, which names a third one.
_CAPTION_METRICS = ("FENSE", "DATE")
_SENTENCES = "sentence-transformers/paraphrase-TinyBERT-L6-v2"
_ERRORS = "echecker_clotho_audiocaps_base.ckpt"
_ERRORS_URL = f"https://github.com/blmoistawinde/fense/releases/download/V0.1/{_ERRORS}"

_CONFIGS = ("config.json", "tokenizer_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_SECONDS = 10.0


def task_file(tasks: Path, task: str, part: Literal["train", "eval"]) -> Path:
    """Find the file that defines the training or the scoring of a joint task or of one dataset, or a custom one.

    Args:
        tasks: folder of the benchmark's own task files.
        task: task1, task2, all, the name of a dataset, or a .yaml file.
        part: training or scoring.

    Raises:
        ConfigError: there is no such task.
    """
    if is_custom(task):
        if not Path(task).is_file():
            raise ConfigError(f"{task}: there is no such task file")
        return Path(task).resolve()
    ending = {"train": "_config", "eval": "_test_config"}[part]
    known = {name: file for name in JOINT_TASKS for file in (tasks / name / part).glob("*.y*ml")}
    known |= {file.stem.removesuffix(ending): file for file in sorted((tasks / "single" / part).glob("*.y*ml"))}
    if task not in known:
        raise ConfigError(
            f"there is no task '{task}' to {part}{nearest(task, known)}; there are {', '.join(known)}, and .yaml files"
        )
    return known[task]


def is_custom(task: str) -> bool:
    """Whether a task is a file in the benchmark's format, and not the name of one of its own."""
    return Path(task).suffix in (".yaml", ".yml")


def read_task_file(path: Path) -> dict[str, Any]:
    """Read a task file.

    Raises:
        DataError: it cannot be read, or is not a mapping.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds no tasks; expected a mapping of names to their data")
    return content


def dataset_name(name: str) -> str:
    """Name of a dataset without the prefix that it has in files of joint tasks."""
    return name.removeprefix("eval_").lower()


def check_tars(training: Path, evaluation: Path, data: Path) -> None:
    """Check the tars that a task needs; those that are missing are logged or refused.

    Args:
        training: task file of the training.
        evaluation: task file of the scoring.
        data: folder that the benchmark downloads into.

    Raises:
        DataError: a task file names no data, a tar is missing and cannot be downloaded, or one is empty or not a tar.
    """
    trained = read_task_file(training).get("train_data")
    if not isinstance(trained, dict) or not trained:
        raise DataError(f"{training}: has no train_data")
    scored = {name: entry.get("data") if isinstance(entry, dict) else None
              for name, entry in read_task_file(evaluation).items()}  # fmt: skip
    here: list[Path] = []
    absent: list[Path] = []
    for file, entries in ((training, trained), (evaluation, scored)):
        for name, entry in entries.items():
            if not isinstance(entry, dict) or not isinstance(entry.get("data"), str | list):
                raise DataError(f"{file}: {name} names no data")
            for tar in _tars(name, entry, data):
                (here if tar.is_file() else absent).append(tar)
    for tar in here:
        _check_tar(tar)
    if not absent:
        return
    missing = f"{len(absent)} of {len(here) + len(absent)} tars are missing, first {absent[0]}"
    if _offline():
        raise DataError(f"{data}: {missing}; download them (docs/benchmarks.md), or unset HF_HUB_OFFLINE")
    if shutil.which("curl") is None:
        raise DataError(f"{data}: {missing}; xares_llm would download them with curl, which is not installed")
    logger.info("%s: %s; xares_llm downloads them", data, missing)


def _tars(name: str, entry: Mapping[str, Any], data: Path) -> Iterator[Path]:
    """Paths of a dataset's tars, expanded as the benchmark does; those at other addresses are left out."""
    patterns = [entry["data"]] if isinstance(entry["data"], str) else entry["data"]
    for path in (one for pattern in patterns for one in braceexpand.braceexpand(str(pattern))):
        if entry.get("repo_id") is not None:
            yield data / path
        elif "://" not in path:
            found = sorted(glob.glob(os.path.expanduser(path)))
            if not found:
                raise DataError(f"{path}: there is no such tar, but {name} names it")
            yield from map(Path, found)


def _check_tar(path: Path) -> None:
    """Check the header of the first member only: reading all would take as long as a download."""
    try:
        tarfile.open(path).close()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is not a tar, perhaps a broken download; delete it and get it again") from error


def check_models(decoder: str, evaluations: Mapping[str, Any]) -> None:
    """Check that the models a task needs are in the cache of the Hugging Face hub or can be fetched.

    Args:
        decoder: hub id or folder of the language model.
        evaluations: datasets of the scoring with their metrics, as in a task file.

    Raises:
        ConfigError: some are missing; names them, the datasets that need them, and the commands that fetch them.
        DataError: the file of the error checker is damaged.
    """
    missing = {}
    if not _is_available(decoder):
        if decoder.startswith((".", "/", "~")) or Path(decoder).is_dir():
            raise ConfigError(f"{decoder}: is neither a folder with {' and '.join(_CONFIGS)} nor a hub id")
        missing[f"{decoder} for all tasks"] = f"hf download {decoder}"
    metrics = {dataset_name(name): entry.get("metric") for name, entry in evaluations.items()}
    captions = ", ".join(name for name, metric in metrics.items() if metric in _CAPTION_METRICS)
    if captions:
        checker = Path(os.environ.get("FENSE_DATA") or "~/.fense_data").expanduser() / _ERRORS
        models = [_SENTENCES]
        if checker.is_file():
            models.append(_model_of(checker))
        elif not _is_reachable(_ERRORS_URL):
            missing[f"{checker} for {captions}"] = f"curl -L --create-dirs -o {checker} {_ERRORS_URL}"
        for model in models:
            if not _is_available(model):
                missing[f"{model} for {captions}"] = f"hf download {model}"
    if missing:
        listed = "; ".join(f"{model} ({command})" for model, command in missing.items())
        raise ConfigError(f"models are neither on this machine nor reachable, fetch them beforehand: {listed}")


def _model_of(checker: Path) -> str:
    """Hub id of the model that the error checker of captions is made of."""
    try:
        return str(torch.load(checker, map_location="cpu", weights_only=True)["model_type"])
    except Exception as error:  # foreign bytes raise any kind of error in the reader of pickles
        raise DataError(f"{checker}: cannot be read, perhaps a broken download; delete it and get it again") from error


def _is_available(model: str) -> bool:
    """Whether a model is a local folder, in the cache of the hub's client, or on a hub that answers."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    if Path(model).is_dir():
        return all((Path(model) / name).is_file() for name in _CONFIGS)
    try:
        kept = {name for name in (*_CONFIGS, *_WEIGHTS) if isinstance(try_to_load_from_cache(model, name), str)}
        if kept.issuperset(_CONFIGS) and not kept.isdisjoint(_WEIGHTS):
            return True
        HfApi().model_info(model, timeout=_SECONDS)
    except (HTTPError, OSError, ValueError):  # no network, an unknown id, no id at all
        return False
    return True


def _is_reachable(url: str) -> bool:
    try:
        if not _offline():
            urllib.request.urlopen(url, timeout=_SECONDS).close()
            return True
    except OSError:
        pass
    return False


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
