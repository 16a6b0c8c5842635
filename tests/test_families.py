"""One contract for every pipeline family; `scripts/families_table.py` makes README's table of its results."""

import importlib.util
import json
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, REFUSED, build
from family_cast import PROMPTS, STUDENT, TEACHER, cast_of, cast_with, seeded, walked

from diffopd.adapters import Average, add_adapter, autocast_forward
from diffopd.blueprint import build_on_meta
from diffopd.checkpoint import save_deployable
from diffopd.drive import Call, Walk, decode, denoiser_of, survey
from diffopd.errors import UserError
from diffopd.fit_check import lora_size
from diffopd.load import LORA_FILE, fuse_adapter, load_lora, load_pipeline
from diffopd.parts import CHECKPOINTS_WRONGLY, denoisers_of
from diffopd.recipe import read_recipe
from diffopd.schedulers import FAMILIES as SCHEDULER_FAMILIES
from diffopd.schedulers import family_of

ROOT = Path(__file__).parent.parent
FORMS = [(name, form) for name, row in FAMILIES.items() for form in row.forms]
every_family = pytest.mark.parametrize("name", FAMILIES)
every_form = pytest.mark.parametrize(("name", "form"), FORMS)


def module_of(script: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(images) -> np.ndarray:
    """Pictures or frames as one array."""
    return np.stack([np.asarray(image) for image in images])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative distance between two tensors."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def first_input(args, kwargs):
    """The sample that a denoiser is called with, a tensor."""
    sample = args[0] if args else next(iter(kwargs.values()))
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


@every_form
def test_the_driven_call_is_the_plain_call_and_ends_at_the_denoised_and_decode_gives_its_pictures(name, form):
    cast = cast_of(name)

    def told(output_type: str | None) -> Call:
        torch.manual_seed(1)  # SD3 does not hand its generator on to the scheduler
        kind = {"output_type": output_type} if output_type else {}
        return cast.call(form, generator=seeded(1), **kind)

    plain = {kind: cast.pipeline(**told(kind).arguments)[0] for kind in ("latent", "np", None)}
    latents, state, denoised = walked(told("latent"))
    assert torch.equal(latents, plain["latent"])
    torch.testing.assert_close(denoised, state, rtol=1e-4, atol=1e-4)  # no noise is left: model_output is read rightly
    assert np.array_equal(walked(told("np"))[0], plain["np"])
    assert np.array_equal(arrays(decode(cast.call(form), state)), arrays(plain[None]))


def test_sana_sprint_walks_in_any_number_of_steps_and_in_two_on_its_own_grid():
    call = cast_of("SanaSprint").call()
    assert survey(call.told(num_inference_steps=2)).timesteps == pytest.approx([1.5708, 1.3])
    assert survey(call.told(num_inference_steps=4)).timesteps == pytest.approx([1.5708 * n / 4 for n in (4, 3, 2, 1)])


def test_sana_sprint_draws_noise_at_every_step_but_the_last():
    call = cast_of("SanaSprint").call().told(num_inference_steps=3)
    row = family_of(call.pipeline.scheduler)
    with Walk(call) as walk:
        visit, stds = walk.advance(), []
        while visit is not None:
            assert visit.place.path.name == row.path(call.pipeline.scheduler) == "vp"
            level = row.level(call.pipeline.scheduler, float(visit.arguments["timestep"].flatten()[0]))
            assert level == pytest.approx(visit.place.sigma)
            stds.append(visit.native(visit.prediction).std)
            visit = walk.advance(visit.native_reply())
    assert [std > 0 for std in stds] == [True, True, False] and row.draws_noise(call.pipeline.scheduler, {})


@every_family
def test_a_plan_counts_the_lora_that_a_family_gets_or_says_that_it_takes_none(name, tiny_recipe):
    targets, denoiser = FAMILIES[name].targets, denoiser_of(build(name))
    recipe = read_recipe(tiny_recipe, [f"student.target_modules={json.dumps(targets)}"] if targets else [])
    meta = build_on_meta({**denoiser.config, "_class_name": type(denoiser).__name__})
    if not targets:
        with pytest.raises(UserError, match="takes no adapters in diffusers"):
            lora_size(recipe, meta)
        return
    real = add_adapter(denoiser, STUDENT, rank=recipe.student.rank, lora_alpha=1, target_modules=targets)
    assert lora_size(recipe, meta) == sum(parameter.numel() for parameter in real.values())


@every_family
def test_latents_of_the_surveyed_shape_are_where_the_walk_begins(name):
    cast = cast_of(name)
    latents = cast.latents()
    with Walk(cast.call(latents=latents)) as walk:
        state = walk.advance(idle=True).step.sample
    assert state.shape == (len(PROMPTS), *cast.survey.shape)
    torch.testing.assert_close(state.flatten().sort().values, latents.flatten().sort().values)


@every_form
def test_an_idle_denoiser_answers_in_the_shape_of_a_real_one(name, form):
    cast, shapes = cast_of(name), []

    def note(module, inputs, output):
        shapes.append([tuple(row.shape) for row in output[0]])

    handles = [module.register_forward_hook(note) for module in denoisers_of(cast.pipeline)]
    with Walk(cast.call(form)) as walk:
        walk.advance()
    half = len(shapes)
    with Walk(cast.call(form)) as walk:
        walk.advance(idle=True)
    for handle in handles:
        handle.remove()
    assert half > 0 and shapes[:half] == shapes[half:]


@every_family
def test_a_held_teacher_sees_exactly_the_students_states_and_gradient_reaches_the_student_alone(name):
    cast, seen = cast_of(name), {STUDENT: [], TEACHER: []}

    def noted(call: Call, states: list) -> Call:
        def note(module, args, kwargs):
            states.append(first_input(args, kwargs)[: len(PROMPTS)].detach().clone())

        @contextmanager
        def binding():
            handle = denoiser_of(call.pipeline).register_forward_pre_hook(note, with_kwargs=True)
            with call.binding():
                yield
            handle.remove()

        return Call(call.pipeline, call.arguments, binding)

    guided, latents = list(cast.row.forms)[-1], cast.latents()
    student, teacher = cast.call(latents=latents), cast.held(guided, latents=latents)
    losses = cast.supervise(noted(student, seen[STUDENT]), noted(teacher, seen[TEACHER]))
    calls = len(seen[TEACHER]) // len(seen[STUDENT])
    assert len(losses) == cast.row.steps and len(seen[TEACHER]) == calls * len(seen[STUDENT]) > 0
    for index, state in enumerate(seen[STUDENT]):
        assert all(torch.equal(state, other) for other in seen[TEACHER][index * calls : (index + 1) * calls])
    assert min(float(state.loss.max()) for state in losses) > 0
    assert cast.gradient().abs().max() > 0
    trained = {id(parameter) for parameter in cast.student.values()}
    parts = [*cast.pipeline.components.values(), *teacher.pipeline.components.values()]
    held = [p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters() if id(p) not in trained]
    assert len(held) >= len(cast.teacher) and all(parameter.grad is None for parameter in held)


@every_form
def test_a_teacher_equal_to_the_student_gives_loss_zero_and_zero_gradient(name, form):
    cast = cast_of(name)
    latents = cast.latents()
    losses = cast.supervise(cast.call(form, latents=latents), cast.held(form, STUDENT, latents=latents))
    assert max(float(state.loss.max()) for state in losses) == 0
    assert cast.gradient().abs().max() == 0


@every_family
def test_guidance_on_one_side_is_seen_by_the_other(name):
    cast = cast_of(name)
    forms, latents = list(cast.row.forms), cast.latents()
    stronger = {key: value + 2 for key, value in cast.row.forms[forms[-1]].items() if key.endswith("_scale")}
    student, teacher = cast.call(latents=latents), cast.held(forms[-1], STUDENT, latents=latents, **stronger)
    assert max(float(state.loss.max()) for state in cast.supervise(student, teacher, backward=False)) > 0


@every_family
def test_streaming_two_passes_and_gradient_checkpointing_give_the_same_gradient(name):
    cast = cast_of(name)
    guided, latents = list(cast.row.forms)[-1], cast.latents()

    def gradient(**options) -> torch.Tensor:
        cast.supervise(cast.call(guided, latents=latents), cast.held(guided, latents=latents), **options)
        return cast.gradient()

    streamed = gradient()
    bound = 1e-5 * float(streamed.abs().max())
    assert (gradient(two_pass=True) - streamed).abs().max() <= bound
    if type(denoiser_of(cast.pipeline)).__name__ in CHECKPOINTS_WRONGLY:
        return
    denoiser_of(cast.pipeline).enable_gradient_checkpointing()
    checkpointed = gradient()
    denoiser_of(cast.pipeline).disable_gradient_checkpointing()
    assert (checkpointed - streamed).abs().max() <= bound


@every_family
def test_bf16_weights_agree_with_fp32_to_their_precision_and_keep_states_in_fp32(name):
    cast, half = cast_of(name), cast_with(name, build(name).to(torch.bfloat16))
    latents, results = cast.latents(), []
    for one in (cast, half):
        torch.manual_seed(1)
        with Walk(one.call(latents=latents, generator=seeded(1), output_type="np")) as walk:
            visit = walk.advance(grad=True)
            said = visit.prediction.velocity
            said.square().mean().backward()
            while visit is not None:
                state, visit = visit.step.sample, walk.advance(visit.native_reply())
        assert said.dtype == state.dtype == torch.float32
        results.append((said.detach(), one.gradient(), state, torch.from_numpy(walk.result[0])))
    for exact, rounded in zip(*results, strict=True):
        assert apart(rounded, exact) < cast.row.rounding


@every_family
def test_autocast_never_serves_stale_weights_after_an_adapter_or_average_swap(name):
    cast = cast_of(name)
    latents, average = cast.latents(), Average(cast.student, decay=0.9)
    for value in average.values.values():
        value.mul_(-1.0).add_(0.3)

    def said(side: str = STUDENT) -> torch.Tensor:
        with Walk(cast.call(side=side, latents=latents)) as walk:
            return walk.advance(grad=side == STUDENT).prediction.velocity.detach().clone()

    exact = said(), said(TEACHER)
    with autocast_forward(denoiser_of(cast.pipeline), torch.bfloat16):
        student, teacher = said(), said(TEACHER)
        with average.applied(cast.student):
            averaged = said()
        again = said()
    for rounded, wanted in zip((student, teacher), exact, strict=True):
        assert apart(rounded, wanted) < cast.row.rounding
    assert torch.equal(again, student)
    assert not torch.equal(averaged, student) and not torch.equal(teacher, student)


@every_family
def test_twenty_updates_towards_a_perturbed_copy_lower_the_loss(name):
    cast = cast_of(name)
    latents, sums = cast.latents(), []
    with cast.kept():
        with torch.no_grad():
            for parameter, wanted in zip(cast.student.values(), cast.teacher.values(), strict=True):
                parameter.copy_(0.5 * wanted)
        optimizer = torch.optim.Adam(cast.student.values(), lr=0.02)
        for _ in range(20):
            losses = cast.supervise(cast.call(latents=latents), cast.held(latents=latents), indices=[0])
            optimizer.step()
            optimizer.zero_grad()
            sums.append(float(sum(state.loss.mean() for state in losses)))
    assert sums[-1] < 0.5 * sums[0]


def drawn(pipeline, cast) -> torch.Tensor:
    """The latents that a pipeline draws when it is called as the cast's student is."""
    torch.manual_seed(1)
    told = cast.call(generator=seeded(1), output_type="latent").arguments
    return pipeline(**told)[0]


@pytest.mark.parametrize("name", [row.name for row in FAMILIES.values() if row.targets])
def test_the_exported_lora_reloads_in_stock_diffusers_to_the_same_latents(name, tmp_path):
    cast, fresh = cast_of(name), build(name)
    save_deployable(tmp_path, cast.pipeline, is_lora=True)
    wanted, base = drawn(cast.pipeline, cast), drawn(fresh, cast)
    load_lora(fresh, str(tmp_path / LORA_FILE), "default")
    assert apart(drawn(fresh, cast), wanted) < 1e-5
    assert apart(base, wanted) > 1e-2
    fuse_adapter(fresh)
    assert apart(drawn(fresh, cast), wanted) < 1e-4


@every_family
def test_the_exported_folder_reloads_in_stock_diffusers_to_the_same_latents(name, tmp_path):
    cast, fresh = cast_of(name), build(name)
    if cast.row.targets:
        save_deployable(tmp_path, cast.pipeline, is_lora=True)
        load_lora(fresh, str(tmp_path / LORA_FILE), "default")
        fuse_adapter(fresh)
    else:
        fresh = cast.pipeline
    fresh.save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    again = load_pipeline(str(tmp_path / "pipeline"))
    assert type(again) is type(fresh)
    assert torch.equal(drawn(again, cast), drawn(fresh, cast))
    assert apart(drawn(again, cast), drawn(cast.pipeline, cast)) < 1e-4


def test_lora_is_refused_for_a_denoiser_that_takes_no_adapters():
    denoiser = denoiser_of(build("PixArtSigma"))
    with pytest.raises(UserError, match='no LoRA for this family.*student.train = "full"'):
        add_adapter(denoiser, STUDENT, rank=2, lora_alpha=2, target_modules=["to_q"])


def test_gradient_checkpointing_is_refused_where_the_denoiser_then_says_something_else():
    cast = cast_of("Chroma")
    denoiser_of(cast.pipeline).enable_gradient_checkpointing()
    try:
        with pytest.raises(ValueError, match="attention mask.*gradient_checkpointing = false"):
            cast.supervise(cast.call(latents=cast.latents()), cast.held(latents=cast.latents()))
    finally:
        denoiser_of(cast.pipeline).disable_gradient_checkpointing()


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_taught_is_refused_with_the_reason_but_can_teach(name):
    cast = cast_of(name)
    latents = cast.latents()
    held = cast.supervise(cast.call(latents=latents), cast.held(latents=latents), backward=False)
    assert len(held) == cast.survey.num_visits
    with pytest.raises(RuntimeError, match=REFUSED[name].refusal):
        cast.supervise(cast.call(latents=latents), cast.held(latents=latents))


def test_every_stock_scheduler_is_a_row_or_refused_by_name():
    names = [name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and "Flax" not in name]
    others = [getattr(diffusers.schedulers, name) for name in names if name not in SCHEDULER_FAMILIES]
    assert len(others) > 10
    for kind in others:
        with pytest.raises(ValueError, match=f"{kind.__name__} cannot be driven; known are DDIMScheduler"):
            family_of(object.__new__(kind))


def test_a_list_of_prompts_is_left_as_it_was():
    """Z-Image writes its chat template into the list that it is given: a second walk would be told another prompt."""
    cast = cast_of("ZImage")
    call = cast.call(latents=cast.latents(), output_type="latent")
    first = walked(call)[0]
    assert call.arguments["prompt"] == list(PROMPTS)
    assert torch.equal(walked(call)[0], first)


def test_a_cell_of_the_readmes_table_is_what_its_tests_gave():
    """The whole table is held to the results of a session that runs the whole contract, at its end (conftest.py)."""
    script, readme = module_of("families_table"), (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith(("| PixArt", "| Wan"))]
    columns = ["family", "path", "denoiser", "guidance forms", *script.COLUMNS, "note"]
    cells = {row[0]: dict(zip(columns, row, strict=False)) for row in rows}
    pixart, experts = cells["PixArtSigma"], cells["Wan (two experts)"]
    assert pixart["LoRA"] == experts["export"] == "-" and experts["taught"] == "refused"
    titles = {
        "export": "test_the_exported_folder_reloads",
        "taught": "test_streaming",
        "driven": "test_latents_of",
    }
    own = [name for name in globals() if name.startswith("test_")]
    tests = {column: next(name for name in own if name.startswith(title)) for column, title in titles.items()}
    stock = "test_every_form_of_a_family_draws_the_students_pictures_for_a_stranger"
    results = script.results_of(
        {f"{tests['export']}[Wan]": True, f"{stock}[Wan]": False, f"{tests['driven']}[Wan]": True}
    )
    assert results == {("Wan", "export"): False, ("Wan", "driven"): True}
    assert script.results_of({"test_a_former_exported_folder[Wan]": True}) == {}
    told = script.differences(results, readme)
    (made,) = [line for line in told if line.startswith("missing: | Wan |")]
    assert "| yes | - | - | - | **fails** | video |" in made
    assert any(line.startswith("not a result: | Wan |") for line in told)


def test_the_snippet_of_the_docs_runs_on_a_pipeline_folder(tiny_sd, capsys):
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    snippet = text.split("```python\n")[1].split("```")[0]
    assert "path/to/pipeline" in snippet
    exec(snippet.replace("path/to/pipeline", str(tiny_sd)), {})
    assert capsys.readouterr().out.split() == ["True", "0.0"]
