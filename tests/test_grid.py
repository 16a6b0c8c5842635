"""What the grid's checks know of the flow-matching scheduler, before any weight is loaded."""

import math

import pytest
import rehearsed
import tiny

from diffopd.blueprint import read_blueprint
from diffopd.errors import UserError
from diffopd.grid import drivable_scheduler, make_scheduler
from diffopd.locate import find_recipe
from diffopd.preflight import check
from diffopd.recipe import read_recipe

FLOW = 'student.scheduler={class="FlowMatchEulerDiscreteScheduler", shift=3.0}'
RENOISED = 'student.scheduler={class="FlowMatchEulerDiscreteScheduler", stochastic_sampling=true}'
MISREAD = 'student.scheduler={class="DPMSolverMultistepScheduler", use_flow_sigmas=true, rescale_betas_zero_snr=false}'
BELOW = MISREAD.replace("}", ', prediction_type="flow_prediction"}')
NOISE, LATER = "objective.name=noise", "objective.query={indices=[1]}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_sd, tiny_teachers):
    """Checks a tiny recipe with options, of SD3 for the scheduler that is its own; the reason of a refusal, or ""."""
    folder = tmp_path_factory.mktemp("grid")
    rehearsed.pipeline("sd3").save_pretrained(folder / "sd3")
    itself = tiny.write_teacher(folder / "itself", folder / "sd3", form="base")
    of_sd = tiny.write_recipe(folder / "tiny.toml", tiny_sd, tiny_teachers)
    of_sd3 = tiny.write_recipe(folder / "sd3.toml", folder / "sd3", [itself])

    def checked(*options: str) -> str:
        path = of_sd if {BELOW, MISREAD} & set(options) else of_sd3
        try:
            check(read_recipe(path, list(options)))
        except UserError as error:
            return str(error)
        return ""

    return checked


def test_the_noise_objective_is_refused_from_pure_noise_on_the_flow_path(recipe):
    assert "compares nothing at the first step" in recipe(NOISE, FLOW)
    assert "compares nothing at the first step" in recipe(NOISE, FLOW, 'objective.query="one_low_noise"')
    assert recipe(NOISE, FLOW, LATER) == recipe(NOISE, BELOW) == recipe(FLOW) == ""


def test_flow_levels_with_an_answer_that_is_no_flow_are_refused(recipe):
    said = recipe(MISREAD)
    assert "would read the network's answer as 'v_prediction', which is not driven here" in said
    assert said.startswith("--set student.scheduler=")


def test_a_scheduler_that_cannot_be_driven_can_be_made_for_a_call_that_is_not_driven(tiny_recipe):
    read = read_recipe(tiny_recipe, ['student.scheduler={class="DDIMScheduler", clip_sample=true}'])
    base = read_blueprint(read.student.pretrained_model_name_or_path)
    assert make_scheduler(read, base).config.clip_sample
    with pytest.raises(UserError, match="student.scheduler=.* clip_sample=True: its step is not affine"):
        drivable_scheduler(read, base)
    with pytest.raises(UserError, match="its step is not affine"):
        check(read)


def test_a_flow_scheduler_that_renoises_draws_noise_and_the_plain_one_does_not(recipe):
    kl = ["objective.name=kl", "objective.final_step=mean"]
    assert recipe(*kl, RENOISED) == ""
    said = recipe(*kl, FLOW)
    assert "draws no noise" in said and "student.solver = 'flow_sde' or 'dance_sde' or 'ddim' with" in said
    assert "undefined at the last step" in recipe("objective.name=kl", RENOISED)


def test_sana_sprint_draws_noise_on_the_variance_preserving_path_in_its_own_grid(tmp_path):
    rehearsed.pipeline("sana sprint").save_pretrained(tmp_path / "sprint")
    itself = tiny.write_teacher(tmp_path / "itself", tmp_path / "sprint", form="base")
    path = tiny.write_recipe(tmp_path / "sprint.toml", tmp_path / "sprint", [itself])
    sized = "call={use_resolution_binning=false, height=32, width=32}"
    kl = [f"student.{sized}", f"teachers.itself.{sized}", "objective.name=kl"]

    grid = check(read_recipe(path, [*kl, "objective.final_step=mean"])).grid
    assert grid.sigmas == pytest.approx([math.sin(t) for t in grid.timesteps])
    assert len(grid.timesteps) == 2 and grid.timesteps[-1] > 0, "the level after the last step is no state"
    with pytest.raises(UserError, match="undefined at the last step"):
        check(read_recipe(path, kl))
    with pytest.raises(UserError, match="euler is not defined on the vp path"):
        check(read_recipe(path, [*kl[:2], "student.solver=euler"]))


def test_the_grid_of_a_flow_pipeline_is_known_before_weights_and_depends_on_the_call(tmp_path):
    rehearsed.pipeline("flux").save_pretrained(tmp_path / "flux")
    itself = tiny.write_teacher(tmp_path / "itself", tmp_path / "flux", form="base")
    path = tiny.write_recipe(tmp_path / "flux.toml", tmp_path / "flux", [itself])

    def grid(*options):
        return check(read_recipe(path, list(options))).grid

    small = ["student.call={height=16, width=16}", "teachers.itself.call={height=16, width=16}"]
    large = [option.replace("16", "256") for option in small]
    assert grid(*small).sigmas[0] == grid(*large).sigmas[0] == 1.0
    assert grid(*small).sigmas[1] < grid(*large).sigmas[1]  # the shift grows with the number of tokens
    explicit = [option.replace("width=16", "width=16, sigmas=[1.0, 0.25]") for option in small]
    assert grid(*explicit).sigmas[1] < grid(*small).sigmas[1]
    with pytest.raises(UserError, match="teacher 'itself'.* does not contain the student's timestep"):
        grid(explicit[0], small[1])


def test_four_steps_of_lcms_grid_nest_in_twenty(tiny_recipe):
    """The recipes of LCM students ask at the student's states for another reason, which their headers say."""
    options = ["student.scheduler.class=LCMScheduler", "student.num_inference_steps=4", "objective.substeps=5"]
    assert check(read_recipe(tiny_recipe, options)).grid.timesteps == (999, 759, 499, 259)
    assert all("nest in 20" in find_recipe(name).read_text(encoding="utf-8") for name in ("sd15-lcm", "sdxl-lcm"))


def test_a_pipeline_that_cannot_run_with_a_scheduler_is_refused(tiny_recipe):
    with pytest.raises(UserError, match="cannot be called like this with a FlowMatchEulerDiscreteScheduler"):
        check(read_recipe(tiny_recipe, [FLOW]))


def test_a_student_whose_levels_are_listed_is_not_scored_at_another_number_of_steps(recipe):
    listed = ("student.call={sigmas=[1.0, 0.5]}", "teachers.0.call={sigmas=[1.0, 0.5]}")
    assert recipe(*listed) == recipe("evaluate.student_steps=8") == ""
    assert "another grid than student.call.sigmas" in recipe("evaluate.student_steps=8", *listed)
