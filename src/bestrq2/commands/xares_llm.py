"""`bestrq2 xares-llm`: score an encoder in front of a small language model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestrq2 import flags

if TYPE_CHECKING:
    from bestrq2.evaluate.result import Result


def xares_llm(
    model: str | os.PathLike[str],
    task: str = "task1",
    evaluation: str | None = None,
    output: Path = Path("xares-llm"),
    data: Path = Path("xares_data"),
    phases: int = 2,
    layers: int | None = None,
    decoder: str | None = None,
    training: dict[str, Any] | None = None,
    processes: int = 1,
    python: str | None = None,
) -> Result:
    """Score an encoder by XARES-LLM: train a small language model behind the frozen encoder, then score its answers.

    Rerun the same command after an interruption to do only the missing steps: a finished training and finished scores
    are kept; the benchmark restarts a training that was cut short.

    XARES-LLM runs only with transformers below 5, so it needs an environment of its own, which --python names:
    pip install 'transformers<5' 'xares-llm @ git+https://github.com/xiaomi-research/xares-llm' soundfile soxr av

    Args:
        model: "bestrq2-tiny" (of the package), run or exported folder, reference checkpoint, recipe or hub id.
        task: training task: task1 (classification), task2 (understanding), all, the name of one dataset, or a .yaml
            file in the benchmark's format.
        evaluation: evaluation task, in the same words; the same as `task` by default. Required with a .yaml file.
        output: folder for work and results, with one subfolder per model and settings.
        data: folder of the benchmark's tars; missing ones are downloaded there (unless HF_HUB_OFFLINE is 1).
        phases: shifted copies of the patch grid, for frames every 1/phases of the hop.
        layers: hidden layer to use instead of the encoder's output.
        decoder: name or folder of another language model; scores are then not comparable with published ones.
        training: other settings of the benchmark's training, such as {"max_steps": 1000}; scores are then not
            comparable with published ones.
        processes: GPUs to train on, with accelerate; 1 uses at most one.
        python: interpreter of an environment with xares_llm and transformers below 5; the current one by default.

    Returns:
        The scores, also written as JSON into the model's subfolder of `output`.

    Raises:
        BestRQ2Error: with one sentence that says what to change, also for failures of the benchmark itself.
    """
    from bestrq2.evaluate.xares_llm.run import run_xares_llm

    return run_xares_llm(
        model, task=task, evaluation=evaluation, output=output, data=data, phases=phases, layers=layers,
        decoder=decoder, training=training, processes=processes, python=python,
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 xares-llm`, or only its contract with `--check`."""
    switches = {"check": "only check the encoder against the benchmark's contract"}
    values = flags.parse_command(xares_llm, argv, positional=("model",), switches=switches)
    if values.pop("check"):
        from bestrq2.evaluate.xares_llm.run import check_encoder

        print(check_encoder(**{name: values[name] for name in ("model", "phases", "layers", "python")}))
        return
    result = xares_llm(**values)
    from bestrq2.evaluate.result import check_complete

    print(result)
    check_complete(result)
