"""What follows each way in which a life can end."""

from __future__ import annotations

import pytest

from slurm.outcome import JobFacts, Life, decide, first_failure, parse_facts, stalled

PREEMPTED = JobFacts(state="RUNNING", preempted=True)
UNDISTURBED = JobFacts(state="RUNNING")


def life(outcome: str, step: int | None = 10, *, of: str = "now", message: str = "") -> Life:
    return Life(token=of, job="7", outcome=outcome, step=step, message=message)


def received(*names: str) -> frozenset[str]:
    return frozenset(names)


@pytest.mark.parametrize(
    "signals", [received(), received("TERM"), received("USR1"), received("USR1", "TERM")]
)
def test_a_finished_life_ends_the_job_whatever_was_received(signals: frozenset[str]) -> None:
    assert decide([life("done")], "now", received=signals).decision == "done"


@pytest.mark.parametrize("signal", ["USR1", "USR2"])
def test_a_life_interrupted_by_the_signal_before_the_time_limit_is_requeued(signal: str) -> None:
    verdict = decide([life("interrupted", 12)], "now", received=received(signal))
    assert verdict.decision == "requeue"
    assert verdict.reason == f"stopped by {signal} at step 12; the state is saved"


@pytest.mark.parametrize("signals", [received("TERM"), received("USR1", "TERM")])
@pytest.mark.parametrize("facts", [UNDISTURBED, PREEMPTED])
def test_a_life_that_received_term_is_left_to_slurm_so_that_scancel_is_final(
    signals: frozenset[str], facts: JobFacts
) -> None:
    assert decide([life("interrupted")], "now", received=signals, facts=facts).decision == "failed"


def test_a_preempted_life_whose_shell_received_nothing_is_requeued() -> None:
    verdict = decide([life("interrupted", 3)], "now", facts=PREEMPTED)
    assert verdict.decision == "requeue"
    assert verdict.reason == "preempted at step 3; the state is saved"


def test_a_cancelled_life_is_not_requeued_even_before_its_shell_receives_a_signal() -> None:
    facts = JobFacts(state="CANCELLED", preempted=True)
    assert decide([life("interrupted")], "now", facts=facts).decision == "failed"


def test_ranks_that_a_launcher_stopped_because_one_crashed_are_not_requeued() -> None:
    error = "rank 1 was killed by signal 9; out of memory?"
    verdict = decide([life("interrupted")], "now", facts=UNDISTURBED, error=error)
    assert (verdict.decision, verdict.reason) == ("failed", error)


def test_a_failed_life_is_explained_by_its_own_message() -> None:
    verdict = decide([life("failed", message="disk full")], "now", received=received("USR1"))
    assert (verdict.decision, verdict.reason) == ("failed", "disk full")


def test_a_life_that_never_finished_its_record_was_killed() -> None:
    verdict = decide([life("running", None)], "now")
    assert (verdict.decision, verdict.reason) == ("failed", "killed; out of memory?")


def test_a_life_without_a_record_is_explained_by_the_first_error_of_its_log() -> None:
    verdict = decide([], "now", error="error: no module named torch")
    assert (verdict.decision, verdict.reason) == ("failed", "error: no module named torch")


def test_a_record_of_another_life_is_not_mistaken_for_this_one() -> None:
    records = [life("done", of="other"), life("done", of="none of ours")]
    assert decide(records, "now").decision == "failed"


def test_two_lives_in_a_row_without_progress_end_in_failure() -> None:
    first, second = life("interrupted", 0, of="first"), life("interrupted", 0)
    assert decide([first], "first", received=received("USR1")).decision == "requeue"
    verdict = decide([first, second], "now", received=received("USR1"))
    assert verdict.decision == "failed"
    assert "2 lives in a row made no progress (step 0)" in verdict.reason


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([5], 0),
        ([5, 5], 1),
        ([5, 5, 5], 2),
        ([5, 5, 6], 0),
        ([None, None], 2),
        ([5, None, 5], 2),
        ([5, 3, 9, 9], 1),
    ],
)
def test_lives_without_progress_are_counted_from_the_last_step_that_grew(
    steps: list[int | None], expected: int
) -> None:
    assert stalled([life("interrupted", step) for step in steps]) == expected


def test_lives_of_an_earlier_job_or_cut_short_by_a_power_failure_do_not_count() -> None:
    other = Life(token="a", job="6", outcome="interrupted", step=5)
    dead = Life(token="b", job="7", outcome="running", step=None)
    assert stalled([other, other, dead, life("interrupted", 5)]) == 1


def test_scontrol_tells_preemption_state_and_log() -> None:
    text = "JobId=9 JobState=RUNNING PreemptTime=2026-01-01T00:00:00 StdOut=/logs/a.out Power=\n"
    assert parse_facts(text) == JobFacts("RUNNING", preempted=True, log="/logs/a.out")


@pytest.mark.parametrize(
    "text", ["", "PreemptTime=None", "slurm_load_jobs error: Unable to contact"]
)
def test_an_answer_without_a_preemption_is_no_preemption(text: str) -> None:
    assert not parse_facts(text).preempted


LOG = """\
== 7_1 life A begins, restart 0
error: of an earlier life
== 7_1 life B begins, restart 1
srun: error: tb1: task 0: Exited with exit code 1
slurmstepd-tb1: error: *** STEP 7.0 ON tb1 CANCELLED AT 2026-01-01T10:00:00 ***
[rank 1] error: data.root: no space left
error: a consequence
"""


def test_the_first_error_line_of_this_life_is_reported_not_those_of_slurm_or_earlier_lives() -> (
    None
):
    assert first_failure(LOG, "B") == "error: data.root: no space left"


@pytest.mark.parametrize(
    "text",
    [
        "srun: error: tb1: task 1: Killed\n",
        "error: rank 0: lost another rank\nRoot Cause (first observed failure):\n  time : 3\n"
        "  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 812)\n",
    ],
)
def test_a_rank_that_the_kernel_killed_is_named(text: str) -> None:
    log = f"== life A begins, restart 0\n{text}"
    assert first_failure(log, "A") == "rank 1 was killed by signal 9; out of memory?"


def test_a_log_without_errors_explains_nothing() -> None:
    assert first_failure("== life A begins, restart 0\nfine\n", "A") is None


def test_a_rank_that_srun_killed_because_another_one_failed_is_not_blamed() -> None:
    log = "life A begins\nerror: disk full\nsrun: error: tb1: task 1: Killed\n"
    assert first_failure(log, "A") == "error: disk full"


def test_a_failure_that_another_rank_has_caused_is_explained_by_its_cause() -> None:
    lost = life("failed", message="rank 0: lost another rank (Connection reset by peer)")
    error = "rank 1 was killed by signal 9; out of memory?"
    assert decide([lost], "now", error=error).reason == error
    assert decide([lost], "now").reason == lost.message
