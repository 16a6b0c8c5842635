"""Watching for reward hacking: what the reward does not see, on held-out prompts.

Beside the reward that is trained on: the scores of other teachers' tasks, how far the model has moved from the base
at the states it visits, and how much its pictures still differ from each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffopd import noise
from diffopd.data import PromptRow, read_prompts
from diffopd.drive import Call, Survey, survey
from diffopd.errors import UserError
from diffopd.evaluate import Contender, Task, pictures
from diffopd.metrics import diversity
from diffopd.objective import get_objective
from diffopd.reward import card_reward
from diffopd.sampling import score
from diffopd.supervise import Manner, supervise
from diffopd.teach_recipe import TeachRecipe
from diffopd.teacher import Reward, TeacherCard, teacher_card

DRIFT = 2**31 + 48  # noise key of the walks on which drift is measured: no update of a run ever has this number
KEPT = 64


@dataclass(frozen=True)
class RewardWatch:
    """The tasks to be scored, the taught one first; calls of the taught model and of the base at its deployment.

    own: the taught card's reward, where another one is trained on.
    """

    tasks: tuple[Task, ...]
    taught: Call
    base: Call
    recipe: TeachRecipe
    own: Reward | None = None

    def look(self) -> dict[str, float]:
        """ "reward", the scores of the others by name, "drift" and "diversity"; means over prompts and seeds.

        Under its card's name the taught task's own score, where another reward is trained on.
        """
        taught, *others = self.tasks
        own = {self.recipe.card.name: self.own} if self.own else {}
        images, found = self._score(taught, {taught.name: taught.reward, **own})
        found["diversity"] = diversity(images)
        for task in others:
            found |= self._score(task, {task.name: task.reward})[1]
        return {**found, "drift": self._drift(taught.rows)}

    def _score(self, task: Task, rewards: dict[str, Reward]) -> tuple[list[object], dict[str, float]]:
        """The first pictures of a task, and the mean of each reward over all of them."""
        card, settings = self.recipe.card, self.recipe.evaluate
        call = self.taught.told(output_type="pil")
        contender = Contender("taught", call, card.num_inference_steps, card.guidance_scale)
        kept, scores = [], {name: [] for name in rewards}
        for seed in settings.seeds:
            place = 0
            for images in pictures(contender, task.rows, task.name, seed, settings.batch_size):
                for name, reward in rewards.items():
                    scores[name].append(score(reward, images, task.rows[place : place + len(images)]))
                kept += images[: max(0, KEPT - len(kept))]
                place += len(images)
        return kept, {name: float(torch.cat(held).mean()) for name, held in scores.items()}

    def _drift(self, rows: list[PromptRow]) -> float:
        """Mean |v - v_base|^2 over the states that the taught model visits on the first batch of held-out prompts."""
        rows = rows[: self.recipe.evaluate.batch_size]
        prompts = [row.prompt for row in rows]
        place = survey(self.taught.prompted(prompts[:1]))
        manner = Manner(get_objective("velocity", None, "native"), range(place.num_visits))
        drawn = _noise(place, self.recipe.seed, len(rows), self.taught)
        sides = [call.prompted(prompts, latents=drawn(0)) for call in (self.taught, self.base)]
        losses = supervise(*sides, manner=manner, noise=lambda index: drawn(index + 1), backward=None)
        return sum(float(state.loss.double().mean()) for state in losses) / len(losses)


def _noise(place: Survey, seed: int, count: int, call: Call) -> Callable[[int], torch.Tensor]:
    def drawn(solver_step: int) -> torch.Tensor:
        keys = {"run_seed": seed, "update": DRIFT, "solver_step": solver_step, "sample_indices": range(count)}
        shape = place.shape if solver_step else place.latents_shape
        return noise.draw(shape, **keys).to(call.pipeline.device)

    return drawn


def watched_tasks(recipe: TeachRecipe, reward: Reward | None) -> tuple[Task, ...]:
    """The taught task under the reward that is trained on (the card's, where there is none), then the others.

    Raises UserError as `watched_cards`, and for packages or weights of a reward that are missing.
    """
    card, count = recipe.card, recipe.evaluate.num_prompts
    tasks = [Task("reward", read_prompts(card.prompts.test)[:count], reward or card_reward(card))]
    for other in watched_cards(recipe):
        tasks.append(Task(other.name, read_prompts(other.prompts.test)[:count], card_reward(other)))
    return tuple(tasks)


def watched_cards(recipe: TeachRecipe) -> list[TeacherCard]:
    """The cards of the other tasks. Raises UserError for a teacher that is not there or is the taught one."""
    cards: list[TeacherCard] = []
    for name in recipe.watch:
        try:
            other = teacher_card(name, recipe.path)
        except UserError as error:
            raise UserError(f"{recipe.place('watch')}: {error}") from error
        if other.name in ("reward", "drift", "diversity", recipe.card.name, *(card.name for card in cards)):
            raise UserError(f"{recipe.place('watch')}: {other.name!r} is watched anyway, or twice. Remove it.")
        cards.append(other)
    return cards
