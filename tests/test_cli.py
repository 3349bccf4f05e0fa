"""The command line itself: light until its flags are accepted, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import bestrq2
from bestrq2 import cli
from bestrq2.errors import StoppedBySignal

MAIN = [sys.executable, "-m", "bestrq2"]

LIGHT = """
import contextlib, io, json, sys
from bestrq2 import cli
outcomes = {}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.run(line.split())
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "transformers", "lightning_fabric", "numpy", "sklearn", "scipy", "pyarrow", "matplotlib",
             "soundfile", "av", "jinja2", "tqdm", "huggingface_hub",
             "bestrq2.model.configuration_bestrq2"} & set(sys.modules)
    assert not heavy, f"{line}: imported {sorted(heavy)}"
    assert "Traceback" not in out.getvalue() + err.getvalue()
    outcomes[line] = code, err.getvalue()
assert "BestRQ2Config" in dir(__import__("bestrq2"))
print(json.dumps(outcomes))
"""


def test_help_refused_flags_and_facts_of_a_recipe_import_nothing_heavy():
    """They take 0.2 s of processor time, which importing torch would multiply by twenty."""
    lines = {f"{command} --help": 0 for command in cli.COMMANDS}
    lines |= {f"{command} --mistyped": 2 for command in cli.COMMANDS}
    lines |= {"info best-rq-2-tiny --no-cost": 0, "pretrain --trainer.max_steps 0": 2, "probe demo --device": 2}
    done = subprocess.run([sys.executable, "-c", LIGHT, json.dumps([*lines])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert {line: code for line, (code, _) in outcomes.items()} == lines
    for line, (code, errors) in outcomes.items():
        if code == 2:
            assert errors.startswith(f"bestrq2 {line.split()[0]}: ")
            assert errors.count("\n") == 1


def test_overview_and_version(capsys: pytest.CaptureFixture[str]):
    assert cli.run([]) == 0
    overview = capsys.readouterr().out
    for command in ("demo", "pretrain", "prepare", "soundworld", "embed", "probe", "info"):
        assert re.search(rf"^  {command} ", overview, re.MULTILINE)
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"bestrq2 {bestrq2.__version__}\n"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_explains_every_setting_in_plain_types(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.run([command, "--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: bestrq2 {command} ")
    assert "--print-config" in page
    assert "by default" in page or "default:" in page
    for noise in ("Union", "NoneType", "Optional", "null]", "<class"):
        assert noise not in page
    undocumented = [line for line in page.splitlines() if re.fullmatch(r"  -\S+( \S+)?", line)]
    following = page.splitlines()
    for line in undocumented:
        assert following[following.index(line) + 1].startswith(" " * 10), f"{line} has no help"


def test_help_of_pretrain_opens_with_five_settings_and_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.run(["pretrain", "--recipe", "best-rq-2-tiny", "--help"])
    page = capsys.readouterr().out
    flags = re.findall(r"^  (--\S+)", page, re.MULTILINE)
    assert flags[:5] == ["--data", "--output", "--recipe", "--trainer.max_steps", "--loader.batch_seconds"]
    example = page.index("bestrq2 pretrain --data recordings/")
    assert page.index("--loader.batch_seconds") < example < page.index("--seed")
    assert "--model.hidden_size INT" in page
    assert re.search(r"width of the encoder\s+\(default: 192\)", page)  # the recipe's, not the class's


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "demo", "nowhere", "--output", "x.parquet"], "nowhere"),
        (["probe", "demo", "nowhere"], "nowhere"),
        (["info", "nowhere"], "no such model"),
        (["predict", "demo"], "SOURCE and --output are missing"),
        (["predict", "demo", "audio", "--outptu", "x.csv"], "did you mean '--output'?"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
        (["soundworld", "x", "--format", "vinyl"], "vinyl"),
        (["dmeo"], "did you mean 'demo'?"),
        (["--hepl"], "did you mean '--help'?"),
        (["foo"], "`bestrq2 --help` lists the commands"),
        (
            ["embed", "demo", "a", "folder", "--output", "x"],
            "'folder' is not expected; write bestrq2 embed MODEL SOURCE",
        ),
        (["xares"], "MODEL is missing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_command_refuses_nonsense_in_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith(f"bestrq2 {words[0]}: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in captured.err + captured.out
    assert not list(tmp_path.glob("x*"))


WRITERS = {
    "embed": (["embed", "demo", "nowhere", "--output"], ".parquet"),
    "predict": (["predict", "demo", "nowhere", "--output"], ".csv"),
    "prepare": (["prepare", "nowhere"], ""),
    "pretrain": (["pretrain", "--recipe", "demo", "--data", "nowhere", "--output"], ""),
    "finetune": (["finetune", "demo", "nowhere", "--output"], ""),
    "probe": (["probe", "demo", "soundworld", "--output"], ".json"),
    "export": (["export", "demo"], ""),
    "export onnx": (["export", "--format", "onnx", "demo"], ""),
    "export reference": (["export", "--format", "reference", "demo"], ".safetensors"),
    "compare": (["compare", "nowhere", "--output"], ""),
    "soundworld": (["soundworld"], ""),
    "realworld": (["realworld"], ""),
    "demo": (["demo", "--output"], ""),
}


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_cannot_be_written_is_refused_in_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a folder "demo", as `make demo` leaves it, would be taken for the model
    words, suffix = WRITERS[command]
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    outputs = {
        f"file/x{suffix}": "Not a directory", f"{'x' * 300}{suffix}": "File name too long",
        f"loop/x{suffix}": "Too many levels of symbolic links", f"pipe{suffix}": "is a device, a pipe or a socket",
    }  # fmt: skip
    for name, reason in outputs.items():
        assert cli.run([*words, str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert reason in captured.err.splitlines()[-1]
        assert "Traceback" not in captured.err + captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", "loop", f"pipe{suffix}"])


@pytest.mark.parametrize("seconds", [0.15, 0.6])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_modules_are_imported_ends_a_command(number: int, code: int, seconds: float):
    process = subprocess.Popen([*MAIN, "info", "best-rq-2-large"], stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (code, -number)  # the interpreter itself starts without our handler
    assert "Traceback" not in errors or process.returncode == -number


ENTRY = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "bestrq2._registration":  # the first module after the package itself
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["/somewhere/bin/bestrq2", "--version"]
from bestrq2.cli import main
main()
"""


def test_ctrl_c_while_the_entry_point_is_imported_leaves_no_trace():
    done = subprocess.run([sys.executable, "-c", ENTRY], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


SWALLOWED = """
import os, signal, sys, time
from bestrq2 import cli
class Finaliser:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
def run(argv):
    Finaliser()
    time.sleep(20)
cli.run = run
cli.main()
"""


def test_a_signal_whose_exception_a_finaliser_swallows_is_repeated():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - started < 15


def test_a_signal_that_comes_before_its_repetition_is_left_is_repeated_once_more(monkeypatch: pytest.MonkeyPatch):
    signals, started = cli._Signals(), []

    class Early:
        """A timer so late to return from `start` that its signal is already there."""

        def __init__(self, delay: float, function: Callable[..., object], arguments: tuple[int, int]) -> None:
            self.number = arguments[1]

        def start(self) -> None:
            started.append(self.number)
            if len(started) == 1:
                signals.handle(self.number, sys._getframe())

    monkeypatch.setattr(threading, "Timer", Early)
    with pytest.raises(StoppedBySignal):
        signals.handle(signal.SIGTERM, None)
    signals.raise_again(SimpleNamespace(exc_value=StoppedBySignal("terminated", signal.SIGTERM)))
    assert started == [signal.SIGTERM, signal.SIGTERM]


def test_a_reader_that_goes_away_early_causes_no_trace(start_cli):
    read, write = os.pipe()
    os.close(read)
    process = start_cli(["info", "best-rq-2-tiny"], stdout=write)
    os.close(write)
    assert process.wait() == 128 + signal.SIGPIPE
    assert process.stderr == ""
