"""Teachers: the choice of one for each sample, and their answers. Shapes: M transitions, C H W latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import Models, teacher_role
from flowalign.config.teachers import TeacherConfig
from flowalign.flow.guidance import guidance_of
from flowalign.types import Condition, task_of


class NoTeacher(ValueError):
    """A sample whose task is nobody's."""


def routes(teachers: Mapping[str, TeacherConfig]) -> dict[str | None, str]:
    """Find the teacher of each task; that of None has all other tasks. Raises ValueError where two claim one."""
    found: dict[str | None, str] = {}
    for name, teacher in teachers.items():
        for task in [None] if teacher.tasks is None else teacher.tasks:
            if task in found:
                what = "all other tasks" if task is None else f"the task {task!r}"
                raise ValueError(f"teachers: {found[task]} and {name} both have {what}; each task needs one teacher")
            found[task] = name
    return found


def teacher_of(teachers: Mapping[str, TeacherConfig], metadata: Mapping[str, Any]) -> str:
    """Name the teacher of a sample: a function of its task, see `task_of`.

    Raises:
        NoTeacher: the task is nobody's.
    """
    task, found = task_of(metadata), routes(teachers)
    name = found.get(task, found.get(None))
    if name is None:
        raise NoTeacher(
            f"algorithm.teachers: no teacher has the task {task!r}; add it to one's, or leave the tasks of one out"
        )
    return name


def taught_velocity(
    models: Models, teachers: Mapping[str, TeacherConfig], item: Mapping[str, Tensor], condition: Condition
) -> Tensor:
    """Ask each transition's own teacher, number ``teacher`` (M,), for its velocity (M, C, H, W) at the state ``x``."""
    target = torch.empty_like(item["x"])
    for i, (name, teacher) in enumerate(teachers.items()):
        own = (item["teacher"] == i).nonzero().flatten()
        if own.numel():
            target[own] = models[teacher_role(name)](
                item["x"][own],
                item["sigma"][own],
                condition.take(own),
                guidance=guidance_of(teacher),
            )
    return target
