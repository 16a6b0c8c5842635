"""Runs of tiny recipes for the tests: what a recipe's loop computes, writes and leaves behind."""

import json

import torch
from safetensors.torch import load_file

from diffopd import distill as loop
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder
from diffopd.supervise import Watch


def recipe_with(path, *overrides):
    return read_recipe(path, list(overrides))


def prepared(recipe):
    """The loop's run and trained state, before any update."""
    student, teachers = loop.assemble(recipe, "cpu")
    run = loop.Run(recipe, student, teachers, loop._survey(student, teachers), loop.Processes(), "cpu")
    return run, loop.new_trained(run)


def gradients_of(recipe):
    run, trained = prepared(recipe)
    loop.one_update(run, trained, Watch())
    return {name: p.grad.clone() for name, p in run.student.parameters.items()}


def run_to_end(recipe):
    folder = RunFolder.create(recipe.output_dir, recipe, {})
    loop.distill(recipe, folder)
    return folder


def rows_of(folder, kind):
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def state_of(folder, update):
    """Every tensor and counter of a checkpoint but the seconds, which no two runs share."""
    state = folder.path / f"checkpoint-{update}" / "state"
    tensors = {f"{file.stem}/{k}": v for file in state.glob("*.safetensors") for k, v in load_file(file).items()}
    counters = json.loads((state / "progress.json").read_text())
    return tensors, {k: v for k, v in counters.items() if k != "seconds"}


def assert_same_state(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def weights_of(folder, update):
    return load_file(folder.path / f"checkpoint-{update}" / "pytorch_lora_weights.safetensors")


def assert_same_gradients(a, b):
    scale = max(float(g.abs().max()) for g in a.values())
    assert scale > 0
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= 1e-5 * scale, name


BEGIN = 'student.begin_from="teacher_average"'
NO_CLIP = "train.max_grad_norm=1e9"
