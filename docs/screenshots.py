"""Make the pictures of the README: ``python docs/screenshots.py``. Needs Chromium.

The page answers on a phone's width, by the model in the package; the report is that of a run. All
photos are rendered.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = Path(__file__).resolve().parent / "images"
PHONE = {"width": 390, "height": 860}
DESK = {"width": 900, "height": 1000}
ASKED = "photos/Test/Apple Red 1/r_234_100.jpg"
POMONA = [sys.executable, "-m", "pomona"]


def main() -> None:
    """Render photos, run, serve, and take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a folder to keep photos and results in")
    work = parser.parse_args().work
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        photos, results = work / "photos", work / "results"
        if not photos.exists():
            synthesize = ["synthesize", str(photos), "--classes", "6", "--images", "240"]
            subprocess.run([*POMONA, *synthesize], check=True)
        if not (results / "report" / "report.html").exists():
            options = ["--weights", "fruits", "--image-size", "128", "--no-mlflow"]
            subprocess.run(
                [*POMONA, "run", str(photos), "--out", str(results), *options], check=True
            )
        browser = stack.enter_context(chromium())
        address = stack.enter_context(service())
        IMAGES.mkdir(exist_ok=True)
        phone(browser, address, work / ASKED)
        report(browser, results / "report" / "report.html")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start the system's Chromium."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise SystemExit("no chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def service() -> Iterator[str]:
    """Serve the model in the package; gives the address."""
    words = [*POMONA, "serve", "--port", "0"]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if address := re.search(r"http://\S+:\d+", line):
                break
        else:
            raise SystemExit("pomona serve ended without an address")
        yield address[0]
        running.terminate()


def phone(browser: Any, address: str, photo: Path) -> None:
    """Ask the page about a photo, at a phone's width."""
    page = browser.new_page(viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    page.goto(address)
    page.set_input_files("#files", photo)
    page.wait_for_selector("#bars li")
    page.wait_for_timeout(1000)  # the bars grow
    save(page.screenshot(), "page.png")


def report(browser: Any, file: Path) -> None:
    """Open the report of a run, at its map of the photos."""
    page = browser.new_page(viewport=DESK)
    page.goto(file.as_uri())
    page.evaluate("document.querySelector('#map').scrollIntoView()")
    page.wait_for_timeout(500)
    save(page.screenshot(), "report.png")


def save(screenshot: bytes, name: str) -> None:
    """Write a picture with a palette: a third of the size, and no difference to see."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        IMAGES / name, optimize=True
    )


if __name__ == "__main__":
    main()
