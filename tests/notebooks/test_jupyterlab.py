"""A reader's first minutes: chapters in a real JupyterLab, in a browser. Screenshots go to ONESTEP_SCREENSHOTS."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from chapters import ROOT, build

pytestmark = pytest.mark.slow
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab over a folder with chapters 0, 5 and 10, nothing run in them."""
    import nbformat

    folder = tmp_path_factory.mktemp("lab")
    for source in build.sources():
        if source.name[:2] in ("00", "05", "10"):
            nbformat.write(build.parse(source), folder / f"{source.stem}.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--allow-root"]
    options += ["--no-browser", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    setting = {"ONESTEP_FAST": "1", "ONESTEP_STATIC": "0", "PYTHONPATH": str(ROOT)}
    setting["JUPYTER_CONFIG_DIR"] = str(folder / ".config")
    with (folder / "lab.log").open("wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=os.environ | setting, stdout=log, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{url}/api", timeout=5).read()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < end, (folder / "lab.log").read_text()[-2000:]
            time.sleep(0.3)
    yield url
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: apt install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


class Chapter:
    """A notebook in its tab."""

    def __init__(self, browser, lab: str, name: str, screenshots):
        self.name, self.screenshots = name, screenshots
        self.page = browser.new_page(viewport={"width": 1500, "height": 1100})
        self.page.set_default_timeout(400_000)
        self.page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")

    def run_all(self):
        """Run all cells. A kernel that has just come up lets the first ask go unheard."""
        running = self.page.locator(".jp-InputPrompt", has_text="[*]").first
        for _ in range(10):
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.locator("[data-command='runmenu:run-all']").first.click()
            self.page.wait_for_timeout(4000)
            if running.count():
                return
        raise AssertionError("no cell runs")

    def finished(self):
        """Wait until no cell waits or runs; no error must be on the page."""
        busy = "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('[*]'))"
        self.page.wait_for_function(busy)
        assert self.page.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
        assert self.page.locator(".jp-RenderedText .ansi-red-fg").count() == 0, "a cell failed"

    def shoot(self, what: str):
        self.page.screenshot(
            path=f"{os.environ.get('ONESTEP_SCREENSHOTS', self.screenshots)}/{self.name[:2]}-{what}.png"
        )

    def changes(self, locator, act):
        """Do something; wait until the picture is another one."""
        locator.scroll_into_view_if_needed()
        before = locator.get_attribute("src")
        act()
        self.page.wait_for_function("([node, before]) => node.src !== before", arg=[locator.element_handle(), before])

    def explorer(self, number: int):
        """(slider handle, picture) of a box with sliders and without buttons."""
        boxes = ".jp-OutputArea-output > .widget-vbox:has(.widget-slider):not(:has(.jupyter-button))"
        box = self.page.locator(boxes).nth(number)
        box.wait_for()
        return box.locator(".noUi-handle").first, box.locator("img")


@pytest.fixture
def chapter(browser, lab, tmp_path, request):
    found = Chapter(browser, lab, request.param, tmp_path)
    yield found
    found.page.close()


@pytest.mark.parametrize("chapter", ["00_one_step_and_why", "10_four_bits"], indirect=True)
def test_a_slider_changes_the_picture(chapter):
    chapter.run_all()
    handle, picture = chapter.explorer(0)
    picture.wait_for()
    chapter.finished()
    handle.focus()
    chapter.shoot("before")
    chapter.changes(picture, lambda: chapter.page.keyboard.press("ArrowRight"))
    chapter.shoot("after")


@pytest.mark.parametrize("chapter", ["05_the_coach"], indirect=True)
def test_the_dashboard_stops_goes_on_and_begins_anew(chapter):
    page = chapter.page
    chapter.run_all()
    dashboard = page.locator(".jp-OutputArea-output > .widget-vbox:has(.jupyter-button)").first
    status, picture = dashboard.locator("code"), dashboard.locator("img")
    page.wait_for_function("node => /running, step/.test(node.textContent)", arg=status.element_handle())
    dashboard.get_by_text("Stop", exact=True).click()
    page.wait_for_function("node => /stopped, step/.test(node.textContent)", arg=status.element_handle())
    dashboard.scroll_into_view_if_needed()
    chapter.shoot("stopped")
    stopped = status.text_content()
    page.wait_for_timeout(1500)
    assert status.text_content() == stopped
    dashboard.get_by_text("Start", exact=True).click()
    page.wait_for_function("node => /running/.test(node.textContent)", arg=status.element_handle())
    chapter.changes(picture, lambda: dashboard.get_by_text("Reset", exact=True).click())
    page.wait_for_function("node => /ended, step/.test(node.textContent)", arg=status.element_handle())
    chapter.shoot("ended")
    chapter.run_all()  # a stopped run stopped the cells below it; now they all run
    chapter.finished()
    handle, picture = chapter.explorer(0)
    handle.focus()
    chapter.changes(picture, lambda: page.keyboard.press("ArrowRight"))
    chapter.shoot("field")
