"""Mutated checkpoints load or are refused in one sentence, quickly and in little memory.

A mutation is a function of the kind of file and its number alone, so a failure names the case that repeats it.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_hub_exports import MODERN, hub_config, hub_state

import bestrq2
from bestrq2.convert.export import export_reference
from bestrq2.errors import BestRQ2Error
from mutations import damaged
from reference_layout import reference_config, reference_state

CASES = 160
SECONDS, MEBIBYTES = 10, 400
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2.5, 1e-9, -1e300, 1e18, 10**9, 2**31, 2**63, 10**40, float("nan"), float("inf")),
    *("", "a", "768", "é\n\x00", "torch.nn.Identity", "../../etc/passwd", "x" * 5000),
    *([], [1], [16, 16], [0, 0], [-4, 10**9], ["a", None], [[1]], [16] * 300, {}, {"a": 1}, {"net": {"net": {}}}),
]


class HangError(BaseException):
    """A case took too long; no handler of ordinary errors may swallow it."""


def mutate_bytes(path: Path, draw: random.Random) -> None:
    path.write_bytes(damaged(path.read_bytes(), draw))


def mutate_header(path: Path, draw: random.Random) -> None:
    """A safetensors header that is whole JSON and says something else."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = mutated(json.loads(data[8 : 8 + size]), draw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def mutate_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(mutated(json.loads(path.read_text()), draw)))


def mutated(tree: Any, draw: random.Random) -> Any:
    """A JSON value with a few of its parts replaced, dropped, renamed or nested without end."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        parents = [part for part in walk(tree) if part]
        parent = draw.choice(parents) if parents else {}
        if not parent:
            return strange(draw)
        place = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        match draw.randrange(6):
            case 0:
                del parent[place]
            case 1 if isinstance(parent, dict):
                parent[str(place) + draw.choice(["_", "s", "\n", "é"])] = parent.pop(place)
            case 2 if isinstance(parent, dict):
                parent[draw.choice(["extra", "__metadata__", "auto_map", "quantization_config"])] = strange(draw)
            case 3:
                parent[place] = draw.choice(list(walk(json.loads(json.dumps(tree)))))
            case _:
                parent[place] = strange(draw)
    return tree


def strange(draw: random.Random) -> Any:
    """A value of its own: a list that came in twice could come to hold itself."""
    return copy.deepcopy(draw.choice(STRANGE))


def walk(tree: Any) -> Iterator[Any]:
    """All mappings and lists in a JSON value."""
    if isinstance(tree, dict | list):
        yield tree
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from walk(part)


@pytest.fixture(scope="module")
def originals(tiny_pretraining, tiny_encoder, tmp_path_factory) -> Path:
    """One whole checkpoint of every kind, each in a folder of its own."""
    model = tiny_pretraining(max_seconds=2.5, hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    folder = tmp_path_factory.mktemp("originals")
    for kind in ("safetensors", "ckpt", "legacy", "hub"):
        (folder / kind).mkdir()
    state, config = reference_state(model), reference_config(model)
    save_file(state, folder / "safetensors" / "model.safetensors")
    torch.save({"state_dict": state, "global_step": 1}, folder / "ckpt" / "model.ckpt")
    torch.save(state, folder / "legacy" / "model.ckpt", _use_new_zipfile_serialization=False)
    for kind in ("safetensors", "ckpt", "legacy"):
        (folder / kind / "model.json").write_text(json.dumps(config))
    save_file(hub_state(model), folder / "hub" / "model.safetensors")
    (folder / "hub" / "config.json").write_text(json.dumps(hub_config(model)))
    model.save_pretrained(folder / "own")
    modern = tiny_encoder(**MODERN, hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    modern.save_pretrained(folder / "for_modern")
    (folder / "modern").mkdir()
    export_reference(str(folder / "for_modern"), folder / "modern" / "model.safetensors")
    return folder


@contextmanager
def bounded(case: str) -> Iterator[None]:
    """Fail where the block takes too long or sets aside too much memory at any instant."""

    def stop(*_: Any) -> None:
        raise HangError(f"{case}: still busy after {SECONDS} s")

    measured = RESET.exists()
    if measured:
        RESET.write_text("5")
    before = peak() if measured else 0
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if measured:
        assert peak() - before < MEBIBYTES, case


def peak() -> float:
    """Highest resident memory since it was reset, MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


TARGETS = {
    "safetensors": ("model.safetensors", "model.safetensors", [mutate_bytes, mutate_header]),
    "ckpt": ("model.ckpt", "model.ckpt", [mutate_bytes]),
    "legacy": ("model.ckpt", "model.ckpt", [mutate_bytes]),
    "hub": ("", "model.safetensors", [mutate_bytes, mutate_header]),
    "modern": ("model.safetensors", "model.safetensors", [mutate_bytes, mutate_header]),
    "own": ("", "model.safetensors", [mutate_bytes, mutate_header]),
    "safetensors config": ("model.safetensors", "model.json", [mutate_json, mutate_json, mutate_bytes]),
    "modern config": ("model.safetensors", "model.json", [mutate_json, mutate_json, mutate_bytes]),
    "hub config": ("", "config.json", [mutate_json, mutate_json, mutate_bytes]),
    "own config": ("", "config.json", [mutate_json, mutate_json, mutate_bytes]),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints_load_or_are_refused_in_one_sentence(originals, tmp_path, target):
    source, name, mutations = TARGETS[target]
    folder = tmp_path / "case"
    shutil.copytree(originals / target.split()[0], folder)
    whole = (folder / name).read_bytes()
    bestrq2.load(folder / source, "cpu")
    refused: dict[int, str] = {}
    for number in range(CASES):
        draw = random.Random(f"{target} {number}")
        (folder / name).write_bytes(whole)
        draw.choice(mutations)(folder / name, draw)
        with bounded(f"{target} {number}"):
            try:
                bestrq2.load(folder / source, "cpu")
            except BestRQ2Error as error:
                refused[number] = str(error)
            except Exception as error:
                raise AssertionError(f"{target} {number}: {type(error).__name__}: {error}") from error
    for number, message in refused.items():
        assert message.isprintable(), (target, number)
        assert message.startswith(str(folder)), (target, number)
    assert len(refused) > CASES // 4  # the rest changed weights alone, or nothing that counts
