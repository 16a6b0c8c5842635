"""Exports of every family: folder, LoRA and LoRA for ComfyUI reload in stock diffusers to the same pictures."""

from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch

from diffopd.adapters import STUDENT, add_adapter
from diffopd.checkpoint import save_deployable
from diffopd.drive import Call, denoiser_of
from diffopd.errors import UserError
from diffopd.forms import ALLOWED, adapter_layers, write_kohya
from diffopd.load import LORA_FILE, fuse_adapter, load_lora
from diffopd.stranger import Form, ask, draw

NO_KOHYA = {"Flux2", "Flux2Klein", "ZImage", "Sana", "SanaSprint", "Lumina2", "Wan"}


def written(name: str, folder: Path) -> tuple[list[Form], np.ndarray, list[str]]:
    """A family's student with a random adapter, exported; its forms, its own pictures, the formats refused."""
    row, pipeline = families.FAMILIES[name], families.build(name)
    told = {"prompt": "a dot", "num_inference_steps": row.steps, **row.arguments, **next(iter(row.forms.values()))}
    arguments = dict(Call(pipeline, told).arguments)
    pipeline.save_pretrained(folder / "base")
    refused, forms = [], []
    if row.targets:
        generator = torch.Generator().manual_seed(3)
        for parameter in add_adapter(
            denoiser_of(pipeline), STUDENT, rank=2, lora_alpha=4, target_modules=row.targets
        ).values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        save_deployable(folder / "lora", pipeline, is_lora=True)
        forms.append(Form(f"{name}: lora", str(folder / "base"), lora=str(folder / "lora" / LORA_FILE)))
        student = SimpleNamespace(pipeline=pipeline, layers=adapter_layers(denoiser_of(pipeline)))
        try:
            file = write_kohya(student, folder / "kohya.safetensors")
            forms.append(Form(f"{name}: kohya", str(folder / "base"), lora=str(file)))
        except UserError:
            refused.append(name)
        fuse_adapter(pipeline)
    pipeline.save_pretrained(folder / "pipeline")
    forms.append(Form(f"{name}: diffusers", str(folder / "pipeline")))
    kept = {"arguments": arguments}
    return [Form(**{**vars(form), **kept}) for form in forms], draw(pipeline, arguments), refused


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(family, form) -> (our pictures, a stranger's), all families in one process; and the families without kohya."""
    forms, ours, refused = [], {}, []
    for name in families.FAMILIES:
        made, pictures, without = written(name, tmp_path_factory.mktemp("family"))
        forms, refused = [*forms, *made], [*refused, *without]
        ours |= {form.name: pictures for form in made}
    theirs = ask(forms, {}, tmp_path_factory.mktemp("stranger") / "probe")
    return {name: (ours[name], theirs[name]) for name in ours}, refused


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_form_of_a_family_draws_the_students_pictures_for_a_stranger(seen, name):
    pairs = {key.partition(": ")[2]: pair for key, pair in seen[0].items() if key.partition(": ")[0] == name}
    assert {"lora", "diffusers"} <= set(pairs) if families.FAMILIES[name].targets else set(pairs) == {"diffusers"}
    for form, (ours, theirs) in pairs.items():
        assert ours.shape == theirs.shape and np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= ALLOWED[form], form


def test_families_whose_names_comfyui_does_not_read_have_no_form_for_it(seen):
    assert set(seen[1]) == NO_KOHYA


@pytest.mark.parametrize("name", [name for name, row in families.FAMILIES.items() if row.targets])
def test_a_familys_own_lora_is_read_back_as_it_was_written(name, tmp_path):
    pipeline, fresh = families.build(name), families.build(name)
    targets = families.FAMILIES[name].targets
    parameters = add_adapter(denoiser_of(pipeline), STUDENT, rank=2, lora_alpha=4, target_modules=targets)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_deployable(tmp_path, pipeline, is_lora=True)
    load_lora(fresh, str(tmp_path / LORA_FILE), "again")
    before, after = adapter_layers(denoiser_of(pipeline)), adapter_layers(denoiser_of(fresh))
    assert before.keys() == after.keys()
    for module, layer in before.items():
        assert layer.scale == after[module].scale == 2.0
        assert torch.equal(layer.up, after[module].up) and torch.equal(layer.down, after[module].down)
