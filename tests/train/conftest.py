from pathlib import Path

import pytest
from small_run import small_pretrain, write_recordings


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings") / "audio")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> Path:
    return small_pretrain(recordings, tmp_path_factory.mktemp("runs") / "run")
