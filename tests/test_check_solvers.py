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


def test_the_first_interior_step_of_dpm2_alone_has_the_wider_tolerance(check, cases):
    def spoiled(number, by):
        case = copy.deepcopy(cases[5])
        assert case["solver"] == "dpm2"
        case["steps"][number]["mean"][0][0][0][0] += by
        return case

    assert check([spoiled(1, 0.003)])[0] == 0 and check([spoiled(1, 0.007)])[0] == 1
    assert check([spoiled(3, 0.003)])[0] == 1


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
