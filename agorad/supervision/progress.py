"""No progress: a device that never answers, nobody to talk to, no work while the run goes on.

*Device*: a job that lasts ``HUNG_S``, or ``TIMES`` the longest one before, hangs: the node ends (14), and
as the thread cannot be stopped, by force if need be. *Nobody*: without any connection for ``ALONE_S`` it
ends (13); it keeps trying by itself until then. *No work*: an active worker to whom nobody has sent a
microbatch for ``IDLE_S``, in which the run made ``IDLE_STEPS`` steps, makes its connections anew, once;
after ``IDLE_END_S`` it ends (13). A run that stands still is nobody's trouble here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agorad.exitcodes import ExitCode
from agorad.supervision.reactions import Quiet, Reaction, Vitals

HUNG_S: Final = 300.0
TIMES: Final = 20.0
ALONE_S: Final = 600.0
IDLE_S: Final = 600.0
IDLE_STEPS: Final = 20
IDLE_END_S: Final = 3600.0


class Device(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._longest = 0.0

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if now.job_s is None:
            return
        most = max(HUNG_S, TIMES * self._longest)
        if now.job_s > most:
            yield Reaction(
                "device",
                "end_now",
                f"the device has been at one job for {now.job_s:.0f} s; see nvidia-smi and the system's log",
                ExitCode.ACCELERATOR,
            )
        elif now.job_s < HUNG_S:
            self._longest = max(self._longest, now.job_s)


class Company(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._warned = False

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if now.connections:
            self._since = None
            if self._warned:
                self._warned = False
                yield Reaction("alone", "clear")
            return
        self._since = now.at if self._since is None else self._since
        alone_s = now.at - self._since
        if alone_s > ALONE_S:
            yield Reaction(
                "alone",
                "end",
                f"no node of the run was reached for {alone_s:.0f} s; look at the line, then start again",
                ExitCode.NETWORK,
            )
        elif alone_s > ALONE_S / 10 and not self._warned:
            self._warned = True
            yield Reaction("alone", "warn", f"no node of the run could be reached for {alone_s:.0f} s")


class Work(Quiet):
    """See the file's opening."""

    def __init__(self) -> None:
        self._added = -1
        self._since = 0.0
        self._step = 0
        self._reconnected = False

    def look(self, now: Vitals) -> Iterable[Reaction]:
        if now.added != self._added or now.phase != "active":
            if self._reconnected:
                yield Reaction("work", "clear")
            self._added, self._since, self._step, self._reconnected = now.added, now.at, now.step, False
            return
        idle_s, steps = now.at - self._since, now.step - self._step
        if idle_s < IDLE_S or steps < IDLE_STEPS:
            return
        why = f"nobody sent this node work for {idle_s / 60:.0f} min, in which the run made {steps} steps"
        if idle_s >= IDLE_END_S:
            yield Reaction(
                "work",
                "end",
                f"{why}; can its port be reached from outside? then start it again",
                ExitCode.NETWORK,
            )
        elif not self._reconnected:
            self._reconnected = True
            yield Reaction("work", "reconnect", f"{why}; connections are made anew")
