"""A rehearsal on configs says what the real call does: rows of the denoiser, grid, memory of the graph."""

import diffusers
import pytest
import rehearsed
import torch

from diffopd.adapters import add_adapter
from diffopd.drive import Call, Walk, denoiser_of
from diffopd.rehearsal import can_rehearse, rehearse, stand_in_texts
from diffopd.schedulers import family_of

SIZE = rehearsed.SIZE
NEGATIVE = {"negative_prompt": "grey"}
CAT = {"none": ({"guidance_scale": 1.0}, 1), "guided": ({"guidance_scale": 3.0}, 2)}
EMBEDDED = {"embedded": ({"guidance_scale": 4.0}, 1)}
TRUE = {
    "without a negative prompt": ({"true_cfg_scale": 4.0}, 1),
    "two calls": ({"true_cfg_scale": 4.0, **NEGATIVE}, 2),
    "scale of 1": ({"true_cfg_scale": 1.0, **NEGATIVE}, 1),
}
# family -> form of guidance -> what the call is told, rows of the denoiser per picture and state
FORMS = {
    "sd": CAT,
    "sdxl": CAT,
    "lcm": EMBEDDED,
    "sd3": CAT,
    "flux": EMBEDDED | TRUE,
    "flux2": EMBEDDED,
    "klein": CAT,
    "klein distilled": {"ignored": ({"guidance_scale": 4.0}, 1)},
    "chroma": CAT,
    "z-image": {"none": ({"guidance_scale": 0.0}, 1), "from 0 on": ({"guidance_scale": 0.5}, 2)},
    "qwen": TRUE,
    "sana": CAT,
    "sana sprint": EMBEDDED,
    "pixart": CAT,
    "lumina": CAT,
    "wan": {name: ({**told, "num_frames": 5}, rows) for name, (told, rows) in CAT.items()},
}
PLAIN = {"use_resolution_binning": False}
MORE = {
    "sana": PLAIN | {"height": 32, "width": 32},
    "sana sprint": PLAIN | {"height": 32, "width": 32},
    "pixart": PLAIN,
}
CASES = [(family, form) for family, forms in FORMS.items() for form in forms]
MEASURED = ["sd", "sdxl", "sd3", "flux", "klein", "z-image", "qwen"]


def told(family, form, **more):
    arguments = {"num_inference_steps": 3, "max_sequence_length": 16, **SIZE, **MORE.get(family, {})}
    return {**arguments, **FORMS[family][form][0], **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = rehearsed.blueprint(family, tmp_path_factory.mktemp("configs") / family)
        return made[family]

    return of


def scheduler_of(base):
    config = base.configs["scheduler"]
    return getattr(diffusers, config["_class_name"]).from_config(config)


def real_call(base, family, arguments, batch_size):
    """The same call of the real pipeline: random weights, embedded prompts of the same shapes."""
    pipeline = rehearsed.pipeline(family)
    known = type(pipeline).__call__.__wrapped__.__code__.co_varnames
    given = {**arguments, **stand_in_texts(base, arguments, batch_size), "output_type": "latent"}
    return Call(pipeline, {name: value for name, value in given.items() if name in known})


@pytest.mark.parametrize(("family", "form"), CASES, ids=[f"{family}, {form}" for family, form in CASES])
def test_rows_and_grid_are_those_of_the_real_call(base, family, form):
    arguments = told(family, form)
    made = rehearse(base(family), scheduler_of(base(family)), arguments, batch_size=2)
    call = real_call(base(family), family, arguments, 2)
    denoiser, rows = denoiser_of(call.pipeline), []
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else next(iter(kwargs.values())))),
        with_kwargs=True,
    )
    with torch.no_grad():
        type(call.pipeline).__call__(call.pipeline, **call.arguments)
    assert sum(made.rows) == sum(rows) == 2 * len(made.rows) * FORMS[family][form][1]
    scheduler = call.pipeline.scheduler
    assert made.timesteps == tuple(float(t) for t in family_of(scheduler).timesteps(scheduler))
    if made.sigmas:
        assert made.sigmas == tuple(call.pipeline.scheduler.sigmas[: len(made.sigmas)].tolist())


def kept_by_autograd(call):
    """Bytes that the real first state's graph holds beside the weights, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in denoiser_of(call.pipeline).parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Walk(call) as walk:
        walk.advance(grad=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", MEASURED)
def test_the_graph_is_as_large_as_the_real_one(base, family, checkpointing):
    from diffopd.blueprint import add_lora_on_meta, build_on_meta

    form = list(FORMS[family])[1 if len(FORMS[family]) > 1 else 0]
    arguments = told(family, form, height=64, width=64)
    call = real_call(base(family), family, arguments, 2)
    denoiser, meta = denoiser_of(call.pipeline), build_on_meta(base(family).denoiser_config)
    add_adapter(denoiser, "student", rank=4, lora_alpha=4, target_modules=["to_q", "to_v"])
    add_lora_on_meta(meta, 4, ["to_q", "to_v"])
    for module in (denoiser, meta):
        if checkpointing:
            module.train().enable_gradient_checkpointing()
    real = kept_by_autograd(call)
    made = rehearse(base(family), scheduler_of(base(family)), arguments, batch_size=2, trained=meta)
    assert made.graph_bytes == pytest.approx(real, rel=0.1)
    assert real > 20_000


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_graph_of_frozen_bf16_weights_is_as_large_as_the_real_one(base, family):
    from diffopd.blueprint import add_lora_on_meta, build_on_meta
    from diffopd.precision import answer_in_float32

    arguments = told(family, "guided", height=64, width=64)
    call = real_call(base(family), family, arguments, 2)
    denoiser = denoiser_of(call.pipeline).to(torch.bfloat16)
    add_adapter(denoiser, "student", rank=4, lora_alpha=4, target_modules=["to_q", "to_v"])
    meta = build_on_meta(base(family).denoiser_config).to(torch.bfloat16)
    add_lora_on_meta(meta, 4, ["to_q", "to_v"])
    for parameter in meta.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    for module in (denoiser, meta):
        answer_in_float32(module, torch.bfloat16)
    real = kept_by_autograd(call)
    made = rehearse(base(family), scheduler_of(base(family)), arguments, batch_size=2, trained=meta)
    assert made.graph_bytes == pytest.approx(real, rel=0.1)


def test_a_call_with_a_picture_or_of_an_unknown_pipeline_is_not_rehearsed(base):
    assert can_rehearse(base("klein"), {}) and not can_rehearse(base("klein"), {"image": "x.png"})
    import dataclasses

    assert not can_rehearse(dataclasses.replace(base("sd"), pipeline_class="KandinskyPipeline"), {})
