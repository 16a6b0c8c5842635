"""The check of a teacher before tuning: whether its context brings it nearer to the pictures."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image
from run_helpers import prepared
from tuning import asked

from diffopd.errors import UserError
from diffopd.looks import cut_captions
from diffopd.run_folder import RunFolder
from diffopd.teacher_check import Verdict, check_teacher, not_step_distilled
from diffopd.tune import prepare, task_written


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


def test_a_context_that_helps_few_of_the_pictures_does_not_pass():
    near, far = Verdict("pixels", 0.1, 0.2, 0.6, 0.1, 0.2, None), Verdict("pixels", 0.1, 0.2, 0.5, 0.1, 0.2, None)
    assert near.passed and not far.passed


def test_a_model_that_is_dull_in_few_steps_is_explained():
    dull = Verdict("pixels", 0.1, 0.2, 1.0, 0.1, 0.2, few_step_sharpness=0.4)
    assert "40 % of the sharpness that it has in 16" in not_step_distilled(dull, 4)
    assert not_step_distilled(Verdict("pixels", 0.1, 0.2, 1.0, 0.1, 0.2, few_step_sharpness=0.95), 4) is None


def test_captions_that_the_model_does_not_read_to_their_end_are_named(run_with_teacher):
    """CLIP's tokenizer here has 24 places, one a letter."""
    pipeline = run_with_teacher[0].student.pipeline
    assert cut_captions(pipeline, ["a dot", "a red dot"]) is None
    told = cut_captions(pipeline, ["a dot", "a dot that is by far too large"])
    assert "1 of 2 captions are longer than the 24 tokens" in told and "'a dot that is by far too large'" in told
    reads_on = SimpleNamespace(components={**pipeline.components, "tokenizer_2": SimpleNamespace()})
    assert cut_captions(reads_on, ["a dot that is by far too large"]) is None
