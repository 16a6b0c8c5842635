"""What lives off the device: idle teachers come for their own task alone, modules that are shared are one object."""

import pytest
import tiny
import torch
from test_distill import assert_same_gradients, gradients_of, prepared, recipe_with, run_to_end

from diffopd import assemble as assembly
from diffopd import distill as loop
from diffopd.memory import Offload
from diffopd.supervise import Watch


class Elsewhere:
    """A device for a machine without one: moving there makes copies on the CPU, which are told apart."""

    type = "elsewhere"

    def __init__(self):
        self.copies, self.made = {}, []

    def has(self, module):
        return all(p.data_ptr() in self.copies for p in module.parameters())


@pytest.fixture
def elsewhere(monkeypatch):
    """The device to which the run's `Offload` moves; `made` lists what was made."""
    device = Elsewhere()
    to = torch.Tensor.to

    def moved(tensor, *args, **kwargs):
        if args and args[0] is device:
            copy = tensor.clone()
            device.copies[copy.data_ptr()] = copy
            return copy
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(assembly, "Offload", lambda _: device.made.append(Offload(device)) or device.made[-1])
    return device


@pytest.fixture
def full_recipe(tiny_sd, tiny_teachers, tmp_path):
    """Two full teachers and a LoRA one."""
    full = [tiny.write_teacher(tmp_path / "shelf" / f"full{n}", tiny_sd, form="full", seed=n) for n in (4, 5)]
    return tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [full[0], tiny_teachers[0], full[1]])


def test_full_teachers_share_everything_but_the_denoiser_with_the_student(full_recipe):
    run, _ = prepared(recipe_with(full_recipe))
    own, student = run.teachers[0].call.pipeline, run.student.pipeline
    assert own.unet is not student.unet and own.scheduler is not student.scheduler
    assert own.vae is student.vae and own.text_encoder is student.text_encoder and own.tokenizer is student.tokenizer
    assert run.teachers[1].call.pipeline.unet is student.unet


def test_offloaded_teachers_give_the_same_gradients(full_recipe):
    plain = gradients_of(recipe_with(full_recipe))
    assert_same_gradients(plain, gradients_of(recipe_with(full_recipe, "train.offload_teachers=true")))


def test_at_most_one_offloaded_teacher_is_on_the_device_and_each_comes_once_an_update(full_recipe, elsewhere):
    run, trained = prepared(recipe_with(full_recipe, "train.offload_teachers=true"))
    first, second = (run.teachers[n].call.pipeline.unet for n in (0, 2))
    homes = {name: p.data_ptr() for name, p in first.named_parameters()}
    weights = {name: p.detach().clone() for name, p in first.named_parameters()}
    assert not elsewhere.has(first) and not elsewhere.has(second) and elsewhere.made[0].moves == 0
    present = []
    for module in (first, second):
        module.register_forward_pre_hook(lambda *_: present.append((elsewhere.has(first), elsewhere.has(second))))
    loop.one_update(run, trained, Watch())
    assert set(present) == {(True, False), (False, True)}
    assert elsewhere.made[0].moves == 2
    assert {name: p.data_ptr() for name, p in first.named_parameters()} == homes
    assert all(torch.equal(p, weights[name]) for name, p in first.named_parameters())
    loop.one_update(run, trained, Watch())
    assert elsewhere.made[0].moves == 4


def test_a_run_with_offloaded_teachers_is_trained_and_evaluated(full_recipe):
    folder = run_to_end(recipe_with(full_recipe, "train.offload_teachers=true", "train.fuse_teachers=true"))
    from diffopd.evaluate import evaluate_run

    assert evaluate_run(folder.path, everything=True).is_file()
