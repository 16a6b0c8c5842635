"""The page of a run: every part shows its data, missing parts are said, nothing from a file becomes markup."""

import json
import re
from html import unescape

import numpy as np
import pytest
from PIL import Image

from diffopd import charts
from diffopd.charts import Series
from diffopd.errors import UserError
from diffopd.recipe import read_recipe
from diffopd.report import duration, looks, write_report
from diffopd.run_folder import RunFolder

EVIL = '"><script>alert("prompt")</script>'
TASKS = ("dots", "lines")
CARD = """name = "{name}"
base = "base"
form = "lora"
weights = "pytorch_lora_weights.safetensors"
guidance_scale = 2.5
num_inference_steps = 20
reward = "world.py:{name}"
license = "Apache-2.0"
[prompts]
train = "train.jsonl"
test = "test.jsonl"
"""
RECIPE = """# the recipe, <b>verbatim</b>
name = "two-in-one"
[student]
pretrained_model_name_or_path = "./base"
rank = 8
num_inference_steps = 2
[[teachers]]
name = "./dots"
[[teachers]]
name = "./lines"
weight = 3.0
guidance_scale = 1.0
[train]
max_train_steps = 30
"""


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run folder that has only just begun."""
    for name in TASKS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "teacher.toml").write_text(CARD.format(name=name))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.toml", [f"output_dir={json.dumps(str(tmp_path / 'run'))}"])
    hashes = {f"{name}/pytorch_lora_weights.safetensors": f"{i}" * 64 for i, name in enumerate(TASKS)}
    return RunFolder.create(tmp_path / "run", recipe, hashes)


@pytest.fixture
def full_run(run) -> RunFolder:
    """A finished run with every part."""
    add_metrics(run)
    add_scores(run)
    add_pictures(run)
    return run


def add_metrics(run: RunFolder) -> None:
    for update in range(1, 31):
        per_step = {name: [0.5 / update, 0.2 / update] for name in TASKS}
        run.append_metrics(
            {"kind": "update", "update": update, "seconds": 3.0 * update, "loss": 0.35 / update}
            | {"loss_per_teacher": {name: 0.35 / update for name in TASKS}, "loss_per_step": per_step}
            | {"steps": {name: [0, 1] for name in TASKS}, "images": 8 * update, "grad_norm": 1.0}
            | {"network_calls": {"student": 16, "teacher": 24}}
            | {"stage_seconds": {"teacher": 1.5, "student": 0.6, "objective": 0.1, "backward": 0.5, "optimizer": 0.1}}
        )
    held_out = {name: 0.0123 for name in TASKS}
    run.append_metrics({"kind": "validation", "update": 30, "seconds": 90.0, "loss": 1.0, "loss_per_teacher": held_out})
    run.append_metrics({"kind": "stop", "update": 30, "seconds": 90.0, "reason": "reached max_train_steps = 30"})


def score_row(model: str, task: str, steps: int, guidance: float, score: float, **more) -> dict:
    row = {"model": model, "task": task, "num_inference_steps": steps, "guidance_scale": guidance, "score": score}
    interval = [score - 0.02, score + 0.02]
    return row | {"interval": interval, "diversity": 0.31, "num_prompts": 64, "seeds": [0, 1], "seconds": 1.0} | more


def score_rows() -> list[dict]:
    rows = []
    for task in TASKS:
        rows += [score_row("base", task, 20, scale, 0.1 * scale, source="card") for scale in (1.0, 4.0, 2.0)]
        rows.append(score_row(f"teacher:{task}", task, 20, 2.5, 0.9, is_reference=True))
        rows.append(score_row(f"teacher:{task}", task, 40, 2.5, 0.95))
        ratio = {"to": f"teacher:{task}", "value": 0.8888, "interval": [0.8123, 0.9456]}
        rows.append(score_row("student", task, 2, 1.0, 0.8, ratio=ratio))
    return rows


def add_scores(run: RunFolder) -> None:
    (run.path / "evaluation").mkdir()
    run.write(
        "evaluation/scores.json", json.dumps({"settings": {"guidance_scales": [4.0, 1.0, 2.0]}, "rows": score_rows()})
    )


def add_pictures(run: RunFolder) -> None:
    random = np.random.default_rng(0)

    def draw(name: str) -> None:
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)

    index, walk = [], []
    for task in TASKS:
        models = {}
        for model, score in (("base", 0.0), (f"teacher-{task}", 1.0), ("student", 0.75)):
            models[model] = {"file": f"grid/{model}/{task}-0.png", "score": score}
            draw(f"evaluation/grid/{model}/{task}-0.png")
        index.append({"task": task, "prompt": f"a {task} {EVIL}", "index": 0, "models": models})
        for step, sigma in enumerate((1.0, 0.8704)):
            for side in ("teacher", "student"):
                file = f"trajectory/{task}-{side}-{step}.png"
                draw(f"samples/{file}")
                place = {"teacher": task, "prompt": f"walk {EVIL}", "side": side, "step": step}
                walk.append(place | {"sigma": sigma, "file": file})
    (run.path / "evaluation/grid/index.json").write_text(json.dumps(index))
    (run.path / "samples/trajectory.json").write_text(json.dumps(walk))


def page_of(run: RunFolder) -> str:
    path = write_report(run.path)
    assert path == run.path / "report.html"
    return path.read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """What a person reads: no styles, no tags, single spaces."""
    body = re.sub(r"(?s)<style>.*?</style>|<title>.*?</title>", "", page)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).replace("\N{NO-BREAK SPACE}", " ").split())


def test_the_head_says_what_was_run(full_run):
    words = words_of(page_of(full_run))
    assert "two-in-one" in words and "in 30 updates and 1 min 30 s" in words
    assert "from dots and lines in" in words and "It stopped because it reached max_train_steps = 30." in words
    assert "LoRA, rank 8" in words and "2 steps, guidance 1" in words
    assert "8 pictures a process and teacher an update, learning rate" in words
    assert "dots lora 20 2.5 25.0 % 0000000000000000…" in words, "the card's guidance"
    assert "lines lora 20 1 75.0 % 1111111111111111…" in words, "the recipe's guidance goes before the card's"
    assert f"torch {full_run.versions()['torch']}" in words


@pytest.mark.parametrize(
    ("draws", "said", "share"),
    [
        ("round_robin", "8 pictures a process an update, teachers in turn, learning", "2.5 0000"),
        ("3", "8 pictures a process for each of the 3 teachers drawn an update, learning", "2.5 25.0 % 0000"),
    ],
)
def test_an_update_is_told_as_its_tasks_are_drawn_and_shares_only_where_weights_count(
    tmp_path, run, draws, said, share
):
    weights = ["teachers.1.weight=1.0"] if draws == "round_robin" else []
    settings = [f"train.tasks_per_update={draws}", "train.batch_size=8", *weights]
    recipe = read_recipe(tmp_path / "recipe.toml", [f'output_dir="{run.path}"', *settings])
    words = words_of(page_of(RunFolder.create(tmp_path / "run", recipe, run.hashes())))
    assert said in words and share in words and ("Share" in words) == (draws == "3")


def test_the_grid_says_at_which_steps_and_guidance_each_model_drew(full_run):
    words = words_of(page_of(full_run))
    assert words.count("base: 20 steps, guidance 4; teacher: 20 steps, guidance 2.5; student: 2 steps, guidance 1") == 2


def test_scores_of_a_checkpoint_before_the_latest_are_said_to_be_that(full_run):
    said = "are of checkpoint-20; the run has gone on since"
    file = full_run.path / "evaluation/scores.json"
    file.write_text(json.dumps({"checkpoint": "checkpoint-20"} | json.loads(file.read_text())))
    (full_run.path / "checkpoint-20").mkdir()
    assert said not in words_of(page_of(full_run))
    (full_run.path / "checkpoint-30").mkdir()
    assert said in words_of(page_of(full_run))


def test_a_damaged_file_of_scores_is_said_with_how_to_make_it_again(full_run):
    file = full_run.path / "evaluation/scores.json"
    file.write_text(file.read_text()[:99])
    words = words_of(page_of(full_run))
    assert "evaluation/scores.json is damaged: diffopd evaluate with this folder makes it again" in words
    assert "Not evaluated yet" not in words


def test_the_score_table_shows_every_row_and_marks_the_best_guidance_of_the_base(full_run):
    page = page_of(full_run)
    words = words_of(page)
    assert page.count("best guidance") == len(TASKS)
    assert re.search(r"base 20 4 0\.400 † best guidance 0\.380 – 0\.420 d 0\.31", words)
    assert words.index("base 20 1 ") < words.index("base 20 2 ") < words.index("base 20 4 ")
    assert "student 2 1 0.800 88.9 %" in words
    assert "64 prompts a task, seeds 0, 1" in words and "† from the card" in words


def test_prompts_of_the_training_are_not_called_held_out(full_run):
    dots = full_run.path.parent / "dots"
    for split, prompts in (("train", ("a dot", "two dots")), ("test", ("a dot",))):
        (dots / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    said = "of dots no others were given than those of the training"
    assert said in words_of(page_of(full_run))
    (dots / "test.jsonl").write_text('{"prompt": "three dots"}\n')
    assert said not in words_of(page_of(full_run))


def test_the_students_ratio_is_to_the_teacher_at_its_own_steps(full_run):
    words = words_of(page_of(full_run))
    assert "88.9 % of the teacher’s score at 20 steps and guidance 2.5 (0.800 to 0.900)" in words
    assert "95 % interval 81.2 to 94.6 %" in words


def test_losses_are_drawn_per_teacher_per_state_and_held_out(full_run):
    page = page_of(full_run)
    assert page.count('class="chart"') == 1 + len(TASKS) + 1
    assert page.count('class="front"') == 2 + 2 * 2 + 2, "lines: per teacher, per teacher and state, held out"
    assert "lines 0.0123" in words_of(page), "the last held-out value"


def test_pictures_are_embedded_with_prompts_and_verdicts(full_run):
    page = page_of(full_run)
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)" class="pixels"', page)
    assert len(pictures) == len(TASKS) * 3 + len(TASKS) * 2 * 2
    assert [name.split(":")[0] for name in pictures[:3]] == ["base", "dots", "student"]
    assert page.count(">✗</span>") == len(TASKS) and page.count("✓") == len(TASKS)
    assert "✓ 0.75" not in words_of(page) and words_of(page).count(" 0.75") >= len(TASKS), "neither right nor wrong"


def test_the_walk_shows_the_student_above_the_teacher_with_sigmas(full_run):
    words = words_of(page_of(full_run))
    assert words.count("student σ 1 σ 0.87 teacher σ 1 σ 0.87") == len(TASKS)


def test_two_equal_prompts_keep_their_own_pictures(full_run):
    file = full_run.path / "samples/trajectory.json"
    file.write_text(json.dumps([entry for entry in json.loads(file.read_text()) for _ in range(2)]))
    assert words_of(page_of(full_run)).count("student σ 1 σ 0.87 teacher") == 2 * len(TASKS)


def test_time_is_told_per_stage_with_rates(full_run):
    words = words_of(page_of(full_run))
    assert "teacher 45 s 1.5 s 50.0 %" in words
    assert "the rest saving, held-out checks 6 s 0.2 s 6.7 %" in words
    assert "Pictures per second 2.67" in words
    assert "Network calls per picture, student 2 " in words and "Network calls per picture, teacher 3 " in words


def test_the_recipe_is_there_verbatim_and_escaped(full_run):
    page = page_of(full_run)
    assert "<b>verbatim</b>" not in page
    assert RECIPE in unescape(page)


def test_nothing_from_a_file_becomes_markup(full_run):
    page = page_of(full_run)
    assert "<script" not in page
    assert EVIL in unescape(page)


def test_the_page_loads_nothing(full_run):
    page = page_of(full_run)
    assert not re.search(r"(?i)<(link|script|iframe|object|embed)\b|@import|url\(", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert "http" not in re.sub(r"(?s)<pre>.*?</pre>|base64,[^\"]*", "", page)


def test_missing_parts_are_said(run):
    words = words_of(page_of(run))
    for sentence in ("no update is recorded yet", "Not evaluated yet", "No pictures yet", "No trajectory was saved"):
        assert sentence in words


def test_a_run_under_way_is_shown_up_to_its_last_whole_row(run):
    add_metrics(run)
    file = run.path / "metrics.jsonl"
    rows = [line for line in file.read_text().splitlines() if '"update"' in line and '"stop"' not in line]
    file.write_text("\n".join(rows) + '\n{"kind": "update", "upd')
    words = words_of(page_of(run))
    assert "in 30 updates" in words and "It has not stopped, or was cut off." in words


def test_files_cut_short_and_pictures_gone_do_not_stop_the_page(full_run):
    (full_run.path / "samples/trajectory.json").write_text('[{"teacher": "do')
    (full_run.path / "evaluation/grid/base/dots-0.png").unlink()
    (full_run.path / "evaluation/grid/base/lines-0.png").write_bytes(b"no picture")
    words = words_of(page_of(full_run))
    assert "No trajectory was saved" in words and words.count("no picture base") == 2


def test_a_picture_outside_the_run_is_not_embedded(full_run):
    Image.new("RGB", (8, 8)).save(full_run.path.parent / "secret.png")
    file = full_run.path / "evaluation/grid/index.json"
    file.write_text(file.read_text().replace("grid/base/dots-0.png", "../../secret.png"))
    assert words_of(page_of(full_run)).count("no picture base") == 1


def test_pictures_of_a_tall_grid_can_still_be_seen(run):
    """Eight pictures of 512 pixels in three columns, as the teacher's check lays them."""
    Image.new("RGB", (3 * 512, 14 + 8 * 512)).save(run.path / "teacher-check.png")
    (run.path / "teacher-check.json").write_text("{}")
    assert looks(run.path, [])["check_picture"]["width"] == 3 * 192


def test_teachers_that_have_moved_are_told_from_the_run_itself(full_run):
    for name in TASKS:
        (full_run.path.parent / name / "teacher.toml").unlink()
    assert "dots 20 2.5 25.0 % 0000000000000000…" in words_of(page_of(full_run))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)


def test_a_line_of_one_constant_value_is_drawn():
    drawn = charts.line_chart([Series("flat", [(x, 0.5) for x in range(5)], "red")])
    assert "0.00,50.00 25.00,50.00" in drawn and ">0.5<" in drawn


def test_values_that_a_log_scale_cannot_show_are_left_out():
    points = [(1, 0.0), (2, float("nan")), (3, float("inf")), (4, None), (5, 0.1), (6, 0.2)]
    assert charts.line_chart([Series("a", points[:4], "red")]) == ""
    drawn = re.search(r'points="([^"]+)"', charts.line_chart([Series("a", points, "red")]))
    assert len(drawn[1].split()) == 2


def test_smoothing_keeps_an_exponential_decay_in_place():
    line = Series("decay", [(x, 2.0**-x) for x in range(100)], "red")
    middle = charts.smoothed(line).points[10:-10]
    assert [y for _, y in middle] == pytest.approx([y for _, y in line.points[10:-10]])


def test_end_labels_do_not_overlap():
    lines = [Series(str(i), [(0, 1.0), (1, 0.1 + 1e-4 * i)], "red") for i in range(6)]
    drawn = charts.line_chart(lines, ends=True)
    places = [float(top) for top in re.findall(r'class="end" style="top:([\d.]+)%', drawn)]
    assert np.diff(places).min() >= charts.END_GAP - 0.01 and max(places) <= 100


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2504, "0.25 s"), (48.4, "48 s"), (59.7, "1 min"), (603, "10 min 3 s"), (7500, "2 h 5 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text
