"""Makes `reference_small.npz` from the shared fixture: what fits into the repository of it, for bare clones.

    python tests/model/make_reference_small.py ../shared/fixtures

The weights of the network (1.1 MB) are left out, so it holds the reference's spectrogram, positions and targets of one
clip, but nothing of its encoder; `tests/convert/test_reference_parity.py` checks that where the whole fixture is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def main(folder: Path) -> None:
    outputs = np.load(folder / "reference_sincos.npz")
    state = load_file(folder / "reference_sincos.safetensors")
    target = Path(__file__).with_name("reference_small.npz")
    np.savez_compressed(
        target,
        waveform=outputs["waveform"][0, 0],
        log_mel=outputs["log_mel"][0, 0],
        mask=outputs["mask"],
        targets=outputs["targets"][0],
        window=state["spectrogram.mel_spec.spectrogram.window"],
        mel_filters=state["spectrogram.mel_spec.mel_scale.fb"],
        encoder_positions=state["encoder.pos_embed"][0],
        predictor_positions=state["predictor.pos_embed"][0],
        projection=state["quantizer.P"],
        codebook=state["quantizer.CB"],
    )
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
