"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fork_server import Child, Finished, ForkServer

# pytest-xdist ignores Ctrl-C in its workers, and programs started there would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test needs the hub; a typo in one must not wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIXTURES = Path(os.environ.get("BESTRQ2_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))

# Clips of at most 5 s: a grid of 8 x 8 patches.
TINY = {
    "max_seconds": 5.0,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "drop_path_rate": 0.0,
    "predictor_hidden_size": 24,
    "predictor_num_layers": 1,
    "predictor_num_attention_heads": 2,
    "predictor_intermediate_size": 40,
    "codebook_size": 64,
    "codebook_dim": 8,
}


def pytest_collection_finish() -> None:
    """Exempt imported modules and collected tests from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def reference_fixture() -> Path:
    """The reference fixture's path without suffix; the test is skipped where the fixture is not at hand."""
    path = FIXTURES / "reference_sincos"
    if not path.with_suffix(".npz").is_file():
        pytest.skip(f"no reference fixture in {FIXTURES}; name its folder in BESTRQ2_FIXTURES")
    return path


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Makes a `BestRQ2Config` of a model that runs in milliseconds; keyword arguments change its fields."""
    from bestrq2 import BestRQ2Config

    return lambda **changes: BestRQ2Config(**{**TINY, **changes})


def _strengthen(model: Any) -> Any:
    """Weights under which every token matters to every other, as in a trained model; at initialisation few do."""
    import torch

    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=random)
        scale, centre = 0.3, 0.0
        if ".norm" in name or "_norm" in name:
            centre = 1.0 if name.endswith("weight") else 0.0
        elif "patch_embedding.weight" in name:
            scale = 1e-3 if model.config.input_normalization == "none" else 0.05  # tokens of size 1
        elif parameter.ndim == 2:
            scale = 1.2 * parameter.shape[1] ** -0.5
        parameter.data.copy_(centre + scale * draw)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_pretraining(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a `BestRQ2ForPreTraining` of `tiny_config` with strong random weights, in evaluation mode."""
    from bestrq2 import BestRQ2ForPreTraining

    return lambda **changes: _strengthen(BestRQ2ForPreTraining(tiny_config(**changes)))


@pytest.fixture(scope="session")
def tiny_encoder(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a `BestRQ2Model` of `tiny_config` with strong random weights, in evaluation mode."""
    from bestrq2 import BestRQ2Model

    return lambda **changes: _strengthen(BestRQ2Model(tiny_config(**changes)))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts processes that have everything imported; see fork_server.py for what differs from a fresh interpreter."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def start_cli(fork_server: ForkServer) -> Iterator[Callable[..., Child]]:
    """Starts `bestrq2 ARGUMENTS...`: start_cli(arguments, cwd=, env=, stdin=, stdout=, stderr=) -> Child."""
    yield from _starting(fork_server.start_cli)


@pytest.fixture
def start_python(fork_server: ForkServer) -> Iterator[Callable[..., Child]]:
    """Starts `python SCRIPT ARGUMENTS...` or `python -c CODE ARGUMENTS...`; otherwise like `start_cli`."""
    yield from _starting(fork_server.start_python)


def _starting(start: Callable[..., Child]) -> Iterator[Callable[..., Child]]:
    """A function that starts processes; what still runs at the end of the test is killed."""
    started: list[Child] = []

    def starting(arguments: Any, **options: Any) -> Child:
        started.append(start(arguments, **options))
        return started[-1]

    yield starting
    for child in started:
        child.kill_group()
        child.close()


@pytest.fixture
def run_cli(start_cli: Callable[..., Child]) -> Callable[..., Finished]:
    """Runs `bestrq2 ARGUMENTS...` to its end: run_cli(arguments, timeout=120, cwd=, env=, ...) -> Finished."""
    return lambda arguments, timeout=120.0, **options: start_cli(arguments, **options).finish(timeout)


@pytest.fixture
def run_python(start_python: Callable[..., Child]) -> Callable[..., Finished]:
    """Runs `python ARGUMENTS...` to its end; otherwise like `run_cli`."""
    return lambda arguments, timeout=120.0, **options: start_python(arguments, **options).finish(timeout)


@pytest.fixture
def empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in an empty folder, where no file or folder can be taken for a recipe of the same name."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
