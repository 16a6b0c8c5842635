"""Scores of adapters, averages and solvers on held-out prompts, measured once and kept; pictures drawn by teachers."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproduce_runs import Cost, Setup, kept

from diffopd import noise
from diffopd.adapters import AdapterSwitch
from diffopd.data import asked_of, read_prompts
from diffopd.drive import Call, denoiser_of, shell, survey
from diffopd.evaluate import Contender, Task, card_results, measure, pictures, reference_contenders, tasks_of
from diffopd.load import load_lora
from diffopd.locate import shelf
from diffopd.metrics import bootstrap_interval
from diffopd.objective import get_objective
from diffopd.recipe import Recipe, read_recipe
from diffopd.run_folder import atomic_write
from diffopd.sampling import sample, score
from diffopd.supervise import Manner
from diffopd.teacher import TeacherCard, file_sha256, teacher_card
from diffopd.trajectory import PROMPTS_PER_TEACHER

TASKS = ("composition", "text", "style")
DEPLOYED = (4, 1.0)  # steps and guidance of together.toml's student
NATIVE = ("native", 0.0)  # the pipeline's own scheduler
WALKS = 2**31 + 80  # noise key of walks by a named solver: no update of a run ever has this number
Scores = dict[str, list[float]]  # task -> a score per prompt


@dataclass
class Scorer:
    """Base, teachers and held-out tasks, loaded when first asked for; results lie in output/scores.

    What the teachers' cards say of base and teachers under these very conditions is taken from there.
    """

    setup: Setup
    _loaded: list[str] = field(default_factory=list)
    _fewer: dict[int, Scorer] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> Recipe:
        """together.toml with this many held-out prompts."""
        held_out = self.setup.held_out
        return read_recipe("together", [f"evaluate.num_prompts={held_out}", f"evaluate.batch_size={min(held_out, 50)}"])

    @cached_property
    def cards(self) -> list[TeacherCard]:
        """The three teachers' cards."""
        return [teacher_card(name, shelf("teachers")) for name in TASKS]

    @cached_property
    def tasks(self) -> list[Task]:
        """Their held-out prompts and rewards."""
        return tasks_of(self.cards, self.setup.held_out)

    @cached_property
    def references(self) -> list[Contender]:
        """Base, average and teachers over one trunk."""
        return reference_contenders(self.recipe, self.cards)

    def adapter(
        self,
        file: Path,
        at: tuple[int, float] = DEPLOYED,
        walk: tuple[str, float] = NATIVE,
        tasks: Sequence[str] = TASKS,
    ) -> Scores:
        """What the base with this adapter scores at (steps, guidance), walked by (solver, noise level)."""
        key = ["adapter", file_sha256(file), at, walk, list(tasks)]
        return self._kept(key, lambda: self._scored(self._of_adapter(file, at), walk, tasks))

    def reference(
        self, model: str, at: tuple[int, float], walk: tuple[str, float] = NATIVE, tasks: Sequence[str] = TASKS
    ) -> Scores:
        """What "base", "average" or "teacher:NAME" scores at (steps, guidance), walked by (solver, noise level)."""
        key = ["reference", model, [card.digest() for card in self.cards], at, walk, list(tasks)]
        return self._kept(key, lambda: self._scored(self._reference(model, at), walk, tasks))

    def few(self, prompts: int) -> Scorer:
        """A scorer on fewer held-out prompts."""
        if prompts not in self._fewer:
            told = replace(self.setup, prompts=min(prompts, self.setup.prompts))
            self._fewer[prompts] = Scorer(told)
        return self._fewer[prompts]

    def drawn(self, file: Path | None, at: tuple[int, float], task: str, count: int) -> np.ndarray:
        """A row (H, count W, 3) of the first held-out prompts, drawn by the base with this adapter, None: without."""
        contender = self._reference("base", at) if file is None else self._of_adapter(file, at)
        rows = next(one.rows for one in self.tasks if one.name == task)[:count]
        (images,) = pictures(contender, rows, task, 0, count)
        return np.concatenate([np.asarray(image) for image in images], axis=1)

    def _reference(self, model: str, at: tuple[int, float]) -> Contender:
        call = next(contender.call for contender in self.references if contender.model == model)
        return Contender(model, call, *at)

    def _of_adapter(self, file: Path, at: tuple[int, float]) -> Contender:
        trunk = self.references[0].call.pipeline  # the base's shell: its adapters are off unless bound
        name = f"scored{len(self._loaded)}"
        self._loaded.append(name)
        load_lora(trunk, str(file), name)
        switch = AdapterSwitch(denoiser_of(trunk))
        return Contender(name, Call(shell(trunk), {}, lambda: switch.bound(name)), *at)

    def _scored(self, contender: Contender, walk: tuple[str, float], tasks: Sequence[str]) -> Scores:
        asked = [task for task in self.tasks if task.name in tasks]
        if walk == NATIVE:
            known = card_results(self.recipe, self.cards, asked, [contender])
            missing = [(contender, task) for task in asked if (contender.key, task.name) not in known]
            return {result.task: result.scores for result in [*known.values(), *measure(missing, self.recipe)]}
        return {task.name: self._walked(contender, task, *walk) for task in asked}

    def _walked(self, contender: Contender, task: Task, solver: str, noise_level: float) -> list[float]:
        """A score per prompt; the draws are a function of the prompt's place, the same for all models and solvers."""
        told = {"num_inference_steps": contender.num_inference_steps, "guidance_scale": contender.guidance_scale}
        call, scores, size = contender.call.told(**told), [], self.recipe.evaluate.batch_size
        place = survey(call.prompted([task.rows[0].prompt]))
        manner = Manner(get_objective("mean"), range(place.num_visits), solver, noise_level)
        for start in range(0, len(task.rows), size):
            rows = task.rows[start : start + size]
            numbers = list(range(start, start + len(rows)))
            keys = {"run_seed": 0, "update": WALKS, "sample_indices": numbers}
            draw = partial(noise.draw, **keys, device=call.pipeline.device)
            latents = draw(place.latents_shape, solver_step=0)
            _, images = sample(call, rows, numbers, latents=latents, noise=_steps(draw, place.shape), manner=manner)
            scores += score(task.reward, images, rows).tolist()
        return scores

    def _kept(self, key: list[Any], measured: Any) -> Scores:
        key = [*key, self.setup.held_out, [card.task_hashes() for card in self.cards]]
        return kept(self.setup, "scores", key, measured)


def _steps(draw: Callable[..., Any], shape: tuple[int, ...]) -> Callable[[int], Any]:
    return lambda index: draw(shape, solver_step=index + 1)


def drawn_by_teachers(scorer: Scorer, count: int, seed: int) -> tuple[Path, Cost]:
    """A folder with copies of the teachers and of unmade/joint whose training rows name pictures that a teacher drew.

    `count` prompts of each task, drawn by its teacher as its card deploys it. Returns it with what the drawing cost,
    without the few held-out ones whose trajectories a run's report shows.
    """
    folder = scorer.setup.output / f"samples-{count}-seed{seed}"
    done = folder / "cost.json"
    if done.is_file():
        return folder, Cost(**json.loads(done.read_text()))
    began, calls, apart = time.monotonic(), 0, 0.0
    for card in scorer.cards:
        at = (card.num_inference_steps, card.guidance_scale)
        target = _copied(card, folder / card.name) / "prompts"
        rows = read_prompts(card.prompts.train)[:count]
        _write_drawn(target / "train.jsonl", rows, scorer._reference(f"teacher:{card.name}", at), seed)
        calls += len(rows) * at[0] * (2 if at[1] > 1 else 1)
        trained = time.monotonic()
        shown = read_prompts(card.prompts.test)[:PROMPTS_PER_TEACHER]
        _write_drawn(target / "test.jsonl", shown, scorer._reference(f"teacher:{card.name}", at), seed)
        apart += time.monotonic() - trained
    _copied(teacher_card("unmade/joint", shelf("teachers")), folder / "joint")
    _point_at(folder, [card.name for card in scorer.cards])
    cost = Cost(0, time.monotonic() - began - apart, 3 * count, calls)
    atomic_write(done, json.dumps(dict(zip(("updates", "seconds", "images", "calls"), cost.values(), strict=True))))
    return folder, cost


def _copied(card: TeacherCard, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(card.folder, target)
    text = (target / "teacher.toml").read_text().replace("../world.py", str(shelf("teachers") / "world.py"))
    (target / "teacher.toml").write_text(text)
    return target


def _write_drawn(file: Path, rows: Sequence[Any], teacher: Contender, seed: int) -> None:
    """`file` anew, of these rows, each with the picture that the teacher draws of it."""
    drawn, lines = file.parent / f"drawn-{file.stem}", []
    drawn.mkdir()
    images = (image for batch in pictures(teacher, rows, file.parents[1].name, seed, 32) for image in batch)
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        image.save(drawn / f"{number}.png")
        lines.append(json.dumps({"prompt": row.prompt, **row.metadata, "file_name": f"{drawn.name}/{number}.png"}))
    file.write_text("\n".join(lines) + "\n")


def _point_at(folder: Path, names: list[str]) -> None:
    """The joint card's prompts are the copies', its reward the shelf's; and how it is taught from their pictures."""
    joint, top = folder / "joint", shelf("teachers")
    text = (joint / "teacher.toml").read_text()
    for name in names:
        text = text.replace(f'"../../{name}/prompts/train.jsonl"', f'"../{name}/prompts/train.jsonl"')
        text = text.replace(f'"../../{name}/prompts/test.jsonl"', f'"{top / name / "prompts" / "test.jsonl"}"')
    text = text.replace('"reward.py:', f'"{top / "unmade" / "joint" / "reward.py"}:')
    (joint / "teacher.toml").write_text(text)
    (joint / "supervised.toml").write_text(supervised((joint / "nft.toml").read_text()))


def supervised(nft: str) -> str:
    """The toml of joint reinforcement learning as one of learning from pictures, at the rate of the teachers' own."""
    student = nft[nft.index("[student]") : nft.index("[estimator]")]
    rest = re.sub(r"(?m)^learning_rate = .*$", "learning_rate = 2e-3", nft[nft.index("[train]") :])
    return f'{student}[estimator]\nname = "supervised"\n\n[sampling]\nnum_prompts = 32\n\n{rest}'


def mean_of(scores: Scores) -> dict[str, float]:
    """task -> mean over prompts, and "average" of them."""
    means = {task: float(np.mean(values)) for task, values in scores.items()}
    return means | {"average": sum(means.values()) / len(means)}


def apart(ones: Sequence[Scores], others: Sequence[Scores], tasks: Sequence[Task]) -> str:
    """Average over tasks of `ones` less `others`, paired by prompt and training, with its 95 % interval over both.

    Tasks have as many prompts each, and are not drawn: each one's mean is taken out before, so that it adds no spread.
    """
    by_task = [
        np.array([np.subtract(one[task.name], other[task.name]) for one, other in zip(ones, others, strict=True)])
        for task in tasks
    ]
    mean = np.mean([held.mean() for held in by_task])
    level = np.concatenate([held - held.mean() + mean for held in by_task], axis=1)
    groups = [(task.name, asked) for task in tasks for asked in asked_of(task.rows)]
    low, high = bootstrap_interval(level, groups=groups)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def quiet() -> None:
    """One thread, as all figures here are made."""
    torch.set_num_threads(1)
