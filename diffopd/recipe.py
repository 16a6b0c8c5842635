"""The recipe: the only thing a run depends on. Frozen, nested, validated before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from diffopd.context import ContextSettings
from diffopd.errors import UserError
from diffopd.locate import absolute, find_recipe
from diffopd.overrides import apply_override
from diffopd.settings import Location, Settings, Source, read_toml, validated


def _finite(value: Any) -> Any:
    """A TOML value without nan and inf, however deep in lists and tables."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _finite(item)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number. Give a finite one, or remove the key.")
    return value


Value = Annotated[Any, AfterValidator(_finite)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
OBJECTIVE_NAMES = Literal["mean", "kl", "released_sde", "velocity", "denoised", "noise", "positive_direction"]
SOLVER_NAMES = Literal["native", "euler", "flow_sde", "dance_sde", "ddim", "dpmpp_1", "dpmpp_2m", "lcm"]
SUBSTEP_SOLVER_NAMES = Literal["auto", "euler", "ddim", "dpmpp_1", "dpmpp_2m"]
# diffusers' names, but for those that compute no gradients (Sage; Flex, which has some only under torch.compile).
ATTENTION_BACKENDS = Literal[
    "default",
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "_native_npu",
    "_native_xla",
    "flash",
    "flash_hub",
    "flash_varlen",
    "flash_varlen_hub",
    "flash_4_hub",
    "_flash_3",
    "_flash_varlen_3",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "aiter_fa2_hub",
    "xformers",
]
QUANTIZATIONS = ("none", "bnb-4bit", "bnb-8bit", "torchao-int8")
QUANTIZATION_KEYS = ("quant_backend", "quant_kwargs", "components_to_quantize")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Arguments of a pipeline call that diffopd itself decides, and where a user sets them instead.
OWN_ARGUMENTS = {
    "prompt": "the teachers' prompts",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "latents": "seed",
    "generator": "seed",
    "output_type": "nothing: pictures are decoded by evaluation",
    "return_dict": "nothing: it is needed as it is",
    "num_images_per_prompt": "train.batch_size",
}


class Called(Settings):
    """A side that is a pipeline call: `call` holds its further keyword arguments."""

    call: dict[str, Value] = {}

    @field_validator("call")
    @classmethod
    def _only_further_arguments(cls, call: dict[str, Any]) -> dict[str, Any]:
        for key in call:
            if key in OWN_ARGUMENTS:
                raise ValueError(f'"{key}" is set by diffopd. Remove it; its setting is {OWN_ARGUMENTS[key]}.')
        return call


class StudentSettings(Called):
    """Who is trained and how it walks at deployment."""

    pretrained_model_name_or_path: str
    quantization: str | dict[str, Value] = "none"
    train: Literal["lora", "full"] = "lora"
    rank: Count = 32
    lora_alpha: Count = 64
    target_modules: list[str] | str = list(ATTENTION)
    init_weights: str | None = None
    begin_from: Literal["base", "teacher_average"] = "base"
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)] = 4
    guidance_scale: PositiveOrZero = 1.0
    negative_prompt: str = ""
    solver: SOLVER_NAMES = "native"
    noise_level: PositiveOrZero = 0.0
    scheduler: dict[str, Value] = {}

    @field_validator("quantization", mode="before")
    @classmethod
    def _known_quantization(cls, value: Any) -> Any:
        if value in QUANTIZATIONS or (isinstance(value, dict) and isinstance(value.get("quant_backend"), str)):
            unknown = [key for key in value if key not in QUANTIZATION_KEYS] if isinstance(value, dict) else []
            if not unknown:
                return value
        raise ValueError(
            f"{value!r} is not allowed. Give one of {', '.join(QUANTIZATIONS)}, or a table for diffusers' "
            f"PipelineQuantizationConfig: {', '.join(QUANTIZATION_KEYS)}."
        )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_pattern(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"{value!r} is not allowed. Give a list of module names or one regular expression.")
        return value

    @field_validator("scheduler")
    @classmethod
    def _class_is_a_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("class", ""), str):
            raise ValueError(f"class = {value['class']!r} is not a name. Give a scheduler class of diffusers.")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> StudentSettings:
        if self.init_weights and self.train == "full":
            raise ValueError('init_weights is a LoRA to start from and needs train = "lora". Remove one of the two.')
        if self.init_weights and self.begin_from != "base":
            raise ValueError("init_weights and begin_from both say where the student starts. Remove one of the two.")
        if self.noise_level and self.solver == "native":
            raise ValueError(
                f'noise_level = {self.noise_level:g} has no effect on solver = "native", whose noise is the '
                "scheduler's own. Name a stochastic solver (ddim, flow_sde, dance_sde) or remove noise_level."
            )
        return self


class TeacherSettings(Called):
    """One teacher of the recipe; what is not given here comes from its card."""

    name: str
    weight: Positive = 1.0
    guidance_scale: PositiveOrZero | None = None
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)] | None = None
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.9999
    context: ContextSettings | None = None


class ObjectiveSettings(Settings):
    """How the two sides are compared, and at which states."""

    name: OBJECTIVE_NAMES = "mean"
    substeps: Annotated[int, Field(gt=0, le=1000)] = 1
    substep_solver: SUBSTEP_SOLVER_NAMES = "auto"
    final_step: Literal["mean", "skip"] | None = None
    query: str | dict[str, Any] = "all"
    step_weights: list[PositiveOrZero] = []
    states: Literal["student", "data"] = "student"

    @field_validator("query", mode="before")
    @classmethod
    def _known_query(cls, value: Any) -> Any:
        if value in ("all", "one_low_noise"):
            return value
        only = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
        if only[0] == "fraction" and _is_number(only[1]) and 0 < only[1] <= 1:
            return value
        if only[0] == "indices" and isinstance(only[1], list) and only[1] and all(map(_is_index, only[1])):
            if len(set(only[1])) == len(only[1]):
                return value
        if only[0] == "random" and _is_index(only[1]) and only[1] > 0:
            return value
        raise ValueError(
            f'{value!r} is not allowed. Give "all", "one_low_noise", {{fraction = F}} with 0 < F <= 1, {{random = N}} '
            "with N > 0, or {indices = [..]} with different step numbers from 0."
        )

    @model_validator(mode="after")
    def _something_counts(self) -> ObjectiveSettings:
        if self.name == "positive_direction" and self.substeps > 1:
            raise ValueError(
                f"a landing of {self.substeps} substeps is not made of two answers, which positive_direction compares. "
                "Set substeps = 1."
            )
        if self.step_weights and not any(self.step_weights):
            raise ValueError("step_weights are all 0, nothing would be trained. Give at least one above 0.")
        return self


class TrainSettings(Settings):
    """The optimizer and its bounds; 0 means no bound (max_train_*), never (*_every, patience) or off."""

    learning_rate: Positive = 3e-4
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    tasks_per_update: int | str = "all"
    max_train_steps: CountOrZero = 0
    max_train_seconds: PositiveOrZero = 0.0
    checkpointing_steps: Count = 100
    max_grad_norm: Positive = 1.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Positive = 1e-8
    adam_weight_decay: PositiveOrZero = 1e-4
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: CountOrZero = 0
    ema_decay: Fraction = 0.0
    mixed_precision: Literal["no", "bf16"] = "no"
    frozen_dtype: Literal["float32", "bf16"] = "float32"
    gradient_checkpointing: bool = False
    text_encoders: Literal["resident", "cached", "released"] = "resident"
    fuse_teachers: bool = False
    fuse_student: bool = False
    offload_teachers: bool = False
    attention_backend: ATTENTION_BACKENDS = "default"
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    mode: Literal["streaming", "two_pass"] = "streaming"
    validate_every: CountOrZero = 0
    patience: CountOrZero = 0
    resume_from_checkpoint: Literal["latest", "none"] = "latest"

    @field_validator("attention_backend", mode="before")
    @classmethod
    def _has_a_backward(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip("_").startswith(("sage", "flex")):
            raise ValueError(
                f'"{value}" computes no gradients here, so nothing could be trained. Take "flash" or "native".'
            )
        return value

    @field_validator("tasks_per_update", mode="before")
    @classmethod
    def _all_or_count(cls, value: Any) -> Any:
        if value in ("all", "round_robin") or (_is_index(value) and value > 0):
            return value
        raise ValueError(f'{value!r} is not allowed. Give "all", "round_robin" or a whole number above 0.')

    @model_validator(mode="after")
    def _fused_once(self) -> TrainSettings:
        if self.fuse_student and self.gradient_checkpointing:
            raise ValueError(
                "fuse_student folds the adapter into the weights of one forward, which gradient_checkpointing would "
                "compute again without it. Turn one of the two off."
            )
        return self

    @model_validator(mode="after")
    def _ends(self) -> TrainSettings:
        if self.patience and not self.validate_every:
            raise ValueError(f"patience = {self.patience} counts held-out checks. Set validate_every above 0 as well.")
        bounded = self.max_train_steps or self.max_train_seconds
        if not (bounded or self.patience):
            raise ValueError("the run would never end. Set max_train_steps, max_train_seconds or patience above 0.")
        if self.lr_scheduler == "cosine" and not bounded:
            raise ValueError('lr_scheduler = "cosine" needs an end. Set max_train_steps or max_train_seconds.')
        return self


class EvaluateSettings(Settings):
    """What is scored after training: held-out prompts per task, seeds, and the base's guidance scales.

    student_steps: at how many steps the student is scored, and its teachers beside it; None means those of its walk.
    dtype: "bf16" scores with the frozen weights rounded, and the student's adapter beside those of its teachers on one
    trunk, where float32 copies of both do not fit; the student is exported in float32 whatever it was scored in.
    """

    dtype: Literal["float32", "bf16"] = "float32"
    num_prompts: Count = 64
    batch_size: Count = 32
    seeds: list[CountOrZero] = [0]
    guidance_scales: list[PositiveOrZero] = [1.0]
    student_steps: Annotated[int, Field(gt=0, le=1000)] | None = None
    teachers: bool = True

    @field_validator("seeds", "guidance_scales")
    @classmethod
    def _some_and_different(cls, value: list[float]) -> list[float]:
        if not value or len(set(value)) != len(value):
            raise ValueError(f"{value!r} is not allowed. Give at least one value, each once.")
        return value


class Recipe(Settings):
    """Everything a run depends on. `path` and `source_text` say where it was read."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: str
    student: StudentSettings
    teachers: Annotated[list[TeacherSettings], Field(min_length=1)]
    objective: ObjectiveSettings = ObjectiveSettings()
    train: TrainSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    _source: Source = PrivateAttr()

    @model_validator(mode="after")
    def _pictures_can_be_encoded(self) -> Recipe:
        needed = {"reference_image": "the VAE", "image_prompt": "the text encoder"}
        for teacher in self.teachers:
            part = needed.get(teacher.context.kind) if teacher.context else None
            if part and self.train.text_encoders == "released":
                raise ValueError(
                    f'train.text_encoders = "released" lets {part} go, and teacher {teacher.name!r} sees pictures '
                    'with it. Set it to "cached".'
                )
        return self

    @model_validator(mode="after")
    def _an_adapter_to_fuse(self) -> Recipe:
        if self.train.fuse_student and self.student.train == "full":
            raise ValueError('train.fuse_student folds an adapter and student.train = "full" has none. Remove it.')
        if self.train.fuse_student and self.train.frozen_dtype != "float32":
            raise ValueError(
                "train.fuse_student adds the adapter to the frozen weights, and their frozen_dtype = "
                f'"{self.train.frozen_dtype}" would round it away. Turn one of the two off.'
            )
        return self

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> Recipe:
        if self.student.quantization == "none":
            return self
        asks = {
            'student.train = "full" trains': self.student.train == "full",
            "train.fuse_student adds the adapter to": self.train.fuse_student,
            "train.fuse_teachers adds adapters to": self.train.fuse_teachers,
        }
        for what, is_asked in asks.items():
            if is_asked:
                raise ValueError(f"{what} weights that student.quantization rounds. Turn one of the two off.")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        names = [teacher.name for teacher in self.teachers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"teacher {twice!r} is given twice. Give each teacher once; weight sets its share.")
        return self

    @model_validator(mode="after")
    def _turns_are_equal(self) -> Recipe:
        if self.train.tasks_per_update == "round_robin" and len({teacher.weight for teacher in self.teachers}) > 1:
            raise ValueError(
                'train.tasks_per_update = "round_robin" gives every teacher the same number of turns. Remove weight '
                'from the teachers, or set train.tasks_per_update to "all" or to a number of draws by weight.'
            )
        return self

    @model_validator(mode="after")
    def _rounded_scores_are_of_a_lora(self) -> Recipe:
        if self.evaluate.dtype != "float32" and self.student.train == "full":
            raise ValueError(
                'evaluate.dtype = "bf16" puts the adapter of the student beside those of its teachers on one rounded '
                'trunk; a student of train = "full" has a network of its own, in float32. Remove it.'
            )
        return self

    @property
    def path(self) -> Path:
        """The recipe's file; relative paths in it were taken from its folder."""
        return self._source.path

    @property
    def source_text(self) -> str:
        """The file verbatim."""
        return self._source.text

    @property
    def fixed_length(self) -> str:
        """Why the length of the run is part of it, so that a resumed one cannot change it; empty where it is not."""
        return "its cosine falls towards it" if self.train.lr_scheduler == "cosine" else ""

    @property
    def scored_steps(self) -> int:
        """At how many steps the student is scored."""
        return self.evaluate.student_steps or self.student.num_inference_steps

    def place(self, *location: str | int) -> str:
        """'file:line' (or the --set option) that gave a key."""
        return self._source.place(location)

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as JSON holds it; local paths are absolute."""
        return self.model_dump(mode="json")


def read_recipe(path_or_name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by shelf name or path, with `--set` overrides such as "train.batch_size=8".

    Relative paths in the file are taken from its folder, those of overrides from the current folder.
    Raises UserError naming file, line and key for anything that is not allowed.
    """
    data, source = read_overridden(find_recipe(str(path_or_name)), overrides)
    if "name" in data:
        data.setdefault("output_dir", f"runs/{data['name']}")
    else:
        raise UserError(f'{source.path}: name is missing. Add name = "..." at the top.')
    return from_resolved(data, source)


def read_overridden(path: Path, overrides: list[str] | None = None) -> tuple[dict[str, Any], Source]:
    """A recipe file's settings with overrides put in and local paths made absolute, not yet validated."""
    data, source = read_toml(path)
    _make_paths_absolute(data, source.path.parent)
    replaced: dict[Location, str] = {}
    for option in overrides or []:
        location = apply_override(data, option)
        replaced[location] = option
    _make_paths_absolute(data, Path.cwd())
    source = Source(source.path, source.text, source.lines, replaced)
    refuse_shape_beside_init_weights(data, source)
    return data, source


def refuse_shape_beside_init_weights(data: dict[str, Any], source: Source) -> None:
    """A LoRA to start from has its own rank, alpha and layers: UserError where others are given beside it.

    Those of a recipe's file may stand where init_weights is given by --set: no option could take them out.
    """
    student = data.get("student")
    if not isinstance(student, dict) or not student.get("init_weights"):
        return
    is_set = source.place(("student", "init_weights")).startswith("--set")
    for key in ("rank", "lora_alpha", "target_modules"):
        place = source.place(("student", key))
        if key in student and (place.startswith("--set") or not is_set):
            raise UserError(
                f"{place}: student.{key} has no effect beside student.init_weights, a LoRA with a rank, alpha and "
                "layers of its own. Remove one of the two."
            )


def from_resolved(data: dict[str, Any], source: Source) -> Recipe:
    """A recipe from a dict of settings (such as `Recipe.resolved()`); `source` is what errors point to."""
    recipe = validated(Recipe, data, source)
    recipe._source = source
    return recipe


def _make_paths_absolute(data: dict[str, Any], folder: Path) -> None:
    """Local paths of base, warm start and teachers, in place; wrong types are left to the validation."""
    student, teachers = data.get("student"), data.get("teachers")
    held = [(student, "pretrained_model_name_or_path"), (student, "init_weights")]
    for teacher in teachers if isinstance(teachers, list) else []:
        context = teacher.get("context") if isinstance(teacher, dict) else None
        held += [(teacher, "name"), (context, "ip_adapter"), (context, "image_encoder"), (context, "vision_language")]
    for table, key in held:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = absolute(table[key], folder)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
