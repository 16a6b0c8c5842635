"""A family's pipeline with a student and a teacher adapter on its denoiser, and the calls of both sides."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from families import FAMILIES, REFUSED, Row, build
from torch import Tensor, nn

from diffopd.adapters import STUDENT, AdapterSwitch, add_adapter
from diffopd.assemble import with_denoiser
from diffopd.drive import Call, Survey, Walk, denoiser_of, next_sample, shell, survey
from diffopd.objective import get_objective
from diffopd.supervise import Manner, StateLoss, supervise

PROMPTS = ("a red dot", "two blue lines")
TEACHER = "teacher"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class FamilyCast:
    """student, teacher: the parameters of the two sides. Use `call` for the student, `held` for who is held.

    views: how each side is seen from the first and from the second shell: a pipeline and what binds its adapter.
    """

    row: Row
    views: dict[str, tuple[Call, Call]]
    student: dict[str, nn.Parameter]
    teacher: dict[str, nn.Parameter]

    @property
    def pipeline(self) -> Any:
        return self.views[STUDENT][0].pipeline

    def call(self, form: str | None = None, side: str = STUDENT, shell: int = 0, **told: Any) -> Call:
        """A side's call in a form of guidance (the first by default), for PROMPTS."""
        guidance = self.row.forms[form or next(iter(self.row.forms))]
        call = self.views[side][shell].told(**self.row.arguments, **guidance)
        return call.prompted(PROMPTS, num_inference_steps=self.row.steps, **told)

    def held(self, form: str | None = None, side: str = TEACHER, **told: Any) -> Call:
        """The same on the second shell, for the side that is held."""
        return self.call(form, side, 1, **told)

    def latents(self, seed: int = 7) -> Tensor:
        """Initial latents in the shape that the pipeline's call takes."""
        return torch.randn(len(PROMPTS), *self.survey.latents_shape, generator=seeded(seed))

    @cached_property
    def survey(self) -> Survey:
        return survey(self.call())

    def supervise(
        self, student: Call, teacher: Call, *, indices: Collection[int] = (), backward: bool = True, **options: Any
    ) -> list[StateLoss]:
        """States (all by default) under the objective on velocities; the gradient goes to the student's parameters."""
        manner = Manner(get_objective("velocity"), indices or range(self.survey.num_visits), **options)
        shape = (len(PROMPTS), *self.survey.shape)
        return supervise(
            student,
            teacher,
            manner=manner,
            noise=lambda index: torch.randn(shape, generator=seeded(index)),
            backward=(lambda loss: loss.mean().backward()) if backward else None,
        )

    def gradient(self) -> Tensor:
        """All student gradients, flat, and forget them."""
        flat = torch.cat([parameter.grad.flatten() for parameter in self.student.values()])
        for parameter in self.student.values():
            parameter.grad = None
        return flat

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The student's weights are put back afterwards."""
        before = {name: parameter.detach().clone() for name, parameter in self.student.items()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.student.items():
                    parameter.copy_(before[name])
                    parameter.grad = None


def fill(parameters: dict[str, nn.Parameter], scale: float, seed: int) -> None:
    """Random values for an adapter, so that it says something."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def cast_with(name: str, pipeline: Any) -> FamilyCast:
    """Student and teacher as random adapters on one trunk, or as two trunks where the denoiser takes no adapters."""
    row = {**FAMILIES, **REFUSED}[name]
    return _two_adapters(row, pipeline) if row.targets else _two_trunks(row, pipeline)


def _two_adapters(row: Row, pipeline: Any) -> FamilyCast:
    denoiser, parameters = denoiser_of(pipeline), {}
    for seed, side in enumerate((TEACHER, STUDENT)):
        parameters[side] = add_adapter(denoiser, side, rank=2, lora_alpha=4, target_modules=row.targets)
        fill(parameters[side], 0.3, seed)
    switch, other = AdapterSwitch(denoiser), shell(pipeline)
    switch.select(STUDENT)
    views = {
        side: tuple(Call(one, binding=partial(switch.bound, side)) for one in (pipeline, other)) for side in parameters
    }
    return _ready(row, views, parameters)


def _two_trunks(row: Row, pipeline: Any) -> FamilyCast:
    views, parameters = {}, {}
    for side, own in ((STUDENT, pipeline), (TEACHER, with_denoiser(pipeline, deepcopy(denoiser_of(pipeline))))):
        views[side] = (Call(own), Call(shell(own)))
        parameters[side] = dict(denoiser_of(own).named_parameters())
    with torch.no_grad():
        for parameter in parameters[TEACHER].values():
            parameter.mul_(1.1)
    return _ready(row, views, parameters)


def _ready(row: Row, views: dict[str, tuple[Call, Call]], parameters: dict[str, dict[str, nn.Parameter]]) -> FamilyCast:
    for side, own in parameters.items():
        for parameter in own.values():
            parameter.requires_grad_(side == STUDENT)
    return FamilyCast(row, views, parameters[STUDENT], parameters[TEACHER])


@cache
def cast_of(name: str) -> FamilyCast:
    """One cast per family for all tests: each leaves its weights as they were."""
    return cast_with(name, build(name))


def walked(call: Call) -> tuple[Any, Tensor, Tensor]:
    """What the pipeline returns when its own scheduler drives it, its last canonical state, and the last denoised."""
    with Walk(call) as walk:
        visit = walk.advance()
        while visit is not None:
            reply, denoised = visit.native_reply(), visit.prediction.denoised
            state = next_sample(reply) / visit.place.scale_next
            visit = walk.advance(reply)
        return walk.result[0], state, denoised
