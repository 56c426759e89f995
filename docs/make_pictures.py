"""Makes the pictures in `docs/images` from generated smears and the shipped model.

python docs/make_pictures.py

Needs the extra `train`. Run it after the shipped model has changed.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

import bcseg_batch.weights
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.postprocess import Blend, composite_image
from bcseg_batch.store.images import decode_image
from bcseg_training.plots import CellsPicture, outlined
from bcseg_training.segmenting import Segment, by_network
from bcseg_training.synthetic import synthesize_numbered

Bytes = npt.NDArray[np.uint8]
ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).parent / "images"
UNSEEN_SEED = 777  # no model was trained on it
PART = np.s_[320:770, 380:880]  # rows and columns with cells of all kinds, large enough to see


def shipped() -> Segment:
    loaded = load_checkpoint(Path(bcseg_batch.weights.__file__).with_name("default.safetensors"))
    return by_network(loaded, open_predictor(loaded.model, loaded.spec.input_size_px))


def save(name: str, rows: list[list[Bytes]]) -> None:
    frame = ((4, 4), (4, 4), (0, 0))
    page = np.vstack(
        [np.hstack([np.pad(p, frame, constant_values=255) for p in row]) for row in rows]
    )
    Image.fromarray(page).save(IMAGES / name, quality=88)


def main() -> None:
    segment = shipped()
    blend = Blend.of((160, 0, 20), 0.3)

    smear = decode_image(ROOT / "samples/synth_00000.jpg", max_pixels=10**8).pixels
    found = segment(smear)
    mask = found.mask.view(np.uint8) * np.uint8(255)
    cells = CellsPicture("", smear, found.cells.labels, found.cells.kinds, None, ())
    whole = [
        smear,
        cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB),
        composite_image(smear, mask, blend),
        outlined(cells, side_px=max(smear.shape)),
    ]
    save("before-after.jpg", [[np.asarray(p[PART]) for p in whole]])

    pictures = []
    for index in range(6):
        drawn = synthesize_numbered(UNSEEN_SEED, index, shape_hw=(600, 800), style="varied")
        found = segment(drawn.image).cells
        pictures.append(
            outlined(
                CellsPicture("", drawn.image, found.labels, found.kinds, None, ()), side_px=520
            )
        )
    save("cells.jpg", [pictures[:3], pictures[3:]])


if __name__ == "__main__":
    main()
