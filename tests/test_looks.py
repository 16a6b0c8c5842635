"""Looks while a model is tuned: what they tell apart, how often there is one, and what they stop."""

import json
import random
import shutil

import pytest
import torch
from PIL import Image
from run_helpers import rows_of
from tuning import asked

from diffopd import cli, closeness, evaluate, export, report
from diffopd import distill as loop
from diffopd.drawing import grid, sharpness
from diffopd.errors import UserError
from diffopd.looks import Looks, _spaced, compare, is_collapsed
from diffopd.run_folder import RunFolder
from diffopd.teacher import load_reward
from diffopd.tune import prepare, task_written
from diffopd.tune_facts import facts
from diffopd.tune_recipe import LookSettings


def test_what_is_watched_is_said(tiny_sd, pictures, tmp_path):
    assert "watched" not in dict(facts(prepare(asked(tiny_sd, pictures))))
    told = dict(facts(prepare(asked(tiny_sd, pictures, "look.every=5"))))
    assert "own captions, which shows fitting only" in told["watched"]
    (tmp_path / "new.txt").write_text("a dot at night\n")
    held_out = f"images.held_out={json.dumps(str(tmp_path / 'new.txt'))}"
    told = dict(facts(prepare(asked(tiny_sd, pictures, "look.every=5", held_out))))
    assert told["watched"].startswith("every 5 updates and at the end, 8 drawings of prompts in")
    with pytest.raises(UserError, match=r"none\.jsonl"):
        prepare(asked(tiny_sd, pictures, f"look.unrelated={json.dumps(str(tmp_path / 'none.jsonl'))}"))


def noise_picture(seed):
    return Image.frombytes("RGB", (16, 16), random.Random(seed).randbytes(768))


def test_looks_tell_nearness_drift_mush_and_collapse_apart():
    others = [noise_picture(i) for i in range(4)]
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    before = {"subject": [blue, blue], "unrelated": others}
    same = compare(before, before, [red])
    assert same["drift"] == 0 and same["distance"] == same["distance_before"] > 0.5
    assert same["sharpness"] == same["diversity"] == 1 and not is_collapsed(same)
    learnt = compare(before, {"subject": [red, red], "unrelated": others}, [red])
    assert learnt["distance"] == 0 < learnt["distance_before"] and learnt["drift"] == 0
    stripes = Image.new("RGB", (16, 16), "black")
    for x in range(0, 16, 2):
        stripes.paste("white", (x, 0, x + 1, 16))
    assert is_collapsed(compare(before, {"subject": [red, red], "unrelated": [stripes] * 4}, [red]))
    mush = [Image.new("RGB", (16, 16), (50 * i, 0, 255 - 50 * i)) for i in range(4)]
    blurred = compare(before, {"subject": [red, red], "unrelated": mush}, [red])
    assert blurred["sharpness"] == 0 and is_collapsed(blurred) and blurred["drift"] > 0.2
    assert sharpness(stripes) > sharpness(red) == 0


def test_a_collapse_on_the_subject_alone_is_seen():
    """Drawings of the subject may go to what the pictures are, but neither beyond nor all to one."""
    others = [noise_picture(i) for i in range(4)]
    smooth = [Image.radial_gradient("L").resize((16, 16)).convert("RGB")] * 2
    shown = [Image.merge("RGB", (side,) * 3) for side in map(Image.Image.getchannel, others[:2], "RG")]
    before = {"subject": others[:2], "unrelated": others}
    assert not is_collapsed(compare(before, {"subject": shown, "unrelated": others}, shown))
    assert is_collapsed(compare(before, {"subject": smooth, "unrelated": others}, shown))
    assert not is_collapsed(compare(before, {"subject": smooth, "unrelated": others}, smooth))
    one = {"subject": others[:1], "unrelated": others[:1]}
    assert not is_collapsed(compare(one, one, shown))  # one drawing has no diversity to lose


def test_pictures_are_compared_as_they_are_trained(tmp_path):
    """Turned, laid over white and cut to the drawing's shape, in looks and in the task's reward alike."""
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (14, 0, 26, 10))
    wide.rotate(90, expand=True).save(tmp_path / "wide.png", exif=turned)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "prompts").mkdir()
    rows = [{"prompt": "a", "file_name": str(tmp_path / name)} for name in ("wide.png", "clear.png")]
    (tmp_path / "prompts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copy(closeness.__file__, tmp_path / "closeness.py")
    reward = load_reward("closeness.py:closeness", tmp_path)
    found = reward([Image.new("RGB", (20, 20), color) for color in ("blue", "white", "red")], [""] * 3, [{}] * 3)
    assert min(found[:2]) > 0.99 and found[2] < 0.5


def test_a_run_is_looked_at_stops_when_it_forgets_and_goes_on_where_it_was(run_with_teacher, tmp_path):
    run, folder = run_with_teacher
    settings = LookSettings(every=1, num_prompts=2, max_drift=0.02)
    looks = Looks(settings, folder, [tmp_path / "dots" / "0.png"])
    looks.begin(run, is_new=True)
    first = looks.look(run, 0)
    assert first["drift"] < 0.005 and looks.reason is None  # pictures on the disk have 8 bits
    with torch.no_grad():
        for name, parameter in run.student.parameters.items():
            parameter.add_(2.0 if "lora_B" in name else 0.0)
    again = Looks(settings, folder, looks.pictures)
    again.begin(run, is_new=False)
    moved = again.look(run, 1)
    assert moved["drift"] > 0.02 and ("max_drift = 0.02" in again.reason or "collapse" in again.reason)
    assert Image.open(folder.path / "looks" / "000001.png").size == (64, 14 + 4 * 32)
    shutil.rmtree(folder.path / "looks")
    with pytest.raises(UserError, match="first drawings are gone"):
        Looks(settings, folder, looks.pictures).begin(run, is_new=False)


def looked_at(tiny_sd, pictures, monkeypatch, max_drift):
    """A run of three updates with a look at every second one: its folder, and what trains it (again: resumes)."""
    monkeypatch.setattr(loop, "save_trajectory", lambda run, folder: None)
    tuning = prepare(asked(tiny_sd, pictures, "train.max_train_steps=3"))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})

    def begin(run, is_new):
        run.looks = Looks(LookSettings(every=2, num_prompts=2, max_drift=max_drift), folder, [pictures / "0.png"])
        run.looks.begin(run, is_new=is_new)

    return folder, lambda: loop.distill(tuning.recipe, folder, begin)


def test_the_loop_stops_for_the_reason_of_a_look(tiny_sd, pictures, monkeypatch):
    folder, train = looked_at(tiny_sd, pictures, monkeypatch, 1e-9)
    train()
    (row,) = rows_of(folder, "look")
    assert row["update"] == 2 and 0 < row["drift"] < 1 and row["subject_sharpness"] > 0
    assert "look.max_drift" in rows_of(folder, "stop")[0]["reason"]
    assert folder.latest_checkpoint().name == "checkpoint-2"
    train()
    assert rows_of(folder, "update")[-1]["update"] == 2, "what was stopped for a reason is not gone on with"


def test_looks_take_prompts_from_all_over_a_file():
    ordered = [f"{kind} {number}" for kind in ("sign", "thing", "pair") for number in range(4)]
    assert _spaced(ordered, 3) == ["sign 0", "thing 0", "pair 0"] and _spaced(ordered, 99) == ordered


def test_a_collapsed_student_is_shown_and_not_exported(tmp_path, monkeypatch):
    called = []
    for module, name in ((evaluate, "evaluate_run"), (export, "export_run"), (report, "write_report")):
        monkeypatch.setattr(module, name, lambda run, name=name, **told: called.append(name))
    monkeypatch.setattr(cli, "_show_scores", lambda *told: None)
    monkeypatch.setattr(RunFolder, "finish", lambda self: called.append("finish"))
    (tmp_path / "recipe.json").write_text("{}")
    for reason in ("reached max_train_steps = 9", "forgetting: drift 2 is above look.max_drift = 1"):
        RunFolder(tmp_path).append_metrics({"kind": "stop", "reason": reason})
        cli._finish(tmp_path)
    assert called == ["evaluate_run", "export_run", "write_report", "finish"] * 2
    RunFolder(tmp_path).append_metrics({"kind": "stop", "reason": "collapse: diversity 0.10. Lower learning_rate"})
    with pytest.raises(UserError, match="Not exported: collapse: diversity"):
        cli._finish(tmp_path)
    assert called[8:] == ["evaluate_run", "write_report"]


def test_the_last_update_is_looked_at_whatever_the_interval(tiny_sd, pictures, monkeypatch):
    folder, train = looked_at(tiny_sd, pictures, monkeypatch, 1.0)
    train()
    assert [row["update"] for row in rows_of(folder, "look")] == [2, 3]
    assert rows_of(folder, "stop")[0]["reason"] == "reached max_train_steps = 3"


def test_cells_of_a_grid_are_where_they_belong():
    page = grid([(Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))] * 2, ["a", "b"])
    assert page.size == (16, 14 + 16)
    assert page.getpixel((4, 20)) == (255, 0, 0) and page.getpixel((12, 28)) == (0, 0, 255)
