"""What a report shows, as plain data: whoever gathers it knows models, whoever draws it does not."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bestrq2.evaluate.result import TaskScore
from bestrq2.evaluate.xares.entries import XaresResult


@dataclass(frozen=True)
class RunCurves:
    """The logged quantities of one pretraining run.

    Attributes:
        name: unique short name, for instance the run folder's.
        label: what legends call the run; a `TaskScore.features` equal to `name` or `label` shares the run's colour.
        facts: what distinguishes the run, for instance {"parameters": "1.2 M"}.
        curves: column of metrics.csv ("train/loss", "validation/accuracy", "probe/speech") → (steps int [N],
            values float [N]), steps rising. Losses and entropies in nats, shares and scores in 0..1, code perplexity
            as an effective number of codes.
    """

    name: str
    label: str
    facts: dict[str, str]
    curves: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]


@dataclass(frozen=True)
class MaskExample:
    """One clip as the model saw it in pretraining.

    Attributes:
        title: what the clip is.
        log_mel: [mel, frames] in dB; mel band 0 is the lowest.
        patch_shape: (mel bands, frames) of one patch.
        hidden: bool [rows, columns], True where the patch was hidden; row 0 holds the lowest mel bands.
        true_codes: int [rows, columns], the quantizer's codes.
        predicted_codes: int [rows, columns], the model's codes; only read where `hidden`.
        seconds: duration that the frames of `log_mel` span.

    Raises:
        ValueError: the grid's shapes differ, or the grid is larger than the spectrogram.
    """

    title: str
    log_mel: NDArray[np.floating]
    patch_shape: tuple[int, int]
    hidden: NDArray[np.bool_]
    true_codes: NDArray[np.integer]
    predicted_codes: NDArray[np.integer]
    seconds: float

    def __post_init__(self) -> None:
        grid = self.hidden.shape
        if len(grid) != 2 or self.true_codes.shape != grid or self.predicted_codes.shape != grid:
            raise ValueError(
                f"hidden {grid}, true_codes {self.true_codes.shape} and predicted_codes {self.predicted_codes.shape} "
                "must all be [rows, columns]"
            )
        covered = (grid[0] * self.patch_shape[0], grid[1] * self.patch_shape[1])
        if self.log_mel.ndim != 2 or covered[0] > self.log_mel.shape[0] or covered[1] > self.log_mel.shape[1]:
            raise ValueError(f"{grid} patches of {self.patch_shape} do not fit log_mel {self.log_mel.shape}")


@dataclass(frozen=True)
class EmbeddedClip:
    """One labelled clip and its embedding.

    Attributes:
        vector: float [D], the clip embedding.
        domain, task, label: where the clip comes from and what it holds.
        waveform: int16 [S] or None where the clip cannot be played.
        sampling_rate: in Hz, of `waveform`.
    """

    vector: NDArray[np.floating]
    domain: str
    task: str
    label: str
    waveform: NDArray[np.int16] | None
    sampling_rate: int


@dataclass(frozen=True)
class ReportContents:
    """Everything one report shows; a section without data is left out.

    Attributes:
        title: the page's heading.
        lead: one paragraph: what was trained on what.
        facts: name → value, shown beside the lead.
        runs: curves of every run, drawn over each other.
        examples: clips with hidden patches.
        probes: scores; the order of first appearance of domains, tasks and features is the order shown.
        xares: results of X-ARES; a `XaresResult.model` equal to a run's name or label shares its colour.
        clips: embedded clips for the map and the neighbours, all from the same encoder.
        notes: paragraphs at the end of the page, for instance how the figures were made.
    """

    title: str
    lead: str
    facts: dict[str, str] = field(default_factory=dict)
    runs: list[RunCurves] = field(default_factory=list)
    examples: list[MaskExample] = field(default_factory=list)
    probes: list[TaskScore] = field(default_factory=list)
    xares: list[XaresResult] = field(default_factory=list)
    clips: list[EmbeddedClip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
