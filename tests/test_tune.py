"""Tune: pictures become a task, the run is a recipe of the one loop, and what is looked at says what happened."""

import json
import random
import shutil
from types import SimpleNamespace

import contexts
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import command as run_cli
from test_distill import assert_same_state, rows_of, state_of

from diffopd import closeness
from diffopd import distill as loop
from diffopd.data import PromptRow
from diffopd.drawing import grid, sharpness
from diffopd.errors import UserError
from diffopd.lock import at_work
from diffopd.looks import Looks, compare, cut_captions, is_collapsed
from diffopd.preflight import check
from diffopd.run_folder import LOCK, RunFolder
from diffopd.teacher import load_reward
from diffopd.teacher_check import Verdict, check_teacher, not_step_distilled
from diffopd.tune import prepare, task_written, write_task
from diffopd.tune_facts import facts
from diffopd.tune_recipe import LookSettings, read_tune_recipe

SMALL = [
    "student.num_inference_steps=2",
    "student.rank=2",
    "student.lora_alpha=4",
    "train.max_train_steps=2",
    "train.batch_size=2",
    "train.checkpointing_steps=1",
    "train.learning_rate=1e-2",
    "images.resolution=32",
    "look.every=0",
]
SIZES = ((16, 16), (24, 12), (16, 16))


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them wide, with both captions."""
    folder = tmp_path / "dots"
    rows = contexts.draw_rows(folder, SIZES)
    lines = [
        {"file_name": f"{number}.png", "text": row.prompt, "enhanced_text": f"{row.prompt}, enlarged"}
        for number, row in enumerate(rows)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ip_options(tmp_path_factory):
    file, encoder = contexts.save_ip_adapter(tmp_path_factory.mktemp("ip"), tiny.build_pipeline().unet)
    return [f"context.ip_adapter={json.dumps(str(file))}", f"context.image_encoder={json.dumps(str(encoder))}"]


def asked(tiny_sd, pictures, *overrides, output=None):
    output = output or pictures.parent / "run"
    options = [*SMALL, f"output_dir={json.dumps(str(output))}", *overrides]
    return read_tune_recipe(None, str(tiny_sd), str(pictures), options)


def prepared(recipe):
    student, teachers = loop.assemble(recipe, "cpu")
    run = loop.Run(recipe, student, teachers, loop._survey(student, teachers), loop.Processes(), "cpu")
    return run, loop.new_trained(run)


def trained(tuning):
    with task_written(tuning):
        parts = check(tuning.recipe, hash_weights=True)
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, parts.hashes)
    loop.distill(tuning.recipe, folder)
    return folder


def test_a_model_and_a_folder_are_enough_and_the_rest_is_the_papers(tiny_sd, pictures):
    recipe = read_tune_recipe(None, str(tiny_sd), str(pictures), [])
    assert recipe.name == "dots" and recipe.output_dir == "runs/dots"
    assert (recipe.student.rank, recipe.student.lora_alpha, recipe.objective.name) == (64, 128, "denoised")
    assert (recipe.train.batch_size, recipe.train.learning_rate) == (4, 1e-4)
    assert recipe.ema_decay == pytest.approx(0.9999, abs=2e-6)
    text = pictures.parent / "again.toml"
    text.write_text(recipe.source.text)
    assert read_tune_recipe(str(text), None, None).model_dump() == recipe.model_dump()


def test_a_recipe_file_takes_options_and_names_its_mistakes(tiny_sd, pictures, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(
        f'name = "mine"\n[student]\npretrained_model_name_or_path = "{tiny_sd}"\n[images]\nfolder = "dots"\n'
        "[look]\nevry = 3\n"
    )
    with pytest.raises(UserError, match=r'my\.toml:7: unknown key look\.evry.*"every"'):
        read_tune_recipe(str(file), None, None)
    file.write_text(file.read_text().replace("evry", "every"))
    recipe = read_tune_recipe(str(file), None, None, ['images.instance_prompt="a 😀"'])
    assert recipe.images.folder == str(pictures) and recipe.look.every == 3
    assert recipe.images.instance_prompt == "a 😀"
    with pytest.raises(UserError, match=r"z-image-turbo.toml: which pictures\? Give --images FOLDER"):
        read_tune_recipe("z-image-turbo", None, None)
    with pytest.raises(UserError, match="^command line: nowhere/model: no local folder"):
        prepare(read_tune_recipe(None, "nowhere/model", str(pictures)))
    with pytest.raises(UserError, match="name is missing"):
        file.write_text("[look]\n")
        read_tune_recipe(str(file), "a", "b")


@pytest.mark.parametrize("updates", [10, 100, 5000])
def test_the_average_ends_up_18_percent_of_the_way_whatever_the_length(tiny_sd, pictures, updates):
    recipe = asked(tiny_sd, pictures, f"train.max_train_steps={updates}")
    assert 1 - recipe.ema_decay**updates == pytest.approx(0.18, abs=1e-4)
    assert asked(tiny_sd, pictures, "teacher.ema_decay=0.5").ema_decay == 0.5
    assert asked(tiny_sd, pictures, 'teacher.weights="live"').ema_decay == 0.0
    with pytest.raises(UserError, match="number of updates"):
        _ = asked(tiny_sd, pictures, "train.max_train_steps=0", "train.max_train_seconds=5.0").ema_decay


def test_the_context_falls_to_the_second_caption_or_is_explained(tiny_sd, pictures, ip_options):
    assert prepare(asked(tiny_sd, pictures)).context.kind == "enhanced_prompt"
    assert prepare(asked(tiny_sd, pictures, *ip_options)).context.kind == "ip_adapter"
    gone = json.dumps(str(pictures / "ip.safetensors"))
    with pytest.raises(UserError, match=r"--set context.ip_adapter=.*there is no file or folder .*ip\.safetensors"):
        prepare(asked(tiny_sd, pictures, *ip_options, f"context.ip_adapter={gone}"))
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in line.items() if k != "enhanced_text"} for line in lines]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, plain)))
    with pytest.raises(UserError, match="(?s)needs ip_adapter.*Or do without a picture"):
        prepare(asked(tiny_sd, pictures))
    with pytest.raises(UserError, match="not every picture has one"):
        prepare(asked(tiny_sd, pictures, "context.kind=enhanced_prompt"))


def test_a_model_that_comes_with_an_ip_adapter_needs_no_more_words(tiny_sd, pictures, tmp_path):
    model = shutil.copytree(tiny_sd, tmp_path / "seeing")
    file, encoder = contexts.save_ip_adapter(model, tiny.build_pipeline().unet)
    file.rename(model / "ip-adapter.safetensors")
    encoder.rename(model / "image_encoder")
    context = prepare(asked(model, pictures)).context
    assert context.kind == "ip_adapter"
    assert context.ip_adapter == str(model / "ip-adapter.safetensors")
    assert context.image_encoder == str(model / "image_encoder")
    assert prepare(asked(model, pictures, "context.kind=enhanced_prompt")).context.kind == "enhanced_prompt"
    (model / "ip-adapter-face.safetensors").touch()
    assert prepare(asked(model, pictures)).context.kind == "enhanced_prompt"


def test_a_task_is_a_teacher_folder_that_names_pictures_and_buckets(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures))
    assert write_task(tuning) and not write_task(tuning)
    parts = check(tuning.recipe)
    (card,) = parts.cards
    rows = parts.train_rows["itself"]
    assert card.form == "ema" and [row.bucket for row in rows] == [(32, 32), (40, 24), (32, 32)]
    assert rows[0].metadata["file_name"] == str((pictures / "0.png").resolve())
    assert [row.prompt for row in parts.test_rows["itself"]] == [row.prompt for row in rows]
    told = dict(facts(tuning))["teacher"]
    assert told.endswith("decay 0.90553851 an update: 18% of the way to it after 2 updates")
    assert dict(facts(tuning))["sizes"].startswith("32 x 32: 2, 40 x 24: 1")


def test_what_is_watched_is_said(tiny_sd, pictures, tmp_path):
    assert "watched" not in dict(facts(prepare(asked(tiny_sd, pictures))))
    told = dict(facts(prepare(asked(tiny_sd, pictures, "look.every=5"))))
    assert "own captions, which shows fitting only" in told["watched"]
    (tmp_path / "new.txt").write_text("a dot at night\n")
    held_out = f"images.held_out={json.dumps(str(tmp_path / 'new.txt'))}"
    told = dict(facts(prepare(asked(tiny_sd, pictures, "look.every=5", held_out))))
    assert told["watched"].startswith("every 5 updates and at the end, 8 drawings of prompts in")


def test_a_model_is_not_guided_unless_it_is_asked_for(pictures):
    """Z-Image guides from above 0, others from above 1."""

    def prepared(*asked_for):
        options = ["context.kind=enhanced_prompt", *asked_for]
        told = read_tune_recipe(None, "Tongyi-MAI/Z-Image-Turbo", str(pictures), options)
        return prepare(told, pictures.parent / "task", shipped=True).recipe

    assert prepared().student.guidance_scale == prepared().teachers[0].guidance_scale == 0.0
    assert prepared("student.guidance_scale=1.0").student.guidance_scale == 1.0


def test_a_call_that_the_pipeline_refuses_is_named(tiny_sd, pictures):
    for method in ("d-opsd", "sft"):
        with pytest.raises(UserError, match="student.call.*cannot be called like this: .*divisible by 8"):
            prepare(asked(tiny_sd, pictures, "student.call={height = 33, width = 32}", f"method={method}"))


def test_without_buckets_every_picture_is_square(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures, "images.aspect_buckets=false", "images.resolution=20"))
    assert tuning.buckets == [(16, 16)] * 3
    assert tuning.recipe.student.call == {"width": 16, "height": 16}
    with pytest.raises(UserError, match="resolution = 3 is below 8"):
        prepare(asked(tiny_sd, pictures, "images.resolution=3"))


def test_other_pictures_are_refused_once_a_run_has_begun(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    folder.append_metrics({"kind": "update", "update": 1})
    Image.new("RGB", (16, 16), "yellow").save(pictures / "1.png")
    with pytest.raises(UserError, match=r"task/prompts/train.jsonl differs"):
        write_task(prepare(asked(tiny_sd, pictures)))


def test_after_a_failed_check_the_same_folder_takes_other_captions_and_contexts(tiny_sd, pictures, ip_options):
    tuning = prepare(asked(tiny_sd, pictures))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    assert folder.recipe().teachers[0].context.kind == "enhanced_prompt"
    for name in ("teacher-check.png", "teacher-check.json"):
        (folder.path / name).write_text("no better")
    Image.new("RGB", (16, 16), "yellow").save(pictures / "1.png")
    other = prepare(asked(tiny_sd, pictures, *ip_options))
    assert write_task(other)
    assert folder.recipe().teachers[0].context.kind == "enhanced_prompt"
    taken = RunFolder.create(other.recipe.output_dir, other.recipe, {})
    assert taken.recipe().teachers[0].context.kind == "ip_adapter"


def test_an_error_before_the_run_leaves_nothing_behind(tiny_sd, pictures):
    tuning = prepare(asked(tiny_sd, pictures))
    with pytest.raises(UserError, match="later"), task_written(tuning):
        assert tuning.folder.is_dir()
        raise UserError("later")
    assert not tuning.folder.parent.exists()


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["ip"],
        ["ip", 'teacher.weights="frozen"', "objective.name=velocity"],
        ["ip", 'student.train="full"', "train.learning_rate=1e-4", "student.guidance_scale=2.0"],
    ],
)
def test_a_run_trains_over_buckets_and_resumes_exactly(tiny_sd, pictures, ip_options, monkeypatch, tmp_path, extra):
    """Under every context and kind of teacher: finite losses, moved weights, 2 + 1 updates as 3."""
    monkeypatch.setattr(loop, "save_trajectory", lambda run, folder: None)
    options = [*extra, *(ip_options if "ip" in extra else []), "teacher.ema_decay=0.5"]
    options = [option for option in options if option != "ip"]
    if 'teacher.weights="frozen"' in options:
        options.remove("teacher.ema_decay=0.5")
    steps = "train.max_train_steps="
    whole = trained(prepare(asked(tiny_sd, pictures, *options, f"{steps}3", output=tmp_path / "whole")))
    trained(prepare(asked(tiny_sd, pictures, *options, f"{steps}2", output=tmp_path / "halves")))
    halves = trained(prepare(asked(tiny_sd, pictures, *options, f"{steps}3", output=tmp_path / "halves")))
    assert_same_state(state_of(whole, 3), state_of(halves, 3))
    before, after = (load_file(whole.path / f"checkpoint-{n}" / "state" / "parameters.safetensors") for n in (1, 3))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not any("_ip" in name or "processor" in name for name in before)
    assert all(row["loss"] > 0 for row in rows_of(whole, "update"))


def test_the_student_of_a_tuning_run_is_the_untouched_pipeline_at_first(tiny_sd, pictures, ip_options):
    """Bit-equal pictures at every bucket's size, with the teacher's adapter in place."""
    tuning = prepare(asked(tiny_sd, pictures, *ip_options))
    with task_written(tuning):
        run, _ = prepared(tuning.recipe)
    plain = tiny.load_pipeline(tiny_sd)
    for size in {row.bucket for row in run.teachers[0].train_rows}:
        told = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np", **loop.told_size(size)}
        latents = torch.randn(1, *run.walk_at(size).shape, generator=torch.Generator().manual_seed(1))
        student = run.student.pipeline("a dot", latents=latents, **told).images
        assert (student == plain("a dot", latents=latents, **told).images).all()


def test_the_trajectory_is_drawn_at_rows_that_the_teacher_can_see(tiny_sd, pictures, ip_options):
    folder = trained(prepare(asked(tiny_sd, pictures, *ip_options, "train.max_train_steps=1")))
    entries = json.loads((folder.path / "samples" / "trajectory.json").read_text())
    assert len(entries) == 3 * 2 * 2
    sizes = {Image.open(folder.path / "samples" / entry["file"]).size for entry in entries}
    assert sizes == {(32, 32), (40, 24)}


@pytest.fixture
def run_with_teacher(tiny_sd, pictures, ip_options):
    tuning = prepare(asked(tiny_sd, pictures, *ip_options))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    return prepared(tuning.recipe)[0], folder


def test_a_teacher_that_its_context_does_not_help_is_stopped_with_a_grid(run_with_teacher, monkeypatch):
    """A random adapter on a random network: which side is nearer is chance, so they are swapped to see both."""
    run, folder = run_with_teacher
    verdict = check_teacher(run, folder, force=True)
    assert verdict.measure == "image encoder" and verdict.with_context != verdict.without_context
    assert json.loads((folder.path / "teacher-check.json").read_text())["passed"] == verdict.passed
    assert Image.open(folder.path / "teacher-check.png").size == (3 * 40, 14 + 3 * 32)
    from diffopd import teacher_check

    judge = teacher_check._judge
    swap = {"without": "with_context", "with_context": "without"}

    def swapped(run, drawn, features):
        sides = [teacher_check._Drawn(d.target, **{a: getattr(d, b) for a, b in swap.items()}) for d in drawn]
        return judge(run, sides, features)

    monkeypatch.setattr(teacher_check, "_judge", swapped)
    other = check_teacher(run, folder, force=True)
    assert other.with_context == verdict.without_context and other.passed != verdict.passed
    failing = judge if not verdict.passed else swapped
    monkeypatch.setattr(teacher_check, "_judge", failing)
    with pytest.raises(UserError, match=r"nothing to teach.*teacher-check\.png.*--force"):
        check_teacher(run, folder)


def test_guidance_of_the_teacher_alone_is_no_context(tiny_sd, pictures):
    """A richer caption that says nothing more, under guidance that the student has not."""
    file = pictures / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps(row | {"enhanced_text": row["text"]}) for row in rows))
    tuning = prepare(asked(tiny_sd, pictures, "teacher.guidance_scale=5.0"))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    run, _ = prepared(tuning.recipe)
    assert run.teachers[0].call.arguments["guidance_scale"] == 5.0 != run.student.call.arguments["guidance_scale"]
    verdict = check_teacher(run, folder, force=True)
    assert verdict.with_context == verdict.without_context and not verdict.passed


def test_a_model_that_is_dull_in_few_steps_is_explained():
    dull = Verdict("pixels", 0.1, 0.2, 1.0, 0.1, 0.2, few_step_sharpness=0.4)
    assert "40 % of the sharpness that it has in 16" in not_step_distilled(dull, 4)
    assert not_step_distilled(Verdict("pixels", 0.1, 0.2, 1.0, 0.1, 0.2, few_step_sharpness=0.95), 4) is None


def noise_picture(seed):
    return Image.frombytes("RGB", (16, 16), random.Random(seed).randbytes(768))


def test_captions_that_the_model_does_not_read_to_their_end_are_named(run_with_teacher):
    """CLIP's tokenizer here has 24 places, one a letter."""
    pipeline = run_with_teacher[0].student.pipeline
    assert cut_captions(pipeline, ["a dot", "a red dot"]) is None
    told = cut_captions(pipeline, ["a dot", "a dot that is by far too large"])
    assert "1 of 2 captions are longer than the 24 tokens" in told and "'a dot that is by far too large'" in told
    reads_on = SimpleNamespace(components={**pipeline.components, "tokenizer_2": SimpleNamespace()})
    assert cut_captions(reads_on, ["a dot that is by far too large"]) is None


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
    assert moved["drift"] > 0.02 and "max_drift = 0.02" in again.reason or "collapse" in again.reason
    assert Image.open(folder.path / "looks" / "000001.png").size == (64, 14 + 4 * 32)
    shutil.rmtree(folder.path / "looks")
    with pytest.raises(UserError, match="first drawings are gone"):
        Looks(settings, folder, looks.pictures).begin(run, is_new=False)


def test_the_loop_stops_for_the_reason_of_a_look(tiny_sd, pictures, monkeypatch):
    monkeypatch.setattr(loop, "save_trajectory", lambda run, folder: None)
    tuning = prepare(asked(tiny_sd, pictures, "train.max_train_steps=3"))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})

    def begin(run, is_new):
        assert is_new
        run.looks = Looks(LookSettings(every=2, num_prompts=2, max_drift=1e-9), folder, [pictures / "0.png"])
        run.looks.begin(run, is_new=is_new)

    loop.distill(tuning.recipe, folder, begin)
    (row,) = rows_of(folder, "look")
    assert row["update"] == 2 and 0 < row["drift"] < 1 and row["subject_sharpness"] > 0
    assert "look.max_drift" in rows_of(folder, "stop")[0]["reason"]
    assert folder.latest_checkpoint().name == "checkpoint-2"


def test_the_last_update_is_looked_at_whatever_the_interval(tiny_sd, pictures, monkeypatch):
    monkeypatch.setattr(loop, "save_trajectory", lambda run, folder: None)
    tuning = prepare(asked(tiny_sd, pictures, "train.max_train_steps=3"))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})

    def begin(run, is_new):
        run.looks = Looks(LookSettings(every=2, num_prompts=2, max_drift=1.0), folder, [pictures / "0.png"])
        run.looks.begin(run, is_new=is_new)

    loop.distill(tuning.recipe, folder, begin)
    assert [row["update"] for row in rows_of(folder, "look")] == [2, 3]
    assert rows_of(folder, "stop")[0]["reason"] == "reached max_train_steps = 3"


def test_rows_of_one_size_are_walked_together_whatever_their_order():
    rows = [PromptRow(str(i), {"bucket": [16, 16 if i % 2 else 20]}) for i in range(5)]
    from diffopd.batches import micro_batches

    numbers = [batch for batch, _ in micro_batches(list(enumerate(rows)), 2)]
    assert numbers == [[0, 2], [4], [1, 3]]
    assert [batch for batch, _ in micro_batches(list(enumerate(rows)), 1)] == [[0], [2], [4], [1], [3]]


def test_cells_of_a_grid_are_where_they_belong():
    page = grid([(Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))] * 2, ["a", "b"])
    assert page.size == (16, 14 + 16)
    assert page.getpixel((4, 20)) == (255, 0, 0) and page.getpixel((12, 28)) == (0, 0, 255)


def test_the_command_prints_the_plan_and_writes_nothing(tiny_sd, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [part for option in SMALL for part in ("--set", option)]
    result = run_cli("tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--dry-run")
    assert result.exit_code == 0, result.output
    for part in ("3 from", "32 x 32: 2", "decay 0.90553851", "enhanced prompt", "denoised", "LoRA, rank 2"):
        assert part in result.output
    assert not (tmp_path / "runs").exists()
    (pictures / "1.png").write_bytes(b"")
    result = run_cli("tune", "--model", str(tiny_sd), "--images", str(pictures), *sets)
    assert result.exit_code == 2 and "metadata.jsonl:2" in result.output and not (tmp_path / "runs").exists()
    assert "Nothing to tune" in run_cli("tune", "--model", str(tiny_sd)).output


def test_a_folder_in_which_another_process_works_gets_no_task(tiny_sd, pictures, tmp_path):
    sets = [part for option in SMALL for part in ("--set", option)]
    with at_work(tmp_path / "run", print):
        result = run_cli(
            "tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--output-dir", str(tmp_path / "run")
        )
        assert result.exit_code == 2 and "is in use" in result.stderr
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_the_command_goes_the_whole_road(tiny_sd, pictures, tmp_path, ip_options):
    sets = [part for option in [*SMALL[:-1], "look.every=1", "look.num_prompts=2"] for part in ("--set", option)]
    sets += [part for option in [*ip_options, "evaluate.num_prompts=2"] for part in ("--set", option)]
    run = tmp_path / "tuned"
    result = run_cli(
        "tune", "--model", str(tiny_sd), "--images", str(pictures), *sets, "--force", "--output-dir", str(run)
    )
    assert result.exit_code == 0, result.output
    folder = RunFolder(run)
    assert len(rows_of(folder, "look")) == 2 and (run / "teacher-check.png").is_file()
    scores = json.loads((run / "evaluation" / "scores.json").read_text())["rows"]
    assert {row["model"] for row in scores} == {"base", "student"}
    saved = json.loads((run / "export" / "pipeline" / "unet" / "config.json").read_text())
    assert saved["encoder_hid_dim_type"] is None and not (run / "export" / "pipeline" / "image_encoder").exists()
    names = load_file(run / "export" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert names == load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors").keys()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "A picture here and in ordinary fine-tuning" in page
    assert "pictures" not in json.loads((run / "cost.json").read_text())["sft"]  # made latents once a run
    assert "Tuned on pictures" in page and "by image encoder" in page and 'alt="before and now"' in page
