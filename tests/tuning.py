"""What tests of tuning share: small settings, and a tuning recipe of pictures, read and trained."""

import json

from diffopd import distill as loop
from diffopd.preflight import check
from diffopd.run_folder import RunFolder
from diffopd.tune import task_written
from diffopd.tune_recipe import read_tune_recipe

SMALL = [
    "student.num_inference_steps=2",
    "student.rank=2",
    "student.lora_alpha=4",
    "train.max_train_steps=2",
    "train.batch_size=2",
    "train.checkpointing_steps=1",
    "train.learning_rate=1e-2",
    "images.resolution=32",
    "look.every=0",
]
SIZES = ((16, 16), (24, 12), (16, 16))


def asked(tiny_sd, pictures, *overrides, output=None):
    output = output or pictures.parent / "run"
    options = [*SMALL, f"output_dir={json.dumps(str(output))}", *overrides]
    return read_tune_recipe(None, str(tiny_sd), str(pictures), options)


def trained(tuning):
    with task_written(tuning):
        parts = check(tuning.recipe, hash_weights=True)
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, parts.hashes)
    loop.distill(tuning.recipe, folder)
    return folder
