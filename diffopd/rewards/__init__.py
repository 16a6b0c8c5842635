"""Shipped rewards by name. Each module stands alone: it imports nothing of diffopd, and heavy packages only when made.

A reward is made once, with its options, and called as reward(images, prompts, metadata) -> (B,). `packages` of its
class are the ones to be imported that a plain installation may lack; its docstring names the extra that has them.
Its `weights` are the options that name a hub id, a folder or a file of weights;
its `needs` are the options that have no default: name -> what to give and why.
A class whose rewards may refuse a row has check(prompts, metadata, *, download, **options), the options those that it
is made with: a ValueError for such a row, from no network's weights; download: whether a config may be fetched for it.
"""

SHIPPED = {
    "aesthetic": "diffopd.rewards.clip:Aesthetic",
    "clip_score": "diffopd.rewards.clip:ClipScore",
    "composition": "diffopd.rewards.composition:Composition",
    "dino_similarity": "diffopd.rewards.dino:DinoSimilarity",
    "hps_v2": "diffopd.rewards.clip:HPSv2",
    "jpeg_compressibility": "diffopd.rewards.pixels:JpegCompressibility",
    "jpeg_incompressibility": "diffopd.rewards.pixels:JpegIncompressibility",
    "ocr": "diffopd.rewards.ocr:OCR",
    "pick_score": "diffopd.rewards.clip:PickScore",
    "sharpness": "diffopd.rewards.pixels:Sharpness",
}
