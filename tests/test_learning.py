"""A batch is sampled, then learnt from at the same states, on both paths: gradients against finite differences."""

import math

import cast
import pytest
import torch
from cast import cast_for, draws, scheduler_named
from families import FAMILIES
from family_cast import PROMPTS, cast_of, seeded

from diffopd import estimators, learning
from diffopd.data import PromptRow
from diffopd.drive import Call, survey
from diffopd.learning import Measures, Sides, learn
from diffopd.prediction import LEAST_STD, Prediction
from diffopd.sampling import joined, sample
from diffopd.supervise import Manner
from diffopd.teach_recipe import EstimatorSettings

BATCH, STEPS = 3, 4
WALKS = {
    "flow_sde": ("flow euler", {"solver": "flow_sde", "noise_level": 0.7}),
    "dance_sde": ("flow euler", {"solver": "dance_sde", "noise_level": 0.5}),
    "ddim on vp": ("ddim zero-SNR v", {"solver": "ddim", "noise_level": 1.0}),
    "native ddpm": ("ddpm", {}),
    "native euler ancestral": ("euler ancestral", {}),
}


class Unprompted(Call):
    """The cast's pipelines are told embeddings instead of prompts."""

    def prompted(self, prompts, **arguments):
        return Unprompted(self.pipeline, {**self.arguments, **arguments}, self.binding)


def drawn(index: int) -> torch.Tensor:
    return draws(BATCH, 100 + index)


class World:
    """One sampled batch of a cast, and the loss of an estimator on it as a function of the student's weights."""

    def __init__(self, scheduler: str, estimator: str, manner: dict) -> None:
        made = cast_for(scheduler_named(scheduler), batch=BATCH, steps=STEPS)
        made.pipeline.vae.register_to_config(shift_factor=0.0)
        student, base, old = (
            Unprompted(c.pipeline, c.arguments, c.binding) for c in (made.student, made.teacher, made.itself)
        )
        base = Unprompted(base.pipeline, student.arguments, lambda: made.switch.bound(None))
        other = Unprompted(old.pipeline, student.arguments, lambda: made.switch.bound("teacher"))
        self.parameters, policy = made.parameters, estimator.startswith("grpo")
        self.sides = Sides(student, other if estimator == "nft" else None, None if estimator == "supervised" else base)
        self.manner = Manner(None, range(STEPS), **manner)
        self.settings = EstimatorSettings(name=estimator, kl_weight=0.3, **({"clip_range": 0.9} if policy else {}))
        self.start = survey(student)
        rows = [PromptRow("a dot")] * BATCH
        options = {"latents": drawn(0), "noise": lambda index: drawn(index + 1)}
        self.batch, self.images = sample(
            student, rows, list(range(BATCH)), manner=self.manner if policy else None, **options
        )
        self.good = torch.tensor([0.9, 0.2, 0.6]) if estimator == "nft" else torch.tensor([1.5, -0.5, -1.0])

    def learn(self, batch=None, good=None) -> tuple[float, Measures]:
        """The mean loss over states and pictures (not a state's share alone); gradients are left on the parameters."""
        total, measures = [], Measures()

        def backward(loss: torch.Tensor) -> None:
            total.append(float(loss.detach().double().sum()))
            loss.sum().backward()

        options = {"settings": self.settings, "manner": self.manner, "start": self.start, "measures": measures}
        given = self.batch if batch is None else batch, self.good if good is None else good
        learn(self.sides, *given, noise=lambda index: draws(BATCH, 200 + index), backward=backward, **options)
        return sum(total), measures

    def gradient(self, **options) -> torch.Tensor:
        self.learn(**options)
        flat = torch.cat([p.grad.flatten() for p in self.parameters.values()])
        for parameter in self.parameters.values():
            parameter.grad = None
        return flat

    @torch.no_grad()
    def move(self, direction: torch.Tensor, length: float) -> None:
        parts = direction.split([p.numel() for p in self.parameters.values()])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.add_(part.view_as(parameter), alpha=length)


def check_slope(world: World, length: float) -> None:
    gradient = world.gradient()
    direction = gradient / gradient.norm()
    slope = float(gradient.double().norm())
    world.move(direction, length)
    above = world.learn()[0]
    world.move(direction, -2 * length)
    below = world.learn()[0]
    assert (above - below) / (2 * length) == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("estimator", ["grpo", "grpo_guard"])
@pytest.mark.parametrize("walk", WALKS)
def test_policy_gradients_are_the_slope_of_their_loss_at_the_recorded_states(walk, estimator):
    scheduler, manner = WALKS[walk]
    world = World(scheduler, estimator, manner)
    loss, measures = world.learn()
    for parameter in world.parameters.values():
        parameter.grad = None
    count = measures.counts["ratio"]
    assert measures.sums["ratio"] / count == pytest.approx(1, abs=1e-4), "nothing has moved since the sampling"
    assert count == BATCH * sum(taken.transition.std > LEAST_STD for taken in world.batch.taken)
    assert measures.sums["from_base"] > 0
    check_slope(world, 1e-2)  # the ratios are near 1, so that a shorter way drowns in float32


@pytest.mark.parametrize("walk", ["flow_sde", "ddim on vp"])
def test_the_guard_is_told_how_far_each_step_goes_along_the_velocity(walk, monkeypatch):
    scheduler, manner = WALKS[walk]
    world, told, plain = World(scheduler, "grpo_guard", manner), [], estimators.grpo_guard
    monkeypatch.setattr(estimators, "grpo_guard", lambda *a, **k: told.append(k["stride"]) or plain(*a, **k))
    world.learn()
    assert len(told) >= STEPS - 1
    for stride, taken in zip(told, world.batch.taken, strict=False):
        angles = math.asin(taken.step.sigma_next), math.asin(taken.step.sigma)
        moved = taken.step.dt if walk == "flow_sde" else math.sin(angles[0] - angles[1])
        assert stride == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("scheduler", ["flow euler", "ddim zero-SNR v", "ddim", "euler"])
@pytest.mark.parametrize("estimator", ["nft", "supervised"])
def test_gradients_on_noised_pictures_are_the_slope_of_their_loss(scheduler, estimator, monkeypatch):
    """DiffusionNFT's weights carry no gradient, so they are left out: a loss with them has another slope."""

    def plain(said, velocity, denoised):
        difference = Prediction(said.sample, velocity, said.sigma, said.path).denoised - denoised
        return difference.square().flatten(1).mean(1)

    monkeypatch.setattr(estimators, "_normalised_error", plain)
    check_slope(World(scheduler, estimator, {}), 2e-3)


@pytest.mark.parametrize("estimator", ["nft", "supervised"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_noised_pictures_at_those_very_states(family, estimator, monkeypatch):
    """Also where the pipeline packs the latents that it is given, or scales them."""
    cast = cast_of(family)
    student, old = cast.call(), cast.held()
    start, seen = cast.survey, []
    rows = [PromptRow(prompt) for prompt in PROMPTS]
    drawn = lambda index: torch.randn(len(PROMPTS), *start.shape, generator=seeded(index))  # noqa: E731
    batch, _ = sample(student, rows, [0, 1], latents=cast.latents(), noise=drawn)
    monkeypatch.setattr(learning, "_forward_loss", noting(seen, learning._forward_loss))
    learn(
        Sides(student, old if estimator == "nft" else None),
        batch,
        torch.tensor([0.9, 0.2]),
        settings=EstimatorSettings(name=estimator),
        manner=Manner(None, range(start.num_visits)),
        start=start,
        noise=drawn,
        backward=lambda loss: loss.sum().backward(),
        measures=Measures(),
    )
    assert float(cast.gradient().abs().max()) > 0
    assert len(seen) == start.num_visits
    for index, said in enumerate(seen):
        level = said.path.interpolate(batch.denoised, drawn(index), said.sigma)
        torch.testing.assert_close(said.sample, level, atol=1e-4, rtol=1e-4)


def noting(seen, loss):
    def forward_loss(here, *args):
        seen.append(here.prediction)
        return loss(here, *args)

    return forward_loss


@pytest.mark.parametrize(("scheduler", "said"), [("ddim", "noise"), ("euler", "noise"), ("flow euler", "velocity")])
def test_supervision_is_the_bases_own_loss_in_what_its_network_says(scheduler, said, monkeypatch):
    """At high noise the square of the velocity is hundreds of times that of a noise prediction: another loss."""
    plain = estimators.matching
    world, compared = World(scheduler, "supervised", {}), []
    monkeypatch.setattr(estimators, "matching", lambda *both: compared.append(both) or plain(*both))
    world.learn()
    assert len(compared) == STEPS
    for index, (_, wanted) in enumerate(compared):
        noise = draws(BATCH, 200 + index)
        truth = noise - world.batch.denoised if said == "velocity" else noise
        exact = {"atol": 1e-3, "rtol": 1e-3} if index else {"atol": 2e-2, "rtol": 0}  # Euler's begins at .998 of it
        torch.testing.assert_close(wanted, truth, **exact)


def test_a_recorded_walk_is_the_pipelines_own_and_its_density_that_of_its_draws():
    scheduler, manner = WALKS["native ddpm"]
    world = World(scheduler, "grpo", manner)
    for index, taken in enumerate(world.batch.taken):
        if taken.transition.std > LEAST_STD:
            noise = (taken.sample - taken.transition.mean) / taken.transition.std
            torch.testing.assert_close(noise, drawn(index + 1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(world.batch.denoised, world.batch.taken[-1].sample)
    plain = cast_for(scheduler_named(scheduler), batch=BATCH, steps=STEPS)
    assert len(world.images) == BATCH and world.images[0].size == (cast.SIZE, cast.SIZE)
    assert plain.student.arguments["num_inference_steps"] == len(world.batch.taken)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    scheduler, manner = WALKS["flow_sde"]
    world = World(scheduler, "grpo_guard", manner)
    told = world.sides.student.arguments

    def part(places: list[int]) -> torch.Tensor:
        kept = {k: v[places] if isinstance(v, torch.Tensor) else v for k, v in told.items()}
        sides, calls = world.sides, []
        for call in (sides.student, sides.base):
            calls.append(Unprompted(call.pipeline, kept, call.binding))
        world.sides = Sides(calls[0], None, calls[1])
        found = world.gradient(batch=world.batch.part(places), good=world.good[places])
        world.sides = sides
        return found

    whole = world.gradient()
    torch.testing.assert_close(part([0]) + part([1, 2]), whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-3)
    again = joined([world.batch.part([0]), world.batch.part([1, 2])])
    assert again.numbers == world.batch.numbers
    assert all(torch.equal(a.sample, b.sample) for a, b in zip(again.taken, world.batch.taken, strict=True))
