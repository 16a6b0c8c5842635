import json

from refused import refusal

from diffopd.preflight import check
from diffopd.recipe import read_recipe


def test_pictures_of_data_states_are_checked_before_anything_is_written(own_recipe, own_teachers, tmp_path):
    data = "objective.states=data"
    train = own_teachers[0] / "prompts" / "train.jsonl"
    assert f"{train}:1: the row names no picture" in refusal(own_recipe, data)
    rows = [{"prompt": f"dot {n}", "file_name": "dot.png"} for n in range(3)]
    (train.parent / "dots.png").write_bytes(b"")
    for teacher in own_teachers:
        file = teacher / "prompts" / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refusal(own_recipe, data)
    assert f"{train}:1: there is no picture" in text and f'Did you mean "{train.parent / "dots.png"}"?' in text
    for teacher in own_teachers:
        (teacher / "prompts" / "dot.png").write_bytes(b"")
    tested, validated = own_teachers[0] / "prompts" / "test.jsonl", (data, "train.validate_every=1")
    assert f"{tested}:1: the row names no picture" in refusal(own_recipe, data), "the first are for trajectories"
    for teacher in own_teachers:
        more = [{"prompt": f"more {n}"} for n in range(2)]
        file = teacher / "prompts" / "test.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *more)))
    check(read_recipe(own_recipe, [data]))
    assert f"{tested}:4: the row names no picture" in refusal(own_recipe, *validated)
    assert f"{tested}:5: the row names no picture" in refusal(own_recipe, *validated, "train.batch_size=1")
    assert not (tmp_path / "run").exists()


def test_more_test_prompts_than_there_are_is_refused(own_recipe):
    assert "'dots' has 2 test prompts" in refusal(own_recipe, "evaluate.num_prompts=3")
