"""An export on the hub: what travels, and the words to say before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffopd.errors import UserError
from diffopd.locate import parse_hub_id


def check_push(repo: str) -> None:
    """Raise UserError, before anything is made, where a push to `repo` cannot succeed: no id, no token, offline."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    hub = parse_hub_id(repo)
    if hub is None or hub.subfolder or hub.revision:
        raise UserError(f"--push-to-hub {repo}: is not a repository id. Give owner/name.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: is not a repository id ({error}). Give owner/name.") from error
    if is_offline_mode():
        raise UserError("--push-to-hub: HF_HUB_OFFLINE is set. Unset it; nothing was uploaded.")
    if not get_token():
        raise UserError(
            "--push-to-hub: there is no Hugging Face token. Log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write. Nothing was uploaded."
        )


def push(export_dir: Path, repo: str, folders: Sequence[str], card: str) -> str:
    """Upload forms of an export as one commit and return its address; the repository is made where there is none.

    folders: those of the forms; the pipeline's becomes the top of the repository, so that
    `from_pretrained("owner/name")` loads it, the others keep theirs. card: the repository's README.md. Raises UserError
    where the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError  # of its HTTP client, which its versions change

    operations = [CommitOperationAdd(place, str(file)) for place, file in uploads(export_dir, folders).items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"Export of {export_dir.parent.name}")
    except (HTTPError, OSError) as error:
        reason = "".join(str(error).splitlines()[:1])
        raise UserError(
            f"--push-to-hub {repo}: the hub could not be reached or refused ({type(error).__name__}: {reason}). The "
            f"export is complete in {export_dir}; check the network, the name and that your token may write to it."
        ) from error
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}"


def uploads(export_dir: Path, folders: Sequence[str]) -> dict[str, Path]:
    """Place in the repository -> file of an export, the model card aside."""
    files = [file for name in folders for file in sorted((export_dir / name).rglob("*")) if file.is_file()]
    found = {file.relative_to(export_dir).as_posix().removeprefix("pipeline/"): file for file in files}
    return {place: file for place, file in found.items() if place != "README.md"}
