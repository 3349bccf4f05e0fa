"""The report of one pretraining run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bestrq2.convert.weights import load_model_folder
from bestrq2.inference.embedder import Embedder
from bestrq2.inference.info import info
from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
from bestrq2.report.contents import ReportContents
from bestrq2.report.examples import embedded_clips, mask_example
from bestrq2.report.html import write_report
from bestrq2.report.of_xares import run_result
from bestrq2.report.run_folder import read_curves

_EXAMPLES = 3
# Facts of `bestrq2 info` that the lead or the curves say already.
_SAID = ("model", "objective", "trained", "data")


def write_run_report(run: Path, waveforms: Sequence[np.ndarray]) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: folder with `model/`, `metrics.csv` and `config.yaml`.
        waveforms: recordings to show, float32 [samples] each at the model's rate; held-out ones where there are any.

    Returns:
        The report.

    Raises:
        BestRQ2Error: if the run folder is not complete.
    """
    model = load_model_folder(run / "model", BestRQ2ForPreTraining)
    embedder = Embedder(model.bestrq2, model.device)
    names = [f"recording {number}" for number in range(1, len(waveforms) + 1)]
    facts = info(run)
    xares, unread = run_result(run)
    contents = ReportContents(
        title=f"Pretraining run {run.resolve().name}",
        lead=f"A {facts['objective']} encoder of {facts['encoder parameters']} parameters, pretrained on "
        f"{facts['data']}: {facts.get('trained', 'no step logged yet')}. Excess loss is the loss above the entropy of "
        "the codes: below zero, the model names hidden codes better than knowing how frequent each is.",
        facts={name: value for name, value in facts.items() if name not in _SAID},
        runs=[read_curves(run)],
        examples=[
            mask_example(model, waveform, name)
            for waveform, name in zip(waveforms[:_EXAMPLES], names[:_EXAMPLES], strict=True)
        ],
        xares=xares,
        clips=embedded_clips(embedder, waveforms, names) if waveforms else [],
        notes=[
            *_warnings(run / "warnings.txt"),
            *unread,
            "The recordings shown were cropped by the validation's fixed seed. Made by: bestrq2 pretrain",
        ],
    )
    write_report(run / "report.html", contents)
    return run / "report.html"


def _warnings(path: Path) -> list[str]:
    """What the run warned of, one line each."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [f"Warning at {line}" for line in lines]
