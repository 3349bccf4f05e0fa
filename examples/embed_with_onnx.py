"""Embed a recording with an exported encoder: numpy, soundfile and onnxruntime, but neither torch nor bestrq2.

    bestrq2 export run exported --format onnx
    python examples/embed_with_onnx.py exported recording.wav --output embedding.npz

The file holds `clip` [D], `frames` [T, D] and `seconds` [T], the centre of each frame.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import soundfile


def load_front_end(exported: Path) -> ModuleType:
    """Import the front end beside the graph; it is Python code, so use only exports that you trust."""
    spec = importlib.util.spec_from_file_location("front_end", exported / "front_end.py")
    assert spec is not None
    assert spec.loader is not None
    front_end = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(front_end)
    return front_end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path, help="folder made by `bestrq2 export MODEL OUT --format onnx`")
    parser.add_argument("audio", type=Path, help="recording of any length and rate that libsndfile reads")
    parser.add_argument("--int8", action="store_true", help="use the weights of 8 bits (export with --int8)")
    parser.add_argument("--output", type=Path, default=Path("embedding.npz"), help="file to write")
    arguments = parser.parse_args()
    graph = arguments.exported / ("model.int8.onnx" if arguments.int8 else "model.onnx")
    for path in (graph, arguments.audio):
        if not path.is_file():
            parser.error(f"{path}: there is no such file")
    try:
        waveform, rate = soundfile.read(arguments.audio, dtype="float32")
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        clip, frames, seconds = load_front_end(arguments.exported).embed(session, waveform.T, rate)
    except (ValueError, soundfile.LibsndfileError) as error:
        parser.error(f"{arguments.audio}: {error}")
    np.savez(arguments.output, clip=clip, frames=frames, seconds=seconds)
    print(f"{arguments.output}: {len(frames)} frames of {frames.shape[1]} values, and their mean")


if __name__ == "__main__":
    main()
