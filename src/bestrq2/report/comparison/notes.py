"""What has to be said about a comparison so that nobody reads more out of it than it holds."""

from __future__ import annotations

from collections.abc import Sequence

from bestrq2.report.comparison.arms import Arm, differing
from bestrq2.report.comparison.contents import Table
from bestrq2.report.run_folder import value_text
from bestrq2.run_records import without_rest

TARGETS = tuple(
    f"model.{name}"
    for name in (
        "codebook_size",
        "codebook_dim",
        "num_codebooks",
        "quantizer_seed",
        "quantizer_normalization",
        "patch_size",
        "num_mel_bands",
        "n_fft",
        "win_length",
        "hop_length",
        "mel_min_hz",
        "mel_max_hz",
        "sampling_rate",
    )
)
HIDDEN = tuple(f"model.{name}" for name in ("mask_ratio", "mask_shape", "mask_block_size", "mask_span_probability"))
MOST_ROWS = 40
# Metrics that tables and figures show.
SHOWN = ("loss", "excess_loss", "accuracy", "code_perplexity", "code_coverage", "top_code_share")


def notes(arms: Sequence[Arm]) -> list[str]:
    """Sentences on what makes losses of the arms incomparable, and on values that are missing."""
    found = [*_targets(arms), *_hidden(arms), *_data(arms)]
    if any("…" in arm.label for arm in arms):
        found.append("Labels with … name a part of what differs; table.md has all.")
    for arm in arms:
        for run in arm.runs:
            logged, rates = run.curves.get("train/loss"), run.curves.get("train/learning_rate")
            if logged is not None and rates is not None and without_rest(rates)[0][-1] > logged[0][-1]:
                found.append(f"{run.folder}: the loss was finite for the last time at step {logged[0][-1]:,}.")
    found += _not_logged(arms)
    untimed = [arm.label for arm in arms if any(run.timing is None for run in arm.runs)]
    if untimed and any(run.timing is not None for arm in arms for run in arm.runs):
        found.append(f"Wall time was not recorded, or not for every seed, of: {'; '.join(untimed)}.")
    return found


def _not_logged(arms: Sequence[Arm]) -> list[str]:
    """A sentence for every run that lacks metrics which others logged: switched off there, or renamed."""
    runs = [run for arm in arms for run in arm.runs]
    shown = sorted({name for run in runs for name in run.curves if name.partition("/")[2] in SHOWN})
    found = []
    for run in runs:
        missing = [name for name in shown if name not in run.curves]
        if missing:
            found.append(
                f"{run.folder}: metrics.csv has no {', '.join(missing)}, which other runs logged; they are left out of "
                "the tables and figures, or shown in training for all."
            )
    return found


def settings_table(arms: Sequence[Arm]) -> Table | None:
    """What differs between the arms, a row a setting; None where nothing does."""
    names = differing([arm.settings for arm in arms])
    if not names:
        return None
    rows = [(name, *(value_text(arm.settings.get(name), name) for arm in arms)) for name in names[:MOST_ROWS]]
    if len(names) > MOST_ROWS:
        rows.append((f"and {len(names) - MOST_ROWS} more, in comparison.json", *[""] * len(arms)))
    return Table("settings that differ", ("", *(arm.label for arm in arms)), tuple(rows))


def _targets(arms: Sequence[Arm]) -> list[str]:
    settings = [_with_target_input(arm) for arm in arms]
    names = [name for name in differing(settings) if name in settings[0]]
    if not names:
        return []
    return [
        "Losses of arms with different targets cannot be compared, their excess losses less so: "
        f"{_list(names)} differ{'s' if len(names) == 1 else ''}."
    ]


def _with_target_input(arm: Arm) -> dict[str, object]:
    """The settings that make the targets: without a normalisation of its own the quantizer sees the encoder's input."""
    settings = {name: arm.settings.get(name) for name in TARGETS}
    own = settings["model.quantizer_normalization"] == "dataset"
    return settings | {"model.input_normalization": None if own else arm.settings.get("model.input_normalization")}


def _hidden(arms: Sequence[Arm]) -> list[str]:
    names = [name for name in differing([arm.settings for arm in arms]) if name in HIDDEN]
    if not names:
        return []
    return [
        "Losses are of differently hidden patches, easier or harder to name: "
        f"{_list(names)} differ{'s' if len(names) == 1 else ''}."
    ]


def _data(arms: Sequence[Arm]) -> list[str]:
    names = [name for name in differing([arm.settings for arm in arms]) if name in ("data", "loader.validation_clips")]
    if "data" in names:
        values = "; ".join(f"{arm.label}: {value_text(arm.settings.get('data'))}" for arm in arms)
        return [f"The arms learned from different data, so losses are of different clips ({values})."]
    return (
        ["Validation losses are of different numbers of held-out clips: loader.validation_clips differs."]
        if names
        else []
    )


def _list(names: Sequence[str]) -> str:
    short = [name.removeprefix("model.") for name in names]
    return short[0] if len(short) == 1 else f"{', '.join(short[:-1])} and {short[-1]}"
