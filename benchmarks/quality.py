"""How often each flag comes on: on good smears, on pictures that are none, and on spoilt smears.

    python benchmarks/quality.py ../shared/data --limit 100

prints Markdown tables. Good smears are those of the data folder (`bbbc041seg`, `bccd`) and
generated ones; what is no smear is drawn here or comes with scikit-image; smears are spoilt by blur
and gain.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image, ImageDraw, ImageFont

import bcseg_batch.weights
from bcseg_batch.errors import ImageError
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.postprocess import mask_from_probability, probability
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.segment.quality import assess
from bcseg_batch.store.images import decode_image
from bcseg_training.dataset import read_pair, usable_pairs
from bcseg_training.profile import measure_image
from bcseg_training.synthetic import synthesize_numbered

Bytes = npt.NDArray[np.uint8]
FLAGS = (
    "out_of_focus",
    "over_exposed",
    "under_exposed",
    "no_cells",
    "too_crowded",
    "not_a_smear",
    "unlike_training",
)
PHOTOGRAPHS = ("astronaut", "cat", "chelsea", "coffee", "rocket", "retina", "motorcycle_left")
WORDS = ["cell", "count", "patient", "sample", "report", "of", "the", "12.4", "g/dl"]


def files(folder: Path, limit: int) -> Iterator[Bytes]:
    every = sorted(folder.iterdir())
    for path in every[:: max(1, len(every) // limit)][:limit]:
        yield decode_image(path, max_pixels=10**8).pixels


def drawn_smears(style: str, limit: int) -> Iterator[Bytes]:
    for index in range(min(limit, 30)):
        yield synthesize_numbered(91, index, shape_hw=(512, 512), style=style).image  # type: ignore[arg-type]


def text_pages() -> Iterator[Bytes]:
    rng = np.random.default_rng(1)
    for number in range(6):
        page = Image.new("RGB", (1240, 1754), (255, 255, 255 - 20 * (number % 2)))
        font = ImageFont.load_default(size=16 + 6 * number)
        for y in range(60, 1700, round(1.5 * (16 + 6 * number))):
            ImageDraw.Draw(page).text((60, y), " ".join(rng.choice(WORDS, 10)), "black", font)
        yield np.asarray(page)


def screenshots() -> Iterator[Bytes]:
    rng = np.random.default_rng(2)
    for _ in range(6):
        screen = Image.new("RGB", (1920, 1080), tuple(rng.integers(200, 256, 3).tolist()))
        draw = ImageDraw.Draw(screen)
        for _ in range(30):
            x, y = (int(v) for v in rng.integers(0, (1700, 1000)))
            width, height = (int(v) for v in rng.integers((40, 20), (600, 300)))
            fill = tuple(rng.integers(0, 256, 3).tolist())
            draw.rectangle((x, y, x + width, y + height), fill, "grey")
            draw.text((x + 5, y + 5), " ".join(rng.choice(WORDS, 4)), "black")
        yield np.asarray(screen)


def photographs() -> Iterator[Bytes]:
    for path in sorted(Path(skimage.data.__file__).parent.iterdir()):
        if path.stem in PHOTOGRAPHS:
            try:
                yield decode_image(path, max_pixels=10**8).pixels
            except ImageError:
                continue


def plain() -> Iterator[Bytes]:
    for value in (0, 128, 255):
        yield np.full((600, 800, 3), value, np.uint8)
    yield np.random.default_rng(3).integers(0, 256, (600, 800, 3), dtype=np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=100, help="images of each data set")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(bcseg_batch.weights.__file__).with_name("default.safetensors"),
    )
    args = parser.parse_args()
    loaded = load_checkpoint(args.checkpoint)
    predictor = open_predictor(loaded.model, loaded.spec.input_size_px, dtype="float32")

    def names_of(pixels: Bytes) -> list[str]:
        measures, count = measure_image(loaded, predictor, pixels)
        return [flag.name for flag in assess(measures, count, loaded.spec.training_statistics)]

    def row(what: str, images: Iterable[Bytes]) -> None:
        found = [names_of(pixels) for pixels in images]
        counts = Counter(name for names in found for name in names)
        numbers = " | ".join(str(counts[name] or "") for name in FLAGS)
        print(f"| {what} | {len(found)} | {sum(map(bool, found))} | {numbers} |", flush=True)

    print(f"| images | number | with a flag | {' | '.join(FLAGS)} |")
    print("|---" * (3 + len(FLAGS)) + "|")
    row("bbbc041seg/train", files(args.data / "bbbc041seg/train/original", args.limit))
    row("bbbc041seg/val", files(args.data / "bbbc041seg/val/original", args.limit))
    row("BCCD", files(args.data / "bccd/images", args.limit))
    row("synthetic, typical", drawn_smears("typical", args.limit))
    row("synthetic, varied", drawn_smears("varied", args.limit))
    row("text pages", text_pages())
    row("screenshots", screenshots())
    row("photographs", photographs())
    row("plain and noise", plain())

    pairs = [read_pair(pair) for pair in usable_pairs(args.data / "bbbc041seg/val")[::2]]
    print(
        "\n| blur, sigma in px of 1600 | mean edge width | out_of_focus | Dice |\n|---|---|---|---|"
    )
    for sigma in (0, 3, 5, 7, 9, 12, 16):
        widths, flagged, dices = [], 0, []
        for image, mask in pairs:
            blurred = cv2.GaussianBlur(image, (0, 0), sigma) if sigma else image
            measures, count = measure_image(loaded, predictor, blurred)
            widths.append(measures.edge_width or np.nan)
            flagged += "out_of_focus" in [f.name for f in assess(measures, count, None)]
            logits = predictor.predict(preprocess(blurred, predictor.input_size_px)[np.newaxis])
            found = mask_from_probability(probability(logits[0, 0]), mask.shape, 0.5) > 0
            true = mask > 127
            dices.append(2 * (found & true).sum() / (found.sum() + true.sum()))
        print(
            f"| {sigma} | {np.nanmean(widths):.2f} | {flagged} of {len(pairs)} "
            f"| {np.mean(dices):.3f} |",
            flush=True,
        )
    print("\n| gain | over_exposed | under_exposed |\n|---|---|---|")
    for gain in (0.2, 0.3, 0.5, 1.0, 1.3, 1.6, 2.0, 3.0):
        found = [names_of(np.clip(image * gain, 0, 255).astype(np.uint8)) for image, _ in pairs]
        over, under = (sum(n in f for f in found) for n in ("over_exposed", "under_exposed"))
        print(f"| {gain} | {over} of {len(pairs)} | {under} of {len(pairs)} |", flush=True)


if __name__ == "__main__":
    main()
