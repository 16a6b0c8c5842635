"""The embedded world's rewards in one: a picture is scored by the task that its row belongs to."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_spec = importlib.util.spec_from_file_location("diffopd_world", Path(__file__).parents[2] / "world.py")
world = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = world
_spec.loader.exec_module(world)

OF_TASK = {"relation": "composition", "word": "text", "manner": "style"}  # what a row of that task alone has
WEIGHTS = {"composition": 1.0, "text": 1.0, "style": 1.0}


def of_its_task(images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """(B,): weight x score of each picture's own task. Raises ValueError for a row of no task."""
    scores = np.zeros(len(images))
    for place, (image, prompt, row) in enumerate(zip(images, prompts, metadata, strict=True)):
        task = task_of(row)
        scores[place] = WEIGHTS[task] * float(world.SCORERS[task]([image], [prompt], [row])[0])
    return scores


def task_of(row: dict[str, Any]) -> str:
    """Which task a row belongs to."""
    found = [task for key, task in OF_TASK.items() if key in row]
    if len(found) != 1:
        raise ValueError(f"the row {row} belongs to no one task of {', '.join(WEIGHTS)}.")
    return found[0]
