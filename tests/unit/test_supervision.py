"""Rules of supervision: each trouble planted, its reaction bounded, its end noticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import pytest

from agorad.exitcodes import RETRYABLE, ExitCode
from agorad.steady import SteadyClock
from agorad.supervision.clock import Clock, Standstill
from agorad.supervision.disk import SPARE, Descriptors, Disk
from agorad.supervision.memory import GIB, LOOKS, AcceleratorMemory, HostMemory
from agorad.supervision.progress import ALONE_S, HUNG_S, IDLE_END_S, IDLE_S, IDLE_STEPS, Company, Device, Work
from agorad.supervision.reactions import Reaction, Rule, Vitals
from agorad.supervision.rounds import MANY, Rounds
from agorad.supervision.weights import AGAIN_S, BAD, Weights
from p2p.averaging.outcome import EVERYBODY_LOST, PARTS_MISSED

WELL = Vitals(at=0.0, wall=1e9, ours=1e9)


def did(reactions: Iterable[Reaction]) -> list[str]:
    found = list(reactions)
    for reaction in found:
        if reaction.do in ("end", "end_now"):
            assert reaction.code in RETRYABLE
            assert ";" in reaction.why, "what to do is said too"
    return [reaction.do for reaction in found]


def look(rule: Rule, **vitals: Any) -> list[str]:
    return did(rule.look(attrs.evolve(WELL, **vitals)))


def hear(rule: Rule, event: str, at: float = 0.0, **fields: Any) -> list[str]:
    return did(rule.heard({"event": event, **fields}, at))


@pytest.mark.parametrize(
    "rule", [HostMemory(), AcceleratorMemory(), Disk(), Descriptors(), Clock(), Device(), Work()]
)
def test_who_is_well_is_left_alone(rule: Rule) -> None:
    for step in range(100):
        assert look(rule, at=5.0 * step, connections=3, added=step, step=step, disk_free=1 << 40) == []


def test_little_memory_sheds_load_until_there_is_more() -> None:
    rule = HostMemory()
    total = 100 * GIB
    shares = (50, 7, 7, 10, 7, 13, 50)
    answers = [look(rule, memory_total=total, memory_available=share * GIB) for share in shares]
    assert answers == [[], ["shed"], [], [], [], ["resume"], []]


@pytest.mark.catalogue(32)
def test_who_holds_the_memory_ends_before_the_kernel_does_it() -> None:
    for resident, ends in ((30 * GIB, True), (10 * GIB, False)):
        rule = HostMemory()
        answers = [
            look(rule, memory_total=100 * GIB, memory_available=2 * GIB, resident=resident) for _ in range(9)
        ]
        assert answers[:LOOKS] == [["shed"], *[[]] * (LOOKS - 2), ["end"] if ends else []]
        assert (["end"] in answers) == ends
    short = HostMemory()  # a moment of it is no reason
    for _ in range(9):
        assert "end" not in look(short, memory_total=100 * GIB, memory_available=2 * GIB, resident=90 * GIB)
        look(short, memory_total=100 * GIB, memory_available=5 * GIB, resident=90 * GIB)


def test_a_full_accelerator_gives_back_what_is_cached() -> None:
    rule = AcceleratorMemory()
    frees = (10, 0, 0, 2, 8)
    answers = [look(rule, vram_total=100 * GIB, vram_free=free * GIB) for free in frees]
    assert answers == [[], ["trim", "warn"], [], [], ["clear"]]


def test_a_full_disk_makes_room_once_and_warns_while_it_lasts() -> None:
    rule = Disk()
    why = "snapshot not saved in /x: No space left on device"
    assert hear(rule, "save_failed", why=why) == ["make_room", "warn"]
    assert hear(rule, "save_failed", why=why) == ["warn"]
    assert hear(rule, "saved") == ["clear"]
    assert hear(rule, "saved") == []
    assert look(rule, unwritten=3) == ["warn"]
    assert look(rule, unwritten=3) == ["clear"]
    rule = Disk()
    assert look(rule, disk_free=SPARE, snapshot_bytes=100) == ["make_room", "warn"]
    assert look(rule, disk_free=SPARE, snapshot_bytes=100) == []
    assert look(rule, disk_free=3 * SPARE, snapshot_bytes=100) == ["clear"]


def test_few_descriptors() -> None:
    rule = Descriptors()
    answers = [look(rule, descriptors=count, descriptors_most=100) for count in (50, 91, 99, 80, 60)]
    assert answers == [[], ["warn"], [], [], ["clear"]]


def test_weights_are_examined_before_anything_is_believed() -> None:
    rule = Weights()
    assert hear(rule, "bad_output", 0.0) == ["examine"]
    assert hear(rule, "bad_output", 1.0) == []  # not for each of many
    assert did(rule.examined(True, 1.0)) == []
    assert hear(rule, "save_failed", 10.0, why="snapshot not saved: the state is not finite") == ["examine"]
    assert hear(rule, "save_failed", 20.0, why="No space left on device") == []


def test_gradients_of_others_end_nobody() -> None:
    rule = Weights()
    for number in range(20 * BAD):
        expected = ["examine"] if number % BAD == BAD - 1 else []
        assert hear(rule, "bad_gradient", 10.0 * number) == expected
        if expected:
            assert did(rule.examined(True, 10.0 * number)) == ["warn"]
    assert hear(rule, "bad_gradient", 1e4) == []
    assert hear(rule, "step", 1e4, samples=3) == ["clear"]  # a good one between
    assert [hear(rule, "bad_gradient", 1e4) for _ in range(BAD - 1)] == [[]] * (BAD - 1)


@pytest.mark.catalogue(35)
def test_weights_that_are_not_finite_are_fetched_once_and_then_the_node_ends() -> None:
    rule = Weights()
    assert did(rule.examined(False, 0.0)) == ["resync"]
    assert hear(rule, "state_fetched", 9.0) == ["clear"]
    again = list(rule.examined(False, AGAIN_S - 1))
    assert [(reaction.do, reaction.code) for reaction in again] == [("end", ExitCode.NUMERICAL)]
    late = Weights()
    assert did(late.examined(False, 0.0)) == ["resync"]
    assert did(late.examined(False, AGAIN_S + 1)) == ["resync"]


def rounds(rule: Rounds, why: str, members: int, number: int) -> list[str]:
    assert hear(rule, "roster_committed", round=number, members=["m"] * members) == []
    return hear(rule, "round_abandoned", round=number, why=why)


@pytest.mark.catalogue(36)
def test_rounds_that_fail_here_alone() -> None:
    rule = Rounds()
    answers = [rounds(rule, PARTS_MISSED, 2, number) for number in range(2 * MANY)]
    assert answers == [[], [], ["reconnect"], [], [], ["end"]]
    rule = Rounds()
    answers = [rounds(rule, EVERYBODY_LOST, 3, number) for number in range(MANY)]
    assert answers == [[], [], ["reconnect"]]
    assert hear(rule, "round_finished", round=9) == ["clear"]
    assert rounds(rule, EVERYBODY_LOST, 3, 10) == []


def test_rounds_that_fail_for_reasons_of_others_are_no_trouble() -> None:
    rule = Rounds()
    for number in range(50):
        assert rounds(rule, EVERYBODY_LOST, 2, number) == []  # either of two may be the cause
        assert rounds(rule, "no verdict before the round's deadline", 5, number) == []


def test_a_device_that_hangs() -> None:
    rule = Device()
    assert look(rule, job_s=HUNG_S - 1) == []
    assert look(rule, job_s=HUNG_S + 1) == []  # 20 times the longest one is more
    assert look(rule, job_s=20 * HUNG_S) == ["end_now"]
    assert look(Device(), job_s=HUNG_S + 1) == ["end_now"]
    assert look(Device(), job_s=None) == []


def test_nobody_there() -> None:
    rule = Company()
    answers = [look(rule, at=at, connections=0) for at in (0.0, 30.0, 70.0, 80.0)]
    assert answers == [[], [], ["warn"], []]
    assert look(rule, at=90.0, connections=1) == ["clear"]
    assert look(rule, at=100.0, connections=0) == []
    look(rule, at=200.0, connections=0)
    assert look(rule, at=100.0 + ALONE_S + 1, connections=0) == ["end"]


@pytest.mark.catalogue(37)
def test_no_work_while_the_run_goes_on() -> None:
    rule = Work()
    look(rule, at=0.0, phase="active", step=0)
    assert look(rule, at=IDLE_S, phase="active", step=IDLE_STEPS - 1) == []  # the run does not move either
    assert look(rule, at=IDLE_S, phase="active", step=IDLE_STEPS) == ["reconnect"]
    assert look(rule, at=IDLE_S + 5, phase="active", step=IDLE_STEPS) == []
    assert look(rule, at=IDLE_END_S, phase="active", step=IDLE_STEPS) == ["end"]
    assert look(rule, at=IDLE_END_S, phase="active", step=99, added=1) == ["clear"]
    waiting = Work()
    for at in range(0, 20000, 600):
        assert look(waiting, at=float(at), phase="syncing", step=at) == []


def test_a_clock_that_was_set() -> None:
    rule = Clock()
    offs = (0.0, 3600.0, 3601.0, 3600.0, 0.0, 0.0, -3600.0)
    answers = [look(rule, wall=1e9 + off) for off in offs]
    assert answers == [[], ["warn"], [], [], ["clear"], [], ["warn"]]


def test_a_process_that_stood_still() -> None:
    rule = Standstill(5.0)
    answers = [look(rule, at=at) for at in (0.0, 5.0, 70.0, 75.0)]
    assert answers == [[], ["clear"], ["warn"], ["clear"]]


class Time:
    """A system clock and what truly passed."""

    def __init__(self) -> None:
        self.wall, self.passed = 1000.0, 50.0

    def go(self, seconds: float, jump: float = 0.0) -> None:
        self.passed += seconds
        self.wall += seconds + jump


def test_the_own_clock_goes_on_whatever_the_systems_does() -> None:
    time = Time()
    clock = SteadyClock(lambda: time.wall, lambda: time.passed)
    assert clock() == 1000.0
    time.go(10.0, jump=3600.0)
    assert (clock(), clock.off) == (1010.0, 3600.0)
    assert clock.look() is False
    time.go(10.0, jump=-3600.0)
    assert (clock(), clock.off) == (1020.0, 0.0)
    time.go(10.0, jump=2.0)  # as a time server corrects it
    clock.look()
    assert (clock(), clock.off) == (1032.0, 0.0)


def test_a_new_time_that_others_confirm_is_taken_over() -> None:
    """A machine that was paused from outside comes back with an old clock, which is then set right."""
    time = Time()
    clock = SteadyClock(lambda: time.wall, lambda: time.passed)
    time.go(1.0, jump=3600.0)
    clock.heard("a", 3590.0)
    clock.heard("a", 3595.0)
    assert clock.look() is False  # one voice
    clock.heard("liar", -3600.0)
    assert clock.look() is False
    clock.heard("b", 3610.0)
    assert clock.look() is True
    assert clock() == time.wall
