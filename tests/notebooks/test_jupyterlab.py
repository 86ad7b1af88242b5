"""A reader's first minutes: chapters in a real JupyterLab, in a browser. Screenshots go to ONESTEP_SCREENSHOTS."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import files

import pytest
from chapters import ROOT, build
from chromium import NO_CHROMIUM, chromium, launched

pytestmark = pytest.mark.slow
NEWS = "@jupyterlab/apputils-extension:announcements"
CONNECTED = """async () => {
    const panel = window.jupyterapp.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    const kernel = panel.sessionContext.session?.kernel;
    return kernel?.connectionStatus === "connected" && kernel.status === "idle";
}"""
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab over a folder with chapters 0, 5 and 10, nothing run in them."""
    import nbformat

    folder = tmp_path_factory.mktemp("lab")
    (folder / "chapters").mkdir()
    for source in build.sources():
        if source.name[:2] in ("00", "05", "10"):
            nbformat.write(build.parse(source), folder / f"chapters/{source.stem}.ipynb")
    (folder / "labconfig").mkdir()
    (folder / "labconfig/page_config.json").write_text(json.dumps({"disabledExtensions": {NEWS: True}}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--allow-root"]
    options += ["--no-browser", f"--ServerApp.root_dir={folder / 'chapters'}", "--expose-app-in-browser"]
    # Its pages and extensions lie where it was installed, which need not be this environment.
    pages = next(f for f in files("jupyterlab") if f.match("share/jupyter/lab/static/index.html"))
    setting = {"JUPYTER_PATH": str(pages.locate().resolve().parents[2]), "JUPYTER_CONFIG_DIR": str(folder)}
    setting |= {"ONESTEP_FAST": "1", "ONESTEP_STATIC": "0", "PYTHONPATH": str(ROOT)}
    with (folder / "lab.log").open("wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=os.environ | setting, stdout=log, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/api", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if chromium() is None:
        pytest.skip(NO_CHROMIUM)
    with launched() as browser:
        yield browser


class Chapter:
    """A notebook in its tab, its kernel idle."""

    def __init__(self, browser, lab: str, name: str, screenshots):
        self.name, self.screenshots = name, screenshots
        self.page = browser.new_page(viewport={"width": 1500, "height": 1100})
        self.page.set_default_timeout(60_000)
        self.page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function(CONNECTED)

    def run_all(self):
        """Choose "Run All Cells", wait until cells are waiting or run."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.locator("[data-command='runmenu:run-all']").first.click()
        self.page.wait_for_function(f"() => {PROMPTS}.some(p => p.includes('*'))")

    def finished(self):
        """Wait until no cell waits or runs; no error must be on the page."""
        self.page.wait_for_function(f"() => !{PROMPTS}.some(p => p.includes('*'))", timeout=400_000)
        told = self.page.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type*='error']")
        assert not told.all_text_contents()

    def shoot(self, what: str):
        folder = os.environ.get("ONESTEP_SCREENSHOTS", self.screenshots)
        self.page.screenshot(path=f"{folder}/chapter-{self.name[:2]}-{what}.png")

    def changes(self, picture, act):
        """Do something; wait until the picture is another one."""
        before = picture.get_attribute("src")
        act()
        self.page.wait_for_function("([node, before]) => node.src !== before", arg=[picture.element_handle(), before])

    def explorer(self):
        """(slider handle, picture) of the first box with sliders and without buttons."""
        box = self.page.locator(".widget-vbox:has(.widget-slider):not(:has(.jupyter-button))").first
        box.wait_for(timeout=400_000)
        box.scroll_into_view_if_needed()
        return box.locator(".noUi-handle").first, box.locator("img")


@pytest.fixture
def chapter(browser, lab, tmp_path, request):
    found = Chapter(browser, lab, request.param, tmp_path)
    yield found
    found.page.close()


@pytest.mark.parametrize("chapter", ["00_one_step_and_why", "10_four_bits"], indirect=True)
def test_a_slider_changes_the_picture(chapter):
    chapter.run_all()
    chapter.finished()
    handle, picture = chapter.explorer()
    assert picture.evaluate("i => i.clientWidth == i.naturalWidth"), "neither blown up nor squeezed"
    chapter.shoot("before")
    handle.focus()
    chapter.changes(picture, lambda: chapter.page.keyboard.press("ArrowRight"))
    chapter.shoot("after")


@pytest.mark.parametrize("chapter", ["05_the_coach"], indirect=True)
def test_the_dashboard_stops_goes_on_and_begins_anew(chapter):
    from playwright.sync_api import expect

    page = chapter.page
    chapter.run_all()
    dashboard = page.locator(".widget-vbox:has(.jupyter-button)").first
    dashboard.wait_for()
    status, picture = dashboard.locator("code"), dashboard.locator("img")
    expect(status).to_contain_text("running, step", timeout=60_000)
    dashboard.get_by_text("Stop", exact=True).click()
    expect(status).to_contain_text("stopped, step")
    dashboard.scroll_into_view_if_needed()
    chapter.shoot("stopped")
    stopped = status.text_content()
    page.wait_for_timeout(1500)
    assert status.text_content() == stopped
    dashboard.get_by_text("Start", exact=True).click()
    expect(status).to_contain_text("running")
    chapter.changes(picture, lambda: dashboard.get_by_text("Reset", exact=True).click())
    expect(status).to_contain_text("ended, step", timeout=120_000)
    dashboard.scroll_into_view_if_needed()
    chapter.shoot("ended")
    chapter.run_all()  # a stopped run stopped the cells below it; now they all run
    chapter.finished()
    handle, picture = chapter.explorer()
    handle.focus()
    chapter.changes(picture, lambda: page.keyboard.press("ArrowRight"))
    chapter.shoot("field")
