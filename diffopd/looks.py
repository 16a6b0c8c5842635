"""What is looked at while a student is tuned: held-out pictures at the deployment step count, never the loss.

An average that follows too fast collapses while its loss falls, so drawings are compared with those of the model as
it began: nearness to the new pictures, drift on prompts that have nothing to do with them, sharpness, diversity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console

from diffopd.blueprint import read_blueprint
from diffopd.closeness import distance, nearest, thumbnail
from diffopd.cost import measure_cost, told
from diffopd.data import read_prompts
from diffopd.data_states import can_encode, cannot_encode
from diffopd.drawing import draw, embeddings, grid, mean, sharpness
from diffopd.errors import UserError
from diffopd.features import Features, check_features, kid, load_features, nearest_cosine
from diffopd.image_file import picture
from diffopd.metrics import diversity
from diffopd.run_folder import RunFolder
from diffopd.teacher_check import check_teacher, not_step_distilled, told_verdict
from diffopd.tune import Tuning, unguided
from diffopd.tune_recipe import LookSettings, NoisingSettings

if TYPE_CHECKING:
    from diffopd.distill import Run

UNRELATED = (
    "a bowl of fruit on a wooden table",
    "a lighthouse on a cliff at sunset",
    "a red bus on a city street",
    "a cat asleep on a sofa",
    "a snowy mountain above a lake",
    "a cup of coffee beside a book",
    "two children flying a kite",
    "an old map of the world",
)
LEAST_DIVERSITY = 0.3  # of what it was: below, the model draws the same whatever it is asked
LEAST_SHARPNESS, MOST_SHARPNESS = 0.3, 4.0  # of what it was: below it is mush, above stripes or noise


@dataclass
class Looks:
    """Looks at one run. `begin` before the first update, then `look`; reason: why the run should stop, if it should."""

    settings: LookSettings
    folder: RunFolder
    pictures: list[Path]
    reason: str | None = None
    features: Features = Features()
    _before: dict[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def every(self) -> int:
        """Updates between two looks."""
        return self.settings.every

    def begin(self, run: Run, *, is_new: bool) -> None:
        """Draw what the model draws before it is tuned, or take up the drawings that the run began with."""
        for what, prompts in self._prompts(run).items():
            files = [self.folder.path / "looks" / f"{what}-{i}.png" for i in range(len(prompts))]
            if is_new:
                drawn = self._draw(run, prompts)
                if run.processes.is_main:
                    files[0].parent.mkdir(exist_ok=True)
                    for image, file in zip(drawn, files, strict=True):
                        image.save(file)
            missing = next((file for file in files if not is_new and not file.is_file()), None)
            if missing:
                raise UserError(
                    f"{missing}: this run's first drawings are gone, so nothing can be compared with them. Restore the "
                    "folder, or set look.every = 0."
                )
            self._before[what] = drawn if is_new else [picture(file) for file in files]
        seen = [] if is_new else [row for row in self.folder.metrics() if row["kind"] == "look"]
        self.reason = self._why_stop(seen[-1]) if seen else None  # a run that was stopped is not gone on with

    def look(self, run: Run, update: int) -> dict[str, float]:
        """Numbers of this moment; also writes looks/NUMBER.png, the model as it began beside what it is now."""
        now = {what: self._draw(run, prompts) for what, prompts in self._prompts(run).items()}
        pictures = [picture(file, now["subject"][0].size) for file in self.pictures]
        values = compare(self._before, now, pictures)
        for suffix, drawn in (("", now), ("_before", self._before)):
            found = self._in_features(run, drawn["subject"], pictures)
            values |= {f"{name}{suffix}": value for name, value in found.items()}
        self.reason = self._why_stop(values)
        if run.processes.is_main:
            pairs = [pair for what in now for pair in zip(self._before[what], now[what], strict=True)]
            grid(pairs, ["before", "now"]).save(self.folder.path / "looks" / f"{update:06d}.png")
        return values

    def _in_features(self, run: Run, drawn: list[Image.Image], pictures: list[Image.Image]) -> dict[str, float]:
        """Of drawings of the subject: cosine to the nearest picture, to their own prompt, KID to the pictures.

        KID is in the features of DINO, else of the IP-Adapter's image encoder, else of CLIP.
        """
        values, spaces, prompts = {}, [], self._prompts(run)["subject"]
        if self.features.dino:
            spaces.append([self.features.of_dino(images) for images in (drawn, pictures)])
            values["dino"] = nearest_cosine(*spaces[0])
        seen = [embeddings(run.teachers[0].call.pipeline, images) for images in (drawn, pictures)]
        spaces += [seen] if seen[0] is not None else []
        if self.features.clip:
            own, texts = self.features.of_clip(drawn, prompts)
            values["clip"] = float((own * texts).sum(1).mean())
            spaces.append([own, self.features.of_clip(pictures, prompts[:1] * len(pictures))[0]])
        if spaces and min(len(drawn), len(pictures)) > 1:
            values["kid"] = kid(*spaces[0])
        return values

    def _prompts(self, run: Run) -> dict[str, list[str]]:
        count, file = self.settings.num_prompts, self.settings.unrelated
        subject = [row.prompt for row in run.teachers[0].test_rows]
        if len(subject) < count:  # few prompts are drawn from several noises
            subject = (subject * count)[:count]
        unrelated = [row.prompt for row in read_prompts(file)] if file else list(UNRELATED)
        return {"subject": _spaced(subject, count), "unrelated": _spaced(unrelated, count)}

    def _draw(self, run: Run, prompts: list[str]) -> list[Image.Image]:
        size, most, drawn = run.recipe.train.batch_size, len(prompts), []
        for start in range(0, most, size):
            numbers = range(start, min(start + size, most))
            drawn += draw(run, run.student.call, [prompts[i] for i in numbers], numbers, None)
        return drawn

    def _why_stop(self, values: dict[str, float]) -> str | None:
        if self.settings.stop_on_collapse and is_collapsed(values):
            return (
                f"collapse: diversity {values['diversity']:.2f} and sharpness {values['sharpness']:.2f} of what they "
                f"were on unrelated prompts; on those of the subject {values['subject_diversity']:.2f} and "
                f"{values['subject_sharpness']:.2f} of what they were or the pictures have. Lower learning_rate, or "
                'let the teacher follow more slowly (teacher.ema_decay nearer to 1, teacher.weights = "frozen")'
            )
        limit = self.settings.max_drift
        if limit is not None and values["drift"] > limit:
            return f"forgetting: drift {values['drift']:.3f} on unrelated prompts is above look.max_drift = {limit:g}"
        return None


def _spaced(prompts: list[str], count: int) -> list[str]:
    """At most `count` of them, from all over the file: one that is ordered by kind is seen in all its kinds."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]


def begin_looking(tuning: Tuning, *, force: bool) -> Callable[[Run, bool], None]:
    """What the loop calls before its first update: the teacher's check (of a new run), then the first drawings."""

    def begin(run: Run, is_new: bool) -> None:
        folder = RunFolder(Path(run.recipe.output_dir))
        features = load_features(check_features(tuning.asked), run.device)
        console = Console(stderr=True, quiet=not run.processes.is_main)
        _warn(console, cut_captions(run.student.pipeline, _captions(run)))
        if is_new and not tuning.asked.is_given:
            verdict = check_teacher(run, folder, features, force=force)
            console.print(told_verdict(verdict, folder), markup=False)
            _warn(console, not_step_distilled(verdict, run.recipe.student.num_inference_steps))
            _tell_cost(run, folder, tuning, console)
        if tuning.asked.look.every:
            files = [picture.path for picture in tuning.pictures]
            run.looks = Looks(tuning.asked.look, folder, files, features=features)
            run.looks.begin(run, is_new=is_new)

    return begin


def _warn(console: Console, warning: str | None) -> None:
    if warning:
        console.print(f"Warning: {warning}", style="yellow", markup=False)


def _captions(run: Run) -> list[str]:
    """All that either side is told of the pictures, each once."""
    contexts = [(teacher.context, teacher.train_rows) for teacher in run.teachers]
    said = [row.prompt for _, rows in contexts for row in rows]
    return list(dict.fromkeys([*said, *(prompt for context, rows in contexts for prompt in context.prompts(rows))]))


def cut_captions(pipeline: Any, captions: list[str]) -> str | None:
    """A warning where captions are longer than CLIP reads and no longer reading encoder is there; None where not."""
    named = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
    tokenizers = [part for part in named if part is not None]
    if not tokenizers or any(not type(part).__name__.startswith("CLIP") for part in tokenizers):
        return None
    most = tokenizers[0].model_max_length
    long = [caption for caption in captions if len(tokenizers[0](caption).input_ids) > most]
    if not long:
        return None
    return (
        f"{len(long)} of {len(captions)} captions are longer than the {most} tokens (about {2 * most // 3} words) that "
        f"this model reads: their ends are not seen. The first is {long[0][:60]!r}... Shorten them."
    )


def _tell_cost(run: Run, folder: RunFolder, tuning: Tuning, console: Console) -> None:
    base = read_blueprint(run.recipe.student.pretrained_model_name_or_path)
    if not can_encode(base.pipeline_class, base.configs["vae"]["_class_name"]):
        console.print(f"Cost against fine-tuning: not measured. {cannot_encode(base.pipeline_class)}")
        return
    noising = NoisingSettings()
    cost = measure_cost(run, folder, unguided(tuning.asked, base), noising.num_levels)
    console.print(told(cost))


def compare(
    before: dict[str, list[Image.Image]], now: dict[str, list[Image.Image]], pictures: list[Image.Image]
) -> dict[str, float]:
    """Drawings of "subject" and "unrelated" prompts now and before, pairwise from the same noise.

    distance, distance_before: of subject drawings to the nearest picture; drift: of unrelated drawings to those before;
    sharpness, diversity: of the unrelated drawings, as a share of what they were; subject_sharpness, subject_diversity:
    of the subject drawings, which may go from what they were to what the pictures have: as a share of the nearer of
    the two, 1 between them.
    """
    subject, others, others_before = now["subject"], now["unrelated"], before["unrelated"]
    wanted = np.stack([thumbnail(picture) for picture in pictures])
    ends = before["subject"], pictures
    return {
        "distance": mean(nearest(subject, wanted)),
        "distance_before": mean(nearest(before["subject"], wanted)),
        "drift": mean([distance(a, b) for a, b in zip(others, others_before, strict=True)]),
        "sharpness": _share(_sharpness(others), _sharpness(others_before)),
        "diversity": _share(diversity(others), diversity(others_before)),
        "subject_sharpness": _share(_sharpness(subject), *map(_sharpness, ends)),
        "subject_diversity": _share(diversity(subject), *map(diversity, ends)),
    }


def is_collapsed(values: dict[str, float]) -> bool:
    """Whether the model draws much the same for all prompts, or drawings are mush or stripes."""
    return any(
        values[f"{of}diversity"] < LEAST_DIVERSITY or not LEAST_SHARPNESS <= values[f"{of}sharpness"] <= MOST_SHARPNESS
        for of in ("", "subject_")
    )


def _sharpness(images: list[Image.Image]) -> float:
    return mean([sharpness(image) for image in images])


def _share(value: float, *ends: float) -> float:
    """A value as a share of the nearest end, 1 between them."""
    low, high = min(ends), max(ends)
    return 1.0 if low <= value <= high else value / max(low if value < low else high, 1e-6)
