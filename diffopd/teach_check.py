"""A teach.toml against the files it names, before any weight is loaded; and what `teach --dry-run` prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffopd.blueprint import BYTES
from diffopd.buckets import called_size, known_size
from diffopd.data import PromptRow, read_prompts
from diffopd.errors import UserError
from diffopd.grid import draws_noise, make_scheduler
from diffopd.image_file import BadPicture, examine
from diffopd.plan import Plan, levels, make_plan, memory_heading, memory_table, process_facts, visited
from diffopd.preflight import Parts, check
from diffopd.reward import (
    check_card_reward,
    check_card_rows,
    check_reward,
    check_rows,
    missing_weights,
    picture_function,
    reward_hashes,
    terms_of,
    try_card_reward,
    try_reward,
)
from diffopd.reward_watch import watched_cards
from diffopd.teach_recipe import POLICY_GRADIENT, TeachRecipe
from diffopd.teacher import TeacherCard

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class TeachParts:
    """What a teach.toml names, found and checked.

    rows: to train on; held_out: how many prompts are; missing: packages of rewards that are still to be installed.
    """

    recipe: TeachRecipe
    parts: Parts
    rows: list[PromptRow]
    held_out: int
    missing: list[str]
    hashes: dict[str, str]


def check_teach(recipe: TeachRecipe, *, hash_weights: bool = False) -> TeachParts:
    """Check a teach.toml. hash_weights also reads the bytes of the base's weights.

    Raises UserError for the first thing that is wrong, naming its place, what is allowed and what to do.
    """
    parts = check(recipe, hash_weights=hash_weights)
    card = recipe.card
    rows = read_prompts(card.prompts.train)
    held_out = read_prompts(card.prompts.test)
    if "num_prompts" in recipe.evaluate.model_fields_set and len(held_out) < recipe.evaluate.num_prompts:
        raise UserError(
            f"{recipe.place('evaluate', 'num_prompts')}: num_prompts = {recipe.evaluate.num_prompts}, but "
            f"{card.name!r} has {len(held_out)} test prompts. Ask for at most {len(held_out)}, or give it more."
        )
    if recipe.estimator.name in POLICY_GRADIENT:
        _check_noise(recipe, parts)
    missing = [] if recipe.is_supervised else check_reward(recipe)
    missing += [name for scored in (card, *watched_cards(recipe)) for name in check_card_reward(scored)]
    if not recipe.is_supervised:
        check_rows(recipe, download=hash_weights)
    for scored in _scored_by_cards(recipe):
        check_card_rows(scored, download=hash_weights)
    picture_function(recipe)
    if recipe.is_supervised and not recipe.pictures:
        _check_files(recipe)
    hashes = {**parts.hashes, **_task_hashes(recipe)} if hash_weights else {}
    return TeachParts(recipe, parts, rows, len(held_out), list(dict.fromkeys(missing)), hashes)


def try_teach_rewards(found: TeachParts) -> None:
    """Call each function that teaches or scores once, on blank pictures. As `preflight.try_rewards`."""
    recipe, base = found.recipe, found.parts.base
    if base.is_video:
        return
    size = called_size(recipe.student.call, base)
    if not recipe.is_supervised:
        try_reward(recipe, found.rows, size)
    for scored in _scored_by_cards(recipe):
        try_card_reward(scored, read_prompts(scored.prompts.test), size)


def _scored_by_cards(recipe: TeachRecipe) -> list[TeacherCard]:
    """The cards whose rewards score held-out rows beside what teaches, which may be the taught card's own."""
    is_taught_by = not recipe.is_supervised and not recipe.rewards
    return [*([] if is_taught_by else [recipe.card]), *watched_cards(recipe)]


def _task_hashes(recipe: TeachRecipe) -> dict[str, str]:
    card = recipe.card
    return {f"{card.name}: {what}": digest for what, digest in card.task_hashes().items()} | reward_hashes(recipe)


def _check_noise(recipe: TeachRecipe, parts: Parts) -> None:
    """A policy gradient needs steps that draw noise, and a step that depends on its state alone."""
    scheduler, name = make_scheduler(recipe, parts.base), recipe.estimator.name
    if not draws_noise(recipe, scheduler):
        raise UserError(
            f"{recipe.place('student', 'solver')}: estimator {name!r} needs a walk that draws noise, but this one "
            f"({type(scheduler).__name__}, solver {recipe.student.solver!r}, noise_level "
            f"{recipe.student.noise_level:g}) is deterministic. Set student.solver to ddim, flow_sde or dance_sde with "
            "student.noise_level above 0, or take estimator nft."
        )
    is_multistep = scheduler.config.get("solver_order", 1) > 1
    if recipe.student.solver == "native" and is_multistep:
        raise UserError(
            f"{recipe.place('student', 'scheduler')}: the steps of {type(scheduler).__name__} with solver_order = "
            f"{scheduler.config['solver_order']} depend on earlier predictions, so estimator {name!r} has no ratio "
            "for one step alone. Set student.scheduler.solver_order = 1, or name a solver."
        )


def _placed_rows(recipe: TeachRecipe) -> list[tuple[str, PromptRow]]:
    """The training rows with "file:line" of each."""
    return [
        (f"{file}:{number}", row)
        for file in recipe.card.prompts.files("train")
        for number, row in enumerate(read_prompts(file), start=1)
    ]


def _check_files(recipe: TeachRecipe) -> None:
    for place, row in _placed_rows(recipe):
        name = row.metadata.get("file_name")
        if not isinstance(name, str) or not Path(name).is_file():
            wrong = f"its picture {name} is not there" if isinstance(name, str) else 'it names no picture ("file_name")'
            raise UserError(
                f"{place}: a supervised teacher learns from pictures, but {wrong}. Give "
                'every row one, beside the prompt file, or set pictures = "file.py:function" in '
                f"{recipe.path.name}."
            )


def open_pictures(found: TeachParts) -> None:
    """Open the picture of every training row to its end; all must have one size, that of the call where it is known.

    A row's "bucket" (width, height) is what its picture is fitted to. Raises UserError naming file, line and picture.
    """
    from rich.progress import track

    recipe = found.recipe
    if not recipe.is_supervised or recipe.pictures:
        return
    size = known_size(recipe.student.call, found.parts.base)
    draws = f"and this pipeline draws {size[0]} x {size[1]}" if size else ""
    rows = _placed_rows(recipe)
    for place, row in track(rows, "pictures", transient=True, disable=len(rows) < MANY):
        name = row.metadata["file_name"]
        try:
            opened = examine(Path(name)).size
        except BadPicture as error:
            raise UserError(f"{place}: the picture {name} {error}") from error
        fitted = row.bucket or opened
        size = size or fitted
        if fitted != size:
            raise UserError(
                f"{place}: the picture {name} has {fitted[0]} x {fitted[1]} pixels, "
                f"{draws or f'the ones before it {size[0]} x {size[1]}'}. Crop or scale it, or set student.call.width "
                "and student.call.height."
            )


MANY = 200  # pictures that take a while to open
UNCOUNTED = (
    "not in the sum: networks of rewards, workspace of kernels, gradients of activations, and for grpo the steps that "
    "are recorded of every picture of an update (three states of the picture's latents each)"
)
ORDER = {"in_turn": "", "one_after_another": ", one file after another, each for its part of the updates"}


def render_teach(found: TeachParts, processes: int = 1) -> RenderableType:
    """The plan as a person reads it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    recipe, plan = found.recipe, make_plan(found.parts)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, value in _facts(found, plan, processes):
        facts.add_row(name, Text(value))  # a path may have brackets
    title = Text(f"Plan of teaching {recipe.card.name} ({recipe.path})", "bold")
    memory = memory_table(plan.memory | _other_sides(plan))
    unsure = [Text(f"  {sentence}") for sentence in (*plan.held.unsure, UNCOUNTED)]
    return Group(title, facts, Text(""), Text(memory_heading(plan), "bold"), memory, *unsure)


def _other_sides(plan: Plan) -> dict[str, int]:
    """Item -> bytes of what an estimator holds beside the trained weights (`teach_run.assemble_run`)."""
    copied = plan.num_parameters if plan.recipe.student.train == "full" else plan.num_trained
    is_held = plan.recipe.estimator.name == "nft"
    return {"old policy": BYTES * (copied + plan.num_trained)} if is_held else {}  # and the average that it follows


def evaluations(plan: Plan) -> dict[str, float]:
    """Side -> rows that its network computes in one update, as metrics.jsonl counts them.

    Where a policy gradient's query names steps without noise, what is learnt from is less by them.
    """
    recipe, walk = plan.recipe, plan.visits
    _, asked = visited(recipe, walk)
    learnt = recipe.num_pictures * asked * plan.student_rows
    found = {} if recipe.is_supervised else {"rollout": recipe.num_pictures * walk * plan.student_rows}
    found["student"] = learnt
    if recipe.estimator.name == "nft":
        found["old"] = learnt
    if recipe.estimator.reference_weight:
        found["base"] = learnt
    return found


def _facts(found: TeachParts, plan: Plan, processes: int) -> list[tuple[str, str]]:
    recipe = found.recipe
    train, sampling = recipe.train, recipe.sampling
    student, estimator = recipe.student, recipe.estimator
    what = f"LoRA, rank {student.rank}, alpha {student.lora_alpha}" if student.train == "lora" else "all weights"
    solver = plan.scheduler if student.solver == "native" else f"{student.solver}, noise {student.noise_level:g}"
    ends = [f"{train.max_train_steps} updates"] if train.max_train_steps else []
    ends += [f"{train.max_train_seconds:g} s"] if train.max_train_seconds else []
    pictures = recipe.pictures or "the files of the prompt rows"
    reward = " + ".join(f"{term.weight:g} x {term.reward}" for term in terms_of(recipe))
    calls = ", ".join(f"{side} {count:g}" for side, count in evaluations(plan).items())
    is_drawn = isinstance(recipe.objective.query, dict) and "random" in recipe.objective.query  # among noisy steps
    left_out = "; steps without noise are left out" if estimator.name in POLICY_GRADIENT and not is_drawn else ""
    scored = min(found.held_out, recipe.evaluate.num_prompts)
    watched = [*([recipe.card.name] if recipe.rewards else []), *(card.name for card in watched_cards(recipe))]
    distance = "" if recipe.is_supervised else f", {estimator.reference_weight:g} x distance from the base"
    lines = [
        ("trained", f"{what}: {plan.num_trained:,} of {plan.num_parameters:,} denoiser parameters"),
        ("base", f"{student.pretrained_model_name_or_path} ({plan.pipeline_class})"),
        ("estimator", f"{estimator.name}{distance}"),
        ("walk", f"{student.num_inference_steps} steps of {solver}, guidance {student.guidance_scale:g}"),
        *levels(plan.grid),
        ("learns at", f"query {recipe.objective.query} of these states"),
        ("pictures", pictures) if recipe.is_supervised else ("reward", reward),
        (
            "update",
            f"{sampling.num_prompts} prompts x {recipe.group_size} pictures, {sampling.optimizer_steps} optimizer step"
            + "s" * (sampling.optimizer_steps > 1)
            + f", learning rate {train.learning_rate:g}",
        ),
        ("evaluations", f"{calls} an update (student with backward){left_out}"),
        (
            "prompts",
            f"{len(found.rows)} to train on{ORDER[sampling.prompt_files]}, {scored} of {found.held_out} held out",
        ),
        (
            "watched",
            ", ".join(["reward", *watched, "drift", "diversity"]) if train.validate_every else "nothing",
        ),
        ("ends after", " or ".join(ends)),
        *process_facts(processes),
        ("output_dir", recipe.output_dir),
    ]
    unmade = missing_weights(recipe, watched_cards(recipe))
    lines += [("to install", f"{', '.join(found.missing)}: a reward needs it")] if found.missing else []
    return lines + ([("to put there", ", ".join(unmade))] if unmade else [])
