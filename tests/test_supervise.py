"""Streaming against two-pass, teachers against themselves, batch splits: the step's promises."""

import copy

import pytest
import torch
from cast import SCHEDULERS, Cast, cast_for, draws, scheduler_named

from diffopd.drive import replaced_forward, rollout
from diffopd.objective import OBJECTIVES as ROWS
from diffopd.objective import get_objective
from diffopd.path import PATHS
from diffopd.query import supervised_states
from diffopd.schedulers import family_of
from diffopd.solver import SOLVERS
from diffopd.supervise import Manner, NonFiniteLoss, supervise

STARTS_AT_PURE_NOISE = ["ddim zero-SNR v", "flow euler", "flow euler re-noised", "flow unipc"]


def walks(solver: str, path: str) -> bool:
    """Whether a solver is defined on a path."""
    return solver == "native" or path in SOLVERS[solver].paths


def noise_from(seed: int, batch: int = 3):
    return lambda index: draws(batch, 100 * seed + index)


def run(cast: Cast, manner: Manner, *, teacher=None, backward=lambda loss: loss.mean().backward(), **options):
    held, noise = teacher or cast.teacher, noise_from(1, len(cast.student.arguments["latents"]))
    return supervise(cast.student, held, manner=manner, noise=noise, backward=backward, **options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Those that need two guided answers are in test_branches.
OBJECTIVES = {name: row for name, row in ROWS.items() if not row.needs_branches}


def every_objective(solver: str):
    """All objectives of one walk at once: (len(OBJECTIVES), B)."""
    final = {name: "mean" if row.needs_std else None for name, row in OBJECTIVES.items()}
    functions = [get_objective(name, final[name], solver) for name in OBJECTIVES]
    return lambda said, taught, step: torch.stack([function(said, taught, step) for function in functions])


def gradient_of_each(cast: Cast, manner: Manner, **options) -> dict[str, torch.Tensor]:
    """The student's gradient under every objective, from one walk under `every_objective`."""
    sums = dict.fromkeys(OBJECTIVES, 0.0)

    def backward(losses: torch.Tensor) -> None:
        for name, loss in zip(OBJECTIVES, losses, strict=True):
            gradients = torch.autograd.grad(loss.mean(), list(cast.parameters.values()), retain_graph=True)
            sums[name] = sums[name] + torch.cat([gradient.flatten() for gradient in gradients])

    run(cast, manner, backward=backward, **options)
    return sums


@pytest.mark.parametrize("name", SCHEDULERS)
def test_streaming_and_two_pass_gradients_are_equal_under_every_scheduler(name):
    cast = cast_for(scheduler_named(name), batch=2, steps=3)
    gradients = []
    for two_pass in (False, True):
        run(cast, Manner(get_objective("mean"), [0, 2], two_pass=two_pass))
        gradients.append(cast.gradient())
    assert gradients[1].abs().max() > 0
    assert relative(*gradients) < 1e-5


PAIRS = [(solver, path) for path in ("vp", "flow") for solver in ("native", *SOLVERS) if walks(solver, path)]


@pytest.mark.parametrize(("solver", "path"), PAIRS)
def test_streaming_and_two_pass_gradients_are_equal_for_every_objective_and_solver_on_every_path(solver, path):
    scheduler = {"vp": "ddpm" if solver == "native" else "ddim", "flow": "flow dpm++ 2m"}[path]
    noise_level = 0.7 if solver != "native" and SOLVERS[solver].noise else 0.0
    cast, walk = cast_for(scheduler_named(scheduler), batch=2, steps=3), {"solver": solver, "noise_level": noise_level}
    manners = [Manner(every_objective(solver), range(3), two_pass=two_pass, **walk) for two_pass in (False, True)]
    streamed, repeated = (gradient_of_each(cast, manner) for manner in manners)
    for objective in OBJECTIVES:
        assert repeated[objective].abs().max() > 0, objective
        assert relative(streamed[objective], repeated[objective]) < 1e-5, objective


@pytest.mark.parametrize("substep_solver", ["auto", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("name", "solver"), [("ddim", "native"), ("ddpm", "native"), ("ddim", "ddim"), ("unipc", "lcm")]
)
def test_streaming_and_two_pass_gradients_are_equal_with_substeps(name, solver, substep_solver):
    cast, gradients = cast_for(scheduler_named(name, timestep_spacing="trailing"), batch=2), []
    noise_level = 0.7 if solver == "ddim" else 0.0
    walk = {"solver": solver, "noise_level": noise_level, "substeps": 5, "substep_solver": substep_solver}
    for two_pass in (False, True):
        run(cast, Manner(get_objective("mean"), [0, 2, 3], two_pass=two_pass, **walk))
        gradients.append(cast.gradient())
    assert gradients[1].abs().max() > 0
    assert relative(*gradients) < 1e-5


def test_the_flow_matching_scheduler_with_noise_trains_under_every_objective():
    cast = cast_for(scheduler_named("flow euler re-noised"))
    manners = [Manner(every_objective("native"), [1, 2, 3], two_pass=two_pass) for two_pass in (False, True)]
    streamed, repeated = (gradient_of_each(cast, manner) for manner in manners)
    for objective in OBJECTIVES:
        assert relative(streamed[objective], repeated[objective]) < 1e-5, objective


@pytest.mark.parametrize("solver", ["native", "dpmpp_2m", "ddim"])
@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m"])
def test_streaming_and_two_pass_gradients_are_equal_at_data_states(name, solver):
    cast, gradients = cast_for(scheduler_named(name), batch=2, steps=3), []
    for two_pass in (False, True):
        manner = Manner(get_objective("mean"), range(3), solver=solver, two_pass=two_pass)
        run(cast, manner, data_states=lambda visit: draws(2, 50 + visit.index))
        gradients.append(cast.gradient())
    assert relative(*gradients) < 1e-5


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in STARTS_AT_PURE_NOISE])
def test_a_teacher_equal_to_the_student_gives_loss_zero_and_zero_gradient(name):
    cast = cast_for(scheduler_named(name), batch=2, steps=3)
    largest = []

    def backward(losses: torch.Tensor) -> None:
        largest.append(float(losses.detach().max()))
        losses.sum().backward()

    run(cast, Manner(every_objective("native"), range(3)), teacher=cast.itself, backward=backward)
    assert len(largest) == 3 and max(largest) == 0
    assert cast.gradient().abs().max() == 0


@pytest.mark.parametrize("name", STARTS_AT_PURE_NOISE)
def test_the_noise_objective_is_refused_at_pure_noise_and_only_there(name):
    cast = cast_for(scheduler_named(name))
    with pytest.raises(ValueError, match="step 0.*alpha = 0"):
        run(cast, Manner(get_objective("noise"), range(4)))
    assert all(p.grad is None for p in cast.parameters.values())
    run(cast, Manner(get_objective("noise"), [1, 2, 3]))
    assert cast.gradient().abs().max() > 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_before_its_backward_with_its_place(broken):
    cast, backed = cast_for(scheduler_named("ddim")), []

    def objective(said, taught, step):
        return get_objective("mean")(said, taught, step) * torch.tensor([1.0, broken if step.index == 2 else 1.0, 1.0])

    with pytest.raises(NonFiniteLoss, match="step 2") as caught:
        run(cast, Manner(objective, range(4)), backward=backed.append)
    assert (caught.value.index, len(backed)) == (2, 2)
    assert 0 < caught.value.sigma < 1
    assert "step" not in vars(cast.student.pipeline.scheduler), "the walk was not closed"
    with pytest.raises(NonFiniteLoss):
        run(cast, Manner(objective, range(4)), backward=None)


ONE_PICTURE = 0.3
ONE_CALL = ["ddim", "ddim zero-SNR v", "ddpm", "euler", "euler ancestral", "dpm++ 2m", "dpm++ 2m sde", "unipc"]
KNOWING = [(name, "native") for name in [*ONE_CALL, "flow dpm++ 2m"]]
KNOWING += [({"vp": "ddim", "flow": "flow dpm++ 2m"}[path], solver) for solver, path in PAIRS if solver != "native"]


def knows_the_picture(scheduler):
    """A UNet forward whose every prediction is ONE_PICTURE, exact at the levels of 4 and 8 steps."""
    path = PATHS["flow" if scheduler.config.prediction_type == "flow_prediction" else "vp"]
    levels = {}
    for steps in (4, 8):
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            place = family_of(scheduler).locate(scheduler, timestep)
            levels[float(timestep)] = place.sigma
            scheduler._step_index = None

    def forward(sample, timestep, *args, return_dict=True, **kwargs):
        picture = torch.full_like(sample, ONE_PICTURE)
        return (path.velocity_from_denoised(sample, picture, levels[float(timestep)]),)

    return forward


@pytest.mark.parametrize(("name", "solver"), KNOWING)
def test_substeps_of_a_teacher_that_knows_the_picture_leave_a_student_that_knows_it_nothing_to_learn(name, solver):
    """The landing of an ODE holds the state's own noise, the mean of a step with noise does not."""
    override = {} if "flow" in name else {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    cast = cast_for(scheduler_named(name, **override), teacher_guidance=1.0)
    noise_level = 0.7 if solver != "native" and SOLVERS[solver].noise else 0.0
    kinds = [get_objective(kind) for kind in ("mean", "velocity", "denoised")]
    manner = Manner(
        lambda *sides: torch.stack([kind(*sides) for kind in kinds]),
        range(4),
        solver=solver,
        noise_level=noise_level,
        substeps=2,
    )
    with replaced_forward(cast.pipeline.unet, knows_the_picture(copy.deepcopy(cast.pipeline.scheduler))):
        losses = run(cast, manner, backward=None)
    assert len(losses) == 4 and max(float(state.loss.max()) for state in losses) < 1e-7


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
    visits = rollout(cast.itself.told(num_inference_steps=20))
    fifth = [visit.sample for visit, _ in zip(visits, range(6), strict=False)][5]
    torch.testing.assert_close(landings[0], fifth, rtol=1e-4, atol=1e-5)


def test_multistep_substeps_begin_anew_at_every_state_of_the_student():
    """Landings of 5 substeps of DPM-Solver++ 2M are those of the stock scheduler, started at each state."""
    cast = cast_for(scheduler_named("dpm++ 2m", timestep_spacing="trailing"), teacher_guidance=1.0)
    seen = []
    supervise(
        cast.student,
        cast.itself,
        manner=Manner(get_objective("mean"), range(3), substeps=5, substep_solver="dpmpp_2m"),
        noise=noise_from(1),
        backward=None,
        observe=lambda step, said, taught: seen.append((step.sample, taught.transition.mean)),
    )
    cast.pipeline.scheduler.set_timesteps(20)
    fine = [int(timestep) for timestep in cast.pipeline.scheduler.timesteps]
    for index, (state, landing) in enumerate(seen):
        call = cast.itself.told(latents=state, timesteps=fine[5 * index :], num_inference_steps=None)
        visits = rollout(call)
        fifth = [visit.sample for visit, _ in zip(visits, range(6), strict=False)][5]
        torch.testing.assert_close(landing, fifth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["mean", "velocity", "denoised", "noise"])
def test_substeps_train_under_every_deterministic_objective(objective):
    cast = cast_for(scheduler_named("ddim zero-SNR v"))
    asked = [1, 2, 3] if objective == "noise" else [0, 1, 2, 3]
    losses = run(cast, Manner(get_objective(objective), asked, substeps=5))
    assert [state.index for state in losses] == asked
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
        lambda module, inputs, output: calls.append(output[0].detach().abs().sum())
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
