import pytest

from diffopd.data import PromptRow, asked_of, check_tasks, prompt_file, read_prompts
from diffopd.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_files_hold_one_prompt_a_line(tmp_path):
    path = write(tmp_path / "train.txt", "a dot\n ein Käse \n")
    assert read_prompts(path) == [PromptRow("a dot"), PromptRow("ein Käse")]


def test_jsonl_rows_keep_their_metadata(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a dot", "word": "KEA", "n": 2}\n')
    assert read_prompts(path) == [PromptRow("a dot", {"word": "KEA", "n": 2})]


def test_pictures_that_a_row_names_lie_beside_its_file_unless_their_paths_are_absolute(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.png").write_bytes(b"")
    lines = '{"prompt": "a", "file_name": "a.png", "reference": "more/b.png"}\n{"prompt": "b", "reference": "/c.png"}\n'
    lines += '{"prompt": "c", "reference": 3}\n{"prompt": "d", "reference": "a text"}\n'
    one, two, three, four = read_prompts(write(tmp_path / "a.jsonl", lines))
    here = tmp_path.resolve()
    assert one.metadata == {"file_name": str(here / "a.png"), "reference": str(here / "more/b.png")}
    assert two.metadata == {"reference": "/c.png"}
    assert three.metadata == {"reference": 3} and four.metadata == {"reference": "a text"}


@pytest.mark.parametrize(
    ("name", "text", "place", "reason"),
    [
        ("a.txt", "one\n\ntwo\n", "a.txt:2", "empty line"),
        ("a.txt", "", "a.txt", "no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n\n', "a.jsonl:2", "empty line"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "a.jsonl:2", "not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n', "a.jsonl:1", 'string "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', "a.jsonl:1", 'string "prompt"'),
        ("a.jsonl", '["x"]\n', "a.jsonl:1", 'string "prompt"'),
        ("a.jsonl", '{"prompt": "  "}\n', "a.jsonl:1", "is empty"),
        ("a.csv", "x\n", "a.csv", ".txt"),
    ],
)
def test_bad_prompt_files_are_named_with_their_line(tmp_path, name, text, place, reason):
    with pytest.raises(UserError) as caught:
        read_prompts(write(tmp_path / name, text))
    assert f"{tmp_path}/{place}:" in str(caught.value) and reason in str(caught.value)


def test_a_missing_file_and_another_encoding_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_rows_of_an_uncovered_or_another_teachers_task_are_refused(tmp_path):
    rows = [PromptRow("a"), PromptRow("b", {"task": "text"})]
    check_tasks(rows[:1], tmp_path / "p", "dots", ["dots"])
    with pytest.raises(UserError, match="p:2: task 'text' is covered by no teacher"):
        check_tasks(rows, tmp_path / "p", "dots", ["dots"])
    with pytest.raises(UserError, match="p:2: task 'text' stands among the prompts of teacher 'dots'"):
        check_tasks(rows, tmp_path / "p", "dots", ["dots", "text"])


def test_dataset_folders_hold_a_file_per_split(tmp_path):
    write(tmp_path / "train_metadata.jsonl", '{"tag": "two_object", "prompt": "a photo of two dots"}\n')
    write(tmp_path / "test.txt", "a dot\na line\n")
    assert read_prompts(tmp_path, "train") == [PromptRow("a photo of two dots", {"tag": "two_object"})]
    assert read_prompts(tmp_path, "test") == [PromptRow("a dot"), PromptRow("a line")]
    with pytest.raises(UserError, match="test.txt:1: empty line"):
        write(tmp_path / "test.txt", "\na line\n")
        read_prompts(tmp_path, "test")


def test_a_dataset_folder_without_a_split_or_with_two_files_of_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="no prompts of the train split.*train.txt"):
        prompt_file(tmp_path, "train")
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "train.jsonl", '{"prompt": "a"}\n')
    with pytest.raises(UserError, match="train.jsonl, train.txt.*Name one"):
        prompt_file(tmp_path, "train")


def test_line_separators_of_unicode_are_part_of_a_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a\u2028dot"}\r\n{"prompt": "b"}')
    assert read_prompts(path) == [PromptRow("a\u2028dot"), PromptRow("b")]


def test_several_files_alternate_until_each_is_at_its_end(tmp_path):
    files = [str(write(tmp_path / f"{name}.txt", text)) for name, text in (("a", "a1\na2\na3\n"), ("b", "b1\n"))]
    assert [row.prompt for row in read_prompts(files)] == ["a1", "b1", "a2", "a3"]
    with pytest.raises(UserError, match="none.txt"):
        read_prompts([files[0], str(tmp_path / "none.txt")])


def test_rows_that_ask_for_the_same_in_other_words_or_beside_another_picture_are_equal():
    rows = [PromptRow("a cat", {"thing": "cat", "file_name": "0.png"}), PromptRow("one cat", {"thing": "cat"})]
    cat, same, dog, plain, again = asked_of([*rows, PromptRow("a dog", {"thing": "dog"}), *[PromptRow("x")] * 2])
    assert cat == same and plain == again and len({cat, dog, plain}) == 3


def test_a_category_is_not_what_rows_ask_for():
    rows = [PromptRow(f"prompt {n}", {"length": ("short", "long")[n % 2]}) for n in range(200)]
    assert asked_of(rows) == [row.prompt for row in rows]
    words = [PromptRow(f"prompt {n}", {"word": f"word {n % 30}"}) for n in range(200)]
    assert len(set(asked_of(words))) == 30


@pytest.mark.parametrize("metadata", [{}, {"task": "a"}, {"file_name": "0.png", "bucket": [8, 8]}, {"source": "bench"}])
def test_metadata_that_tells_no_rows_apart_leaves_the_prompt(metadata):
    assert asked_of([PromptRow(prompt, metadata) for prompt in ("x", "y", "x")]) == ["x", "y", "x"]
