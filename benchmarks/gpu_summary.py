"""Table of the figures of on_a_gpu.py beside their aims."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Share of the matrix peak at base size, clips per second of the paper's recipe, peak memory over its floor, waiting for
# data, difference of the losses in float32 and bfloat16.
SHARE, CLIPS, MEMORY, WAITING, DIFFERENCE = 0.5, 6000.0, 1.2, 0.03, 0.01
PAPER, BASE = "best-rq-2", ("best-rq-2", "best-rq-3")
Line = tuple[str, str, str]


def summary(results: dict[str, Any]) -> list[str]:
    """Lines of the table: what was measured, its value, and whether the aim is met; failures last."""
    lines = [("figure", "value", "aim")]
    for name, figures in ((n, f) for stage in results.values() for n, f in stage["figures"].items()):
        lines += _LINES.get(name, _nothing)(figures)
    bad = [(name, stage["outcome"], "") for name, stage in results.items() if stage["outcome"] != "done"]
    width, values = (max(len(line[place]) for line in [*lines, *bad]) for place in (0, 1))
    return [f"{what:<{width}}  {value:<{values}}  {aim}".rstrip() for what, value, aim in [*lines, *bad]]


def _verdict(met: bool, aim: str) -> str:
    return f"{aim}: {'met' if met else 'missed'}"


def _of_steps(figures: dict[str, Any]) -> Iterator[Line]:
    peaks = ", ".join(f"{name} {peak / 1000:.4g} TFLOP/s" for name, peak in figures["matrix_product_gflops"].items())
    yield f"{figures['machine']['device']}, matrix products", peaks, ""
    for row in figures["rows"]:
        what = f"step, {row['recipe']}, {row['step']}, {row['batch']} clips, {row['precision']}"
        if row["note"]:
            yield what, row["note"], ""
            continue
        value = f"{row['clips_per_second']:.4g} clips/s, host {row['host_ms']:.4g} ms"
        if row["kernels"]:
            value += f", {row['kernels']['number']:.0f} kernels, device busy {row['kernels']['busy']:.0%}"
        yield what, value, ""
        if row["share_of_peak"] is not None and row["step"] != "plain":
            met = _verdict(row["share_of_peak"] >= SHARE, f"{SHARE:.0%}") if row["recipe"] in BASE else ""
            yield "  share of the matrix peak", f"{row['share_of_peak']:.1%}", met
        if row["times_plain"] is not None and row["step"] != "plain":
            yield "  times the plain step", f"{row['times_plain']:.2f}", ""
        if row["peak_mib"] and row["floor_mib"]:
            ratio = row["peak_mib"] / row["floor_mib"]
            value = f"{row['peak_mib'] / 1024:.3g} GiB, {ratio:.2f} times the floor"
            yield "  peak memory", value, _verdict(ratio <= MEMORY, f"{MEMORY}")


def _of_runs(figures: dict[str, Any]) -> Iterator[Line]:
    for run in figures["runs"]:
        compiled = "compiled" if run["compile"] else "eager"
        speed = f"{run['clips_per_second']:.4g} clips/s"
        what = f"shards to step, {run['recipe']}, {compiled}, {run['batch']} clips, {run['precision']}"
        yield what, speed, _verdict(run["clips_per_second"] >= CLIPS, f"{CLIPS:.0f}") if run["recipe"] == PAPER else ""
        waits = run["device_waits"]
        yield "  waiting for data", f"{waits:.2%}", _verdict(waits <= WAITING, f"{WAITING:.0%}")


def _of_embedding(figures: dict[str, Any]) -> Iterator[Line]:
    for row in figures["rows"]:
        if "loop" not in row["encoder"]:
            speed = f"{row['audio_seconds_per_second']:.4g} s of audio per second"
            yield f"embedding, {row['encoder']}, {figures['dtype']}", speed, ""


def _of_precisions(figures: dict[str, Any]) -> Iterator[Line]:
    difference = figures["largest_relative_difference"]
    what = f"losses in float32 and bfloat16, {figures['steps']} steps"
    yield what, f"differ by {difference:.2%} at most", _verdict(difference <= DIFFERENCE, f"{DIFFERENCE:.0%}")


def _of_loading(figures: dict[str, Any]) -> Iterator[Line]:
    for row in figures["rows"]:
        if row["reader"] == "bestrq2":
            rate = sorted(turn[0] for turn in row["clips_per_second_and_per_core"])[-1]
            yield f"loader, {row['from']}, {row['workers']} workers", f"{rate:.4g} clips/s", ""


def _of_training(figures: dict[str, Any]) -> Iterator[Line]:
    done = f"{figures['steps']} of {figures['planned_steps']} steps, {figures['steps_per_second']:.3g} per second"
    yield f"training, {'compiled' if figures['compile'] else 'eager'}", done, ""
    for part in ("train", "validation"):
        values = (f"{name} {figures['last'].get(f'{part}/{name}', float('nan')):.3f}" for name in ("loss", "accuracy"))
        yield f"  last values of {part}", ", ".join(values), ""


def _of_data(figures: dict[str, Any]) -> Iterator[Line]:
    yield "generated" if "clips" in figures else "recordings", f"{figures['hours']:.2f} hours", ""


def _nothing(figures: dict[str, Any]) -> Iterator[Line]:
    return iter(())


_LINES = {
    **dict.fromkeys(("step", "host", "peers"), _of_steps),
    **dict.fromkeys(("eager", "compiled"), _of_runs),
    **dict.fromkeys(("bfloat16", "float32"), _of_embedding),
    "precisions": _of_precisions, "loading": _of_loading, "training": _of_training, "soundworld": _of_data,
    **{f"part-{number}": _of_data for number in range(10)},
}  # fmt: skip
