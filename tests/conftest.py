"""Shared fixtures. One thread, no network, no GPU unless one is asked for, set before torch is imported by anyone."""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1")
os.environ.setdefault("COLUMNS", "120")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # many tests hold numbers to the last bit, which is the CPU's
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import tiny  # noqa: E402

OUTCOMES: dict[str, bool] = {}  # test of the families' contract -> whether it passed
CONTRACT = ("test_families.py", "test_export_families.py")


LONGEST = "test_a_wider_autoencoder"  # alone at the end, it would keep the other process waiting for a minute


def pytest_collection_modifyitems(items):
    """The longest test comes first."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def pytest_runtest_logreport(report):
    """Note how the tests of the families' contract end; with several processes the first one hears of all."""
    path, _, name = report.nodeid.partition("::")
    if path.endswith(CONTRACT) and (report.when == "call" or not report.passed):
        OUTCOMES[name] = report.passed and OUTCOMES.get(name, True)


def pytest_sessionfinish(session):
    """README's table is what a session that ran the whole contract without a failure has seen, or the session fails."""
    config = session.config
    is_part = config.option.keyword or any("::" in arg for arg in config.args) or hasattr(config, "workerinput")
    ran = [any(name.startswith(start) for name in OUTCOMES) for start in ("test_the_driven_call", "test_every_form_of")]
    if is_part or session.testsfailed or not all(ran):
        return
    from test_families import ROOT, module_of

    script = module_of("families_table")
    wrong = script.differences(script.results_of(OUTCOMES), (ROOT / "README.md").read_text(encoding="utf-8"))
    if wrong:
        lines = ["README's table of families is not what these tests gave; run scripts/families_table.py:", *wrong]
        config.pluginmanager.get_plugin("terminalreporter").write_line("\n" + "\n".join(lines), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A tiny random stock StableDiffusionPipeline folder: v prediction, trailing zero-SNR DDIM, safetensors."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "tiny-sd")


@pytest.fixture
def tiny_pipeline(tiny_sd):
    """A fresh pipeline object over `tiny_sd`."""
    return tiny.load_pipeline(tiny_sd)


@pytest.fixture(scope="session")
def tiny_teachers(tiny_sd, tmp_path_factory) -> list[Path]:
    """Two LoRA teacher folders, "dots" (guidance 2) and "lines" (guidance 1). Read only: copy before changing."""
    shelf = tmp_path_factory.mktemp("shelf")
    dots = tiny.write_teacher(shelf / "dots", tiny_sd, seed=1)
    lines = tiny.write_teacher(shelf / "lines", tiny_sd, seed=2, guidance_scale=1.0)
    return [dots, lines]


@pytest.fixture(scope="session")
def tiny_teacher(tiny_teachers) -> Path:
    """The LoRA teacher folder "dots" on `tiny_sd`. Read only: copy it before changing anything."""
    return tiny_teachers[0]


@pytest.fixture
def tiny_recipe(tmp_path, tiny_sd, tiny_teachers) -> Path:
    """A recipe file with both tiny teachers; its output_dir is tmp_path / "run"."""
    return tiny.write_recipe(tmp_path / "tiny.toml", tiny_sd, tiny_teachers)


@pytest.fixture
def own_teachers(tiny_teachers, tmp_path) -> list[Path]:
    """Copies of the tiny teachers that a test may spoil."""
    return [shutil.copytree(folder, tmp_path / "mine" / folder.name) for folder in tiny_teachers]


@pytest.fixture
def own_recipe(tmp_path, tiny_sd, own_teachers) -> Path:
    """A recipe file, tiny.toml, with the copies of the tiny teachers."""
    return tiny.write_recipe(tmp_path / "tiny.toml", tiny_sd, own_teachers)


@pytest.fixture(scope="session")
def strangers():
    """A process of stock diffusers that forks for whoever asks it (strangers.py)."""
    from strangers import Strangers

    server = Strangers()
    yield server
    server.close()


@pytest.fixture
def soon(strangers, monkeypatch):
    """An export's stranger is a fork, not a new interpreter: the same program, without its seconds of importing."""
    monkeypatch.setattr("diffopd.stranger.subprocess", strangers)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three pictures to tune on, one of them wide, with both captions."""
    import contexts
    from tuning import SIZES

    folder = tmp_path / "dots"
    rows = contexts.draw_rows(folder, SIZES)
    lines = [
        {"file_name": f"{number}.png", "text": row.prompt, "enhanced_text": f"{row.prompt}, enlarged"}
        for number, row in enumerate(rows)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ip_options(tmp_path_factory) -> list[str]:
    """Options that name a random IP-Adapter of the tiny pipeline, and its image encoder."""
    import contexts

    file, encoder = contexts.save_ip_adapter(tmp_path_factory.mktemp("ip"), tiny.build_pipeline().unet)
    return [f"context.ip_adapter={json.dumps(str(file))}", f"context.image_encoder={json.dumps(str(encoder))}"]


@pytest.fixture
def run_with_teacher(tiny_sd, pictures, ip_options):
    """A tuning run before its first update, its teacher seeing by an IP-Adapter, and its folder."""
    from run_helpers import prepared
    from tuning import asked

    from diffopd.run_folder import RunFolder
    from diffopd.tune import prepare, task_written

    tuning = prepare(asked(tiny_sd, pictures, *ip_options))
    with task_written(tuning):
        folder = RunFolder.create(tuning.recipe.output_dir, tuning.recipe, {})
    return prepared(tuning.recipe)[0], folder
