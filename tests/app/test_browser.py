"""The web demo as a program: in headless Chromium, and as the one file of a Hugging Face Space."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from damaged import noise
from factories import tiny_encoder, tiny_fae_dit_pipeline, tiny_fae_starflow_pipeline, tiny_fae_text_to_image_pipeline
from fork_server import PATIENCE

import hf_fae


pytest.importorskip("gradio", reason="needs gradio: pip install hf_fae[demo]")

CLI = [sys.executable, "-c", "from hf_fae.cli import main; main()", "demo"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with three pipelines without their encoders, these, a picture and a file that is none."""
    folder = tmp_path_factory.mktemp("saved")
    texts = tiny_fae_text_to_image_pipeline()
    for part in (texts.text_encoder, texts.tokenizer):
        part.save_pretrained(folder / "text-encoder")
    tiny_fae_text_to_image_pipeline(text_encoder=None, tokenizer=None).save_pretrained(folder / "texts")
    tiny_fae_dit_pipeline().save_pretrained(folder / "dit")
    tiny_fae_starflow_pipeline().save_pretrained(folder / "flow")
    tiny_encoder().save_pretrained(folder / "encoder")
    noise(60, 40).save(folder / "picture.png")
    (folder / "no_picture.png").write_text("hello")
    return folder


@contextlib.contextmanager
def serving(command: list[str], log: Path, **variables: str):
    """The address of a server on a free port, which is stopped in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [argument.replace("PORT", port) for argument in command]
    variables = {name: value.replace("PORT", port) for name, value in variables.items()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + PATIENCE
        while not answers(url):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)


def answers(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        with urllib.request.urlopen(url, timeout=PATIENCE) as response:
            return response.status == 200
    return False


@pytest.fixture(scope="module")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"needs {' and '.join(missing)} (on Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    yield driver
    driver.quit()


class Page:
    """The demo as a person uses it."""

    def __init__(self, driver, url: str):
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.wait = WebDriverWait(driver, PATIENCE)
        driver.get(url)
        self.until_says("images of 32 x 32 pixels")

    def find(self, css: str) -> list:
        return [element for element in self.driver.find_elements("css selector", css) if element.is_displayed()]

    def until_says(self, text: str) -> None:
        self.wait.until(
            lambda driver: text in driver.find_element("css selector", "body").text, f"waiting for {text!r}"
        )

    def choose(self, label: str, name: str) -> None:
        """An entry of a dropdown, found by typing its name."""
        from selenium.webdriver.common.keys import Keys

        (dropdown,) = self.find(f"input[aria-label='{label}']")
        dropdown.click()
        dropdown.send_keys(Keys.CONTROL, "a")
        dropdown.send_keys(name, Keys.ENTER)
        self.wait.until(lambda _: dropdown.get_attribute("value") == name)

    def open_tab(self, name: str) -> None:
        (tab,) = (tab for tab in self.find("button[role=tab]") if tab.text == name)
        tab.click()

    def upload(self, path: Path) -> None:
        """Into the open tab."""
        inputs = self.driver.find_elements("css selector", "[role=tabpanel] input[type=file]")
        (file,) = (
            each for each in inputs if each.find_element("xpath", "ancestor::*[@role='tabpanel'][1]").is_displayed()
        )
        file.send_keys(str(path))

    def click(self, css: str, across: float, down: float) -> None:
        """At a place in an element, in parts of its width and height."""
        from selenium.webdriver.common.action_chains import ActionChains

        (element,) = self.find(css)
        size = element.size
        x, y = (across - 0.5) * size["width"], (down - 0.5) * size["height"]
        ActionChains(self.driver).move_to_element_with_offset(element, int(x), int(y)).click().perform()

    def pictures(self, css: str) -> list[tuple[str, int]]:
        """(address, width in pixels) of the pictures that have arrived."""
        script = "return [...document.querySelectorAll(arguments[0])].map(image => [image.src, image.naturalWidth])"
        return [(address, width) for address, width in self.driver.execute_script(script, css) if width > 0]

    def until_pictures(self, css: str, count: int, other_than: list = ()) -> list[tuple[str, int]]:
        def arrived(_):
            found = self.pictures(css)
            return found if len(found) == count and not set(found) & set(other_than) else None

        return self.wait.until(arrived, f"waiting for {count} pictures {css}")


@pytest.fixture(scope="module")
def page(saved, chromium):
    command = [*CLI, "--model", *(str(saved / name) for name in ("dit", "flow", "texts")), "--port", "PORT"]
    encoders = ["--image_encoder", str(saved / "encoder"), "--text_encoder", str(saved / "text-encoder")]
    with serving([*command, *encoders], saved / "demo.log") as url:
        yield Page(chromium, url)
    assert "Traceback" not in (saved / "demo.log").read_text()


def test_generate(page):
    page.open_tab("Generate")
    page.choose("Class", "class 7")
    page.find("#generate")[0].click()
    drawn = page.until_pictures("#gallery img", 4)
    assert {width for _, width in drawn} == {32}
    page.until_says("class 7, seed 3")
    assert page.find("input[aria-label='number input for Steps']")
    page.choose("Generator", "flow")
    page.until_says("FAEStarFlowPipeline")
    assert not page.find("input[aria-label='number input for Steps']")
    page.find("#generate")[0].click()
    drawn += page.until_pictures("#gallery img", 4, drawn)
    page.choose("Generator", "texts")
    page.until_says("FAETextToImagePipeline")
    assert not page.find("input[aria-label='Class']")
    (text,) = page.find("textarea")
    text.clear()
    text.send_keys("a fox")
    page.find("#generate")[0].click()
    page.until_pictures("#gallery img", 4, drawn)
    page.until_says("a fox, seed 3")


def test_reconstruct(page, saved):
    page.open_tab("Reconstruct")
    page.upload(saved / "no_picture.png")
    page.until_says("these 5 bytes are no image of a supported format")
    page.find("button[aria-label='Clear']")[0].click()
    page.upload(saved / "picture.png")
    page.until_says("feature cosine")
    page.until_pictures("[role=tabpanel] .image-frame img", 2)


def test_click_on_a_patch(page, saved):
    page.open_tab("Patch similarity")
    page.upload(saved / "picture.png")
    page.until_says("row 3, column 3")
    (before,) = page.until_pictures("#clicked img", 1)
    assert before[1] == 448
    page.click("#clicked img", across=3 / 8, down=7 / 8)
    page.until_says("row 4, column 2")
    page.until_pictures("#clicked img", 1, [before])


def test_all_of_the_page_comes_from_its_server(page):
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    addresses = page.driver.execute_script(script)
    hosts = {urlsplit(address).netloc for address in addresses} - {""}  # data: has none
    assert hosts == {urlsplit(page.driver.current_url).netloc}


def test_as_a_space(saved, tmp_path):
    """A copy of one file, in a folder of its own, configured by the environment."""
    shutil.copy(Path(hf_fae.__file__).with_name("app") / "__main__.py", tmp_path / "app.py")
    variables = {"HF_FAE_MODELS": str(saved / "flow"), "GRADIO_SERVER_PORT": "PORT"}
    with serving([sys.executable, "app.py"], tmp_path / "space.log", **variables) as url:
        with urllib.request.urlopen(f"{url}/config") as response:
            assert str(saved / "flow") in response.read().decode()
