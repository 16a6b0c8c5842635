"""Scores of base, teachers and student on the same held-out prompts with the same seeds.

Every model is asked for every task, at its own settings. Scores of shipped references (base and teachers) come from
their cards when weights, prompts, rewards and calls are those of the card; `everything` measures them again, and the
weight average of the teachers with them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from diffopd import noise, sampling
from diffopd.adapters import STUDENT, AdapterSwitch, freeze
from diffopd.assemble import own_denoisers, own_guidance, student_arguments, with_denoiser, with_scheduler
from diffopd.blueprint import pipeline_hashes
from diffopd.data import PromptRow, asked_of, read_prompts
from diffopd.drive import Call, denoiser_of, shell, survey
from diffopd.load import LORA_FILE, checkpoint_of, load_lora, load_pipeline, student_pipeline
from diffopd.locate import find_pipeline
from diffopd.metrics import bootstrap_interval, diversity, ratio_interval
from diffopd.precision import answer_in_float32, component_dtypes
from diffopd.processes import default_device
from diffopd.recipe import Recipe, TeacherSettings
from diffopd.reward import card_reward
from diffopd.run_folder import RunFolder, atomic_write
from diffopd.teacher import TeacherCard, teacher_card

EVALUATION = 2**31 + 16  # noise key: no update of a run ever has this number
GRID_PICTURES = 6
DIVERSITY_PICTURES = 64
CARD_SCORES = "scores.json"


@dataclass(frozen=True)
class Contender:
    """A model at one setting: what it is called, how it is called, which adapter must hold."""

    model: str
    call: Call
    num_inference_steps: int
    guidance_scale: float

    @property
    def key(self) -> tuple[str, int, float]:
        """Model and setting."""
        return self.model, self.num_inference_steps, self.guidance_scale


@dataclass(frozen=True)
class Task:
    """A teacher's task: its held-out rows and its reward."""

    name: str
    rows: list[PromptRow]
    reward: Callable[..., Any]


@dataclass
class Result:
    """One contender on one task. scores: one per prompt, seeds averaged."""

    contender: tuple[str, int, float]
    task: str
    scores: list[float]
    diversity: float
    seconds: float
    source: str = "measured"
    per_seed: list[float] = field(default_factory=list)


def evaluate_run(run_dir: Path, *, everything: bool = False) -> Path:
    """Write evaluation/scores.json, prompts.jsonl and the grid pictures of a run; returns scores.json.

    Raises UserError for a folder without a run or a run without a checkpoint.
    """
    folder = RunFolder.open(run_dir)
    recipe = folder.recipe()
    cards = [teacher_card(settings.name, recipe.path) for settings in recipe.teachers]
    tasks = tasks_of(cards, recipe.evaluate.num_prompts)
    references, student = contenders(folder, recipe, cards)
    if not everything:
        references = [c for c in references if c.model != "average"]
    known = {} if everything else card_results(recipe, cards, tasks, references)
    wanted = [(c, t) for c in (*references, student) for t in tasks if (c.key, t.name) not in known]
    results = list(known.values()) + measure(wanted, recipe)
    target = folder.path / "evaluation"
    _draw_grid(target, references, student, tasks, cards, recipe)
    asked = {task.name: asked_of(task.rows) for task in tasks}
    return _write(target, results, recipe, cards, asked, folder.latest_checkpoint().name)


def contenders(folder: RunFolder, recipe: Recipe, cards: list[TeacherCard]) -> tuple[list[Contender], Contender]:
    """References and the student of a run's last checkpoint.

    In float32 the student is the pipeline that is exported, whose encoders and VAE are the references' own; under
    evaluate.dtype = "bf16" a LoRA student is an adapter on their trunk, too. Raises UserError without a checkpoint.
    """
    if recipe.evaluate.dtype == "float32":
        pipeline, device = student_pipeline(folder.path), default_device()
        if not recipe.evaluate.teachers:
            return [], student_contender(recipe, pipeline.to(device))
        references = reference_contenders(recipe, cards)
        with_student = with_denoiser(references[0].call.pipeline, denoiser_of(pipeline).to(device))
        return references, student_contender(recipe, with_student)
    *references, student = reference_contenders(recipe, cards, student=checkpoint_of(folder) / LORA_FILE)
    return references if recipe.evaluate.teachers else [], student


def tasks_of(cards: list[TeacherCard], num_prompts: int) -> list[Task]:
    """The first `num_prompts` held-out rows of each teacher's task, its reward loaded.

    Raises UserError for packages or weights of a reward that are missing.
    """
    return [Task(card.name, read_prompts(card.prompts.test)[:num_prompts], card_reward(card)) for card in cards]


def reference_contenders(recipe: Recipe, cards: list[TeacherCard], student: Path | None = None) -> list[Contender]:
    """The base at several guidance scales, each teacher and their average at their own steps and the student's.

    student: the file of a LoRA student, which then comes last, on the same trunk.
    """
    dtypes = component_dtypes(recipe.evaluate.dtype)
    base = load_pipeline(recipe.student.pretrained_model_name_or_path, dtypes)
    base = with_scheduler(base, recipe).to(default_device())
    freeze(base)
    own = own_denoisers(base, cards, recipe)
    for card in cards:
        if card.form == "lora":
            load_lora(base, card, adapter_name=card.name)
    if student:
        load_lora(base, str(student), adapter_name=STUDENT)
    if recipe.evaluate.dtype != "float32":
        for denoiser in (denoiser_of(base), *(teacher.module for teacher in own.values())):
            answer_in_float32(denoiser, denoiser.dtype)
    switch = AdapterSwitch(denoiser_of(base))
    asked = [own_steps(*pair) for pair in zip(recipe.teachers, cards, strict=True) if pair[1].form != "pictures"]
    steps = max(asked, default=recipe.student.num_inference_steps)
    told = {**recipe.student.call}
    found = [
        Contender("base", Call(shell(base), told, lambda: switch.bound(None)), steps, scale)
        for scale in recipe.evaluate.guidance_scales
    ]
    found += _average(recipe, cards, base, switch, steps)
    for settings, card in zip(recipe.teachers, cards, strict=True):
        if not _is_reference(settings, card, recipe):
            continue
        scale = own_guidance(settings, card)
        has_own = card.name in own
        pipeline = with_denoiser(base, own[card.name].module) if has_own else shell(base)
        adapter = card.name if card.form == "lora" else None
        binding = own[card.name].present if has_own else partial(switch.bound, adapter)
        call = Call(pipeline, {**settings.call}, binding)
        for count in dict.fromkeys((own_steps(settings, card), recipe.scored_steps)):
            found.append(Contender(f"teacher:{card.name}", call, count, scale))
    if student:
        alone = student_contender(recipe, shell(base))
        found.append(replace(alone, call=replace(alone.call, binding=partial(switch.bound, STUDENT))))
    return found


def _is_reference(settings: TeacherSettings, card: TeacherCard, recipe: Recipe) -> bool:
    """Whether a teacher is scored: neither the student's average, nor pictures, nor a base that is there already.

    The base is scored at the student's call; as a teacher it may have its own (guidance, steps). What its context shows
    is not told in evaluation, so such a base would not be the teacher.
    """
    if card.form != "base":
        return card.form not in ("ema", "pictures")
    student = recipe.student
    own = settings.call, own_steps(settings, card), own_guidance(settings, card)
    return not settings.context and own != (student.call, student.num_inference_steps, student.guidance_scale)


def own_steps(settings: TeacherSettings, card: TeacherCard) -> int:
    """At how many steps a teacher is scored as itself: the recipe's word, else its card's."""
    return settings.num_inference_steps or card.num_inference_steps


def _average(recipe: Recipe, cards: list[TeacherCard], base: Any, switch: AdapterSwitch, steps: int) -> list[Contender]:
    """The weight average of the teachers, what merging them without training gives; only where all are LoRA."""
    if len(cards) < 2 or any(card.form != "lora" for card in cards):
        return []
    names = [card.name for card in cards]
    call = Call(shell(base), {**recipe.student.call}, lambda: switch.averaged(names))
    scale = round(sum(card.guidance_scale for card in cards) / len(cards), 2)
    counts = dict.fromkeys((steps, recipe.scored_steps))
    return [Contender("average", call, count, scale) for count in counts]


def student_contender(recipe: Recipe, pipeline: Any) -> Contender:
    """The student as it is deployed, at the number of steps that it is scored at."""
    told = {k: v for k, v in student_arguments(recipe).items() if k != "output_type"}
    return Contender("student", Call(pipeline, told), recipe.scored_steps, recipe.student.guidance_scale)


def pictures(contender: Contender, rows: list[PromptRow], task: str, seed: int, batch_size: int) -> Iterator[list[Any]]:
    """Batches of PIL images of `rows`; the latents depend on (seed, task, row) alone, not on the model."""
    call = contender.call.told(
        num_inference_steps=contender.num_inference_steps, guidance_scale=contender.guidance_scale
    )
    shape = survey(call.prompted([rows[0].prompt], output_type="latent")).latents_shape
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        latents = noise.draw(
            shape,
            run_seed=seed,
            update=EVALUATION,
            solver_step=noise.hash_of(task),
            sample_indices=range(start, start + len(part)),
            device=call.pipeline.device,
        )
        generator = torch.Generator().manual_seed(noise.hash_of(seed, task, start))
        asked = call.prompted([row.prompt for row in part], latents=latents, output_type="pil", generator=generator)
        with torch.no_grad(), call.binding():
            yield asked.pipeline(**asked.arguments).images


def measure(wanted: list[tuple[Contender, Task]], recipe: Recipe) -> list[Result]:
    """Sample and score every pair of contender and task, with a progress bar."""
    settings = recipe.evaluate
    total = sum(len(task.rows) for _, task in wanted) * len(settings.seeds)
    results = []
    with Progress() as bar:
        shown = bar.add_task("evaluate", total=total)
        for contender, task in wanted:
            bar.update(shown, description=f"evaluate {contender.model} on {task.name}")
            results.append(_measure_one(contender, task, recipe, lambda count: bar.advance(shown, count)))
    return results


def _measure_one(contender: Contender, task: Task, recipe: Recipe, advance: Callable[[int], None]) -> Result:
    settings, began, kept = recipe.evaluate, time.monotonic(), []
    scores = np.zeros((len(settings.seeds), len(task.rows)))
    for number, seed in enumerate(settings.seeds):
        place = 0
        for images in pictures(contender, task.rows, task.name, seed, settings.batch_size):
            part = task.rows[place : place + len(images)]
            scores[number, place : place + len(images)] = sampling.score(task.reward, images, part).numpy()
            kept += images[: max(0, DIVERSITY_PICTURES - len(kept))]
            place += len(images)
            advance(len(images))
    return Result(
        contender.key,
        task.name,
        scores.mean(0).tolist(),
        diversity(kept),
        time.monotonic() - began,
        per_seed=scores.mean(1).tolist(),
    )


def base_sha256(recipe: Recipe) -> str:
    """One hash of all that the base is loaded from: weights of every component, configs, tokenizer files."""
    found = pipeline_hashes(find_pipeline(recipe.student.pretrained_model_name_or_path))
    return hashlib.sha256("".join(f"{file} {digest}\n" for file, digest in found.items()).encode()).hexdigest()


def card_conditions(recipe: Recipe, settings: TeacherSettings, card: TeacherCard, base: str) -> dict[str, Any]:
    """What the scores of a card depend on, tasks aside: weights, scheduler, and what base and teacher are told.

    base: the hash of `base_sha256`.
    """
    return {
        "base_sha256": base,
        "weights_sha256": card.digest(),
        "scheduler": recipe.student.scheduler,
        "base_call": recipe.student.call,
        "teacher_call": settings.call,
    } | ({"dtype": recipe.evaluate.dtype} if recipe.evaluate.dtype != "float32" else {})


def task_conditions(cards: list[TeacherCard]) -> dict[str, dict[str, Any]]:
    """Task -> hashes of its held-out prompts and of its reward's file."""
    return {
        card.name: {k: v for k, v in card.task_hashes().items() if k != "train prompts"}
        | {"reward": card.reward or [term.model_dump(mode="json") for term in card.rewards]}
        for card in cards
    }


def card_results(
    recipe: Recipe, cards: list[TeacherCard], tasks: list[Task], references: list[Contender]
) -> dict[tuple[tuple[str, int, float], str], Result]:
    """What the cards say of these references under exactly these conditions, prompts and seeds.

    Anything else is left to be measured.
    """
    known, wanted = {}, {contender.key for contender in references}
    base, asked = base_sha256(recipe), task_conditions(cards)
    counts = {task.name: len(task.rows) for task in tasks}
    for settings, card in zip(recipe.teachers, cards, strict=True):
        file = card.folder / CARD_SCORES
        if not file.is_file():
            continue
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("conditions") != card_conditions(recipe, settings, card, base):
            continue
        for row in stored["rows"]:
            same_task = row["task"] in counts and stored["tasks"].get(row["task"]) == asked[row["task"]]
            if not same_task or row["seeds"] != recipe.evaluate.seeds or len(row["scores"]) < counts[row["task"]]:
                continue
            contender = row["model"], row["num_inference_steps"], row["guidance_scale"]
            if contender not in wanted:
                continue
            scores = row["scores"][: counts[row["task"]]]
            found = Result(contender, row["task"], scores, row["diversity"], row["seconds"], "card")
            known[contender, row["task"]] = found
    return known


def _draw_grid(
    target: Path,
    references: list[Contender],
    student: Contender,
    tasks: list[Task],
    cards: list[TeacherCard],
    recipe: Recipe,
) -> None:
    """A few pictures of each task by base, its teacher and student: same prompts, same seeds."""
    index = []
    base = next((c for c in references if c.model == "base"), None)
    for task, card in zip(tasks, cards, strict=True):
        teacher = next((c for c in references if c.model == f"teacher:{card.name}"), None)
        rows = task.rows[:GRID_PICTURES]
        entries = [{"task": task.name, "prompt": row.prompt, "index": i, "models": {}} for i, row in enumerate(rows)]
        for contender in (base, teacher, student):
            if contender is None:
                continue
            name = contender.model.replace(":", "-")
            (target / "grid" / name).mkdir(parents=True, exist_ok=True)
            images = next(pictures(contender, rows, task.name, recipe.evaluate.seeds[0], GRID_PICTURES))
            scores = sampling.score(task.reward, images, rows)
            for entry, image, score in zip(entries, images, scores, strict=True):
                file = f"grid/{name}/{task.name}-{entry['index']}.png"
                image.save(target / file)
                entry["models"][name] = {"file": file, "score": float(score)}
        index += entries
    atomic_write(target / "grid" / "index.json", json.dumps(index, indent=1))


def _write(
    target: Path,
    results: list[Result],
    recipe: Recipe,
    cards: list[TeacherCard],
    asked: dict[str, list[str]],
    checkpoint: str,
) -> Path:
    lines = []
    for result in results:
        model, steps, scale = result.contender
        for number, score in enumerate(result.scores):
            row = {"model": model, "task": result.task, "prompt": number, "steps": steps, "guidance_scale": scale}
            lines.append(json.dumps(row | {"score": round(score, 6)}))
    atomic_write(target / "prompts.jsonl", "\n".join(lines) + "\n")
    settings = recipe.evaluate
    shares = {card.name: not card.rewards for card in cards}  # a sum may give any number
    rows = [result_row(result, asked[result.task], settings.seeds, shares=shares[result.task]) for result in results]
    _mark_best_guidance(rows)
    _add_ratios(rows, results, recipe, cards, asked)
    held = {"checkpoint": checkpoint, "settings": settings.model_dump(mode="json"), "rows": rows}
    return atomic_write(target / "scores.json", json.dumps(held, indent=1))


def result_row(result: Result, asked: Sequence[Hashable], seeds: list[int], *, shares: bool) -> dict[str, Any]:
    """A result as scores.json holds it; asked: what each of its prompts asks for (`data.asked_of`).

    shares: its scores are from 0 to 1.
    """
    model, steps, scale = result.contender
    low, high = bootstrap_interval(result.scores, groups=asked, shares=shares)
    return {
        "model": model,
        "task": result.task,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "score": float(np.mean(result.scores)),
        "interval": [low, high],
        "per_seed": result.per_seed,
        "diversity": result.diversity,
        "num_prompts": len(result.scores),
        "num_asked": len(set(asked)),
        "seeds": seeds,
        "seconds": result.seconds,
        "source": result.source,
    }


def _mark_best_guidance(rows: list[dict[str, Any]]) -> None:
    for task in {row["task"] for row in rows}:
        of_base = [row for row in rows if row["model"] == "base" and row["task"] == task]
        if of_base:
            max(of_base, key=lambda row: row["score"])["is_best_guidance"] = True


def _add_ratios(
    rows: list[dict[str, Any]],
    results: list[Result],
    recipe: Recipe,
    cards: list[TeacherCard],
    asked: dict[str, list[str]],
) -> None:
    """On each teacher's own task: everyone's score over that teacher's at its own steps, paired by prompt."""
    for settings, card in zip(recipe.teachers, cards, strict=True):
        own = f"teacher:{card.name}", own_steps(settings, card), own_guidance(settings, card)
        reference = next((r for r in results if r.contender == own and r.task == card.name), None)
        if reference is None or np.mean(reference.scores) <= 0:
            continue
        for row, result in zip(rows, results, strict=True):
            if result is reference:
                row["is_reference"] = True
            elif result.task == card.name:
                value, low, high = ratio_interval(result.scores, reference.scores, groups=asked[card.name])
                row["ratio"] = {"to": f"teacher:{card.name}", "value": value, "interval": [low, high]}
