"""Contract of the shipped recipes, teacher folders and configs: complete, consistent, and planned without a network."""

import importlib
import inspect
import json
import tomllib

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffopd import locate, preflight
from diffopd.blueprint import read_blueprint
from diffopd.cli import app
from diffopd.data import read_prompts
from diffopd.errors import UserError
from diffopd.grid import make_scheduler
from diffopd.locate import find_recipe, find_tune_recipe, recipe_names, shelf, teacher_names, tune_recipe_names
from diffopd.plan import make_plan
from diffopd.preflight import check
from diffopd.recipe import read_recipe
from diffopd.reward import check_card_reward
from diffopd.teacher import teacher_card

# Component -> how many numbers its published file holds. Where the file has an index (FLUX.1, T5, Qwen3, Qwen2.5-VL,
# Z-Image-Turbo, Qwen-Image) its total_size is twice that; elsewhere the file is that and a header of less than .3 MB.
T5, QWEN3, QWEN_VL, BIG_G, SDXL = 4_762_310_656, 4_022_468_096, 8_292_166_656, 694_659_840, 2_567_463_684
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "stabilityai/stable-diffusion-xl-base-1.0": {"unet": SDXL, "text_encoder_2": BIG_G, "vae": 83_653_863},
    "stabilityai/sdxl-turbo": {"unet": SDXL, "text_encoder_2": BIG_G},
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": 2_469_663_936, "text_encoder_3": T5},
    "black-forest-labs/FLUX.1-dev": {"transformer": 11_901_408_320, "text_encoder_2": T5, "vae": 83_819_683},
    "black-forest-labs/FLUX.2-klein-4B": {"transformer": 3_875_544_576, "vae": 84_046_372},
    "black-forest-labs/FLUX.2-klein-base-4B": {"transformer": 3_875_544_576, "text_encoder": QWEN3},
    "Tongyi-MAI/Z-Image": {"transformer": 6_154_908_736, "text_encoder": QWEN3},
    "Tongyi-MAI/Z-Image-Turbo": {"transformer": 6_154_908_736},
    "Qwen/Qwen-Image": {"transformer": 20_430_401_088, "text_encoder": QWEN_VL, "vae": 126_892_531},
}
# recipe -> first and last timestep, denoiser rows of the student and of all teachers in one update
PLANS = {
    "sd35-medium": ([1000, 8.929], 162, 135),
    "sd15": ([999, 249], 64, 640),
    "sd15-hyper": ([999, 249], 64, 640),
    "sd15-lcm": ([999, 259], 64, 128),
    "sdxl": ([999, 249], 32, 320),
    "sdxl-hyper": ([999, 249], 32, 320),
    "sdxl-lightning": ([999, 249], 32, 320),
    "sdxl-lcm": ([999, 259], 32, 64),
    "z-image": ([1000, 461.538], 64, 640),
    "flux1-dev": ([1000, 512.844], 32, 160),
    "flux2-klein": ([1000, 500], 32, 320),
    "qwen-image": ([1000, 500], 32, 320),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a plan asked the hub for {args}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_passes_every_check_and_has_a_plan_without_a_network(name, monkeypatch, tmp_path):
    checked = []
    monkeypatch.setattr(preflight, "check", lambda recipe: checked.append(check(recipe)) or checked[0])
    result = CliRunner().invoke(app, ["distill", name, "--dry-run", "--output-dir", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for part in ("trained", "timesteps", "graph of one state", "gradients and AdamW"):
        assert part in result.output
    (parts,) = checked
    assert parts.recipe.name == name
    assert len(parts.grid.timesteps) == parts.recipe.student.num_inference_steps
    assert parts.grid.sigmas[0] == pytest.approx(1.0, abs=0.01)
    if name != "together":
        told, ((first, last), student, teachers) = " ".join(result.output.split()), PLANS[name]
        assert f"student {student:g}, teachers {teachers:g} an update" in told
        steps = [float(word) for word in told.split("timesteps ")[1].split(" sigmas")[0].split()]
        assert (steps[0], steps[-1]) == (pytest.approx(first, abs=0.01), pytest.approx(last, abs=0.01))
    acting = [teacher.call.get("true_cfg_scale", teacher.guidance_scale) for teacher in parts.recipe.teachers]
    for teacher, scale in zip(make_plan(parts).teachers, acting, strict=True):
        assert scale is None or teacher.guidance_scale == scale


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_what_it_is_for_and_how_to_plan_it(name):
    text = find_recipe(name).read_text()
    assert text.startswith("# ") and f"diffopd distill {name}" in text
    settings = tomllib.loads(text)
    assert {"student", "teachers", "objective", "train", "evaluate"} <= set(settings)


@pytest.mark.parametrize("name", teacher_names())
def test_a_teacher_folder_is_complete(name):
    card = teacher_card(name, shelf("teachers"))
    assert card.name == name and card.folder.name == name
    readme = (card.folder / "README.md").read_text()
    assert readme.startswith(f"# {name}\n") and len(readme) > 200
    assert check_card_reward(card) in ([], ["rapidocr", "onnxruntime"]) and card.license
    train, test = (read_prompts(path) for path in (card.prompts.train, card.prompts.test))
    assert len(test) >= 16 and len(train) >= 48
    assert not {row.prompt for row in train} & {row.prompt for row in test}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configs_give_files_of_the_published_size(name):
    sizes = read_blueprint(name, shipped=True).component_sizes()
    assert {part: sizes[part] for part in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", ["sd15-hyper", "sdxl-hyper"])
def test_another_scheduler_class_takes_what_the_base_says_of_its_last_level(name):
    """SDXL's own class has no set_alpha_to_one, but its file has, and DDIM takes it: its last step ends at level 0."""
    recipe = read_recipe(name)
    scheduler = make_scheduler(recipe, read_blueprint(recipe.student.pretrained_model_name_or_path, shipped=True))
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0] < 1


def test_every_shipped_config_is_held_to_published_numbers():
    folder = locate.PACKAGE / "configs"
    assert {p.parent.relative_to(folder).as_posix() for p in folder.glob("*/*/model_index.json")} == set(PUBLISHED)
    for file in folder.rglob("*.json"):
        assert json.loads(file.read_text())


def settings_of(kind):
    """What a class of diffusers can be told; a scheduler's file also tells classes that a recipe may name instead."""
    kinds = [kind, *kind._get_compatibles()] if kind.__name__.endswith("Scheduler") else [kind]
    return {key for kind in kinds for key in inspect.signature(kind.__init__).parameters}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configs_name_classes_and_settings_that_exist(name):
    blueprint = read_blueprint(name, shipped=True)
    for component, (library, kind) in blueprint.classes.items():
        if library == "diffusers":
            known = settings_of(getattr(importlib.import_module(library), kind))
            assert {key for key in blueprint.configs[component] if not key.startswith("_")} <= known


# tuning recipe -> what its teacher sees, first and last timestep, calls of an update: 4 steps, 4 pictures, one call
# each; the embedded model also has 4 prompts to keep, and its teacher is guided, at two of the four states
ONE_EACH = "student 16, teachers 16 an update"
TUNED = {
    "z-image-turbo": ("image prompt", [1000, 500], ONE_EACH),
    "flux2-klein": ("reference image", [1000, 767.2], ONE_EACH),
    "sdxl-turbo": ("ip adapter", [999, 249], ONE_EACH),
    "sd15-lcm": ("ip adapter", [999, 259], ONE_EACH),
    "emoji": ("ip adapter", [999, 249], "student 32, teachers 24 an update"),
}


@pytest.fixture
def pictures(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": f"a dot {n}", "enhanced_text": f"a red dot {n}"} for n in range(2)]
    for number, row in enumerate(rows):
        Image.new("RGB", (640, 512), (255, number, 0)).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", tune_recipe_names())
def test_a_tuning_recipe_is_complete_and_planned_without_a_network(name, pictures):
    """Every table, and in each what the run depends on, is written out; the plan names context, grid and cost."""
    text = find_tune_recipe(name).read_text()
    assert text.startswith("# ") and f"diffopd tune {name}" in text
    settings = tomllib.loads(text)
    tables = {"student", "images", "teacher", "context", "objective", "train", "look", "evaluate"}
    assert tables <= set(settings) and {"name", "method", "seed"} <= set(settings)
    result = CliRunner().invoke(
        app, ["tune", name, "--images", str(pictures), "--dry-run", "--output-dir", str(pictures / "run")]
    )
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    seen, (first, last), cost = TUNED[name]
    assert f"its context {seen}" in told and cost in told
    network = settings["context"].get("ip_adapter") or settings["context"].get("vision_language")
    assert not network or f"sees pictures ({network})" in told
    assert f"evaluation in {settings['train'].get('frozen_dtype', 'float32')}" in told
    steps = [float(word) for word in told.split("timesteps ")[1].split(" sigmas")[0].split()]
    assert len(steps) == 4
    assert (steps[0], steps[-1]) == (pytest.approx(first, abs=0.01), pytest.approx(last, abs=0.01))


def test_a_tuning_recipe_that_is_not_there_is_named():
    with pytest.raises(UserError, match='no shipped tuning recipe "sdxl-turbp".*"sdxl-turbo"'):
        find_tune_recipe("sdxl-turbp")


def test_a_run_asks_the_hub_for_the_base_whatever_is_shipped():
    with pytest.raises(AssertionError, match="stable-diffusion-3.5-medium"):
        check(read_recipe("sd35-medium"), hash_weights=True)
