"""From a recipe to calls: one trunk, the student's adapter or copy on it, and every teacher's own view of it."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from diffopd.adapters import (
    SELF_TEACHER,
    STUDENT,
    AdapterSwitch,
    Average,
    adapter_parameters,
    add_adapter,
    freeze,
)
from diffopd.data import PromptRow, read_prompts
from diffopd.drive import Call, denoiser_name, denoiser_of, shell
from diffopd.errors import UserError
from diffopd.load import load_full_denoiser, load_fused_denoiser, load_lora, load_pipeline
from diffopd.recipe import Recipe, TeacherSettings
from diffopd.teacher import TeacherCard, lora_file, teacher_card


@dataclass
class Student:
    """The trained side: its call (without prompts), its trainable parameters and its pipeline."""

    call: Call
    pipeline: Any
    parameters: dict[str, nn.Parameter]
    is_lora: bool


@dataclass
class Teacher:
    """A frozen side: its call (without prompts), the prompts of its task, and its share of the updates.

    follow: for a teacher that is an average of the student, the average to move after each optimizer step and the
    parameters it is written to; None for all others.
    """

    name: str
    card: TeacherCard
    call: Call
    train_rows: list[PromptRow]
    test_rows: list[PromptRow]
    weight: float
    follow: tuple[Average, dict[str, nn.Parameter]] | None = None


def assemble(recipe: Recipe, device: str) -> tuple[Student, list[Teacher]]:
    """Load the base once, put the student and all teachers on it.

    Raises UserError for weights that are missing, do not fit the base, or leave keys unused.
    """
    base = load_pipeline(recipe.student.pretrained_model_name_or_path)
    base = with_scheduler(base, recipe).to(device)
    freeze(base)
    is_lora = recipe.student.train == "lora"
    trunk = denoiser_of(base)
    student_pipeline = shell(base)
    if not is_lora:  # the student's trunk will move; adapters of teachers need one that stays
        student_pipeline = with_denoiser(base, copy.deepcopy(trunk))
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    own = own_denoisers(base, cards, fuse=recipe.train.fuse_teachers)
    for card in cards:
        if card.form == "lora" and card.name not in own:
            load_lora(base, card, adapter_name=card.name)
    parameters = _trainable(recipe, student_pipeline)
    if recipe.train.attention_backend == "xformers":
        use_xformers(denoiser_of(student_pipeline))
    if recipe.train.gradient_checkpointing:
        denoiser_of(student_pipeline).enable_gradient_checkpointing()
    teachers = [
        _teacher(recipe, settings, card, own.get(card.name), base, student_pipeline, parameters)
        for settings, card in zip(recipe.teachers, cards, strict=True)
    ]
    switch = AdapterSwitch(trunk)  # after every adapter exists: it lists the layers once
    for teacher in teachers:
        teacher.call = Call(teacher.call.pipeline, teacher.call.arguments, _binding(teacher, switch, own, is_lora))
    if is_lora:
        switch.select(STUDENT)
    for parameter in parameters.values():  # peft freezes every adapter but the last one added
        parameter.requires_grad_(True)
    call = Call(student_pipeline, student_arguments(recipe))
    return Student(call, student_pipeline, parameters, is_lora), teachers


def own_denoisers(base: Any, cards: list[TeacherCard], *, fuse: bool) -> dict[str, nn.Module]:
    """Teacher -> a frozen denoiser of its own: full checkpoints and, with `fuse`, LoRA teachers fused into a copy.

    Call it before the base carries any adapter. Raises UserError for weights that do not fit.
    """
    own = {}
    for card in cards:
        if card.form == "full" or (fuse and card.form == "lora"):
            denoiser = load_full_denoiser(base, card) if card.form == "full" else load_fused_denoiser(base, card)
            own[card.name] = denoiser.requires_grad_(False).eval().to(base.device)
    return own


def student_arguments(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of the student's deployment call, prompts and latents aside."""
    settings = recipe.student
    arguments = {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "output_type": "latent",
        **settings.call,
    }
    if settings.negative_prompt:
        arguments["negative_prompt"] = settings.negative_prompt
    return arguments


def with_scheduler(pipeline: Any, recipe: Recipe) -> Any:
    """The pipeline with the recipe's scheduler override, if it has one: `class` and config keys."""
    override = dict(recipe.student.scheduler or {})
    if override:
        import diffusers

        kind = getattr(diffusers, override.pop("class", type(pipeline.scheduler).__name__))
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **override)
    return pipeline


def use_xformers(denoiser: nn.Module) -> None:
    """xformers' attention on a denoiser, and the proof that its layers really use it.

    Raises UserError where it is not installed, does not run here, or was accepted without effect.
    """
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, NotImplementedError) as error:
        raise UserError(
            f'train.attention_backend = "xformers" cannot be used here: {error} Install diffopd[xformers] on a machine '
            'with a GPU, or set train.attention_backend = "default".'
        ) from error
    names = {type(processor).__name__ for processor in denoiser.attn_processors.values()}
    if not all("XFormers" in name for name in names):
        raise UserError(f"xformers was asked for, but the attention layers use {', '.join(sorted(names))}.")


def with_denoiser(pipeline: Any, denoiser: nn.Module) -> Any:
    """A shell over the pipeline's modules whose denoiser is another one."""
    other = shell(pipeline)
    other.register_modules(**{denoiser_name(pipeline): denoiser})
    return other


def _trainable(recipe: Recipe, pipeline: Any) -> dict[str, nn.Parameter]:
    denoiser, settings = denoiser_of(pipeline), recipe.student
    if settings.train == "full":
        denoiser.requires_grad_(True)
        return dict(denoiser.named_parameters())
    if settings.init_weights:
        file = lora_file(settings.init_weights, Path.cwd(), recipe.place("student", "init_weights"))
        load_lora(pipeline, str(file), adapter_name=STUDENT)
        parameters = adapter_parameters(denoiser, STUDENT)
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return parameters
    shape = {"rank": settings.rank, "lora_alpha": settings.lora_alpha, "target_modules": settings.target_modules}
    return add_adapter(denoiser, STUDENT, seed=recipe.seed, **shape)


def _teacher(
    recipe: Recipe,
    settings: TeacherSettings,
    card: TeacherCard,
    own: nn.Module | None,
    base: Any,
    student_pipeline: Any,
    parameters: dict[str, nn.Parameter],
) -> Teacher:
    pipeline, follow = shell(base) if own is None else with_denoiser(base, own), None
    if card.form == "ema":
        pipeline, follow = self_teacher(recipe, settings, base, student_pipeline, parameters)
    guidance = settings.guidance_scale if settings.guidance_scale is not None else card.guidance_scale
    arguments = {"guidance_scale": guidance, "output_type": "latent", **settings.call}
    train, test = (read_prompts(path) for path in (card.prompts.train, card.prompts.test))
    return Teacher(card.name, card, Call(pipeline, arguments), train, test, settings.weight, follow)


def self_teacher(
    recipe: Recipe, settings: TeacherSettings, base: Any, student_pipeline: Any, parameters: dict[str, nn.Parameter]
) -> tuple[Any, tuple[Average, dict[str, nn.Parameter]]]:
    """A second adapter (or copy) that follows the student; it starts as a copy of the student's weights."""
    trained = denoiser_of(student_pipeline)
    average = Average(parameters, settings.ema_decay)
    if recipe.student.train == "full":
        copied = copy.deepcopy(trained).requires_grad_(False)
        return with_denoiser(base, copied), (average, dict(copied.named_parameters()))
    config = trained.peft_config[STUDENT]
    added = add_adapter(
        trained, SELF_TEACHER, rank=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules
    )
    mirrored = {name.replace(f".{SELF_TEACHER}.", f".{STUDENT}."): p.requires_grad_(False) for name, p in added.items()}
    average.copy_to(mirrored)
    return shell(base), (average, mirrored)


def _binding(
    teacher: Teacher, switch: AdapterSwitch, own: dict[str, nn.Module], is_lora: bool
) -> partial[AbstractContextManager]:
    """What holds while this teacher's networks run. A denoiser of its own needs no adapter of the trunk."""
    adapters = {"lora": teacher.card.name, "ema": SELF_TEACHER if is_lora else None}
    return partial(switch.bound, None if teacher.name in own else adapters.get(teacher.card.form))
