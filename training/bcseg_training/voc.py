"""Pascal-VOC boxes, as in the BCCD data set."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree  # the files are the user's own training data

from bcseg_batch.errors import UsageError
from bcseg_training.synthetic import Kind

# BCCD's names, in lower case.
_KINDS = {"rbc": Kind.RED_CELL, "wbc": Kind.WHITE_CELL, "platelets": Kind.PLATELET}
_MIN_SIDE_PX = 4


@dataclass(frozen=True, slots=True)
class Box:
    """One annotated cell.

    Attributes:
        kind: what it is.
        left, top: first column and row, counted from 0.
        right, bottom: the column and row after the last.
    """

    kind: Kind
    left: int
    top: int
    right: int
    bottom: int

    @property
    def width_px(self) -> int:
        """Columns it covers."""
        return self.right - self.left

    @property
    def height_px(self) -> int:
        """Rows it covers."""
        return self.bottom - self.top

    def touches_border(self, shape_hw: tuple[int, int], margin_px: int = 2) -> bool:
        """Tell whether it comes within `margin_px` of the image's edge: the cell may be cut."""
        return (
            self.left <= margin_px
            or self.top <= margin_px
            or self.right >= shape_hw[1] - margin_px
            or self.bottom >= shape_hw[0] - margin_px
        )


def read_boxes(path: Path) -> tuple[Box, ...]:
    """Read the boxes of a VOC file; boxes under 4 px a side are slips of the mouse and left out.

    Raises:
        UsageError: the file is not VOC, or names an unknown kind.
    """
    boxes = []
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314 - as above
        for item in root.iter("object"):
            name = (item.findtext("name") or "").lower()
            corners = [
                int(float(item.findtext(f"bndbox/{corner}") or ""))
                for corner in ("xmin", "ymin", "xmax", "ymax")
            ]
            # VOC counts from 1 and includes the last row and column.
            box = Box(_KINDS[name], max(corners[0] - 1, 0), max(corners[1] - 1, 0), *corners[2:])
            if min(box.width_px, box.height_px) >= _MIN_SIDE_PX:
                boxes.append(box)
    except KeyError as error:
        raise UsageError(f"{path} names a kind {error}: RBC, WBC and Platelets are known") from None
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as Pascal VOC boxes: {error}") from error
    return tuple(boxes)


@dataclass(frozen=True, slots=True)
class BoxedImage:
    """One image of a VOC folder.

    Attributes:
        stem: the name that image and annotation share.
        image: path of the photograph.
        annotation: path of the XML file.
        white_mask: path of a mask of its white cells, or None where there is none.
    """

    stem: str
    image: Path
    annotation: Path
    white_mask: Path | None


def boxed_images(folder: Path) -> tuple[BoxedImage, ...]:
    """List a folder of `images`, `annotations` and, where there are some, `wbc_masks`, by stem.

    Raises:
        UsageError: a folder is missing, or an image has no annotation.
    """
    for name in ("images", "annotations"):
        if not (folder / name).is_dir():
            raise UsageError(f"{folder / name} is not a folder: boxes need images and annotations")
    found = []
    for image in sorted((folder / "images").glob("*.jpg")):
        annotation = folder / "annotations" / f"{image.stem}.xml"
        if not annotation.is_file():
            raise UsageError(f"{image} has no annotation {annotation}")
        white_mask = folder / "wbc_masks" / f"{image.stem}.png"
        found.append(
            BoxedImage(image.stem, image, annotation, white_mask if white_mask.is_file() else None)
        )
    if not found:
        raise UsageError(f"{folder / 'images'} holds no .jpg")
    return tuple(found)


def held_out_stems() -> frozenset[str]:
    """Name the images of BCCD that are never trained on: a fixed fifth, kept in this package."""
    text = resources.files("bcseg_training").joinpath("splits/bccd_held_out.txt").read_text("utf-8")
    lines = (line.strip() for line in text.splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))
