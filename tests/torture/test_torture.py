"""A part of `make torture`: runs that are killed, full disks, changed files, two at once, signals.

The forks need a process that never had a second thread, so `run.py` is started, once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here"),
]
RUN = Path(__file__).parent / "run.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each case."""
    report = tmp_path_factory.mktemp("torture") / "outcomes.json"
    command = [sys.executable, str(RUN), "--few", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    outcomes = json.loads(report.read_text())
    assert done.returncode == any(outcome["problems"] for outcome in outcomes), done.stdout
    return outcomes


def problems_of(outcomes, *kinds):
    """Of all cases of these kinds, by name."""
    own = [outcome for outcome in outcomes if outcome["case"].split("/")[0] in kinds]
    assert {outcome["case"].split("/")[0] for outcome in own} == set(kinds)
    return {outcome["case"]: outcome["problems"] for outcome in own if outcome["problems"]}


def test_a_killed_run_goes_on_and_ends_byte_identical(outcomes):
    assert problems_of(outcomes, "kill", "time") == {}
    killed = [outcome for outcome in outcomes if outcome["case"].startswith(("kill/", "time/"))]
    assert sum(outcome["kills"] for outcome in killed) >= len(killed)


def test_a_run_of_which_a_rank_was_killed_goes_on_and_ends_byte_identical(outcomes):
    assert problems_of(outcomes, "ranks") == {}


def test_no_more_than_one_block_is_computed_again(outcomes):
    assert max(outcome["repeated"] for outcome in outcomes) == 1  # 0: nobody was killed within a block


def test_what_was_not_forced_to_the_disk_may_be_lost(outcomes):
    assert problems_of(outcomes, "power") == {}


def test_a_journal_that_forces_nothing_to_the_disk_would_be_noticed(outcomes):
    assert problems_of(outcomes, "notices") == {}


def test_a_full_disk_is_one_clear_line_and_the_same_command_goes_on(outcomes):
    assert problems_of(outcomes, "full") == {}


def test_a_bit_flipped_in_any_kept_file_is_found(outcomes):
    assert problems_of(outcomes, "changed") == {}


def test_a_bit_flipped_in_any_file_of_the_result_is_found(outcomes):
    assert problems_of(outcomes, "finished") == {}


def test_another_run_is_refused_and_takes_nothing_away(outcomes):
    assert problems_of(outcomes, "other") == {}


def test_of_two_runs_at_once_one_works(outcomes):
    assert problems_of(outcomes, "lock", "overtaken", "at-once") == {}


def test_a_signal_is_one_line_and_the_same_command_goes_on(outcomes):
    assert problems_of(outcomes, "SIGINT", "SIGTERM") == {}
