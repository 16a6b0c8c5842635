import pytest

from diffopd import locate
from diffopd.errors import UserError
from diffopd.locate import HubId, find_pipeline, find_recipe, find_teacher, parse_hub_id


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package of our own with two teachers, one pipeline and one recipe on its shelves."""
    package = tmp_path / "site" / "diffopd"
    package.mkdir(parents=True)
    top = package.parent
    for name in ("text", "style"):
        (top / "teachers" / name).mkdir(parents=True)
        (top / "teachers" / name / "teacher.toml").write_text("")
    (top / "teachers" / "together.toml").write_text("")
    (top / "teachers" / "text" / "distill.toml").write_text("")
    (top / "pipelines" / "emoji").mkdir(parents=True)
    (top / "pipelines" / "emoji" / "model_index.json").write_text("{}")
    monkeypatch.setattr(locate, "PACKAGE", package)
    return top


def test_the_shelves_of_a_checkout_lie_beside_the_package(shelf, tmp_path):
    assert find_teacher("text", tmp_path) == shelf / "teachers" / "text"
    assert find_pipeline("emoji") == shelf / "pipelines" / "emoji"


def test_the_shelves_of_a_wheel_lie_inside_the_package(shelf, tmp_path):
    (shelf / "teachers").rename(shelf / "diffopd" / "teachers")
    assert find_teacher("text", tmp_path) == shelf / "diffopd" / "teachers" / "text"


def test_recipes_are_found_by_name_at_the_top_or_in_a_teachers_folder(shelf):
    assert find_recipe("together") == shelf / "teachers" / "together.toml"
    assert find_recipe("text") == shelf / "teachers" / "text" / "distill.toml"


def test_a_recipe_path_may_be_a_file_or_a_folder_with_distill_toml(shelf):
    assert find_recipe(str(shelf / "teachers" / "together.toml")).name == "together.toml"
    assert find_recipe(str(shelf / "teachers" / "text")).name == "distill.toml"


@pytest.mark.parametrize(
    ("find", "guess"),
    [
        (lambda here: find_recipe("togehter"), "together"),
        (lambda here: find_recipe(str(here / "togehter.toml")), "together"),
        (lambda here: find_teacher("txet", here), "text"),
        (lambda here: find_pipeline("emojy"), "emoji"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one(shelf, tmp_path, find, guess):
    with pytest.raises(UserError, match=f'Did you mean "{guess}"'):
        find(tmp_path)


def test_a_name_with_a_separator_is_the_users_own_folder(shelf, tmp_path):
    mine = tmp_path / "text"
    mine.mkdir()
    (mine / "teacher.toml").write_text("")
    assert find_teacher("./text", tmp_path) == mine


def test_a_mistyped_folder_gets_the_nearest_one_beside_it(tmp_path):
    (tmp_path / "dots").mkdir()
    (tmp_path / "dots" / "teacher.toml").write_text("")
    with pytest.raises(UserError, match='Did you mean ".*/dots"'):
        find_teacher("./dotz", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/repo", HubId("owner/repo")),
        ("owner/repo/a/b@v1", HubId("owner/repo", "a/b", "v1")),
        ("owner/repo@refs/pr/1", HubId("owner/repo", "", "refs/pr/1")),
        ("./owner/repo", None),
        ("/owner/repo", None),
        ("emoji", None),
    ],
)
def test_hub_ids_are_told_from_paths(text, expected):
    assert parse_hub_id(text) == expected


def test_a_hub_id_that_cannot_be_had_says_what_was_tried(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no local folder of this name, and the hub did not give it"):
        find_pipeline("nobody/nothing")


def test_a_mistyped_path_gets_the_nearest_thing_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "bases" / "emoji-small").mkdir(parents=True)
    (tmp_path / "mine.toml").write_text("")
    for find in (
        lambda: find_pipeline(str(tmp_path / "bases" / "emoji-smal")),
        lambda: find_pipeline("bases/emojy-small", tmp_path),  # would be a hub id as well
        lambda: find_pipeline(str(tmp_path / "base" / "emoji-small")),
    ):
        with pytest.raises(UserError, match=r'Did you mean ".*/bases'):
            find()
    with pytest.raises(UserError, match=r'Did you mean ".*/mine.toml"'):
        find_recipe(str(tmp_path / "mime.toml"))


def test_a_file_of_a_hub_repository_is_downloaded_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repo, **told: asked.append((repo, told)) or tmp_path
    )
    found = locate.download(HubId("owner/repo", "4steps.safetensors"), ["*.safetensors", "*.json"])
    assert found == tmp_path / "4steps.safetensors"
    assert asked == [("owner/repo", {"revision": None, "allow_patterns": ["4steps.safetensors"]})]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose every repository holds the files in the list that is returned; the download is of those asked for."""
    from huggingface_hub.utils import filter_repo_objects

    files = []

    def give(repo, *, revision, allow_patterns, ignore_patterns=None):
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / repo / name).touch()
        return tmp_path / repo

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    return files


LOADED = [
    "LICENSE.md",
    "README.md",
    "model_index.json",
    "processor/chat_template.jinja",
    "scheduler/scheduler_config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/spiece.model",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model-00001-of-00001.safetensors",
]
BESIDE = [
    "flux1-dev.safetensors",
    "image.png",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_flax_model.msgpack",
    "unet/diffusion_pytorch_model-00001-of-00002.bf16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "v1-5-pruned.ckpt",
]


@pytest.mark.parametrize(("name", "prefix"), [("owner/repo", ""), ("owner/repo/model.v1/base@main", "model.v1/base/")])
def test_of_a_base_on_the_hub_only_what_it_is_loaded_from_is_downloaded(hub, name, prefix):
    hub.extend(prefix + file for file in (*LOADED, *BESIDE))
    folder = find_pipeline(name)
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == LOADED


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="model_index.json"):
        find_pipeline(str(tmp_path))


def test_a_teachers_name_is_told_from_a_recipes(shelf):
    with pytest.raises(
        UserError, match=r'"style" is a teacher, .*Known recipes: text, together\. .*diffopd teach style'
    ):
        find_recipe("style")


def test_a_misspelt_recipe_file_and_a_teachers_folder_are_told_apart_from_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glow.toml").touch()
    with pytest.raises(UserError, match=r'no shipped recipe "glow.tml". Did you mean "glow.toml"\?'):
        find_recipe("glow.tml")
    (tmp_path / "mine" / "glow").mkdir(parents=True)
    (tmp_path / "mine" / "glow" / "teacher.toml").touch()
    with pytest.raises(UserError, match=r'mine/glow is a teacher, .*\[\[teachers\]\] name = "mine/glow"'):
        find_recipe("mine/glow")


@pytest.mark.parametrize("find", [find_recipe, locate.find_tune_recipe])
def test_a_file_of_another_kind_is_no_recipe(tmp_path, monkeypatch, find):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# Title")
    for name in ("README.md", "./README.md", str(tmp_path / "README.md")):
        with pytest.raises(UserError, match=r"README.md is not a recipe: a recipe is a \.toml file"):
            find(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./shelf", 'shelf: is not a teacher folder, it has no teacher.toml. Did you mean ".*/shelf/dots"'),
        ("./plain", r"plain: is not a teacher folder, it has no teacher.toml\. A teacher is a folder with"),
        ("./gone", r"gone: there is no such folder\. A teacher is a folder with"),
        ("./shelf/dots/teacher.toml", "teacher.toml: is a file. Name the teacher's folder"),
    ],
)
def test_what_is_no_teachers_folder_is_refused_with_what_it_is(tmp_path, name, words):
    (tmp_path / "shelf" / "dots").mkdir(parents=True)
    (tmp_path / "shelf" / "dots" / "teacher.toml").write_text("")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match=words):
        find_teacher(name, tmp_path)


def test_a_folder_here_that_is_named_without_a_separator_is_offered(shelf, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'For the folder .*/mine write "\./mine"'):
        find_pipeline("mine")
    with pytest.raises(UserError, match="path with a separator, or owner/repo"):
        find_pipeline("yours")
