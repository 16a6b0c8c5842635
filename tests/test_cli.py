import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
from typer.testing import CliRunner

from diffopd import __version__, locate
from diffopd.cli import MADE_ANEW, _show_scores, app
from diffopd.disk import writing
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.run_folder import RunFolder


@pytest.fixture
def place(tmp_path, tiny_sd, tiny_teachers):
    """A folder with a good recipe, tiny.toml, and copies of the tiny teachers that a test may spoil."""
    teachers = [shutil.copytree(folder, tmp_path / folder.name) for folder in tiny_teachers]
    tiny.write_recipe(tmp_path / "tiny.toml", tiny_sd, teachers)
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def replace(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def write_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def hold_run(place, *overrides, processes=1):
    """A run of the recipe as it stands, hashes and all."""
    recipe = read_recipe(place / "tiny.toml", list(overrides))
    folder = RunFolder.create(place / "run", recipe, check(recipe, hash_weights=True).hashes, processes)
    folder.append_metrics({"kind": "update", "update": 1})  # else the folder is free again


def hold_run_with_other_prompts(place):
    hold_run(place)
    write_line(place / TRAIN, 1, json.dumps({"prompt": "something else"}))


def hold_run_with_another_cosine(place):
    replace(place / "tiny.toml", "max_train_steps = 2", 'lr_scheduler = "cosine"\nmax_train_steps = 2')
    hold_run(place, "train.max_train_steps=3")


def make_selves(place):
    """Both teachers are the student's average."""
    for name in ("dots", "lines"):
        path = place / name / "teacher.toml"
        lines = [line for line in path.read_text().splitlines() if not line.startswith(("weights", "sha256"))]
        path.write_text("\n".join(lines).replace('form = "lora"', 'form = "ema"') + "\n")


def add(place, *lines):
    """Further settings of the student, from line 8 on."""
    replace(place / "tiny.toml", "rank = 2", "\n".join(["rank = 2", *lines]))


def add_to_training(place, line):
    """One more setting of [train], at line 20."""
    replace(place / "tiny.toml", "learning_rate = 1e-3", f"learning_rate = 1e-3\n{line}")


def replace_base(place, **options):
    other = tiny.save_pipeline(place / "other", **options)
    path = place / "lines" / "teacher.toml"
    base = next(line for line in path.read_text().splitlines() if line.startswith("base"))
    replace(path, base, f'base = "{other}"')


def spoil_the_grid(place):
    leading = 'guidance_scale = 1.0\nscheduler = {timestep_spacing = "leading"}'
    replace(place / "tiny.toml", "guidance_scale = 1.0", leading)
    replace(place / "tiny.toml", "substeps = 1", "substeps = 3")


TRAIN = "dots/prompts/train.jsonl"
BAD_INPUT = {
    "unknown key": (
        lambda p: replace(p / "tiny.toml", "rank", "rnak"),
        "tiny.toml:7",
        'Did you mean "rank"?',
    ),
    "unknown teacher": (lambda p: replace(p / "tiny.toml", '/dots"', '/dotz"'), "tiny.toml:12", '/dots"?'),
    "unknown shipped teacher": (
        lambda p: replace(p / "tiny.toml", f'"{p}/dots"', '"tetx"'),
        "tiny.toml:12",
        'Did you mean "text"?',
    ),
    "TOML syntax": (
        lambda p: replace(p / "tiny.toml", "seed = 3", "seed = = 3"),
        "tiny.toml:2",
        "not valid TOML",
    ),
    "missing prompts": (lambda p: (p / TRAIN).unlink(), TRAIN, "cannot be read"),
    "no prompts": (lambda p: (p / TRAIN).write_text(""), TRAIN, "no prompts"),
    "empty prompt line": (lambda p: write_line(p / TRAIN, 2, ""), f"{TRAIN}:2", "empty line"),
    "bad prompt row": (lambda p: write_line(p / TRAIN, 3, "{"), f"{TRAIN}:3", "not valid JSON"),
    "uncovered task": (
        lambda p: write_line(p / TRAIN, 3, json.dumps({"prompt": "x", "task": "ocr"})),
        f"{TRAIN}:3",
        "covered by no teacher of this recipe (covered: dots, lines)",
    ),
    "non-finite setting": (lambda p: replace(p / "tiny.toml", "1e-3", "nan"), "tiny.toml:19", "finite"),
    "negative setting": (
        lambda p: replace(p / "tiny.toml", "1e-3", "-1e-3"),
        "tiny.toml:19",
        "greater than 0",
    ),
    "another architecture": (lambda p: replace_base(p, cross=32), "tiny.toml:14", "cross_attention_dim"),
    "another latent space": (lambda p: replace_base(p, in_channels=8), "tiny.toml:14", "in_channels"),
    "another noise schedule": (
        lambda p: replace_base(p, prediction_type="epsilon"),
        "tiny.toml:14",
        "prediction_type is 'epsilon'",
    ),
    "grids that do not nest": (spoil_the_grid, "tiny.toml:18", "does not contain the student's timestep"),
    "missing weights": (
        lambda p: (p / "dots/pytorch_lora_weights.safetensors").unlink(),
        "dots/teacher.toml:4",
        "no .safetensors",
    ),
    "pickled weights": (
        lambda p: replace(p / "dots/teacher.toml", "weights.safetensors", "weights.bin"),
        "dots/teacher.toml:4",
        "never loaded",
    ),
    "changed weights": (
        lambda p: replace(p / "dots/teacher.toml", 'sha256 = "', 'sha256 = "' + "0" * 64 + '"\n# "'),
        "dots/teacher.toml:5",
        "the card says 000000000000",
    ),
    "missing reward": (lambda p: (p / "dots/reward.py").unlink(), "dots/reward.py", "there is no file"),
    "a reward that fails": (
        lambda p: replace(p / "dots/reward.py", "return [", "return metadata[0]['word'] + ["),
        "dots/teacher.toml:8",
        "KeyError: 'word' ({place}/dots/reward.py:6).",
    ),
    "another run in the folder": (lambda p: hold_run(p, "seed=9"), "/run", "seed was 9, is 3"),
    "a run of more processes": (lambda p: hold_run(p, processes=2), "/run", "resume it with --processes 2"),
    "a run of other prompts": (hold_run_with_other_prompts, "/run", "dots: train prompts is not what this run began"),
    "a run of another cosine": (hold_run_with_another_cosine, "/run", "max_train_steps was 3, is 2 (its cosine"),
    "two averages of the student": (make_selves, "tiny.toml:14", "at most one teacher"),
    "targets that match nothing": (
        lambda p: add(p, 'target_modules = ["nothing"]'),
        "tiny.toml:8",
        "gives no LoRA on the base's UNet2DConditionModel",
    ),
    "non-finite argument": (lambda p: add(p, "call = {eta = nan}"), "tiny.toml:8", "not a finite number"),
    "non-finite scheduler": (lambda p: add(p, "scheduler.beta_start = nan"), "tiny.toml:8", "not a finite number"),
    "negative eta": (lambda p: add(p, "call.eta = -1.0"), "tiny.toml:8", "from 0 (none) to 1"),
    "a solver without its steps": (
        lambda p: add(p, 'scheduler = {class = "HeunDiscreteScheduler"}', 'solver = "dpmpp_2m"'),
        "tiny.toml:9",
        "HeunDiscreteScheduler makes 3 for 2 steps",
    ),
    "a tracker that is missing": (
        lambda p: add_to_training(p, 'report_to = ["wandb"]'),
        "tiny.toml:20",
        "Install diffopd[wandb]",
    ),
    "an attention that is missing": (
        lambda p: add_to_training(p, 'attention_backend = "xformers"'),
        "tiny.toml:20",
        "Install diffopd[xformers]",
    ),
    "a last step without effect": (
        lambda p: replace(p / "tiny.toml", 'name = "mean"', 'name = "mean"\nfinal_step = "skip"'),
        "tiny.toml:17",
        "has no effect on objective 'mean'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_code_2_names_the_place_and_writes_nothing(place, monkeypatch, case):
    monkeypatch.setattr(locate, "teacher_names", lambda: ["composition", "style", "text"])
    monkeypatch.setattr("diffopd.assemble.load_pipeline", None)  # whoever loads weights would fail otherwise
    for name in ("wandb", "xformers"):
        monkeypatch.setitem(sys.modules, name, None)
    spoil, where, reason = BAD_INPUT[case]
    spoil(place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    result = command("distill", place / "tiny.toml")
    assert result.exit_code == 2, result.output
    assert where in result.stderr and reason.replace("{place}", str(place)) in result.stderr
    assert "Traceback" not in result.output
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert after == before


@pytest.mark.parametrize("name", ["recipe.read_recipe", "preflight.check", "distill.assemble"])
def test_ctrl_c_before_the_first_update_is_told_in_one_line_with_what_was_written(place, monkeypatch, name):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    monkeypatch.setattr(f"diffopd.{name}", lambda *args, **options: signal.raise_signal(signal.SIGINT))
    result = command("distill", place / "tiny.toml")
    signal.signal(signal.SIGINT, before)
    begun = name == "distill.assemble"
    stands = f"{place}/run has no checkpoint yet; the same command begins anew." if begun else "Nothing was written."
    assert result.exit_code == 130 and result.output == f"\nInterrupted. {stands}\n"
    assert (place / "run").exists() == begun


def test_ctrl_c_in_an_evaluation_leaves_the_training_as_it_was(place, monkeypatch):
    folder = RunFolder.create(place / "run", read_recipe(str(place / "tiny.toml")), {})
    (folder.path / "checkpoint-1").mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("diffopd.preflight.check_unchanged", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = command("evaluate", folder.path)
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.output == f"\nInterrupted. {MADE_ANEW}\n"


def test_a_reward_is_tried_before_a_run_begins_and_not_where_it_goes_on(place, monkeypatch):
    tried = []
    monkeypatch.setattr("diffopd.preflight.try_rewards", tried.append)
    monkeypatch.setattr("diffopd.distill.distill", lambda recipe, run, begin: (run.path / "checkpoint-1").mkdir())
    for _ in range(2):
        command("distill", place / "tiny.toml")
    assert len(tried) == 1


def test_a_ctrl_c_that_falls_into_a_callback_is_not_lost(place, monkeypatch):
    class Callback:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("diffopd.preflight.check", lambda *_, **__: [Callback() and None, time.sleep(20)])
    result = command("distill", place / "tiny.toml")
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130 and result.output == "\nInterrupted. Nothing was written.\n"


def test_a_full_disk_anywhere_in_a_run_is_told_with_what_of_it_stands(place, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffopd.distill.assemble", fill)
    result = command("distill", place / "tiny.toml")
    run = place / "run"
    assert result.exit_code == 2 and result.stderr == (
        f"Error: {run}: the disk takes no more (No space left on device). Make room on it. "
        f"{run} has no checkpoint yet; the same command begins anew.\n"
    )


def test_a_file_that_the_disk_does_not_take_is_told_with_what_of_the_run_stands(place, monkeypatch):
    def fill(*_):
        with writing(place / "run" / "scores.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffopd.distill.assemble", fill)
    result, run = command("distill", place / "tiny.toml"), place / "run"
    assert result.exit_code == 2 and result.stderr == (
        f"Error: {run}/scores.json could not be written (No space left on device). Make room on that disk. "
        f"{run} has no checkpoint yet; the same command begins anew.\n"
    )


@pytest.mark.parametrize("name", ["evaluate", "export", "report"])
def test_a_folder_that_holds_no_run_is_refused(tmp_path, name):
    result = command(name, tmp_path / "nothing")
    assert result.exit_code == 2 and "is not a run folder" in result.stderr


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_run_without_checkpoint_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name):
    (tmp_path / "r.toml").write_text(
        'name = "r"\n[student]\npretrained_model_name_or_path = "emoji"\n[[teachers]]\nname = "text"\n'
        "[train]\nmax_train_steps = 4\n"
    )
    RunFolder.create(tmp_path / "run", read_recipe(tmp_path / "r.toml"), {})
    monkeypatch.setattr("diffopd.cli._quiet_libraries", None)  # the first to import any
    result = command(name, tmp_path / "run")
    assert result.exit_code == 2 and f"{tmp_path}/run: has no checkpoint yet. Train it first" in result.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(place):
    result = command("distill", place / "tiny.toml", "--dry-run", "--set", "objective.substeps=5", "--processes", 4000)
    assert result.exit_code == 0, result.output
    assert "they slow each other down" in result.output
    assert "5 substeps" in result.output and "999 499" in result.output and not (place / "run").exists()


def test_a_dry_run_refuses_an_output_folder_that_the_run_would_refuse(place):
    def refused(*options):
        result = command("distill", place / "tiny.toml", "--dry-run", *options)
        assert result.exit_code == 2 and "Plan of tiny" in result.output, result.output
        return result.stderr

    assert "tiny.toml is a file" in refused("--output-dir", place / "tiny.toml")
    assert "is not empty and holds no run" in refused("--output-dir", place / "dots")
    hold_run(place, "seed=9")
    assert "holds another run: seed was 9, is 3" in refused()
    assert command("distill", place / "tiny.toml", "--dry-run", "--set", "seed=9").exit_code == 0


def test_the_output_folder_of_the_command_line_wins(place):
    result = command("distill", place / "tiny.toml", "--dry-run", "--output-dir", place / "elsewhere run")
    assert result.exit_code == 0, result.output
    assert "elsewhere run" in result.output.replace("\n", "")


def test_teachers_and_recipes_of_the_shelf_are_listed(monkeypatch, tmp_path, tiny_teacher):
    shutil.copytree(tiny_teacher, tmp_path / "teachers" / "dots")
    (tmp_path / "teachers" / "both.toml").write_text("")
    (tmp_path / "diffopd").mkdir()
    monkeypatch.setattr(locate, "PACKAGE", tmp_path / "diffopd")
    result = command("teachers")
    assert result.exit_code == 0, result.output
    assert (
        "dots" in result.output
        and "4 prompts to train, 2 to test" in result.output
        and "recipes: both" in result.output
    )


def test_the_version_is_printed():
    assert command("--version").output.strip() == __version__


def test_help_needs_no_heavy_imports():
    """They are what makes it slow (`scripts/bench_help.py` measures it)."""
    code = "import sys; from diffopd.cli import _show_scores, app; app(['--help'], standalone_mode=False); " + (
        "sys.exit(len({'torch', 'diffusers', 'peft', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, check=False)
    assert done.returncode == 0 and b"distill" in done.stdout


def change_weights(path):
    """Other bytes behind the header of a .safetensors file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name, changed", [("evaluate", "base"), ("export", "base"), ("evaluate", "teacher")])
def test_a_run_is_neither_scored_nor_exported_on_weights_that_it_did_not_begin_with(
    tmp_path, tiny_sd, tiny_teachers, name, changed
):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    teachers = [shutil.copytree(folder, tmp_path / folder.name) for folder in tiny_teachers]
    for teacher in teachers:
        card = (teacher / "teacher.toml").read_text().splitlines()
        kept = [line for line in card if not line.startswith(("base", "sha256"))]
        (teacher / "teacher.toml").write_text("\n".join([f'base = "{base}"', *kept]) + "\n")
    tiny.write_recipe(tmp_path / "tiny.toml", base, teachers)
    hold_run(tmp_path)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    file = base / "unet/diffusion_pytorch_model.safetensors" if changed == "base" else next(teachers[0].glob("*.safe*"))
    change_weights(file)
    done = command(name, tmp_path / "run")
    assert done.exit_code == 2
    said = "base/unet/diffusion_pytorch_model.safetensors" if changed == "base" else f"{teachers[0].name}/{file.name}"
    assert f"{said} is not what this run began with (sha256 was " in " ".join(done.stderr.split())
    assert "Restore the file." in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_file_that_cannot_be_read_is_named_without_a_traceback(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path / "recipe.json"))

    monkeypatch.setattr(RunFolder, "open", refuse)
    done = command("report", tmp_path)
    assert done.exit_code == 2 and done.stderr == f"Error: {tmp_path}/recipe.json: Permission denied.\n"


def test_scores_are_shown_whole_in_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    common = {"num_inference_steps": 20, "guidance_scale": 2.5, "task": "composition", "interval": [0.75, 0.875]}
    rows = [
        {"model": "teacher:composition", "score": 0.8125, **common},
        {"model": "student", "score": 0.5, "ratio": {"value": 0.625}, **common},
    ]
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"rows": rows}))
    _show_scores(file)
    shown = capsys.readouterr().out
    assert "teacher:composition  20     2.5       composition  0.812  0.75-0.88" in shown and "0.62" in shown
    _show_scores(file, "student")
    shown = capsys.readouterr().out
    assert "student" in shown and "teacher" not in shown.replace("of teacher", "")
