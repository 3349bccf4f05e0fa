"""XARES-LLM itself, from its source: a tiny task is trained and scored on the CPU, with a random language model.

The source is the checkout that `BESTRQ2_XARES_LLM` names, or is cloned. It runs in a virtual environment with links to
packages of this one, and transformers 4 and peft of its own.
"""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch
import yaml

from bestrq2 import BestRQ2Config, BestRQ2Model, soundworld
from bestrq2.evaluate.xares_llm.harness import REPOSITORY
from bestrq2.evaluate.xares_llm.run import run_xares_llm
from bestrq2.soundworld import export
from separate_environment import make_environment, site_packages

pytestmark = pytest.mark.slow

VERSION = "105be6807bd5b0899b15e76f681440384a8453f0"  # 0.0.12
PACKAGES = (
    "torch", "accelerate", "scikit-learn", "torchmetrics", "pandas", "loguru", "jiwer", "webdataset", "soundfile",
    "soxr", "av", "requests",
)  # fmt: skip
TASK = "environment/event"

DECODER = """
import sys
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

characters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(sys.argv[1])
torch.manual_seed(0)
sizes = {"vocab_size": len(characters), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1, bos_token_id=0, eos_token_id=0)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


def succeeds(*command: str | Path) -> None:
    """Run a command that needs the network or a package; the test is skipped where it fails."""
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        pytest.skip(f"{command[0]} {command[1]}: {reason}")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Folder of the package's source."""
    checkout = Path(os.environ.get("BESTRQ2_XARES_LLM") or tmp_path_factory.mktemp("source") / "xares-llm")
    if not checkout.is_dir():
        succeeds("git", "clone", "--quiet", REPOSITORY, checkout)
        succeeds("git", "-C", checkout, "checkout", "--quiet", VERSION)
    return checkout / "src"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Interpreter of an environment with transformers 4 and peft."""
    folder = tmp_path_factory.mktemp("environment")
    linked = make_environment(folder / "linked", *PACKAGES)  # outside, so that pip leaves what it replaces
    venv.create(folder / "own", with_pip=True, symlinks=True)
    (site_packages(folder / "own") / "linked.pth").write_text(str(site_packages(linked.parents[1])))
    own = folder / "own" / "bin" / "python"
    succeeds(own, "-m", "pip", "install", "--quiet", "transformers<5", "peft>=0.18")
    return own


@pytest.fixture(scope="module")
def decoder(python, tmp_path_factory) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("decoder")
    subprocess.run([python, "-c", DECODER, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Strips of the normalised spectrogram, mixed at random: what a linear layer reads sounds from."""
    torch.manual_seed(0)
    config = BestRQ2Config(
        max_seconds=5.0, patch_size=[128, 4], input_normalization="clip", hidden_size=256, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, drop_path_rate=0.0,
    )  # fmt: skip
    encoder = BestRQ2Model(config)
    for name, parameter in encoder.named_parameters():
        if "blocks" in name and parameter.ndim == 2:
            torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(encoder.patch_embedding.weight, 0, 1 / 16)
    folder = tmp_path_factory.mktemp("model") / "spectral"
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def task(tmp_path, monkeypatch) -> dict[str, Path]:
    """Files of a task of the benchmark: six sounds of SoundWorld are learned by heart."""
    monkeypatch.setattr(export, "TASKS", {TASK: soundworld.TASKS[TASK]})
    soundworld.write_corpus(tmp_path / "corpus", 8, format="xares", progress=False)
    data = {"prompt": "?", "data": "~/corpus/env/*/train-{000000..000000}.tar", "key": "label_index"}
    settings = {"max_steps": 60, "warmup_steps": 5, "learning_rate": 1e-2, "sort_by_length": 4}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"train_data": {"event": data}, **settings}))
    return {"task": tmp_path / "train.yaml", "evaluation": tmp_path / "scored.yaml"}


def test_the_benchmark_learns_a_task_and_scores_it_again_from_its_checkpoint(
    source, python, decoder, model, task, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(source))
    monkeypatch.setenv("HOME", str(tmp_path))  # of the tars
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    data = yaml.safe_load(task["task"].read_text())["train_data"]["event"]
    results = []
    for batch_size in (6, 3):  # the second one is scored anew, by the checkpoint
        scored = {"eval_event": {"data": data, "metric": "Accuracy", "batch_size": batch_size}}
        task["evaluation"].write_text(yaml.safe_dump(scored))
        files = {name: str(path) for name, path in task.items()}
        places = {"output": tmp_path / "out", "data": tmp_path / "data", "python": str(python)}
        results.append(run_xares_llm(model, **files, **places, decoder=str(decoder)))
        (predictions,) = (tmp_path / "out").glob("*/train-*/*/predictions_eval_event.csv")
        rows = [row.split(",") for row in predictions.read_text().split()[1:]]
        assert sorted(label for _, label in rows) == list("012345")
        right = sum(predicted == label for predicted, label in rows)
        assert right >= 5  # without hearing them, one of six
        assert results[-1].scores[0].score == pytest.approx(right / 6)
        predictions.unlink()
    assert results[0].scores == results[1].scores
    assert results[0].provenance["versions"]["transformers"].startswith("4.")
    (log,) = (tmp_path / "out").glob("*/train-*.log")
    assert log.read_text().count("Finished training") == 1
    assert log.read_text().count("Found pretrained model") == 1
    assert "\x1b" not in log.read_text()
