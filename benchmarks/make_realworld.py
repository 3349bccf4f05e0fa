"""The manifest of realworld-1: labels from file names, folds, checksums.

    python benchmarks/make_realworld.py PACKAGES

PACKAGES holds each package of src/bestrq2/realworld/packages.csv, unpacked by `dpkg-deb -x` into a folder of its name.
Writes recordings.parquet and tasks.parquet beside that table. It shows where every label came from; running it again
on other versions of the packages makes another benchmark.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from bestrq2.data.audio import AUDIO_SUFFIXES, SILENCE_PEAK
from bestrq2.data.decoders import ArrayDecoder, open_decoder
from bestrq2.errors import BestRQ2Error

HERE = Path(__file__).parent.parent / "src" / "bestrq2" / "realworld"
PACKAGES = {row["package"]: row for row in csv.DictReader((HERE / "packages.csv").open())}
SHORTEST, LONGEST = 0.1, 10.0
"""Seconds of a labelled recording."""
PITCHES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
FAMILIES = ("piano", "chromatic percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe")
"""The first ten families of General MIDI, eight programs each."""
SOUNDFONTS = {
    "musescore-general-soundfont": "usr/share/sounds/sf3/MuseScore_General_Full.sf3",
    "timgm6mb-soundfont": "usr/share/sounds/sf2/TimGM6mb.sf2",
    "csound-soundfont": "usr/share/sounds/sf2/sf_GMbank.sf2",
}
DRUMS = {
    "kick": "kick|bassdrum|bass ?drum|^bd|_bd|kck",
    "snare": "snare|snr|^sd|rim|sidestick|stick",
    "hihat": "hat|hh|pedal",
    "tom": "tom",
    "cymbal": "crash|ride|cymb|splash|china|bell",
    "clap": "clap",
}
EVENTS = {
    "explosion": r"explosion|explode|^boom$",
    "gun": r"gunshot|shotgun(fire)?$|gun_sound|^gun$|minigun|^cannon|musket",
    "laser": "laser|phaser|beam~|plasma",
    "water": r"^water\d|env_sounds_water|^splash|^rain$|^water_?(drop|running)|^bubbles|^plunge",
    "fire": r"^fire_(large|small|fire|extinguish)|^fire\d|^campfire|flame|^torch|wicker_fire|^fire$",
    "footstep": "footstep|(golem|horseman|behemoth|dr)_walk|^steps?$",
    "cry": "-die|_die|scream",
    "animal": r"^birds?[\d_-]|^bird$|^duck|^owl$|^rooster|^goose|^chicken_[as]|^wolf[-_ h]|^sheep|^horse(_\d+)?$|^dog"
    r"|^cat$|^kitten|^meow|^cow_|^pig_[as]|^donkey|^frog|^crickets?\d?(_\d+)?$|^moose|^coyote|^stag_|^ox_|^bee\d?$",
    "wood": "sawing|benchsaw|sawmill|woodcutting|harvest_wood|choppy",
    "metal": r"^anvil\d|anvil_collision|^hammer|geologist_hammer|smith_\d|ironping|pickhammer|mallet_metal|dig_metal",
    "sword": r"swordman_attack|^sword(-\d)?$|dagger|^knife|swing_then|throwing-knife",
    "engine": "car_passing|motorcycle|sewing_machine|washing|rail_train|vacuum|jetpack",
}
NOT_EVENTS = r"theme|loop|intro|catapult|airship|machine_die|station|wasteland|lasersight|underwater|rubber"
"""File names in which another word of the kind means something else."""
EVENT_PACKAGES = (
    *("megaglest-data", "wesnoth-1.16-data", "minetest-data", "widelands-data", "lincity-ng-data", "endless-sky-data"),
    *("wordwarvi-sound", "warmux-data", "scratch", "hedgewars-data", "bzflag-data", "sonic-pi-samples"),
    "tuxpaint-stamps-default",
)
SPEAKERS = {
    "fr": ("asterisk-core-sounds-fr-g722", "asterisk-prompt-fr-armelle"),
    "es": ("asterisk-core-sounds-es-g722", "asterisk-prompt-es-co"),
    "it": ("asterisk-core-sounds-it-g722", "asterisk-prompt-it-menardi-wav"),
}
ENGLISH_VOICES = {"Singer", "Pirate", "Mobster", "British", "Surfer", "Robot", "Classic", "Default", "HillBilly"}


@dataclass(frozen=True)
class Row:
    """A labelled recording: `group` is held out as a whole, `side` says in which fold, None to draw one."""

    label: str
    group: str
    package: str
    path: str
    side: int | None = None


@dataclass(frozen=True)
class Part:
    """A sample inside a file of an instrument: bytes [begin, end), an Ogg stream, or 16-bit PCM at `rate` Hz."""

    begin: int
    end: int
    rate: int


Recording = tuple[str, str]
"""Package and path; the path of a part ends in #BEGIN."""


class Builder:
    """Recordings and labels out of unpacked packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts: dict[Recording, Part] = {}
        self.tasks: dict[str, list[Row]] = {}

    def files(self, package: str) -> list[str]:
        folder = (self.root / package).resolve()
        found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
        return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file() and not path.is_symlink())

    def build(self) -> None:
        t = self.tasks
        t["speech/phrase"], t["speech/voice"] = self.hedgewars()
        t["speech/prompt"] = list(self.prompts())
        t["speech/syllable"] = list(self.syllables())
        t["speech/language"] = capped(list(self.languages()), 50)
        t["speech/role"] = capped(list(self.roles()), 250)
        t["music/drum"] = list(self.drums())
        t["music/chord"] = list(self.chords())
        notes = list(self.notes())
        t["music/family"] = capped([row for row, _ in notes], 90)
        t["music/pitch"] = capped([pitch for _, pitch in notes if pitch is not None], 40)
        t["environment/event"] = capped(list(self.events()), 25)
        t["environment/animal"] = list(self.animals())
        t["environment/action"] = list(self.actions())

    def hedgewars(self) -> tuple[list[Row], list[Row]]:
        """The same phrases by voices of a game: .../Voices/VOICE/PHRASE[TAKE].ogg."""
        phrases, voices = [], []
        for path in self.files("hedgewars-data"):
            if found := re.search(r"[Vv]oices/([^/]+)/(.*)\.ogg$", path):
                phrase = re.sub(r"\d+$", "", found[2])
                voices.append(Row(found[1], phrase, "hedgewars-data", path))
                if found[1] in ENGLISH_VOICES:
                    phrases.append(Row(phrase, found[1], "hedgewars-data", path))
        return phrases, voices

    def prompts(self) -> Iterator[Row]:
        """Telephone prompts by two speakers per language; the same file name is the same sentence."""
        for language, packages in SPEAKERS.items():
            names: list[dict[str, str]] = []
            for package in packages:
                names.append({})
                for path in self.files(package):
                    if "/sounds/" in path and "silence" not in path:
                        name = path.split("/sounds/")[1].rsplit(".", 1)[0]
                        name = re.sub(r"^(fr|es|it|[a-z]{2}_[A-Z]{2}_[mf]_\w+)/", "", name)
                        names[-1].setdefault(name, path)
            for name in sorted(set(names[0]) & set(names[1])):
                for side, package in enumerate(packages):
                    yield Row(f"{language} {name}", package, package, names[side][name], side)

    def syllables(self) -> Iterator[Row]:
        """Mandarin syllables by two speakers: .../ogg/SYLLABLE[TONE]/SPEAKER.ogg."""
        paths: dict[str, dict[str, str]] = defaultdict(dict)
        for path in self.files("gcin-voice"):
            if found := re.search(r"/ogg/([^/]+?)(\d?)/(\d)\.ogg$", path):
                paths[found[1] + (found[2] or "1")][found[3]] = path
        for syllable, found_paths in sorted(paths.items()):
            if len(found_paths) > 1:
                for side, speaker in enumerate(sorted(found_paths)[:2]):
                    yield Row(syllable, speaker, "gcin-voice", found_paths[speaker], side)

    def languages(self) -> Iterator[Row]:
        """Words of educational games, by language code; one pair of corpora is held out from the other."""
        patterns = {
            "tuxpaint-stamps-default": (r"_desc_([a-z]{2})(?:_[A-Z]{2})?\.ogg$", 0),
            "fillets-ng-data-cs": (r"/(cs)/", 0),
            "fillets-ng-data-nl": (r"/(nl)/", 0),
            "ktuberling-data": (r"/sounds/([a-z]{2})/", 1),
            "klettres-data": (r"/klettres/([a-z]{2})(?:_[A-Z]{2})?/syllab", 1),
        }
        for package, (pattern, side) in patterns.items():
            for path in self.files(package):
                if found := re.search(pattern, path):
                    yield Row(found[1], package.rsplit("-cs")[0].rsplit("-nl")[0], package, path, side)

    def roles(self) -> Iterator[Row]:
        """Lines of the small (m) and the big (v) fish, acted in two languages: .../LEVEL-m-LINE.ogg."""
        for side, language in enumerate(("cs", "nl")):
            for path in self.files(f"fillets-ng-data-{language}"):
                if found := re.search(r"-(m|v)-[^/]*\.ogg$", path):
                    label = {"m": "small fish", "v": "big fish"}[found[1]]
                    yield Row(label, language, f"fillets-ng-data-{language}", path, side)

    def drums(self) -> Iterator[Row]:
        for path in self.files("hydrogen-drumkits"):
            name = path.rsplit("/", 1)[1].lower()
            kind = next((drum for drum, pattern in DRUMS.items() if re.search(pattern, name)), None)
            if kind and (kit := re.search(r"/drumkits/([^/]+)", path)):
                yield Row(kind, kit[1], "hydrogen-drumkits", path)

    def chords(self) -> Iterator[Row]:
        """Guitar chords by stroke (up, down, plain): 'Csharp minor_UP_3.flac'."""
        for path in self.files("hydrogen-drumkits-effects"):
            found = re.match(
                r"([A-G](?:flat|sharp)?) ?(major|min(?:or|ro)(?:7b5)?)(?:_(UP|DOWN|Down))?_(\d+)",
                path.rsplit("/", 1)[1],
            )
            if found:
                root = {"Bflat": "Asharp"}.get(found[1], found[1])
                stroke = (found[3] or "plain").lower()
                side = ("up", "down", "plain").index(stroke)
                label = f"{root} {found[2].replace('minro', 'minor')}"
                yield Row(label, stroke, "hydrogen-drumkits-effects", path, side)

    def notes(self) -> Iterator[tuple[Row, Row | None]]:
        """Notes of General MIDI instruments: family and pitch class, MuseScore's on one side, others on the other."""
        found: list[tuple[str, str, int, int, Part]] = []
        for package, path in SOUNDFONTS.items():
            found += [(package, path, *one) for one in soundfont_notes((self.root / package).resolve() / path)]
        for path in sorted((self.root / "freepats").resolve().rglob("Tone_000/*.pat")):
            inside = path.relative_to((self.root / "freepats").resolve()).as_posix()
            found += [("freepats", inside, *one) for one in patch_notes(path)]
        for package, path, program, key, part in found:
            if program // 8 < len(FAMILIES):
                family = FAMILIES[program // 8]
                name = f"{path}#{part.begin}"
                self.parts[package, name] = part
                side = 0 if package == "musescore-general-soundfont" else 1
                pitched = 36 <= key <= 95 and family != "chromatic percussion"
                pitch = Row(PITCHES[key % 12], package, package, name, side) if pitched else None
                yield Row(family, package, package, name, side), pitch

    def events(self) -> Iterator[Row]:
        for package in EVENT_PACKAGES:
            for path in self.files(package):
                if re.search(r"music|voices|_desc|/math/|alphabets", path.lower()):
                    continue
                name = re.sub(r"([a-z])([A-Z])", r"\1_\2", path.rsplit("/", 1)[1].rsplit(".", 1)[0]).lower()
                labels = [event for event, pattern in EVENTS.items() if re.search(pattern, name)]
                if package == "tuxpaint-stamps-default" and "/animals/" in path:
                    labels = ["animal"]
                # a flame is shot in this game
                if len(labels) == 1 and not re.search(NOT_EVENTS, name) and (package, name) != ("bzflag-data", "fire"):
                    yield Row(labels[0], package, package, path)

    def animals(self) -> Iterator[Row]:
        """Birds and mammals: photos with their sounds on one side, games on the other."""
        birds = r"bird|duck|owl|rooster|goose|chicken|crow|gull"
        mammals = (
            r"wolf|sheep|horse(_\d+|gallop)?\.|dog|cat\.|kitten|meow|boar|moose|coyote|stag_|ox_|donkey|sealion|cow"
        )
        for path in self.files("tuxpaint-stamps-default"):
            if (found := re.search(r"/animals/(birds|mammals)/", path)) and "_desc" not in path:
                yield Row(found[1], "tuxpaint", "tuxpaint-stamps-default", path, 0)
        for package in ("widelands-data", "scratch", "wesnoth-1.16-data", "megaglest-data"):
            for path in self.files(package):
                name = path.rsplit("/", 1)[1].lower()
                if re.search(r"music|attack|hit|standing|_die|ack|select|building|growl", path.lower()):
                    continue
                if re.search(f"^({birds})", name):
                    yield Row("birds", package, package, path, 1)
                elif re.search(f"^({mammals})", name):
                    yield Row("mammals", package, package, path, 1)

    def actions(self) -> Iterator[Row]:
        """Sounds of units in a game: factions/FACTION/.../UNIT_ACTION[TAKE].wav."""
        for path in self.files("megaglest-data"):
            found = re.search(r"factions/([^/]+)/.*/[^/]*?_(attack|die|hit|ack|select)\d*\.(wav|ogg)$", path)
            if found and found[1] not in ("tech", "romans"):
                action = {"ack": "reply", "select": "reply"}.get(found[2], found[2])
                yield Row(action, found[1], "megaglest-data", path)


def soundfont_notes(path: Path) -> Iterator[tuple[int, int, Part]]:
    """Program, key and place of the samples of a SoundFont that one family of instruments of bank 0 uses."""
    data = path.read_bytes()
    chunks = {}
    for name, at, size in riff_chunks(data, 12, len(data)):
        if name == b"LIST":
            chunks |= {inner: (start, length) for inner, start, length in riff_chunks(data, at + 4, at + size)}

    def table(name: bytes, fields: str) -> np.ndarray:
        at, size = chunks[name]
        dtype = np.dtype([(one.split(":")[0], one.split(":")[1]) for one in fields.split()])
        return np.frombuffer(data, dtype, size // dtype.itemsize, at)

    presets = table(b"phdr", "name:S20 preset:<u2 bank:<u2 bag:<u2 rest:(3,)<u4")
    samples = table(
        b"shdr", "name:S20 start:<u4 end:<u4 loop:<u4 loopend:<u4 rate:<u4 key:u1 fine:i1 link:<u2 type:<u2"
    )
    instruments = table(b"inst", "name:S20 bag:<u2")
    bags = {kind: table(kind + b"bag", "gen:<u2 mod:<u2")["gen"] for kind in (b"p", b"i")}
    generators = {kind: table(kind + b"gen", "op:<u2 value:<u2") for kind in (b"p", b"i")}

    def zones(kind: bytes, headers: np.ndarray, number: int, operator: int) -> Iterator[int]:
        for bag in range(headers["bag"][number], headers["bag"][number + 1]):
            zone = generators[kind][bags[kind][bag] : bags[kind][bag + 1]]
            yield from map(int, zone["value"][zone["op"] == operator])

    programs: dict[int, set[int]] = defaultdict(set)
    for preset in np.flatnonzero(presets["bank"][:-1] == 0):
        for instrument in zones(b"p", presets, int(preset), 41):
            for sample in zones(b"i", instruments, instrument, 53):
                programs[sample].add(int(presets["preset"][preset]))
    base, compressed = chunks[b"smpl"][0], path.suffix == ".sf3"
    for number, sample in enumerate(samples[:-1]):
        own = programs.get(number, set())
        # right channels (type 4) repeat the left
        if len({program // 8 for program in own}) != 1 or sample["type"] & 4 or sample["rate"] < 16000:
            continue
        width = 1 if compressed else 2
        begin, end = (base + width * int(sample[name]) for name in ("start", "end"))
        yield min(own), int(sample["key"]), Part(begin, end, 0 if compressed else int(sample["rate"]))


def riff_chunks(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        size = struct.unpack_from("<I", data, start + 4)[0]
        yield data[start : start + 4], start + 8, size
        start += 8 + size + size % 2


def patch_notes(path: Path) -> Iterator[tuple[int, int, Part]]:
    """Program, key and place of the samples of a Gravis patch, PROGRAM_NAME.pat, of signed 16-bit samples."""
    data, at = path.read_bytes(), 129 + 63 + 47
    while at + 96 <= len(data):
        size, _, _, rate, _, _, root = struct.unpack_from("<IIIHIII", data, at + 8)
        if data[at + 55] & 3 == 1 and root:
            key = round(69 + 12 * np.log2(root / 440e3))
            yield int(path.name[:3]), int(key), Part(at + 96, at + 96 + size, rate)
        at += 96 + size


def capped(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows of each label and group, drawn at random."""
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.label, row.group].append(row)
    generator = random.Random(0)
    return [row for _, own in sorted(cells.items()) for row in generator.sample(own, min(most, len(own)))]


# --- checks and folds ---


def measured(job: tuple[Path, Part | None]) -> tuple[str, int, float] | None:
    """Checksum, bytes and seconds of a recording; None where it is silent or cannot be decoded."""
    path, part = job
    content = path.read_bytes()
    if part is not None:
        content = content[part.begin : part.end]
    digest = hashlib.sha256(content).hexdigest()[:16]
    try:
        if part is None or not part.rate:
            import io

            if part is None:
                decoder = open_decoder(path)
            else:
                samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
                decoder = ArrayDecoder(samples, rate)
        else:
            decoder = ArrayDecoder(np.frombuffer(content, "<i2").astype(np.float32) / 32768, part.rate)
        waveform = decoder.read(0, None)
    except (BestRQ2Error, OSError, RuntimeError, ValueError) as error:
        print("left out:", path, error)
        return None
    if not len(waveform) or np.abs(waveform).max() < SILENCE_PEAK:
        return None
    return digest, len(content), round(len(waveform) / decoder.rate, 3)


def folds(name: str, rows: list[Row]) -> dict[str, int]:
    """Fold of each group: as its side says, else three folds that share the rows of every label evenly."""
    if all(row.side is not None for row in rows):
        return {row.group: int(row.side or 0) for row in rows}
    counts = Counter(row.group for row in rows)
    sizes: list[Counter[str]] = [Counter(), Counter(), Counter()]
    found = {}
    for group, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
        own = Counter(row.label for row in rows if row.group == group)
        # the fold where these labels are rarest
        place = min(range(3), key=lambda fold: (sum(sizes[fold][label] * own[label] for label in own), fold))
        sizes[place] += own
        found[group] = place
    return found


def task_rows(name: str, rows: list[Row], known: dict[Recording, tuple[str, int, float]]) -> list[tuple[Row, int]]:
    """Rows with their folds, without what cannot be scored: recordings too long or short, contents that occur twice,
    and classes that a fold cannot be trained or tested on."""
    rows = [row for row in rows if SHORTEST <= known.get((row.package, row.path), ("", 0, 0.0))[2] <= LONGEST]
    by_content: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_content[known[row.package, row.path][0]].append(row)
    rows = [own[0] for own in by_content.values() if len({row.label for row in own}) == 1]
    if name in ("speech/prompt", "speech/syllable"):
        sides = defaultdict(set)
        for row in rows:
            sides[row.label].add(row.side)
        return [(row, int(row.side or 0)) for row in rows if len(sides[row.label]) == 2]
    while True:
        fold = folds(name, rows)
        number = max(fold.values()) + 1
        count = Counter((row.label, fold[row.group]) for row in rows)
        bad = set()
        for label in {row.label for row in rows}:
            per_fold = [count[label, one] for one in range(number)]
            # a probe needs training clips of every class in every fold
            if sum(per_fold) - max(per_fold) < 3 or sum(1 for one in per_fold if one) < 2 or sum(per_fold) < 8:
                bad.add(label)
        if not bad:
            return [(row, fold[row.group]) for row in rows]
        rows = [row for row in rows if row.label not in bad]


def main(root: Path) -> None:
    builder = Builder(root)
    builder.build()
    everything: list[Recording] = [
        (package, path) for package in PACKAGES if package != "freepats" for path in builder.files(package)
    ]
    everything += sorted(builder.parts)
    jobs = [
        ((root / package).resolve() / path.rsplit("#", 1)[0], builder.parts.get((package, path)))
        for package, path in everything
    ]
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(measured, jobs, chunksize=64))
    known = {one: result for one, result in zip(everything, results, strict=True) if result is not None}
    labelled: list[tuple[str, Row, int]] = []
    for name, rows in builder.tasks.items():
        kept = task_rows(name, rows, known)
        labelled += [(name, row, fold) for row, fold in kept]
        sizes = [sum(fold == one for _, fold in kept) for one in range(3)]
        print(name, len({row.label for row, _ in kept}), "classes, tested in folds:", sizes)
    tested = {(row.package, row.path) for _, row, _ in labelled}
    contents = {known[one][0] for one in tested}
    free, seen = [], set()
    for one, (digest, _, seconds) in known.items():
        # parts of instruments are cut out for tasks only; the same content may have several names
        if one not in builder.parts and digest not in contents and digest not in seen and seconds >= SHORTEST:
            seen.add(digest)
            free.append(one)
    recordings = sorted(tested) + sorted(free)
    number = {one: place for place, one in enumerate(recordings)}
    parts = [builder.parts.get(one, Part(0, 0, 0)) for one in recordings]
    columns = {
        "package": pa.array([one[0] for one in recordings]).dictionary_encode(),
        "path": [one[1].rsplit("#", 1)[0] for one in recordings],
        "begin": pa.array([part.begin for part in parts], pa.int32()),
        "rate": pa.array([part.rate for part in parts], pa.int32()),
        "bytes": pa.array([known[one][1] for one in recordings], pa.int32()),
        "seconds": pa.array([known[one][2] for one in recordings], pa.float32()),
        "sha256": [known[one][0] for one in recordings],
    }
    pq.write_table(pa.table(columns), HERE / "recordings.parquet", compression="zstd", compression_level=19)
    rows = sorted((name, number[row.package, row.path], row.label, row.group, fold) for name, row, fold in labelled)
    names, places, labels, groups, fold_column = zip(*rows, strict=True)
    tasks = {
        "task": pa.array(names).dictionary_encode(),
        "recording": pa.array(places, pa.int32()),
        "label": pa.array(labels).dictionary_encode(),
        "group": pa.array(groups).dictionary_encode(),
        "fold": pa.array(fold_column, pa.int8()),
    }
    pq.write_table(pa.table(tasks), HERE / "tasks.parquet", compression="zstd", compression_level=19)
    hours = {True: 0.0, False: 0.0}
    for one in recordings:
        hours[one in tested] += known[one][2] / 3600
    print(f"{len(tested)} labelled recordings, {hours[True]:.2f} h; {len(free)} others, {hours[False]:.2f} h")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
