"""teach.toml: how a teacher's weights are made. A recipe without teachers, whose loss is an estimator."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from diffopd.errors import UserError
from diffopd.locate import find_teacher, is_path, shelf
from diffopd.recipe import Count, Fraction, Positive, PositiveOrZero, Recipe, TeacherSettings, read_overridden
from diffopd.settings import Settings, validated
from diffopd.teacher import RewardSettings, TeacherCard, teacher_card

# What each estimator reads; any other key beside it would have no effect and is refused.
WITH_REWARD = {"name", "advantage_clip", "advantage_std", "kl_weight"}
OF_ESTIMATOR = {
    "supervised": {"name"},
    "nft": WITH_REWARD | {"beta", "old_decay_rate", "old_decay_max"},
    "grpo": WITH_REWARD | {"clip_range", "log_prob", "kl"},
    "grpo_guard": WITH_REWARD | {"clip_range", "log_prob", "kl"},
}
# Of [student]: what the card gives where it is not given, by its key there.
OF_CARD = {
    "pretrained_model_name_or_path": "base",
    "train": "form",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}
KL_WEIGHT = {"supervised": 0.0, "nft": 1e-4, "grpo": 0.04, "grpo_guard": 0.04}  # as released
POLICY_GRADIENT = ("grpo", "grpo_guard")
# Of the tables that a distill recipe has as well, the keys that teaching reads.
SHARED = {
    "objective": {"query"},
    "evaluate": {"num_prompts", "batch_size", "seeds"},
    "train": {
        "learning_rate",
        "batch_size",
        "max_train_steps",
        "max_train_seconds",
        "checkpointing_steps",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "adam_weight_decay",
        "lr_scheduler",
        "lr_warmup_steps",
        "ema_decay",
        "mixed_precision",
        "gradient_checkpointing",
        "fuse_student",
        "attention_backend",
        "report_to",
        "validate_every",
        "resume_from_checkpoint",
    },
}


class EstimatorSettings(Settings):
    """How rewards, or pictures, become a loss; which keys belong to which name is in OF_ESTIMATOR.

    kl_weight None is the released one: 1e-4 |v - v_base|^2 for nft, .04 KL for grpo and grpo_guard. kl: that of the
    step, as in the paper, or the released code's, which is it times |dt| (`estimators.kl_to_base`).
    """

    name: Literal["supervised", "nft", "grpo", "grpo_guard"]
    beta: Positive = 1.0
    old_decay_rate: PositiveOrZero = 0.001
    old_decay_max: Fraction = 0.5
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    log_prob: Literal["mean", "sum"] = "mean"
    kl_weight: PositiveOrZero | None = None
    kl: Literal["exact", "released"] = "exact"
    advantage_clip: Positive = 5.0
    advantage_std: Literal["prompt", "batch"] = "prompt"

    @property
    def reference_weight(self) -> float:
        """How much distance from the base costs."""
        return KL_WEIGHT[self.name] if self.kl_weight is None else self.kl_weight


class SamplingSettings(Settings):
    """One update's pictures, of all processes together: num_prompts x group_size, learnt in optimizer_steps parts.

    prompt_files: whether several prompt files take turns, prompt by prompt, or each has its part of the updates
    (cascade learning, task after task).
    """

    num_prompts: Count = 8
    group_size: Count = 8
    optimizer_steps: Count = 1
    prompt_files: Literal["in_turn", "one_after_another"] = "in_turn"


class TeachRecipe(Recipe):
    """`student` is the model that is taught; what is not given about it comes from the teacher's card.

    pictures: "file.py:function" that draws training pictures; None where prompt rows name a "file_name".
    watch: other teachers whose tasks are scored beside this one.
    """

    teachers: Annotated[list[TeacherSettings], Field(max_length=0)] = []
    estimator: EstimatorSettings
    sampling: SamplingSettings = SamplingSettings()
    rewards: list[RewardSettings] = []
    pictures: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")] | None = None
    watch: list[str] = []
    _card: TeacherCard = PrivateAttr()
    _of_card: frozenset[str] = PrivateAttr(frozenset())

    @property
    def card(self) -> TeacherCard:
        """The teacher that is taught."""
        return self._card

    def place(self, *location: str | int) -> str:
        """As in any recipe; the card's file and line of what its student takes from there."""
        if location[0] == "student" and location[-1] in self._of_card:
            return self.card.place(OF_CARD[location[-1]])
        return super().place(*location)

    @property
    def is_supervised(self) -> bool:
        """Whether it learns from pictures instead of a reward."""
        return self.estimator.name == "supervised"

    @property
    def group_size(self) -> int:
        """Pictures of one prompt in an update."""
        return 1 if self.is_supervised else self.sampling.group_size

    @property
    def num_pictures(self) -> int:
        """Pictures of one update, of all processes together."""
        return self.sampling.num_prompts * self.group_size

    @property
    def fixed_length(self) -> str:
        """Also where prompt files share the updates."""
        shares = "its prompt files have a part of it each" if self.sampling.prompt_files != "in_turn" else ""
        return shares or super().fixed_length

    def file_at(self, update: int, num_files: int) -> tuple[int, int | None]:
        """(the update at which its part began, number of the prompt file that it learns from; None: all in turn)."""
        if self.sampling.prompt_files == "in_turn":
            return 0, None
        steps = self.train.max_train_steps
        file = min(num_files - 1, update * num_files // steps)
        return math.ceil(file * steps / num_files), file


def read_teach_recipe(name: str, overrides: list[str] | None = None) -> TeachRecipe:
    """The teach.toml of a teacher by shelf name or folder, or another such file in its folder.

    Raises UserError naming file, line and key for anything that is not allowed.
    """
    file = find_teach(name)
    card = teacher_card(str(file.parent), file.parent)
    if card.form not in ("lora", "full"):
        raise UserError(
            f'{card.place("form")}: a teacher of form "{card.form}" has no weights of its own to be taught. Set '
            'form = "lora" or "full", with weights = "the file or folder to be made".'
        )
    data, source = read_overridden(file, overrides)
    data.setdefault("name", card.name)
    way = "" if file.stem == "teach" else f"-{file.stem}"  # a folder for each way of teaching it
    data.setdefault("output_dir", f"runs/teach-{data['name']}{way}")
    of_card = _student_of_card(data.setdefault("student", {}), card)
    recipe = validated(TeachRecipe, data, source, _with_effect(data.get("estimator")))
    recipe._source, recipe._card, recipe._of_card = source, card, of_card
    _refuse_without_effect(recipe)
    _check_student(recipe)
    _check_sampling(recipe)
    return recipe


def find_teach(name: str) -> Path:
    """The file that says how a teacher is taught. Raises UserError where there is none."""
    if name.endswith(".toml"):
        found = next((path for path in (Path(name).expanduser(), _on_shelf(name)) if path and path.is_file()), None)
        if found is None:
            where = f", neither here nor on the shelf {shelf('teachers')}" if _on_shelf(name) else ""
            raise UserError(f"{name}: there is no such file{where}.")
        find_teacher(str(found.absolute().parent), Path.cwd())
        return found.absolute()
    shipped = _on_shelf(name)  # also unmade/sd35-ocr, which is on no list
    is_shipped = bool(shipped) and (shipped / "teacher.toml").is_file() and not (is_path(name) and Path(name).exists())
    folder = shipped if is_shipped else find_teacher(name, Path.cwd())
    if not (folder / "teach.toml").is_file():
        others = [path.name for path in sorted(folder.glob("*.toml")) if path.name != "teacher.toml"]
        known = f" It has {', '.join(others)}: give the path of one." if others else ""
        raise UserError(f"{folder}: has no teach.toml, which says how its weights are made (docs/teach.md).{known}")
    return folder / "teach.toml"


def _on_shelf(name: str) -> Path | None:
    """Where a name would be on the shelf; None for a path that can only be the user's own, such as "./text"."""
    is_own = name.startswith((".", "~", "/")) or name.endswith("/") or ".." in Path(name).parts
    return None if is_own else shelf("teachers") / name


def _student_of_card(student: Any, card: TeacherCard) -> frozenset[str]:
    """Give [student] what it does not say and the card does; returns the keys that were given."""
    if not isinstance(student, dict):
        return frozenset()  # the validation says so
    given = frozenset(OF_CARD) - set(student)
    student |= {key: getattr(card, OF_CARD[key]) for key in given}
    return given


def _with_effect(estimator: Any) -> dict[str, set[str]]:
    """The keys to offer for a wrong one, by table, as `_refuse_without_effect` will have them."""
    name = estimator.get("name") if isinstance(estimator, dict) else None
    of_estimator = {"estimator": OF_ESTIMATOR[name]} if name in OF_ESTIMATOR else {}
    return {**SHARED, **of_estimator, "": set(TeachRecipe.model_fields) - {"teachers"}}


def _refuse_without_effect(recipe: TeachRecipe) -> None:
    """Keys that are known but would change nothing here."""
    allowed = {**SHARED, "estimator": OF_ESTIMATOR[recipe.estimator.name]}
    given = {
        "objective": recipe.objective,
        "evaluate": recipe.evaluate,
        "train": recipe.train,
        "estimator": recipe.estimator,
    }
    for section, settings in given.items():
        for key in sorted(settings.model_fields_set - allowed[section]):
            of = f"estimator {recipe.estimator.name!r}" if section == "estimator" else "teaching"
            raise UserError(
                f"{recipe.place(section, key)}: {section}.{key} has no effect on {of}. Remove it; "
                f"[{section}] may have {', '.join(sorted(allowed[section]))} here."
            )
    if recipe.is_supervised:
        _refuse(recipe, bool(recipe.rewards), "rewards", "it learns from pictures")
        _refuse(recipe, "group_size" in recipe.sampling.model_fields_set, "sampling.group_size", "a row is one picture")
    else:
        _refuse(recipe, recipe.pictures is not None, "pictures", "it learns from a reward")


def _refuse(recipe: TeachRecipe, is_given: bool, key: str, why: str) -> None:
    if is_given:
        place = recipe.place(*key.split("."))
        raise UserError(f"{place}: {key} has no effect on estimator {recipe.estimator.name!r}: {why}. Remove it.")


def _check_student(recipe: TeachRecipe) -> None:
    """What is taught must be what the card describes."""
    card, student = recipe.card, recipe.student
    for key in ("train", "pretrained_model_name_or_path"):
        given, said = getattr(student, key), getattr(card, OF_CARD[key])
        if given != said:
            raise UserError(
                f"{recipe.place('student', key)}: student.{key} = {given!r}, but {card.path} says {said!r}. "
                "Remove it here, or correct the card."
            )
    if student.solver != "native" and recipe.estimator.name not in POLICY_GRADIENT:
        raise UserError(
            f"{recipe.place('student', 'solver')}: student.solver = {student.solver!r} would only sample; estimator "
            f"{recipe.estimator.name!r} takes pictures from any sampler. Remove it, or set student.scheduler."
        )
    if card.hub_weights:
        raise UserError(
            f"{card.place('weights')}: weights = {card.weights!r} is a hub id, which cannot be written. Name a file."
        )


def _check_cascade(recipe: TeachRecipe) -> None:
    place, count = recipe.place("sampling", "prompt_files"), len(recipe.card.prompts.files("train"))
    said = f'{place}: sampling.prompt_files = "one_after_another"'
    if count < 2:
        raise UserError(f"{said}, but {recipe.card.path} has one prompt file. Remove it, or list several in the card.")
    if recipe.train.max_train_steps < count or recipe.train.max_train_seconds:
        raise UserError(
            f"{said} gives each of {count} files its part of the updates. Set train.max_train_steps to at least "
            f"{count}, and no train.max_train_seconds."
        )


def _check_sampling(recipe: TeachRecipe) -> None:
    sampling = recipe.sampling
    if not recipe.is_supervised and sampling.group_size < 2:
        raise UserError(
            f"{recipe.place('sampling', 'group_size')}: sampling.group_size = {sampling.group_size}: a picture's "
            "advantage is over others of its prompt. Set it to at least 2."
        )
    if sampling.prompt_files == "one_after_another":
        _check_cascade(recipe)
    if sampling.optimizer_steps > recipe.num_pictures:
        raise UserError(
            f"{recipe.place('sampling', 'optimizer_steps')}: {sampling.optimizer_steps} parts of "
            f"{recipe.num_pictures} pictures. Set optimizer_steps to at most their number."
        )
