"""The driver's promises: a driven call is the plain call, and teachers stand exactly where the student stands."""

import pytest
import torch
from cast import FLOW_SCHEDULERS, SCHEDULERS, VP_SCHEDULERS, arguments, cast_for, draws, pipeline_with, scheduler_named

from diffopd.drive import Call, Walk, decode, next_sample, rollout, shell, survey
from diffopd.schedulers import FAMILIES, family_of


def test_every_scheduler_family_is_tried():
    with_sana_sprint = {kind for kind, _ in SCHEDULERS.values()} | {"SCMScheduler"}  # in test_families
    assert with_sana_sprint == set(FAMILIES)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_driven_rollout_equals_the_plain_call_bit_for_bit(name):
    pipeline = pipeline_with(scheduler_named(name))
    told = arguments(guidance_scale=3.0, pipeline=pipeline)

    def seeded():
        torch.manual_seed(1)  # SD3 does not hand its generator on to the scheduler
        return {**told, "generator": torch.Generator().manual_seed(1)}

    plain = pipeline(**seeded()).images
    with Walk(Call(pipeline, seeded())) as walk:
        visit = walk.advance()
        while visit is not None:
            visit = walk.advance(visit.native_reply())
        driven = walk.result.images
    assert torch.equal(plain, driven)
    again = pipeline(**seeded()).images
    assert torch.equal(plain, again), "the walk left something behind on the pipeline"


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_on_the_flow_path_levels_predictions_and_the_walk_fit_each_other(name):
    """x moves to where the velocity says (first step, an Euler one), and no noise is left at the end."""
    pipeline = pipeline_with(scheduler_named(name))
    visits = list(rollout(Call(pipeline, arguments(pipeline=pipeline))))
    levels = [visit.place.sigma for visit in visits]
    assert levels == sorted(levels, reverse=True) and levels[0] > 0.99 and visits[-1].place.sigma_next == 0
    assert {visit.prediction.path.name for visit in visits} == {"flow"}
    if "re-noised" not in name:
        first = visits[0]
        torch.testing.assert_close(visits[1].sample, first.sample + first.step.dt * first.prediction.velocity)


NATIVE = [(n, {"prediction_type": kind}) for n in VP_SCHEDULERS for kind in ("epsilon", "v_prediction")]
NATIVE = [(n, kind) for n, kind in NATIVE if n != "ddim zero-SNR v"] + [(n, {}) for n in FLOW_SCHEDULERS]


@pytest.mark.parametrize(("name", "kind"), NATIVE)
def test_native_transition_is_the_schedulers_own_step_and_leaves_it_alone(name, kind):
    pipeline = pipeline_with(scheduler_named(name, **kind))
    noise = draws(3, 21)
    with Walk(Call(pipeline, arguments(pipeline=pipeline))) as walk:
        visit = walk.advance()
        while visit is not None:
            transition = visit.native(visit.prediction)
            twice = visit.native(visit.prediction)
            assert torch.equal(transition.mean, twice.mean)
            reply = visit.native_reply(noise)
            stepped = next_sample(reply) / visit.place.scale_next
            torch.testing.assert_close(transition.draw(noise), stepped, rtol=1e-5, atol=1e-5)
            visit = walk.advance(reply)


ONE_CALL_A_STEP = [name for name in SCHEDULERS if name not in ("heun", "kdpm2", "pndm")]


@pytest.mark.parametrize(("name", "call"), [*((name, {}) for name in SCHEDULERS), ("ddim", {"eta": 0.5})])
def test_a_row_says_without_weights_what_a_walk_shows_path_noise_and_levels(name, call):
    pipeline = pipeline_with(scheduler_named(name))
    scheduler, row = pipeline.scheduler, family_of(pipeline.scheduler)
    with Walk(Call(pipeline, arguments(pipeline=pipeline) | call)) as walk:
        visit, stds = walk.advance(), []
        while visit is not None:
            assert visit.place.path.name == row.path(scheduler)
            if visit.place.path.name == "vp" and name in ONE_CALL_A_STEP:
                assert row.level(scheduler, float(visit.arguments["timestep"])) == pytest.approx(
                    visit.place.sigma, abs=1e-3
                )
            stds.append(visit.native(visit.prediction).std)
            visit = walk.advance(visit.native_reply())
    assert (max(stds) > 0) == row.draws_noise(scheduler, call)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddpm", "lcm", "euler", "euler ancestral", "heun", "kdpm2", "dpm++ 2m", "unipc"])
def test_the_denoised_prediction_of_the_last_state_is_what_the_pipeline_returns(name, kind):
    pipeline = pipeline_with(scheduler_named(name, prediction_type=kind))
    visits = list(rollout(Call(pipeline, arguments())))
    returned = pipeline(**arguments()).images if name not in ("lcm", "euler ancestral", "ddpm") else None
    with Walk(Call(pipeline, {**arguments(), "generator": torch.Generator().manual_seed(3)})) as walk:
        visit = walk.advance()
        while visit is not None:
            last, visit = visit, walk.advance(visit.native_reply())
        torch.testing.assert_close(last.prediction.denoised, walk.result.images, rtol=1e-4, atol=2e-5)
    if returned is not None:
        torch.testing.assert_close(visits[-1].prediction.denoised, returned, rtol=1e-4, atol=2e-5)


def test_prediction_keeps_the_gradient_of_model_output_and_the_walk_ends_grad_mode():
    cast = cast_for(scheduler_named("ddim"))
    with Walk(cast.student) as walk:
        visit = walk.advance(grad=True)
        assert visit.native(visit.prediction).mean.requires_grad
        visit = walk.advance(visit.native_reply(), grad=False)
        assert not visit.model_output.requires_grad
    assert torch.is_grad_enabled()


def test_closing_a_walk_early_restores_step_and_the_pipeline_works_on():
    pipeline = pipeline_with(scheduler_named("dpm++ 2m"))
    plain = pipeline(**arguments()).images
    with Walk(Call(pipeline, arguments())) as walk:
        walk.advance()
    assert "step" not in vars(pipeline.scheduler)
    assert torch.equal(pipeline(**arguments()).images, plain)


def test_an_error_inside_the_pipeline_reaches_the_caller_and_restores_step():
    pipeline = pipeline_with(scheduler_named("ddim"))
    with pytest.raises(ValueError, match="prompt"), Walk(Call(pipeline, {**arguments(), "prompt": "twice"})) as walk:
        walk.advance()
    assert "step" not in vars(pipeline.scheduler)


def test_a_second_walk_on_the_same_object_is_refused():
    pipeline = pipeline_with(scheduler_named("ddim"))
    with Walk(Call(pipeline, arguments())) as walk:
        walk.advance()
        with pytest.raises(RuntimeError, match="mid-walk"), Walk(Call(pipeline, arguments())):
            pass


def test_two_shells_in_lockstep_keep_their_own_guidance():
    pipeline = pipeline_with(scheduler_named("ddim"))
    other = shell(pipeline)
    free = pipeline(**arguments(guidance_scale=1.0)).images
    guided = pipeline(**arguments(guidance_scale=4.0)).images
    calls = Call(pipeline, arguments(guidance_scale=1.0)), Call(other, arguments(guidance_scale=4.0))
    with Walk(calls[0]) as a, Walk(calls[1]) as b:
        visits = a.advance(), b.advance()
        while visits[0] is not None:
            visits = a.advance(visits[0].native_reply()), b.advance(visits[1].native_reply())
        assert torch.equal(a.result.images, free)
        assert torch.equal(b.result.images, guided)


@pytest.mark.parametrize(
    ("override", "reason"), [({"clip_sample": True}, "clip_sample=True"), ({"thresholding": True}, "thresholding")]
)
def test_a_step_that_is_not_affine_is_refused_with_the_reason(override, reason):
    with pytest.raises(ValueError, match=reason):
        family_of(scheduler_named("ddim", **override))


def test_an_unknown_scheduler_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="DDIMScheduler"):
        family_of(object())


def test_a_pipeline_that_copies_its_scheduler_is_refused():
    class Copying:
        def __init__(self, pipeline):
            self.scheduler = pipeline.scheduler

        def __call__(self):
            return None

    pipeline = pipeline_with(scheduler_named("ddim"))
    with pytest.raises(RuntimeError, match="copy"), Walk(Call(Copying(pipeline), {})) as walk:
        walk.advance()


def test_a_student_without_gradient_is_refused():
    pipeline = pipeline_with(scheduler_named("ddim"))  # everything frozen
    with pytest.raises(RuntimeError, match="cannot be a student"), Walk(Call(pipeline, arguments())) as walk:
        walk.advance(grad=True)


@pytest.mark.parametrize(("name", "visits"), [("ddim", 4), ("pndm", 5), ("heun", 7), ("kdpm2", 7)])
def test_survey_counts_the_calls_of_step(name, visits):
    seen = survey(Call(pipeline_with(scheduler_named(name)), arguments()))
    assert (seen.num_visits, seen.shape, seen.latents_shape) == (visits, (4, 8, 8), (4, 8, 8))


@pytest.mark.parametrize("name", ["ddim", "euler", "lcm", "pndm"])
def test_decode_gives_the_images_of_the_plain_call(name):
    pipeline = pipeline_with(scheduler_named(name))
    told = {**arguments(), "generator": torch.Generator().manual_seed(2)}
    latents = pipeline(**told).images
    told["generator"] = torch.Generator().manual_seed(2)
    images = pipeline(**{**told, "output_type": "pt"}).images
    decoded = decode(Call(pipeline, arguments()), latents)
    expected = pipeline.image_processor.pt_to_numpy(images)
    for image, wanted in zip(decoded, expected, strict=True):
        assert abs(torch.tensor(list(image.getdata())).view(8, 8, 3) / 255 - torch.tensor(wanted)).max() < 0.003


def test_gradient_checkpointing_changes_nothing():
    cast = cast_for(scheduler_named("ddim"))

    def gradient():
        with Walk(cast.student) as walk:
            visit = walk.advance(grad=True)
            visit.native(visit.prediction).mean.square().sum().backward()
        return cast.gradient()

    plain = gradient()
    cast.pipeline.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain, rtol=1e-5, atol=1e-7)
