"""What a person sees in a browser: JupyterLab runs chapters without an error, their exercises included.
Drives Debian's Chromium."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def watched(context):
    "A page of a browser's context; what it logs, fails at, or asks the network for is kept in `.trouble`."
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda m: page.trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.trouble.append(error.stack))
    page.on(
        "request",
        lambda r: page.trouble.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None,
    )
    page.on("requestfailed", lambda r: page.trouble.append(r.url))
    return page


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A private JupyterLab on a copy of the notebooks; yields its address."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "results"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, home / name)
        elif source.exists():
            shutil.copy(source, home / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    private = {f"JUPYTER_{k}_DIR": str(home / f".{k.lower()}") for k in ("CONFIG", "DATA", "RUNTIME")}
    environment = {
        **os.environ,
        **private,
        "JUPYTERLAB_SETTINGS_DIR": str(home / ".s"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / ".w"),
    }
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--LabApp.expose_app_in_browser=True",
            "--IdentityProvider.token=",
            f"--ServerApp.root_dir={home}",
        ],
        env=environment,
        stdout=log,
        stderr=log,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=1)
            break
        except OSError:
            time.sleep(0.25)
    else:
        raise AssertionError((home / "lab.log").read_text()[-2000:])
    yield address
    server.terminate()
    server.wait(20)


@pytest.mark.parametrize("chapter", ["00_tour", "07_metrics", "10_hcam"])
def test_jupyterlab_runs_all_of_a_chapter_without_a_red_cell(lab, browser, chapter):
    page = browser.new_page()
    page.goto(f"{lab}/lab/tree/nbs/{chapter}.ipynb?reset")
    panel = "window.jupyterapp.shell.currentWidget"
    page.wait_for_function(
        f"window.jupyterapp && {panel} && {panel}.sessionContext && {panel}.sessionContext.isReady",
        timeout=60_000,
    )
    page.evaluate(
        f"async () => {{ await {panel}.sessionContext.ready; await"
        f" {panel}.sessionContext.session.kernel.info; }}"
    )
    page.evaluate(
        """async panel => {
        const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
        for (let i = 0; i < cells.length; i++) if (cells.get(i).type === 'code') cells.get(i).outputs.clear();
        window.jupyterapp.commands.execute('notebook:run-all-cells'); }""",
        panel,
    )
    state = """() => { const cells = window.jupyterapp.shell.currentWidget.content.model.cells; const out = [];
        for (let i = 0; i < cells.length; i++) { const c = cells.get(i); if (c.type === 'code' && c.sharedModel.getSource().trim())
            out.push({count: c.executionCount, state: c.executionState, outputs: c.outputs.toJSON()}); }
        return JSON.stringify(out); }"""
    deadline = time.time() + 180
    while time.time() < deadline:
        cells = json.loads(page.evaluate(state))
        failed = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert not failed, failed[0]
        if cells[-1]["count"] and cells[-1].get("state") in (None, "idle"):
            break
        time.sleep(0.5)
    else:
        raise AssertionError(f"{chapter} did not finish in three minutes")
    shown = [o.get("data", {}) for c in cells for o in c["outputs"]]
    if chapter == "00_tour":  # its pictures need no matplotlib, which a test may run without a display
        assert any("image/png" in data for data in shown), "the tour shows no picture"
    assert sum("your turn" in "".join(data.get("text/plain", "")) for data in shown) >= 2, "stubs are calm"
    page.close()
