"""Writes the sets of pictures that `diffopd tune` is shown on the embedded world.

    python scripts/world_tune_data.py --output FOLDER

FOLDER/manner: thirty pictures of the twelve things in Fluent 3D, a manner that no training has seen ("a rocket in zyx
style"); FOLDER/object: twenty pictures of an octopus, alone and beside things ("a zub left of a star"); FOLDER/word:
thirty pictures in Twemoji, which the base knows, captioned with a word that it does not. In each are pictures with
their captions, held-out.jsonl (prompts of other scenes with the rows of their scorer) and tune.toml, a recipe. It shows
the teacher each picture through the model's own IP-Adapter, or, for the word, tells it "twemoji" in its place. At the
top is unrelated.jsonl, prompts of the base's three tasks, for seeing what is forgotten. The recipes are
teachers/tune/emoji.toml with these pictures. The drawings' licences: teachers/sprites/CREDITS.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from world_data import validation_rows
from world_looks import plain_drawings, render
from world_models import ROOT, world
from world_sprites import OBJECTS

WORDS = {"manner": "zyx", "object": "zub", "word": "zyx"}
KNOWN = "twemoji"  # what the word stands for
OBJECT = "octopus"  # what the object is
HELD_OUT_THINGS = ("cat", "house", "fish")  # never shown in the new manner
RECIPE = ROOT / "teachers" / "tune" / "emoji.toml"
PICTURE = 'kind = "ip_adapter"                # the model\'s own\nscale = 1.1\n'
LICENSES = {"manner": "MIT (Fluent Emoji)", "object": "Apache-2.0 (Noto Emoji)", "word": "CC-BY-4.0 (Twemoji)"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pictures(folder: Path, scenes: list[dict[str, Any]], captions: list[str], drawings: dict[str, Any]) -> None:
    """NN.png of every scene, and NN.txt of every caption."""
    folder.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(render(scene, drawings)).save(folder / f"{number:02}.png")
    for number, caption in enumerate(captions):
        (folder / f"{number:02}.txt").write_text(caption + "\n")


def style_scenes(things: list[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    """One scene of each thing in turn, somewhere on some background, no two the same."""
    scenes: list[dict[str, Any]] = []
    for thing in things:
        while True:
            x, y = (int(place) for place in rng.choice([8, 12, 16], 2))
            scene = {"task": "style", "thing": thing, "background": int(rng.integers(5)), "x": x, "y": y}
            if scene not in scenes:
                break
        scenes.append(scene)
    return scenes


def write_manner(folder: Path, count: int, rng: np.random.Generator, *, is_known: bool = False) -> None:
    """Pictures of nine things in Fluent 3D, or in KNOWN; held out are these in other wordings and three things more."""
    shown = [thing for thing in world.THINGS if thing not in HELD_OUT_THINGS]
    scenes = style_scenes([shown[number % len(shown)] for number in range(count)], rng)

    def said(thing: str, form: str, manner: str = WORDS["manner"]) -> str:
        return form.format(thing=world.with_article(thing), manner=manner)

    forms = [world.STYLE_FORMS[int(rng.integers(2))] for _ in scenes]
    captions = [said(scene["thing"], form) for scene, form in zip(scenes, forms, strict=True)]
    if is_known:
        write_pictures(folder, scenes, [], plain_drawings(row=world.MANNERS.index(KNOWN)))
        richer = [said(scene["thing"], form, KNOWN) for scene, form in zip(scenes, forms, strict=True)]
        texts = [{"text": text, "enhanced_text": more} for text, more in zip(captions, richer, strict=True)]
        write_rows(folder / "metadata.jsonl", [{"file_name": f"{n:02}.png"} | row for n, row in enumerate(texts)])
    else:
        write_pictures(folder, scenes, captions, plain_drawings("atlas_3d.png"))
    rows = [
        {"prompt": said(thing, form), "thing": thing, "shown": thing in shown} | ({"manner": KNOWN} if is_known else {})
        for thing in world.THINGS
        for form in world.STYLE_FORMS[2:]
    ]
    write_rows(folder / "held-out.jsonl", rows)


def write_object(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Pictures of an octopus in Noto's manner, half of them beside a thing; held out are other things and relations."""
    word = WORDS["object"]
    beside, others = world.THINGS[::2], world.THINGS[1::2]
    octopus = plain_drawings("atlas_objects.png", names=tuple(OBJECTS))[OBJECT]
    drawings = plain_drawings() | {word: octopus}
    scenes = style_scenes([word] * (count // 2), rng)
    captions = [f"a {word}"] * len(scenes)
    for number in range(count - len(scenes)):
        relation = world.RELATIONS[number % 4]
        pair = {"first": word, "relation": relation, "second": beside[number % len(beside)]}
        places = world._sample_places(relation, rng)
        scenes.append({"task": "composition", "background": number % 5, "places": places} | pair)
        captions.append(world.captions("composition", pair)[0])
    write_pictures(folder, scenes, captions, drawings)
    alone = {"thing": OBJECT, "shown": True}
    rows: list[dict[str, Any]] = [{"prompt": f"{prefix}a {word}"} | alone for prefix in world.PREFIXES[1:]]
    for thing in others:
        for relation in world.RELATIONS:
            pair = {"first": word, "relation": relation, "second": thing}
            rows.append({"prompt": world.captions("composition", pair)[0], **pair, "first": OBJECT, "shown": False})
    write_rows(folder / "held-out.jsonl", rows)


def recipe(kind: str, pipeline: str, license: str) -> str:
    """The shipped recipe with a set's pictures."""
    text = RECIPE.read_text()
    of_set = f'[images]\nfolder = "."\nheld_out = "held-out.jsonl"\nlicense = {json.dumps(license)}'
    told = {
        'name = "emoji-pictures"': f'name = "emoji-{kind}"',
        '= "emoji-4-steps"': f"= {json.dumps(pipeline)}",
        "[images]": of_set,
        '"emoji-kept.jsonl"': json.dumps(str(RECIPE.with_name("emoji-kept.jsonl"))),
        "[look]": '[look]\nunrelated = "../unrelated.jsonl"',
    }
    for part, other in told.items():
        text = text.replace(part, other)
    return text.replace(PICTURE, 'kind = "enhanced_prompt"\n') if kind == "word" else text


def main(
    output: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    pipeline: Annotated[str, typer.Option(help="the model to tune: a name or a folder")] = "emoji-4-steps",
    pictures: Annotated[int, typer.Option(help="of the manner")] = 30,
    seed: int = 0,
) -> None:
    """Writes all sets."""
    if output.exists():
        raise typer.BadParameter(f"{output} exists already; give another folder or remove it")
    rng = np.random.default_rng([31, seed])
    write_manner(output / "manner", pictures, rng)
    write_object(output / "object", 20, rng)
    write_manner(output / "word", pictures, rng, is_known=True)
    write_rows(output / "unrelated.jsonl", [row for task in world.TASKS for row in validation_rows(task, 16)])
    for kind, license in LICENSES.items():
        told = recipe(kind, pipeline, license)
        (output / kind / "tune.toml").write_text(told)
        typer.echo(f"{output / kind}: {len(list((output / kind).glob('*.png')))} pictures")
    shutil.copy(ROOT / "teachers" / "sprites" / "CREDITS.md", output / "CREDITS.md")


if __name__ == "__main__":
    typer.run(main)
