"""What the checks of a recipe say when something is wrong, and how a test spoils a teacher's card."""

import pytest

from diffopd.errors import UserError
from diffopd.preflight import check
from diffopd.recipe import read_recipe


def refusal(path, *overrides):
    """The words of the error of a recipe with `overrides`."""
    with pytest.raises(UserError) as caught:
        check(read_recipe(path, list(overrides)), hash_weights=True)
    return str(caught.value)


def edit(folder, before, after):
    """Change words of a teacher's card that are there."""
    path = folder / "teacher.toml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
