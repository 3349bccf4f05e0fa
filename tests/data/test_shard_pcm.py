"""Plain PCM is told from everything that only looks like it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from recordings import noise
from tars import clip, encoded

from bestrq2.data.shards.members import pcm_layout

WAV = clip(0.1)


def wav(form, data=b"\1\0" * 100, riff=None, before=b"", size=None):
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


MONO16 = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)


def test_plain_pcm_is_recognised_behind_other_chunks_and_in_the_extensible_form():
    for content in (
        wav(MONO16),
        wav(MONO16, before=b"LIST" + struct.pack("<I", 5) + b"hello\0"),
        wav(
            struct.pack("<HHIIHH", 0xFFFE, 1, 16_000, 32_000, 2, 16)
            + struct.pack("<HHIH", 22, 16, 4, 1)
            + bytes.fromhex("000000001000800000aa00389b71")
        ),
    ):
        layout = pcm_layout(content, len(content))
        assert (layout.rate, layout.frames) == (16_000, 100)
        assert content[layout.offset :] == b"\1\0" * 100


@pytest.mark.parametrize(
    "content",
    [
        b"",
        WAV[:43],
        b"RIFX" + WAV[4:],
        wav(struct.pack("<HHIIHH", 1, 2, 16_000, 64_000, 4, 16)),
        wav(struct.pack("<HHIIHH", 1, 1, 16_000, 48_000, 3, 24)),
        wav(struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)),
        wav(struct.pack("<HHIIHH", 1, 1, 0, 0, 2, 16)),
        wav(MONO16, riff=5000),
        wav(MONO16, size=202),
        wav(MONO16, size=0xFFFFFFFF),
        wav(MONO16, data=b""),
        wav(MONO16[:10]),
        clip(0.1, kind="FLAC"),
        encoded(np.stack([noise(1, 8000)] * 2), 8000),
    ],
)
def test_everything_else_is_left_to_a_decoder(content):
    assert pcm_layout(content[:4096], len(content)) is None
