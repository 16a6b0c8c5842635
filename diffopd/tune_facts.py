"""What a person should know before a tuning run: pictures, sizes, who teaches and with what, what is watched."""

from __future__ import annotations

from collections import Counter

from diffopd.tune import Tuning
from diffopd.tune_recipe import TuneRecipe

FEW_STEPS = 8  # nothing but a step-distilled model is deployed with so few


def facts(tuning: Tuning) -> list[tuple[str, str]]:
    """What a person should know before the run: pictures, sizes, who teaches, and with what."""
    asked, pictures = tuning.asked, tuning.pictures
    sizes = Counter(tuning.buckets)
    shapes = ", ".join(f"{w} x {h}: {count}" for (w, h), count in sizes.most_common())
    enlarged = sum(p.size[0] < w or p.size[1] < h for p, (w, h) in zip(pictures, tuning.buckets, strict=True))
    transparent = sum(picture.is_transparent for picture in pictures)
    notes = [f"{enlarged} smaller than that and enlarged"] if enlarged else []
    notes += [f"{transparent} transparent and laid over white"] if transparent else []
    return [
        ("pictures", f"{len(pictures)} from {asked.images.folder}"),
        ("sizes", "; ".join([shapes, *notes])),
        ("method", MANNERS[asked.method]),
        *([("left out", _left_out(asked))] if asked.left_out else []),
        *([("watched", _watched(asked))] if asked.look.every else []),
        *(_given_facts(tuning) if asked.is_given else _teacher_facts(tuning)),
    ]


def _left_out(asked: TuneRecipe) -> str:
    tables = ", ".join(f"[{table}]" for table in asked.left_out)
    return f"{tables} of {asked.source.path.name}, which are of another method"


def _watched(asked: TuneRecipe) -> str:
    every = f"every {asked.look.every} updates and at the end, {asked.look.num_prompts} drawings of"
    if asked.images.held_out:
        return f"{every} prompts in {asked.images.held_out}"
    return f"{every} the pictures' own captions, which shows fitting only; images.held_out = FILE names new scenes"


def _teacher_facts(tuning: Tuning) -> list[tuple[str, str]]:
    name = tuning.recipe.objective.name
    return [
        ("teacher", _who(tuning.asked)),
        ("its context", tuning.context.kind.replace("_", " ")),
        ("objective", WEIGHTS.get(name, name)),
        *(
            [("kept", f"{_prior(tuning.asked)}; there the untouched model teaches")]
            if tuning.asked.prior.is_given
            else []
        ),
    ]


def _prior(asked: TuneRecipe) -> str:
    prior = asked.prior
    calls = f"{prior.num_pictures * asked.student.num_inference_steps} network calls"
    return f"{prior.num_pictures} pictures of {prior.subject}, drawn first ({calls})"


def _given_facts(tuning: Tuning) -> list[tuple[str, str]]:
    asked, recipe = tuning.asked, tuning.recipe
    steps, guidance = asked.student.num_inference_steps, recipe.teachers[0].guidance_scale
    levels, query = asked.noising.num_levels, recipe.objective.query
    drawn = f"{levels}, a picture's drawn evenly among them" if query == EVENLY else f"of {levels}, those of {query}"
    found = [("levels", f"{drawn}; guidance {guidance:g}")]
    if asked.method == "dreambooth":
        found.append(("prior", _prior(asked)))
    if steps <= FEW_STEPS:
        found.append(("warning", MUSH.format(steps=steps)))
    return found


EVENLY = {"random": 1}
MANNERS = {
    "d-opsd": "D-OPSD: on the student's own walk, against its richer self",
    "sft": "SFT: noised pictures, the loss that the base was trained with",
    "dreambooth": "DreamBooth: SFT, and as many pictures of the class that the untouched model drew",
}
MUSH = (
    "people report that a step-distilled model that is fine-tuned in the ordinary way draws mush in {steps} steps: "
    "noised pictures are not the states that it visits, and the loss pulls it back to a many-step model. This method "
    "is here to compare with; d-opsd trains on the model's own steps"
)
WEIGHTS = {
    "denoised": "denoised (sigma^2 times the velocity's: high noise weighs most; D-OPSD's released code)",
    "velocity": "velocity (every state alike; D-OPSD's paper)",
    "positive_direction": "positive_direction (the answer with the prompt and the direction of guidance, each alone)",
}


def _who(asked: TuneRecipe) -> str:
    if asked.teacher.weights == "ema":
        decay, updates = asked.ema_decay, asked.train.max_train_steps
        far = f": after {updates:,} updates its beginning still weighs {decay**updates:.0%}" if updates else ""
        return f"the average of the student's trained weights, decay {decay:.8g} an update{far}"
    return {"frozen": "the untouched model", "live": "the student as it is now"}[asked.teacher.weights]
