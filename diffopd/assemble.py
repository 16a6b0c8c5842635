"""From a recipe to calls: one trunk, the student's adapter or copy on it, and every teacher's own view of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffopd.adapters import (
    SELF_TEACHER,
    STUDENT,
    AdapterSwitch,
    Average,
    adapter_parameters,
    add_adapter,
    add_configured,
    freeze,
)
from diffopd.attention import use_attention_backend
from diffopd.blueprint import NOT_IN_TRAINING, read_blueprint
from diffopd.context import Context, EnhancedPrompt, Noised, TextOnly, in_context
from diffopd.data import PromptRow, read_prompts
from diffopd.drive import Call, denoiser_name, denoiser_of, shell
from diffopd.embeddings import PromptEmbeddings, cache_folder, text_encoders
from diffopd.encode_ahead import encode_ahead, load_encoders
from diffopd.errors import UserError
from diffopd.load import load_full_denoiser, load_fused_denoiser, load_lora, load_pipeline
from diffopd.locate import find_pipeline
from diffopd.lowrank import average_delta, begin_at
from diffopd.memory import Offload, ReleasedVae
from diffopd.precision import answer_in_float32, component_dtypes
from diffopd.processes import Processes
from diffopd.quantize import quantization_config
from diffopd.recipe import Recipe, TeacherSettings
from diffopd.teacher import TeacherCard, lora_file, teacher_card

ALONE = Processes()


@dataclass
class Student:
    """The trained side: its call (without prompts), its trainable parameters and its pipeline.

    released: the VAE of all sides, where it was let go for the time of training.
    left_out: of a student that begins as its teachers' average, the relative error of its rank; else None.
    """

    call: Call
    pipeline: Any
    parameters: dict[str, nn.Parameter]
    is_lora: bool
    released: ReleasedVae | None = None
    left_out: float | None = None

    def decoding(self) -> AbstractContextManager:
        """While open, latents can be decoded."""
        return self.released.back() if self.released else nullcontext()


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
    context: Context = TextOnly()

    @property
    def is_given(self) -> bool:
        """Whether pictures teach; `call` is then how the student is asked at their noise levels."""
        return self.card.form == "pictures"

    @property
    def watched_rows(self) -> list[PromptRow]:
        """Rows for looks without training: held-out ones, or training ones where those lack what the context shows."""
        return self.test_rows if all(map(self.context.covers, self.test_rows)) else self.train_rows

    def validation_rows(self, count: int) -> list[PromptRow]:
        """The last `count` watched rows (all, where there are fewer): evaluation scores the first ones."""
        return self.watched_rows[-count:]


def assemble(recipe: Recipe, device: str, processes: Processes = ALONE) -> tuple[Student, list[Teacher]]:
    """Load the base once, put the student and all teachers on it.

    processes: they share the work where prompts are encoded in advance.

    Raises UserError for weights that are missing, do not fit the base, or leave keys unused.
    """
    name = recipe.student.pretrained_model_name_or_path
    quantization = quantization_config(recipe, read_blueprint(name).denoiser)
    dtypes = component_dtypes(recipe.train.frozen_dtype)
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    cache, encoders = None, ()
    if recipe.train.text_encoders == "released":
        reader = with_scheduler(load_encoders(name, dtypes, quantization, device), recipe)
        encoders = tuple(text_encoders(reader))
        cache = encode_ahead(reader, _asked(recipe, cards), processes)
        del reader
    base = load_pipeline(name, dtypes, quantization, leave_out=(*NOT_IN_TRAINING, *encoders))
    base = with_scheduler(base, recipe).to(device)
    freeze(base)
    is_lora = recipe.student.train == "lora"
    trunk = denoiser_of(base)
    student_pipeline = shell(base)
    if not is_lora:  # the student's trunk will move; adapters of teachers need one that stays
        student_pipeline = with_denoiser(base, copy.deepcopy(trunk).float())
    delta = average_delta(base, cards) if recipe.student.begin_from == "teacher_average" else {}
    own = own_denoisers(base, cards, recipe)
    for card in cards:
        if card.form == "lora" and card.name not in own:
            load_lora(base, card, adapter_name=card.name)
    parameters = _trainable(recipe, student_pipeline)
    left_out = _begin_at(delta, recipe, student_pipeline, parameters, processes) if delta else None
    if recipe.train.gradient_checkpointing:
        denoiser_of(student_pipeline).enable_gradient_checkpointing()
    teachers = [
        _teacher(recipe, settings, card, own.get(card.name), base, student_pipeline, parameters)
        for settings, card in zip(recipe.teachers, cards, strict=True)
    ]
    switch = AdapterSwitch(trunk)  # after every adapter exists: it lists the layers once
    for index, (settings, teacher) in enumerate(zip(recipe.teachers, teachers, strict=True)):
        if teacher.is_given:
            continue
        adapter = None if teacher.name in own else _adapter(teacher.card, is_lora)
        binding = own[teacher.name].present if teacher.name in own else partial(switch.bound, adapter)
        teacher.call = Call(teacher.call.pipeline, teacher.call.arguments, binding)
        if settings.context:
            place = recipe.place("teachers", index, "context")
            teacher.call, teacher.context = in_context(teacher.call, settings.context, adapter, place)
    if is_lora:
        switch.select(STUDENT)
    for parameter in parameters.values():  # peft freezes every adapter but the last one added
        parameter.requires_grad_(True)
    widths = recipe.train.frozen_dtype, recipe.train.mixed_precision, recipe.student.quantization
    for denoiser in _distinct(student_pipeline, teachers):
        use_attention_backend(denoiser, recipe.train.attention_backend)
        if widths != ("float32", "no", "none"):
            answer_in_float32(denoiser, denoiser.dtype)
    call = Call(student_pipeline, student_arguments(recipe))
    student = Student(call, student_pipeline, parameters, is_lora, left_out=left_out)
    pipelines = [student.pipeline, *(teacher.call.pipeline for teacher in teachers)]
    if recipe.train.text_encoders != "resident":
        cache = cache or PromptEmbeddings(base, cache_folder())
        for pipeline in pipelines:
            cache.attach(pipeline)
    if recipe.train.text_encoders == "released" and recipe.objective.states != "data":
        student.released = ReleasedVae([base, *pipelines], find_pipeline(name))
    return student, teachers


def _distinct(student_pipeline: Any, teachers: list[Teacher]) -> list[nn.Module]:
    """Every denoiser of the run once."""
    held = map(denoiser_of, (student_pipeline, *(teacher.call.pipeline for teacher in teachers)))
    return list({id(denoiser): denoiser for denoiser in held}.values())


def _asked(recipe: Recipe, cards: list[TeacherCard]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The calls whose prompts a run needs, with those prompts: the student's, and each teacher's own."""
    for settings, card in zip(recipe.teachers, cards, strict=True):
        rows = [row for path in (card.prompts.train, card.prompts.test) for row in read_prompts(path)]
        yield student_arguments(recipe), [row.prompt for row in rows]
        richer = settings.context and settings.context.kind == "enhanced_prompt"
        yield _teacher_arguments(recipe, settings, card), (EnhancedPrompt() if richer else TextOnly()).prompts(rows)


@dataclass(frozen=True)
class OwnDenoiser:
    """A frozen denoiser of one teacher, and what brings it to the device where it lives elsewhere."""

    module: nn.Module
    present: Callable[[], AbstractContextManager]


def own_denoisers(base: Any, cards: list[TeacherCard], recipe: Recipe) -> dict[str, OwnDenoiser]:
    """Teacher -> a frozen denoiser of its own: full checkpoints, and LoRA teachers that the recipe wants fused.

    Call it before the base carries any adapter. Raises UserError for weights that do not fit.
    """
    own, train = {}, recipe.train
    offload = Offload(base.device) if train.offload_teachers else None
    for card in cards:
        if card.form == "full" or (train.fuse_teachers and card.form == "lora"):
            module = load_full_denoiser(base, card) if card.form == "full" else load_fused_denoiser(base, card)
            module.requires_grad_(False).eval()
            if offload is None:
                module.to(base.device)
            else:
                offload.add(module)
            own[card.name] = OwnDenoiser(module, partial(offload.using, module) if offload else nullcontext)
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


def _begin_at(
    delta: dict[str, Tensor],
    recipe: Recipe,
    pipeline: Any,
    parameters: dict[str, nn.Parameter],
    processes: Processes,
) -> float:
    """The student starts as its base plus `delta`, in every process alike; returns what its rank leaves out."""
    left_out = 0.0
    if recipe.student.train == "lora":
        try:
            left_out = begin_at(denoiser_of(pipeline), STUDENT, delta)
        except UserError as misfit:
            raise UserError(f"{recipe.place('student', 'begin_from')}: {misfit}") from misfit
    else:
        for layer, change in delta.items():
            weight = parameters[f"{layer}.weight"]
            weight.data += change.to(weight)
    processes.copy_from_main(parameters.values())
    return left_out


def _teacher(
    recipe: Recipe,
    settings: TeacherSettings,
    card: TeacherCard,
    own: OwnDenoiser | None,
    base: Any,
    student_pipeline: Any,
    parameters: dict[str, nn.Parameter],
) -> Teacher:
    if card.form == "pictures":
        return _pictures(recipe, settings, card, student_pipeline)
    pipeline, follow = shell(base) if own is None else with_denoiser(base, own.module), None
    if card.form == "ema":
        pipeline, follow = self_teacher(recipe, settings, base, student_pipeline, parameters)
    call = Call(pipeline, _teacher_arguments(recipe, settings, card))
    train, test = (read_prompts(path) for path in (card.prompts.train, card.prompts.test))
    return Teacher(card.name, card, call, train, test, settings.weight, follow)


def _teacher_arguments(recipe: Recipe, settings: TeacherSettings, card: TeacherCard) -> dict[str, Any]:
    """The keyword arguments of a teacher's call, prompts and steps aside; of pictures the student's own."""
    guidance = own_guidance(settings, card)
    if card.form == "pictures":
        return {**student_arguments(recipe), "guidance_scale": guidance}
    return {"guidance_scale": guidance, "output_type": "latent", **settings.call}


def own_guidance(settings: TeacherSettings, card: TeacherCard) -> float:
    """Under which guidance a teacher teaches and is scored: the recipe's word, else its card's."""
    return settings.guidance_scale if settings.guidance_scale is not None else card.guidance_scale


def _pictures(recipe: Recipe, settings: TeacherSettings, card: TeacherCard, student_pipeline: Any) -> Teacher:
    """The student's own call at the noise levels of pictures."""
    levels = settings.num_inference_steps or card.num_inference_steps
    call = Call(shell(student_pipeline), _teacher_arguments(recipe, settings, card)).regridded(levels)
    train, test = (read_prompts(path) for path in (card.prompts.train, card.prompts.test))
    return Teacher(card.name, card, call, train, test, settings.weight, context=Noised())


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
    added = add_configured(trained, SELF_TEACHER, copy.deepcopy(config))  # with its ranks and alphas layer by layer
    mirrored = {name.replace(f".{SELF_TEACHER}.", f".{STUDENT}."): p.requires_grad_(False) for name, p in added.items()}
    average.copy_to(mirrored)
    return shell(base), (average, mirrored)


def _adapter(card: TeacherCard, is_lora: bool) -> str | None:
    """The adapter of the trunk that answers for this teacher. A denoiser of its own needs none."""
    return {"lora": card.name, "ema": SELF_TEACHER if is_lora else None}.get(card.form)
