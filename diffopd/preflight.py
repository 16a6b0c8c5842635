"""Recipe-level checks: what can be known to be wrong before a weight is loaded, with its place."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffopd.blueprint import (
    Blueprint,
    add_lora_on_meta,
    misfit,
    pipeline_hashes,
    read_blueprint,
    read_json,
    tensor_shapes,
)
from diffopd.context import check_context, covers
from diffopd.data import PromptRow, check_tasks, read_prompts
from diffopd.errors import UserError, suggestion
from diffopd.grid import Grid, check_walk, grid_of, make_scheduler
from diffopd.locate import PACKAGE, find_pipeline, nearest_sibling
from diffopd.quantize import check_quantization, quantization_config
from diffopd.recipe import Recipe
from diffopd.reward import check_card_reward
from diffopd.teacher import (
    TeacherCard,
    hub_weights,
    lora_file,
    teacher_card,
    weight_files,
    weights_sha256,
)

if TYPE_CHECKING:
    from torch import nn

# Config keys that decide whether one network can stand at another's states.
STATE_KEYS = {
    "denoiser": ("_class_name", "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim"),
    "vae": ("_class_name", "latent_channels", "scaling_factor", "shift_factor", "block_out_channels"),
    "scheduler": (
        "num_train_timesteps",
        "prediction_type",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "shift",
    ),
    "text_encoder": ("_class_name", "hidden_size", "d_model", "vocab_size"),
}


@dataclass(frozen=True)
class Parts:
    """What a recipe names, found and checked: the base, the teachers' cards and prompts, the student's grid.

    grid is None where only the pipeline itself decides it. hashes: file -> sha256, empty unless asked for.
    """

    recipe: Recipe
    base: Blueprint
    cards: tuple[TeacherCard, ...]
    train_rows: dict[str, list[PromptRow]]
    test_rows: dict[str, list[PromptRow]]
    grid: Grid | None
    hashes: dict[str, str]


def check(recipe: Recipe, *, hash_weights: bool = False) -> Parts:
    """Check a recipe against the files it names. hash_weights also reads the bytes of the weights.

    Without it, no network is asked for a base whose configs come with diffopd: they are enough for a plan.

    Raises UserError for the first thing that is wrong, naming its place, what is allowed and what to do.
    """
    base = _base(recipe, shipped=not hash_weights)
    cards = _cards(recipe)
    train, test = _prompts(recipe, cards)
    _check_given(recipe, cards, base)
    _check_pictures(recipe, cards, train, test)
    _check_resolutions(recipe)
    for card in cards:
        _check_reward(card, must_run=hash_weights)
    _check_packages(recipe)
    _check_backends(recipe, base)
    _check_call_arguments(recipe, base)
    _check_contexts(recipe, base, cards, train)
    grid = check_walk(recipe, base)
    for index, card in enumerate(cards):
        _check_teacher(recipe, index, card, base, shipped=not hash_weights)
    _check_warm_start(recipe, base, cards)
    if recipe.student.train == "lora" and not recipe.student.init_weights:
        lora_size(recipe, copy.deepcopy(base.meta_denoiser))
    _check_evaluation(recipe, test)
    _check_scored_steps(recipe, base)
    hashes = _hashes(recipe, cards) if hash_weights else {}
    return Parts(recipe, base, cards, train, test, grid, hashes)


def _base(recipe: Recipe, *, shipped: bool) -> Blueprint:
    place = recipe.place("student", "pretrained_model_name_or_path")
    try:
        base = read_blueprint(recipe.student.pretrained_model_name_or_path, shipped=shipped)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    _refuse_pickles(base, place)
    return base


def _refuse_pickles(base: Blueprint, place: str) -> None:
    """Local components must have .safetensors weights; those of a hub id are only ever loaded as such."""
    for name in base.configs:
        folder = base.folder / name
        if not (folder / "config.json").is_file() or name in base.weight_files():
            continue
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{place}: {folder} has pickled weights only, which are never loaded. Save the pipeline anew "
                "with save_pretrained(safe_serialization=True)."
            )
        if name == base.denoiser and not _is_hub_snapshot(base.folder):
            raise UserError(f"{place}: {folder} has no .safetensors weights. Save or copy the pipeline anew.")


def _is_hub_snapshot(folder: Path) -> bool:
    return "snapshots" in folder.parts or folder.is_relative_to(PACKAGE / "configs")


def _cards(recipe: Recipe) -> tuple[TeacherCard, ...]:
    cards: list[TeacherCard] = []
    for index, settings in enumerate(recipe.teachers):
        place = recipe.place("teachers", index, "name")
        try:
            card = teacher_card(settings.name, recipe.path)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        twin = next((other for other in cards if other.name == card.name), None)
        if twin:
            raise UserError(
                f"{place}: two teachers are called {card.name!r}: {twin.path} and {card.path}. Rename one card."
            )
        if "ema_decay" in settings.model_fields_set and card.form != "ema":
            raise UserError(
                f"{recipe.place('teachers', index, 'ema_decay')}: ema_decay belongs to a teacher of form "
                f'"ema"; {card.name!r} has form {card.form!r}. Remove it.'
            )
        selves = [other.name for other in (*cards, card) if other.form == "ema"]
        if len(selves) > 1:
            raise UserError(
                f'{place}: {selves[0]!r} and {selves[1]!r} are both of form "ema". The student has one average, so at '
                "most one teacher can be it. Remove one; the prompts of both may go into one teacher's files."
            )
        cards.append(card)
    return tuple(cards)


def _prompts(
    recipe: Recipe, cards: tuple[TeacherCard, ...]
) -> tuple[dict[str, list[PromptRow]], dict[str, list[PromptRow]]]:
    names = [card.name for card in cards]
    read: dict[str, dict[str, list[PromptRow]]] = {"train": {}, "test": {}}
    for card in cards:
        for split, given in (("train", card.prompts.train), ("test", card.prompts.test)):
            for path in card.prompts.files(split):
                check_tasks(read_prompts(path), path, card.name, names)
            read[split][card.name] = read_prompts(given)
    return read["train"], read["test"]


def _check_given(recipe: Recipe, cards: tuple[TeacherCard, ...], base: Blueprint) -> None:
    """Where pictures teach, states are noised ones, and the network's answer is compared: there is no step."""
    given, objective = next((card for card in cards if card.form == "pictures"), None), recipe.objective
    if given is None:
        return
    from diffopd.data_states import can_encode, cannot_encode

    if not can_encode(base.pipeline_class, base.configs.get("vae", {}).get("_class_name", "")):
        raise UserError(
            f"{recipe.place('student', 'pretrained_model_name_or_path')}: {cannot_encode(base.pipeline_class)}"
        )
    allowed = ("velocity", "denoised", "noise")
    wrong = {
        "states": (objective.states != "data", 'states = "data"'),
        "name": (objective.name not in allowed, f"one of {', '.join(allowed)}"),
        "substeps": (objective.substeps > 1, "substeps = 1"),
        "step_weights": (bool(objective.step_weights), "no step_weights"),
    }
    for key, (is_wrong, remedy) in wrong.items():
        if is_wrong:
            raise UserError(
                f"{recipe.place('objective', key)}: objective.{key} = {getattr(objective, key)!r}, but teacher "
                f'{given.name!r} is of form "pictures": noised pictures are compared with what they are. Give {remedy}.'
            )


def _check_pictures(
    recipe: Recipe, cards: tuple[TeacherCard, ...], train: dict[str, list[PromptRow]], test: dict[str, list[PromptRow]]
) -> None:
    """objective.states = "data" noises pictures: every row that may be drawn must name one that is there."""
    if recipe.objective.states != "data":
        return
    checked = recipe.train.batch_size if recipe.train.validate_every else 0
    for card in cards:
        tested = test[card.name][: 0 if card.form == "pictures" else checked]  # checked on its training pictures
        for split, rows in (("train", train[card.name]), ("test", tested)):
            path = " and ".join(map(str, card.prompts.files(split)))
            for number, row in enumerate(rows, start=1):
                name = row.metadata.get("file_name")
                if not isinstance(name, str):
                    place = recipe.place("objective", "states")
                    raise UserError(
                        f"{path}:{number}: the row names no picture, and {place} asks for "
                        'states = "data". Add "file_name" (a path from the prompt file) to every row of a .jsonl '
                        'file, or set objective.states = "student".'
                    )
                if not (row.metadata.get("is_drawn") or Path(name).is_file()):  # some are drawn before the first update
                    raise UserError(f"{path}:{number}: there is no picture {name}.{nearest_sibling(Path(name))}")


def _check_resolutions(recipe: Recipe) -> None:
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


def _check_packages(recipe: Recipe) -> None:
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


def _check_reward(card: TeacherCard, *, must_run: bool) -> None:
    """A task's reward is there; what it needs must be installed only where it will run."""
    missing = check_card_reward(card)
    if missing and must_run:
        raise UserError(
            f"{card.path}: the evaluation needs the reward of {card.name!r}, and that needs {', '.join(missing)}. "
            "Install the extra that docs/teach.md names beside the reward, or give the card another."
        )


def _check_backends(recipe: Recipe, base: Blueprint) -> None:
    """What quantization and attention backend will refuse without having seen a weight, they refuse now."""
    from diffopd.attention import check_attention_backend

    quantization_config(recipe, base.denoiser)
    try:
        check_attention_backend(base.meta_denoiser, recipe.train.attention_backend)
    except UserError as error:
        raise UserError(f"{recipe.place('train', 'attention_backend')}: {error}") from error


def _check_call_arguments(recipe: Recipe, base: Blueprint) -> None:
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


def _check_contexts(
    recipe: Recipe, base: Blueprint, cards: tuple[TeacherCard, ...], rows: dict[str, list[PromptRow]]
) -> None:
    """A teacher's context is one that the pipeline takes, and every training row holds what it shows."""
    for index, (settings, card) in enumerate(zip(recipe.teachers, cards, strict=True)):
        if settings.context is None:
            continue
        place = recipe.place("teachers", index, "context")
        is_enhanced = all("enhanced_prompt" in row.metadata for row in rows[card.name])
        check_context(settings.context.kind, base.pipeline_class, is_enhanced=is_enhanced, place=place)
        lacking = next((row for row in rows[card.name] if not covers(settings.context.kind, row)), None)
        if lacking:
            raise UserError(
                f"{place}: the row of prompt {lacking.prompt!r} in {card.prompts.train} names no picture. Add "
                '"file_name" to every row.'
            )


def lora_size(recipe: Recipe, meta_denoiser: nn.Module) -> int:
    """Parameters of the student's adapter, which is put on a meta denoiser. UserError where it cannot be."""
    student = recipe.student
    _takes_adapters(recipe.place("student", "train"), meta_denoiser)
    try:
        return add_lora_on_meta(meta_denoiser, student.rank, student.target_modules)
    except (ValueError, re.error) as error:
        raise UserError(
            f"{recipe.place('student', 'target_modules')}: target_modules = {student.target_modules!r} gives no LoRA "
            f"on the base's {type(meta_denoiser).__name__}: {error} Name layers of it (such as to_q, conv1), or give "
            "one regular expression for their whole names."
        ) from error


def _takes_adapters(place: str, denoiser: nn.Module) -> None:
    from diffopd.adapters import check_takes_adapters

    try:
        check_takes_adapters(denoiser)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _check_warm_start(recipe: Recipe, base: Blueprint, cards: tuple[TeacherCard, ...]) -> None:
    other = next((card for card in cards if card.form != "lora"), None)
    if recipe.student.begin_from == "teacher_average" and other:
        raise UserError(
            f'{recipe.place("student", "begin_from")}: begin_from = "teacher_average" averages LoRA teachers, but '
            f'{other.name!r} is of form "{other.form}". Convert it with scripts/lowrank_teacher.py, or take "base".'
        )
    spec, place = recipe.student.init_weights, recipe.place("student", "init_weights")
    if spec is None or hub_weights(spec, Path.cwd()):
        return
    _takes_adapters(place, base.meta_denoiser)
    reason = misfit(lora_file(spec, Path.cwd(), place), base)
    if reason:
        raise UserError(f"{place}: {spec} does not fit the base: {reason}. Take a LoRA of this base.")


def _check_evaluation(recipe: Recipe, rows: dict[str, list[PromptRow]]) -> None:
    """A number of prompts that was asked for must be there; the default one means at most."""
    asked = recipe.evaluate.num_prompts if "num_prompts" in recipe.evaluate.model_fields_set else 1
    for name, held_out in rows.items():
        if len(held_out) < asked:
            raise UserError(
                f"{recipe.place('evaluate', 'num_prompts')}: num_prompts = {asked}, but teacher {name!r} has "
                f"{len(held_out)} test prompts. Ask for at most {len(held_out)}, or give it more."
            )


def _check_scored_steps(recipe: Recipe, base: Blueprint) -> None:
    """The student can be called with the number of steps that it is to be scored at."""
    steps, place = recipe.evaluate.student_steps, recipe.place("evaluate", "student_steps")
    if steps is None:
        return
    given = sorted({"sigmas", "timesteps"} & set(recipe.student.call))
    if given:
        raise UserError(
            f"{place}: student_steps = {steps} asks for another grid than student.call.{given[0]}, which gives the "
            "student's step by step. Remove one of the two."
        )
    try:
        grid_of(recipe, base, make_scheduler(recipe, base), steps)
    except UserError as error:
        raise UserError(f"{place}: the student cannot be called with student_steps = {steps}: {error}") from error


def _check_teacher(recipe: Recipe, index: int, card: TeacherCard, base: Blueprint, *, shipped: bool) -> None:
    """The teacher stands on the student's architecture and latent space, and its weights can be loaded."""
    place = recipe.place("teachers", index, "name")
    try:
        own = read_blueprint(card.base, shipped=shipped)
    except UserError as error:
        raise UserError(f"{card.place('base')}: {error}") from error
    if own.folder.resolve() != base.folder.resolve():
        _same_states(place, card, own, base)
    if card.form == "lora":
        _takes_adapters(card.place("form"), base.meta_denoiser)
    if card.weights is None or card.hub_weights:
        return
    path = card.weights_path()
    if card.form == "lora":
        reason = misfit(path, base)
        if reason:
            raise UserError(
                f"{card.place('weights')}: teacher {card.name!r} does not fit the base: {reason}. Take a teacher "
                f"that was trained on {recipe.student.pretrained_model_name_or_path}."
            )
    if card.form == "full":
        _full_fits(card, path, base)


def _same_states(place: str, card: TeacherCard, own: Blueprint, base: Blueprint) -> None:
    """Raise unless the configs that define states and conditions agree."""
    for part, keys in STATE_KEYS.items():
        mine = own.denoiser_config if part == "denoiser" else own.configs.get(part, {})
        others = base.denoiser_config if part == "denoiser" else base.configs.get(part, {})
        if card.form == "lora" and part == "denoiser":  # an adapter needs the very same layers
            keys = sorted({key for key in {*mine, *others} if not key.startswith("_")} - {"sample_size"})
            keys = ["_class_name", *keys]
        for key in keys:
            if mine.get(key) != others.get(key):
                raise UserError(
                    f"{place}: teacher {card.name!r} cannot stand at the student's states: {part} {key} is "
                    f"{mine.get(key)!r} in its base {card.base}, {others.get(key)!r} in the student's. "
                    "Take a teacher of the student's base."
                )


def _full_fits(card: TeacherCard, path: Path, base: Blueprint) -> None:
    """A full denoiser must take and give what the base's does."""
    if (path / "config.json").is_file():
        own = read_json(path / "config.json")
        for key in STATE_KEYS["denoiser"]:
            if own.get(key) != base.denoiser_config.get(key):
                raise UserError(
                    f"{card.place('weights')}: teacher {card.name!r} cannot stand at the student's states: "
                    f"its denoiser's {key} is {own.get(key)!r}, the base's is {base.denoiser_config.get(key)!r}. "
                    "Take a teacher of the student's base."
                )
        return
    shapes = {name: shape for file in weight_files(path) for name, shape in tensor_shapes(file).items()}
    expected = {name: tuple(p.shape) for name, p in base.meta_denoiser.state_dict().items()}
    different = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{card.place('weights')}: teacher {card.name!r} does not fit the base's {base.denoiser}: {name} "
            f"is {shapes.get(name, 'absent')}, expected {expected.get(name, 'absent')} ({len(different)} "
            "tensors differ). A checkpoint of another shape needs its config.json beside it."
        )


def _hashes(recipe: Recipe, cards: tuple[TeacherCard, ...]) -> dict[str, str]:
    """file -> sha256 of all that a run begins with: the base, a warm start, teachers' weights, prompts and rewards.

    Raises UserError for weights of a teacher that are not those of its card.
    """
    folder = find_pipeline(recipe.student.pretrained_model_name_or_path)  # of a hub id, now with its weights
    hashes = {f"base/{file}": digest for file, digest in pipeline_hashes(folder).items()}
    warm, here = recipe.student.init_weights, Path.cwd()
    if warm and not hub_weights(warm, here):
        hashes["init_weights"] = weights_sha256(lora_file(warm, here, recipe.place("student", "init_weights")))
    for card in cards:
        digest = card.digest()
        hashes |= {f"{card.name}/{card.weights}": digest} if digest else {}
    for card in cards:
        hashes |= {f"{card.name}: {what}": digest for what, digest in card.task_hashes().items()}
    return hashes
