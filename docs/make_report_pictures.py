"""Makes the pictures of the report in `docs/images` from generated smears and the shipped model.

python docs/make_report_pictures.py

Needs the extra `test` and the browser chromium. Run it after the report's pages have changed.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from bcseg_training.synthetic import synthesize_smear, typical_style

IMAGES = Path(__file__).parent / "images"
SEED = 5
SIZE_WH = (1200, 760)


def write_smears(folder: Path) -> None:
    """Draw the smears of two slides: one of them out of focus; a screenshot and a broken file."""
    rng = np.random.default_rng(SEED)
    for slide, images in (("a", 4), ("b", 3)):
        for number in range(1, images + 1):
            style = dataclasses.replace(
                typical_style(rng, shape_hw=(900, 1200)), red_cells=30 + 12 * number
            )
            smear = synthesize_smear(rng, shape_hw=(900, 1200), style=style).image
            if (slide, number) == ("b", 2):
                smear = cv2.GaussianBlur(smear, (0, 0), 18)
            Image.fromarray(smear).save(folder / f"slide-{slide}_{number}.jpg", quality=92)
    (folder / "slide-b_4.jpg").write_bytes(b"\xff\xd8 the rest is lost")


def make_report(source: Path, output: Path) -> Path:
    (source.parent / "settings.toml").write_text(
        "[outputs]\npreviews = true\nlabels = true\n"
        "[report]\nenabled = true\ngroup_pattern = '(?P<group>[^/_]+)_'\n"
    )
    code = "from bcseg_batch.cli import main; main()"
    command = [sys.executable, "-c", code, "process-dir", str(source), str(output)]
    # Exit code 1: one image fails, as it is to.
    command += ["--settings", str(source.parent / "settings.toml")]
    subprocess.run(command, check=False)  # noqa: S603 - our own program
    return output / "report/index.html"


def photograph(browser: Browser, index: Path, scheme: str) -> None:
    page = browser.new_page(
        viewport={"width": SIZE_WH[0], "height": SIZE_WH[1]},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(index.as_uri())
    page.wait_for_selector("#list tbody tr")
    page.wait_for_load_state("networkidle")
    save(
        page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": SIZE_WH[0], "height": 1250}),
        f"report-index-{scheme}.png",
    )
    page.get_by_role("link", name="slide-a_2.jpg", exact=True).click()
    page.wait_for_selector("#traces path")
    page.locator("#traces .red_cell").nth(8).focus()
    page.wait_for_load_state("networkidle")
    save(page.screenshot(full_page=True), f"report-image-{scheme}.png")
    page.close()


def save(png: bytes, name: str) -> None:
    """Keep a picture in few colours, which takes a quarter of the space."""
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    picture = Image.fromarray(np.asarray(pixels)[:, :, ::-1])
    few = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(IMAGES / name, optimize=True)


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in"
        source.mkdir()
        write_smears(source)
        index = make_report(source, Path(scratch) / "results")
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for scheme in ("light", "dark"):
                photograph(browser, index, scheme)
            browser.close()


if __name__ == "__main__":
    main()
