"""An export on the hub: what travels, and the words to say before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffopd.errors import UserError
from diffopd.locate import parse_hub_id

LICENSES = frozenset(  # what the hub takes as `license:` of a card (its page "Licenses"); of all others it takes none
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0
    gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
    openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)


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
    where the hub cannot be reached, or refuses the upload or what the card's head says.
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
    except ValueError as error:  # how the client tells that the hub refused what the card's head says
        raise UserError(
            f"--push-to-hub {repo}: the hub refused the model card ({' '.join(str(error).split())}). The repository is "
            f"there and got nothing. The export is complete in {export_dir}: correct the head of its README.md and "
            "upload the folder with `hf upload`."
        ) from error
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}"


def uploads(export_dir: Path, folders: Sequence[str]) -> dict[str, Path]:
    """Place in the repository -> file of an export, the model card aside."""
    files = [file for name in folders for file in sorted((export_dir / name).rglob("*")) if file.is_file()]
    found = {file.relative_to(export_dir).as_posix().removeprefix("pipeline/"): file for file in files}
    return {place: file for place, file in found.items() if place != "README.md"}
