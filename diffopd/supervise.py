"""One micro-batch: the student walks, one teacher is held at its states, each state is compared and backed.

The streaming step (the default) evaluates the student once per state, with gradient, and calls backward before
the next switch: one graph is alive at a time and nothing is stored. The two-pass mode is the reference: first the
student's rollout without gradients, then both sides again at the stored states.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffopd.drive import Call, Visit, Walk, next_sample
from diffopd.path import Path
from diffopd.prediction import Prediction, Proposal, Step, Transition
from diffopd.solver import get_solver, implied_prediction

ObjectiveFunction = Callable[[Proposal, Proposal, Step], Tensor]
Observer = Callable[[Step, Proposal, Proposal], None]


@dataclass(frozen=True)
class Manner:
    """How the student walks and how the two sides are compared.

    solver "native" is the pipeline's own scheduler; other names are rows of `SOLVERS`. substeps m > 1: the teacher
    takes m deterministic steps (`substep_solver`) between two student states and its landing is the target.
    indices: the supervised states; the rollout ends at the last of them. step_weights: one factor per state.
    needs_branches: the objective compares the two answers that guided predictions are made of.
    """

    objective: ObjectiveFunction
    indices: Collection[int]
    solver: str = "native"
    noise_level: float = 0.0
    substeps: int = 1
    substep_solver: str = "auto"
    step_weights: Collection[float] = ()
    two_pass: bool = False
    needs_branches: bool = False

    def weight(self, index: int) -> float:
        """The factor of the loss at state `index`."""
        return self.step_weights[index] if self.step_weights else 1.0


class NonFiniteLoss(ArithmeticError):
    """A loss that is not finite, raised before its backward; index and sigma of the state where it happened."""

    def __init__(self, index: int, sigma: float) -> None:
        super().__init__(f"the loss is not finite at step {index} (sigma {sigma:.4f})")
        self.index, self.sigma = index, sigma


@dataclass
class Watch:
    """Seconds per stage and denoiser evaluations (rows) per side.

    With `exact` the device is synchronised around each stage (benchmarks only).
    """

    exact: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    evaluations: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """While open, the seconds go to `stage`."""
        self._settle()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._settle()
            self.seconds[stage] += time.perf_counter() - start

    def _settle(self) -> None:
        if self.exact and torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass(frozen=True)
class StateLoss:
    """The unweighted loss (B,) at one supervised state, detached."""

    index: int
    sigma: float
    loss: Tensor


class StudentWalk:
    """The student's side: proposals from its own scheduler or a named solver, and the states that follow."""

    def __init__(self, walk: Walk, manner: Manner) -> None:
        self._walk, self._manner = walk, manner
        self._history: tuple[Prediction, ...] = ()

    def advance(self, reply: Any, *, grad: bool, idle: bool = False) -> Visit:
        """On to the next state; RuntimeError where the pipeline has ended before it."""
        visit = self._walk.advance(reply, grad=grad, idle=idle)
        if visit is None:
            raise RuntimeError("The student's pipeline ended before its last supervised state.")
        return visit

    def transition(self, visit: Visit, prediction: Prediction) -> Transition:
        """The Gaussian over the next state, from this one under a prediction (B, ...)."""
        if self._manner.solver == "native":
            return visit.native(prediction)
        solver = get_solver(self._manner.solver, prediction.path, self._manner.noise_level)
        return solver(prediction, visit.step, self._history)

    def propose(self, visit: Visit) -> Proposal:
        """What the student says here, and the step that this makes."""
        return Proposal(visit.prediction, self.transition(visit, visit.prediction))

    def move(self, visit: Visit, noise: Tensor) -> Any:
        """Draw the next state from the student's own (detached) transition; returns the reply for the pipeline."""
        if self._manner.solver == "native":
            return visit.native_reply(noise)
        with torch.no_grad():
            drawn = self.transition(visit, visit.prediction.detach()).draw(noise)
        self._remember(visit)
        return visit.reply(drawn)

    def place(self, visit: Visit, state: Tensor) -> Any:
        """Put the walk at a given canonical next state (B, ...); scheduler and history move as in `move`."""
        self._remember(visit)
        return visit.reply(state)

    def repeat(self, visit: Visit, recorded: Any) -> Any:
        """Move the scheduler and the history as `move` does, but answer with a recorded reply."""
        visit.native_reply(torch.zeros_like(visit.sample))
        self._remember(visit)
        return recorded

    def _remember(self, visit: Visit) -> None:
        self._history = (*self._history, visit.prediction.detach())


class HeldTeacher:
    """The teacher's pipeline in lockstep, held at the student's states by what its `step` returns."""

    def __init__(self, walk: Walk, manner: Manner) -> None:
        self._walk, self._manner = walk, manner

    def predict(self, visit: Visit, state: Step) -> Prediction:
        """m = 1: the teacher's prediction at the student's state."""
        said = visit.prediction
        _same_level(visit, state)
        return Prediction(state.sample, said.velocity, state.sigma, said.path)

    def landing(self, visit: Visit, state: Step) -> Tensor:
        """m > 1: where m deterministic teacher steps from the student's state end, history cleared at the state."""
        _same_level(visit, state)
        history: tuple[Prediction, ...] = ()
        for substep in range(self._manner.substeps):
            said, here = visit.prediction, visit.step
            landed = self._solver(said.path)(said, here, history).mean
            history = (*history, said)
            if substep + 1 < self._manner.substeps:
                visit = self._walk.advance(visit.reply(landed))
        self._pending = visit
        return landed

    def arrive(self, visit: Visit | None, moved: Tensor | None, *, idle: bool) -> Visit:
        """Go on to the student's next state (pipeline sample `moved`); the first call passes None for both."""
        if visit is None:
            return self._walk.advance(idle=idle)
        return self._walk.advance(visit.answer(moved), idle=idle)

    def skip(self, visit: Visit) -> Visit:
        """Pass the substeps of an unsupervised state without evaluating the network."""
        for _ in range(self._manner.substeps - 1):
            visit = self._walk.advance(visit.answer(visit.sample), idle=True)
        return visit

    @property
    def pending(self) -> Visit:
        """The visit whose step is unanswered after `landing`."""
        return self._pending

    def _solver(self, path: Path) -> Callable[[Prediction, Step, tuple[Prediction, ...]], Transition]:
        name = self._manner.substep_solver
        if name == "auto":
            name = "euler" if path.name == "flow" else "ddim"
        return get_solver(name, path, 0.0)

    @property
    def evaluations(self) -> int:
        """Rows that the teacher's networks have computed."""
        return self._walk.evaluations


class GivenPictures:
    """Pictures (B, ...) in a teacher's place: at their noised states the answer is known, and no network is asked."""

    evaluations = 0

    def __init__(self, denoised: Tensor) -> None:
        self._denoised = denoised

    def predict(self, visit: Visit, state: Step) -> Prediction:
        """What a network would say that knew the picture; visit: the student's."""
        return Prediction.from_denoised(state.sample, self._denoised, state.sigma, visit.place.path)

    def arrive(self, visit: None, moved: Tensor | None, *, idle: bool) -> None:
        """There is no walk."""


def _same_level(visit: Visit, state: Step) -> None:
    if abs(visit.place.sigma - state.sigma) > 1e-5:
        raise ValueError(
            f"The teacher stands at sigma {visit.place.sigma:.5f} where the student stands at {state.sigma:.5f}: the "
            "grids do not nest. Use the same scheduler and spacing on both sides, and a number of steps for which the "
            "teacher's grid (student steps x substeps) contains the student's (trailing spacing does)."
        )


def supervise(
    student: Call,
    teacher: Call | Tensor,
    *,
    manner: Manner,
    noise: Callable[[int], Tensor],
    backward: Callable[[Tensor], None] | None,
    watch: Watch | None = None,
    observe: Observer | None = None,
    data_states: Callable[[Visit], Tensor] | None = None,
) -> list[StateLoss]:
    """Walk one micro-batch and back its losses; returns the loss of every supervised state.

    student, teacher: calls with the same initial `latents`. noise(i) -> (B, ...): the draw for the step from state
    i. backward(loss): called with the weighted (B,) loss of each supervised state, divided by their number; None
    evaluates without gradients. data_states(visit) -> (B, ...): off-policy, the next canonical state is this
    instead of the student's own step. teacher may be the pictures (B, ...) of those states themselves; the student is
    then evaluated at the supervised states only.

    Raises ValueError when the grids do not nest or the conversion to the student's convention is undefined, and
    NonFiniteLoss at the first state whose loss is not finite, before its backward.
    """
    watch = watch or Watch()
    recorded: list[Any] | None = None
    if manner.two_pass:
        recorded = _record(student, manner, noise, watch, data_states)
    last = max(manner.indices)
    losses: list[StateLoss] = []
    many, is_given = manner.substeps > 1, isinstance(teacher, Tensor)
    with ExitStack() as stack:
        s = stack.enter_context(Walk(student, keeps_answers=manner.needs_branches))
        walked = StudentWalk(s, manner)
        held = GivenPictures(teacher) if is_given else _held(student, teacher, manner, stack)
        reply, moved, ahead = None, None, None
        for index in range(last + 1):
            asked = index in manner.indices
            with watch("teacher"):
                ahead = held.arrive(ahead, moved, idle=not asked)
            with watch("student" if asked or not is_given else "passing"):
                visit = walked.advance(reply, grad=asked and backward is not None, idle=is_given and not asked)
            if asked:
                with watch("teacher"), torch.no_grad():
                    stand = visit if is_given else ahead
                    target = held.landing(stand, visit.step) if many else held.predict(stand, visit.step)
                    ahead = held.pending if many else ahead
                branches = _branches(student, visit, teacher, ahead) if manner.needs_branches else (None, None)
                losses.append(_compare(walked, visit, target, manner, backward, watch, observe, branches))
            elif many:
                ahead = held.skip(ahead)
            if index < last:
                with watch("passing" if is_given else "student"):
                    if recorded:
                        reply = walked.repeat(visit, recorded[index])
                    else:
                        reply = _next(walked, visit, noise, index, data_states)
                moved = next_sample(reply)
    watch.evaluations["student"] += s.evaluations
    watch.evaluations["teacher"] += held.evaluations
    return losses


def _held(student: Call, teacher: Call, manner: Manner, stack: ExitStack) -> HeldTeacher:
    steps = student.arguments["num_inference_steps"] * manner.substeps
    walk = Walk(teacher.told(num_inference_steps=steps), keeps_answers=manner.needs_branches)
    return HeldTeacher(stack.enter_context(walk), manner)


Branches = tuple[Prediction, Prediction] | None


def _branches(student: Call, visit: Visit, teacher: Call | Tensor, held: Visit | None) -> tuple[Branches, Branches]:
    """What each side's guided prediction is made of; pictures have one answer only."""
    with torch.set_grad_enabled(visit.model_output.requires_grad):
        said = visit.branches(student.guidance)
    return said, None if held is None else held.branches(teacher.guidance)


def _compare(
    walked: StudentWalk,
    visit: Visit,
    target: Tensor | Prediction,
    manner: Manner,
    backward: Callable[[Tensor], None] | None,
    watch: Watch,
    observe: Observer | None,
    branches: tuple[Branches, Branches] = (None, None),
) -> StateLoss:
    """The objective at one state, backed at once: the student's graph is freed before anyone moves on."""
    step = visit.step
    with watch("objective"), torch.set_grad_enabled(backward is not None):
        said = replace(walked.propose(visit), branches=branches[0])
        with torch.no_grad():
            taught = replace(_teacher_proposal(walked, visit, target, said, step), branches=branches[1])
        loss = manner.objective(said, taught, step)
    if not bool(torch.isfinite(loss).all()):
        raise NonFiniteLoss(visit.index, step.sigma)
    if observe:
        observe(step, said, taught)
    if backward is not None:
        with watch("backward"):
            backward(loss * (manner.weight(visit.index) / len(manner.indices)))
    return StateLoss(visit.index, step.sigma, loss.detach())


def _teacher_proposal(
    walked: StudentWalk, visit: Visit, target: Tensor | Prediction, said: Proposal, step: Step
) -> Proposal:
    """The teacher in the student's terms: its prediction, or what its landing (a deterministic one) implies.

    An ODE step must end at the landing itself. A step with noise must not: the landing still contains the state's
    own noise, the mean of the step does not, so there the mean is the student's step under the implied prediction.
    """
    if isinstance(target, Prediction):
        return Proposal(target, walked.transition(visit, target))
    implied = implied_prediction(target, step, said.prediction.path)
    if said.transition.std > 0:
        return Proposal(implied, walked.transition(visit, implied))
    return Proposal(implied, Transition(target, 0.0))


def _next(
    walked: StudentWalk,
    visit: Visit,
    noise: Callable[[int], Tensor],
    index: int,
    data_states: Callable[[Visit], Tensor] | None,
) -> Any:
    if data_states is not None:
        return walked.place(visit, data_states(visit))
    return walked.move(visit, noise(index))


def _record(
    student: Call,
    manner: Manner,
    noise: Callable[[int], Tensor],
    watch: Watch,
    data_states: Callable[[Visit], Tensor] | None,
) -> list[Any]:
    """The two-pass mode's first pass: the student's replies up to its last supervised state, without gradients."""
    replies, reply = [], None
    with watch("rollout"), Walk(student) as walk:
        walked = StudentWalk(walk, manner)
        for index in range(max(manner.indices)):
            visit = walked.advance(reply, grad=False)
            reply = _next(walked, visit, noise, index, data_states)
            replies.append(reply)
    watch.evaluations["student"] += walk.evaluations
    return replies
