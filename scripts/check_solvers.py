"""Holds the solvers to reference values: prints the largest error of each case, exit code 1 above the tolerance.

    python scripts/check_solvers.py tests/data/solvers.json [more.json ...] [--json]

A file has "cases": solver (flow, dance, ddim, dpm1, dpm2), eta, shift, num_steps and "steps"; each step gives sigma,
sigma_next, sample, model_output (velocity) and any of noise, mean, noise_scale, prev_sample, log_prob (mean over
dimensions), std_dev_t, teacher_model_output, teacher_mean, loss (the released weighting). Tensors of any shape.
Tolerance 1e-4. Where dpm2's log-SNR is infinite (its second step from sigma = 1) the reference clamps alpha at 1e-30
and our solver takes the limit; that step may agree with either.
Errors are absolute up to 1 and relative above. Exit code 2: a file that cannot be read as this format, or a step
that gives nothing to compare.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diffopd.objective import mean, released_sde
from diffopd.path import PATHS
from diffopd.prediction import Prediction, Proposal, Step, Transition
from diffopd.solver import get_solver

NAMES = {"flow": "flow_sde", "dance": "dance_sde", "ddim": "ddim", "dpm1": "dpmpp_1", "dpm2": "dpmpp_2m"}
QUANTITIES = ("mean", "noise_scale", "prev_sample", "log_prob", "std_dev_t", "teacher_mean", "loss")
TOLERANCE = 1e-4
CLAMP = 1e-30  # of alpha in the reference's logarithm at sigma = 1, where our solver takes the limit
FLOW = PATHS["flow"]


class BadFile(Exception):
    """A file that is not of the format; says where."""


def check_case(case: dict[str, Any], place: str) -> dict[str, float]:
    """Largest error per quantity of one case, each in units of its tolerance under the key `worst`."""
    name = _get(case, "solver", place)
    if name not in NAMES:
        raise BadFile(f"{place}: solver {name!r}; known are {', '.join(NAMES)}")
    try:
        solver = get_solver(NAMES[name], FLOW, float(case.get("eta", 0.0)) if not name.startswith("dpm") else 0.0)
    except (TypeError, ValueError) as error:
        raise BadFile(f"{place}: eta = {case.get('eta')!r}: {error}") from error
    errors: dict[str, float] = {}
    worst = 0.0
    history: tuple[Prediction, ...] = ()
    for number, row in enumerate(_list(case, "steps", place)):
        here = f"{place}, step {number}"
        if not isinstance(row, dict):
            raise BadFile(f"{here}: not an object")
        row = row | {"is_ode": name.startswith("dpm") or not case.get("eta")}
        try:
            prediction, found = _check_step(name, solver, history, row, number, here)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadFile(f"{here}: {error}") from error
        if not found:
            raise BadFile(f"{here}: nothing to compare; give any of {', '.join(QUANTITIES)}")
        history = (*history, prediction)
        for quantity, error in found.items():
            errors[quantity] = max(errors.get(quantity, 0.0), error)
            worst = max(worst, error / TOLERANCE)
    return errors | {"worst": worst}


def _check_step(
    name: str, solver: Any, history: tuple[Prediction, ...], row: dict[str, Any], number: int, place: str
) -> tuple[Prediction, dict[str, float]]:
    sample, output = (_tensor(row, key, place) for key in ("sample", "model_output"))
    sigma, sigma_next = (float(_get(row, key, place)) for key in ("sigma", "sigma_next"))
    if not 0 <= sigma_next < sigma <= 1:
        raise BadFile(f"{place}: sigma {sigma} -> {sigma_next}; 0 <= sigma_next < sigma <= 1 is wanted")
    step = Step(sample, sigma, sigma_next, number)
    prediction = Prediction(sample, output, sigma, FLOW)
    transition = solver(prediction, step, history)
    if name == "dpm2" and history and sigma_next and float(FLOW.alpha(history[-1].sigma)) == 0:
        clamped = _as_clamped(prediction, step, history[-1], transition)
        apart = [_error(each.mean, row["mean"], "mean") if "mean" in row else 0.0 for each in (clamped, transition)]
        transition = clamped if apart[0] <= apart[1] else transition
    found: dict[str, Tensor | float] = {"mean": transition.mean, "noise_scale": transition.std}
    if "noise" in row:
        found["prev_sample"] = transition.draw(_tensor(row, "noise", place))
    if row.get("log_prob") is not None and transition.std > 0 and "prev_sample" in row:
        drawn = _tensor(row, "prev_sample", place)
        found["log_prob"] = transition.log_prob(drawn) / drawn[0].numel()
    if name == "flow" and "std_dev_t" in row:
        found["std_dev_t"] = transition.std / abs(step.dt) ** 0.5
    elif "std_dev_t" in row:
        found["std_dev_t"] = transition.std
    if row.get("teacher_model_output") is not None and row.get("teacher_mean") is not None:
        taught = Prediction(sample, _tensor(row, "teacher_model_output", place), sigma, FLOW)
        taught_transition = solver(taught, step, history)
        found["teacher_mean"] = taught_transition.mean
        if row.get("loss") is not None:
            found["loss"] = _released_loss(name, row, prediction, transition, taught, taught_transition, step)
    errors = {key: _error(value, row[key], key) for key, value in found.items() if row.get(key) is not None}
    return prediction, errors


def _as_clamped(prediction: Prediction, step: Step, previous: Prediction, own: Transition) -> Transition:
    """The second step of DPM-Solver++(2M) from sigma = 1 as the reference has it, where `own` is its limit.

    There 1 / 2r is (h / 2) / (log-SNR now - log CLAMP), in the limit 0. Raises ValueError where `own` is not that.
    """
    first = get_solver("dpmpp_1", FLOW, 0.0)
    if not torch.equal(own.mean, first(prediction, step, ()).mean):
        raise ValueError("after a state of sigma = 1 the second-order step must be the first-order one")
    now, after = (math.log(float(FLOW.alpha(s))) - math.log(s) for s in (step.sigma, step.sigma_next))
    inverse = (after - now) / (now - math.log(CLAMP) + math.log(previous.sigma)) / 2
    denoised = (1 + inverse) * prediction.denoised - inverse * previous.denoised
    return first(Prediction.from_denoised(step.sample, denoised, step.sigma, FLOW), step, ())


def _released_loss(
    name: str, row: dict[str, Any], said: Prediction, mine: Transition, taught: Prediction, its: Transition, step: Step
) -> Tensor:
    """0.5 delta^2 for deterministic solvers, else the released SDE weighting, its clamp at std 0 included."""
    if row["is_ode"]:
        return mean(Proposal(said, mine), Proposal(taught, its), step)
    return released_sde(Proposal(said, mine), Proposal(taught, its), step, solver=NAMES[name])


def _error(found: Tensor | float, wanted: Any, quantity: str) -> float:
    """The largest error; infinite where either side is not finite. One number may stand for equal ones."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    found = torch.as_tensor(found).double()
    if 1 not in (wanted.numel(), found.numel()) and wanted.shape != found.shape:
        raise ValueError(f"{quantity!r} has shape {list(wanted.shape)}; {list(found.shape)} is wanted")
    error = float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max())
    return error if math.isfinite(error) else math.inf


def _get(row: dict[str, Any], key: str, place: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise BadFile(f"{place}: {key!r} is missing")
    return row[key]


def _list(row: dict[str, Any], key: str, place: str) -> list[Any]:
    value = _get(row, key, place)
    if not isinstance(value, list) or not value:
        raise BadFile(f"{place}: {key!r} must be a list with at least one entry")
    return value


def _tensor(row: dict[str, Any], key: str, place: str) -> Tensor:
    try:
        value = torch.as_tensor(_get(row, key, place), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise BadFile(f"{place}: {key!r} is not a tensor of numbers ({error})") from error
    if value.ndim < 2:
        raise BadFile(
            f"{place}: {key!r} needs a batch dimension and at least one more, its shape is {list(value.shape)}"
        )
    return value


def read_cases(path: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadFile(f"{path}: {error}") from error
    return _list(data, "cases", str(path))


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON files of reference values")],
    as_json: Annotated[bool, typer.Option("--json", help="print one line of JSON instead of a table")] = False,
) -> None:
    """Compare the solvers with reference values."""
    rows = []
    try:
        for path in files:
            for number, case in enumerate(read_cases(path)):
                errors = check_case(case, f"{path}, case {number}")
                label = {key: case.get(key) for key in ("solver", "eta", "shift", "num_steps")}
                rows.append({"file": str(path), **label, **errors, "ok": errors["worst"] <= 1})
    except BadFile as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps({"ok": all(row["ok"] for row in rows), "cases": rows}))
    else:
        _show(rows)
    raise typer.Exit(0 if all(row["ok"] for row in rows) else 1)


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("solver", "eta", "shift", "steps", *QUANTITIES, "")
    for row in rows:
        numbers = [f"{row[q]:.1e}" if q in row else "" for q in QUANTITIES]
        label = [str(row[key]) for key in ("solver", "eta", "shift", "num_steps")]
        table.add_row(*label, *numbers, "ok" if row["ok"] else "FAILED")
    Console(width=130).print(table)
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} cases within tolerance")


if __name__ == "__main__":
    typer.run(main)
