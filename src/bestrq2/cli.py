"""The `bestrq2` command: a table of commands, exit codes and signals.

A command is imported when it is called, and what does its work when its flags are accepted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType
from typing import Any

from bestrq2._version import __version__
from bestrq2.errors import BestRQ2Error, ConfigError, StoppedBySignal

# A program ended by a signal has 128 and its number, as shells and schedulers expect; others are those of the errors.
EXIT_SIGNAL = 128

COMMANDS = {
    "demo": "show what the encoder of the package hears, then pretrain two tiny ones (minutes, no GPU)",
    "pretrain": "pretrain an encoder on a folder of recordings",
    "prepare": "decode, check and pack a source into tars for fast reading",
    "replay": "repeat a failed training step and find where it stopped being finite",
    "soundworld": "write the synthetic corpus and its labelled tasks",
    "realworld": "fetch real recordings for pretraining, and the tasks of the benchmark realworld-1",
    "embed": "embed every recording of a corpus into a Parquet file",
    "search": "find the recordings of an embedded corpus that are most like a sound, and where in them",
    "explore": "see, hear and search an embedded corpus on a local page",
    "probe": "linear probe and k-NN on labelled audio, beside baselines",
    "xares": "score a model on X-ARES by the benchmark's own harness, beside published results",
    "xares-llm": "score an encoder in front of a small language model, by XARES-LLM itself",
    "finetune": "fine-tune an encoder as a classifier of labelled recordings",
    "predict": "classify every recording of a corpus with a fine-tuned encoder",
    "compare": "compare runs over their seeds: probes, cost and losses as tables and figures",
    "export": "write a model as a hub folder, as ONNX or in the reference layout",
    "push": "export a model and upload it to the Hugging Face hub",
    "info": "parameters, cost and origin of a model or a recipe",
}
"""Commands and what they do; `xares-llm` is `bestrq2.commands.xares_llm`."""


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    if argv and argv[0] == "help":  # `bestrq2 help embed`
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"bestrq2 {__version__}")
        return 0
    name = argv[0]
    try:
        if name not in COMMANDS:
            from bestrq2.text import nearest

            hint = nearest(name, [*COMMANDS, "--help", "--version"]) or "; `bestrq2 --help` lists the commands"
            raise ConfigError(f"there is no such command{hint}")
        importlib.import_module(f"bestrq2.commands.{name.replace('-', '_')}").main(argv[1:])
    except BestRQ2Error as error:
        print(f"bestrq2 {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"\nbestrq2 {name}: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        return EXIT_SIGNAL + int(getattr(error, "signal", signal.SIGINT))
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"bestrq2 {__version__}: self-supervised audio encoders by BEST-RQ-2",
            "",
            "usage: bestrq2 COMMAND ...",
            "",
            *lines,
            "",
            "Wherever a command takes a model, bestrq2-tiny names the encoder that comes with the package.",
            "`bestrq2 COMMAND --help` lists the settings of a command.",
        ]
    )


class _Signals:
    """SIGTERM and Ctrl-C end a command at any instant, with the exit code of the signal and without a stack trace."""

    def __init__(self) -> None:
        self.process, self.received = os.getpid(), 0

    def listen(self) -> None:
        """Handle both signals from now on, in this process and in those forked from it."""
        signal.signal(signal.SIGTERM, self.handle)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # not under nohup
            signal.signal(signal.SIGINT, self.handle)
        sys.unraisablehook = self.raise_again

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise; while a module is imported, end at once."""
        self.received = number
        # Some libraries swallow exceptions while they are imported. Nothing is lost: files are whole at any instant.
        running = list(_running(frame))
        if os.getpid() == self.process and any(code.co_filename.startswith("<frozen importlib") for code in running):
            os.write(2, f"\nbestrq2 {' '.join(sys.argv[1:2])}: interrupted\n".encode())
            os._exit(EXIT_SIGNAL + number)
        if _Signals.raise_again.__code__ in running:  # a busy machine took longer to leave it than the signal to come
            self.send_again()
            return
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedBySignal("terminated", number)

    def raise_again(self, unraisable: Any) -> None:
        """Repeat a signal whose exception was raised in a finaliser, where Python drops it."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self.send_again()  # not from within this hook, where it would be dropped again
        else:
            sys.__unraisablehook__(unraisable)

    def send_again(self) -> None:
        """Send the signal again in a moment."""
        import threading

        threading.Timer(0.01, os.kill, (self.process, self.received)).start()


def _running(frame: FrameType | None) -> Iterator[CodeType]:
    """Code of a frame and of its callers."""
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def main() -> None:
    """Entry point of the console script."""
    signals = _Signals()
    signals.listen()
    try:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        for client in ("httpx", "httpx2"):
            logging.getLogger(client).setLevel(logging.WARNING)
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `bestrq2 info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_SIGNAL + signal.SIGPIPE
    except KeyboardInterrupt:  # before or after the command itself
        signals.received = signals.received or signal.SIGINT
        code = 0
    # From here on only the interpreter shuts down, which a signal may cut short.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code or (EXIT_SIGNAL + signals.received if signals.received else 0))
