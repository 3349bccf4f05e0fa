"""A child of the fork server behaves as a process with an interpreter of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bestrq2


def test_a_command_has_its_own_arguments_directory_and_output(run_cli, tmp_path: Path):
    finished = run_cli(["--version"], cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (0, f"bestrq2 {bestrq2.__version__}\n")
    finished = run_cli(["info", "nowhere"], cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("bestrq2 info: ")


REPORT = """
import os, sys, signal, json
print(json.dumps([os.getcwd(), sys.argv, os.environ.get("COLOUR"), __name__, os.getpgid(0) == os.getpid(),
                  signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, sys.stdin.read(),
                  len(os.listdir("/proc/self/fd"))]))
sys.exit(int(sys.argv[1]))
"""


def test_python_code_in_a_child_finds_what_a_new_interpreter_does(run_python, tmp_path: Path):
    words = ["-c", REPORT, "7"]
    child = run_python(words, cwd=tmp_path, env={"COLOUR": "red"})
    fresh = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env={**os.environ, "COLOUR": "red"}, stdin=subprocess.DEVNULL,
        start_new_session=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (child.returncode, child.stdout, child.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("import sys; sys.exit('stop')", 1, "stop"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("import os; os._exit(9)", 9, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import signal; signal.raise_signal(signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
        ("import atexit; atexit.register(print, 'last')", 0, "last"),
        ("import multiprocessing as m; m.get_context('spawn').Process(target=print, args=('spawned',)).start()", 0,
         "spawned"),
    ],
)  # fmt: skip
def test_exit_codes_and_final_output_are_those_of_an_interpreter(run_python, code: str, exit_code: int, said: str):
    finished = run_python(["-c", code])
    assert finished.returncode == exit_code
    assert said in finished.stdout + finished.stderr


def test_signals_reach_a_child_right_after_its_start(start_python):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        child = start_python(["-c", "import time; time.sleep(60)"])
        child.send_signal(number)
        assert child.wait(20) == -number


def test_output_can_be_read_while_a_child_runs(start_python):
    child = start_python(["-c", "import time; print('ready', flush=True); time.sleep(60)"])
    child.wait_until(lambda: "ready" in child.stdout)
    assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_random_numbers_differ_between_children(run_python):
    code = "import numpy, torch, random; print(numpy.random.rand(), torch.rand(1).item(), random.random())"
    one, other = (run_python(["-c", code]).stdout.split() for _ in range(2))
    assert len({*one, *other}) == 6


def test_a_child_trains_and_reads_data_in_worker_processes(run_python):
    code = """
import torch
if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    weight = torch.nn.Parameter(torch.ones(64, 64))
    for (batch,) in loader:
        (weight @ weight * batch.sum()).sum().backward()
    print(weight.grad.sum().item() > 0)
"""
    finished = run_python(["-c", code])
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "True\n", "")
