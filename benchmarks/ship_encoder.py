"""Write the encoder of a run into the package, with its weights in 16 bits, and the numbers that tests compare it with.

    python benchmarks/ship_encoder.py RUN [--name bestrq2-tiny] [--recipe RECIPE] [--data DATA]

replaces weights, configuration and training facts in src/bestrq2/encoders/NAME, and in tests/convert/NAME.json the
embedding of a generated sound; without that file the tests of the encoder are skipped. The model card there,
docs/encoder.md and README.md are written by hand. Statistics stay in float32, and loading gives float32 weights.

Printed is what rounding to either 16-bit type changes in embeddings: |rounded - float32| / |float32|, in percent, mean
and maximum over clips of SoundWorld.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestrq2.convert.loading import load_encoder
from bestrq2.convert.shipped import ENCODERS, TRAINING
from bestrq2.data.labels import soundworld_tasks
from bestrq2.evaluate.provenance import run_provenance
from bestrq2.files import write_bytes, write_text
from bestrq2.inference.embedder import Embedder
from bestrq2.model.modeling_bestrq2 import BestRQ2Model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "src" / "bestrq2" / "encoders"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(encoder: BestRQ2Model, dtype: torch.dtype) -> BestRQ2Model:
    """A copy whose weights, but not its buffers, are of that type."""
    copied = copy.deepcopy(encoder)
    for weight in copied.parameters():
        weight.data = weight.data.to(dtype)
    return copied


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def print_changes(encoder: BestRQ2Model) -> None:
    clips = [np.asarray(clip) for task in soundworld_tasks(train=1, test=8) for clip in task.test.audio]
    exact = Embedder(encoder).embed(clips).clip
    for name, dtype in DTYPES.items():
        found = Embedder(rounded(encoder, dtype).float()).embed(clips).clip
        changes = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
        print(f"{name}: {100 * changes.mean():.3f} %, at most {100 * changes.max():.3f} %, {len(clips)} clips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default=ENCODERS[0])
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--recipe", help="name of the recipe in the package; by default that in the run's settings")
    parser.add_argument("--data", help="name of the data; by default the last part of the path in the run's settings")
    values = parser.parse_args()
    encoder, training = load_encoder(values.run), run_provenance(values.run)
    print_changes(encoder)
    folder = FOLDER / values.name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as exported:
        rounded(encoder, DTYPES[values.dtype]).save_pretrained(exported)
        write_bytes(folder / "model.safetensors", (Path(exported) / "model.safetensors").read_bytes())
        config = json.loads((Path(exported) / "config.json").read_text(encoding="utf-8"))
    # The type in which transformers loads the weights, whatever type they are stored in.
    write_json(folder / "config.json", {**config, "dtype": "float32"})
    del training["finished"]
    public = {
        "recipe": values.recipe or Path(training["recipe"]).stem,
        "data": values.data or Path(training["data"]).name,
    }
    write_json(folder / TRAINING, {**training, **public})
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {encoder.num_parameters() / 1e6:.2f} M parameters")
    sys.path.insert(0, str(ROOT / "tests"))
    from example_sounds import scene

    stored = Embedder(load_encoder(folder), "cpu").embed(scene(80_000)).clip[0]
    write_json(ROOT / "tests" / "convert" / f"{values.name}.json", [round(float(value), 5) for value in stored])


if __name__ == "__main__":
    main()
