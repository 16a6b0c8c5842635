"""The shipped ways to teach: every one is read and checked, and the embedded world's pictures show what rows say."""

import importlib.util
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffopd.cli import app
from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.load import LORA_FILE
from diffopd.locate import shelf
from diffopd.reward import card_reward
from diffopd.run_folder import RunFolder
from diffopd.teach import teach
from diffopd.teach_check import check_teach
from diffopd.teach_recipe import find_teach, read_teach_recipe
from diffopd.teach_run import TeachRun
from diffopd.teacher import load_reward, teacher_card

ROWS = 24
WORLD = ("composition", "text", "style")
SD35 = ["unmade/sd35-ocr/teach.toml", "unmade/sd35-geneval/teach.toml", "unmade/sd35-aesthetic/teach.toml"]
PACKAGES = {"rapidocr", "onnxruntime"}
INSTALLED = all(importlib.util.find_spec(name) for name in PACKAGES)


def shipped() -> list[str]:
    """Every .toml in a teacher's folder that is neither its card nor a recipe to learn from it, by its shelf name."""
    others, top = {"teacher.toml", "distill.toml"}, shelf("teachers")
    held = [path for card in top.rglob("teacher.toml") for path in card.parent.glob("*.toml")]
    return sorted(path.relative_to(top).as_posix() for path in held if path.name not in others)


def test_every_task_of_the_world_has_one():
    ways = {f"{task}/{name}.toml" for task in WORLD for name in ("teach", "nft", "grpo")}
    assert ways | {f"unmade/joint/{way}.toml" for way in ("nft", "grpo", "cascade")} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_way_to_teach_is_complete_and_says_how_to_start_it(name):
    recipe = read_teach_recipe(name)
    assert recipe.path == shelf("teachers") / name
    assert set(check_teach(recipe).missing) <= (PACKAGES if name.startswith("unmade/sd35-ocr") else set())
    command = f"diffopd teach {name.removesuffix('/teach.toml') if name.split('/')[0] in WORLD else name}"
    assert command in recipe.path.read_text()
    if name.split("/")[0] in WORLD:
        assert recipe.student.guidance_scale == 1.0, "the card's guidance is for deployment"


@pytest.mark.parametrize("name", SD35)
def test_the_plan_of_a_real_models_teacher_is_made_offline(name):
    result = CliRunner().invoke(app, ["teach", name, "--dry-run"], catch_exceptions=False)
    told = " ".join(result.output.split())
    assert result.exit_code == 0 and "48 prompts x 24 pictures" in told and "stable-diffusion-3.5-medium" in told
    assert ("flow_sde, noise 0.7, guidance 4.5" in told) == ("grpo_guard" in told)
    assert "to put there hps-v2.1 (options.model of 'hps_v2'" in told, "the aesthetic task is taught or watched"
    assert ("to install" in told) == (name.startswith("unmade/sd35-ocr") and not INSTALLED)


def test_a_path_of_the_users_own_is_never_taken_for_a_teacher_of_the_shelf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_teach("unmade/sd35-ocr") == shelf("teachers") / "unmade" / "sd35-ocr" / "teach.toml"
    assert find_teach("text/nft.toml") == shelf("teachers") / "text" / "nft.toml"
    for name in ("./text", "text/", "../teachers/text", "./unmade/sd35-ocr", "./text/nft.toml", "~/text/nft.toml"):
        with pytest.raises(UserError, match=r"there is no such (folder|file)\."):
            find_teach(name)
    (tmp_path / "unmade" / "sd35-ocr").mkdir(parents=True)
    with pytest.raises(UserError, match="it has no teacher.toml"):
        find_teach("unmade/sd35-ocr")


def test_joint_prompts_alternate_between_the_tasks_and_each_picture_has_its_own_tasks_reward():
    card = teacher_card("unmade/joint", shelf("teachers"))
    rows, reward = read_prompts(card.prompts.train), card_reward(card)
    task_of = load_reward("reward.py:task_of", card.folder)
    assert [task_of(row.metadata) for row in rows[:6]] == ["composition", "text", "style"] * 2
    apart = {task: read_prompts(teacher_card(task, shelf("teachers")).prompts.train) for task in WORLD}
    assert sorted(row.prompt for row in rows) == sorted(row.prompt for held in apart.values() for row in held)
    images = [
        load_reward(f"../../pictures.py:{task_of(row.metadata)}", card.folder)([row.prompt], [row.metadata], [3])[0]
        for row in rows[:6]
    ]
    metadata = [row.metadata for row in rows[:6]]
    assert list(reward(images, [""] * 6, metadata)) == [1.0] * 6
    assert list(reward(images[1:] + images[:1], [""] * 6, metadata)) == [0.0] * 6
    with pytest.raises(ValueError, match="belongs to no one task"):
        task_of({"prompt": "a dot"})


@pytest.mark.parametrize("name", ["unmade/joint/nft.toml", "unmade/joint/grpo.toml"])
def test_every_update_of_joint_learning_has_as_many_prompts_of_each_task(name):
    """However long their files are: distillation gives each teacher the same share of the updates."""
    recipe = read_teach_recipe(name)
    task_of = load_reward("reward.py:task_of", recipe.card.folder)
    run = SimpleNamespace(recipe=recipe, files=[read_prompts(file) for file in recipe.card.prompts.files("train")])
    for update in (0, 1, 300):
        rows = [TeachRun.row(run, update, number) for number in range(recipe.num_pictures)]
        assert Counter(task_of(row.metadata) for row in rows) == dict.fromkeys(WORLD, recipe.num_pictures // 3)
        groups = [rows[start : start + recipe.group_size] for start in range(0, len(rows), recipe.group_size)]
        assert all(group == [group[0]] * recipe.group_size for group in groups)
    styles = [TeachRun.row(run, update, number).prompt for update in range(131) for number in (16, 40, 64, 88)]
    assert len(styles) == 524 == len(set(styles)), "a pass meets each prompt once"


def test_a_cascade_gives_each_task_its_part_of_the_updates_and_another_length_is_another_run(tmp_path):
    name = "unmade/joint/cascade.toml"
    recipe = read_teach_recipe(name, [f'output_dir="{tmp_path / "run"}"', "train.max_train_steps=10"])
    task_of = load_reward("reward.py:task_of", recipe.card.folder)
    run = SimpleNamespace(recipe=recipe, files=[read_prompts(file) for file in recipe.card.prompts.files("train")])
    met = [[TeachRun.row(run, update, number) for number in range(recipe.num_pictures)] for update in range(10)]
    tasks = [{task_of(row.metadata) for row in rows} for rows in met]
    assert tasks == [{WORLD[number]} for number in (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)]
    for task in (met[:4], met[4:7], met[7:]):
        prompts = [row.prompt for rows in task for row in rows[:: recipe.group_size]]
        assert len(set(prompts)) == len(prompts) == 12 * len(task), "a pass meets each prompt once"
    RunFolder.create(tmp_path / "run", recipe, {}).append_metrics({"kind": "update", "update": 1})
    with pytest.raises(UserError, match=r"max_train_steps was 10, is 20 \(its prompt files have a part of it each\)"):
        RunFolder.create(tmp_path / "run", read_teach_recipe(name, ["train.max_train_steps=20"]), {})
    with pytest.raises(UserError, match="gives each of 3 files its part of the updates"):
        read_teach_recipe(name, ["train.max_train_seconds=60"])
    with pytest.raises(UserError, match="has one prompt file"):
        read_teach_recipe("text/nft.toml", ['sampling.prompt_files="one_after_another"'])


@pytest.mark.slow
def test_joint_and_cascade_reinforcement_learning_run_on_the_embedded_world(tmp_path):
    """An update of each: the cascade's second task begins with the first one's adapter."""
    few = ["train.max_train_steps=1", "train.max_train_seconds=0.0", "train.validate_every=0", "evaluate.num_prompts=3"]
    few += ["sampling.num_prompts=3", "sampling.group_size=2", "student.num_inference_steps=2", 'objective.query="all"']

    def taught(name, folder, *options):
        recipe = read_teach_recipe(name, [f'output_dir="{tmp_path / folder}"', *few, *options])
        made = RunFolder.create(recipe.output_dir, recipe, check_teach(recipe, hash_weights=True).hashes)
        assert teach(recipe, made)
        return load_file(made.latest_checkpoint() / LORA_FILE), made

    taught("unmade/joint/nft.toml", "joint")
    _, cascade = taught("unmade/joint/cascade.toml", "cascade", "train.max_train_steps=3")
    assert cascade.latest_checkpoint().name == "checkpoint-3"
    first, made = taught("text/nft.toml", "first", "train.learning_rate=1e-2")
    begin = made.latest_checkpoint() / LORA_FILE
    second, _ = taught("style/nft.toml", "second", f'student.init_weights="{begin}"', "train.learning_rate=1e-9")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    assert any(tensor.abs().max() > 0 for key, tensor in first.items() if "lora_B" in key)


def test_a_word_is_scored_by_the_share_of_its_letters_where_all_can_be_read():
    card = teacher_card("text", shelf("teachers"))
    share, draw = load_reward("letters.py:share", card.folder), load_reward("../pictures.py:text", card.folder)
    (image,) = draw([""], [{"word": "KEA"}], [3])
    rows = [{"word": word} for word in ("KEA", "KEB", "KFB", "XYZ", "EAK")]
    assert share([image] * 5, [""] * 5, rows).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert share([Image.new("RGB", (48, 48), "white")], [""], rows[:1]).tolist() == [0]
    for name in ("nft", "grpo"):
        assert [term.reward for term in read_teach_recipe(f"text/{name}.toml").rewards] == ["letters.py:share"]


@pytest.mark.parametrize("task", ["composition", "text", "style"])
def test_drawn_pictures_score_1_under_their_rows_and_differ_by_seed(task):
    card = teacher_card(task, shelf("teachers"))
    draw = load_reward(f"../pictures.py:{task}", card.folder)
    rows = read_prompts(card.prompts.train)[:ROWS]
    prompts, metadata = [row.prompt for row in rows], [row.metadata for row in rows]
    images = draw(prompts, metadata, list(range(ROWS)))
    assert list(load_reward(card.reward, card.folder)(images, prompts, metadata)) == [1.0] * ROWS
    assert [a.tobytes() for a in draw(prompts, metadata, list(range(ROWS)))] == [a.tobytes() for a in images]
    again = draw(prompts, metadata, list(range(100, 100 + ROWS)))
    assert sum(a.tobytes() != b.tobytes() for a, b in zip(images, again, strict=True)) > ROWS / 2
