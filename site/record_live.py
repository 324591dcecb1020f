"""The animation of the live page, for the README and the site: phrases are typed key by key into the page, in headless
Chromium, and each state becomes a frame of a GIF under 2 MB.

    python site/record_live.py nbs/images/live.gif
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

SEEDS = range(24)  # scenes of the recorded page
KEY, PAUSE, HOLD = (
    90,
    350,
    1700,
)  # milliseconds a frame stays: while typing, before it, and at the end of a phrase
LIMIT = 2_000_000  # bytes


def chosen() -> list[tuple[int, str]]:
    "What is typed: the first right answers of the page's own row of phrases, as (scene, phrase)."
    from refseg_nb.attention.live import answers, live_scene, showcase
    from refseg_nb.inference.segmenter import load

    row = showcase(list(answers(load(), [live_scene(seed) for seed in SEEDS])))
    return [(s.live.seed, s.expression.text) for s in row if not s.broken][-3:]


def frames(page: Path, typed: list[tuple[int, str]], width: int) -> list[tuple[Image.Image, int]]:
    "Screenshots of the page's upper part, each with its milliseconds."
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    out = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        view = browser.new_page(viewport={"width": width, "height": 700}, color_scheme="light")
        view.set_default_timeout(300_000)
        view.goto(f"{page.as_uri()}#scene={typed[0][0]}&phrase=.")
        view.wait_for_selector(".refseg-live[data-ready]")
        view.evaluate("async () => { window.app = await document.querySelector('.refseg-live').started; }")
        shown = view.locator(".refseg-live .try")

        def keep(milliseconds: int) -> None:
            view.evaluate("() => app.settled()")
            out.append((Image.open(io.BytesIO(shown.screenshot())).convert("RGB"), milliseconds))

        for seed, phrase in typed:
            view.evaluate("seed => app.show(seed, '')", seed)
            keep(PAUSE)
            for end in range(1, len(phrase) + 1):
                view.locator("#refseg-phrase").fill(phrase[:end])
                keep(HOLD if end == len(phrase) else KEY)
        browser.close()
    return out


def save(shots: list[tuple[Image.Image, int]], path: Path) -> int:  # bytes
    "One palette for all frames, so that only what changes is stored."
    palette = shots[-1][0].quantize(128)
    pictures = [shot.quantize(palette=palette, dither=Image.Dither.NONE) for shot, _ in shots]
    times = [milliseconds for _, milliseconds in shots]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
    return path.stat().st_size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record the live page as a GIF.")
    parser.add_argument("path", type=Path, help="of the GIF")
    parser.add_argument("--page", type=Path, help="a live page; default: one is made")
    parser.add_argument("--width", type=int, default=960, help="pixels of the window")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = given.page
        if page is None:
            from refseg_nb.attention.live import write_live
            from refseg_nb.inference.segmenter import load

            page = write_live(Path(scratch) / "live.html", load(), list(SEEDS))
        size = save(frames(page.resolve(), chosen(), given.width), given.path)
    print(f"{given.path}: {size / 1e6:.2f} MB")
    sys.exit(
        0 if size < LIMIT else f"{given.path} has more than {LIMIT / 1e6:g} MB: type less, or use --width"
    )
