"""Pages of documentation name commands, flags and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bestrq2 import flags
from bestrq2.recipe_book import recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: Path) -> list[list[str]]:
    """Arguments of every `bestrq2 ...` line in a code block."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"^(?:.*--no-python )?bestrq2 (?=[a-z])(.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


class Accepted(Exception):
    """Raised in place of the work of a command."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch):
    from bestrq2 import cli

    parse = flags.parse_command

    def stop(*arguments: object, **options: object) -> None:
        raise Accepted

    def parse_only(*arguments: object, **options: object) -> None:
        parse(*arguments, **options)
        raise Accepted

    monkeypatch.setattr(flags, "parse_command", parse_only)
    monkeypatch.setattr("bestrq2.train.initial.initial_fields", lambda source: {})
    monkeypatch.setattr("bestrq2.commands.pretrain._pretrain", stop)
    for words in commands_of(page):
        with pytest.raises(Accepted):
            assert cli.run(words) == 0, words


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_table_of_recipes_is_complete():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name in recipes():
        base, _, size = name.rpartition("-")
        whole = any(f"`{name}`" in row for row in rows)
        assert whole or any(f"`{base}-" in row and f"`-{size}`" in row for row in rows), name


def test_files_named_in_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|csv))`", text)) - {"commands/NAME.py"}
    assert len(named) > 15
    for name in named:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "bestrq2")), name
