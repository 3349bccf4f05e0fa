"""Flags, YAML files and settings: typed, and what is wrong is one sentence that names the nearest known key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bestrq2.errors import ConfigError
from bestrq2.flags import add_arguments, make_parser, parse_flags, parse_settings, type_words


@dataclass(frozen=True)
class Oven:
    """An oven.

    Args:
        degrees: temperature.
        minutes: baking time.
    """

    degrees: PositiveInt = 180
    minutes: float = 25.0


def bake(cake: str, slices: int = 8, vegan: bool = False, warm: bool = True, num_forks: int | None = None) -> None:
    """Bake a cake.

    Args:
        cake: which one.
        slices: number of slices.
        vegan: without eggs.
        warm: serve it warm.
        num_forks: number of forks,
            one each by default.
    """


@pytest.fixture
def parser() -> ArgumentParser:
    parser = make_parser("bake", "Bake a cake.")
    add_arguments(parser, bake, positional=("cake",))
    add_arguments(parser.add_argument_group("oven"), Oven, group="oven")
    return parser


def test_flags_are_typed_and_the_rest_has_its_defaults(parser):
    found = parse_flags(parser, ["apple", "--oven.degrees", "200", "--slices=12", "--vegan"])
    assert (found.cake, found.oven.degrees, found.oven.minutes) == ("apple", 200, 25.0)
    assert (found.slices, found.vegan) == (12, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (False, True, None)),
        ("--vegan --no-warm --num-forks 3", (True, False, 3)),
        ("--vegan true --warm false --num_forks 3", (True, False, 3)),
        ("--vegan=false --warm=true --num-forks=null", (False, True, None)),
    ],
)
def test_switches_take_no_value_and_underscores_stay_accepted(parser, words, expected):
    found = parse_flags(parser, [*words.split(), "apple"])
    assert found.cake == "apple"
    assert (found.vegan, found.warm, found.num_forks) == expected


def test_the_help_page_spells_types_for_people(parser):
    page = " ".join(parser.format_help().split())
    for text in (
        "CAKE which one",
        "--slices INT number of slices (default: 8)",
        "--vegan without eggs",
        "--[no-]warm",
        "--num-forks INT number of forks, one each by default",
        "--oven.minutes NUMBER baking time (default: 25.0)",
    ):
        assert text in page
    assert not {"Union", "NoneType", "Optional", "null]"} & set(page.split())


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | list[int] | str | None, "int, list of ints or string"),
        (tuple[float, float], "pair of numbers"),
        (Literal["wav", "flac"], "one of wav, flac"),
        (PositiveInt | None, "int above 0"),
        (Path, "path"),
    ],
)
def test_types_have_words(hint, words):
    assert type_words(hint) == words


def test_a_yaml_file_and_flags_go_together_the_later_one_winning(parser, tmp_path: Path):
    file = tmp_path / "cake.yaml"
    file.write_text("cake: plum\noven:\n  degrees: 170\nslices: 6\n")
    found = parse_flags(parser, ["--config", str(file), "--slices", "10"])
    assert (found.cake, found.oven.degrees, found.slices) == ("plum", 170, 10)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["apple", "--slice", "3"], "there is no setting '--slice'; did you mean '--slices'?"),
        (["apple", "--oven.degres=3"], "there is no setting '--oven.degres'; did you mean '--oven.degrees'?"),
        (["apple", "--zzz"], "there is no setting '--zzz'; `bestrq2 bake --help` lists them"),
        (["apple", "-slices", "3"], "there is no setting '-slices'; did you mean '--slices'?"),
        (["apple", "--degrees", "3"], "there is no setting '--degrees'; did you mean '--oven.degrees'?"),
        (["apple", "--oven.degrees", "-inf"], "oven.degrees: expected int above 0, got -inf"),
        (["apple", "--slices", "many"], "slices: expected int, got many"),
        (["apple", "--oven.minutes", "long"], "oven.minutes: expected number, got long"),
        (["apple", "--oven.degrees", "0"], "oven.degrees must be above 0, got 0"),
        (["apple", "--num-forks", "many"], "num_forks: expected int, got many"),
        (["apple", "--slices"], "--slices has no value; write --slices INT"),
        (["--slices", "--vegan"], "--slices has no value"),
        (["apple", "--config", "absent.yaml"], "absent.yaml"),
        ([], "CAKE is missing"),
    ],
)
def test_wrong_flags_are_named_in_one_sentence(parser, argv, message):
    with pytest.raises(ConfigError) as error:
        parse_flags(parser, argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cake: plum\nslcies: 6\n", "there is no setting 'slcies'; did you mean 'slices'?"),
        ("cake: plum\noven:\n  minuts: 6\n", "there is no setting 'oven.minuts'; did you mean 'oven.minutes'?"),
        ("cake: plum\nslices: [1]\n", "slices: expected int, got [1]"),
        ("cake: plum\noven: 5\n", "oven: expected settings such as oven.degrees, got 5"),
    ],
)
def test_wrong_keys_in_a_yaml_file_are_named_in_one_sentence(parser, tmp_path: Path, content, message):
    file = tmp_path / "cake.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        parse_flags(parser, ["--config", str(file)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_from_python_are_checked_like_flags(parser):
    found = parse_settings(parser, {"cake": "pear", "oven": {"degrees": 160}, "slices": None})
    assert (found.cake, found.oven.degrees, found.oven.minutes, found.slices) == ("pear", 160, 25.0, 8)
    with pytest.raises(ConfigError, match=r"there is no setting 'oven.degree'; did you mean 'oven.degrees'\?"):
        parse_settings(parser, {"cake": "pear", "oven": {"degree": 160}})
    with pytest.raises(ConfigError, match=r"there is no setting 'slice'; did you mean 'slices'\?"):
        parse_settings(parser, {"cake": "pear", "slice": 2})
    with pytest.raises(ConfigError, match="slices: "):
        parse_settings(parser, {"cake": "pear", "slices": "many"})


def test_the_configuration_can_be_printed_and_read_again(parser, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as done:
        parse_flags(parser, ["apple", "--oven.degrees", "200", "--print-config"])
    assert done.value.code in (0, None)
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    found = parse_flags(parser, ["--config", str(file)])
    assert (found.cake, found.oven.degrees) == ("apple", 200)
