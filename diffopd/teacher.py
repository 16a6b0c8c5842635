"""A teacher's card: who it is, what it is asked, how its task is scored. No weights, no torch."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from diffopd.data import prompt_file
from diffopd.errors import UserError, suggestion
from diffopd.locate import HubId, absolute, download, find_teacher, is_path, nearest_sibling, parse_hub_id
from diffopd.recipe import Positive, Value
from diffopd.settings import Settings, Source, read_toml, validated

Reward = Callable[[list[Any], list[str], list[dict[str, Any]]], Any]
REWARD_MODULE = "diffopd_reward_"  # the beginning of the name of an imported file
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class RewardSettings(Settings):
    """One term of a reward: "file.py:function" from the teacher's folder, or a shipped reward's name."""

    reward: Annotated[str, Field(pattern=r"^(.+\.py:[A-Za-z_]\w*|[a-z][a-z0-9_]*)$")]
    weight: Positive = 1.0
    options: dict[str, Value] = {}


class TeacherPrompts(Settings):
    """The prompt files of a task; paths are absolute once read, a dataset folder stands as its file of the split."""

    train: str | Annotated[list[str], Field(min_length=1)]
    test: str | Annotated[list[str], Field(min_length=1)]

    def files(self, split: str) -> list[Path]:
        """The files of "train" or "test"."""
        given = self.train if split == "train" else self.test
        return [Path(file) for file in ([given] if isinstance(given, str) else given)]


class TeacherCard(Settings):
    """form: an adapter, a full denoiser, the base with adapters off, the student's average, or pictures.

    "pictures" asks no network: the answer at a noised picture is the picture (fine-tuning, as every base is trained).
    num_inference_steps is then the number of noise levels, and the student answers at guidance_scale.
    Its task is scored by `reward`, or by `rewards`: a weighted sum, whose terms may have options.
    """

    can_override: ClassVar[bool] = False

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    base: str
    form: Literal["lora", "full", "base", "ema", "pictures"]
    weights: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    num_inference_steps: Annotated[int, Field(gt=0, le=1000)] = 20
    reward: Annotated[str, Field(pattern=r"^(.+\.py:[A-Za-z_]\w*|[a-z][a-z0-9_]*)$")] | None = None
    rewards: list[RewardSettings] = []
    license: str
    prompts: TeacherPrompts
    _source: Source = PrivateAttr()

    @model_validator(mode="after")
    def _weights_fit_form(self) -> TeacherCard:
        if self.name in ("student", "ema", "base", "default"):
            raise ValueError(f"name {self.name!r} has a meaning of its own here. Choose another.")
        if self.form in ("lora", "full") and not self.weights:
            raise ValueError(f'form = "{self.form}" needs weights = "a file or folder beside this card, or a hub id".')
        if self.form in ("base", "ema", "pictures") and (self.weights or self.sha256):
            raise ValueError(f'form = "{self.form}" has no weights of its own. Remove weights and sha256.')
        if bool(self.reward) == bool(self.rewards):
            raise ValueError('a task is scored by reward = "..." or by [[rewards]], a sum. Give one of the two.')
        return self

    @property
    def path(self) -> Path:
        """teacher.toml."""
        return self._source.path

    @property
    def folder(self) -> Path:
        """The teacher's folder."""
        return self.path.parent

    def place(self, *location: str | int) -> str:
        """'file:line' of a key."""
        return self._source.place(location)

    @property
    def terms(self) -> list[RewardSettings]:
        """What its task is scored by."""
        return self.rewards or [RewardSettings(reward=self.reward)]

    @property
    def hub_weights(self) -> HubId | None:
        """The hub id of the weights, None where they lie beside the card."""
        return hub_weights(self.weights, self.folder) if self.weights else None

    def weights_path(self) -> Path:
        """The local weights: the file of a LoRA, the file or folder of a full denoiser; hub ids are downloaded.

        Raises UserError for weights that are missing or not .safetensors.
        """
        if self.weights is None:
            raise UserError(f"{self.path}: a teacher of form {self.form!r} has no weights.")
        if self.form == "lora":
            return lora_file(self.weights, self.folder, self.place("weights"))
        return find_weights(self.weights, self.folder, self.place("weights"))

    def digest(self) -> str | None:
        """sha256 of the weights, None for a form without. Raises UserError when it is not the card's."""
        if self.weights is None:
            return None
        found = weights_sha256(self.weights_path())
        if self.sha256 and found != self.sha256:
            raise UserError(
                f"{self.place('sha256')}: the card says {self.sha256[:12]}..., the weights at {self.weights} "
                f'are {found[:12]}.... Restore the weights of the card, or correct sha256 = "{found}".'
            )
        return found

    def task_hashes(self) -> dict[str, str]:
        """What its task is made of -> sha256: "train prompts", "test prompts" and the files of its rewards."""
        files = {}
        for split in ("train", "test"):
            held = self.prompts.files(split)
            named = [f" of {path.parent.parent.name}" for path in held] if len(held) > 1 else [""]
            files |= {f"{split} prompts{name}": path for name, path in zip(named, held, strict=True)}
        files |= {file: self.folder / file for file in reward_files(self.terms)}
        return {what: file_sha256(path) for what, path in files.items()}


def teacher_card(name_or_path: str, relative_to: Path | str) -> TeacherCard:
    """The card of a shipped teacher, or of a user's folder by path from `relative_to`.

    Raises UserError naming file, line and key.
    """
    start = Path(relative_to)
    folder = find_teacher(name_or_path, start if start.is_dir() else start.parent)
    data, source = read_toml(folder / "teacher.toml")
    if isinstance(data.get("base"), str):
        data["base"] = absolute(data["base"], folder)
    prompts = data.get("prompts")
    if isinstance(prompts, str):  # a dataset folder with both splits
        prompts = {"train": prompts, "test": prompts}
    if isinstance(prompts, dict):
        data["prompts"] = {split: _located(given, folder, split) for split, given in prompts.items()}
    card = validated(TeacherCard, data, source)
    card._source = source
    return card


def _located(given: Any, folder: Path, split: str) -> Any:
    """Prompt files as absolute paths; anything else as it is, for the validation to refuse."""
    if isinstance(given, list):
        return [_located(file, folder, split) for file in given]
    return str(prompt_file(folder / given, split)) if isinstance(given, str) else given


def hub_weights(spec: str, folder: Path) -> HubId | None:
    """The hub id that `spec` is, None where it names something in `folder`."""
    is_local = (folder / spec).exists() or not is_path(spec)
    return None if is_local else parse_hub_id(spec)


def find_weights(spec: str, folder: Path, place: str) -> Path:
    """The .safetensors file, or a folder with some, that `spec` names: from `folder`, or on the hub.

    Raises UserError, beginning with `place`, for weights that are missing or pickled.
    """
    hub = hub_weights(spec, folder)
    path = download(hub, ["*.safetensors", "*.json"]) if hub else folder / spec
    if path.suffix in PICKLES:
        raise UserError(
            f"{place}: {path.name} is not .safetensors. Pickled weights are never loaded: save them with "
            "save_lora_weights or save_pretrained(safe_serialization=True)."
        )
    if not weight_files(path):
        raise UserError(
            f"{place}: no .safetensors at {path}.{nearest_sibling(path)} Give the weights' file, or the folder they "
            "were saved to with save_lora_weights or save_pretrained."
        )
    return path


def lora_file(spec: str, folder: Path, place: str) -> Path:
    """The one file of a LoRA. Raises UserError as `find_weights`, and for a folder with several files."""
    files = weight_files(find_weights(spec, folder, place))
    if len(files) > 1:
        raise UserError(f"{place}: {folder / spec} has several .safetensors. Name the file of the LoRA.")
    return files[0]


def weight_files(path: Path) -> list[Path]:
    """The .safetensors of a file or folder (of a folder with variants, all of them), sorted."""
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    return [path] if path.is_file() and path.suffix == ".safetensors" else []


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_sha256(path: Path) -> str:
    """sha256 of a .safetensors file; of a folder, of its 'name sha256' lines (one file: that file's own)."""
    digests = []
    for file in weight_files(path):
        digests.append((file.name, file_sha256(file)))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests).encode()).hexdigest()


def reward_files(terms: list[RewardSettings]) -> list[str]:
    """The files of the terms that are functions, each once."""
    return list(dict.fromkeys(term.reward.rpartition(":")[0] for term in terms if ":" in term.reward))


def load_reward(spec: str, folder: Path) -> Reward:
    """The function of "file.py:function", the file taken from `folder`.

    A reward takes (images: list of B PIL images, prompts: B strings, metadata: B dicts) and returns B finite
    floats: in [0, 1] where it alone scores a card's task, else any (a term of a sum, a reward that teaches).
    Raises UserError for a missing file, one that does not import, or a missing function.
    """
    file, _, name = spec.rpartition(":")
    path = (folder / file).resolve()
    if not path.is_file():
        raise UserError(f"reward {spec!r}: there is no file {path}. Give it as file.py:function beside the card.")
    module = _import_file(path, spec)
    function = vars(module).get(name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"reward {spec!r}: {path} has no function {name!r}.{suggestion(name, known)}")
    return function


def forget_rewards() -> None:
    """Let go of what `load_reward` has imported, with whatever networks the files keep; the next call imports anew."""
    for name in [name for name in sys.modules if name.startswith(REWARD_MODULE)]:
        del sys.modules[name]
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _import_file(path: Path, spec: str) -> Any:
    name = f"{REWARD_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        del sys.modules[name]
        raise UserError(f"reward {spec!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
