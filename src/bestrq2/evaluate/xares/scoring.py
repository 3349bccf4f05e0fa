"""One task of X-ARES through the harness: audio, embeddings, linear probe and k-NN, each checked when reused.

The harness files embeddings, checkpoints and scores under the class name of the encoder, takes the checkpoint of an
interrupted training for a finished one, and reads scores from text files that may be incomplete. Here each model has a
folder of its own, embeddings have a list of their hashes, no checkpoint is reused, and scores are kept in one file that
is written whole.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from bestrq2.errors import DataError
from bestrq2.evaluate.xares.audio import AudioTars, download, find_audio_tars, harness_task, link_tars
from bestrq2.evaluate.xares.encoder import Extraction, encoder_class
from bestrq2.evaluate.xares.tasks import FRAME_LEVEL, METHODS, file_digest, task_config
from bestrq2.files import folder_lock, write_text
from bestrq2.inference.embedder import Embedder

logger = logging.getLogger(__name__)

SCORES, EMBEDDED = "scores.json", "embeddings.json"

FORK_BATCH_SIZE = 8
"""Default of `TaskConfig.batch_size_encode` in the author's fork; the harness has 16."""


@dataclass(frozen=True)
class Job:
    """Request to score one task, as plain JSON types.

    Attributes:
        task_file: path of the task file.
        data: folder with one folder of tars per task.
        download: whether the harness may download missing tars into it.
        models: folder of the cached scores of all models.
        identity: short name of the model's identity.
        extraction: fields of `Extraction`.
        keep_embeddings: keep the embeddings on disk when the scores are done.
    """

    task_file: str
    data: str
    download: bool
    models: str
    identity: str
    extraction: dict[str, Any]
    keep_embeddings: bool = False


def score_task(job: Job, embedder: Embedder, on_clips: Callable[[int, int], None]) -> dict[str, Any]:
    """Score a model on one task; results of an earlier call are reused. Runs in a worker process.

    Args:
        job: the request.
        embedder: model of `job.identity`.
        on_clips: called with the number of encoded clips and their total.

    Returns:
        Plain JSON types. scores: task, method, score, metric and seconds of each method; facts: clips, hop in ms,
        seconds of encoding, digests of task file and audio; reused: whether all scores were cached.

    Raises:
        BestRQ2Error: the task's file or audio, or the model, cannot be used.
        Exception: any error of the harness.
    """
    path = Path(job.task_file)
    config = task_config(path, None)
    if job.download:
        download(config, Path(job.data))
    tars = find_audio_tars(Path(job.data) / config.name, config.audio_tar_name_of_split, job.download)
    facts = {"task_file": file_digest(path), "audio": tars.digest, "clips": tars.clips}
    key = hashlib.blake2b(f"{facts['task_file']} {facts['audio']}".encode(), digest_size=8).hexdigest()
    folder = Path(job.models) / job.identity / f"{config.name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    methods = METHODS if config.do_knn else METHODS[:1]
    with folder_lock(folder):
        kept = _read_json(folder / SCORES) or {}
        reused = all(method in kept for method in methods)
        if not reused:
            kept.setdefault("facts", facts)
            _TaskRun(job, embedder, folder, tars, on_clips).run(methods, kept)
    # the harness scores k-NN by accuracy, whatever the metric of the linear probe
    metrics = {"mlp": str(config.metric), "knn": "accuracy"}
    scores = [
        {
            "task": config.name, "method": method, "metric": metrics[method], "score": kept[method]["value"],
            "seconds": kept[method]["seconds"],
        }
        for method in methods
    ]  # fmt: skip
    return {"scores": scores, "facts": kept["facts"], "reused": reused}


class _TaskRun:
    """The stages of one task in its folder."""

    def __init__(
        self, job: Job, embedder: Embedder, folder: Path, tars: AudioTars, on_clips: Callable[[int, int], None]
    ) -> None:
        self.job, self.folder, self.tars, self.on_clips = job, folder, tars, on_clips
        self.done = 0
        extraction = Extraction(**job.extraction)
        config = task_config(Path(job.task_file), None)
        self.frame_level = config.task_type in FRAME_LEVEL
        self.encoder = encoder_class(job.identity)(
            embedder.model,
            extraction.phases if self.frame_level else extraction.clip_phases,
            self.frame_level,
            extraction.chunks,
            self._count,
        )
        link_tars(tars.paths, folder / "env" / config.name)
        self.task = self._new_task()

    def _new_task(self) -> Any:
        """The harness's task, made from its file; making it seeds torch and numpy by 42."""
        config = task_config(Path(self.job.task_file), self.encoder)
        config.env_root = self.folder / "env"
        config.num_encoder_workers = 0  # as under `python -m xares.run`: several mix the clips of several tars
        if self.job.extraction["chunks"]:
            if config.batch_size_encode == type(config).batch_size_encode:
                config.batch_size_encode = FORK_BATCH_SIZE
        elif self.frame_level:
            config.batch_size_encode = 1  # no padding between frames that all count
        return harness_task(config)

    def _count(self, clips: int) -> None:
        self.done += clips
        self.on_clips(self.done, self.tars.clips)

    def run(self, methods: tuple[str, ...], kept: dict[str, Any]) -> None:
        """Add the missing methods to `kept`, and write it to disk after each."""
        self._encode(kept["facts"])
        for method in methods:
            if method in kept:
                continue
            # an interrupted training leaves a checkpoint that the harness would take for the result
            shutil.rmtree(self.task.ckpt_dir, ignore_errors=True)
            self.task.ckpt_dir.mkdir(parents=True)
            started = time.monotonic()
            # the harness scores in a second run, with a task whose random numbers are not used up by encoding
            self.task = self._new_task()
            with fixed_order(self.task.config.seed):
                value = float((self.task.run_mlp() if method == "mlp" else self.task.run_knn())[0])
            if not math.isfinite(value):
                raise DataError(f"{self.task.config.name}: the harness gives {value} as its {method} score")
            kept[method] = {"value": value, "seconds": round(time.monotonic() - started, 1)}
            write_text(self.folder / SCORES, json.dumps(kept, indent=1) + "\n")
        shutil.rmtree(self.task.ckpt_dir, ignore_errors=True)
        if not self.job.keep_embeddings:
            shutil.rmtree(self.task.encoded_tar_dir, ignore_errors=True)
            (self.folder / EMBEDDED).unlink(missing_ok=True)

    def _encode(self, facts: dict[str, Any]) -> None:
        """Embed all clips, unless the embeddings are there and unchanged."""
        folder, listing = self.task.encoded_tar_dir, self.folder / EMBEDDED
        made = _read_json(listing)
        if made and made.get("files") == _hashes(folder):
            facts.update(made["facts"])
            self.task.encoded_ready_path.touch()
            return
        listing.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.monotonic()
        with fixed_order(self.task.config.seed):
            self.task.make_encoded_tar()
        gc.collect()  # the harness leaves it to the collector to close its last tar
        if self.done == 0:
            raise DataError(
                f"{self.task.config.name}: none of its {self.tars.clips} clips could be decoded; see the log for each"
            )
        found: dict[str, Any] = {"embeddings": self.done, "hop_ms": self.encoder.hop_size_in_ms}
        found["encode_seconds"] = round(time.monotonic() - started, 1)
        if self.done < self.tars.clips:
            found["skipped_clips"] = self.tars.clips - self.done
        facts.update(found)
        write_text(listing, json.dumps({"facts": found, "files": _hashes(folder)}, indent=1) + "\n")


@contextmanager
def fixed_order(seed: int) -> Iterator[None]:
    """Make the order of clips in the harness reproducible.

    webdataset seeds each shuffle by process number plus clock, which here read seed, seed + 1, and so on, and the
    harness reads the tars of a split in the order of the file system, which here is that of their names: one of the
    orders that the harness itself can draw.
    """
    from webdataset import filters
    from xares import audiowebdataset

    moments, expand = itertools.count(seed), audiowebdataset.expand_with_brace

    def by_name(urls: Sequence[str]) -> list[str]:
        return [path for url in urls for path in sorted(expand([url]))]

    with (
        patch.object(filters, "os", SimpleNamespace(getpid=lambda: 0)),
        patch.object(filters, "time", SimpleNamespace(time=lambda: next(moments))),
        patch.object(audiowebdataset, "expand_with_brace", by_name),
    ):
        yield


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        logger.warning("%s: is damaged; its content is computed again", path)
        return None
    return content if isinstance(content, dict) else None


def _hashes(folder: Path) -> dict[str, str]:
    """BLAKE2b of every tar in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found
