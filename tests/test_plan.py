import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from rich.console import Console
from run_helpers import prepared, recipe_with

from diffopd.blueprint import add_lora_on_meta, num_values, read_blueprint
from diffopd.data import PromptRow
from diffopd.distill import one_update
from diffopd.errors import UserError
from diffopd.footprint import STEP_LORA_LAYERS, STEP_LORA_RANK
from diffopd.load import load_pipeline
from diffopd.plan import _held_out, make_plan, process_facts, readable, render
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.rehearsal import CLIP_TOKENS
from diffopd.supervise import Watch


def plan(path, *overrides):
    return make_plan(check(read_recipe(path, list(overrides))))


def test_trained_parameters_are_those_that_training_would_have(tiny_recipe, tiny_pipeline):
    from diffopd.adapters import add_adapter

    real = add_adapter(
        tiny_pipeline.unet,
        "student",
        rank=2,
        lora_alpha=4,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )
    assert plan(tiny_recipe).num_trained == sum(parameter.numel() for parameter in real.values())
    whole = sum(p.numel() for name, p in tiny_pipeline.unet.named_parameters() if "lora_" not in name)
    assert plan(tiny_recipe, "student.train=full").num_trained == whole


def test_calls_count_guidance_and_substeps(tiny_recipe):
    told = plan(tiny_recipe, "objective.substeps=5")
    assert told.student_evaluations == 2  # two steps, no guidance
    assert [teacher.evaluations for teacher in told.teachers] == [20, 10]  # 2 states x 5 x (2 guided, 1 not)
    assert told.pictures_per_update == 4 and told.evaluations_per_update == (8, 60)
    assert plan(tiny_recipe, "student.guidance_scale=3.0").student_evaluations == 4


def test_calls_follow_the_query(tiny_recipe):
    told = plan(tiny_recipe, "student.num_inference_steps=4", "objective.query={indices=[1]}")
    assert told.student_evaluations == 2 and told.teachers[1].evaluations == 1
    one = plan(tiny_recipe, "student.num_inference_steps=4", "objective.query=one_low_noise")
    assert one.teachers[1].evaluations == 1 and 1 < one.student_evaluations < 4


@pytest.mark.parametrize(("draws", "updates"), [("all", 1), ("round_robin", 2)])
def test_the_evaluations_of_an_update_are_those_that_a_run_counts(weighted, draws, updates):
    options = ["objective.substeps=5", f"train.tasks_per_update={draws}"]
    options += ["teachers.lines.weight=1.0"] if draws == "round_robin" else []
    told = plan(weighted, *options)
    run, trained = prepared(recipe_with(weighted, *options))
    watch = Watch()
    for trained.progress.update in range(updates):
        one_update(run, trained, watch)
    counted = watch.evaluations["student"] / updates, watch.evaluations["teacher"] / updates
    assert counted == told.evaluations_per_update == ((8, 60) if draws == "all" else (4, 30))


def test_weights_are_shares_of_the_cost_only_where_tasks_are_drawn_by_them(weighted):
    told = plan(weighted, "objective.substeps=5", "train.tasks_per_update=2")
    assert told.evaluations_per_update == (8, 4 * (0.25 * 20 + 0.75 * 10))
    assert [teacher.share for teacher in plan(weighted).teachers] == [0.25, 0.75]


@pytest.fixture
def weighted(tiny_recipe):
    """The tiny recipe, whose cheaper teacher weighs three times as much as the other."""
    tiny_recipe.write_text(tiny_recipe.read_text().replace("[objective]", "weight = 3.0\n[objective]"))
    return tiny_recipe


def test_the_grid_is_that_of_the_walk(tiny_recipe, tiny_pipeline):
    tiny_pipeline.scheduler.set_timesteps(2)
    assert plan(tiny_recipe).grid.timesteps == tuple(tiny_pipeline.scheduler.timesteps.tolist())


@pytest.fixture
def adapted_unet(tiny_pipeline):
    """The tiny recipe's UNet with the adapter that it would get."""
    from diffopd.adapters import add_adapter, freeze

    freeze(tiny_pipeline)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    add_adapter(tiny_pipeline.unet, "student", rank=2, lora_alpha=4, target_modules=targets)
    return tiny_pipeline.unet.train()


def kept_by_autograd(unet):
    """Bytes that one forward of a batch of 2 keeps for its backward, weights of the network aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(torch.randn(2, 4, 8, 8), torch.tensor(1), torch.randn(2, CLIP_TOKENS, 16))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_the_graph_estimate_is_what_autograd_keeps(tiny_recipe, adapted_unet):
    assert plan(tiny_recipe).memory["graph of one state"] == pytest.approx(kept_by_autograd(adapted_unet), rel=0.3)


def test_the_graph_estimate_counts_the_weights_that_a_folded_adapter_makes(tiny_recipe, adapted_unet):
    from diffopd.adapters import fused_forward

    plain = kept_by_autograd(adapted_unet)
    with fused_forward(adapted_unet):
        folded = kept_by_autograd(adapted_unet)
    planned = [
        plan(tiny_recipe, f"train.fuse_student={said}").memory["graph of one state"] for said in ("false", "true")
    ]
    assert folded != plain and planned[1] - planned[0] == pytest.approx(folded - plain, rel=0.01)


def test_gradient_checkpointing_shrinks_the_graph_estimate(tiny_recipe):
    less = plan(tiny_recipe, "train.gradient_checkpointing=true").memory["graph of one state"]
    assert less < 0.7 * plan(tiny_recipe).memory["graph of one state"]


def test_memory_counts_teachers_and_averages(tiny_recipe, tiny_teachers):
    memory = plan(tiny_recipe, "train.ema_decay=0.9").memory
    files = [folder / "pytorch_lora_weights.safetensors" for folder in tiny_teachers]
    assert memory["teachers"] == 4 * sum(map(num_values, files))
    assert memory["averages"] == memory["trained weights"]


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ("bnb-4bit", 4.5),
        ("torchao-int8", 8),
        ({"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int2"}}, 2.5),
        ({"quant_backend": "modelopt"}, None),
    ],
)
def test_a_quantized_base_is_counted_in_its_bits(tiny_recipe, tiny_pipeline, quantization, bits):
    parts = check(read_recipe(tiny_recipe))  # of which the package need not be installed here
    student = parts.recipe.student.model_copy(update={"quantization": quantization})
    told = make_plan(replace(parts, recipe=with_student(parts.recipe, student)))
    linear = sum(m.weight.numel() for m in tiny_pipeline.unet.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in tiny_pipeline.unet.parameters()) - linear
    assert told.memory["base unet"] == int(4 * rest + linear * (bits or 32) / 8)
    assert told.memory["base text_encoder"] == plan(tiny_recipe).memory["base text_encoder"]
    assert ("is not known here" if bits is None else f"at {bits:g} bits a weight") in shown(told)


def test_components_that_a_table_names_are_counted_in_its_bits(tiny_recipe, tiny_pipeline):
    table = {"quant_backend": "bitsandbytes_8bit", "components_to_quantize": ["unet", "text_encoder"]}
    parts = check(read_recipe(tiny_recipe))
    student = parts.recipe.student.model_copy(update={"quantization": table})
    told = make_plan(replace(parts, recipe=with_student(parts.recipe, student)))
    linear = sum(m.weight.numel() for m in tiny_pipeline.text_encoder.modules() if isinstance(m, torch.nn.Linear))
    whole = plan(tiny_recipe).memory["base text_encoder"]
    assert linear > 0 and told.memory["base text_encoder"] == whole - 3 * linear


def with_student(recipe, student):
    other = recipe.model_copy(update={"student": student})
    other._source = recipe._source
    return other


def shown(told):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(render(told))
    return console.export_text()


def test_a_lora_to_start_from_is_counted_at_its_own_rank(tiny_recipe, tiny_sd, tmp_path):
    (tmp_path / "start").mkdir()
    file = tiny.save_lora(tmp_path / "start", tiny_sd, rank=16, seed=0)
    told, fresh = plan(tiny_recipe, f"student.init_weights={file}"), plan(tiny_recipe)
    assert told.num_trained == num_values(file) == 8 * fresh.num_trained
    assert told.memory["trained weights"] == 4 * told.num_trained
    assert told.memory["graph of one state"] > fresh.memory["graph of one state"]
    assert f"LoRA that starts as {file}, rank 16" in " ".join(shown(told).split())
    hub = plan(tiny_recipe, "student.init_weights=owner/adapter")
    assert hub.num_trained > 32 * fresh.num_trained  # more layers, too
    assert "owner/adapter is on the hub: it is taken to be a few-step LoRA of the usual rank 64" in shown(hub)


@pytest.mark.parametrize(
    ("base", "megabytes"),
    [("stable-diffusion-v1-5/stable-diffusion-v1-5", 135), ("stabilityai/stable-diffusion-xl-base-1.0", 394)],
)
def test_a_few_step_lora_is_taken_to_be_as_large_as_published_ones(base, megabytes):
    """The sizes of latent-consistency's files on the hub, in float16."""
    denoiser = copy.deepcopy(read_blueprint(base, shipped=True).meta_denoiser)
    assert round(2 * add_lora_on_meta(denoiser, STEP_LORA_RANK, STEP_LORA_LAYERS) / 1e6) == megabytes


def test_what_is_loaded_before_and_after_training_is_told(tiny_recipe, tiny_pipeline):
    sizes = {name: stored(part) for name, part in tiny_pipeline.components.items() if isinstance(part, torch.nn.Module)}
    resident, released = (plan(tiny_recipe, f"train.text_encoders={said}").held for said in ("resident", "released"))
    assert resident.encoding == 0 and released.encoding == 4 * sizes["text_encoder"]
    assert "until prompts are stored" in shown(plan(tiny_recipe, "train.text_encoders=released"))
    assert resident.evaluating == 4 * (sum(sizes.values()) + sizes["unet"])  # the student's is beside the base's
    alone = plan(tiny_recipe, "evaluate.teachers=false").held
    assert alone.evaluating == 4 * sum(sizes.values())
    fused = plan(tiny_recipe, "train.fuse_teachers=true").held
    assert fused.evaluating == resident.evaluating + len(read_recipe(tiny_recipe).teachers) * 4 * sizes["unet"]
    assert plan(tiny_recipe, "evaluate.dtype=bf16").held.evaluating == 2 * sum(sizes.values())


def stored(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


def test_the_plan_reads_as_text(tiny_recipe):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(render(plan(tiny_recipe, "objective.substeps=5")))
    text = " ".join(console.export_text().split())
    for part in ("LoRA, rank 2", "999 499", "1.000", "5 substeps", "dots", "2 updates", "sum", "a third higher"):
        assert part in text


def test_a_named_solver_is_told_to_be_the_stock_schedulers_at_deployment(tiny_recipe):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))
    console.print(render(plan(tiny_recipe, "student.solver=lcm")))
    told = " ".join(console.export_text().split())
    assert "deployed with DDIMScheduler's own step, in evaluation and export: stock pipelines do not know lcm" in told


def test_one_task_an_update_in_turn_is_one_batch(tiny_recipe):
    for draws in ("1", "round_robin"):
        assert plan(tiny_recipe, f"train.tasks_per_update={draws}").pictures_per_update == 2


def test_weights_are_not_loaded(tmp_path, tiny_sd):
    """A base whose tensors cannot be read still has a plan, which needs their names and shapes."""
    import shutil

    base = shutil.copytree(tiny_sd, tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw.replace(b'"dtype":"F32"', b'"dtype":"F99"'))
    assert weights.read_bytes() != raw
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(str(base))
    teacher = tiny.write_teacher(tmp_path / "itself", base, form="base")
    assert plan(tiny.write_recipe(tmp_path / "r.toml", base, [teacher])).num_parameters > 0


def test_sizes_have_units():
    assert [readable(size) for size in (0, 1023, 1024, 3 * 2**30)] == [
        "0.0 B",
        "1023.0 B",
        "1.0 KiB",
        "3.0 GiB",
    ]


def test_a_number_of_steps_for_scoring_alone_is_shown(tiny_recipe, capsys):
    for options, is_shown in (([], False), (["evaluate.student_steps=8"], True)):
        Console(width=200).print(render(plan(tiny_recipe, *options)))
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert (["scored", "at", "8", "steps"] in lines) is is_shown


def test_held_out_prompts_that_evaluation_scores_as_well_are_told(tiny_recipe):
    def told(*options):
        console = Console(width=140, record=True, file=open("/dev/null", "w"))
        console.print(render(plan(tiny_recipe, *options)))
        return " ".join(console.export_text().split())

    assert "held-out loss" not in told("train.validate_every=0")
    checked = "every 5 updates, on the last 1 test prompts of each teacher"
    few = told("train.validate_every=5", "train.batch_size=1", "evaluate.num_prompts=2")
    assert f"{checked}; some are scored by evaluation, too, as dots has 2, lines has 2 in all" in few
    enough = told("train.validate_every=5", "train.batch_size=1", "evaluate.num_prompts=1")
    assert checked in enough and "scored by evaluation" not in enough


@pytest.mark.parametrize(
    ("form", "kind", "metadata", "wanted"),
    [
        ("lora", None, {}, "test"),
        ("base", "enhanced_prompt", {"enhanced_prompt": "more"}, "test"),
        ("base", "enhanced_prompt", {}, "train"),
        ("ema", "ip_adapter", {}, "train"),
        ("pictures", None, {}, "pictures"),
    ],
)
def test_the_rows_of_the_held_out_loss_are_those_that_hold_what_the_teacher_sees(form, kind, metadata, wanted):
    context = SimpleNamespace(kind=kind) if kind else None
    rows = [PromptRow("a dot", metadata)]
    assert _held_out(SimpleNamespace(context=context), SimpleNamespace(form=form), rows) == wanted


@pytest.mark.parametrize(
    ("processes", "device", "said"),
    [
        (1, "cpu", []),
        (2, "cpu", [("processes", "2")]),
        (3, "cpu", [("processes", "3 on 2 cores: they slow each other down, take at most 2 here")]),
        (3, "cuda", [("processes", "3")]),
    ],
)
def test_more_processes_than_cores_are_remarked(monkeypatch, processes, device, said):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5}, raising=False)
    monkeypatch.setattr("diffopd.processes.default_device", lambda: device)
    assert process_facts(processes) == said
