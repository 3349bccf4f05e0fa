"""FFmpeg as a decoder: MP3, AAC, Ogg, WebM, WMA, the sound of videos, and all else that libsndfile cannot seek exactly.

Position n of a file is the n-th sample that FFmpeg decodes, counted from its beginning. Time stamps and the lengths in
headers do not count: they jump where packets were lost, and describe only the first of several joined files.

- Where packets tell how many samples they hold (`_PacketCounts`), a pass over them without decoding gives the length of
  the file and the position of each packet. The file is decoded in blocks of 20 s, each by a new decoder that decodes
  the second before the block first. Reading from the middle and reading through use the same blocks and so give the
  same samples, even of AAC and AC-3, whose decoders add noise that depends on all that they decoded before. FFmpeg
  seeks the packets of a block; where it finds others than the pass found, they are read from the beginning.
- Other files are decoded from their beginning, whatever part is wanted.

A read that starts where the last one ended, or up to a second earlier, decodes nothing twice.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
import soxr

from bestrq2.data.places import (
    NO_MORE_FILES,
    AudioBytes,
    AudioPlace,
    UnreadableAudioError,
    bytes_at,
    cannot_open,
    place_size,
)
from bestrq2.data.waveforms import check_rate, mixed_down

BLOCK_SECONDS = 20.0
"""Audio that one decoder decodes (s), where a file is decoded in blocks."""

# Decoded and dropped before a block, so that codecs with memory have settled: MP3 needs up to 20 packets, Opus 80 ms.
_PREROLL_SECONDS, _PREROLL_PACKETS = 1.0, 32
# The last samples read are kept for a read that starts a little before the end of the last one.
_KEPT_SECONDS = 1.0
# Encoders fill up the last packets; at most so many of them are cut.
_TRIMMED_PACKETS = 4
# A file may be so much shorter than announced without being listed: encoders round to packets (s, and share of it).
_TOLERANCE_SECONDS, _TOLERANCE_SHARE = 0.25, 0.001

# Playlists, streams from elsewhere, devices, pictures and text: not files of sound.
_FORBIDDEN_FORMATS = re.compile(
    "concat|hls|dash|hds|imf|sdp|rtsp|rtp|sap|lavfi|alsa|oss|fbdev|kmsgrab|x11grab|v4l2|video4linux2|vobsub|image2.*|"
    ".*_pipe|webm_dash_manifest|smoothstreaming|ffmetadata|tty|data|bin"
)
# Formats that FFmpeg recognises neither by their content nor by this suffix.
_FORMAT_OF_SUFFIX = {".g723": "g723_1"}
# A-law and mu-law without a header.
_TELEPHONE_SUFFIXES = (".al", ".ul")
# Formats whose headers state the length; of others FFmpeg has an estimate from the bit rate only.
_TIMED_FORMATS = {"mov", "matroska", "ogg", "asf", "avi", "flv", "wav", "aiff", "caf", "w64", "au", "flac"}
# Codecs whose packets all hold equally many samples, and what of the packet's own header, if it has one, must not
# change: another stream, or junk, follows where it does.
_MPEG_HEADER = b"\xff\xfe\x0c"
_EQUAL_PACKETS = dict.fromkeys(("mp1", "mp2", "mp3"), _MPEG_HEADER)
_EQUAL_PACKETS |= {"ac3": b"\xff\xff\0\0\xc0", "eac3": b"\xff\xff", "aac": b""}
# Formats of broadcasts, where any packet may be damaged: only decoding tells how many samples are left.
_LOSSY_FORMATS = {"mpegts", "mpeg"}
_ADTS_HEADER = b"\xff\xf6\x3c"
# First page of a stream, up to its number of segments.
_OGG_FIRST_PAGE = re.compile(rb"OggS\0[\x02\x03\x06\x07].{21}", re.DOTALL)
# Bytes that are searched for it at once, and the longest header of a page.
_OGG_BLOCK_BYTES, _OGG_HEADER_BYTES = 1 << 22, 27 + 255


@lru_cache(maxsize=1)
def _allowed_formats() -> str:
    names = {name for entry in av.formats_available for name in entry.split(",")}
    return ",".join(sorted(name for name in names if not _FORBIDDEN_FORMATS.fullmatch(name)))


def _opened(audio: AudioPlace) -> Any:
    """A file as FFmpeg's container; no file in disguise can make FFmpeg open what it names.

    Raises:
        UnreadableAudioError: not audio.
        AudioError: too many files are open.
    """
    options = {"format_whitelist": _allowed_formats()}
    options["protocol_whitelist"] = "none" if isinstance(audio, AudioBytes) else "file"
    suffix = PurePosixPath(str(audio)).suffix.lower()
    if suffix in _TELEPHONE_SUFFIXES:
        options["sample_rate"] = "8000"
    problem: Exception | None = None
    for format in (None, _FORMAT_OF_SUFFIX.get(suffix)):
        place = audio.open() if isinstance(audio, AudioBytes) else f"file:{audio}"
        try:
            if problem is None or format is not None:
                return av.open(place, format=format, options=options, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            # Of damaged files FFmpeg also reports that they cannot be read, or that memory does not suffice.
            if isinstance(error, OSError) and error.errno in NO_MORE_FILES:
                raise cannot_open(f"{audio}:", error) from error
            problem = error
    raise UnreadableAudioError(f"{audio}: is not audio that libsndfile or FFmpeg can read.") from problem


def _audio_track(container: Any, audio: AudioPlace) -> Any:
    if not container.streams.audio:
        raise UnreadableAudioError(f"{audio}: holds no audio track.")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise UnreadableAudioError(f"{audio}: its audio track has no readable codec.")
    return stream


def _packets(container: Any) -> Iterator[Any]:
    """Packets of the first audio track up to the end of the file or to where it breaks off; the last one is empty."""
    packets = container.demux(container.streams.audio[0])
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        yield packet


def _decode(context: Any, packet: Any) -> list[Any] | None:
    """Decoded frames of a packet; None if it is damaged."""
    try:
        return list(context.decode(packet))
    except av.error.FFmpegError:
        return None


def _mono(frame: Any) -> np.ndarray:
    """Mean over channels of a decoded frame, float32 [samples]."""
    if frame.format.name in ("s64", "s64p"):  # which PyAV does not convert to numpy
        frame = av.AudioResampler(format="dblp").resample(frame)[0]
    samples = frame.to_ndarray()
    # Interleaved formats come as one row [1, samples * channels].
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return mixed_down(samples)


# What packets tell


class _PacketCounts:
    """Samples of the packets of an audio track, as far as packets tell them.

    Args:
        stream: the audio track.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._format = stream.container.format.name
        self._codec = stream.codec_context.codec.canonical_name
        mask = _ADTS_HEADER if (self._format, self._codec) == ("aac", "aac") else _EQUAL_PACKETS.get(self._codec, b"")
        self._mask = int.from_bytes(mask)
        self._head_bytes = len(mask)
        self._head: int | None = None
        self._counts: list[int] = []
        self._trimmed: list[int] = []
        self._end: int | None = None
        self._lengths: set[int] = set()  # of packets that begin where the one before ended
        self._late: set[int] = set()  # of others, from there on
        self._known = self._codec in (*_EQUAL_PACKETS, "opus", "flac", "alac", "vorbis")
        self._known &= self._format not in _LOSSY_FORMATS

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, packet: Any) -> None:
        """Take one packet into account."""
        if not self._known:
            self._counts.append(0)
            self._trimmed.append(0)
            return
        if self._codec in _EQUAL_PACKETS:
            count = 1
            if self._head_bytes:
                head = int.from_bytes(bytes(memoryview(packet)[: self._head_bytes])) & self._mask
                self._known &= self._head in (None, head)
                self._head = head
        elif self._codec == "opus":
            count = _opus_samples(bytes(memoryview(packet)[:2]))
        else:
            # FFmpeg's last packet of Ogg Vorbis in a single page may end before it begins: 2^32 less a few samples.
            self._known &= packet.pts is not None and (packet.duration or 0) < 1 << 31
            start, end = packet.pts or 0, (packet.pts or 0) + (packet.duration or 0)
            # FFmpeg takes the first packet of a page of Ogg Vorbis for shorter, and so for later, than it may be.
            count = end - (start if self._end is None else self._end)
            (self._lengths if count == end - start else self._late).add(count)
            self._end = end
        self._counts.append(count)
        self._trimmed.append(_trimmed_at_end(packet))

    def starts(self, rate: int, first: tuple[int, int], usual: int) -> np.ndarray | None:
        """Position of the first sample of each packet and the length of the file; None if packets do not tell.

        Args:
            rate: sampling rate in Hz.
            first: number of packets up to the first that gave samples, and its samples; those before are trimmed.
            usual: samples of a packet of which nothing is trimmed.
        """
        packets, samples = first
        counts = np.array(self._counts, np.int64)
        if self._codec in _EQUAL_PACKETS:
            counts *= self._stream.codec_context.frame_size or usual
        elif self._codec != "opus":
            ticks = Fraction(self._stream.time_base) * rate
            self._known &= not (counts * ticks.numerator % ticks.denominator).any()
            counts = counts * ticks.numerator // ticks.denominator
            # Containers other than Ogg stretch the packet before a gap.
            self._known &= self._format == "ogg" or bool((counts[:-1] == counts[:1]).all())
            self._known &= self._codec != "vorbis" or self._format == "ogg"
            # Where packets were lost, one seems longer than any packet is.
            self._known &= not self._late or (self._codec == "vorbis" and self._late <= self._lengths)
        if self._codec == "opus" or self._codec in _EQUAL_PACKETS:  # other durations are without it
            counts = np.maximum(counts - self._trimmed, 0)
        if not self._known or not counts.any():
            return None
        starts = np.concatenate([[0], counts.cumsum()])
        return np.maximum(starts - (starts[min(packets, len(counts))] - samples), 0)


def _opus_samples(head: bytes) -> int:
    """Samples at 48 kHz of an Opus packet by its first two bytes (RFC 6716, section 3.1)."""
    config, code = head[0] >> 3, head[0] & 3
    if config < 12:
        frame = (480, 960, 1920, 2880)[config & 3]
    elif config < 16:
        frame = (480, 960)[config & 1]
    else:
        frame = (120, 240, 480, 960)[config & 3]
    return frame * (1 if code == 0 else 2 if code < 3 else head[-1] & 63)


def _trimmed_at_end(packet: Any) -> int:
    """Samples that FFmpeg cuts from the end of a packet."""
    return sum(
        int.from_bytes(bytes(data)[4:8], "little")
        for data in packet.iter_sidedata()
        if data.data_type == "skip_samples"
    )


def _announced_seconds(container: Any, stream: Any, audio: AudioPlace) -> Fraction | None:
    """Length of the sound by the header; None where there is only an estimate, or one for sound and picture."""
    format = container.format.name.split(",")[0]
    if format == "mp3":  # FFmpeg has an estimate where other files are joined to it
        return Fraction(_stated_samples(audio), stream.rate) or None
    if format not in _TIMED_FORMATS:
        return None
    # Matroska and WebM keep the time at which a track ends as text in its tags.
    own = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if own:
        start = max(0, stream.start_time or 0) * stream.time_base
        return int(own[1]) * 3600 + int(own[2]) * 60 + Fraction(own[3]) - start
    alone = len(container.streams) == 1
    if stream.duration and (alone or format in ("mov", "avi")):
        return Fraction(stream.duration * stream.time_base)
    return Fraction(container.duration, 1_000_000) if alone and container.duration else None


def _stated_samples(audio: AudioPlace) -> int:
    """Samples per channel by the Xing, Info or VBRI header of an MP3 file; 0 where it states none."""
    frame = bytes_at(audio, id3_size(audio), 64)
    if len(frame) < 64 or not is_mpeg_audio(frame):
        return 0
    # The side information between frame header and Xing tag has another length for each version and mode.
    mpeg1, mono = frame[1] & 0x18 == 0x18, frame[3] & 0xC0 == 0xC0
    xing = 4 + {(True, True): 17, (True, False): 32, (False, True): 9, (False, False): 17}[mpeg1, mono]
    at = 0
    if frame[xing : xing + 4] in (b"Xing", b"Info") and frame[xing + 7] & 1:
        at = xing + 8
    elif frame[36:40] == b"VBRI":
        at = 50
    return int.from_bytes(frame[at : at + 4]) * (1152 if mpeg1 else 576) if at else 0


def id3_size(audio: AudioPlace) -> int:
    """Bytes of the ID3v2 tags in front of a file."""
    size = 0
    while (tag := bytes_at(audio, size, 10))[:3] == b"ID3" and len(tag) == 10:
        size += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    return size


def is_mpeg_audio(head: bytes) -> bool:
    """Whether some bytes begin with the header of an MPEG audio frame (MP3, MP2)."""
    # The two layer bits distinguish MPEG audio from ADTS, which has zeros there.
    return len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 != 0


def _ogg_links(audio: AudioPlace) -> list[AudioPlace]:
    """The files of which an Ogg file is joined (RFC 3533, section 4); FFmpeg ends at a link of another rate."""
    starts, bos_end, size = [], -1, place_size(audio)
    for begin in range(0, size, _OGG_BLOCK_BYTES):
        block = bytes_at(audio, begin, _OGG_BLOCK_BYTES + _OGG_HEADER_BYTES)
        for page in _OGG_FIRST_PAGE.finditer(block):
            if page.start() >= _OGG_BLOCK_BYTES:  # it is found in the next block
                break
            if begin + page.start() != bos_end:  # the first pages of sound and picture follow each other
                starts.append(begin + page.start())
            segments = block[page.end() - 1]
            bos_end = begin + page.end() + segments + sum(block[page.end() : page.end() + segments])
    if len(starts) < 2:
        return [audio]
    content, ends = bytes_at(audio, 0, size), [*starts[1:], size]
    return [AudioBytes(str(audio), memoryview(content)[a:b]) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class _Survey:
    """What one pass over the packets of a file finds; only its first samples are decoded.

    Attributes:
        rate: sampling rate of the first samples in Hz.
        announced: length in samples that the header states, if it does.
        starts: int64 [packets + 1], see `_PacketCounts.starts`.
        joined: whether it is an Ogg file of several links.
        packet_samples: samples of a packet.
        places: int64 [packets, 3], byte, time stamp and size of each packet; None where some have none.
    """

    rate: int
    announced: int | None
    starts: np.ndarray | None
    joined: bool
    packet_samples: int
    places: np.ndarray | None


def _survey(audio: AudioPlace) -> _Survey:
    if isinstance(audio, AudioBytes):
        return _surveyed(audio)
    status = audio.stat()
    return _survey_of_version(audio, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)  # up to 5 MB for an hour of audio
def _survey_of_version(audio: Path, _size: int, _changed: int) -> _Survey:
    return _surveyed(audio)


def _surveyed(audio: AudioPlace) -> _Survey:
    with closing(_opened(audio)) as container:
        stream = _audio_track(container, audio)
        counts = _PacketCounts(stream)
        frames: list[Any] = []  # the first two
        packets_to_first = 0
        places = array("q")
        bytes_left = 4 * place_size(audio) + (1 << 20)
        for packet in _packets(container):
            bytes_left -= packet.size
            if bytes_left < 0:  # a damaged index can list the same bytes again and again
                raise UnreadableAudioError(f"{audio}: its index lists more sound than the file holds.")
            if packet.size:
                counts.add(packet)
                if packet.pos is not None and packet.pts is not None:
                    places.extend((packet.pos, packet.pts, packet.size))
            if len(frames) < 2:
                packets_to_first = packets_to_first if frames else len(counts)
                frames += (_decode(stream.codec_context, packet) or ())[:1]
        if not frames:
            raise UnreadableAudioError(f"{audio}: holds no sound that can be decoded.")
        first = frames[0]
        rate = int(first.sample_rate)
        check_rate(rate)
        usual = max(frame.samples for frame in frames)
        starts = counts.starts(rate, (packets_to_first, first.samples), usual)
        joined = container.format.name == "ogg" and len(_ogg_links(audio)) > 1
        seconds = None if joined else _announced_seconds(container, stream, audio)
        announced = None if seconds is None else round(seconds * rate)
        placed = np.array(places).reshape(-1, 3) if len(places) == 3 * len(counts) else None
        return _Survey(rate, announced, None if joined else starts, joined, usual, placed)


# Decoding


class _MiscountedError(Exception):
    """A packet holds another number of samples than it seemed to."""


class FFmpegDecoder:
    """Audio that FFmpeg decodes, with the positions that the module's docstring defines.

    Args:
        audio: the file, on disk or in memory.

    Raises:
        UnreadableAudioError: not audio, or no audio track that can be decoded.
        AudioError: too many files are open.
    """

    def __init__(self, audio: AudioPlace) -> None:
        self.audio = audio
        survey = _survey(audio)
        self.rate = survey.rate
        self.announced = survey.announced
        self.frames: int | None = None
        self._packet_samples = survey.packet_samples
        self._lost: set[int] = set()  # numbers of damaged packets with sound behind them
        self._starts, self._places = survey.starts, survey.places
        self._joined = survey.joined
        self._decoded: Iterator[np.ndarray] | None = None
        self._forget()
        if self._starts is not None:
            self.frames = int(self._starts[-1])
            marks = np.arange(0, max(1, self.frames), round(BLOCK_SECONDS * self.rate))
            # First packet of each block.
            self._blocks = np.unique(self._starts[:-1].searchsorted(marks))

    def _forget(self) -> None:
        """Drop what was decoded, to start anew."""
        self.close()
        self._decoded = None
        self._position = 0  # behind the last sample that was decoded
        self._kept = np.zeros(0, np.float32)  # the samples before it

    def measure(self) -> int:
        """Length in samples per channel; decoded through where packets do not tell it.

        Raises:
            UnreadableAudioError: nothing can be decoded.
        """
        if self.frames is None:
            self.frames = sum(map(len, self._from_beginning()))
        if self.frames <= 0:
            raise UnreadableAudioError(f"{self.audio}: holds no samples.")
        return self.frames

    def shortfall(self) -> tuple[float, float] | None:
        """Seconds that the header announced and seconds that there are; None if the file is not shorter.

        Of damaged packets with sound behind them, the samples that they should have held count as announced.
        """
        if self.frames is None:
            return None
        announced, found, lost = self.announced or 0, self.frames, len(self._lost) * self._packet_samples
        if lost:
            found -= lost if self._starts is not None else 0  # in blocks, silence stands for them
            announced = max(announced, found + lost)
        announced_seconds, seconds = announced / self.rate, found / self.rate
        tolerance = 0.0 if lost else _TOLERANCE_SECONDS + _TOLERANCE_SHARE * announced_seconds
        return (announced_seconds, seconds) if announced_seconds - seconds > tolerance else None

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""
        end = None if count is None else start + count
        try:
            return self._read(start, end)
        except _MiscountedError:
            self._starts = self.frames = None
            self._forget()
            return self._read(start, end)

    def _read(self, start: int, end: int | None) -> np.ndarray:
        decoded = self._decoded_up_to(start)
        pieces, origin = [self._kept], self._position - len(self._kept)
        while end is None or self._position < end:
            piece = next(decoded, None)
            if piece is None:
                self.frames = self._position
                break
            if self._position + len(piece) <= start:
                pieces, origin = [], self._position
            pieces.append(piece)
            self._position += len(piece)
        samples = np.concatenate(pieces)
        self._kept = samples[max(0, len(samples) - round(_KEPT_SECONDS * self.rate)) :].copy()
        return samples[max(0, start - origin) : None if end is None else max(0, end - origin)]

    def _decoded_up_to(self, start: int) -> Iterator[np.ndarray]:
        """Successive samples, from what is kept, if it reaches `start` soon, or from the beginning of a block."""
        block = 0 if self._starts is None else self._block_at(start)
        ahead = self._decoded is not None and self._position - len(self._kept) <= start
        if ahead and (self._starts is None or block <= self._block_at(self._position) + 1):
            assert self._decoded is not None
            return self._decoded
        self._forget()
        if self._starts is None:
            self._decoded = self._from_beginning()
        else:
            self._position = int(self._starts[self._blocks[block]])
            self._decoded = self._from_block(block)
        return self._decoded

    def _block_at(self, position: int) -> int:
        assert self._starts is not None
        return max(0, int(self._starts[self._blocks].searchsorted(position, side="right")) - 1)

    def _from_beginning(self) -> Iterator[np.ndarray]:
        """All samples, [n] each; packets that cannot be decoded are left out, another rate is resampled."""
        rate, resampler = self.rate, None
        for frame in self._frames():
            if frame.sample_rate != rate:  # joined files
                if resampler:
                    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
                rate = frame.sample_rate
                check_rate(rate)
                resampler = None if rate == self.rate else soxr.ResampleStream(rate, self.rate, 1, "float32")
            yield resampler.resample_chunk(_mono(frame)) if resampler else _mono(frame)
        if resampler:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    def _frames(self) -> Iterator[Any]:
        """Decoded frames of all packets, or of all links."""
        for link in _ogg_links(self.audio) if self._joined else [self.audio]:
            with closing(_opened(link)) as container:
                context = _audio_track(container, self.audio).codec_context
                damaged: list[int] = []
                for number, packet in enumerate(_packets(container)):
                    frames = _decode(context, packet)
                    if frames is None:
                        damaged.append(number)
                    elif frames:
                        self._lost.update(damaged)
                        damaged = []
                        yield from frames

    def _from_block(self, block: int) -> Iterator[np.ndarray]:
        """Samples from the first packet of a block on, [n] each; packets that cannot be decoded are silent."""
        starts, firsts = self._starts, set(self._blocks[block:].tolist())
        assert starts is not None
        share = _PREROLL_SECONDS * self.rate * (len(starts) - 1) / max(1, int(starts[-1]))
        before: deque[Any] = deque(maxlen=max(_PREROLL_PACKETS, round(share)))
        context: Any = None
        silence = 0
        damaged: list[int] = []
        with closing(self._numbered_from(max(0, int(self._blocks[block]) - (before.maxlen or 0)))) as packets:
            for number, packet in packets:
                if number in firsts:
                    context = _new_context(packet.stream)
                    for earlier in before:
                        _decode(context, earlier)
                before.append(packet)
                if context is None or number + 1 >= len(starts):
                    continue
                samples = self._samples(_decode(context, packet))
                expected = int(starts[number + 1] - starts[number])
                if len(samples) == expected or (len(samples) < expected and number + _TRIMMED_PACKETS >= len(starts)):
                    if len(samples):
                        self._lost.update(damaged)
                        yield np.concatenate([np.zeros(silence, np.float32), samples])
                        silence, damaged = 0, []
                elif len(samples):
                    raise _MiscountedError
                else:
                    silence += expected
                    damaged.append(number)

    def _numbered_from(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """Numbers and packets, from one at or before `first` on if it can be sought, else from the beginning."""
        places = self._places
        for wanted in (0,) if places is None or not first else (first, 0):
            with closing(_opened(self.audio)) as container:
                packets = (packet for packet in _packets(container) if packet.size)
                number = 0
                if places is not None and wanted:
                    with suppress(av.error.FFmpegError):
                        container.seek(int(places[wanted, 1]), stream=_audio_track(container, self.audio))
                    packet = next(packets, None)
                    place = None if packet is None or packet.pts is None else (packet.pos, packet.pts, packet.size)
                    found = np.flatnonzero((places == place).all(axis=1)) if place else np.zeros(0, np.int64)
                    # Time stamps may jump and repeat: used is only what is recognised.
                    if len(found) != 1 or found[0] > wanted:
                        continue
                    number = int(found[0]) + 1
                    yield number - 1, packet
                yield from enumerate(packets, number)
                return

    def _samples(self, frames: list[Any] | None) -> np.ndarray:
        """Samples of the frames of one packet, empty if it is damaged."""
        if any(frame.sample_rate != self.rate for frame in frames or ()):
            raise _MiscountedError
        return np.concatenate([np.zeros(0, np.float32), *map(_mono, frames or ())])

    def close(self) -> None:
        """Release the file."""
        if self._decoded is not None:
            self._decoded.close()  # type: ignore[attr-defined]


def _new_context(stream: Any) -> Any:
    """A decoder in its initial state."""
    context = av.CodecContext.create(stream.codec_context.name, "r")
    if stream.codec_context.extradata:
        context.extradata = stream.codec_context.extradata
    return context
