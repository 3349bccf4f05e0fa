"""Damaged audio files through an embedder, in a process of its own: what a decoder may crash must not be the test.

    python tests/inference/mutated_audio.py FOLDER START...

A case is a function of the start file's name and of its number. Every case gives a line of its name, its number and
what came of it; the line of a case that takes the process down ends behind the number.
"""

from __future__ import annotations

import faulthandler
import io
import random
import resource
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from recordings import CODECS, write_with_ffmpeg

from bestrq2 import BestRQ2Config, BestRQ2Model, Embedder
from bestrq2.data.audio import AUDIO_SUFFIXES
from bestrq2.errors import BestRQ2Error
from example_sounds import scene
from mutations import damaged

CASES = 64
SECONDS, MEBIBYTES = 20, 200
# Above what is in use when the first case begins: a decoder that asks for more gets nothing, and the machine lives.
MOST_BYTES = 2 << 30
# Formats without a header: any bytes are sound.
HEADERLESS = {
    f".{suffix}"
    for suffix in ["al", "ul", "alaw", "ulaw", "sln", "g722", "722", "g723", "g723_1", "g726", "g728", "g729", "gsm"]
}
# The lowest rate taken is 100 Hz, of which a sample of 4 bits or more gives 160 samples; codecs stay below that.
BYTES_PER_FRAME = 20

ENCODER = {
    "max_seconds": 2.5,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}

# Suffix, rate in Hz, channels, samples, and libsndfile's container and subtype (none: FFmpeg encodes it).
STARTS: dict[str, tuple[str, int, int, int, str, str]] = {
    "wav": ("wav", 16_000, 1, 6_000, "WAV", "PCM_16"),
    "stereo wav": ("wav", 44_100, 2, 6_000, "WAV", "PCM_24"),
    "6 channels": ("wav", 8_000, 6, 3_000, "WAVEX", "FLOAT"),
    "8 bits": ("wav", 11_111, 1, 3, "WAV", "PCM_U8"),
    "adpcm": ("wav", 22_050, 1, 6_000, "WAV", "IMA_ADPCM"),
    "rf64": ("rf64", 16_000, 1, 5_000, "RF64", "PCM_16"),
    "w64": ("w64", 16_000, 1, 5_000, "W64", "PCM_32"),
    "aiff": ("aiff", 32_000, 2, 5_000, "AIFF", "PCM_16"),
    "au": ("au", 8_000, 1, 5_000, "AU", "ULAW"),
    "caf": ("caf", 16_000, 1, 6_000, "CAF", "ALAC_16"),
    "flac": ("flac", 16_000, 1, 6_000, "FLAC", "PCM_16"),
    "stereo flac": ("flac", 48_000, 2, 6_000, "FLAC", "PCM_24"),
    "ogg": ("ogg", 16_000, 2, 8_000, "OGG", "VORBIS"),
    "opus": ("opus", 48_000, 1, 9_600, "", ""),
    "mp3": ("mp3", 44_100, 1, 20_000, "MP3", "MPEG_LAYER_III"),
    "lame": ("lame.mp3", 16_000, 2, 9_000, "", ""),
    "m4a": ("m4a", 22_050, 1, 9_000, "", ""),
    "aac": ("aac", 16_000, 1, 9_000, "", ""),
    "webm": ("webm", 48_000, 1, 9_600, "", ""),
    "mkv": ("mkv", 16_000, 1, 9_000, "", ""),
}
# Fields of headers: what precedes them, how many bytes behind its beginning they lie, and their size.
FIELDS = [
    *((b"RIFF", 4, 4), (b"fmt ", 4, 4), (b"fmt ", 8, 2), (b"fmt ", 10, 2), (b"fmt ", 12, 4), (b"fmt ", 16, 4)),
    *((b"fmt ", 20, 2), (b"fmt ", 22, 2), (b"data", 4, 4), (b"fact", 8, 4), (b"ds64", 8, 8), (b"ds64", 16, 8)),
    *((b"ds64", 24, 8), (b"riff", 16, 8), (b"data", 16, 8), (b"fmt ", 26, 2), (b"fmt ", 28, 4), (b"FORM", 4, 4)),
    *((b"COMM", 8, 2), (b"COMM", 10, 4), (b"COMM", 14, 2), (b"COMM", 16, 2), (b"COMM", 18, 8), (b"SSND", 4, 4)),
    *((b".snd", 4, 4), (b".snd", 8, 4), (b".snd", 12, 4), (b".snd", 16, 4), (b".snd", 20, 4)),
    *((b"desc", 12, 8), (b"desc", 28, 4), (b"desc", 32, 4), (b"desc", 36, 4), (b"pakt", 12, 8), (b"pakt", 20, 8)),
    *((b"kuki", 12, 4), (b"kuki", 36, 4), (b"fLaC", 8, 4), (b"fLaC", 18, 2), (b"fLaC", 18, 8), (b"fLaC", 21, 5)),
    *((b"OggS", 6, 8), (b"OggS", 14, 4), (b"\x01vorbis", 11, 1), (b"\x01vorbis", 12, 4), (b"\x01vorbis", 28, 1)),
    *((b"OpusHead", 9, 1), (b"OpusHead", 10, 2), (b"OpusHead", 12, 4), (b"OpusHead", 18, 1)),
    *((b"Info", 8, 4), (b"Info", 12, 4), (b"Xing", 8, 4), (b"LAME", 21, 3), (b"ID3", 6, 4)),
    *((b"mvhd", 16, 4), (b"mvhd", 20, 4), (b"mdhd", 16, 4), (b"mdhd", 20, 4), (b"mp4a", 20, 2), (b"mp4a", 28, 4)),
    *((b"stts", 8, 4), (b"stts", 12, 4), (b"stts", 16, 4), (b"stsz", 8, 4), (b"stsz", 12, 4), (b"stco", 8, 4)),
    *((b"stco", 12, 4), (b"stsc", 16, 4), (b"elst", 12, 4), (b"elst", 16, 4), (b"moov", -4, 4), (b"mdat", -4, 4)),
    *((b"\xb5\x88", 2, 8), (b"\x9f\x81", 2, 1), (b"D\x89\x88", 3, 8), (b"*\xd7\xb1\x83", 4, 3)),
]
EXTREMES = [
    0,
    1,
    7,
    99,
    2**7,
    2**8 - 1,
    1024,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def start_file(folder: Path, name: str) -> Path:
    """The sound file that a group of cases begins with."""
    kind, rate, channels, samples, container, subtype = STARTS[name]
    path = folder / f"start.{kind}"
    sound = np.stack([scene(samples, channel) for channel in range(channels)])
    if container:
        soundfile.write(path, sound.T, rate, subtype, format=container)
    else:
        write_with_ffmpeg(path, sound, rate, CODECS[kind])
    return path


def extreme(content: bytes, draw: random.Random) -> bytes:
    """One to three fields of the header set to the ends of what they hold, or to NaN and its like."""
    data = bytearray(content)
    present = [field for field in FIELDS if field[0] in content]
    for marker, offset, size in draw.choices(present, k=draw.choice([1, 1, 2, 3])) if present else []:
        places = [place for place in range(len(content)) if content.startswith(marker, place)]
        place = draw.choice(places[:1] + places) + offset
        value = draw.choice(EXTREMES) % 256**size
        text = value.to_bytes(size, draw.choice(["little", "big"]))
        if size == 8 and draw.random() < 0.5:
            text = np.array(draw.choice([0, -1, 1e-300, 99, 1e300, np.inf, np.nan]), ">f8").tobytes()
        data[place : place + size] = text[: max(0, len(data) - place)]
    return bytes(data)


def rearranged(content: bytes, draw: random.Random) -> bytes:
    """Chunks of RIFF and AIFF files, boxes of MP4 and pages of Ogg swapped, dropped or doubled."""
    pieces = chunks(content)
    for _ in range(draw.choice([1, 1, 3])):
        first, second = draw.randrange(len(pieces)), draw.randrange(len(pieces))
        match draw.randrange(3):
            case 0:
                pieces[first], pieces[second] = pieces[second], pieces[first]
            case 1 if len(pieces) > 1:
                del pieces[first]
            case _:
                pieces.insert(second, pieces[first])
    return b"".join(pieces)


def chunks(content: bytes) -> list[bytes]:
    """The parts that a container consists of, its own header first; four equal ones where it is no such container."""
    if content[:4] in (b"RIFF", b"RF64", b"FORM"):
        order = "big" if content[:4] == b"FORM" else "little"
        bounds = [0, 12]
        while bounds[-1] + 8 <= len(content):
            size = int.from_bytes(content[bounds[-1] + 4 : bounds[-1] + 8], order)
            bounds.append(bounds[-1] + 8 + size + size % 2)
    elif content[4:8] == b"ftyp":
        bounds = [0]
        while bounds[-1] + 8 <= len(content):
            bounds.append(bounds[-1] + max(8, int.from_bytes(content[bounds[-1] : bounds[-1] + 4], "big")))
    elif content[:4] == b"OggS":
        bounds = [*pages(content), len(content)]
    else:
        bounds = [len(content) * part // 4 for part in range(5)]
    return [content[start:end] for start, end in pairwise(bounds)]


def pages(content: bytes) -> list[int]:
    """Where the pages of an Ogg file begin."""
    return [place for place in range(len(content)) if content.startswith(b"OggS", place)]


def with_checksums(content: bytes) -> bytes:
    """An Ogg file whose pages have the checksums of what they hold now; otherwise decoders would skip them."""
    data = bytearray(content)
    bounds = [*pages(content), len(content)]
    for start, end in pairwise(bounds):
        if end - start >= 27:
            data[start + 22 : start + 26] = bytes(4)
            checksum = 0
            for byte in data[start:end]:
                checksum = (checksum << 8 & 0xFFFFFFFF) ^ CHECKSUMS[checksum >> 24 ^ byte]
            data[start + 22 : start + 26] = checksum.to_bytes(4, "little")
    return bytes(data)


def _remainder(value: int) -> int:
    value <<= 24
    for _ in range(8):
        value = (value << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if value >> 31 else value << 1
    return value


CHECKSUMS = [_remainder(value) for value in range(256)]


def mutated(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Damage of one kind or another to a file, of which some is repaired to get past a decoder's first look."""
    match draw.randrange(9):
        case 0 | 1 | 2:
            content = extreme(content, draw)
        case 3:
            content = rearranged(content, draw)
        case 4:
            parts = [content, draw.choice(others), draw.randbytes(draw.choice([1, 100, 5_000]))]
            content = b"".join(draw.sample(parts, k=draw.choice([2, 2, 3])))
        case 5:
            other = draw.choice(others)
            place = draw.choice([4, 12, 44, 100, len(content) // 2])
            content = content[:place] + other[place:]
        case 6:
            content = beginning(content, draw)
        case _:
            content = damaged(content, draw)
    return with_checksums(content) if content[:4] == b"OggS" and draw.random() < 0.7 else content


def no_audio(draw: random.Random) -> bytes:
    """What somebody has called .wav."""
    size = draw.choice([0, 1, 3, 11, 12, 44, 1_000, 20_000])
    match draw.randrange(5):
        case 0:
            return ("Not audio at all, it says.\r\n" * 1_000).encode(draw.choice(["utf-8", "utf-16"]))[:size]
        case 1:
            return b'<!DOCTYPE html>\n<html><body>404</body></html>\n{"error": "none"}'[: max(1, size)]
        case 2:
            return b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\nhttp://127.0.0.1:9/a.wav\n"
        case 3:
            return bytes([draw.randrange(256)]) * size
        case _:
            return draw.randbytes(size)


def beginning(content: bytes, draw: random.Random) -> bytes:
    """The first bytes of a file, by which decoders tell its format, and then anything."""
    return content[: draw.choice([3, 4, 8, 12, 44, 200])] + no_audio(draw)


def embedded(embedder: Embedder, audio: Path | io.BytesIO, name: str, size: int) -> str:
    """What came of a file: "embedded" or "refused"; all else is a complaint."""
    try:
        embeddings = embedder.embed(audio)
    except BestRQ2Error as error:
        message = str(error)
        one_sentence = message.isprintable() and message.startswith(f"{name}: ") and len(message) < 400 + len(name)
        return "refused" if one_sentence and message.count(f"{name}: ") == 1 else f"said {message!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    frames = embeddings.frames[0]
    if not (np.isfinite(frames).all() and np.isfinite(embeddings.clip).all() and embeddings.frame_mask.all()):
        return "embedded to what is not finite"
    if not 1 <= len(frames) <= 1 + size / BYTES_PER_FRAME:
        return f"embedded to {len(frames)} frames from {size} bytes"
    return "embedded"


def run(folder: Path, names: list[str]) -> None:
    """All cases of some start files; a line for each."""
    embedder = Embedder(BestRQ2Model(BestRQ2Config(**ENCODER)), "cpu")
    contents = {name: start_file(folder, name).read_bytes() for name in STARTS}
    embedder.embed(list(contents.values()))
    pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages_in_use * resource.getpagesize() + MOST_BYTES, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names:
        for number in range(CASES):
            print(name, number, sep="\t", end="\t", flush=True)
            draw = random.Random(f"{name} {number}")
            if name == "no audio":
                kind, content = (
                    draw.choice(["wav", *sorted(AUDIO_SUFFIXES - HEADERLESS)]).removeprefix("."),
                    no_audio(draw),
                )
            else:
                others = [content for other, content in contents.items() if other != name]
                kind, content = STARTS[name][0], mutated(contents[name], others, draw)
            path = folder / f"case.{kind}"
            path.write_bytes(content)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            outcomes = [
                embedded(embedder, path, str(path), len(content)),
                embedded(embedder, io.BytesIO(content), "audio", len(content)),
            ]
            faulthandler.cancel_dump_traceback_later()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            if grown > MEBIBYTES:
                outcomes.append(f"took {grown:.0f} MiB")
            print(*outcomes, sep="\t", flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    run(Path(sys.argv[1]), sys.argv[2:])
