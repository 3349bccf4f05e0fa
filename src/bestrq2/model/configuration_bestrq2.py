"""Configuration of the models in the layout of transformers."""

from __future__ import annotations

import difflib
from typing import Any

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name before transformers 5
    from transformers import PretrainedConfig as PreTrainedConfig

from .fields import FIELD_TYPES, ModelFields

# Keys that transformers itself reads from or writes to a config.json.
_HUB_KEYS = frozenset(
    [
        "architectures",
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
        "chunk_size_feed_forward",
        "tie_last_hidden_states",
        "per_layer_config",
    ]
)

_MOST_LABELS = 2**16


class BestRQ2Config(PreTrainedConfig, ModelFields):
    __doc__ = f"""Configuration of `BestRQ2Model`, `BestRQ2ForPreTraining` and `BestRQ2ForAudioClassification`.

    {(ModelFields.__doc__ or "").strip()}

    Raises:
        ValueError: for an unknown key, a value out of range, or values that do not fit together.
    """

    model_type = "bestrq2"

    def __init__(self, **fields: Any) -> None:
        for name in fields:
            if name not in FIELD_TYPES and name not in _HUB_KEYS and not name.startswith("_"):
                found = difflib.get_close_matches(name, FIELD_TYPES, n=1, cutoff=0.5)
                hint = f"; did you mean '{found[0]}'?" if found else ""
                raise ValueError(f"BestRQ2Config has no field '{name}'{hint}")
        labels = fields.get("num_labels")
        if isinstance(labels, int) and labels > _MOST_LABELS:  # transformers makes a name for each
            raise ValueError(f"num_labels must be at most {_MOST_LABELS}, got {labels}")
        self.set_fields(fields)
        PreTrainedConfig.__init__(self, **{name: value for name, value in fields.items() if name not in FIELD_TYPES})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary; fields passed by keyword replace its entries and are checked."""
        changes = {name: kwargs.pop(name) for name in FIELD_TYPES if name in kwargs}
        return super().from_dict({**config_dict, **changes}, **kwargs)


def field_names() -> list[str]:
    """Names of the architectural fields, in order of declaration."""
    return list(FIELD_TYPES)
