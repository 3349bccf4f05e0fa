"""One task through the harness: audio, embeddings, MLP and k-NN, each done once and checked when reused.

The harness files embeddings, checkpoints and scores under the class name of the encoder, takes a checkpoint of a
training that was interrupted for a finished one, and reads scores from text files that may be half. Here each model has
a folder of its own, embeddings carry a list of what they should be, no checkpoint is ever taken over, and scores are
kept in one file that is written whole.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bestrq2.errors import DataError
from bestrq2.evaluate.xares.audio_tars import AudioTars, find_audio_tars, lend
from bestrq2.evaluate.xares.downloading import download, harness_task
from bestrq2.evaluate.xares.encoder import XaresEncoder, encoder_class
from bestrq2.evaluate.xares.entries import Score
from bestrq2.evaluate.xares.identity import Extraction
from bestrq2.evaluate.xares.task_files import FRAME_LEVEL, checked_config, file_digest
from bestrq2.files import folder_lock, write_text
from bestrq2.inference.embedder import Embedder

logger = logging.getLogger(__name__)

SCORES, EMBEDDED = "scores.json", "embeddings.json"


@dataclass(frozen=True)
class Job:
    """What a worker is asked for, as plain JSON types.

    Attributes:
        task_file: of the task.
        data: folder with a folder of tars a task.
        download: whether the harness may download what is missing there.
        models: folder of what is kept of all models.
        identity: short name of the model's identity.
        extraction: fields of `Extraction`.
        decoders: processes that decode while the encoder runs; 0 for none.
        keep_embeddings: leave the embeddings on disk when the scores are there.
    """

    task_file: str
    data: str
    download: bool
    models: str
    identity: str
    extraction: dict[str, Any]
    decoders: int = 0
    keep_embeddings: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        scores: of the MLP, and of k-NN where the task has it.
        facts: clips, frames' hop in ms, seconds of encoding, digests of task file and audio; see `score_task`.
        reused: whether all scores were there before.
    """

    scores: tuple[Score, ...]
    facts: dict[str, Any]
    reused: bool


def score_task(job: Job, embedder: Embedder, on_clips: Callable[[int, int], None]) -> Outcome:
    """Score a model on one task; what an earlier call finished is taken over.

    Runs in a process of the harness.

    Args:
        job: what is asked for.
        embedder: the model of `job.identity`.
        on_clips: is told how many clips are encoded, and of how many.

    Raises:
        BestRQ2Error: with one sentence on what is wrong with the task's file or audio, or with the model.
        Exception: whatever the harness raises.
    """
    path = Path(job.task_file)
    config = checked_config(path, None)
    data = Path(job.data) / config.name
    if job.download:
        download(config, Path(job.data))
    tars = find_audio_tars(data, config.audio_tar_name_of_split, job.download)
    facts = {"task_file": file_digest(path), "audio": tars.digest, "clips": tars.clips}
    folder = Path(job.models) / job.identity / f"{config.name}-{_key(facts)}"
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        kept = _read_scores(folder / SCORES, facts)
        methods = ("mlp", "knn") if config.do_knn else ("mlp",)
        if all(method in kept for method in methods):
            return Outcome(_scores(kept, config), kept["facts"], True)
        kept.setdefault("facts", facts)
        _TaskRun(job, embedder, folder, tars, on_clips).run(methods, kept)
    return Outcome(_scores(kept, config), kept["facts"], False)


class _TaskRun:
    """The stages of one task in its folder."""

    def __init__(
        self, job: Job, embedder: Embedder, folder: Path, tars: AudioTars, on_clips: Callable[[int, int], None]
    ) -> None:
        self.job, self.folder, self.tars = job, folder, tars
        self.done, self.on_clips = 0, on_clips
        frame_level = checked_config(Path(job.task_file), None).task_type in FRAME_LEVEL
        encoder = self._encoder(embedder, Extraction(**job.extraction), frame_level)
        self.config = checked_config(Path(job.task_file), encoder)
        self.config.env_root = folder / "env"
        self.config.num_encoder_workers = job.decoders
        if frame_level:
            self.config.batch_size_encode = 1  # no padding among frames that all count
        self.hop_ms = encoder.hop_size_in_ms
        lend(tars.paths, folder / "env" / self.config.name)
        self.task = harness_task(self.config)

    def _encoder(self, embedder: Embedder, extraction: Extraction, frame_level: bool) -> XaresEncoder:
        phases = extraction.phases if frame_level else extraction.clip_phases
        return encoder_class(self.job.identity)(embedder.model, phases, frame_level, extraction.layers, self._count)

    def _count(self, clips: int) -> None:
        self.done += clips
        self.on_clips(self.done, self.tars.clips)

    def run(self, methods: tuple[str, ...], kept: dict[str, Any]) -> None:
        """Fill in `kept` the methods that are missing, and keep it on disk after each."""
        self._encode(kept["facts"])
        for method in methods:
            if method in kept:
                continue
            # A training that was interrupted leaves a checkpoint that the harness would take for the result.
            shutil.rmtree(self.task.ckpt_dir, ignore_errors=True)
            self.task.ckpt_dir.mkdir(parents=True)
            started = time.monotonic()
            value = float((self.task.run_mlp() if method == "mlp" else self.task.run_knn())[0])
            if not math.isfinite(value):
                raise DataError(f"{self.config.name}: the harness gives {value} as its {method} score")
            kept[method] = {"value": value, "seconds": round(time.monotonic() - started, 1)}
            write_text(self.folder / SCORES, json.dumps(kept, indent=1) + "\n")
        shutil.rmtree(self.task.ckpt_dir, ignore_errors=True)
        if not self.job.keep_embeddings:
            shutil.rmtree(self.task.encoded_tar_dir, ignore_errors=True)
            (self.folder / EMBEDDED).unlink(missing_ok=True)

    def _encode(self, facts: dict[str, Any]) -> None:
        """Embeddings of all clips, unless they are there and as they were written."""
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
        self.task.make_encoded_tar()
        gc.collect()  # the harness leaves it to the collector to close its last tar
        if self.done == 0:
            raise DataError(
                f"{self.config.name}: none of its {self.tars.clips} clips could be decoded; see the log for each"
            )
        found: dict[str, Any] = {"embeddings": self.done, "hop_ms": self.hop_ms}
        found["encode_seconds"] = round(time.monotonic() - started, 1)
        if self.done < self.tars.clips:
            found["skipped_clips"] = self.tars.clips - self.done
        facts.update(found)
        write_text(listing, json.dumps({"facts": found, "files": _hashes(folder)}, indent=1) + "\n")


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(f"{facts['task_file']} {facts['audio']}".encode(), digest_size=8).hexdigest()


def _scores(kept: Mapping[str, Any], config: Any) -> tuple[Score, ...]:
    # The harness scores k-NN by accuracy, whatever the metric of the MLP.
    metrics = {"mlp": str(config.metric), "knn": "accuracy"}
    return tuple(
        Score(config.name, method, kept[method]["value"], metric, kept[method]["seconds"])  # type: ignore[arg-type]
        for method, metric in metrics.items()
        if method in kept
    )


def _read_scores(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Finished methods of an earlier call; none where the file is damaged or of other audio."""
    kept = _read_json(path)
    if kept is None:
        return {}
    try:
        same = all(kept["facts"][name] == value for name, value in facts.items())
        numbers = [kept[method][name] for method in ("mlp", "knn") if method in kept for name in ("value", "seconds")]
        if same and all(isinstance(number, float) and math.isfinite(number) for number in numbers):
            return kept
    except (KeyError, TypeError):
        pass
    logger.warning("%s: is damaged; the task is scored anew", path)
    return {}


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        logger.warning("%s: is damaged; what it lists is made anew", path)
        return None
    return content if isinstance(content, dict) else None


def _hashes(folder: Path) -> dict[str, str]:
    """BLAKE2b of every tar in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain JSON types."""
    return {"scores": [asdict(score) for score in outcome.scores], "facts": outcome.facts, "reused": outcome.reused}
