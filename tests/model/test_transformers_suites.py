"""Transformers' own common tests on the models, the configuration and the feature extractor.

They are those of the installed release: its source distribution has them, the package has not. Where it cannot be
downloaded, they are skipped. It lacks the modules that the common tests import of their folders, so stand-ins replace
what these would add: tests of exporters and of text generation, and settings of a configuration.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import unittest
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import bestrq2
from example_sounds import scene, scenes

pytestmark = pytest.mark.slow

STAND_INS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
            "tie_word_embeddings": False,
        }
    },
}


@pytest.fixture(scope="session")
def suites(request: pytest.FixtureRequest) -> types.ModuleType:
    """Package with the modules of common tests of the installed release."""
    pytest.importorskip("parameterized")
    folder = Path(request.config.cache.mkdir("transformers")) / transformers.__version__
    if not folder.is_dir():
        _unpack(folder)
    package = types.ModuleType("transformers_suites")
    package.__path__ = [str(folder)]
    modules = {package.__name__: package}
    for name, content in STAND_INS.items():
        above, _, _ = name.partition(".")
        for each in (above, name):
            modules[f"{package.__name__}.{each}"] = types.ModuleType(each)
        vars(modules[f"{package.__name__}.{name}"]).update(content)
    sys.modules.update(modules)
    # Markers that are not registered are refused.
    for name in set(re.findall(r"\bmark\.(\w+)", (folder / "test_modeling_common.py").read_text(encoding="utf-8"))):
        request.config.addinivalue_line("markers", f"{name}: of transformers")
    for name in ("modeling_common", "configuration_common", "sequence_feature_extraction_common"):
        importlib.import_module(f"{package.__name__}.test_{name}")
    return package


def _unpack(folder: Path) -> None:
    """Download the source distribution, and keep its tests in a folder."""
    wanted = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--retries=1", "--no-deps", "--no-binary=:all:", wanted]
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    part.mkdir()
    done = subprocess.run([*command, "--dest", str(part)], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(part)
        pytest.skip(f"pip cannot download the source distribution of {wanted}: {done.stderr.strip()[-200:]}")
    [distribution] = part.glob("*.tar.gz")
    with tarfile.open(distribution) as archive:
        for member in archive:
            content = archive.extractfile(member) if Path(member.name).parent.name == "tests" else None
            if content is not None:
                (part / Path(member.name).name).write_bytes(content.read())
    (part / "__init__.py").touch()
    distribution.unlink()
    with suppress(OSError):  # another process was first
        part.rename(folder)


CONFORMER = {
    "encoder_type": "conformer",
    "objective": "one_stage",
    "mask_fill": "noise",
    "position_embedding": "relative",
    "num_mel_bands": 80,
    "patch_size": [80, 4],
    "n_fft": 400,
    "win_length": 400,
    "hop_length": 160,
    "mask_ratio": [0.6, 0.6],
    "input_normalization": "clip",
    "quantizer_normalization": "layernorm",
    "conformer_channels": [8, 4],
    "conformer_dropout": 0.0,
}
ONE_STAGE = {"objective": "one_stage"}

# Class, changes of the configuration, and number of tokens that the encoder reads.
CASES = {
    "encoder": (bestrq2.BestRQ2Model, {}, 64),
    "classifier": (bestrq2.BestRQ2ForAudioClassification, {"position_embedding": "rope_2d", "qk_norm": True}, 64),
    "two_step": (bestrq2.BestRQ2ForPreTraining, {}, 32),
    "one_stage": (bestrq2.BestRQ2ForPreTraining, {**ONE_STAGE, "norm": "rmsnorm", "activation": "swiglu"}, 64),
    "conformer": (bestrq2.BestRQ2ForAudioClassification, CONFORMER, 125),
}

PADDED_LEFT = {
    f"test_eager_matches_sdpa_inference_{number:02d}_{dtype}_pad_left{kernels}": "clips are padded on the right"
    for first, dtype in ((0, "fp16"), (8, "fp32"), (16, "bf16"))
    for number, kernels in ((first, "_sdpa_kernels"), (first + 1, ""))
} | {"test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": "clips are padded on the right"}

# What cannot pass, with the reason. Transformers skips others itself: those for language models, text generation,
# other devices and packages that are not installed.
SKIPPED = {
    "test_model_get_set_embeddings": "patches are embedded by a linear layer or convolutions, not by an nn.Embedding",
    **PADDED_LEFT,
}
SKIPPED_IN = {
    "two_step": {"test_batching_equivalence": "code_counts is a sum over the batch"},
    "one_stage": {"test_batching_equivalence": "code_counts is a sum over the batch"},
}


class Given:
    """Configuration and inputs of one model, as the common tests ask for them."""

    batch_size = 7  # as many as some tests add at random otherwise

    def __init__(self, kind: str, tiny_config: Callable[..., bestrq2.BestRQ2Config]) -> None:
        self.model_class, self.changes, self.seq_length = CASES[kind]
        self.is_training = self.model_class is not bestrq2.BestRQ2Model  # which has no loss
        self.tiny_config = tiny_config
        config = self.get_config()
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> bestrq2.BestRQ2Config:
        return self.tiny_config(**self.changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[bestrq2.BestRQ2Config, dict[str, Any]]:
        clips = scenes(self.batch_size, 80_000)
        inputs = {"input_values": clips, "attention_mask": torch.ones_like(clips, dtype=torch.int64)}
        if self.model_class is bestrq2.BestRQ2ForPreTraining:
            inputs["hidden_mask"] = (torch.arange(64) % 2 == 0).repeat(self.batch_size, 1)
        return self.get_config(), inputs


def run(case: type[unittest.TestCase], skipped: dict[str, str]) -> None:
    """Run all tests of a case but the skipped ones; fails with the traces of those that fail."""
    for name, reason in skipped.items():
        setattr(case, name, unittest.skip(reason)(getattr(case, name)))
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.testsRun - len(result.skipped) > 10
    failed = result.failures + result.errors
    assert not failed, "\n".join(f"{test.id().rpartition('.')[2]}: {trace}" for test, trace in failed)


def difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.float().sub(right.float()) if left.dtype == torch.bool else left.sub(right)


@pytest.mark.parametrize("kind", CASES)
def test_models_pass_the_common_tests(suites, tiny_config, kind):
    class Case(suites.test_modeling_common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (CASES[kind][0],)
        test_resize_embeddings = False  # there is no vocabulary
        additional_model_inputs = ("hidden_mask",)

        def setUp(self) -> None:
            self.model_tester = Given(kind, tiny_config)

        def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels and model_class is bestrq2.BestRQ2ForAudioClassification:
                inputs["labels"] = torch.zeros(len(inputs["input_values"]), dtype=torch.int64)
            return inputs

        def test_model_outputs_equivalence(self) -> None:
            # Its message subtracts the outputs, of which some are masks.
            with mock.patch.object(torch.Tensor, "__sub__", difference):
                super().test_model_outputs_equivalence()

    run(Case, SKIPPED | SKIPPED_IN.get(kind, {}))


def test_the_configuration_passes_the_common_tests(suites):
    case = unittest.TestCase()
    tester = suites.test_configuration_common.ConfigTester(
        case, config_class=bestrq2.BestRQ2Config, has_text_modality=False, hidden_size=48, mask_ratio=[0.3, 0.5]
    )
    tester.run_common_tests()


def test_the_feature_extractor_passes_the_common_tests(suites):
    class GivenClips:
        batch_size, min_seq_length, max_seq_length, seq_length_diff = 4, 400, 700, 100
        feature_size, padding_value, sampling_rate = 1, 0.0, 16_000

        def prepare_feat_extract_dict(self) -> dict[str, Any]:
            return {"feature_size": 1, "sampling_rate": 16_000, "padding_value": 0.0, "return_attention_mask": True}

        def prepare_inputs_for_common(self, equal_length: bool = False, numpify: bool = False) -> list[Any]:
            lengths = [700] * 4 if equal_length else range(400, 800, 100)
            clips = [scene(length, seed) for seed, length in enumerate(lengths)]
            return clips if numpify else [clip.tolist() for clip in clips]

    class Case(suites.test_sequence_feature_extraction_common.SequenceFeatureExtractionTestMixin, unittest.TestCase):
        feature_extraction_class = bestrq2.BestRQ2FeatureExtractor

        def setUp(self) -> None:
            self.feat_extract_tester = GivenClips()

    run(Case, {})
