"""Targets of a second round: codes of the states of a trained encoder, in place of half of the random codebooks.

As in HuBERT (arXiv 2106.07447, section II), hidden states of the first round's encoder, here of its middle layers, are
clustered once before the first step. The random codebooks that are left keep what the first round has not learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bestrq2.convert.loading import load_encoder
from bestrq2.convert.weights import UNREADABLE, load_model_folder, quiet_hub
from bestrq2.data.batch import AudioBatch
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.files import write_folder
from bestrq2.model.attention import Record
from bestrq2.model.fields import ModelFields
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.packing import Packing
from bestrq2.train.initial import refuse_recipe

# Patches that are clustered per code, and the principal components in which they are.
PATCHES_PER_CODE = 75
_COMPONENTS = 64
# Fields on which depends what a patch is.
_GRID = ("sampling_rate", "n_fft", "hop_length")


@dataclass
class Clusters:
    """Codes of the states of one layer: layer norm, principal components, nearest centroid.

    Attributes:
        mean: float32 [D], of the layer-normed states.
        projection: float32 [D, C], principal components, scaled half the way to equal variance.
        centroids: float32 [V, C].
    """

    mean: Tensor
    projection: Tensor
    centroids: Tensor

    @classmethod
    def fit(cls, states: Tensor, codes: int, seed: int) -> Clusters:
        """Cluster states [M, D] of a sample into so many codes."""
        from sklearn.cluster import MiniBatchKMeans  # slow to import

        values = _normed(states).double()
        mean = values.mean(dim=0)
        variances, directions = torch.linalg.eigh((values - mean).T @ (values - mean) / len(values))
        kept = min(_COMPONENTS, len(mean))
        projection = directions.flip(1)[:, :kept] / variances.flip(0)[:kept].clamp_min(1e-12).pow(0.25)
        points = ((values - mean) @ projection).float().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct points than codes: some codes then remain unused
            means = MiniBatchKMeans(codes, random_state=seed % 2**32, n_init=1, batch_size=4096, max_iter=60).fit(
                points
            )
        return cls(mean.float(), projection.float(), torch.from_numpy(means.cluster_centers_).float())

    def codes(self, states: Tensor) -> Tensor:
        """States [..., D] to codes, int64 [...]."""
        points = (_normed(states) - self.mean) @ self.projection
        return (points @ self.centroids.T - self.centroids.square().sum(dim=1) / 2).argmax(dim=-1)

    def to(self, device: torch.device) -> Clusters:
        """The same on a device."""
        return Clusters(*(tensor.to(device) for tensor in vars(self).values()))


class Teacher:
    """Frozen encoder and clusters of its states.

    Args:
        encoder: encoder, cut after the last layer that is used.
        clusters: by number of the layer, from 1.
    """

    def __init__(self, encoder: BestRQ2Model, clusters: dict[int, Clusters]) -> None:
        self.encoder, self.clusters = encoder.eval().requires_grad_(False), clusters

    def codes(self, input_values: Tensor, packing: Packing) -> Tensor:
        """Codes of all patches of packed rows [R, S], int64 [R, N, codebooks]; they go with the precision in use."""
        device = input_values.device
        if self.encoder.device != device:
            self.encoder.to(device)
            self.clusters = {layer: clusters.to(device) for layer, clusters in self.clusters.items()}
        states = layer_states(self.encoder, input_values, packing)
        with torch.autocast(device.type, enabled=False):
            return torch.stack([clusters.codes(states[layer].float()) for layer, clusters in self.clusters.items()], -1)

    def save(self, folder: Path) -> None:
        """Write encoder and clusters to a folder, whole or not at all."""
        tensors = {
            f"{layer}.{name}": tensor.contiguous()
            for layer, clusters in self.clusters.items()
            for name, tensor in vars(clusters).items()
        }

        def fill(fresh: Path) -> None:
            with quiet_hub():
                self.encoder.save_pretrained(fresh)
            save_file(tensors, fresh / "clusters.safetensors")

        write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path) -> Teacher:
        """Read what `save` wrote.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        encoder = load_model_folder(folder, BestRQ2Model).base_model
        try:
            tensors = load_file(folder / "clusters.safetensors")
            layers = sorted({int(name.split(".")[0]) for name in tensors})
            names = ("mean", "projection", "centroids")
            return cls(encoder, {layer: Clusters(*(tensors[f"{layer}.{name}"] for name in names)) for layer in layers})
        except UNREADABLE as error:
            raise CheckpointError(f"{folder / 'clusters.safetensors'}: missing or damaged ({error})") from error


def fit_teacher(encoder: BestRQ2Model, fields: ModelFields, batches: Iterable[AudioBatch]) -> Teacher:
    """Cluster the states of an encoder's middle layers over a sample of the corpus.

    Args:
        encoder: encoder after `cut`.
        fields: architecture of the run, of whose codebooks half get the codes of a layer each.
        batches: the sample.
    """
    depth = encoder.config.num_hidden_layers
    layers = range(depth + 1 - taught_codebooks(fields), depth + 1)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in batches:
        states = layer_states(encoder.eval(), batch.to("cpu").input_values, batch.packing)
        in_a_clip = batch.packing.patch_segments(fields.patch_rows) != 0
        for layer, kept in found.items():
            kept.append(states[layer][in_a_clip].float())
    return Teacher(
        encoder,
        {
            layer: Clusters.fit(torch.cat(kept), fields.codebook_size, fields.quantizer_seed + layer)
            for layer, kept in found.items()
        },
    )


def teaching_encoder(source: str, fields: ModelFields) -> BestRQ2Model:
    """Load the encoder of `source` for runs of an architecture.

    Raises:
        ConfigError: the encoder cuts audio into other patches, or has fewer layers than are needed.
        CheckpointError: as `bestrq2.load`.
    """
    refuse_recipe("--teacher", source)
    encoder = load_encoder(source)
    theirs = {name: getattr(encoder.config, name) for name in _GRID} | _shape(encoder.config)
    ours = {name: getattr(fields, name) for name in _GRID} | _shape(fields)
    if encoder.config.encoder_type == "conformer" or fields.encoder_type == "conformer":
        raise ConfigError(f"--teacher {source}: both encoders must be of model.encoder_type vit")
    differing = [
        f"{name} is {theirs[name]} there, {ours[name]} in the settings" for name in ours if theirs[name] != ours[name]
    ]
    if differing:
        raise ConfigError(f"--teacher {source}: cuts audio into other patches: {'; '.join(differing)}; take its recipe")
    count, depth = taught_codebooks(fields), encoder.config.num_hidden_layers
    if depth < count:
        raise ConfigError(
            f"--teacher {source}: has {depth} layers, of which half of model.num_codebooks ({fields.num_codebooks}) "
            "needs one each; give fewer codebooks"
        )
    return encoder


def cut(encoder: BestRQ2Model, fields: ModelFields) -> None:
    """Remove the layers behind those in the middle whose states are clustered."""
    depth = encoder.config.num_hidden_layers
    last = min(depth, max(1, depth // 2) + taught_codebooks(fields) - 1)
    encoder.set_readout(-1, "mean", "mean")
    encoder.config.num_hidden_layers = last
    assert isinstance(encoder.encoder.blocks, nn.ModuleList)
    encoder.encoder.blocks = encoder.encoder.blocks[:last]


def taught_codebooks(fields: ModelFields) -> int:
    """Number of codebooks whose codes are the teacher's: half of them, rounded down."""
    return fields.num_codebooks // 2


def _shape(fields: ModelFields) -> dict[str, int]:
    return {"frames of a patch": fields.patch_size[1], "patches of a column": fields.patch_rows}


@torch.no_grad()
def layer_states(encoder: BestRQ2Model, input_values: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """States of all patches of packed rows, float [R, N, D]: the input of the first block, and each block's output."""
    patches, record = encoder.patches(input_values, packing=packing), Record(hidden_states=[])
    encoder.encode(encoder.embed_patches(patches), patches, record)
    return tuple(record.hidden_states or ())


def _normed(states: Tensor) -> Tensor:
    return F.layer_norm(states, states.shape[-1:])
