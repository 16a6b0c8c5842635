"""Folders of pictures: every layout is read, every mistake is named with its file and line."""

import json
import random
import struct
import zlib

import pytest
from PIL import Image

from diffopd.errors import UserError
from diffopd.image_file import LARGEST, picture
from diffopd.images import read_pictures


def draw(path, color="red", size=(24, 16), mode="RGB", **options):
    Image.new(mode, size, color).save(path, **options)
    return path


def noisy(path, size=(64, 64), **options):
    """A picture whose file is long enough to be cut."""
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1])).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two good pictures with same-name captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("red", "blue"):
        draw(folder / f"{name}.png", name)
        (folder / f"{name}.txt").write_text(f"a {name} dot\n", encoding="utf-8")
    return folder


@pytest.fixture
def listed(folder):
    """The same two pictures with metadata.jsonl."""
    for name in ("red", "blue"):
        (folder / f"{name}.txt").unlink()
    write_metadata(folder, {"file_name": "red.png", "text": "a dot"}, {"file_name": "blue.png", "text": "a sea"})
    return folder


def write_metadata(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def refusal(where, **options):
    with pytest.raises(UserError) as caught:
        read_pictures(where, **options)
    return str(caught.value)


def test_same_name_captions_are_read_in_order_of_name(folder):
    (folder / "red.txt").write_bytes("\ufeffa  red\ndöt ".encode())
    found = read_pictures(folder)
    assert [(p.path.name, p.caption, p.size) for p in found] == [
        ("blue.png", "a blue dot", (24, 16)),
        ("red.png", "a red döt", (24, 16)),
    ]


def test_an_imagefolder_is_read_in_order_of_line_also_from_subfolders(listed):
    (listed / "more").mkdir()
    draw(listed / "more" / "green.png", "green")
    write_metadata(
        listed,
        {"file_name": "red.png", "text": "a dot", "enhanced_text": "a perfectly round dot"},
        {"file_name": "more/green.png", "text": "grass"},
        {"file_name": "blue.png", "text": "a sea"},
    )
    found = read_pictures(listed)
    assert [(p.path.name, p.caption, p.enhanced) for p in found] == [
        ("red.png", "a dot", "a perfectly round dot"),
        ("green.png", "grass", None),
        ("blue.png", "a sea", None),
    ]
    assert found[2].place == f"{listed}/metadata.jsonl:3"


def test_a_caption_may_hold_unusual_line_separators(listed):
    rows = [{"file_name": "red.png", "text": "a\u2028dot\x85"}, {"file_name": "blue.png", "text": "a sea"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (listed / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [p.caption for p in read_pictures(listed)] == ["a\u2028dot", "a sea"]


def test_a_jsonl_may_name_pictures_anywhere(folder, tmp_path):
    file = tmp_path / "elsewhere" / "list.jsonl"
    file.parent.mkdir()
    rows = [{"file_name": str(folder / "red.png"), "text": "a"}, {"file_name": "../pictures/blue.png", "text": "b"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [p.path.name for p in read_pictures(file)] == ["red.png", "blue.png"]


def test_one_instance_prompt_may_stand_for_all(folder):
    for caption in folder.glob("*.txt"):
        caption.unlink()
    assert {p.caption for p in read_pictures(folder, "a photo of sks")} == {"a photo of sks"}
    assert "has no caption" in refusal(folder)
    assert "instance prompt is empty" in refusal(folder, instance_prompt=" ")


def test_every_mistake_is_named_at_once(folder):
    (folder / "empty.png").write_bytes(b"")
    draw(folder / "alone.png", "green")
    (folder / "blue.txt").write_text(" \n")
    (folder / "orphan.txt").write_text("who am I")
    (folder / "empty.txt").write_text("nothing")
    said = refusal(folder)
    for part in ("empty.png: the file is empty", "alone.png: has no caption", "blue.txt: the caption is empty"):
        assert part in said
    assert "orphan.txt: there is no picture of this name" in said
    assert len(said.splitlines()) == 4


def test_only_the_first_ten_mistakes_are_shown(folder):
    for number in range(13):
        draw(folder / f"p{number}.png", (number, 0, 0))
    said = refusal(folder).splitlines()
    assert len(said) == 11 and said[-1] == "... and 3 more"


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path, size=(30_000, 30_000)):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def sixteen_bits(path):
    """A 16-bit RGB PNG, which Pillow itself reads as 8-bit."""
    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def animation(path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def broken_checksum(path):
    noisy(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def tiff_16(path):
    Image.new("I;16", (8, 8), 7).save(path)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("empty.jpg", lambda p: p.write_bytes(b""), "empty (0 bytes)"),
        ("text.png", lambda p: p.write_text("not a picture"), "not a picture that can be read"),
        ("cut.jpg", lambda p: cut(noisy(p, quality=95)), "cannot be read to its end"),
        ("cut.png", lambda p: cut(noisy(p)), "cannot be read to its end"),
        ("cut.webp", lambda p: cut(noisy(p, lossless=True)), "read"),
        ("flipped.png", broken_checksum, "cannot be read to its end"),
        ("moving.gif", animation, "animated (3 frames)"),
        ("moving.png", animation, "animated (3 frames)"),
        ("moving.webp", animation, "animated (3 frames)"),
        ("print.jpg", lambda p: draw(p, (0, 9, 9, 9), mode="CMYK"), "CMYK"),
        ("grey16.png", lambda p: draw(p, 700, mode="I;16"), "16 or more bits"),
        ("rgb16.png", sixteen_bits, "16 or more bits"),
        ("grey16.tiff", tiff_16, "16 or more bits"),
        ("lab.tiff", lambda p: draw(p, 0, mode="LAB"), "colour mode LAB"),
        ("bomb.png", bomb, " pixels; allowed are"),
        ("folder.png", lambda p: p.mkdir(), "is a folder or a broken link"),
        ("gone.png", lambda p: p.symlink_to(p.parent / "nowhere.png"), "is a folder or a broken link"),
        ("large.png", lambda p: bomb(p, (8200, 8200)), "too large (8200 x 8200 pixels"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_with_the_reason(folder, name, make, reason):
    make(folder / name)
    (folder / name).with_suffix(".txt").write_text("a thing")
    said = refusal(folder)
    assert said.startswith(f"{folder / name}: ") and reason in said and len(said.splitlines()) == 1


def test_the_limit_is_below_what_a_header_may_claim():
    assert 8200 * 8200 > LARGEST > 8000 * 8000


def test_a_bad_picture_of_metadata_is_named_with_file_and_line(listed):
    (listed / "blue.png").write_bytes(b"")
    assert refusal(listed) == (
        f"{listed}/metadata.jsonl:2: {listed}/blue.png: the file is empty (0 bytes). Copy it anew or remove it."
    )


def test_pictures_that_show_the_same_are_refused_also_in_another_format(folder):
    draw(folder / "again.bmp", "red")
    (folder / "again.txt").write_text("the same")
    assert "red.png: shows the same as again.bmp" in refusal(folder)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file": "red.png", "text": "a"}, "unknown column 'file'. Did you mean \"file_name\"?"),
        ({"file_name": "red.png"}, "the column 'text' (its caption) is missing"),
        ({"file_name": "red.png", "text": " "}, "the column 'text' is empty"),
        ({"file_name": "red.png", "text": 3}, "the column 'text' is empty or not a string"),
        ({"file_name": "red.png", "text": "a", "enhanced_text": ""}, "'enhanced_text' is empty"),
        ({"file_name": "../outside.png", "text": "a"}, "outside the folder"),
        ({"file_name": "none.png", "text": "a"}, "there is no picture"),
        ({"file_name": "blue.png", "text": "a"}, "is named in"),
        ({"file_name": "a" * 3000, "text": "a"}, "is no file name (["),
        ({"file_name": "a\0.png", "text": "a"}, "is no file name (embedded null byte)"),
        (["red.png", "a"], "needs a JSON object"),
        ("{broken", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_wrong_line_of_metadata_is_named(listed, row, reason):
    draw(listed.parent / "outside.png", "green")
    write_metadata(listed, {"file_name": "blue.png", "text": "a sea"}, row)
    said = refusal(listed)
    assert said.startswith(f"{listed}/metadata.jsonl:2: ") and reason in said


def test_a_link_out_of_the_folder_is_outside_of_it(listed):
    outside = draw(listed.parent / "outside.png", "green")
    (listed / "link.png").symlink_to(outside)
    write_metadata(listed, {"file_name": "link.png", "text": "a"}, {"file_name": "blue.png", "text": "a sea"})
    assert "metadata.jsonl:1: link.png lies outside the folder" in refusal(listed)


def test_a_picture_without_a_line_is_refused(listed):
    draw(listed / "forgotten.png", "green")
    assert f"{listed}/forgotten.png: has no line in" in refusal(listed)


def test_captions_that_are_not_utf8_are_named_with_their_line(folder, listed):
    (listed / "metadata.jsonl").write_bytes(b'{"file_name": "red.png", "text": "ok"}\n{"file_name": "bl\xfc.png"}\n')
    assert "metadata.jsonl:2: is not UTF-8 text" in refusal(listed)
    (listed / "metadata.jsonl").unlink()
    (folder / "red.txt").write_bytes(b"caf\xe9")
    (folder / "blue.txt").write_text("sea")
    assert "red.txt:1: is not UTF-8 text (byte 3)" in refusal(folder)


def test_two_sources_of_captions_are_refused(folder, listed, tmp_path):
    (listed / "red.txt").write_text("a dot")
    assert "red.txt lies beside it as well. Remove the .txt files, or metadata.jsonl" in refusal(listed)
    assert "Keep one of the two" in refusal(listed, instance_prompt="sks")
    (listed / "metadata.jsonl").unlink()
    assert "Keep one of the two" in refusal(listed, instance_prompt="sks")


def test_what_phones_and_other_systems_write_is_read(folder):
    """A camera's JPEG with a second frame behind it is its first; hidden companions of files are not looked at."""
    first, behind = (Image.new("RGB", (24, 16), color) for color in ("green", "grey"))
    first.save(folder / "phone.jpg", "MPO", save_all=True, append_images=[behind], quality=95)
    (folder / "phone.txt").write_text("a meadow")
    draw(folder / "web.jfif", "yellow", format="JPEG")
    (folder / "web.txt").write_text("a canary")
    (folder / "._red.png").write_bytes(b"\0\5\x16\7")
    assert [p.path.name for p in read_pictures(folder)] == ["blue.png", "phone.jpg", "red.png", "web.jfif"]
    shown = picture(folder / "phone.jpg").getpixel((5, 5))
    assert shown[1] > 100 > 20 > max(shown[0], shown[2])


def test_one_picture_is_too_few(folder):
    (folder / "red.png").unlink()
    (folder / "red.txt").unlink()
    assert "holds 1 picture; at least 2" in refusal(folder)


def test_what_would_be_passed_over_is_refused(folder, tmp_path):
    (folder / "metadata.csv").write_text("a,b")
    assert "metadata.csv: is not read" in refusal(folder)
    (folder / "metadata.csv").unlink()
    (folder / "phone.HEIC").write_bytes(b"x")
    assert ".HEIC pictures are not read" in refusal(folder)
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("x")
    assert "notes.md: is a file, not a folder. Give a folder of pictures" in refusal(tmp_path / "notes.md")
    assert f"Pictures are in {folder}" in refusal(tmp_path)


def test_transparent_and_palette_pictures_are_laid_over_white(folder):
    draw(folder / "red.png", (0, 0, 0, 0), mode="RGBA")
    found = {p.path.name: p for p in read_pictures(folder)}
    assert found["red.png"].is_transparent and not found["blue.png"].is_transparent
    assert picture(folder / "red.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_is_turned_as_its_camera_says_and_cut_to_a_size(folder):
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    image.save(folder / "red.jpg", exif=turned, quality=95)
    (folder / "red.png").unlink()
    assert {p.path.name: p.size for p in read_pictures(folder)}["red.jpg"] == (20, 40)
    small = picture(folder / "red.jpg", (10, 10))
    assert small.size == (10, 10)
    top, bottom = small.getpixel((5, 1)), small.getpixel((5, 8))
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]
