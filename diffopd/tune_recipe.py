"""What `tune` is told: a model, pictures, and how its richer self teaches it. Everything else has a default."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from diffopd.context import ContextSettings, Kind, check_context, choose_kind
from diffopd.errors import UserError
from diffopd.locate import absolute
from diffopd.overrides import apply_override
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
)
from diffopd.settings import Location, Settings, Source, key_lines, read_toml, validated

FOLLOWED = 0.18  # of the way to the student, by the end of a run: 1 - .9999^2000, D-OPSD's best (arXiv:2605.05204)
COMMAND_LINE = Path("command line")
DEFAULTS: dict[str, dict[str, Any]] = {
    "student": {"rank": 64, "lora_alpha": 128},
    "objective": {"name": "denoised"},
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


class LookSettings(Settings):
    """What is looked at while training; every = 0 never looks. unrelated: a prompt file."""

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
    student: StudentSettings
    images: ImageSettings
    teacher: SelfTeacherSettings = SelfTeacherSettings()
    context: ContextChoice = ContextChoice()
    objective: ObjectiveSettings
    train: TrainSettings
    evaluate: EvaluateSettings = EvaluateSettings()
    look: LookSettings = LookSettings()
    _source: Source = PrivateAttr()

    @property
    def source(self) -> Source:
        """Where the settings came from."""
        return self._source

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

    def context_for(self, pipeline_class: str, *, is_enhanced: bool) -> ContextSettings:
        """The teacher's context: as asked, else the pipeline's own way to see a picture, else the second caption.

        Raises UserError where there is neither, or where it lacks something.
        """
        place, asked = self.place("context"), self.context.model_dump(exclude_none=True)
        if "kind" not in asked:
            asked["kind"] = choose_kind(pipeline_class, is_enhanced=is_enhanced, place=place)
            if asked["kind"] == "ip_adapter" and "ip_adapter" not in asked and is_enhanced:
                asked["kind"] = "enhanced_prompt"
        check_context(asked["kind"], pipeline_class, is_enhanced=is_enhanced, place=place)
        return validated(ContextSettings, asked, self._source)


def read_tune_recipe(
    path: str | None, model: str | None, images: str | None, overrides: list[str] | None = None
) -> TuneRecipe:
    """A tuning run from a .toml file, from a model and a folder of pictures, or from a file that these override.

    Relative paths in the file are taken from its folder, all others from the current one. Raises UserError naming
    file, line and key for anything that is not allowed.
    """
    options = [f"student.pretrained_model_name_or_path={quoted(model)}"] if model else []
    options += [f"images.folder={quoted(images)}"] if images else []
    data, source = _file(path) if path else _command_line(model, images)
    _make_paths_absolute(data, source.path.parent)
    replaced: dict[Location, str] = {}
    for option in [*(options if path else []), *(overrides or [])]:
        replaced[apply_override(data, option)] = option
    _make_paths_absolute(data, Path.cwd())
    for table, values in DEFAULTS.items():
        held = data.setdefault(table, {})
        if isinstance(held, dict):
            data[table] = values | held
    if isinstance(data.get("name"), str):
        data.setdefault("output_dir", f"runs/{data['name']}")
    source = Source(source.path, source.text, source.lines, replaced)
    recipe = validated(TuneRecipe, data, source)
    recipe._source = source
    return recipe


def quoted(text: str) -> str:
    """A TOML string. JSON's are, but for characters that it would write as two escapes."""
    return json.dumps(text, ensure_ascii=False)


def _file(path: str) -> tuple[dict[str, Any], Source]:
    file = Path(path).expanduser().absolute()
    data, source = read_toml(file)
    if "name" not in data:
        raise UserError(f'{file}: name is missing. Add name = "..." at the top.')
    return data, source


def _command_line(model: str | None, images: str | None) -> tuple[dict[str, Any], Source]:
    """A recipe of two settings, and its text as a file would have it."""
    if not (model and images):
        raise UserError(
            "Nothing to tune. Give --model (a folder or hub id) and --images (a folder of pictures), or the path of a "
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
    return data, Source(COMMAND_LINE, text, key_lines(text))


def _make_paths_absolute(data: dict[str, Any], folder: Path) -> None:
    student, images, context, look = (data.get(key) for key in ("student", "images", "context", "look"))
    for table, key in ((images, "folder"), (images, "held_out"), (look, "unrelated")):
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = _absolute(table[key], folder)
    held = [(student, "pretrained_model_name_or_path"), (student, "init_weights")]
    for table, key in (*held, (context, "ip_adapter"), (context, "image_encoder")):
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = absolute(table[key], folder)


def _absolute(name: str, folder: Path) -> str:
    return str((folder / Path(name).expanduser()).absolute())
