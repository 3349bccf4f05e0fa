"""Which tasks a call is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.xares.tasks import DataFolder, TaskFile, data_folder, listing, select, split_names

ESC = TaskFile("/x/tasks/esc50_task.py", "esc50", "ESC-50", metric="accuracy", knn=True, zenodo="14614287")
GTZAN = TaskFile("/x/tasks/gtzan_task.py", "gtzan_genre", "GTZAN Genre", metric="accuracy", knn=True, zenodo="14722472")
ASR = TaskFile("/x/tasks/librispeech_asr_task.py", "librispeech", "LibriSpeech-100h", kind="asr", zenodo="14716252")
CAR = TaskFile("/x/tasks/inside_outside_car_task.py", "inside_outside_car", "Inside/outside car", private=True)
OWN = TaskFile("/y/tasks/birds_task.py", "birds")
ALL = [ESC, GTZAN, ASR, CAR, OWN]
DOWNLOADS = DataFolder(Path("/z"), True)


def test_tasks_go_by_the_harness_name_the_title_or_the_file():
    names = ["gtzan", "ESC-50", "gtzan_genre", "inside_outside_car"]
    assert select(ALL, DOWNLOADS, names) == [GTZAN, ESC, CAR]
    assert select(ALL, DOWNLOADS, ["/y/tasks/birds_task.py"]) == [OWN]


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"there is no task 'ecs50'; did you mean 'esc50'\?; see bestrq2 xares --list"
    ):
        select(ALL, DOWNLOADS, ["esc50", "ecs50"])


def test_by_default_all_run_whose_scores_are_among_the_37_entries():
    assert select(ALL[:4], DOWNLOADS, None) == [ESC, GTZAN]


def test_with_tars_at_hand_those_run_that_have_some_and_those_that_came_with_them(tmp_path):
    for name in ("esc50", "inside_outside_car"):
        (tmp_path / "env" / name).mkdir(parents=True)
    folder = data_folder(tmp_path, tmp_path / "cache")
    assert (folder.path, folder.download) == (tmp_path / "env", False)
    assert select(ALL, folder, None) == [ESC, CAR]
    assert select(ALL, DataFolder(folder.path, False, (Path(OWN.path),)), None) == [ESC, CAR, OWN]


def test_a_folder_without_any_task_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no folder of a task, such as esc50"):
        select(ALL, data_folder(tmp_path, tmp_path), None)
    with pytest.raises(DataError, match="there is no such folder"):
        data_folder(tmp_path / "missing", tmp_path)


def test_two_tasks_of_one_name_are_refused():
    twin = TaskFile("/y/tasks/mine_task.py", "esc50")
    with pytest.raises(ConfigError, match=r"two tasks are called 'esc50': .*mine_task.py and .*esc50_task.py"):
        select([twin, ESC], DOWNLOADS, ["mine", "ESC-50"])


@pytest.mark.parametrize(
    ("given", "names"), [(None, None), ("a, b,", ["a", "b"]), (["a", "b"], ["a", "b"]), ("gtzan", ["gtzan"])]
)
def test_names_come_as_a_list_or_with_commas(given, names):
    assert split_names(given) == names


def test_an_empty_list_is_refused():
    with pytest.raises(ConfigError, match="tasks is empty"):
        split_names(" , ")


def test_the_listing_says_where_data_are_and_which_file_is_broken(tmp_path):
    (tmp_path / "esc50").mkdir()
    (tmp_path / "esc50" / "fold1.tar").touch()
    broken = TaskFile("/y/tasks/bad_task.py", "bad", error="/y/tasks/bad_task.py, line 3: the task file has an error")
    lines = listing([*ALL, broken], DataFolder(tmp_path, False)).splitlines()
    assert lines[2].split() == ["esc50", "ESC-50", "clip", "MLP", "(accuracy),", "k-NN", str(tmp_path / "esc50")]
    assert lines[3].endswith("zenodo.org/records/14722472")
    assert lines[5].endswith("not public")
    assert lines[-1] == broken.error
