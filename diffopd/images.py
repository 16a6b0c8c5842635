"""A folder of pictures with captions, read whole or refused with every mistake named.

Three layouts: same-name .txt captions beside the pictures; an imagefolder with metadata.jsonl; a .jsonl anywhere.
Instead of captions, one instance prompt may stand for all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffopd.errors import UserError, suggestion
from diffopd.image_file import BadPicture, examine

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREADABLE = (".heic", ".heif", ".avif", ".svg", ".psd", ".raw", ".cr2", ".nef", ".dng", ".jxl", ".jp2", ".tga")
METADATA = "metadata.jsonl"
OTHER_METADATA = ("metadata.csv", "metadata.parquet")
COLUMNS = {"file_name": "the picture", "text": "its caption", "enhanced_text": "optional: a richer caption"}
SHOWN = 10  # mistakes named at once


@dataclass(frozen=True)
class Picture:
    """One picture and what is said of it. pixels: their sha256; place: the file, or file and line, that named it."""

    path: Path
    caption: str
    enhanced: str | None
    size: tuple[int, int]
    pixels: str
    is_transparent: bool
    place: str


@dataclass(frozen=True)
class _Named:
    """A picture that a layout named, not yet opened."""

    path: Path
    caption: str
    enhanced: str | None
    place: str


def read_pictures(where: Path | str, instance_prompt: str | None = None) -> list[Picture]:
    """The pictures of a folder or .jsonl file, in order of name or line.

    Raises UserError that names every mistake with file and line: pictures that cannot be used (`examine`),
    two equal ones, captions missing, empty or not UTF-8, unknown columns, paths outside the folder, fewer than two.
    """
    where = Path(where).expanduser()
    if instance_prompt is not None and not instance_prompt.strip():
        raise UserError("The instance prompt is empty. Write one, such as 'a photo of sks dog', or leave it out.")
    mistakes: list[str] = []
    named = _named(where, instance_prompt, mistakes)
    pictures = [found for each in named if (found := _opened(each, mistakes))]
    _refuse_equal(pictures, mistakes)
    if mistakes:
        more = f"\n... and {len(mistakes) - SHOWN} more" if len(mistakes) > SHOWN else ""
        raise UserError("\n".join(mistakes[:SHOWN]) + more)
    if len(pictures) < 2:
        raise UserError(
            f"{where}: holds {len(pictures)} picture{'s' * (len(pictures) != 1)}; at least 2 are needed, 10 to 30 "
            "work well. One picture would only be memorised."
        )
    return pictures


def _named(where: Path, instance_prompt: str | None, mistakes: list[str]) -> list[_Named]:
    if where.is_file() and where.suffix == ".jsonl":
        _refuse_two_captions(where, instance_prompt)
        return _rows(where, mistakes, fenced=False)
    if not where.is_dir():
        wrong = "is a file, not a folder" if where.is_file() else "there is no such folder"
        raise UserError(
            f"{where}: {wrong}. Give a folder of pictures (captions in .txt files of the same names or "
            f"in {METADATA}), or a .jsonl file."
        )
    _refuse_other_layouts(where)
    metadata = where / METADATA
    files = [path for path in sorted(where.iterdir()) if _is_picture(path)]
    captions = [path for path in sorted(where.glob("*.txt")) if not path.name.startswith(".")]
    if instance_prompt is not None:
        _refuse_two_captions(metadata if metadata.is_file() else captions[0] if captions else None, instance_prompt)
        return [_Named(path, instance_prompt.strip(), None, str(path)) for path in files]
    if metadata.is_file():
        if captions:
            raise UserError(
                f"{metadata}: captions come from here, but {captions[0].name} lies beside it as well. Remove the .txt "
                f"files, or {METADATA}."
            )
        rows = _rows(metadata, mistakes, fenced=True)
        _refuse_unlisted(files, rows, metadata, mistakes)
        return rows
    return _with_text_files(files, captions, mistakes)


def _refuse_two_captions(source: Path | None, other: str | None) -> None:
    if source is not None and other is not None:
        raise UserError(
            f"{source}: captions come from here and from {other!r} as well. Keep one of the two: captions for each "
            "picture, or one instance prompt for all."
        )


def _refuse_other_layouts(folder: Path) -> None:
    """Files that look like part of the data and would be passed over in silence."""
    for path in sorted(folder.iterdir()):
        if path.name in OTHER_METADATA:
            raise UserError(f'{path}: is not read. Write {METADATA}: {{"file_name": "a.png", "text": "..."}} a line.')
        if path.suffix.lower() in UNREADABLE and not path.name.startswith("."):
            raise UserError(f"{path}: {path.suffix} pictures are not read. Save it as PNG, JPEG or WebP.")
    if any(map(_is_picture, folder.iterdir())) or (folder / METADATA).is_file():
        return
    inside = sorted({str(p.parent) for p in folder.glob("*/*") if _is_picture(p)})
    hint = f" Pictures are in {', '.join(inside[:3])}: give that folder, or list them in {METADATA}." if inside else ""
    raise UserError(f"{folder}: holds no pictures ({', '.join(PICTURES)}).{hint}")


def _is_picture(path: Path) -> bool:
    """Hidden files are none: some systems lay "._a.jpg" beside every a.jpg."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _with_text_files(files: list[Path], captions: list[Path], mistakes: list[str]) -> list[_Named]:
    named, stems = [], {path.stem for path in files}
    mistakes += [
        f"{c}: there is no picture of this name. Remove or rename it." for c in captions if c.stem not in stems
    ]
    for path in files:
        file = path.with_suffix(".txt")
        if not file.is_file():
            mistakes.append(f"{path}: has no caption. Write it to {file.name}, or give one instance prompt for all.")
            continue
        caption = _text(file, mistakes)
        if caption is not None and not caption.strip():
            mistakes.append(f"{file}: the caption is empty. Write one.")
        elif caption is not None:
            named.append(_Named(path, " ".join(caption.split()), None, str(path)))
    return named


def _text(file: Path, mistakes: list[str]) -> str | None:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        mistakes.append(f"{file}:{line}: is not UTF-8 text (byte {error.start}). Save the file as UTF-8.")
    except OSError as error:
        mistakes.append(f"{file}: cannot be read ({error.strerror}).")
    return None


def _rows(file: Path, mistakes: list[str], *, fenced: bool) -> list[_Named]:
    """The lines of a .jsonl file; fenced: its pictures must lie in its folder."""
    text = _text(file, mistakes)
    named: list[_Named] = []
    seen: dict[Path, str] = {}
    lines = (text or "").removesuffix("\n").split("\n")  # captions may hold other separators, such as U+2028
    for number, line in enumerate(lines if text else [], start=1):
        place = f"{file}:{number}"
        try:
            row = _row(line)
            path = _path_of(row["file_name"], file.parent, fenced=fenced)
            if path in seen:
                raise ValueError(f"{row['file_name']} is named in {seen[path]} already. Remove one of the lines.")
        except ValueError as error:
            mistakes.append(f"{place}: {error}")
            continue
        seen[path] = place
        enhanced = row.get("enhanced_text")
        named.append(_Named(path, row["text"].strip(), enhanced.strip() if enhanced else None, place))
    return named


def _row(line: str) -> dict[str, Any]:
    """One line's columns. Raises ValueError with a reason."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno}). Correct that line.") from error
    if not isinstance(row, dict):
        raise ValueError('needs a JSON object, such as {"file_name": "a.png", "text": "a red dot"}.')
    unknown = next((key for key in row if key not in COLUMNS), None)
    if unknown is not None:
        raise ValueError(f"unknown column {unknown!r}.{suggestion(unknown, COLUMNS)}")
    for key in COLUMNS:
        if key not in row and key != "enhanced_text":
            raise ValueError(f"the column {key!r} ({COLUMNS[key]}) is missing. Add it.")
        if key in row and not (isinstance(row[key], str) and row[key].strip()):
            raise ValueError(f"the column {key!r} is empty or not a string. Write {COLUMNS[key].split(': ')[-1]}.")
    return row


def _path_of(name: str, folder: Path, *, fenced: bool) -> Path:
    """Raises ValueError for a file that is not there or, where fenced, outside the folder."""
    try:
        path = (folder / name).resolve()
        is_there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a null byte
        raise ValueError(
            f"{name[:80]!r} is no file name ({str(error)[:80]}). Correct it or remove the line."
        ) from error
    if fenced and not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside the folder. Copy it in, or give the .jsonl file itself as --images.")
    if not is_there:
        raise ValueError(f"there is no picture {path}. Correct the name or remove the line.")
    return path


def _refuse_unlisted(files: list[Path], rows: list[_Named], metadata: Path, mistakes: list[str]) -> None:
    listed = {row.path for row in rows}
    if not mistakes:  # a broken line may be the one that names it
        mistakes += [f"{path}: has no line in {metadata}. Add one." for path in files if path.resolve() not in listed]


def _opened(named: _Named, mistakes: list[str]) -> Picture | None:
    try:
        facts = examine(named.path)
    except BadPicture as error:
        what = named.place if named.place == str(named.path) else f"{named.place}: {named.path}"
        mistakes.append(f"{what}: {error}")
        return None
    said = (named.caption, named.enhanced)
    return Picture(named.path.resolve(), *said, facts.size, facts.pixels, facts.is_transparent, named.place)


def _refuse_equal(pictures: list[Picture], mistakes: list[str]) -> None:
    first: dict[str, Picture] = {}
    for picture in pictures:
        twin = first.setdefault(picture.pixels, picture)
        if twin is not picture:
            mistakes.append(f"{picture.place}: shows the same as {twin.path.name}. Remove one of the two.")
