"""Richer contexts: the teacher sees more at the same states, and the student's network stays untouched."""

import contexts
import pytest
import tiny
import torch

from diffopd.adapters import SELF_TEACHER, STUDENT, AdapterSwitch, add_adapter, freeze
from diffopd.context import (
    KEEP_THE_SUBJECT,
    ContextSettings,
    EnhancedPrompt,
    ReferenceImage,
    TextOnly,
    check_context,
    choose_kind,
    in_context,
)
from diffopd.data import PromptRow
from diffopd.drive import Call, Walk, denoiser_of, replaced_forward, rollout, shell
from diffopd.errors import UserError
from diffopd.image_tokens import mirror

STEPS = 3


def latents_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states(call):
    """The samples of the plain walk."""
    return [visit.sample.clone() for visit in rollout(call)]


def held(student, teachers):
    """The student's walk with every teacher held at its states: [(student's visit, teachers' visits)] as velocities."""
    seen = []
    walks = [Walk(call) for call in (student, *teachers)]
    for walk in walks:
        walk.__enter__()
    try:
        replies = [None] * len(walks)
        for _ in range(STEPS):
            visits = [walk.advance(reply) for walk, reply in zip(walks, replies, strict=True)]
            assert all(torch.equal(visit.sample, visits[0].sample) for visit in visits)
            seen.append([(visit.sample.clone(), visit.prediction.velocity.clone()) for visit in visits])
            reply = visits[0].native_reply()
            after = reply[0] if isinstance(reply, tuple) else reply.prev_sample
            replies = [reply, *(visit.answer(after) for visit in visits[1:])]
    finally:
        for walk in walks:
            walk.__exit__(None, None, None)
    return seen


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ip")
    file, encoder = contexts.save_ip_adapter(folder, tiny.build_pipeline().unet)
    return ContextSettings(kind="ip_adapter", ip_adapter=str(file), image_encoder=str(encoder))


@pytest.fixture
def rows(tmp_path):
    return contexts.draw_rows(tmp_path / "pictures")


def told(rows, guidance_scale):
    return {
        "num_inference_steps": STEPS,
        "guidance_scale": guidance_scale,
        "output_type": "latent",
        "latents": latents_of(len(rows), 4, 8, 8),
        "prompt": [row.prompt for row in rows],
    }


@pytest.mark.parametrize("build", [tiny.build_pipeline, contexts.build_xl], ids=["SD", "SDXL"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_ip_adapter_is_on_the_teachers_side_only(rows, tmp_path, build, guidance_scale):
    """In lockstep with its teacher the student is bit-equal to the untouched UNet; the teacher says something else."""
    pipeline = build()
    file, encoder = contexts.save_ip_adapter(tmp_path, pipeline.unet)
    adapter = ContextSettings(kind="ip_adapter", ip_adapter=str(file), image_encoder=str(encoder))
    freeze(pipeline)
    untouched = states(Call(build(), told(rows, guidance_scale)))
    call, context = in_context(Call(shell(pipeline), told(rows, guidance_scale)), adapter, None, "here")
    plain = Call(shell(pipeline), told(rows, guidance_scale))
    seen = held(Call(pipeline, told(rows, guidance_scale)), [plain, call.told(**context.arguments(rows))])
    for (student, without, with_picture), state in zip(seen, untouched, strict=True):
        assert torch.equal(student[0], state)
        assert torch.equal(student[1], without[1])
        assert (with_picture[1] - without[1]).abs().max() > 1e-3
    other = call.told(**context.arguments(rows[::-1]))
    swapped = held(Call(pipeline, told(rows, guidance_scale)), [other])
    assert not torch.equal(swapped[0][1][1], seen[0][2][1])


def test_each_row_sees_its_own_picture(adapter, rows):
    """A batch of two says what two batches of one say."""
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    call, context = in_context(Call(shell(pipeline), told(rows, 2.0)), adapter, None, "here")
    (both,) = context.arguments(rows)["ip_adapter_image_embeds"]
    assert both.shape == (4, 1, contexts.CLIP_WIDTH) and not both[:2].any() and both[2:].any()
    together = next(iter(rollout(call.told(**context.arguments(rows))))).model_output
    for index, row in enumerate(rows):
        alone = call.told(**context.arguments([row]), prompt=[row.prompt], latents=told(rows, 2.0)["latents"][[index]])
        assert torch.allclose(next(iter(rollout(alone))).model_output[0], together[index], atol=1e-5)


def test_nothing_of_the_adapter_is_in_what_is_saved(adapter, rows, tmp_path):
    pipeline = tiny.build_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.save_pretrained(tmp_path / "before")
    call, context = in_context(Call(shell(pipeline), told(rows, 2.0)), adapter, None, "here")
    list(rollout(call.told(**context.arguments(rows))))
    pipeline.save_pretrained(tmp_path / "after")
    for file in ("model_index.json", "unet/config.json"):
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    assert not (tmp_path / "after" / "image_encoder").exists()
    after = tiny.load_pipeline(tmp_path / "after").unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_mirror_shares_what_is_trained_and_binds_its_own_adapter():
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    options = {"rank": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]}
    trained = add_adapter(pipeline.unet, STUDENT, **options)
    add_adapter(pipeline.unet, SELF_TEACHER, seed=1, **options)
    AdapterSwitch(pipeline.unet).select(STUDENT)
    other = mirror(pipeline.unet)
    assert {id(p) for p in other.parameters()} == {id(p) for p in pipeline.unet.parameters()}
    arguments = (latents_of(1, 4, 8, 8), torch.tensor(500), latents_of(1, 5, 16, seed=1))
    switch = AdapterSwitch(other)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
        moved = pipeline.unet(*arguments).sample
        with switch.bound(None):
            base = other(*arguments).sample
            assert torch.equal(pipeline.unet(*arguments).sample, moved)
        with switch.bound(STUDENT):
            assert torch.equal(other(*arguments).sample, moved) and not torch.equal(base, moved)
    calls = []
    handle = pipeline.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    other(*arguments)
    handle.remove()
    assert not calls
    with replaced_forward(pipeline.unet.mid_block, lambda *args: None), pytest.raises(RuntimeError, match="replaced"):
        mirror(pipeline.unet)


def test_float32_adapters_on_a_bf16_trunk_stay_what_they_are_beside_an_ip_adapter(adapter, rows):
    pipeline = tiny.build_pipeline()
    freeze(pipeline)
    pipeline.unet.to(torch.bfloat16)
    trained = add_adapter(pipeline.unet, STUDENT, rank=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    shared = {id(parameter) for parameter in pipeline.unet.parameters()}
    call, _ = in_context(Call(shell(pipeline), told(rows, 1.0)), adapter, STUDENT, "here")
    assert {id(p) for p in call.pipeline.unet.parameters()} >= shared
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    added = [p for p in call.pipeline.unet.parameters() if id(p) not in shared]
    assert added and {p.dtype for p in added} == {torch.bfloat16} and not any(p.requires_grad for p in added)
    assert "to" not in vars(call.pipeline.unet)


def test_a_reference_image_changes_what_klein_says_at_the_students_states(tmp_path):
    pipeline = contexts.build_klein()
    freeze(pipeline)
    (row,), context = contexts.draw_rows(tmp_path, ((64, 64),)), ReferenceImage()  # klein takes no smaller one
    assert context.prompts([row]) == [f"a red dot. {KEEP_THE_SUBJECT}"]
    assert ReferenceImage("").prompts([row]) == ["a red dot"]
    told = {
        "num_inference_steps": STEPS, "output_type": "latent", "latents": latents_of(1, 16, 4, 4), "height": 16,
        "width": 16, "text_encoder_out_layers": (1, 2), "max_sequence_length": 128,
    }  # fmt: skip
    student = Call(pipeline, {**told, "prompt": [row.prompt]})
    untouched = states(student)
    call, context = in_context(Call(shell(pipeline), told), ContextSettings(kind="reference_image"), None, "here")
    with_picture = call.told(prompt=context.prompts([row]), **context.arguments([row]))
    worded = Call(shell(pipeline), {**told, "prompt": context.prompts([row])})
    seen = held(student, [worded, with_picture])
    for (said, without, taught), state in zip(seen, untouched, strict=True):
        assert torch.equal(said[0], state)
        assert (taught[1] - without[1]).abs().max() > 1e-4 < (taught[1] - said[1]).abs().max()


def test_a_bucket_is_the_size_of_the_reference_image(tmp_path):
    (row,) = contexts.draw_rows(tmp_path, ((30, 20),))
    sized = PromptRow(row.prompt, row.metadata | {"bucket": [24, 16]})
    assert ReferenceImage().arguments([sized])["image"].size == (24, 16)
    assert ReferenceImage().arguments([row])["image"].size == (30, 20)


def test_a_richer_caption_takes_the_prompts_place(tmp_path):
    row = PromptRow("a dot", {"enhanced_prompt": "a dot in vermilion"})
    call = Call(tiny.build_pipeline(), told([row], 1.0))
    same, context = in_context(call, ContextSettings(kind="enhanced_prompt"), None, "here")
    assert isinstance(context, EnhancedPrompt) and same is call
    assert context.prompts([row]) == ["a dot in vermilion"] and context.arguments([row]) == {}
    assert context.covers(row) and not context.covers(PromptRow("a dot"))
    taught = call.told(prompt=context.prompts([row]))
    seen = held(Call(shell(call.pipeline), told([row], 1.0)), [taught])
    assert all((student[1] - teacher[1]).abs().max() > 1e-4 for student, teacher in seen)


def test_text_alone_adds_nothing():
    row = PromptRow("a dot", {"file_name": "x.png"})
    assert TextOnly().prompts([row]) == ["a dot"] and TextOnly().arguments([row]) == {} and TextOnly().covers(row)


def test_the_context_is_chosen_by_pipeline():
    assert choose_kind("Flux2KleinPipeline", is_enhanced=False, place="here") == "reference_image"
    assert choose_kind("StableDiffusionXLPipeline", is_enhanced=True, place="here") == "ip_adapter"
    assert choose_kind("LuminaPipeline", is_enhanced=True, place="here") == "enhanced_prompt"
    with pytest.raises(UserError, match=r"no way to see a picture.*enhanced_text"):
        choose_kind("Lumina2Pipeline", is_enhanced=False, place="here")


@pytest.mark.parametrize(
    ("kind", "pipeline", "is_enhanced", "reason"),
    [
        ("enhanced_prompt", "StableDiffusionPipeline", False, "not every picture has one"),
        ("reference_image", "StableDiffusionPipeline", True, "takes no reference image.*or take enhanced_prompt"),
        ("ip_adapter", "Flux2KleinPipeline", False, "takes no ip adapter"),
        ("reference_image", "QwenImageEditPipeline", False, "needs a picture in every call"),
    ],
)
def test_a_context_that_cannot_be_is_refused(kind, pipeline, is_enhanced, reason):
    with pytest.raises(UserError, match=reason):
        check_context(kind, pipeline, is_enhanced=is_enhanced, place="here")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "ip_adapter"}, "needs ip_adapter = "),
        ({"kind": "ip_adapter", "ip_adapter": "a", "image_encoder": "b", "instruction": "x"}, "instruction belongs"),
        ({"kind": "enhanced_prompt", "scale": 0.5}, "scale belongs"),
        ({"kind": "enhanced_prompt", "instruction": "x"}, "instruction belongs"),
    ],
)
def test_settings_that_say_nothing_to_each_other_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ContextSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "enhanced_prompt"},
        {"kind": "reference_image", "instruction": "Keep it."},
        {"kind": "ip_adapter", "ip_adapter": "a", "image_encoder": "b"},
        {"kind": "image_prompt", "vision_language": "a"},
    ],
)
def test_a_context_is_read_again_as_a_run_folder_stores_it(settings):
    """With every key, those that were not given too."""
    context = ContextSettings(**settings)
    assert ContextSettings(**context.model_dump(mode="json")) == context


@pytest.mark.parametrize("broken", ["missing", "pickle", "foreign", "misfit"])
def test_an_ip_adapter_that_cannot_be_used_is_refused(adapter, rows, tmp_path, broken):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter.safetensors"
    if broken == "pickle":
        file = tmp_path / "adapter.bin"
        file.write_bytes(b"pickle")
    if broken == "foreign":
        save_file({"unet.weight": torch.zeros(1)}, file)
    if broken == "misfit":
        tensors = load_file(adapter.ip_adapter)
        save_file({name: t for name, t in tensors.items() if not name.startswith("ip_adapter.1.")}, file)
    settings = adapter.model_copy(update={"ip_adapter": str(file)})
    reason = {"missing": "not one .safetensors", "pickle": "never loaded"}.get(broken, "does not fit the base's")
    with pytest.raises(UserError, match=f"here: .*{reason}"):
        in_context(Call(tiny.build_pipeline(), told(rows, 1.0)), settings, None, "here")


def test_the_denoiser_of_a_context_is_its_own(adapter, rows):
    pipeline = tiny.build_pipeline()
    call, _ = in_context(Call(shell(pipeline), told(rows, 1.0)), adapter, None, "here")
    assert denoiser_of(call.pipeline) is not pipeline.unet
    assert {id(p) for p in pipeline.unet.parameters()} < {id(p) for p in call.pipeline.unet.parameters()}
