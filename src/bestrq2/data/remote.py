"""Remote shards: what a URL or a pattern of URLs stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bestrq2.data.transfer import Patience, Shard, check_url
from bestrq2.errors import ConfigError, DataError
from bestrq2.seeding import generator


@dataclass(frozen=True)
class StreamSource:
    """Remote tars of audio, read from beginning to end only.

    Attributes:
        name: what the user calls them.
        urls: of the shards.
        counts: samples in each shard that was read to its end before; with them a resumed run passes over whole shards
            without fetching them.
        patience: with the network.
    """

    name: str
    urls: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)

    def split(self, num_validation: int, seed: int) -> tuple[StreamSource, StreamSource | None]:
        """(training, validation): one whole shard is held out, if any is wanted and there are two or more."""
        if num_validation <= 0 or len(self.urls) < 2:
            return self, None
        held_out = int(generator("stream", "split", seed).permutation(len(self.urls))[-1])
        rest = self.urls[:held_out] + self.urls[held_out + 1 :]
        return replace(self, urls=rest), replace(self, urls=(self.urls[held_out],))


def is_remote(spec: str) -> bool:
    """Whether a source's name is that of a stream: a URL, or a command behind "pipe:"."""
    return "://" in spec or spec.startswith("pipe:")


def open_stream(spec: str, patience: Patience | None = None) -> StreamSource:
    """The shards that a URL or a pattern of URLs stands for; the first one is contacted.

    Args:
        spec: such as "https://host/shard-{000..099}.tar", "s3://bucket/shard.tar", or "pipe:COMMAND" for a shell
            command that writes a tar.
        patience: with the network.

    Raises:
        ConfigError: a kind of URL that cannot be fetched here.
        DataError: the first shard cannot be reached, is no tar, or holds no audio.
    """
    from braceexpand import braceexpand

    try:
        urls = tuple(braceexpand(spec, escape=False))
    except ValueError as error:
        raise ConfigError(f"{spec}: a brace is not closed; write for instance shard-{{000..099}}.tar") from error
    for url in urls:
        check_url(url)
    source = StreamSource(spec, urls, patience=patience or Patience())
    # A mistyped address must not take as long as a server that is started again in the middle of a run.
    shard = Shard(urls[0], replace(source.patience, absent=False))
    _, first = shard.window(0, 1)
    shard.close()
    if shard.failure is not None:
        raise DataError(f"{shard.url} cannot be fetched: {shard.failure}.")
    if not first and shard.damage is not None:
        raise DataError(f"{shard.url} is no tar with audio in it: it {shard.damage}.")
    if not first:
        found = ", ".join(sorted(shard.others)[:5]) or "nothing"
        raise DataError(f"{shard.url} holds no audio (found: {found}; expected .wav, .flac, .mp3 and the like).")
    return source
