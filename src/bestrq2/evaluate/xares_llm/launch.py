"""Processes in the environment of XARES-LLM: its command, or its check of the encoder, with audio that is decoded.

A torchaudio that cannot decode would not end the benchmark: it skips every clip and waits for the next one.
"""

from __future__ import annotations

import json
import runpy
import sys

from bestrq2._torchaudio import provide_torchaudio

TORCHAUDIO = provide_torchaudio()  # also in the processes that load data


def check(model_args: str) -> None:
    """Import the benchmark, let it check the encoder built from JSON arguments, and print what decodes audio."""
    import xares_llm.task  # noqa: F401
    from xares_llm.audio_encoder_checker import check_audio_encoder

    from bestrq2.evaluate.xares_llm.encoder import BestRQ2Encoder

    check_audio_encoder(BestRQ2Encoder(**json.loads(model_args)))
    print(TORCHAUDIO)


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2])
    else:
        runpy.run_module("xares_llm.run", run_name="__main__", alter_sys=True)
