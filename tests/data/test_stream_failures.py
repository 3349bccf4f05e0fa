"""Streams of remote shards: networks that fail, and tars that are damaged."""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_server import RATE, clip, serving, tar_of
from streams import HASTE, MEMBER, assert_same, batches, names, stream

from bestrq2.data.lanes import UnreachableError
from bestrq2.data.remote import StreamSource
from bestrq2.data.transfer import Shard

pytestmark = pytest.mark.usefixtures("small_windows")


PADDING = -len(clip(0)) % 512


def test_a_connection_that_breaks_is_made_again_and_changes_nothing(server, undisturbed, caplog):
    sizes = {name: len(content) for name, content in server.files.items()}
    server.breaks = {name: [size // 2, size // 3, size - 2000] for name, size in sizes.items()}
    server.answers = {"3.tar": [503, 429]}
    with caplog.at_level(logging.WARNING):
        assert_same(batches(stream(server)), undisturbed)
    assert "trying again in 0 s" in caplog.text
    assert "the connection broke after" in caplog.text
    assert not any(batch.rejected for batch in undisturbed)


def test_a_shard_that_is_gone_in_mid_run_is_skipped_and_listed(server, caplog):
    del server.files["4.tar"]
    server.answers["6.tar"] = [500] * 99
    with caplog.at_level(logging.WARNING):
        found = batches(stream(server), range(30))
    rejected = {path.rpartition("/")[2]: reason for batch in found for path, reason in batch.rejected}
    assert rejected == {
        "4.tar": "could not be fetched: 404 Not Found",
        "6.tar": "could not be fetched: 500 Internal Server Error",
    }
    assert "what follows differs from a run that can fetch all of it" in caplog.text
    assert "skipped after 0 of its recordings" in caplog.text
    visits = Counter(name for batch in found for name in names(batch))
    assert len(visits) > 40
    # 404 is final, 500 is tried three times.
    assert Counter(server.asked)["6.tar"] % 3 == 0


def test_a_network_that_stays_away_stops_the_run(server):
    source = stream(server)
    server.answers = {name: [503] * 99 for name in server.files}
    with pytest.raises(
        UnreachableError, match=r"3 shards in a row could not be fetched, the last was http.*Service Unav"
    ):
        batches(source)


@pytest.mark.parametrize("end", [0.5, 0.6])
def test_of_a_truncated_tar_the_whole_members_are_used(end):
    content = tar_of({f"{i}.wav": clip(i) for i in range(8)})
    cut = content[: int(len(content) * end)]
    with serving({"0.tar": cut}) as server:
        found = batches(stream(server, 1), range(12), batch_size=1)
    whole = len(cut) // MEMBER
    visits = Counter(name for batch in found for name in names(batch))
    assert set(visits) == {f"{i}.wav" for i in range(whole)}
    assert {count for batch in found for count in batch.shard_counts.values()} == {whole}
    assert {reason for batch in found for _, reason in batch.rejected} == {
        f"is damaged after {whole} whole recordings (unexpected end of data)"
    }


def test_a_tar_that_ends_between_two_members_is_noticed():
    content = tar_of({f"{i}.wav": clip(i) for i in range(8)})
    for length in (3 * MEMBER, 3 * MEMBER + 300):
        with serving({"0.tar": content[:length]}) as server:
            found = batches(stream(server, 1), range(4), batch_size=1)
        reasons = {reason for batch in found for _, reason in batch.rejected}
        assert reasons == {"ends early, after 3 whole recordings"}


def quiet_start(number):
    """A clip behind 0.56 s of digital silence, more than a block of the tar."""
    waveform = np.concatenate([np.zeros(round(0.56 * RATE)), soundfile.read(io.BytesIO(clip(number)))[0]])
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b"\xff" * 300, "is damaged after 2 whole recordings (no header at byte {start:,})"),
        (bytes(512), "goes on behind its end mark, after 2 recordings: damaged, or several tars joined by cat"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_damaged_header_is_not_taken_for_the_end(broken, reason, mode):
    content = bytearray(tar_of({f"{i}.wav": quiet_start(i) for i in range(8)}))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        start = tar.getmembers()[2].offset
    content[start : start + len(broken)] = broken
    packed = {"w": bytes, "w:gz": gzip.compress, "w:xz": lzma.compress}[mode](bytes(content))
    with serving({"0.tar": packed}) as server:
        found = batches(stream(server, 1), range(8), batch_size=1)
        resumed = batches(stream(server, 1), range(3, 8), batch_size=1)
        server.breaks["0.tar"] = [len(packed) // 5, len(packed) // 4]
        broke_off = batches(stream(server, 1), range(8), batch_size=1)
    assert_same(found[3:], resumed)
    assert_same(found, broke_off)
    for run in (found, resumed, broke_off):
        assert {count for batch in run for count in batch.shard_counts.values()} == {2}
        assert {why for batch in run for _, why in batch.rejected} == {reason.format(start=start)}


def test_tars_joined_by_cat_are_listed_as_damaged():
    first, second = (tar_of({f"{i}.wav": clip(i) for i in numbers}) for numbers in ((0, 1), (2, 3)))
    with serving({"0.tar": first + second}) as server:
        found = batches(stream(server, 1), range(3), batch_size=1)
    assert {why for batch in found for _, why in batch.rejected} == {
        "goes on behind its end mark, after 2 recordings: damaged, or several tars joined by cat"
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(513, 4 * MEMBER + 1024), st.integers(0, 3 * MEMBER))
def test_a_truncated_tar_counts_the_same_however_it_was_read(length, broken_at):
    content = tar_of({f"{i}.wav": clip(i) for i in range(4)})[:length]
    with serving({"0.tar": content}) as server:
        undisturbed, disturbed = (Shard(f"{server.url}/0.tar", HASTE) for _ in range(2))
        assert [len(undisturbed.window(number, 1)[1]) for number in range(5)][-1] == 0
        server.breaks["0.tar"] = [min(broken_at, length - 1)]
        assert disturbed.window(9, 4)[1] == []
    assert (undisturbed.whole, undisturbed.damage) == (disturbed.whole, disturbed.damage)
    assert undisturbed.whole == sum(MEMBER * (i + 1) - PADDING <= length for i in range(4))
    assert (undisturbed.damage is None) == (length >= 4 * MEMBER + 512)


def test_compressed_tars_are_read_too():
    members = {f"{i}.wav": clip(i) for i in range(8)}
    with serving({"0.tar": tar_of(members), "1.tar": tar_of(members, "w:gz")}) as server:
        plain = StreamSource("test", (f"{server.url}/0.tar",), patience=HASTE)
        packed = replace(plain, urls=(f"{server.url}/1.tar",))
        first, second = batches(plain, range(3)), batches(packed, range(3))
        for a, b in zip(first, second, strict=True):
            assert names(a) == names(b)
            assert not b.rejected
