"""Streaming against two-pass, teachers against themselves, batch splits: the step's promises."""

import pytest
import torch
from cast import VP_SCHEDULERS, Cast, cast_for, draws, scheduler_named

from diffopd.objective import OBJECTIVES, get_objective
from diffopd.query import supervised_states
from diffopd.solver import SOLVERS
from diffopd.supervise import Manner, supervise

VP_SOLVERS = [name for name, row in SOLVERS.items() if "vp" in row.paths]
STOCHASTIC = "ddpm"


def noise_from(seed: int, batch: int = 3):
    return lambda index: draws(batch, 100 * seed + index)


def run(cast: Cast, manner: Manner, *, teacher=None, backward=lambda loss: loss.mean().backward()):
    return supervise(cast.student, teacher or cast.teacher, manner=manner, noise=noise_from(1), backward=backward)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_streaming_and_two_pass_gradients_are_equal_under_every_scheduler(name):
    cast = cast_for(scheduler_named(name))
    gradients = []
    for two_pass in (False, True):
        run(cast, Manner(get_objective("mean"), [0, 1, 3], two_pass=two_pass))
        gradients.append(cast.gradient())
    assert gradients[1].abs().max() > 0
    assert relative(*gradients) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("solver", ["native", *VP_SOLVERS])
def test_streaming_and_two_pass_gradients_are_equal_for_every_objective_and_solver(objective, solver):
    cast = cast_for(scheduler_named(STOCHASTIC if solver == "native" else "ddim"))
    noise_level = 0.7 if solver == "ddim" else 0.0
    gradients = []
    for two_pass in (False, True):
        manner = Manner(
            get_objective(objective, final_step="mean"),
            range(4),
            solver=solver,
            noise_level=noise_level,
            two_pass=two_pass,
        )
        run(cast, manner)
        gradients.append(cast.gradient())
    assert gradients[1].abs().max() > 0
    assert relative(*gradients) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", VP_SCHEDULERS)
def test_a_teacher_equal_to_the_student_gives_loss_zero_and_zero_gradient(objective, name):
    cast = cast_for(scheduler_named(name))
    losses = run(cast, Manner(get_objective(objective, final_step="mean"), [0, 1, 2, 3]), teacher=cast.itself)
    assert max(float(state.loss.max()) for state in losses) == 0
    assert cast.gradient().abs().max() == 0


def test_the_teacher_sees_exactly_the_students_states_and_no_gradient_reaches_it():
    cast = cast_for(scheduler_named("euler ancestral"))
    seen = {"student": [], "teacher": []}
    active = cast.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q

    def record(module, inputs):
        seen[active._active_adapter[0]].append(inputs[0][:3].detach().clone())

    handle = cast.pipeline.unet.register_forward_pre_hook(record)
    run(cast, Manner(get_objective("mean"), range(4)))
    handle.remove()
    assert len(seen["student"]) == len(seen["teacher"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"], strict=True))
    assert all(p.grad is None for p in cast.teacher_parameters.values())


@pytest.mark.parametrize("name", ["ddim zero-SNR v", "ddim"])
def test_substeps_of_a_teacher_equal_to_the_student_land_where_its_own_longer_walk_goes(name):
    """m = 5 from the first state must be what the plain 20-step call reaches after 5 steps."""
    scheduler = scheduler_named(name, timestep_spacing="trailing")
    cast = cast_for(scheduler, teacher_guidance=1.0)
    landings = []
    manner = Manner(get_objective("mean"), [0], substeps=5)
    supervise(
        cast.student,
        cast.itself,
        manner=manner,
        noise=noise_from(1),
        backward=None,
        observe=lambda step, said, taught: landings.append(taught.transition.mean),
    )
    from diffopd.drive import rollout

    visits = rollout(cast.itself.told(num_inference_steps=20))
    fifth = [visit.sample for visit, _ in zip(visits, range(6), strict=False)][5]
    torch.testing.assert_close(landings[0], fifth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["mean", "velocity", "denoised", "noise"])
def test_substeps_train_under_every_deterministic_objective(objective):
    cast = cast_for(scheduler_named("ddim zero-SNR v"))
    losses = run(cast, Manner(get_objective(objective), range(4), substeps=5))
    assert [state.index for state in losses] == [0, 1, 2, 3]
    assert torch.isfinite(cast.gradient()).all()


def test_grids_that_do_not_nest_are_refused_with_what_to_do():
    cast = cast_for(scheduler_named("ddim"))  # leading spacing: 8 leading steps do not contain 4 leading steps' levels
    with pytest.raises(ValueError, match="do not nest.*trailing"):
        run(cast, Manner(get_objective("mean"), range(4), substeps=2))


def test_unsupervised_states_cost_the_teacher_nothing():
    cast = cast_for(scheduler_named("ddim"))
    calls = []
    forward = type(cast.pipeline.unet).forward
    handle = cast.pipeline.unet.register_forward_hook(
        lambda module, inputs, output: calls.append(output[0].abs().sum())
    )
    run(cast, Manner(get_objective("mean"), [2]))
    handle.remove()
    assert cast.pipeline.unet.forward.__func__ is forward, "the idle forward was not put back"
    assert sum(float(c) == 0 for c in calls) == 2, "two teacher visits must be idle"
    assert sum(float(c) != 0 for c in calls) == 4, "three student states and one teacher state"


def test_the_rollout_ends_at_the_last_supervised_state():
    cast = cast_for(scheduler_named("ddim"))
    calls = []
    handle = cast.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    run(cast, Manner(get_objective("mean"), supervised_states({"indices": [0]}, 4, seed=(0, 0, 0))))
    handle.remove()
    assert len(calls) == 2


def test_step_weights_scale_the_gradient_of_their_state():
    cast = cast_for(scheduler_named("ddim"))
    run(cast, Manner(get_objective("mean"), [1]))
    plain = cast.gradient()
    run(cast, Manner(get_objective("mean"), [1], step_weights=[0.0, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(cast.gradient(), 2 * plain)


def test_a_data_state_replaces_the_students_own_step():
    cast = cast_for(scheduler_named("ddim"))
    wanted = draws(3, 77)
    seen = []
    supervise(
        cast.student,
        cast.teacher,
        manner=Manner(get_objective("mean"), range(3)),
        noise=noise_from(1),
        backward=None,
        observe=lambda step, said, taught: seen.append(step.sample),
        data_states=lambda visit: wanted,
    )
    assert torch.equal(seen[1], wanted) and torch.equal(seen[2], wanted)


def test_noise_reaches_a_stochastic_native_step():
    cast = cast_for(scheduler_named("ddpm"))
    states = []
    for seed in (1, 1, 2):
        seen = []
        supervise(
            cast.student,
            cast.teacher,
            manner=Manner(get_objective("mean"), range(3)),
            noise=noise_from(seed),
            backward=None,
            observe=lambda step, said, taught, seen=seen: seen.append(step.sample),
        )
        states.append(torch.stack(seen))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
