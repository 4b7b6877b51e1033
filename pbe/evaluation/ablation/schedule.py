"""How long stages take, and in which order side-by-side processes take them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pbe.evaluation.ablation.stages import Stage


class Schedule:
    """Estimates of stages, corrected by what the finished ones took.

    Args:
        stages: all of them.
        rates: seconds that a unit takes on one core, by key.
    """

    def __init__(self, stages: Sequence[Stage], rates: Mapping[str, float]) -> None:
        self.stages, self.rates = stages, dict(rates)
        self.learn()

    def learn(self) -> None:
        """Take the rates of finished stages that were not interrupted in place of the assumed ones."""
        seconds: dict[str, float] = {}
        units: dict[str, float] = {}
        for mark in (stage.mark() for stage in self.stages):
            if mark is not None and not mark["resumed"] and mark["units"] > 0:
                seconds[mark["rate"]] = seconds.get(mark["rate"], 0.0) + mark["seconds"]
                units[mark["rate"]] = units.get(mark["rate"], 0.0) + mark["units"]
        self.rates |= {key: seconds[key] / units[key] for key in seconds}

    def seconds(self, stage: Stage) -> float:
        """Return the estimate of a whole stage."""
        return stage.units * self.rates[stage.rate]

    def urgency(self) -> dict[str, float]:
        """Return the seconds from the start of each stage to the end of all that waits for it."""
        after: dict[str, float] = {}
        for stage in reversed(self.stages):  # those that wait stand behind those that they wait for
            waiting = [after[other.fingerprint] for other in self.stages if stage.fingerprint in other.needs]
            after[stage.fingerprint] = self.seconds(stage) + max(waiting, default=0.0)
        return after

    def pick(self, waiting: Sequence[Stage], done: set[str]) -> Stage | None:
        """Return the most urgent stage whose needs are met, None if there is none."""
        urgency = self.urgency()
        ready = [stage for stage in waiting if done.issuperset(stage.needs)]
        return max(ready, key=lambda stage: urgency[stage.fingerprint], default=None)

    def remaining(self, running: Mapping[str, float], jobs: int) -> float:
        """Return the seconds until everything is done, by playing the schedule through.

        Args:
            running: seconds since the start of the running stages, by fingerprint.
            jobs: stages side by side.
        """
        done = {stage.fingerprint for stage in self.stages if stage.mark() is not None}
        waiting = [s for s in self.stages if s.fingerprint not in done and s.fingerprint not in running]
        ends = {
            stage.fingerprint: max(self.seconds(stage) - running[stage.fingerprint], 0.0)
            for stage in self.stages
            if stage.fingerprint in running and stage.fingerprint not in done
        }
        now = 0.0
        while waiting or ends:
            while len(ends) < jobs and (stage := self.pick(waiting, done)) is not None:
                waiting.remove(stage)
                ends[stage.fingerprint] = now + self.seconds(stage)
            first = min(ends, key=lambda mark: ends[mark])
            now = max(now, ends.pop(first))
            done.add(first)
        return now


def span(seconds: float) -> str:
    """Return a time as people say it, such as ``1 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plan_text(stages: Sequence[Stage], schedule: Schedule, jobs: int) -> str:
    """Return the plan: every stage with its estimate, and how long all of it takes."""
    lines = []
    for number, stage in enumerate(stages, 1):
        state = "done" if stage.mark() is not None else span(schedule.seconds(stage))
        lines.append(f"{number:>3}  {stage.name:<62} {state:>10}")
    left = [stage for stage in stages if stage.mark() is None]
    total = sum(schedule.seconds(stage) for stage in left)
    lines.append(
        f"{len(left)} of {len(stages)} stages to do: {span(total)} of one core, "
        f"about {span(schedule.remaining({}, jobs))} with {jobs} side by side"
    )
    return "\n".join(lines)
