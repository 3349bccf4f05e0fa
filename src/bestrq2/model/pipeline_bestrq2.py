"""Audio pipeline for the task "feature-extraction", which in transformers itself reads text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AudioClassificationPipeline, Pipeline

from .modeling_bestrq2 import BestRQ2ModelOutput
from .waveforms import as_array, is_array, to_float32


class BestRQ2FeatureExtractionPipeline(Pipeline):
    """Frames of a clip, or of each clip in a list.

    A clip is what the audio pipelines of transformers take: a waveform [samples] at the model's rate (numpy or torch),
    {"raw": waveform, "sampling_rate": Hz} (another rate needs torchaudio), or a path, URL or bytes (these need the
    program ffmpeg). As for text, the result is a nested list [1, frames, width], or a tensor with `return_tensors`.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = True
    _load_tokenizer = False

    def _sanitize_parameters(
        self, return_tensors: bool | None = None, **unused: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {} if return_tensors is None else {"return_tensors": return_tensors}

    def preprocess(self, inputs: Any) -> Any:
        """Turn a clip into the model's input."""
        # Resampling needs floats.
        if isinstance(inputs, dict):
            inputs = {key: to_float32(as_array(item)) if is_array(item) else item for key, item in inputs.items()}
        elif is_array(inputs):
            inputs = to_float32(as_array(inputs))
        return AudioClassificationPipeline.preprocess(self, inputs)

    def _forward(self, model_inputs: Any) -> BestRQ2ModelOutput:
        return self.model(**model_inputs)

    def postprocess(self, model_outputs: BestRQ2ModelOutput, return_tensors: bool = False) -> Tensor | list[Any]:
        """Return the frames inside the clip, without the padding of the batch."""
        frames = model_outputs["last_hidden_state"][:, model_outputs["frame_attention_mask"][0]]
        return frames if return_tensors else frames.tolist()
