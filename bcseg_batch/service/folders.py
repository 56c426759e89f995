"""Refuses folders that cannot work together; light, so that it answers at once."""

from __future__ import annotations

from bcseg_batch.errors import UsageError
from bcseg_batch.remote.url import Place, Url
from bcseg_batch.store.names import OUTPUT_FOLDERS


def check_folders(source: Place, output: Place) -> None:
    """Refuse places that cannot work together, before anything is written.

    What is in a store is looked at when it is opened, and not here.

    Raises:
        UsageError: the input is missing or no folder, the output is a file, or one lies in the
            other, links resolved.
    """
    if (
        isinstance(source, Url)
        and isinstance(output, Url)
        and (source.contains(output) or output.contains(source))
    ):
        raise UsageError(
            f"the output {output} and the input {source} lie one in the other: masks would be "
            "taken for images; name an output elsewhere"
        )
    try:
        if not isinstance(source, Url) and not source.is_dir():
            what = "is not a folder" if source.exists() else "does not exist"
            raise UsageError(f"the input folder {str(source)!r} {what}: name a folder with images")
        if not isinstance(output, Url) and output.exists() and not output.is_dir():
            raise UsageError(f"the output {str(output)!r} is a file: name a folder")
        if isinstance(source, Url) or isinstance(output, Url):
            return
        inner, outer = output.resolve(), source.resolve()
        # A link in place of `masks` may lead anywhere.
        within = [(output / name).resolve() for name in OUTPUT_FOLDERS]
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UsageError(
            f"the folders {str(source)!r} and {str(output)!r} cannot be looked at: {error}: name "
            "folders that this user may enter"
        ) from error
    if any(a.is_relative_to(outer) or outer.is_relative_to(a) for a in (inner, *within)):
        raise UsageError(
            f"the output folder {str(output)!r} and the input folder {str(source)!r} lie one in "
            "the other (links resolved): masks would be taken for images; name an output folder "
            "elsewhere"
        )
