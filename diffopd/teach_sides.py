"""From a teach.toml to calls: the taught model, the old policy and the base over one trunk, and what scores them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from diffopd.adapters import SELF_TEACHER, STUDENT, AdapterSwitch, Average
from diffopd.assemble import Student, assemble, self_teacher, with_denoiser
from diffopd.data import read_prompts
from diffopd.drive import Call, denoiser_of, shell, survey
from diffopd.learning import Sides
from diffopd.processes import default_device, join_processes
from diffopd.recipe import TeacherSettings
from diffopd.reward import picture_function, reward_of
from diffopd.reward_watch import RewardWatch, watched_tasks
from diffopd.teach_recipe import TeachRecipe

Follow = tuple[Average, dict[str, nn.Parameter]]


def assemble_sides(recipe: TeachRecipe) -> dict[str, Any]:
    """The parts of a `TeachRun` by name, rewards first: what they lack is said before a weight of the base is read.

    Raises UserError for anything that is missing or does not fit.
    """
    processes, device = join_processes(), default_device()  # first: rewards must find this process's own GPU
    reward = None if recipe.is_supervised else reward_of(recipe)
    tasks = watched_tasks(recipe, reward)
    pictures = picture_function(recipe)
    student, _ = assemble(recipe, device)
    old, base, follow = _other_sides(recipe, student)
    rows = read_prompts(recipe.card.prompts.train)
    asked = base if recipe.estimator.reference_weight else None
    return {
        "student": student,
        "sides": Sides(student.call, old, asked),
        "follow": follow,
        "walk": survey(student.call.prompted([rows[0].prompt])),
        "rows": rows,
        "reward": reward,
        "watch": RewardWatch(tasks, *(_deployed(recipe, call) for call in (student.call, base)), recipe),
        "processes": processes,
        "device": device,
        "pictures": pictures,
    }


def _deployed(recipe: TeachRecipe, call: Call) -> Call:
    """The call at the card's steps and guidance, whatever it is sampled with while it is taught."""
    card = recipe.card
    return call.told(num_inference_steps=card.num_inference_steps, guidance_scale=card.guidance_scale)


def _other_sides(recipe: TeachRecipe, student: Student) -> tuple[Call | None, Call, Follow | None]:
    """(the old policy's call for nft, the base's call, what makes the old policy follow)."""
    trunk, arguments, old, follow = denoiser_of(student.pipeline), student.call.arguments, None, None
    needs_old = recipe.estimator.name == "nft"
    frozen = None if student.is_lora else copy.deepcopy(trunk).requires_grad_(False)
    if needs_old:
        settings = TeacherSettings(name=recipe.card.name)
        pipeline, follow = self_teacher(recipe, settings, student.pipeline, student.pipeline, student.parameters)
        old = Call(pipeline, arguments)
    if not student.is_lora:
        return old, Call(with_denoiser(student.pipeline, frozen), arguments), follow
    switch = AdapterSwitch(trunk)  # after every adapter exists: it lists the layers once
    switch.select(STUDENT)
    for parameter in student.parameters.values():  # peft freezes every adapter but the last one added
        parameter.requires_grad_(True)
    if old:
        old = Call(old.pipeline, arguments, partial(switch.bound, SELF_TEACHER))
    return old, Call(shell(student.pipeline), arguments, partial(switch.bound, None)), follow
