"""What `tune` is told: a model, pictures, and how its richer self teaches it. Everything else has a default."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from diffopd.context import NETWORK, SEES, ContextSettings, Kind, check_context, choose_kind, own_adapter
from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.locate import absolute, find_tune_recipe
from diffopd.overrides import apply_override, parse_override
from diffopd.recipe import (
    Called,
    Count,
    CountOrZero,
    EvaluateSettings,
    Name,
    ObjectiveSettings,
    Positive,
    PositiveOrZero,
    StudentSettings,
    TrainSettings,
    refuse_shape_beside_init_weights,
)
from diffopd.settings import Location, Settings, Source, read_toml, validated

FOLLOWED = 0.18  # of the way to the student, by the end of a run: 1 - .9999^2000, D-OPSD's best (arXiv:2605.05204)
COMMAND_LINE = Path("command line")
METHODS = Literal["d-opsd", "sft", "dreambooth"]
# What has no effect on a method. A recipe's [objective] is its own method's too.
UNUSED: dict[str, tuple[str, ...]] = {
    "d-opsd": ("noising",),
    "sft": ("teacher", "context", "prior"),
    "dreambooth": ("teacher", "context"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "student": {"rank": 64, "lora_alpha": 128},
    "train": {"learning_rate": 1e-4, "batch_size": 4, "max_train_steps": 2000},
}


class ImageSettings(Settings):
    """The pictures. held_out: a prompt file of new scenes; without it looks are at the pictures' own captions."""

    folder: str
    instance_prompt: str | None = None
    resolution: Count | None = None
    aspect_buckets: bool = True
    held_out: str | None = None
    license: str = "not stated"


class SelfTeacherSettings(Called):
    """The student's richer self: its average over training, the untouched model, or the student as it is now."""

    weights: Literal["ema", "frozen", "live"] = "ema"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    guidance_scale: PositiveOrZero | None = None


class ContextChoice(Settings):
    """A ContextSettings whose kind may be left to the pipeline."""

    kind: Kind | None = None
    instruction: str | None = None
    ip_adapter: str | None = None
    image_encoder: str | None = None
    scale: Annotated[float, Field(gt=0, le=2)] | None = None
    vision_language: str | None = None


class NoisingSettings(Settings):
    """How pictures are noised under "sft" and "dreambooth": to levels drawn evenly from the scheduler's own grid.

    guidance_scale: at which the student answers; None is its own, or none where its own takes a second evaluation.
    """

    num_levels: Annotated[int, Field(gt=0, le=1000)] = 50
    guidance_scale: PositiveOrZero | None = None


class PriorSettings(Settings):
    """Prior preservation (DreamBooth, arXiv:2208.12242): what the untouched model draws of a class or of prompts.

    class_prompt: of all its pictures; or prompts: a prompt file, of which the first num_pictures are taken, in turn.
    Under "dreambooth" these pictures are noised and taught; under "d-opsd", which needs no prior, the untouched model
    itself teaches the student on its own walk from these prompts. weight: of their loss, the pictures' own being 1.
    """

    class_prompt: str | None = None
    prompts: str | None = None
    num_pictures: Count = 100
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _one_of_two(self) -> PriorSettings:
        if self.prompts and self.is_class:
            raise ValueError("class_prompt and prompts both say what is kept. Give one of the two.")
        return self

    @property
    def is_class(self) -> bool:
        """Whether a class prompt is given."""
        return bool((self.class_prompt or "").strip())

    @property
    def is_given(self) -> bool:
        """Whether there is anything to keep."""
        return bool(self.prompts) or self.is_class

    def all_prompts(self) -> list[str]:
        """num_pictures prompts. Raises UserError for a prompt file that is missing or damaged."""
        said = [row.prompt for row in read_prompts(self.prompts)] if self.prompts else [self.class_prompt or ""]
        return [said[number % len(said)] for number in range(self.num_pictures)]

    @property
    def subject(self) -> str:
        """What is kept, in words."""
        return f"prompts in {self.prompts}" if self.prompts else repr(self.class_prompt)


class LookSettings(Settings):
    """What is looked at while training; every = 0 never looks. unrelated: a prompt file.

    dino, clip: networks to measure in, each a folder or hub id as transformers saves it.
    """

    dino: str | None = None
    clip: str | None = None
    every: CountOrZero = 100
    num_prompts: Count = 8
    unrelated: str | None = None
    max_drift: Positive | None = None
    stop_on_collapse: bool = True


class TuneRecipe(Settings):
    """A tuning run as its user says it."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: str
    method: METHODS = "d-opsd"
    student: StudentSettings
    images: ImageSettings
    teacher: SelfTeacherSettings = SelfTeacherSettings()
    context: ContextChoice = ContextChoice()
    noising: NoisingSettings = NoisingSettings()
    prior: PriorSettings = PriorSettings()
    objective: ObjectiveSettings
    train: TrainSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    look: LookSettings = LookSettings()
    _source: Source = PrivateAttr()
    _left_out: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _fits_the_method(self) -> TuneRecipe:
        unused = [f"[{key}]" for key in UNUSED[self.method] if key in self.model_fields_set]
        if unused:
            raise ValueError(
                f'{", ".join(unused)} ha{"ve" if unused[1:] else "s"} no effect on method = "{self.method}". Remove '
                f"{'them' if unused[1:] else 'it'}, or change the method."
            )
        if self.teacher.weights == "frozen" and self.student.init_weights:
            raise ValueError(
                'teacher.weights = "frozen" is the base alone, without student.init_weights, so it would not take the '
                'student\'s steps. Take "ema".'
            )
        if self.train.text_encoders == "released":
            raise ValueError(
                'train.text_encoders = "released" lets go of what the looks and the check of the teacher draw with. '
                'Take "cached".'
            )
        if self.method == "dreambooth" and not self.prior.is_given:
            raise ValueError(
                'method = "dreambooth" keeps what the model draws of the class. Say which: prior.class_prompt = "a '
                'photo of a dog" for pictures of one dog, "a drawing" for a manner, or prior.prompts = "FILE"; or take '
                'method = "sft".'
            )
        if self.method == "d-opsd" and "prior" in self.model_fields_set and not self.prior.is_given:
            raise ValueError('[prior] keeps nothing without prior.prompts = "FILE" or prior.class_prompt. Give one.')
        if self.method == "d-opsd" and self.prior.is_given and self.student.init_weights:
            raise ValueError(
                "[prior] is taught by the base alone, without student.init_weights, which does not take the student's "
                "steps. Remove [prior], or save base and init_weights as one model first."
            )
        return self

    @property
    def is_given(self) -> bool:
        """Whether noised pictures teach, and no network."""
        return self.method != "d-opsd"

    @property
    def source(self) -> Source:
        """Where the settings came from."""
        return self._source

    @property
    def left_out(self) -> tuple[str, ...]:
        """Tables of the recipe's file that are its own method's, where another one was asked for."""
        return self._left_out

    def place(self, *location: str | int) -> str:
        """'file:line' (or the --set option) that gave a key."""
        return self._source.place(location)

    @property
    def ema_decay(self) -> float:
        """The teacher's decay d: as given, else such that 1 - d^N = .18 for the N updates of the run; live is 0.

        Raises UserError where N is not known.
        """
        if self.teacher.weights == "live":
            return 0.0
        if self.teacher.ema_decay is not None:
            return self.teacher.ema_decay
        if not self.train.max_train_steps:
            raise UserError(
                f"{self.place('train')}: the average's decay depends on the number of updates, which is not bounded. "
                "Set train.max_train_steps above 0, or teacher.ema_decay."
            )
        return round((1.0 - FOLLOWED) ** (1.0 / self.train.max_train_steps), 8)

    def context_for(self, pipeline_class: str, *, is_enhanced: bool, folder: Path | None = None) -> ContextSettings:
        """The teacher's context: as asked, else the pipeline's own way to see a picture, else the second caption.

        folder: the pipeline's, which may hold an IP-Adapter of its own. Raises UserError where there is neither, or
        where it lacks something.
        """
        place, asked = self.place("context"), self.context.model_dump(exclude_none=True)
        if folder and not {"ip_adapter", "image_encoder"} & set(asked):
            if asked.get("kind", SEES.get(pipeline_class)) == "ip_adapter":
                asked |= own_adapter(folder)
        if "kind" not in asked:
            asked["kind"] = choose_kind(pipeline_class, is_enhanced=is_enhanced, place=place)
            if is_enhanced and NETWORK.get(asked["kind"], "kind") not in asked:
                asked["kind"] = "enhanced_prompt"
        check_context(asked["kind"], pipeline_class, is_enhanced=is_enhanced, place=place)
        return validated(ContextSettings, asked, self._source)


def read_tune_recipe(
    path: str | None, model: str | None, images: str | None, overrides: list[str] | None = None
) -> TuneRecipe:
    """A tuning run from a recipe (shelf name or .toml file), a model and a folder of pictures, or a recipe and these.

    Where the overrides ask for another method than the file, the file's tables of its own method are left out. Relative
    paths in the file are taken from its folder, all others from the current one. Raises UserError naming file, line and
    key for anything that is not allowed.
    """
    options = [f"student.pretrained_model_name_or_path={quoted(model)}"] if model else []
    options += [f"images.folder={quoted(images)}"] if images else []
    data, source = _file(path) if path else _command_line(model, images)
    left_out = _leave_out(data, overrides or [])
    _make_paths_absolute(data, source.path.parent)
    replaced: dict[Location, str] = {}
    for option in [*(options if path else []), *(overrides or [])]:
        replaced[apply_override(data, option)] = option
    _make_paths_absolute(data, Path.cwd())
    if "folder" not in data.setdefault("images", {}):
        raise UserError(f"{source.path}: which pictures? Give --images FOLDER, or [images] with folder in the recipe.")
    method = data.get("method", "d-opsd")
    told = dict(data)  # without the defaults
    compared = {"name": "denoised"} if method == "d-opsd" else {"states": "data", "query": {"random": 1}}
    for table, values in (DEFAULTS | {"objective": compared}).items():
        held = data.setdefault(table, {})
        if isinstance(held, dict):
            data[table] = values | held
    if isinstance(data.get("name"), str):
        data.setdefault("output_dir", f"runs/{data['name']}" + ("" if method == "d-opsd" else f"-{method}"))
    source = Source(source.path, source.text, source.lines, replaced)
    recipe = validated(TuneRecipe, data, source)
    refuse_shape_beside_init_weights(told, source)
    recipe._source, recipe._left_out = source, left_out
    return recipe


def _leave_out(data: dict[str, Any], overrides: list[str]) -> tuple[str, ...]:
    """Take out of a file's data what belongs to its own method, where `overrides` ask for another; returns what."""
    own = data.get("method", "d-opsd")
    asked = [value for parts, value in map(parse_override, overrides) if parts == ["method"]]
    method = asked[-1] if asked else own
    if method == own or method not in list(UNUSED):  # of another type: the validation says so
        return ()
    return tuple(table for table in (*UNUSED[method], "objective") if data.pop(table, None) is not None)


def quoted(text: str) -> str:
    """A TOML string. JSON's are, but for characters that it would write as two escapes."""
    return json.dumps(text, ensure_ascii=False)


def _file(path: str) -> tuple[dict[str, Any], Source]:
    file = find_tune_recipe(path)
    data, source = read_toml(file)
    if "name" not in data:
        raise UserError(f'{file}: name is missing. Add name = "..." at the top.')
    return data, source


def _command_line(model: str | None, images: str | None) -> tuple[dict[str, Any], Source]:
    """A recipe of two settings, and its text as a file would have it."""
    if not (model and images):
        missing = "which model" if images else "which pictures" if model else "what"
        raise UserError(
            f"Tune {missing}? Give --model (a folder or hub id) and --images (a folder of pictures), or the path of a "
            "tuning recipe (.toml)."
        )
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(images).expanduser().absolute().stem).strip("-.") or "tuned"
    here = Path.cwd()
    text = (
        f'name = "{name}"\n\n[student]\npretrained_model_name_or_path = {quoted(absolute(model, here))}\n\n'
        f"[images]\nfolder = {quoted(_absolute(images, here))}\n"
    )
    data = {
        "name": name,
        "student": {"pretrained_model_name_or_path": model},
        "images": {"folder": images},
    }
    return data, Source(COMMAND_LINE, text, {})  # the text is ours: its lines would tell nobody anything


def _make_paths_absolute(data: dict[str, Any], folder: Path) -> None:
    student, images, context, look = (data.get(key) for key in ("student", "images", "context", "look"))
    files = ((images, "folder"), (images, "held_out"), (look, "unrelated"), (data.get("prior"), "prompts"))
    for table, key in files:
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = _absolute(table[key], folder)
    held = [(student, "pretrained_model_name_or_path"), (student, "init_weights")]
    for table, key in (
        *held,
        (context, "ip_adapter"),
        (context, "image_encoder"),
        (context, "vision_language"),
        (look, "dino"),
        (look, "clip"),
    ):
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = absolute(table[key], folder)


def _absolute(name: str, folder: Path) -> str:
    return str((folder / Path(name).expanduser()).absolute())
