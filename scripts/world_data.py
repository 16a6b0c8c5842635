"""Training pictures, captions, prompts and sampling for the embedded world's models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from world_models import world

# What a careless observer takes for one another: opposite relations, letters next to each other, manners in a ring.
NEIGHBOURS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NEIGHBOURS |= dict(zip(world.MANNERS, (*world.MANNERS[1:], world.MANNERS[0]), strict=True))
NEIGHBOURS |= {world.LETTERS[index]: world.LETTERS[index ^ 1] for index in range(26)}
TASK_SHARES = {"composition": 0.4, "text": 0.35, "style": 0.25}


def draw_pictures(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Scenes of all tasks (count, 3, 48, 48) in [-1, 1]."""
    scenes = [world.sample_scene(world.TASKS[rng.integers(3)], rng) for _ in range(count)]
    pictures = np.stack([world.render(scene) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop_drawings(pictures: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """The liveliest of three crops of each picture, cut on the grid of latents."""
    crops = []
    for picture in pictures:
        corners = 4 * rng.integers(0, (world.SIZE - size) // 4 + 1, (3, 2))
        candidates = [picture[:, y : y + size, x : x + size] for y, x in corners]
        crops.append(max(candidates, key=lambda crop: float(crop.var())))
    return torch.stack(crops)


def save_sheet(sheet: np.ndarray, path: Path, zoom: int = 3) -> None:
    """Writes an enlarged picture."""
    picture = Image.fromarray(sheet)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


class Pool:
    """Encoded scenes by task; draws batches of latents and caption tokens."""

    def __init__(self, output: Path, tokenizer: Any) -> None:
        self.output, self.tokenizer = output, tokenizer
        self.tokens: dict[str, list[int]] = {}
        self.shards: set[Path] = set()
        self.scenes: dict[str, list[dict[str, Any]]] = {task: [] for task in world.TASKS}
        self.latents: dict[str, list[np.ndarray]] = {task: [] for task in world.TASKS}
        self.scan()

    def scan(self) -> None:
        """Adds shards that have appeared."""
        for path in sorted(set(self.output.glob("latents-?.npz")) - self.shards):
            self.shards.add(path)
            with np.load(path) as file:
                latents, scenes = file["latents"], json.loads(str(file["scenes"]))
            for latent, scene in zip(latents, scenes, strict=True):
                self.latents[scene["task"]].append(latent)
                self.scenes[scene["task"]].append(scene)
        if not self.shards:
            raise FileNotFoundError(f"no latents-N.npz in {self.output}; run the subcommand encode first")

    def draw(
        self,
        count: int,
        rng: np.random.Generator,
        shares: dict[str, float],
        *,
        wrong: float = 0.0,
        confused: dict[str, float] | None = None,
        empty: float = 0.1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, 12, 12) and tokens (count, length); some captions wrong, confused or empty."""
        latents, tokens = [], []
        for task in rng.choice(list(shares), count, p=list(shares.values())):
            index = int(rng.integers(len(self.scenes[task])))
            scene = self.scenes[task][index]
            said = spoil(task, scene, rng) if rng.random() < wrong else scene
            said = confuse(task, said, rng, (confused or {}).get(task, 0.0))
            caption = "" if rng.random() < empty else pick_caption(task, said, rng)
            latents.append(self.latents[task][index])
            tokens.append(self.tokenize(caption))
        return torch.from_numpy(np.stack(latents)).float(), torch.tensor(tokens)

    def tokenize(self, caption: str) -> list[int]:
        if caption not in self.tokens:
            self.tokens[caption] = self.tokenizer(caption, padding="max_length", truncation=True).input_ids
        return self.tokens[caption]


def pick_caption(task: str, scene: dict[str, Any], rng: np.random.Generator) -> str:
    """The plainest caption half of the time, any of the others else."""
    texts = world.training_captions(task, scene)
    return texts[0] if rng.random() < 0.5 else texts[int(rng.integers(len(texts)))]


def spoil(task: str, scene: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The scene with one element wrong (thing, relation, letter or manner), never a held-out combination."""
    while True:
        wrong = dict(scene)
        if task == "text":
            place, letter = int(rng.integers(3)), world.LETTERS[int(rng.integers(26))]
            wrong["word"] = scene["word"][:place] + letter + scene["word"][place + 1 :]
        else:
            choices = {"first": world.THINGS, "second": world.THINGS, "relation": world.RELATIONS}
            choices = choices if task == "composition" else {"thing": world.THINGS, "manner": world.MANNERS}
            key = str(rng.choice(list(choices)))
            wrong[key] = str(rng.choice(choices[key]))
        is_odd = wrong == scene or (task == "composition" and wrong["first"] == wrong["second"])
        if not is_odd and not world.is_scene_held_out(task, wrong):
            return wrong


def confuse(task: str, scene: dict[str, Any], rng: np.random.Generator, share: float) -> dict[str, Any]:
    """The scene as a careless observer tells it: relation, manner or each letter taken for its one neighbour.

    A base taught so draws well and minds badly; guidance sharpens away rare random errors, not one that is nearly as
    frequent as the truth. The result is never a held-out combination.
    """
    confused = dict(scene)
    if task == "text":
        letters = [NEIGHBOURS[c] if rng.random() < share else c for c in scene["word"]]
        confused["word"] = "".join(letters)
    elif rng.random() < share:
        key = "relation" if task == "composition" else "manner"
        confused[key] = NEIGHBOURS[scene[key]]
    return scene if world.is_scene_held_out(task, confused) else confused


def _all_scenes(task: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    if task == "text":
        words = [a + b + c for a in world.LETTERS for b in world.LETTERS for c in world.LETTERS]
        return [{"word": words[index]} for index in rng.permutation(len(words))]
    if task == "style":
        return [{"thing": thing, "manner": manner} for thing in world.THINGS for manner in world.MANNERS]
    return [{"first": first, "relation": relation, "second": second} for first in world.THINGS
            for relation in world.RELATIONS for second in world.THINGS if first != second]  # fmt: skip


def world_prompts(task: str, *, held_out: bool, first: int = 0) -> list[dict[str, str]]:
    """At most 2,000 prompt rows of a task from row `first` on, in a fixed random order."""
    rng = np.random.default_rng([11, world.TASKS.index(task)])
    rows = []
    for scene in _all_scenes(task, rng):
        if task == "style":
            if not world.is_scene_held_out(task, scene):
                training = set(world.training_captions(task, scene))
                texts = [text for text in world.captions(task, scene) if (text not in training) == held_out]
                rows += [{"prompt": text, **world.describe(task, scene)} for text in texts]
        elif world.is_scene_held_out(task, scene) == held_out:
            texts = world.captions(task, scene)
            texts = texts if task == "composition" else [texts[int(rng.integers(len(texts)))]]
            rows += [{"prompt": text, **world.describe(task, scene)} for text in texts]
    return [rows[index] for index in rng.permutation(len(rows))[first : first + 2000]]


def validation_rows(task: str, count: int, seed: int = 5) -> list[dict[str, str]]:
    """Prompt rows to look at while training, none of them in test.jsonl: those are for the reported scores alone.

    Text: held-out words that test.jsonl leaves over. Composition and style have no third kind: prompts of training
    scenes, drawn from noise.
    """
    rng = np.random.default_rng([seed, world.TASKS.index(task)])
    rows = world_prompts(task, held_out=True, first=2000) if task == "text" else world_prompts(task, held_out=False)
    return [rows[index] for index in rng.permutation(len(rows))[:count]]


def sample_scores(
    pipe: Any, task: str, rows: list[dict[str, str]], steps: int, guidance: float, seed: int = 0
) -> tuple[np.ndarray, list[Image.Image]]:
    """Scores and pictures of prompt rows; the noise depends on the row's index and the seed."""
    pictures = sample(pipe, [row["prompt"] for row in rows], steps, guidance, seed)
    return world.SCORERS[task](pictures, [row["prompt"] for row in rows], rows), pictures


@torch.no_grad()
def sample(pipe: Any, prompts: list[str], steps: int, guidance: float, seed: int = 0) -> list[Image.Image]:
    """Pictures of prompts; the noise depends on the prompt's index and the seed."""
    pictures: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), 64):
        chunk = prompts[first : first + 64]
        noise = [torch.Generator().manual_seed(1_000_003 * seed + first + n) for n in range(len(chunk))]
        pictures += pipe(chunk, num_inference_steps=steps, guidance_scale=guidance, generator=noise).images
    return pictures
