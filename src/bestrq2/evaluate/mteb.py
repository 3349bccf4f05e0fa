"""Encoder for `mteb.evaluate`, on the audio tasks of MTEB (MAEB): https://github.com/embeddings-benchmark/mteb.

```python
import mteb
from bestrq2.evaluate.mteb import MTEBEncoder

results = mteb.evaluate(MTEBEncoder("bestrq2-tiny"), mteb.get_tasks(tasks=["BeijingOpera"]))
```
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bestrq2.errors import AudioError, ConfigError
from bestrq2.evaluate.provenance import digest, encoder_identity
from bestrq2.inference.embedder import Embedder, load
from bestrq2.model.readout import Layers
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {"phases": 1, "layers": None, "frequency": None, "pooling": None}


class MTEBEncoder:
    """Audio encoder with the methods of MTEB's `EncoderProtocol`.

    A clip's vector is `Embedder.embed(clip).clip`: clips keep their own lengths and are never padded. This package
    decodes and resamples them (mean over channels, soxr), so torchaudio and torchcodec are not needed for it.

    Args:
        source: embedder, or any model that `bestrq2.load` takes.
        device: device such as "cpu" or "cuda:0"; None for CUDA if available, else the CPU. An embedder keeps its own.
        phases: number of shifted copies of the patch grid whose frames are averaged.
        layers: layer or layers, see `Embedder.embed`; None for the model's own, as for the next two.
        frequency: "mean" or "concat" of the rows of patches along frequency.
        pooling: pooling of frames to a clip vector.

    Attributes:
        mteb_model_meta: name, revision (a hash of weights, architecture and version) and facts of the model, under
            which MTEB caches results.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: mteb is not installed, or an option is out of range.
    """

    def __init__(
        self,
        source: Embedder | str | os.PathLike[str],
        device: str | torch.device | None = None,
        *,
        phases: int = 1,
        layers: Layers | None = None,
        frequency: str | None = None,
        pooling: str | None = None,
    ) -> None:
        self.embedder = source if isinstance(source, Embedder) else load(source, device)
        self.options: dict[str, Any] = {
            "phases": phases, "layers": layers, "frequency": frequency, "pooling": pooling,
        }  # fmt: skip
        self.mteb_model_meta = _model_meta(self.embedder, self.options)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed the clips of a task.

        A clip that is empty or cannot be decoded gets zeros, whose cosine similarity with everything is 0, and a
        warning counts them.

        Args:
            inputs: MTEB's loader, whose batches have a list of clips under "audio", of any lengths and sampling rates.
            task_metadata: metadata of the task, which has its name.
            hf_split: split of the data.
            hf_subset: subset of the data.
            prompt_type: ignored, as audio has no prompt.
            kwargs: `show_progress_bar`, True by default; others are ignored.

        Returns:
            float32 [clips, D].

        Raises:
            AudioError: no clip can be embedded.
        """
        vectors: list[np.ndarray] = []
        failures: list[str] = []
        label = f"{task_metadata.name} ({hf_split})"
        with Progress(label, len(inputs), "batches", shown=kwargs.get("show_progress_bar", True)) as progress:
            for number, batch in enumerate(_undecoded(inputs, self.embedder.config.sampling_rate), 1):
                vectors.extend(self._embed(batch["audio"], failures))
                progress.show(number)
        if failures:
            counts = f"{label}: {len(failures)} of {len(vectors)} clips cannot be embedded"
            if len(failures) == len(vectors):
                raise AudioError(f"{counts}, the first: {failures[0]}")
            logger.warning("%s and get zeros, the first: %s", counts, failures[0])
        return np.stack(vectors)

    def _embed(self, clips: Sequence[Any], failures: list[str]) -> np.ndarray:
        """Vectors of a batch, float32 [clips, D]; reasons are appended to `failures`."""
        try:
            return self.embedder.embed(list(clips), **self.options).clip
        except AudioError as error:
            if len(clips) > 1:
                return np.concatenate([self._embed([clip], failures) for clip in clips])
            failures.append(str(error))
            return np.zeros((1, self.mteb_model_meta.embed_dim), np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarities of all pairs, [n1, n2], of embeddings [n1, D] and [n2, D]."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosine similarities of corresponding embeddings, [n], of embeddings [n, D] twice."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)


def _unit(embeddings: Any) -> Tensor:
    """Embeddings scaled to length 1, float32 [n, D], as a batch also for a single one."""
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings).float()), dim=-1)


def _undecoded(inputs: Any, model_rate: int) -> Iterable[dict[str, Any]]:
    """MTEB's loader with files as bytes, so that they are decoded here; datasets would need torchcodec."""
    from datasets import Audio
    from torch.utils.data import DataLoader

    column = (getattr(inputs.dataset, "features", None) or {}).get("audio")
    # A column with a lower rate of its own asks for audio without high frequencies, which its decoder makes.
    if not isinstance(column, Audio) or (column.sampling_rate or model_rate) < model_rate:
        return inputs
    dataset = inputs.dataset.cast_column("audio", Audio(decode=False))
    return DataLoader(dataset, inputs.batch_size, collate_fn=inputs.collate_fn, num_workers=inputs.num_workers)


def _model_meta(embedder: Embedder, options: dict[str, Any]) -> Any:
    """MTEB's `ModelMeta` of an embedder."""
    try:
        from mteb.models import ModelMeta
    except ImportError as error:
        raise ConfigError("mteb is not installed: pip install 'bestrq2[mteb]'") from error
    weights, readout = list(embedder.model.parameters()), embedder.check_options(**options)
    unknown = "loader release_date languages max_tokens license open_weights training_datasets"
    unknown += " public_training_code public_training_data"
    return ModelMeta(
        name=f"bestrq2/{embedder.name}",
        revision=digest(encoder_identity(embedder)),
        experiment_kwargs={key: value for key, value in options.items() if value != _DEFAULTS[key]} or None,
        n_parameters=sum(weight.numel() for weight in weights),
        memory_usage_mb=sum(weight.nbytes for weight in weights) / 2**20,
        embed_dim=readout.clip_width(embedder.config),
        framework=["PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=False,
        modalities=["audio"],
        **dict.fromkeys(unknown.split()),
    )
