"""Pages of documentation: commands, names, links and files in them exist, and they build to a site."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import bestrq2
from bestrq2 import flags
from bestrq2.recipe_book import recipes

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
NOTEBOOK = ROOT / "examples" / "from_install_to_probe.ipynb"


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str = r"\w*", before: str = "") -> list[str]:
    """Code blocks of a page or notebook, without those of other languages or those that `before` does not precede."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        return [source for source in sources if not source.startswith("%")]
    pattern = rf"{before}^```{language}\n(.*?)^```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """Arguments of every `bestrq2 ...` line in a code block."""
    lines = [line for block in blocks_of(page) for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"^(?:.*--no-python )?bestrq2 (?=[a-z])(.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


class Accepted(Exception):
    """Raised in place of the work of a command."""


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=page_name)
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
        if "--resume" in words:  # of a run that does not exist here
            words = [*words, "--data", "recordings"]
        with pytest.raises(Accepted):
            assert cli.run(words) == 0, words


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them; those of the site are equal."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def checked_names(code: str, imported: dict[str, Any]) -> None:
    """Check names of installed packages in a script, and names of arguments of functions of bestrq2.

    Args:
        code: Python source.
        imported: modules and objects by the names that earlier scripts gave them; those of `code` are added.
    """
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                module = installed(name.name)
                top = name.name.partition(".")[0]
                imported[name.asname or top] = module if name.asname or module is None else sys.modules[top]
        elif isinstance(node, ast.ImportFrom) and (module := installed(node.module or "")) is not None:
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                imported[name.asname or name.name] = getattr(module, name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node, imported)
        elif isinstance(node, ast.Call) and getattr(
            called := resolved(node.func, imported), "__module__", ""
        ).startswith("bestrq2"):
            inspect.signature(called).bind_partial(**{word.arg: None for word in node.keywords if word.arg})


def installed(name: str) -> Any:
    """A module, or None where an optional package is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bestrq2"):
            raise
        return None


def resolved(node: ast.expr, imported: dict[str, Any]) -> Any:
    """What a dotted name stands for, or None if its first part was not imported; fails if an attribute is missing."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if not isinstance(node, ast.Attribute) or (owner := resolved(node.value, imported)) is None:
        return None
    return getattr(owner, node.attr)


@pytest.mark.parametrize("page", [page for page in [*PAGES, NOTEBOOK] if blocks_of(page, "python")], ids=page_name)
def test_scripts_on_a_page_name_what_exists(page: Path):
    imported: dict[str, Any] = {}
    for block in blocks_of(page, "python"):
        checked_names(block, imported)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page, "python", before="^<!-- runs -->\n")], ids=page_name
)
def test_cheap_scripts_on_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scripts after the comment "runs" do so one after another, in a folder with stand-ins for the recordings."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "drumkits" / "Audiophob").mkdir(parents=True)
    for name in ("101450__menegass__tomh", "hhat-paiste"):
        decaying = 0.3 * rng.standard_normal(3000) * np.exp(-np.arange(3000) / 500)
        soundfile.write(tmp_path / "drumkits" / "Audiophob" / f"{name}.wav", decaying, 16_000)
    bestrq2.embed("bestrq2-tiny", "drumkits", "drums.parquet", num_workers=0)
    names: dict[str, Any] = {}
    for block in blocks_of(page, "python", before="^<!-- runs -->\n"):
        exec(compile(block, page_name(page), "exec"), names)


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


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    pytest.importorskip("mkdocstrings", reason="the extra docs is needed")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    pages = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    reference = " ".join(text for name, text in pages.items() if name.startswith("reference/"))
    for name in bestrq2.__all__:
        if name != "__version__":
            assert re.search(rf'id="bestrq2\.(?:[\w.]+\.)?{name}"', reference), f"docs/reference lacks {name}"
    for name, text in pages.items():
        assert not re.search(
            r'<(?:script|img)[^>]* src="?(?:https?:)?//|<link[^>]*stylesheet[^>]*href="?(?:https?:)?//', text
        )
        # Python-Markdown needs an empty line before a list or table; GitHub does not.
        for paragraph in re.findall(r"<p>.*?</p>", text, re.DOTALL):
            assert not re.search(r"^(?:[-*] |\d+\. |\|.*\|$|```|::: )", paragraph, re.MULTILINE), f"{name}: {paragraph}"


@pytest.mark.slow
def test_the_notebook_runs_on_real_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`BESTRQ2_PACKAGES` names a folder with the packages of realworld-1, each unpacked in a folder of its name."""
    drums = Path(os.environ.get("BESTRQ2_PACKAGES", tmp_path)) / "hydrogen-drumkits"
    if not drums.is_dir():
        pytest.skip("BESTRQ2_PACKAGES is not set")
    pytest.importorskip("nbclient")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    (tmp_path / "work" / "packages").mkdir(parents=True)
    (tmp_path / "work" / "packages" / "hydrogen-drumkits").symlink_to(drums)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "drum-1" in text
    assert "rror" not in text
