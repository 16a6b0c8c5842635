"""What is run, scored and tabled where `tune` is compared with ordinary fine-tuning on the embedded world."""

import json
from pathlib import Path

import numpy as np
import pytest
from from_scripts import script
from PIL import Image
from typer.testing import CliRunner

from diffopd.tune_recipe import read_tune_recipe

ROOT = Path(__file__).resolve().parents[1]
world_tune = script("world_tune")
data_script = script("world_tune_data")
TASKS = world_tune.world.TASKS


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "sets"
    data_script.main(folder, pipeline="emoji-4-steps", pictures=12, seed=0)
    return folder


@pytest.mark.parametrize("kind", ["manner", "object", "word"])
@pytest.mark.parametrize(
    ("method", "left"), [("sft", {"teacher", "context", "prior"}), ("dreambooth", {"teacher", "context"})]
)
def test_ordinary_fine_tuning_gets_the_sets_recipe_without_what_it_does_not_take(sets, kind, method, left):
    recipe = read_tune_recipe(str(sets / kind / "tune.toml"), None, None, [f'method="{method}"'])
    own = read_tune_recipe(str(sets / kind / "tune.toml"), None, None)
    assert set(recipe.left_out) == {*left, "objective"} and recipe.objective.query == {"random": 1}
    assert (recipe.student, recipe.images, recipe.look) == (own.student, own.images, own.look)
    assert recipe.prior.is_given == (method == "dreambooth")


def test_a_table_may_be_left_out_of_a_sets_recipe(sets, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(world_tune.subprocess, "run", lambda command, check: started.append(command))
    words = ["run", "--data", str(sets / "manner"), "--output", str(tmp_path), "--method", "d-opsd", "--without"]
    assert CliRunner().invoke(world_tune.app, [*words, "prior", "--label", "alone"]).exit_code == 0
    recipe = read_tune_recipe(started[0][started[0].index("tune") + 1], None, None)
    own = read_tune_recipe(str(sets / "manner" / "tune.toml"), None, None)
    assert not recipe.prior.is_given and own.prior.is_given and recipe.images == own.images
    assert CliRunner().invoke(world_tune.app, [*words, "priors"]).exit_code == 2


def test_every_combination_is_started_once_and_a_finished_one_is_kept(sets, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(world_tune.subprocess, "run", lambda command, check: started.append(command))
    done = tmp_path / "sft-lr0.001-5updates-seed1"
    done.mkdir()
    (done / "report.html").touch()
    words = ["run", "--data", str(sets / "word"), "--output", str(tmp_path), "--updates", "5", "--seed", "0"]
    assert CliRunner().invoke(world_tune.app, [*words, "--seed", "1", "--set", "train.batch_size=2"]).exit_code == 0
    names = [Path(command[command.index("--output-dir") + 1]).name for command in started]
    assert names == [f"{name}-lr0.001-5updates-seed{n}" for n in (0, 1) for name in ("d-opsd", "sft")][:3]
    assert all({"train.max_train_steps=5", "train.batch_size=2"} <= set(command) for command in started)


@pytest.mark.parametrize("start", [0, 5])
def test_what_a_word_stands_for_is_scored_and_told_to_the_model_in_its_place(sets, tmp_path, monkeypatch, start):
    world, asked = world_tune.world, []

    def draw(pipe, prompts, steps, guidance, seed):
        assert seed == start
        asked.append(list(prompts))
        pictures = []
        for prompt in prompts:  # the manner is right where the known word is said
            thing = next((thing for thing in world.THINGS if thing in prompt), "star")
            scene = {"task": "style", "thing": thing, "background": 1, "x": 12, "y": 12}
            manner = "twemoji" if "twemoji" in prompt else "noto"
            pictures.append(Image.fromarray(world.render(scene | {"manner": manner})))
        return pictures

    monkeypatch.setattr(world_tune, "sample", draw)
    folder = tmp_path / ("scores-5" if start else "scores")
    folder.mkdir()
    for name in (world_tune.UNTOUCHED, world_tune.TOLD):
        world_tune.score_one(lambda: None, name, sets / "word", folder, 4, 3, start)
    words = [row.prompt for row in world_tune.held_out("text", 8)][start : start + 3]
    assert asked[2] == words, "three prompts of each task, from the start on"
    held = (sets / "word" / "held-out.jsonl").read_text().count("zyx")
    assert len(asked[0]) == held * world_tune.NOISES and all("zyx" in prompt for prompt in asked[0])
    assert all("twemoji" in prompt and "zyx" not in prompt for prompt in asked[4])
    found = CliRunner().invoke(world_tune.app, ["table", "--output", str(tmp_path), "--start", str(start), "--json"])
    rows = {row["model"]: row for row in json.loads(found.output)}
    assert rows[world_tune.UNTOUCHED]["subject"][0] == 0 and rows[world_tune.TOLD]["subject"][0] == 1
    assert rows[world_tune.TOLD]["kept"][0] == 1 and rows[world_tune.TOLD]["sharpness"][0] == pytest.approx(1)
    scored = json.loads((folder / f"{world_tune.TOLD}--4-steps.json").read_text())
    assert 0 < np.mean(scored["shown"]) < 1
    assert len(scored["asked"]) == len(scored["subject"]) and len(set(scored["asked"])) == len(world.THINGS)
    words = ["table", "--output", str(tmp_path), "--start", str(start)]
    assert CliRunner().invoke(world_tune.app, words).output.count("| 4 |") == 2
    assert CliRunner().invoke(world_tune.app, ["table", "--output", str(tmp_path / "none")]).exit_code == 1


def test_intervals_are_over_what_is_asked_and_over_prompts_where_a_file_does_not_say_it(tmp_path, capsys):
    (tmp_path / "scores").mkdir()
    right = [float(n % 12 < 6) for n in range(36)]  # twelve prompts of two things, three noises each
    things = ["cat" if n % 12 < 6 else "dog" for n in range(36)]
    scored = {"model": world_tune.UNTOUCHED, "steps": 4, "subject": right, "shown": [True] * 36}
    scored |= {"sharpness": [1.0] * 6, "subject_sharpness": [0.5] * 36} | {task: [1.0, 0.0] for task in TASKS}
    by_thing = world_tune.summary([scored | {"asked": things}], scored)
    assert by_thing["subject"] == by_thing["subject_shown"] == (0.5, 0.0, 1.0) and by_thing["subject_new"] is None
    assert capsys.readouterr().err == ""
    by_prompt = world_tune.summary([scored], scored)
    assert by_prompt["subject"] == (0.5, *world_tune.bootstrap_interval(right, groups=[n % 12 for n in range(36)]))
    assert "do not say what was asked" in capsys.readouterr().err
    assert by_prompt["kept"] == by_prompt["subject_sharpness"] == (1.0, 1.0, 1.0)


def test_seeds_of_a_run_are_pooled_into_one_row(tmp_path):
    (tmp_path / "scores").mkdir()
    common = {"steps": 4, "shown": [True, False], "asked": ["cat", "dog"], "sharpness": [1.0] * 6}
    common |= {"subject_sharpness": [0.5, 0.5]} | {task: [1.0, 1.0] for task in TASKS}
    runs = {world_tune.UNTOUCHED: [0.0, 0.0], "sft-seed0": [1.0, 0.0], "sft-seed1": [1.0, 1.0]}
    for name, subject in runs.items():
        scored = common | {"model": name, "subject": subject}
        (tmp_path / "scores" / f"{name}--4-steps.json").write_text(json.dumps(scored))
    told = CliRunner().invoke(world_tune.app, ["table", "--output", str(tmp_path), "--pool", "--json"])
    sft, untouched = json.loads(told.output)
    assert (sft["model"], sft["trainings"], untouched["trainings"]) == ("sft", 2, 1)
    assert (sft["subject"][0], sft["subject_shown"][0], sft["subject_new"][0]) == (0.75, 1.0, 0.5)
    each = json.loads(CliRunner().invoke(world_tune.app, ["table", "--output", str(tmp_path), "--json"]).output)
    assert [row["subject"][0] for row in each] == [0.5, 1.0, 0.0]


def test_all_rows_of_scores_make_one_grid(tmp_path):
    for name, shade in (("one--4-steps", 10), ("two--4-steps", 20)):
        Image.new("RGB", (8, 4), (shade,) * 3).save(tmp_path / f"{name}.png")
    world_tune.draw_grid(tmp_path, [4])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (8, 8, 3) and (grid[:4] == 10).all() and (grid[4:] == 20).all()


def test_chosen_rows_are_drawn_under_each_other_behind_their_headings(tmp_path):
    (tmp_path / "scores").mkdir()
    for name, shade in (("one--4-steps", 10), ("two--4-steps", 20), ("three--4-steps", 30)):
        Image.new("RGB", (8, 40), (shade,) * 3).save(tmp_path / "scores" / f"{name}.png")
    words = ["picture", "--output", str(tmp_path), "--to", str(tmp_path / "page.png"), "--model", "three"]
    words += ["--model", "one", "--heading", "third"]
    assert CliRunner().invoke(world_tune.app, words).exit_code == 2
    assert CliRunner().invoke(world_tune.app, [*words, "--heading", "first"]).exit_code == 0
    page = np.asarray(Image.open(tmp_path / "page.png"))
    assert page.shape[0] == 80 and (page[:40, -8:] == 30).all() and (page[40:, -8:] == 10).all()
    assert (page[:40, :-8] < 128).any() and (page[40:, :-8] < 128).any()


@pytest.mark.parametrize(("kind", "count"), [("manner", 12), ("object", 20)])
def test_the_teacher_is_scored_on_the_sets_own_pictures(sets, monkeypatch, kind, count):
    def draw(pipe, prompts, pictures, steps, guidance, seed):
        assert (steps, guidance) == (4, 1.5) and len(prompts) == len(pictures) == count
        return pictures if seed else np.zeros_like(pictures)  # at the second noise all are right

    monkeypatch.setattr(world_tune, "draw_from", draw)
    words = ["teacher", "--data", str(sets / kind), "--noises", "2", "--json"]
    found = json.loads(CliRunner().invoke(world_tune.app, words).stdout.splitlines()[-1])
    assert found == {"pictures": count, "noises": [0.0, 1.0], "mean": 0.5}
    words[2] = str(sets / "word")
    assert CliRunner().invoke(world_tune.app, words).exit_code == 2
