import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import small_pretrain, write_recordings


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings") / "audio")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> Callable[..., Path]:
    """Uninterrupted small runs by their settings, each made once; nothing may be written into them."""
    runs: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in runs:
            runs[key] = small_pretrain(recordings, tmp_path_factory.mktemp("undisturbed") / "run", **changes)
        return runs[key]

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> Path:
    """A small run with its report."""
    return small_pretrain(recordings, tmp_path_factory.mktemp("runs") / "run", trainer={"report": True})
