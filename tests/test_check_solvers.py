"""scripts/check_solvers.py: the published reference values hold, and what is wrong with a file is told apart."""

import copy
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_solvers.py"
VALUES = Path(__file__).parent / "data" / "solvers.json"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_solvers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return app


@pytest.fixture
def cases():
    return json.loads(VALUES.read_text())["cases"]


@pytest.fixture
def check(script, tmp_path):
    """Writes cases to a file and checks it: (exit code, all that was printed)."""

    def run(cases, *options):
        (tmp_path / "values.json").write_text(json.dumps({"cases": cases}))
        result = CliRunner().invoke(script, [str(tmp_path / "values.json"), *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


def test_the_reference_values_hold_for_every_solver_from_the_command_line():
    done = subprocess.run([sys.executable, SCRIPT, VALUES, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] and {row["solver"] for row in told["cases"]} == {"flow", "dance", "ddim", "dpm1", "dpm2"}
    assert max(row["worst"] for row in told["cases"]) < 1
    assert all({"mean", "noise_scale", "prev_sample", "teacher_mean", "loss"} <= set(row) for row in told["cases"])
    assert any("log_prob" in row for row in told["cases"])


@pytest.mark.parametrize("clamp", [1e-30, 0.0], ids=["as the reference", "the limit"])
@pytest.mark.parametrize("sigmas", [[1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.857, 0.6, 0.0], [0.9, 0.6, 0.3, 0.0]])
def test_the_second_order_solver_agrees_on_short_grids_where_a_clamp_is_far_from_its_limit(check, sigmas, clamp):
    """Written anew from Algorithm 2 of arXiv:2211.01095 on plain numbers; only one step depends on the clamp."""

    def log_snr(sigma):
        return math.log(1 - sigma) - math.log(sigma) if sigma < 1 else (math.log(clamp) if clamp else -math.inf)

    x, velocity, steps, before = 0.7, [1.3, -0.4, 0.9, -1.1], [], None
    for number, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        x0 = x - sigma * velocity[number]
        blend = x0
        if number and after:
            h, h_before = log_snr(after) - log_snr(sigma), log_snr(sigma) - log_snr(sigmas[number - 1])
            blend = x0 + h / h_before / 2 * (x0 - before)
        mean = after / sigma * x + ((1 - after) - (1 - sigma) * after / sigma) * blend
        steps.append({"sigma": sigma, "sigma_next": after, "sample": [[x]], "model_output": [[velocity[number]]]})
        steps[-1]["mean"] = [[mean]]
        x, before = mean, x0
    case = {"solver": "dpm2", "eta": 0.0, "steps": steps}
    assert check([case])[0] == 0
    steps[1]["mean"][0][0] += 3e-3
    assert check([case])[0] == 1


@pytest.mark.parametrize(
    "quantity", ["mean", "noise_scale", "prev_sample", "log_prob", "std_dev_t", "teacher_mean", "loss"]
)
@pytest.mark.parametrize("spoil", [lambda v: v + 0.001 * max(1, abs(v)), lambda v: math.nan], ids=["shifted", "nan"])
def test_one_wrong_number_fails(check, cases, quantity, spoil):
    flow = copy.deepcopy(cases[1])
    assert flow["solver"] == "flow" and flow["eta"] > 0
    row, key = flow["steps"][2], quantity
    while isinstance(row[key], list):
        row, key = row[key], 0
    row[key] = spoil(row[key])
    code, text = check([flow])
    assert code == 1 and "FAILED" in text and "0 of 1 cases" in text


def stripped(step):
    return {key: step[key] for key in ("sigma", "sigma_next", "sample", "model_output", "noise")}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda case: case.update(steps=[]), "at least one"),
        (lambda case: case.update(steps="none"), "must be a list"),
        (lambda case: case.update(steps=[stripped(step) for step in case["steps"]]), "nothing to compare"),
        (lambda case: case["steps"].__setitem__(2, stripped(case["steps"][2])), "step 2: nothing to compare"),
        (lambda case: case.update(eta=None), "eta = None"),
        (lambda case: case.update(eta=-0.7), "eta = -0.7"),
        (lambda case: case.update(eta="much"), "eta = 'much'"),
        (lambda case: case.update(solver="ddim", eta=1.5), "at most 1"),
        (lambda case: case.update(solver="heun"), "known are flow"),
        (lambda case: case["steps"][1].pop("sample"), "step 1: 'sample' is missing"),
        (lambda case: case["steps"][1].update(sigma="high"), "step 1"),
        (lambda case: case["steps"][1].update(sigma=0.0), "0 <= sigma_next < sigma"),
        (lambda case: case["steps"][1].update(sample=[1.0, 2.0]), "batch dimension"),
        (lambda case: case["steps"][1].update(mean=case["steps"][1]["mean"][0]), "'mean' has shape"),
        (lambda case: case["steps"][1].update(mean="wide"), "step 1"),
    ],
)
def test_a_file_that_cannot_be_compared_is_named_with_its_place(check, cases, spoil, reason):
    case = copy.deepcopy(cases[1])
    spoil(case)
    code, text = check([case])
    assert code == 2 and reason in text and "case 0" in text


@pytest.mark.parametrize("content", ["[1]", '{"cases": []}', '{"cases": {}}', '{"cases": [1]}', "{", ""])
def test_a_file_of_another_form_is_refused(script, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    result = CliRunner().invoke(script, [str(tmp_path / "other.json")])
    assert result.exit_code == 2 and "other.json" in result.output


def test_a_missing_file_is_refused(script, tmp_path):
    assert CliRunner().invoke(script, [str(tmp_path / "none.json")]).exit_code == 2
