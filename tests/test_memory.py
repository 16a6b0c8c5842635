"""What lives off the device: idle teachers come for their own task alone, modules that are shared are one object."""

import pytest
import tiny
import torch
from from_scripts import script
from run_helpers import assert_same_gradients, gradients_of, prepared, recipe_with, run_to_end

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


@pytest.mark.parametrize("settings", [[], ["train.frozen_dtype=bf16"]], ids=["float32", "bf16"])
def test_full_fine_tuning_with_checkpointing_and_an_ema_teacher(tiny_sd, tiny_teachers, tmp_path, settings):
    """The same gradients as without checkpointing, blocks computed again in backward, an average that follows."""
    me = tiny.write_teacher(tmp_path / "shelf" / "me", tiny_sd, form="ema", guidance_scale=3.0)
    path = tiny.write_recipe(tmp_path / "r.toml", tiny_sd, [me, tiny_teachers[0]])
    shared = ['student.train="full"', "teachers.0.ema_decay=0.5", "train.max_grad_norm=1e9", *settings]
    forwards, gradients = {}, {}
    for is_checkpointed in (False, True):
        run, trained = prepared(recipe_with(path, *shared, f"train.gradient_checkpointing={is_checkpointed}".lower()))
        average, written = run.teachers[0].follow
        start = {name: p.detach().clone() for name, p in trained.parameters.items()}
        calls = []
        run.student.pipeline.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        loop.one_update(run, trained, Watch())
        forwards[is_checkpointed] = len(calls)
        gradients[is_checkpointed] = {name: p.grad.clone() for name, p in trained.parameters.items()}
        assert len(trained.parameters) == len(list(run.student.pipeline.unet.parameters()))
        name = max(start, key=lambda n: float((trained.parameters[n].detach() - start[n]).abs().max()))
        expected = 0.5 * start[name] + 0.5 * trained.parameters[name].detach()
        torch.testing.assert_close(average.values[name], expected)
        torch.testing.assert_close(written[name], expected)
        assert not torch.equal(written[name], start[name]) and not written[name].requires_grad
        assert written[name] is not trained.parameters[name]
    assert forwards[True] == 2 * forwards[False]
    assert_same_gradients(gradients[False], gradients[True])


def test_a_full_student_with_everything_that_saves_memory_comes_to_its_end(full_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOPD_CACHE", str(tmp_path / "cache"))
    settings = ["train.gradient_checkpointing=true", "train.frozen_dtype=bf16", "train.text_encoders=released"]
    recipe = recipe_with(full_recipe, 'student.train="full"', "train.offload_teachers=true", *settings)
    folder = run_to_end(recipe)
    assert (folder.path / "checkpoint-2" / "unet" / "config.json").is_file()
    assert (folder.path / "samples" / "trajectory.json").is_file()


def test_the_check_of_a_recipes_memory_is_refused_where_the_training_would_take_a_gpu(monkeypatch, capsys):
    check_memory = script("check_memory")
    monkeypatch.setattr(check_memory, "measure_run", lambda *told: pytest.fail("it trains"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["check_memory.py", "--recipe", "together"])
    with pytest.raises(SystemExit) as ended:
        check_memory.main()
    assert ended.value.code == 2 and "CUDA_VISIBLE_DEVICES= python scripts" in capsys.readouterr().err
