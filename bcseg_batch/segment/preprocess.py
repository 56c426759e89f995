"""From pixels to the network's input: the one copy, used in service and in training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image


def resize_rgb(pixels: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.uint8]:
    """Stretch an image to a square as the original did.

    The original used torchvision's `Resize((512, 512))` on a PIL image, which is Pillow's
    antialiased bilinear filter in 8-bit arithmetic, across first; so is this, bit for bit. Pillow
    goes down first since version 13 where that is less work, which moves some pixels by a level:
    hence two calls.

    Args:
        pixels: uint8 (H, W, 3) RGB, 0..255.
        size_px: side of the square.

    Returns:
        uint8 (size_px, size_px, 3) RGB, 0..255.
    """
    image = Image.fromarray(pixels)
    for size_wh in ((size_px, image.height), (size_px, size_px)):
        image = image.resize(size_wh, Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_network_input(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale 8-bit pixels to [0, 1] and put the channels first, as torchvision's `ToTensor`.

    Args:
        pixels: uint8 (H, W, 3) RGB, 0..255.

    Returns:
        float32 (3, H, W) in [0, 1], C-contiguous.
    """
    scaled = np.true_divide(pixels.transpose(2, 0, 1), 255, dtype=np.float32)
    return np.ascontiguousarray(scaled)


def preprocess(pixels: npt.NDArray[np.uint8], size_px: int) -> npt.NDArray[np.float32]:
    """Turn a decoded image into one element of a batch.

    Args:
        pixels: uint8 (H, W, 3) RGB, 0..255, any size.
        size_px: side of the network's square input, 512 for all shipped models.

    Returns:
        float32 (3, size_px, size_px) in [0, 1], C-contiguous.
    """
    return to_network_input(resize_rgb(pixels, size_px))
