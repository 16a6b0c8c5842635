"""Whether what the recipe asks for can be called here: arguments, sizes, backends, packages, rewards."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

from diffopd.blueprint import Blueprint
from diffopd.errors import UserError, suggestion
from diffopd.grid import make_scheduler, side_arguments
from diffopd.quantize import check_quantization, quantization_config
from diffopd.recipe import Recipe
from diffopd.reward import check_card_reward, check_card_rows
from diffopd.teacher import TeacherCard


def check_resolutions(recipe: Recipe) -> None:
    """All sides draw at one size: a call without height and width has the pipeline's default, whatever others say."""
    for index, teacher in enumerate(recipe.teachers):
        for key in ("height", "width", "num_frames"):
            mine, others = teacher.call.get(key), recipe.student.call.get(key)
            if mine != others:
                place, name = recipe.place("teachers", index, "call", key), Path(teacher.name).name
                raise UserError(
                    f"{place}: teacher {name!r} is called with {key} = {mine or 'the default'}, the student with "
                    f"{others or 'the default'}. All sides draw at one size: give both the same {key} in their call."
                )


def check_packages(recipe: Recipe) -> None:
    """Optional packages that the recipe asks for are installed."""
    check_quantization(recipe)
    train = recipe.train
    wanted = [("report_to", name) for name in train.report_to]
    wanted += [("attention_backend", "xformers")] if train.attention_backend == "xformers" else []
    for key, name in wanted:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of this name has no origin
            raise UserError(
                f"{recipe.place('train', key)}: train.{key} asks for {name}, which is not installed. Install "
                f"diffopd[{name}], or leave {name} out."
            )


def check_reward_runs(card: TeacherCard, *, must_run: bool) -> None:
    """A task's reward is there, and takes its rows; what it needs must be installed only where it will run."""
    missing = check_card_reward(card)
    if missing and must_run:
        raise UserError(
            f"{card.path}: the evaluation needs the reward of {card.name!r}, and that needs {', '.join(missing)}. "
            "Install the extra that docs/teach.md names beside the reward, or give the card another."
        )
    check_card_rows(card, download=must_run)


def check_backends(recipe: Recipe, base: Blueprint) -> None:
    """What quantization and attention backend will refuse without having seen a weight, they refuse now."""
    from diffopd.attention import check_attention_backend

    quantization_config(recipe, base.denoiser)
    try:
        check_attention_backend(base.meta_denoiser, recipe.train.attention_backend)
    except UserError as error:
        raise UserError(f"{recipe.place('train', 'attention_backend')}: {error}") from error


def check_call_arguments(recipe: Recipe, base: Blueprint) -> None:
    """The keyword arguments of every side must be parameters of the pipeline's call."""
    import diffusers

    kind = getattr(diffusers, base.pipeline_class, None)
    if kind is None:
        raise UserError(
            f"{base.folder}: pipeline class {base.pipeline_class!r} is not one of the installed diffusers "
            f"({diffusers.__version__}). Install a newer diffusers or take another base."
        )
    known = [name for name in inspect.signature(kind.__call__).parameters if name != "self"]
    sides = [(("student",), recipe.student.call)]
    sides += [(("teachers", index), teacher.call) for index, teacher in enumerate(recipe.teachers)]
    for location, call in sides:
        for key in call:
            if key not in known:
                raise UserError(
                    f"{recipe.place(*location, 'call', key)}: {base.pipeline_class} takes no argument "
                    f"{key!r}."
                    f"{suggestion(key, known)}"
                )
        eta = call.get("eta", 0.0)
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
            raise UserError(
                f"{recipe.place(*location, 'call', 'eta')}: eta = {eta!r} is not allowed. It is DDIM's share of fresh "
                "noise: give a number from 0 (none) to 1 (that of DDPM)."
            )


def check_guidance(recipe: Recipe, base: Blueprint, cards: tuple[TeacherCard, ...]) -> None:
    """Guidance above 1, or a negative prompt, does something, as far as the pipeline can be rehearsed."""
    student, steps = recipe.student, recipe.student.num_inference_steps
    if not any(card.form == "pictures" for card in cards):  # these ask the student at a guidance_scale of their own
        told = side_arguments(student, steps)
        _refuse_unused(base, make_scheduler(recipe, base), told, "student", _places(recipe, "student"))
    for index, (teacher, card) in enumerate(zip(recipe.teachers, cards, strict=True)):
        if card.form == "pictures":
            continue
        places = _places(recipe, "teachers", index)
        scale = teacher.guidance_scale
        if scale is None:
            scale, places["guidance_scale"] = card.guidance_scale, card.place("guidance_scale")
        told = side_arguments(teacher, steps * recipe.objective.substeps, scale)
        _refuse_unused(base, make_scheduler(recipe, base), told, f"teachers.{card.name}", places)


def _places(recipe: Recipe, *side: str | int) -> dict[str, str]:
    prompt = ("negative_prompt",) if side == ("student",) else ("call", "negative_prompt")
    return {
        "guidance_scale": recipe.place(*side, "guidance_scale"),
        "negative_prompt": recipe.place(*side, *prompt),
        "true_cfg_scale": recipe.place(*side, "call", "true_cfg_scale"),
    }


def _refuse_unused(base: Blueprint, scheduler: Any, told: dict[str, Any], side: str, places: dict[str, str]) -> None:
    """Raise where a side of one answer is told to be guided by two, and its network is not told the guidance."""
    import diffusers

    from diffopd.rehearsal import guidance

    scale, negative, true_scale = told["guidance_scale"], told.get("negative_prompt"), told.get("true_cfg_scale", 1.0)
    if max(scale, true_scale) <= 1 and not negative:
        return
    is_guided, is_effective = guidance(base, scheduler, told)
    if is_guided:
        return
    known = inspect.signature(getattr(diffusers, base.pipeline_class).__call__).parameters
    prompt = f"{side}.{'' if side == 'student' else 'call.'}negative_prompt"
    way = f"{side}.call.true_cfg_scale above 1 and {prompt}, if only a space" if "true_cfg_scale" in known else ""
    if negative:
        remedy = f"It needs {way}" if way else f"Set {side}.guidance_scale so that it asks for two (above 1 in most)"
        raise UserError(
            f"{places['negative_prompt']}: {prompt} has no effect: {base.pipeline_class}, called like this with "
            f"guidance_scale = {scale:g}, asks its network for one answer. {remedy}, or remove it."
        )
    if true_scale > 1:
        raise UserError(
            f"{places['true_cfg_scale']}: true_cfg_scale = {true_scale:g} has no effect on {side}: "
            f"{base.pipeline_class}, called like this, asks its network for one answer. It needs {prompt}, if only a "
            "space, or remove it."
        )
    if not is_effective and scale > 1:
        remedy = f"Its guidance needs {way}: set these, or" if way else "It cannot be guided:"
        raise UserError(
            f"{places['guidance_scale']}: guidance_scale = {scale:g} has no effect on {side}: {base.pipeline_class}, "
            f"called like this, asks its network for one answer and does not tell it the scale. {remedy} set "
            "guidance_scale to 1."
        )
