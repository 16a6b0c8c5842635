"""The pictures that `tune` is shown on the embedded world are a folder that it takes, and say what they show."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from from_scripts import script
from PIL import Image

from diffopd.data import read_prompts
from diffopd.images import read_pictures
from diffopd.tune import prepare
from diffopd.tune_recipe import read_tune_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data():
    return script("world_tune_data")


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "sets"
    data.main(folder, pipeline="emoji-4-steps", pictures=30, seed=0)
    return folder


def held_out(task):
    return [row.prompt for row in read_prompts(ROOT / "teachers" / task / "prompts" / "test.jsonl")]


@pytest.mark.parametrize("kind, count", [("manner", 30), ("object", 20)])
def test_tune_reads_pictures_recipe_and_prompts(data, written, kind, count):
    pictures = read_pictures(written / kind)
    assert len(pictures) == count
    recipe = read_tune_recipe(str(written / kind / "tune.toml"), None, None)
    assert Path(recipe.images.folder).resolve() == (written / kind).resolve()
    context = prepare(recipe).context
    assert (context.kind, Path(context.ip_adapter).name) == ("ip_adapter", "ip-adapter.safetensors")
    assert Path(context.ip_adapter).parent.name == "emoji-4-steps"
    prompts = {row.prompt for row in read_prompts(recipe.images.held_out)}
    assert len(prompts) >= 20 and not prompts & {picture.caption for picture in pictures}
    unrelated, kept = read_prompts(recipe.look.unrelated), read_prompts(recipe.prior.prompts)
    assert len(unrelated) == 48 and len(kept) == 160
    tested = [row for task in data.world.TASKS for row in held_out(task)]
    assert not {row.prompt for row in kept} & ({row.prompt for row in unrelated} | set(tested))


def test_pictures_of_the_manner_show_their_captions_and_leave_three_things_out(data, written):
    unseen_file = importlib.util.spec_from_file_location("unseen", ROOT / "teachers" / "unseen.py")
    unseen = importlib.util.module_from_spec(unseen_file)
    unseen_file.loader.exec_module(unseen)
    pictures = read_pictures(written / "manner")
    things = [next(thing for thing in data.world.THINGS if thing in picture.caption) for picture in pictures]
    assert set(things) == set(data.world.THINGS) - set(data.HELD_OUT_THINGS)
    images = [Image.open(picture.path) for picture in pictures]
    scores = unseen.new_manner(images, [""] * 30, [{"thing": thing} for thing in things])
    assert scores.tolist() == [1.0] * 30


def test_the_same_seed_writes_the_same_pictures_and_no_folder_twice(data, written, tmp_path):
    data.main(tmp_path / "again", pipeline="emoji-4-steps", pictures=30, seed=0)
    first, second = (np.asarray(Image.open(folder / "object" / "07.png")) for folder in (written, tmp_path / "again"))
    assert (first == second).all()
    with pytest.raises(data.typer.BadParameter, match="exists already"):
        data.main(written, pipeline="emoji-4-steps", pictures=30, seed=0)
