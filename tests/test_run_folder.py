import json

import pytest
from limits import largest_file

from diffopd.errors import UserError
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder, atomic_write

TEXT = 'name = "r"\n[student]\npretrained_model_name_or_path = "emoji"\n[[teachers]]\nname = "text"\n'
HASHES = {"text/lora.safetensors": "a" * 64}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(TEXT + "[train]\nmax_train_steps = 4\n")
    return path


def begun(*arguments, **options):
    """The folder of a run that has trained something."""
    folder = RunFolder.create(*arguments, **options)
    folder.append_metrics({"kind": "update", "update": 1})
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_folder_stores_what_was_asked(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    folder = RunFolder.create(tmp_path / "run", recipe, HASHES)
    assert (folder.path / "recipe.toml").read_text() == recipe_file.read_text()
    assert folder.hashes() == HASHES and "torch" in folder.versions()
    assert folder.recipe().resolved() == recipe.resolved() and folder.recipe().path == recipe_file


def test_the_same_recipe_takes_the_run_up_again(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    RunFolder.create(tmp_path / "run", recipe, HASHES)
    RunFolder.create(tmp_path / "run", recipe, HASHES)
    longer = read_recipe(recipe_file, ["train.max_train_steps=9", "evaluate.num_prompts=3"])
    assert RunFolder.create(tmp_path / "run", longer, HASHES).recipe().train.max_train_steps == 9


@pytest.mark.parametrize(
    ("option", "named"),
    [("train.learning_rate=0.5", "train.learning_rate was 0.0003, is 0.5"), ("seed=7", "seed was 0, is 7")],
)
def test_another_recipe_is_refused_and_nothing_is_written(recipe_file, tmp_path, option, named):
    folder = begun(tmp_path / "run", read_recipe(recipe_file), HASHES)
    before = contents(folder.path)
    with pytest.raises(UserError, match="holds another run") as caught:
        RunFolder.create(tmp_path / "run", read_recipe(recipe_file, [option]), HASHES)
    assert named in str(caught.value) and contents(folder.path) == before


@pytest.mark.parametrize("key", ["max_train_steps", "max_train_seconds"])
def test_an_end_may_move_unless_a_cosine_falls_towards_it(recipe_file, tmp_path, key):
    for schedule in ("constant", "cosine"):
        first = [f"train.lr_scheduler={schedule}", "train.max_train_seconds=5"]
        folder = begun(tmp_path / schedule, read_recipe(recipe_file, first), HASHES)
        before, later = contents(folder.path), read_recipe(recipe_file, [*first, f"train.{key}=9"])
        if schedule == "constant":
            RunFolder.create(folder.path, later, HASHES)
            continue
        with pytest.raises(UserError, match=rf"train.{key} was \S+, is 9.* \(its cosine falls towards it\)"):
            RunFolder.create(folder.path, later, HASHES)
        assert contents(folder.path) == before


def test_another_number_of_processes_is_refused_and_nothing_is_written(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    folder = begun(tmp_path / "run", recipe, HASHES, processes=2)
    before = contents(folder.path)
    with pytest.raises(UserError, match="holds a run of 2 processes, and 1 would.*resume it with --processes 2"):
        RunFolder.create(folder.path, recipe, HASHES)
    assert contents(folder.path) == before
    RunFolder.create(folder.path, recipe, HASHES, processes=2)


def test_a_folder_in_which_nothing_was_trained_is_taken_by_what_is_asked_next(recipe_file, tmp_path):
    """A LoRA that does not fit is refused when weights are loaded; mended, it may have the same folder."""
    recipe = read_recipe(recipe_file)
    RunFolder.create(tmp_path / "run", recipe, HASHES)
    mended = {"text/lora.safetensors": "b" * 64}
    folder = RunFolder.create(tmp_path / "run", recipe, mended)
    assert json.loads((folder.path / "recipe.json").read_text())["hashes"] == mended


def test_a_start_that_failed_in_its_first_update_leaves_nothing_in_the_way(recipe_file, tmp_path):
    """Its weights were not numbers, or its reward failed: mended, it may have the same folder."""
    folder = RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)
    for kind in ("begin", "held_out"):
        folder.append_metrics({"kind": kind, "update": 0})
    for name in ("looks", "tensorboard"):
        (folder.path / name).mkdir()
    RunFolder.create(folder.path, read_recipe(recipe_file, ["seed=7"]), {})
    assert folder.metrics() == [] and folder.recipe().seed == 7
    folder.append_metrics({"kind": "update", "update": 1})
    with pytest.raises(UserError, match="seed was 7, is 0"):
        RunFolder.create(folder.path, read_recipe(recipe_file), {})


def test_checking_a_folder_writes_nothing(recipe_file, tmp_path):
    folder = RunFolder.check(tmp_path / "run", read_recipe(recipe_file), HASHES)
    assert not folder.path.exists()


def test_a_changed_teacher_is_refused_on_resume(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    folder = begun(tmp_path / "run", recipe, HASHES)
    before = contents(folder.path)
    with pytest.raises(UserError, match="text/lora.safetensors is not what this run began with"):
        RunFolder.create(tmp_path / "run", recipe, {"text/lora.safetensors": "b" * 64})
    assert contents(folder.path) == before


def test_a_folder_with_other_files_is_refused(recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(recipe_file, tmp_path):
    (tmp_path / "run").write_text("mine")
    for path, reason in ((tmp_path / "run", "is a file"), (tmp_path / "run" / "inner", "cannot be written")):
        with pytest.raises(UserError, match=f"output_dir .*{reason}.*--output-dir"):
            RunFolder.create(path, read_recipe(recipe_file), HASHES)


def test_a_folder_that_may_not_be_written_is_named(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def forbidden(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("diffopd.run_folder.atomic_write", forbidden)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)


def test_starting_over_in_a_folder_with_checkpoints_is_refused(recipe_file, tmp_path):
    folder = RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)
    (folder.path / "checkpoint-2").mkdir()
    with pytest.raises(UserError, match="would start over"):
        RunFolder.create(folder.path, read_recipe(recipe_file, ["train.resume_from_checkpoint=none"]), HASHES)


def test_the_latest_checkpoint_is_the_finished_one_with_the_highest_number(recipe_file, tmp_path):
    folder = RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)
    assert folder.latest_checkpoint() is None
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.partial", "checkpoint-x"):
        (folder.path / name).mkdir()
    assert folder.latest_checkpoint().name == "checkpoint-10"


def test_resuming_drops_rows_that_will_be_written_again_and_half_written_ones(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    folder = RunFolder.create(tmp_path / "run", recipe, HASHES)
    for update in (1, 2, 3):
        folder.append_metrics({"kind": "update", "update": update})
    folder.append_metrics({"kind": "stop", "update": 2, "reason": "x"})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "upd')
    (folder.path / "checkpoint-2").mkdir()
    assert len(folder.metrics()) == 4
    RunFolder.create(tmp_path / "run", recipe, HASHES)
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2] and rows == folder.metrics()


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(recipe_file, tmp_path, name):
    folder = RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)
    folder.append_metrics({"kind": "update", "update": 1})
    (folder.path / name).write_text('{"kind": \n{"kind": "update"}\n')
    with pytest.raises(UserError, match=rf"{name}(:1)?: is not valid JSON .*(Restore the file|Remove that line)"):
        folder.recipe(), folder.metrics()


def test_opening_something_else_names_the_runs_beside_it(recipe_file, tmp_path):
    RunFolder.create(tmp_path / "run", read_recipe(recipe_file), HASHES)
    with pytest.raises(UserError, match=f"Runs beside it: {tmp_path / 'run'}"):
        RunFolder.open(tmp_path / "ran")


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["report.html", "metrics.jsonl"])
def test_a_file_that_the_disk_does_not_take_is_named_and_the_old_one_stays(recipe_file, tmp_path, name):
    folder = begun(tmp_path / "run", read_recipe(recipe_file), HASHES)
    folder.write("report.html", "old")
    (folder.path / "checkpoint-1").mkdir()
    before = contents(folder.path)
    with largest_file(100), pytest.raises(UserError) as caught:
        folder.write(name, "x" * 200) if name == "report.html" else folder.append_metrics({"kind": "x" * 200})
    after = contents(folder.path)
    assert str(caught.value).startswith(
        f"{folder.path / name} could not be written (File too large). Make room on that"
    )
    assert set(after) == set(before) and after[folder.path / "report.html"] == b"old"
    assert folder.metrics() == [{"kind": "update", "update": 1}]
