"""Every input has output names of its own, and keeps them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.store.names import (
    OutputNames,
    candidates,
    composite_path,
    mask_path,
    name_key,
    name_of_mask,
)

ODD_STEMS = [
    "a",
    "A",
    "a.tif",
    "A.TIF",
    "é",
    "e\u0301",
    "É",
    "ß",
    "ss",
    "\u0345",
    "",
    ".a",
    "\udcff",
]
stems = st.one_of(
    st.sampled_from(ODD_STEMS),
    st.text(st.characters(exclude_characters="/\0", codec=None), max_size=4),
)
file_names = st.builds(
    lambda stem, suffix: stem + suffix,
    stems,
    st.sampled_from([".jpg", ".tif", ".PNG", "", ".tif~2"]),
).filter(lambda name: name not in {"", ".", ".."})
images = st.builds(
    lambda folder, name: folder + name, st.sampled_from(["", "b/", "B/", "b/a/"]), file_names
)
image_lists = st.lists(images, unique=True, max_size=12)


def caseless(text: str) -> str:
    """What the strictest file systems take for one name, to the end of what they might do."""
    while (folded := unicodedata.normalize("NFC", text).casefold()) != text:
        text = folded
    return text


@given(image_lists)
def test_no_two_inputs_share_an_output_on_any_file_system(names: list[str]) -> None:
    owned = OutputNames()
    claimed = [owned.claim(image) for image in names]
    for path in (mask_path, lambda name: composite_path(name, "jpg")):
        assert len({caseless(path(name)) for name in claimed}) == len(names)


@given(images)
def test_outputs_lie_in_the_input_s_own_sub_folder(image: str) -> None:
    folder = image.rpartition("/")[0]
    assert OutputNames().claim(image).rpartition("/")[0] == folder


@given(image_lists, st.randoms(use_true_random=False))
def test_names_are_the_same_in_a_later_run_in_any_order(names: list[str], random: object) -> None:
    first = OutputNames()
    claimed = {image: first.claim(image) for image in names}
    later = OutputNames()
    for image, name in claimed.items():
        later.hold(image, name_of_mask(mask_path(name)))
    random.shuffle(names)  # type: ignore[attr-defined]  # hypothesis gives a Random
    assert {image: later.claim(image) for image in names} == claimed


@given(image_lists, image_lists)
def test_what_comes_later_takes_no_owned_name(old: list[str], new: list[str]) -> None:
    first = OutputNames()
    claimed = {image: first.claim(image) for image in old}
    later = OutputNames()
    for image, name in claimed.items():
        later.hold(image, name)
    fresh = [later.claim(image) for image in new if image not in claimed]
    taken = {caseless(name) for name in claimed.values()}
    assert taken.isdisjoint(caseless(name) for name in fresh)
    assert {image: later.claim(image) for image in old} == claimed


@given(image_lists)
def test_asking_twice_gives_the_same_answer(names: list[str]) -> None:
    owned = OutputNames()
    assert [owned.claim(image) for image in names] == [owned.claim(image) for image in names]


def test_the_second_of_a_stem_is_named_with_its_suffix() -> None:
    owned = OutputNames()
    names = [owned.claim(image) for image in ("a.jpg", "a.tif", "a.tif.png", "A.jpg", "b/a.tif")]
    assert names == ["a", "a.tif", "a.tif.png", "A.jpg", "b/a"]
    assert mask_path(names[1]) == "masks/a.tif_mask.png"
    assert composite_path(names[0], "jpg") == "composites/a_bloodred.jpg"


def test_two_unicode_forms_of_one_name_do_not_meet() -> None:
    owned = OutputNames()
    composed, decomposed = "Zell\u00e9.jpg", "Zelle\u0301.jpg"
    assert name_key(owned.claim(composed)) != name_key(owned.claim(decomposed))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u03ac", "\u03b1\u0301"),
        ("\u1f80", "\u1f00\u0345"),
        ("\u0390", "\u03aa\u0301"),  # lower and upper case of one letter, one in two characters
    ],
)
def test_the_key_depends_neither_on_case_nor_on_the_unicode_form(one: str, other: str) -> None:
    assert name_key(one) == name_key(other)


def test_of_two_records_for_one_name_the_first_holds_it() -> None:
    owned = OutputNames()
    owned.hold("a.jpg", "a")
    owned.hold("a.tif", "A")
    assert owned.claim("a.jpg") == "a"
    assert owned.claim("a.tif") == "a.tif"


def test_candidates_go_on_where_every_better_name_is_taken() -> None:
    first = [name for name, _ in zip(candidates("b/a.jpg"), range(4), strict=False)]
    assert first == ["b/a", "b/a.jpg", "b/a.jpg~2", "b/a.jpg~3"]
