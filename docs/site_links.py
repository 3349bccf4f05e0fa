"""Hook of mkdocs: links out of docs/ lead to the repository.

Pages link to source files by relative paths, which work on GitHub. The site holds the pages alone.
"""

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replace relative links to files outside of docs/ by their addresses in the repository."""

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[1]))
        return match[0] if path.startswith("docs/") else f"]({config.extra['source']}/blob/main/{path})"

    return re.sub(r"\]\(((?:\.\./)+[^)\s]+)\)", absolute, markdown)
