"""timing.csv: seconds that go on where an interrupted run left off."""

from __future__ import annotations

import csv

import numpy as np
from small_run import small_pretrain, write_recordings


def rows(run):
    with (run / "timing.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]


def test_seconds_rise_over_a_run_and_go_on_after_a_resume(tmp_path):
    data = write_recordings(tmp_path / "recordings")
    run = small_pretrain(data, tmp_path / "run", trainer={"max_steps": 4, "log_every_n_steps": 2})
    first = rows(run)
    assert [step for step, _ in first] == [2, 4]
    small_pretrain(data, run, trainer={"max_steps": 8, "log_every_n_steps": 2}, resume=True)
    both = rows(run)
    assert both[:2] == first
    assert [step for step, _ in both] == [2, 4, 6, 8]
    assert (np.diff([seconds for _, seconds in both]) > 0).all()


def test_a_damaged_file_costs_no_run_and_part_of_the_time_is_not_given_for_all(tmp_path):
    data = write_recordings(tmp_path / "recordings")
    run = small_pretrain(data, tmp_path / "run", trainer={"max_steps": 2, "log_every_n_steps": 1})
    damaged = "step,seconds\nfew,many\n"
    (run / "timing.csv").write_text(damaged)
    small_pretrain(data, run, trainer={"max_steps": 3, "log_every_n_steps": 1}, resume=True)
    assert (run / "timing.csv").read_text() == damaged
