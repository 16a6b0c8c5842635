"""What the grid's checks know of the flow-matching scheduler, before any weight is loaded."""

import pytest
import tiny

from diffopd.errors import UserError
from diffopd.preflight import check
from diffopd.recipe import read_recipe

FLOW = 'student.scheduler={class="FlowMatchEulerDiscreteScheduler", shift=3.0}'
RENOISED = 'student.scheduler={class="FlowMatchEulerDiscreteScheduler", stochastic_sampling=true}'
BELOW = 'student.scheduler={class="DPMSolverMultistepScheduler", use_flow_sigmas=true, rescale_betas_zero_snr=false}'
NOISE, LATER = "objective.name=noise", "objective.query={indices=[1]}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_sd, tiny_teachers):
    """Checks the tiny recipe with options; the reason where it is refused, "" where it passes."""
    path = tiny.write_recipe(tmp_path_factory.mktemp("grid") / "tiny.toml", tiny_sd, tiny_teachers)

    def checked(*options: str) -> str:
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


def test_a_flow_scheduler_that_renoises_draws_noise_and_the_plain_one_does_not(recipe):
    kl = ["objective.name=kl", "objective.final_step=mean"]
    assert recipe(*kl, RENOISED) == ""
    assert "draws no noise" in recipe(*kl, FLOW)
    assert "undefined at the last step" in recipe("objective.name=kl", RENOISED)
