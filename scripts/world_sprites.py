"""Builds the sprite atlases of the embedded world from four unpacked emoji packages.

    python scripts/world_sprites.py FOLDER

FOLDER holds the unpacked npm packages, each in a folder `<name>-<version>/package`: emoji-datasource-
google 16.0.0 and emoji-datasource-twitter 16.0.0 (64-pixel PNG), @lobehub/fluent-emoji-flat 1.1.0 (SVG,
needs `pip install resvg-py`) and @lobehub/fluent-emoji-3d 1.1.0 (256-pixel WebP; the folder is lobehub-
fluent-emoji-3d-1.1.0). Every drawing is cropped to its visible part and fitted into a 64-pixel square
cell: one row a manner, one column a thing, in the order of `teachers/world.py`. Fluent 3D goes to an
atlas of its own, which nothing is trained on, and so do four objects in Noto's manner.
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

CELL = 64
CODEPOINTS = {
    "apple": "1f34e",
    "rocket": "1f680",
    "cat": "1f431",
    "fish": "1f41f",
    "tree": "1f333",
    "car": "1f697",
    "house": "1f3e0",
    "star": "2b50",
    "umbrella": "2602-fe0f",
    "mushroom": "1f344",
    "penguin": "1f427",
    "frog": "1f438",
}
PACKAGES = {
    "noto": ("emoji-datasource-google-16.0.0", "img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter-16.0.0", "img/twitter/64", "png"),
    "fluent": ("lobehub-fluent-emoji-flat-1.1.0", "assets", "svg"),
    "fluent 3d": ("lobehub-fluent-emoji-3d-1.1.0", "assets", "webp"),
}
# Objects that no training shows, for `tune` to learn.
OBJECTS = {"octopus": "1f419", "robot": "1f916", "cactus": "1f335", "teapot": "1fad6"}
ATLASES = {
    "atlas.png": (("noto", "twemoji", "fluent"), CODEPOINTS),
    "atlas_3d.png": (("fluent 3d",), CODEPOINTS),
    "atlas_objects.png": (("noto",), OBJECTS),
}


def find_drawing(folder: Path, manner: str, codepoint: str) -> Path:
    """The file of one drawing; packages differ in whether they name the variation selector (-fe0f)."""
    package, inside, suffix = PACKAGES[manner]
    root = folder / package / "package" / inside
    for name in (codepoint, codepoint.removesuffix("-fe0f"), f"{codepoint}-fe0f"):
        if (root / f"{name}.{suffix}").is_file():
            return root / f"{name}.{suffix}"
    raise FileNotFoundError(f"no drawing {codepoint}.{suffix} in {root}; unpack {package} there")


def load_drawing(path: Path) -> Image.Image:
    """One drawing as RGBA, cropped to its visible part."""
    if path.suffix == ".svg":
        import resvg_py

        drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=256, height=256))))
    else:
        drawing = Image.open(path)
    drawing = drawing.convert("RGBA")
    return drawing.crop(drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox())


def fit(drawing: Image.Image, size: int) -> Image.Image:
    """Scales the longer side to `size` (with premultiplied alpha) and centres the drawing in a square."""
    scale = size / max(drawing.size)
    shape = tuple(max(1, round(side * scale)) for side in drawing.size)
    scaled = drawing.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (size, size))
    square.alpha_composite(scaled, ((size - scaled.width) // 2, (size - scaled.height) // 2))
    return square


def main(
    folder: Annotated[Path, typer.Argument(help="folder of the unpacked packages")],
    output: Annotated[Path, typer.Option(help="where the atlases go")] = Path("teachers/sprites"),
) -> None:
    """Writes atlas.png (noto, twemoji, fluent), atlas_3d.png (fluent 3d) and atlas_objects.png (noto)."""
    output.mkdir(parents=True, exist_ok=True)
    for name, (manners, codepoints) in ATLASES.items():
        atlas = Image.new("RGBA", (CELL * len(codepoints), CELL * len(manners)))
        for row, manner in enumerate(manners):
            for column, codepoint in enumerate(codepoints.values()):
                drawing = fit(load_drawing(find_drawing(folder, manner, codepoint)), CELL)
                atlas.paste(drawing, (CELL * column, CELL * row))
        atlas.save(output / name, optimize=True)
        typer.echo(f"{output / name}: {len(manners)} manners x {len(codepoints)} drawings")


if __name__ == "__main__":
    typer.run(main)
