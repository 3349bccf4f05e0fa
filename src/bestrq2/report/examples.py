"""What a model makes of a few clips: hidden patches with their codes, and embeddings for the map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bestrq2.data.labels import LabelledTask
from bestrq2.inference.embedder import Embedder
from bestrq2.model.masking import draw_hidden_mask
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.report.contents import EmbeddedClip, MaskExample


@torch.inference_mode()
def mask_example(model: BestRQ2ForPreTraining, waveform: np.ndarray, title: str, seed: int = 0) -> MaskExample:
    """Hide patches of one clip as in pretraining and have the model name their codes.

    Args:
        model: in evaluation mode.
        waveform: float32 [samples] at the model's rate; at most the longest clip of pretraining is used.
        title: what the clip is.
        seed: of the mask.
    """
    config = model.config
    clip = torch.from_numpy(waveform[: config.max_samples].astype(np.float32))[None]
    patches = model.bestrq2.patches(clip)
    grid = (config.patch_rows, patches.columns)
    mask = draw_hidden_mask(config, [patches.columns], seed, 0, [0], masks=1)
    output = model(clip, hidden_mask=mask)
    true_codes = model.quantizer(patches.quantizer_input)[0]
    predicted = output.logits[0].argmax(dim=-1)
    if config.num_codebooks > 1:  # the first codebook stands for all
        true_codes, predicted = true_codes[..., 0], predicted[..., 0]
    predicted_codes = torch.full_like(true_codes, -1)
    predicted_codes[mask[0]] = predicted
    frames = patches.columns * config.patch_size[1]
    log_mel, _ = model.bestrq2.log_mel(clip)
    return MaskExample(
        title=title,
        log_mel=log_mel[0, :, :frames].numpy(),
        patch_shape=(config.patch_size[0], config.patch_size[1]),
        hidden=mask[0].view(grid).numpy(),
        true_codes=true_codes.view(grid).numpy(),
        predicted_codes=predicted_codes.view(grid).numpy(),
        seconds=frames * config.hop_length / config.sampling_rate,
    )


def embedded_task_clips(embedder: Embedder, tasks: Sequence[LabelledTask], per_task: int = 40) -> list[EmbeddedClip]:
    """Embed the first test clips of every clip task, with their labels and sound, for the map and the neighbours."""
    clips: list[EmbeddedClip] = []
    for task in tasks:
        if task.kind != "clip":
            continue
        audio = list(task.test.audio[:per_task])
        vectors = embedder.embed(audio, task.test.sampling_rate).clip
        for place, vector in enumerate(vectors):
            sound = audio[place]
            waveform = (32767 * np.clip(sound, -1, 1)).astype(np.int16) if isinstance(sound, np.ndarray) else None
            label = task.classes[int(task.test.labels[place])]
            clips.append(
                EmbeddedClip(vector, task.domain, task.name, label, waveform, task.test.sampling_rate or 16_000)
            )
    return clips


def embedded_clips(embedder: Embedder, waveforms: Sequence[np.ndarray], names: Sequence[str]) -> list[EmbeddedClip]:
    """Embed unlabelled clips under their names, float32 [samples] each at the model's rate."""
    rate = embedder.config.sampling_rate
    vectors = embedder.embed(list(waveforms), rate).clip
    return [
        EmbeddedClip(vector, "recordings", "recordings", name, (32767 * np.clip(sound, -1, 1)).astype(np.int16), rate)
        for vector, sound, name in zip(vectors, waveforms, names, strict=True)
    ]
