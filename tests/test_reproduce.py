"""scripts/reproduce*.py: the estimators are what they say, every command is a valid one, pages hold their numbers."""

import json
import re
import shlex
import threading
import tomllib
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffopd.data import PromptRow
from diffopd.drive import Call
from diffopd.errors import UserError
from diffopd.evaluate import Task
from diffopd.objective import get_objective
from diffopd.path import PATHS
from diffopd.prediction import Prediction, Proposal, Step, Transition
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.teach_recipe import read_teach_recipe
from diffopd.tune_recipe import read_tune_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def sides(mean: torch.Tensor) -> tuple[Proposal, Proposal, Step]:
    """A student that draws around `mean` (3,) and a teacher beside it, as many rows as a million draws need."""
    step = Step(torch.zeros(1, 3), 0.8, 0.5, 0)
    said = Prediction(step.sample, step.sample, 0.8, PATHS["flow"])
    student, teacher = mean.expand(200_000, 3), torch.tensor([0.3, 0.0, -0.1]).expand(200_000, 3)
    return Proposal(said, Transition(student, 0.5)), Proposal(said, Transition(teacher, 0.5)), step


@pytest.mark.parametrize("name", ["score function", "score function with baseline"])
def test_a_score_function_estimate_has_the_gradient_of_the_kl_on_average_and_a_baseline_only_lowers_its_noise(name):
    from reproduce_gradients import ESTIMATORS

    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.1, -0.4, 0.2], requires_grad=True)
    exact = torch.autograd.grad(get_objective("kl")(*sides(mean)).mean(), mean)[0]
    estimate = torch.autograd.grad(ESTIMATORS[name](*sides(mean), draw=lambda step: noise).mean(), mean)[0]
    torch.testing.assert_close(estimate, exact, atol=0.01, rtol=0)
    assert exact.abs().max() > 0.1
    rows = torch.zeros(200_000, 3, requires_grad=True)

    def spread_of(which: str) -> float:
        student, teacher, step = sides(torch.zeros(3))
        student = Proposal(student.prediction, Transition(rows + mean.detach(), 0.5))
        loss = ESTIMATORS[which](student, teacher, step, draw=lambda step: noise)
        return float(torch.autograd.grad(loss.sum(), rows)[0].var(0).sum())

    assert spread_of("score function with baseline") < spread_of("score function")


def test_the_variance_ratio_is_that_of_an_estimate_whose_noise_is_known():
    from reproduce_gradients import Moments

    generator, moments = torch.Generator().manual_seed(1), Moments(0.5)
    for _ in range(400):
        exact = 3 + torch.randn(50, generator=generator)
        moments.add(exact, [exact + 2 * torch.randn(50, generator=generator) for _ in range(2)])
    assert moments.between == pytest.approx(50, rel=0.05)
    assert moments.ratio == pytest.approx(1 + 4, rel=0.05)


def listed(capsys, tmp_path, claims: str, *, quick: bool = True) -> list[list[str]]:
    from reproduce import main

    main(claims, "0,1", 60.0, 2, tmp_path, tmp_path, quick=quick, listing=True)
    lines = [shlex.split(line, comments=True) for line in capsys.readouterr().out.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "diffopd"]


def options_of(command: list[str]) -> list[str]:
    return [after for before, after in zip(command, command[1:], strict=False) if before == "--set"]


def test_every_command_of_the_claims_is_valid_and_each_run_has_a_folder_of_its_own(capsys, tmp_path):
    commands = listed(capsys, tmp_path, "1,3,5")
    folders = [command[command.index("--output-dir") + 1] for command in commands]
    assert len(set(folders)) == 2 * (10 + 13 + 15) == len({shlex.join(command) for command in commands})
    for command in commands:
        options = [option for option in options_of(command) if "LAST" not in option and "SAMPLES" not in option]
        if command[0] == "distill":
            assert read_recipe(command[1], options).seed in (0, 1)
        elif "SAMPLES" not in command[1]:
            assert read_teach_recipe(command[1], options).train.max_train_steps == 2
    assert sum("LAST" in " ".join(command) for command in commands) == 2 * 2, "the cascade's second and third task"


def test_what_separates_steps_from_kl_adds_each_alone_to_claim_5_and_repeats_no_training(capsys, tmp_path):
    claim = {shlex.join(command) for command in listed(capsys, tmp_path, "5")}
    both = {shlex.join(command) for command in listed(capsys, tmp_path, "5,5-kl")}
    assert claim < both and len(both - claim) == 2 * 3 * 4
    for command in map(shlex.split, both - claim):
        recipe = read_teach_recipe(command[1], options_of(command))
        assert (recipe.sampling.optimizer_steps == 2) != (recipe.estimator.reference_weight == 0)


def test_every_method_of_claim_1_has_the_same_seconds_and_layers_and_its_seconds_go_into_training(capsys, tmp_path):
    seconds, layers = defaultdict(float), set()
    for command in listed(capsys, tmp_path, "1", quick=False):
        options = [option for option in options_of(command) if "LAST" not in option and "SAMPLES" not in option]
        name = "unmade/joint/nft.toml" if "SAMPLES" in command[1] else command[1]  # it has that file's [student]
        recipe = (read_recipe if command[0] == "distill" else read_teach_recipe)(name, options)
        method, _, seed = command[-1].rpartition("/")[2].rpartition("-seed")
        seconds["cascade" if method.startswith("cascade") else method, seed] += recipe.train.max_train_seconds
        assert recipe.train.validate_every == 0 and recipe.train.max_train_steps == 0 and recipe.train.fuse_student
        if len(options) == len(options_of(command)):  # the cascade's later tasks take the first one's layers
            layers.add(frozenset(recipe.student.target_modules))
    assert len(seconds) == 2 * 8 and all(value == pytest.approx(60) for value in seconds.values())
    assert layers == {frozenset(read_recipe("together").student.target_modules)}


def test_sft_on_teacher_samples_is_the_joint_student_with_the_teachers_own_rate_and_batch():
    from reproduce_scores import supervised

    nft = (ROOT / "teachers" / "unmade" / "joint" / "nft.toml").read_text()
    made, joint = tomllib.loads(supervised(nft)), tomllib.loads(nft)
    assert made["student"] == joint["student"] and made["estimator"] == {"name": "supervised"}
    assert made["train"] == joint["train"] | {"learning_rate": 2e-3} and made["sampling"] == {"num_prompts": 32}


def test_a_walk_by_a_named_solver_draws_its_noise_where_its_states_are(monkeypatch):
    import reproduce_scores

    class Pipeline:
        device = torch.device("meta")

        def __call__(self): ...

    shape, drawn = (4, 2, 2), []

    def sample(call, rows, numbers, *, latents, noise, manner):
        drawn.extend([latents, noise(0), noise(1)])
        return None, []

    place = SimpleNamespace(num_visits=2, latents_shape=shape, shape=shape)
    monkeypatch.setattr(reproduce_scores, "survey", lambda call: place)
    monkeypatch.setattr(reproduce_scores, "sample", sample)
    monkeypatch.setattr(reproduce_scores, "score", lambda *told: torch.zeros(0))
    scorer = reproduce_scores.Scorer(SimpleNamespace(held_out=2))
    contender = reproduce_scores.Contender("base", Call(Pipeline()), 2, 1.0)
    scorer._walked(contender, Task("text", [PromptRow("a"), PromptRow("b")], None), "ddim", 1.0)
    assert {(one.device.type, one.shape) for one in drawn} == {("meta", (2, *shape))}


def test_runs_are_given_one_core_as_the_pages_say(monkeypatch, tmp_path):
    import reproduce_runs

    given = []
    monkeypatch.setattr(reproduce_runs.subprocess, "run", lambda command, **options: given.append(options["env"]))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    reproduce_runs.distill(reproduce_runs.Setup(tmp_path), "opd", 0)
    assert given[0]["OMP_NUM_THREADS"] == "1"


def ran(command, **options):
    """What a run leaves that `start` reads: its settings."""
    overrides = [value for flag, value in pairwise(command) if flag == "--set"]
    folder = Path(command[-1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps({"recipe": read_teach_recipe(command[4], overrides).resolved()}))


def test_a_finished_run_of_another_length_counts_only_where_that_is_asked_for(monkeypatch, tmp_path):
    import reproduce_runs

    started = []
    monkeypatch.setattr(reproduce_runs.subprocess, "run", lambda command, **_: (ran(command), started.append(command)))
    for seconds, any_seconds, told in ((9, False, "text"), (9, False, "text"), (5, True, "text"), (5, True, "style")):
        setup = reproduce_runs.Setup(tmp_path, seconds=seconds, any_seconds=any_seconds)
        reproduce_runs.teach(setup, "nft", 0, f"{told}/nft.toml")
    assert [command[4] for command in started] == ["text/nft.toml", "style/nft.toml"]
    reproduce_runs.teach(reproduce_runs.Setup(tmp_path, seconds=9), "nft", 0, "style/nft.toml")
    assert len(started) == 3, "it ran for 5 seconds"


def test_a_run_that_was_finished_under_other_settings_is_refused(monkeypatch, tmp_path):
    import reproduce_runs

    monkeypatch.setattr(reproduce_runs.subprocess, "run", ran)
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("teacher.toml", "nft.toml"):
        (folder / name).write_text((ROOT / "teachers" / "text" / name).read_text())
    setup, file = reproduce_runs.Setup(tmp_path / "runs"), folder / "nft.toml"
    reproduce_runs.teach(setup, "nft", 0, str(file))
    file.write_text("# a word\n" + file.read_text())
    reproduce_runs.teach(setup, "nft", 0, str(file))
    stored = tmp_path / "runs" / "nft-seed0" / "recipe.json"
    for key, is_read in (("kl", False), ("old_decay_rate", True)):  # as if a later version had brought this setting
        kept = json.loads(stored.read_text())
        del kept["recipe"]["estimator"][key]
        before = stored.read_text()
        stored.write_text(json.dumps(kept))
        if is_read:
            with pytest.raises(UserError, match="estimator.old_decay_rate was null, is 0.001"):
                reproduce_runs.teach(setup, "nft", 0, str(file))
        else:
            reproduce_runs.teach(setup, "nft", 0, str(file))
        stored.write_text(before)
    file.write_text(file.read_text().replace("beta = 1.0", "beta = 0.5"))
    with pytest.raises(UserError, match=r"seed0: was made .* than .*nft.toml has now: estimator.beta was 1.0, is"):
        reproduce_runs.teach(setup, "nft", 0, str(file))


def test_trainings_run_side_by_side_and_keep_their_places(tmp_path):
    from reproduce_runs import Setup, side_by_side

    meet = threading.Barrier(3, timeout=30)
    trainings = {name: lambda name=name: (meet.wait(), name.upper())[1] for name in "abc"}
    assert side_by_side(Setup(tmp_path, jobs=3), trainings) == {"a": "A", "b": "B", "c": "C"}
    with pytest.raises(ZeroDivisionError):
        side_by_side(Setup(tmp_path), {"a": lambda: 1 / 0})


def test_the_trainings_of_claim_4_are_valid_and_none_is_named_like_another(capsys, tmp_path):
    import world_tune_data
    from reproduce import main

    main("4,4-2-steps", "0,1", 60.0, 2, tmp_path, tmp_path, listing=True)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    listed = {shlex.join(line) for line in lines}
    assert len(listed) == len(lines) == 21 and all(line[1:3] == ["scripts/world_tune.py", "run"] for line in lines)
    for sets, model in (("sets", "emoji-4-steps"), ("sets-2-steps", "emoji-2-steps")):
        world_tune_data.main(tmp_path / sets, pipeline=model, pictures=12, seed=0)
    names = set()
    for line in lines:
        told = {key: [b for a, b in zip(line, line[1:], strict=False) if a == key] for key in line if key[:2] == "--"}
        data, (method,) = Path(told["--data"][0]), told["--method"]
        options = [f"method={json.dumps(method)}", *told.get("--set", [])]
        recipe = read_tune_recipe(str(data / "tune.toml"), None, None, options)
        assert recipe.method == method
        assert recipe.student.pretrained_model_name_or_path == f"emoji-{recipe.student.num_inference_steps}-steps"
        names.add((str(data), method, *told["--rate"], *told["--updates"], *told.get("--label", [])))
    assert len(names) == len(lines)


def test_every_choice_of_claim_3_can_be_walked():
    from reproduce_claims import CHOICES

    for group in CHOICES.values():
        for name, settings in group.items():
            assert check(read_recipe("together", settings)).grid is not None, name


def test_a_budget_of_network_calls_picks_the_last_checkpoint_within_it(tmp_path):
    from reproduce_runs import Cost, adapter_within, costs

    rows = [
        {
            "kind": "update",
            "update": n,
            "seconds": 2.0 * n,
            "images": 8 * n,
            "network_calls": {"student": 4, "teacher": 6},
        }
        for n in (1, 2, 3, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"kind": "start"}, *rows]))
    for number in (2, 4):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert costs(tmp_path)[-1] == Cost(4, 8.0, 32, 40)
    file, cost = adapter_within(tmp_path, 39)
    assert file.parent.name == "checkpoint-2" and cost == Cost(2, 4.0, 16, 20)
    assert adapter_within(tmp_path, 40)[1].calls == 40 and adapter_within(tmp_path, 19) is None


def test_two_methods_are_compared_prompt_by_prompt_and_training_by_training():
    from reproduce_scores import apart

    rows, rng = [PromptRow(f"prompt {number}") for number in range(100)], np.random.default_rng(0)
    tasks = [Task("composition", rows, None), Task("text", rows, None)]
    others = [{task.name: rng.random(100).tolist() for task in tasks} for _ in range(3)]
    moved = {"composition": 0.3, "text": -0.1}
    ones = [{name: np.add(by[name], moved[name] + 0.02 * rng.standard_normal(100)) for name in by} for by in others]
    mean, low, high = (float(number) for number in re.findall(r"[+-][\d.]+", apart(ones, others, tasks)))
    assert mean == pytest.approx(0.1, abs=0.01) and low < mean < high
    assert high - low < 0.02, "neither the spread of the prompts nor that between the tasks is in it"


def test_a_page_holds_its_tables_its_plot_and_what_made_it(tmp_path):
    pytest.importorskip("matplotlib")
    from reproduce_pages import Page, Plot, Table, dots, lines, made_by, sheet, spread, write

    table = Table("Scores.", ["method", "score"], [["one", 0.51234], ["two", spread([0.5, 0.7])]])
    cloud = Plot("cloud", "Here and there.", dots({"a": [(0.5, 2.0)], "b": [(1.0, 1.0), (0.9, 2.0)]}, "kept", "new"))
    plot = Plot("curve", "Falls.", lines({"a": [(0, 2.0), (1, 1.0)]}, "update", "loss", log_y=True))
    rows = Plot("rows", "Drawn.", sheet({"base": np.zeros((4, 8, 3), np.uint8), "other": np.ones((4, 8, 3), np.uint8)}))
    for name, torch_version in (("one", "2.11"), ("two", "2.13"), ("three", "2.13")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(json.dumps({"versions": {"torch": torch_version}}))
    runs = [tmp_path / name for name in ("one", "two", "three")]
    page = Page("9-page", "A page", "What it says.", [table], [plot, cloud, rows], {"a": 1}, runs)
    text = write(page, tmp_path, made_by(["--claims", "9"], [0, 1], "one GPU")).read_text()
    for part in (
        "; trained on one GPU. Trained with torch 2.11 and with torch 2.13.",
        "# A page",
        "| one | 0.512 |",
        "| two | 0.600 (0.500 to 0.700) |",
        "9-page-curve.png",
        "--claims 9",
    ):
        assert part in text
    stored = json.loads((tmp_path / "9-page.json").read_text())
    assert stored["tables"][0]["rows"][0] == ["one", 0.51234] and stored["made_by"]["seeds"] == [0, 1]
    for name in ("curve", "cloud", "rows"):
        assert (tmp_path / f"9-page-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["1", "2", "3-solvers", "4", "4-2-steps", "5"])
def test_a_claim_runs_from_end_to_end_and_is_kept(claim, tmp_path, capsys):
    """Two updates of two pictures each on the embedded world: that everything fits, not what it measures."""
    pytest.importorskip("matplotlib")
    from reproduce import main

    def run() -> list[Path]:
        main(claim, "0", 60.0, 2, tmp_path / "runs", tmp_path / "pages", quick=True)
        return sorted((tmp_path / "pages").glob("*.md"))

    (page,) = run()
    assert page.name.startswith(claim[0]) and "nan" not in page.read_text()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    run()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")} == before
