"""Branches of a run: where a decay may begin, and whether two schedules have the same past.

A checkpoint of WSD's stable stage can be decayed at any time, as often as one likes, while the stable run
goes on. A checkpoint of the warm-up or of a decay cannot: its rate is not the peak's.
"""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

from .sharded_checkpoint import read_facts
from .wsd import WSD, Cosine, DecayForm, Schedule

__all__ = ["decay_schedule", "require_same_past", "saved_schedule", "schedule_facts", "stable_schedule"]


def decay_schedule(
    checkpoint: str | Path,
    decay_steps: int,
    form: DecayForm | None = None,
    final_ratio: float | None = None,
    half_life: float | None = None,
) -> WSD:
    """The schedule of a checkpoint's run, with a decay that begins at the checkpoint.

    Args:
        checkpoint: taken in the stable stage of a WSD run.
        decay_steps: steps of the decay.
        form: as `WSD` has it, like the two below. What is left out is as that run's schedule has it; but its
            half-life, which decides the others, stays only where all three are left out.
        final_ratio: lr at the end of the decay, as a part of the peak.
        half_life: of an exponential decay, in steps.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was taken in the warm-up or the decay, or under another kind of schedule; or there is
            no such decay.
    """
    step, old = stable_schedule(checkpoint)
    given = {"form": form, "final_ratio": final_ratio, "half_life": half_life}
    given = {name: value for name, value in given.items() if value is not None}
    if given and old.half_life:  # from which the old final_ratio follows
        given = {"half_life": None, "final_ratio": WSD.final_ratio} | given
    return replace(old, stable_steps=step - old.warmup_steps, decay_steps=decay_steps, **given)


def stable_schedule(checkpoint: str | Path) -> tuple[int, WSD]:
    """Step and schedule of a checkpoint from which a decay may begin.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it was taken in the warm-up or the decay, or under another kind of schedule.
    """
    facts = read_facts(checkpoint)
    if facts["schedule"]["kind"] != WSD.__name__:
        raise ValueError(
            f"{checkpoint} was trained with the schedule {facts['schedule']['kind']}, which has no stable "
            "stage. A decay begins from a run of WSD."
        )
    step, schedule = facts["step"], saved_schedule(facts)
    if step < schedule.warmup_steps:
        raise ValueError(
            f"{checkpoint} was taken in the warm-up, at step {step} of {schedule.warmup_steps}. A decay "
            "begins in the stable stage."
        )
    if schedule.decay_steps and step > schedule.decay_start:
        raise ValueError(
            f"{checkpoint} was taken at step {step}, in or after the decay that began at step "
            f"{schedule.decay_start}. Its rate has already fallen, and going back to the peak would undo the "
            f"decay. Take a checkpoint of the stable stage, such as step-{schedule.decay_start:08d}."
        )
    return step, schedule


def schedule_facts(schedule: Schedule) -> dict:
    """What a checkpoint says about a schedule: its kind and its numbers.

    Raises:
        ValueError: it is no dataclass, so its numbers are not known, or JSON would change them.
    """
    facts = {"kind": type(schedule).__name__}
    try:
        facts |= {field.name: getattr(schedule, field.name) for field in fields(schedule) if field.init}
        saved_schedule({"schedule": facts}, type(schedule))
        comes_back = json.loads(json.dumps(facts)) == facts
    except (TypeError, ValueError):
        comes_back = False
    if not comes_back:
        raise ValueError(
            f"The schedule is a {type(schedule).__name__}, which a checkpoint could not bring back. Use WSD "
            "or Cosine, or make it a frozen dataclass, with plain numbers of Python (int, float) in it."
        )
    return facts


def require_same_past(checkpoint: str | Path, facts: dict, schedule: Schedule) -> None:
    """Refuse a checkpoint up to which another schedule gave other rates; the future may differ.

    Raises:
        ValueError: a sentence that names the first step that differs.
    """
    old = saved_schedule(facts, type(schedule))
    for step in range(1, facts["step"] + 1):
        if not math.isclose(old(step), schedule(step), rel_tol=1e-9):
            raise ValueError(
                f"{checkpoint} belongs to another schedule: its rate at step {step} is {old(step):.6g}, "
                f"this run's is {schedule(step):.6g}. Go on from a checkpoint before that step, in another "
                "folder, or under the schedule of the checkpoint."
            )


def saved_schedule(facts: dict, *others: type[Schedule]) -> Schedule:
    """The schedule of a checkpoint, from what `read_facts` gives.

    Args:
        facts: the checkpoint's.
        others: kinds that it may be of besides WSD and Cosine.

    Raises:
        ValueError: it is of none of these kinds.
    """
    values = dict(facts["schedule"])
    name, kinds = values.pop("kind"), {kind.__name__: kind for kind in (WSD, Cosine, *others)}
    if name not in kinds:
        raise ValueError(
            f"The checkpoint of step {facts['step']} was trained with the schedule {name}; only "
            f"{', '.join(kinds)} are known here."
        )
    if kinds[name] is WSD and values["half_life"]:
        del values["final_ratio"]  # follows from it
    return kinds[name](**values)
