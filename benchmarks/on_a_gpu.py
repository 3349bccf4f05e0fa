"""All figures of a GPU in a few minutes, most important first, and a model trained in the time that is left.

    python benchmarks/on_a_gpu.py --seconds 330 --results out --without training
    python benchmarks/on_a_gpu.py --seconds 360 --results out
    python benchmarks/on_a_gpu.py --rehearse --results out             # on a CPU, with tiny models

Stages are runs of the other benchmarks. Each has a limit in seconds; one that fails or runs out of time keeps its
figures so far and does not stop the others. results.json is written after every stage, and stages that are done are
skipped when the command is repeated with the same `--work`. At the end the figures are printed beside their aims.

The last stage pretrains `--recipe` on the recordings in build/gpu-pack (recordings_pack.py), which the stages part-0
and so on unpack, and on SoundWorld (gpu_training.py); the weights come back as trained.tar in pieces of 15 MB:
`cat trained.tar.* | tar x`, then `bestrq2 probe trained ...`. benchmarks/NOTES.md tells what to take along to a machine
without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_summary import summary

from bestrq2.child_processes import available_cpus
from bestrq2.files import write_text

HERE = Path(__file__).parent
PACK = HERE.parent / "build" / "gpu-pack"
# A process that is asked to stop saves its run first (s).
GRACE = 20.0
# A stage gets nowhere in less time (s).
LEAST = 15.0


@dataclass(frozen=True)
class Stage:
    """Commands that belong together.

    Attributes:
        name: key of its results.
        seconds: limit of all commands together.
        commands: arguments of Python by the name of their figures; every command writes them to --json FILE.
        background: whether it runs beside the stages that follow.
    """

    name: str
    seconds: float
    commands: dict[str, list[str]] = field(default_factory=dict)
    background: bool = False


@dataclass(frozen=True)
class Sizes:
    """What is measured, on a GPU or to rehearse on a CPU."""

    recipes: tuple[str, ...] = ("best-rq-2", "best-rq-3-small", "best-rq-3")
    step: str = "--batches 256 --seconds 1 --compiled --graphs --memory"
    end_to_end: str = "--workers 8 --clips 200 --seconds 5"
    host: str = "--recipes best-rq-3-small best-rq-2 --batches 64 128 512 --seconds 0.5 --compiled --graphs"
    peers: str = "--recipes best-rq-conformer --batches 64 --seconds 1"
    embedding: str = "--recipes best-rq-3 best-rq-3-small best-rq-2 --clips 256"
    loading: str = "--clips 200 --seconds 1"
    soundworld: int = 12_000


TINY = Sizes(
    recipes=("demo",),
    step="--batches 2 --seconds 0 --memory",
    end_to_end="--workers 1 --clips 4 --seconds 0.5 --batch 2",
    host="--recipes demo --batches 1 4 --seconds 0",
    peers="--recipes best-rq-conformer-tiny --batches 1 --seconds 0",
    embedding="--recipes demo --clips 2 --turns 1 --peers whisper-base",
    loading="--clips 50 --seconds 0.1 --turns 1 --workers 0",
    soundworld=40,
)


def stages(options: argparse.Namespace) -> list[Stage]:
    """All stages, the most important figures first."""
    sizes = TINY if options.rehearse else Sizes()
    step = ["pretraining_step.py", "--precisions", "bf16"]
    run = ["end_to_end.py", "--precision", "bf16-mixed", "--recipes", *sizes.recipes, *sizes.end_to_end.split()]
    own = ["gpu_training.py", "--work", str(options.work), "--recipe", options.recipe]
    own += ["--rehearse"] if options.rehearse else []
    embedding = ["embedding.py", *sizes.embedding.split(), "--dtype"]
    return [
        *(Stage(part.name, 40, {part.name: [*own, "unpack", str(part)]}) for part in sorted(PACK.glob("part-*"))),
        Stage("step", 140, {"step": [*step, "--recipes", *sizes.recipes, *sizes.step.split()]}),
        Stage("end to end", 110, {"eager": run} | ({} if options.rehearse else {"compiled": [*run, "--compile"]})),
        Stage("soundworld", 200, {"soundworld": [*own, "soundworld", str(sizes.soundworld)]}, background=True),
        Stage("host", 70, {"host": [*step, *sizes.host.split()]}),
        Stage("precisions", 50, {"precisions": [*own, "precisions"]}),
        Stage("peers", 60, {"peers": [*step, "--peers", *sizes.peers.split()]}),
        Stage("embedding", 60, {dtype: [*embedding, dtype] for dtype in ("bfloat16", "float32")}),
        Stage("loading", 40, {"loading": ["data_loading.py", *sizes.loading.split()]}),
        Stage("training", 1e6, {"training": [*own, "train"]}),
    ]


class Runner:
    """Runs stages within their limits and keeps results.json up to date in both folders.

    Args:
        work: folder of intermediate files, which a repeated command finds again.
        results: folder of what is to be kept.
        seconds: time for everything.
    """

    def __init__(self, work: Path, results: Path, seconds: float) -> None:
        self.work, self.folder, self.end = work, results, time.monotonic() + seconds
        for folder in (work / "figures", results):
            folder.mkdir(parents=True, exist_ok=True)
        file = work / "results.json"
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self.log = (work / "log.txt").open("a")

    def left(self) -> float:
        """Seconds left, without those to stop a stage."""
        return self.end - GRACE - time.monotonic()

    def start(self, stage: Stage, name: str, limit: float) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own."""
        script, *arguments = stage.commands[name]
        arguments += ["--json", str(self.work / "figures" / f"{name}.json")]
        arguments += ["--seconds-left", f"{limit:.0f}"] if script == "gpu_training.py" else []
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "BESTRQ2_CACHE": str((self.work / "cache").absolute())}
        self.log.write(f"\n=== {stage.name}: {script} {' '.join(arguments)}\n")
        self.log.flush()
        command = [*(["nice", "-n", "19"] if stage.background else []), sys.executable, str(HERE / script), *arguments]
        return subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )

    def finish(self, process: subprocess.Popen[bytes], limit: float) -> str:
        """Wait for a command, and stop it at its limit; returns how it ended."""
        try:
            code = process.wait(max(0.0, limit))
            return "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            raise
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return "out of time"

    def run(self, stage: Stage, most: float) -> None:
        """Run a stage to its end, or for as long as it may."""
        began, limit = time.monotonic(), min(most, self.left())
        outcome = "done" if limit >= LEAST else "no time left"
        for name in stage.commands if outcome == "done" else ():
            left = limit - (time.monotonic() - began)
            ended = self.finish(self.start(stage, name, left), left)
            outcome = ended if outcome == "done" else outcome
        self.keep(stage, outcome, time.monotonic() - began)

    def keep(self, stage: Stage, outcome: str, seconds: float) -> None:
        """File the figures of a stage, also of one that did not end well."""
        figures = {}
        for name in stage.commands:
            file = self.work / "figures" / f"{name}.json"
            if file.is_file():
                figures[name] = json.loads(file.read_text())
        self.results[stage.name] = {"outcome": outcome, "seconds": round(seconds, 1), "figures": figures}
        write_text(self.work / "results.json", json.dumps(self.results, indent=1) + "\n")
        self.log.flush()
        for path in [self.work / "results.json", self.work / "log.txt", *self.work.glob("trained.tar.*")]:
            shutil.copy(path, self.folder)
        print(f"{stage.name}: {outcome}, {seconds:.0f} s", flush=True)

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage was finished before."""
        return self.results.get(stage.name, {}).get("outcome") == "done"


def without_pyav(folder: Path) -> None:
    """Put a package in place of PyAV where that is missing: it is 35 MB, and recordings here are PCM and Ogg."""
    try:
        import av  # noqa: F401
    except ImportError:
        (folder / "av-0.dist-info").mkdir(parents=True, exist_ok=True)
        (folder / "av-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: av\nVersion: 0\n")
        (folder / "av.py").write_text('"""Stands for PyAV, and decodes nothing."""\n')
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder.absolute()), os.environ.get("PYTHONPATH", "")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for everything")
    parser.add_argument("--results", type=Path, required=True, help="folder of what is to be kept")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "gpu-work", help="folder of other files")
    parser.add_argument("--only", nargs="*", default=[], help="stages; by default all")
    parser.add_argument("--without", nargs="*", default=[], help="stages to leave out")
    parser.add_argument("--recipe", default="best-rq-3-small", help="recipe to train, or a YAML file that extends one")
    parser.add_argument("--rehearse", action="store_true", help="tiny models and few steps, to test this on a CPU")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    without_pyav(options.work / "site")
    runner = Runner(options.work, options.results, options.seconds)
    patience = 10 if options.rehearse else 1  # a CPU that others use
    beside: list[tuple[Stage, subprocess.Popen[bytes], float]] = []
    print(f"{options.seconds:.0f} s, {available_cpus()} CPUs; what the stages print is in {options.work / 'log.txt'}")
    for stage in stages(options):
        if (options.only and stage.name not in options.only) or stage.name in options.without:
            continue
        if runner.is_done(stage):
            print(f"{stage.name}: done before")
        elif stage.background:
            (name,) = stage.commands
            limit = min(stage.seconds * patience, runner.left())
            beside.append((stage, runner.start(stage, name, limit), time.monotonic() + limit))
        else:
            if stage.name == "training":
                wait_for(beside, runner)
            runner.run(stage, stage.seconds * patience)
    wait_for(beside, runner)
    lines = summary(runner.results)
    write_text(options.results / "summary.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def wait_for(beside: list[tuple[Stage, subprocess.Popen[bytes], float]], runner: Runner) -> None:
    """End of what runs in the background."""
    while beside:
        stage, process, end = beside.pop()
        began = time.monotonic()
        runner.keep(stage, runner.finish(process, end - began), time.monotonic() - began)


if __name__ == "__main__":
    main()
