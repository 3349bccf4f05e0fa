"""Configuration of the models in the layout of transformers."""

from __future__ import annotations

import difflib
import inspect
from functools import cache
from typing import Any

from transformers import GenerationConfig

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name before transformers 5
    from transformers import PretrainedConfig as PreTrainedConfig

from .fields import FIELD_TYPES, ModelFields
from .readout import Readout

# Names that some release of transformers writes, reads or sets, beyond the parameters of `PreTrainedConfig` itself. Its
# own tests set the epsilons of every norm in the library.
_OF_TRANSFORMERS = (
    "add_cross_attention architectures attn_implementation auto_map batch_norm_eps chunk_size_feed_forward "
    "cross_attention_hidden_size custom_pipelines dtype experts_implementation finetuning_task id2label is_decoder "
    "is_encoder_decoder label2id layer_norm_eps layer_norm_epsilon model_type name_or_path norm_epsilon num_labels "
    "output_attentions output_hidden_states per_layer_config post_norm_eps prefix problem_type pruned_heads "
    "quantization_config return_dict rms_norm_eps task_specific_params tf_legacy_loss tie_encoder_decoder "
    "tie_last_hidden_states tie_word_embeddings tokenizer_class torch_dtype torchscript transformers_version "
    "transformers_weights use_bfloat16 use_cache"
)

# Fields of earlier versions that a stored configuration may hold.
_REMOVED = ("mask_shape", "mask_block_size", "mask_span_probability", "masks_per_clip", "predictor_context_positions")
_MOST_LABELS = 2**16


@cache
def _names_of_transformers() -> frozenset[str]:
    """Names that are not fields of the model, but accepted and ignored because transformers knows them."""
    parameters = inspect.signature(PreTrainedConfig.__init__).parameters
    # Before release 5 every configuration had the settings of text generation, too.
    return frozenset([*_OF_TRANSFORMERS.split(), *parameters, *GenerationConfig().to_dict()]) - {"self", "kwargs"}


class BestRQ2Config(PreTrainedConfig, ModelFields):
    __doc__ = f"""Configuration of `BestRQ2Model`, `BestRQ2ForPreTraining` and `BestRQ2ForAudioClassification`.

    {(ModelFields.__doc__ or "").strip()}
        readout: settings of the readout that differ from the defaults, by name (see `Readout`); None for none.

    Raises:
        ValueError: for an unknown key, a value out of range, or values that do not fit together.
    """

    model_type = "bestrq2"
    # Of the class, so that only other readouts are written to config.json.
    readout: dict[str, str] | None = None

    def __init__(self, **fields: Any) -> None:
        for name in fields:
            known = name in (*FIELD_TYPES, *_REMOVED, "readout") or name in _names_of_transformers()
            if not known and not name.startswith("_"):
                found = difflib.get_close_matches(name, FIELD_TYPES, n=1, cutoff=0.5)
                hint = f"; did you mean '{found[0]}'?" if found else ""
                raise ValueError(f"BestRQ2Config has no field '{name}'{hint}")
        labels = fields.get("num_labels")
        if isinstance(labels, int) and labels > _MOST_LABELS:  # transformers makes a name for each
            raise ValueError(f"num_labels must be at most {_MOST_LABELS}, got {labels}")
        self.set_fields(fields)
        readout = fields.pop("readout", None) or {}
        if not isinstance(readout, dict) or not readout.keys() <= Readout().settings().keys():
            raise ValueError(f"readout must be a mapping with layers, frequency or pooling, got {readout!r:.80}")
        if changes := Readout.of(self, **readout).changes():
            self.readout = changes
        PreTrainedConfig.__init__(
            self, **{name: value for name, value in fields.items() if name not in (*FIELD_TYPES, *_REMOVED)}
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary; fields passed by keyword replace its entries and are checked."""
        changes = {name: kwargs.pop(name) for name in FIELD_TYPES if name in kwargs}
        return super().from_dict({**config_dict, **changes}, **kwargs)


def field_names() -> list[str]:
    """Names of the architectural fields, in order of declaration."""
    return list(FIELD_TYPES)
