"""Every error the product raises on purpose, each with the exit code it leads to.

The codes are those of sysexits.h, so that a supervisor can tell "configured wrongly, do not
restart" (78) from "try again later" (74, 75). An `ImageError` has no exit code: it belongs to one
input, ends in that input's record, and the run goes on.
"""

from typing import ClassVar


class BcsegError(Exception):
    """Base of all; its text is a sentence for the user: what, why, and what to do."""

    exit_code: ClassVar[int] = 70


class SettingsError(BcsegError):
    """A setting is wrong; found at start, never retried."""

    exit_code = 78


class CheckpointError(BcsegError):
    """A model file is missing or is not what it should be; found at start, never retried."""

    exit_code = 78


class OutputError(BcsegError):
    """Outputs cannot be written (disk full, no permission); no image is to blame for it."""

    exit_code = 74


class StorageError(OutputError):
    """A store of objects cannot be reached or refuses; no image is to blame for it.

    As with a disk that is full the run stops, and what has no record is done by the next one.
    """


class DeviceError(BcsegError):
    """The device is lost, or too small for a batch of one."""

    exit_code = 75


class UsageError(BcsegError):
    """The command was given arguments that cannot be carried out."""

    exit_code = 2


class ImageError(BcsegError):
    """One input cannot be processed; recorded, and the run goes on."""


class UnreadableImageError(ImageError):
    """The file is damaged, is not an image, or may not be read."""


class TruncatedImageError(UnreadableImageError):
    """The file ends before the image does: perhaps it is still being written."""


class UnsupportedImageError(ImageError):
    """A sound image of a kind for which there is no written rule."""


class ImageTooLargeError(ImageError):
    """More pixels than the limit allows."""


class ImageChangedError(ImageError):
    """The file vanished or was rewritten while being read: to be settled again, not a failure."""


class PredictionError(ImageError):
    """The network gave something for this image that is no probability."""


class CrashedProcessError(ImageError):
    """The image took the whole process down, again and again, in the end alone."""
