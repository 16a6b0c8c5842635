"""What one update of teaching needs: the taught model, the old policy and the base over one trunk, and what scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from diffopd import noise
from diffopd.adapters import SELF_TEACHER, STUDENT, AdapterSwitch, Average, Fold
from diffopd.assemble import Student, assemble, self_teacher, with_denoiser
from diffopd.blueprint import read_blueprint
from diffopd.data import PromptRow, read_prompts
from diffopd.distill import INITIAL
from diffopd.drive import Call, Survey, denoiser_of, shell, survey
from diffopd.grid import make_scheduler
from diffopd.learning import Sides
from diffopd.processes import Processes, default_device, join_processes
from diffopd.recipe import TeacherSettings
from diffopd.reward import card_reward, picture_function, reward_of
from diffopd.reward_watch import RewardWatch, watched_tasks
from diffopd.teach_recipe import TeachRecipe
from diffopd.teacher import Reward

Follow = tuple[Average, dict[str, nn.Parameter]]


@dataclass
class TeachRun:
    """What one update needs. files: the training rows of each prompt file.

    pictures: for supervised teachers, rows and seeds to B PIL images (None: from files).
    """

    recipe: TeachRecipe
    student: Student
    sides: Sides
    follow: Follow | None
    walk: Survey
    files: list[list[PromptRow]]
    reward: Reward | None
    watch: RewardWatch
    processes: Processes
    device: str
    pictures: Callable[..., list[object]] | None = None
    teachers: list[object] = field(default_factory=list)  # of a distillation run; here there are none
    looks: None = None  # of a tuning run
    fold: Fold | None = None

    def noise(self, update: int, solver_step: int, numbers: list[int]) -> Tensor:
        """Standard normal (B, ...), a function of (seed, update, solver_step, picture's number)."""
        keys = {"run_seed": self.recipe.seed, "update": update, "solver_step": solver_step, "sample_indices": numbers}
        shape = self.walk.latents_shape if solver_step == INITIAL else self.walk.shape
        return noise.draw(shape, **keys).to(self.device)

    def row(self, update: int, number: int) -> PromptRow:
        """The prompt of a picture, which its group shares; every pass over a file is a permutation."""
        began, file = self.recipe.file_at(update, len(self.files))
        turn = (update - began) * self.recipe.sampling.num_prompts + number // self.recipe.group_size
        if file is None:
            turn, file = divmod(turn, len(self.files))
        rows = self.files[file]
        epoch, place = divmod(turn, len(rows))
        return rows[noise.permuted(place, len(rows), self.recipe.seed, epoch, self.recipe.card.name)]

    def batches(self, numbers: list[int]) -> Iterator[list[int]]:
        """Consecutive micro-batches of at most train.batch_size."""
        size = self.recipe.train.batch_size
        return (numbers[start : start + size] for start in range(0, len(numbers), size))


def assemble_run(recipe: TeachRecipe) -> TeachRun:
    """Load what a run needs, rewards first: what they lack is said before a weight of the base is read.

    Raises UserError for anything that is missing or does not fit.
    """
    processes, device = join_processes(), default_device()  # first: rewards must find this process's own GPU
    reward = None if recipe.is_supervised else reward_of(recipe)
    own = card_reward(recipe.card) if recipe.rewards else None
    tasks, pictures = watched_tasks(recipe, reward), picture_function(recipe)
    student, _ = assemble(recipe, device)
    old, base, follow = _other_sides(recipe, student)
    files = [read_prompts(file) for file in recipe.card.prompts.files("train")]
    return TeachRun(
        recipe=recipe,
        student=student,
        sides=Sides(student.call, old, base if recipe.estimator.reference_weight else None),
        follow=follow,
        walk=survey(student.call.prompted([files[0][0].prompt])),
        files=files,
        reward=reward,
        watch=RewardWatch(tasks, _deployed(recipe, student.call), _deployed(recipe, base), recipe, own),
        processes=processes,
        device=device,
        pictures=pictures,
    )


def _deployed(recipe: TeachRecipe, call: Call) -> Call:
    """The call at the card's steps and guidance, whatever it is sampled with while it is taught."""
    card, pipeline = recipe.card, call.pipeline
    if recipe.student.scheduler:
        bare = recipe.student.model_copy(update={"scheduler": {}})
        pipeline = shell(pipeline)
        pipeline.scheduler = make_scheduler(recipe.model_copy(update={"student": bare}), read_blueprint(card.base))
    told = {"num_inference_steps": card.num_inference_steps, "guidance_scale": card.guidance_scale}
    return Call(pipeline, {**call.arguments, **told}, call.binding)


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
