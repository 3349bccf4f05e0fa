"""Real recordings of Debian packages as a frozen benchmark: the manifest, and the command that fetches the audio.

The manifest names every recording, its checksum, its labels and the licence of its package. The audio is not shipped.
It yields places of files and labels, and imports nothing of `bestrq2.data`.
"""

from bestrq2.realworld.fetch import Fetched, fetch
from bestrq2.realworld.folder import MARKER, find_folder, places
from bestrq2.realworld.manifest import NAME, TASKS, Manifest, RealTask, Recording, TaskRows, load_manifest, with_more

__all__ = [
    "MARKER",
    "NAME",
    "TASKS",
    "Fetched",
    "Manifest",
    "RealTask",
    "Recording",
    "TaskRows",
    "fetch",
    "find_folder",
    "load_manifest",
    "places",
    "with_more",
]
