"""Fine-tune an encoder as a classifier of clips with the Trainer of transformers.

    python examples/finetune_with_transformers.py MODEL LABELLED OUTPUT [--epochs 10] [--frozen]

MODEL is a folder that `bestrq2 export MODEL FOLDER` wrote (or `RUN/model`, or a hub id), LABELLED a folder with one
subfolder of audio per class or a table with path and label. OUTPUT gets the classifier and its accuracy on the test
clips. Needs `pip install 'bestrq2[finetune]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# First, because it keeps transformers from a torchaudio that cannot be loaded. It registers the classes, too, so that
# no remote code is run.
import bestrq2  # noqa: F401  # isort: skip

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bestrq2.data.audio import read_audio
from bestrq2.data.labels import LabelledClips, load_labelled


class Clips(torch.utils.data.Dataset[dict[str, Any]]):
    """Labelled files, read on access and cut to the length that the encoder was pretrained on."""

    def __init__(self, clips: LabelledClips, sampling_rate: int, seconds: float) -> None:
        self.clips, self.sampling_rate, self.seconds = clips, sampling_rate, seconds

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        waveform = read_audio(self.clips.audio[index], self.sampling_rate, 0.0, self.seconds)
        return {"waveform": waveform, "label": int(self.clips.labels[index])}


def finetune(model: str, labelled: str, output: Path, epochs: int, batch_size: int, lr: float, frozen: bool) -> float:
    """Train, save the classifier into `output`, and return its accuracy on the test clips."""
    task = load_labelled(labelled)[0]
    if task.kind != "clip":
        raise SystemExit(f"{labelled}: labels moments, not clips; name a folder with one subfolder per class")
    set_seed(0)
    extractor = AutoFeatureExtractor.from_pretrained(model)
    classifier = AutoModelForAudioClassification.from_pretrained(
        model, id2label=dict(enumerate(task.classes)), label2id={name: i for i, name in enumerate(task.classes)}
    )
    classifier.base_model.requires_grad_(not frozen)

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = extractor([item["waveform"] for item in items], return_tensors="pt")
        return {**batch, "labels": torch.tensor([item["label"] for item in items])}

    def accuracy(predicted: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.argmax(predicted.predictions, axis=-1) == predicted.label_ids))}

    rate, seconds = classifier.config.sampling_rate, classifier.config.max_seconds
    trainer = Trainer(
        model=classifier,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=lr,
            warmup_steps=0.1,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=Clips(task.train, rate, seconds),
        eval_dataset=Clips(task.test, rate, seconds),
        compute_metrics=accuracy,
    )
    trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    extractor.save_pretrained(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("labelled")
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--frozen", action="store_true", help="train the head alone")
    values = parser.parse_args()
    found = finetune(**vars(values))
    print(f"{values.output}: accuracy on the test clips {100 * found:.1f} %")


if __name__ == "__main__":
    main()
