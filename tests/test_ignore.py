"""Which names are inputs."""

from __future__ import annotations

import pytest

from bcseg_batch.intake.ignore import IgnoreRules

RULES = IgnoreRules({".jpg", ".tif"}, ("*_draft.*", "old/*", "thumbs"))


@pytest.mark.parametrize(
    "image",
    ["a.jpg", "A.JPG", "b/c/a.tif", "a.b.tif", "draft.jpg", "new/a.jpg", "\udcff.jpg", "é.Tif"],
)
def test_an_image_is_an_input_by_its_suffix_in_any_case(image: str) -> None:
    assert RULES.reason_file(image) is None


@pytest.mark.parametrize("image", ["a", "a.", "jpg", "a.jpg.gz", "a.jpeg", "b.jpg/a", "a.jpg "])
def test_everything_else_is_not(image: str) -> None:
    assert RULES.reason_file(image) == "not the suffix of an image"


@pytest.mark.parametrize(
    ("image", "pattern"),
    [
        (".a.jpg", ".*"),
        ("b/.jpg", ".*"),
        ("a.jpg.part", "*.part"),
        ("a.jpg.CRDOWNLOAD", "*.crdownload"),
        ("~$a.jpg", "~$*"),
        ("thumbs.db", "Thumbs.db"),
        ("a_DRAFT.jpg", "*_draft.*"),
        ("OLD/a.jpg", "old/*"),
    ],
)
def test_a_pattern_is_named_as_the_reason(image: str, pattern: str) -> None:
    assert RULES.reason_file(image) == f"matches {pattern}"


@pytest.mark.parametrize("folder", [".git", "b/@eaDir", "Thumbs", "old/b"])
def test_folders_are_left_out_by_pattern(folder: str) -> None:
    assert (RULES.reason_folder(folder) or "").startswith("matches ")


@pytest.mark.parametrize("folder", ["b", "b.jpg", "b/old"])
def test_folders_are_not_held_against_suffixes(folder: str) -> None:
    assert RULES.reason_folder(folder) is None
