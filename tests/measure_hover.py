"""How long the explorer takes to answer a hover, at the largest size that is promised: `python
tests/measure_hover.py` writes results/explorer/hover.json."""

import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright
from test_browser import ARGUMENTS, CHROMIUM, ROOT

from refseg_nb.attention.explorer import Explorer

GRID, WORDS, LAYERS, HEADS, HOVERS = 26, 12, 6, 8, 300
HOVER = """async hovers => {
    const root = document.querySelector('.refseg-explorer'), stage = root.querySelector('.stage'), box = stage.getBoundingClientRect();
    const frame = () => new Promise(requestAnimationFrame), draw = [], answer = [], empty = [];
    let seed = 1;
    for (let i = 0; i < hovers; i++) {                  // from one frame to the next when nothing happens
        await frame();
        const start = performance.now();
        await frame();
        empty.push(performance.now() - start);
    }
    const random = () => (seed = seed * 48271 % 2147483647) / 2147483647;
    for (let i = 0; i < hovers; i++) {
        await frame();
        const at = {clientX: box.left + random() * box.width, clientY: box.top + random() * box.height, bubbles: true, pointerType: 'mouse'};
        const start = performance.now();
        stage.dispatchEvent(new PointerEvent('pointermove', at));
        await frame();                                  // the callbacks of a frame run in order: the explorer has drawn before this one
        answer.push(performance.now() - start);
        draw.push(root.drawMilliseconds);
    }
    return {draw, answer, empty};
}"""


def summary(values):
    return {
        name: round(float(np.quantile(values, q)), 2)
        for name, q in (("median", 0.5), ("p95", 0.95), ("max", 1))
    }


def main(out: Path):
    "Measure, and write the record."
    rng, n = np.random.default_rng(0), GRID**2 + WORDS
    a = rng.random((LAYERS, HEADS, n, n), dtype=np.float32) ** 8
    a /= a.sum(-1, keepdims=True)
    picture = rng.integers(0, 255, (320, 320, 3), dtype=np.uint8)
    explorer = Explorer.from_arrays(picture, [f"word{i}" for i in range(WORDS)], a, (GRID, GRID))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        size = len(explorer.to_html(path).encode())
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(path.as_uri())
        page.wait_for_selector(".refseg-explorer .stage canvas")
        times = page.evaluate(HOVER, HOVERS)
        version, pooled = (
            browser.version,
            page.evaluate(
                "() =>"
                " document.querySelector('[data-state]').explorer.get('data').panels[0].kinds.raw[0].pool"
            ),
        )
        browser.close()
    record = {
        "what": (
            "milliseconds to draw the answer to a pointer event (draw), from the event to the end of the"
            " frame that shows it (answer), and from frame to frame when nothing happens (empty)"
        ),
        "case": {
            "grid": [GRID, GRID],
            "words": WORDS,
            "layers": LAYERS,
            "heads": HEADS,
            "maps": LAYERS * HEADS,
            "pixel_to_pixel": pooled,
            "page_bytes": size,
        },
        "hovers": HOVERS,
        "draw_ms": summary(times["draw"]),
        "answer_ms": summary(times["answer"]),
        "empty_frame_ms": summary(times["empty"]),
        "share_of_draws_within_16.7_ms": round(float(np.mean(np.array(times["draw"]) <= 1000 / 60)), 3),
        "browser": f"Chromium {version}, no GPU",
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(terse=True),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "explorer" / "hover.json")
