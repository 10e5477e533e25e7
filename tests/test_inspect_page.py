"""The page of tools/inspect_data.py in a browser, with hostile content in it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.made_data import HOSTILE, SOURCES, MadeData
from tools import inspect_data

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,900"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeData:
    made = MadeData(tmp_path_factory.mktemp("page") / "data")
    for i in range(25):
        made.add(f"what is cat {i}", "the hat", origin=(0, i + 1, -1))
    made.add("where", "Paris\nin France", split="val", origin=(1, 1, 2), weight=0.5)
    made.add("bytes", "é".encode() + b"\xff", origin=(1, 2, -1))
    made.add(HOSTILE, HOSTILE, origin=(2, 1, -1))
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver here; Debian has them as chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, url: str) -> Any:
    """The browser with the page freshly opened."""
    browser.get(url)
    return browser


@pytest.fixture(scope="module")
def url(made: MadeData, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("html") / "page.html"
    inspect_data.main([str(made.write()), f"--html={path}"])
    return path.as_uri()


def all_of(page: Any, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def texts(page: Any, selector: str) -> list[str]:
    return [found.get_property("textContent") for found in all_of(page, selector)]


def choose(page: Any, select: str, option: str) -> None:
    (wanted,) = [found for found in all_of(page, f"#{select} option") if found.text == option]
    wanted.click()


def search(page: Any, text: str) -> None:
    one(page, "#search").send_keys(text)


def point_at(page: Any, element: Any) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(page).scroll_to_element(element).move_to_element(element).perform()


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains, Keys

    ActionChains(page).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()


def test_samples_are_rendered_with_what_is_trained_highlighted(page):
    assert len(all_of(page, ".sample")) == 20
    assert one(page, "#more").text == "Show more (8 left)"
    one(page, "#more").click()
    assert len(all_of(page, ".sample")) == 28
    assert not one(page, "#more").is_displayed()
    first = all_of(page, ".sample")[0]
    trained = [found.get_property("textContent") for found in first.find_elements("css selector", ".trained")]
    assert "".join(trained) == "the hat<|im_end|>"
    chips = [found.text for found in first.find_elements("css selector", ".chip")]
    assert chips == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    colours = {
        found.value_of_css_property("background-color")
        for found in first.find_elements("css selector", ".piece:not(.chip)")
    }
    assert len(colours) == 2, "trained ones and masked ones look different"
    assert first.find_element("css selector", ".origin").text == f"{SOURCES[0]} record 1"


def test_a_search_narrows_and_marks_what_it_finds(page):
    search(page, "PARIS in")
    assert texts(page, ".origin") == [f"{SOURCES[1]} record 1, turn 2"]
    assert "".join(texts(page, ".hit")).replace("↵", "").split() == ["Paris", "in"]
    assert one(page, "#count").text.startswith("1 of the 28 samples")
    search(page, " nothing has this")
    assert all_of(page, ".sample") == []
    assert one(page, "#count").text.startswith("No sample matches; 0 of the 28")


def test_split_and_source_filter(page):
    choose(page, "split", "val")
    assert len(all_of(page, ".sample")) == 1
    choose(page, "source", SOURCES[0])
    assert all_of(page, ".sample") == []
    choose(page, "split", "every split")
    assert one(page, "#count").text.startswith("25 of the 28 samples")
    choose(page, "source", SOURCES[1])
    assert texts(page, ".origin") == [f"{SOURCES[1]} record 2", f"{SOURCES[1]} record 1, turn 2"]


def test_a_token_under_the_pointer_tells_its_ids_label_weight_and_bytes(page, made):
    choose(page, "source", SOURCES[1])
    divided, weighted = all_of(page, ".sample")
    (whole,) = [found for found in divided.find_elements("css selector", ".trained") if found.text == "é"]
    point_at(page, whole)
    id_of = {token: i for i, token in made.tokenizer.token_bytes.items()}
    first, second = id_of[b"\xc3"], id_of[b"\xa9"]
    expected = f"id {first} label {first} weight 1 bytes C3 id {second} label {second} weight 1 bytes A9"
    assert one(page, "#tip").text.split() == expected.split()
    masked = weighted.find_elements("css selector", ".chip")[0]
    point_at(page, masked)
    start = made.tokenizer.im_start
    assert one(page, "#tip").text.split() == [*f"id {start} label -100 control".split(), "'<|im_start|>'"]
    point_at(page, weighted.find_elements("css selector", ".trained")[0])
    assert "weight 0.5" in one(page, "#tip").text
    point_at(page, one(page, "h1"))
    assert not one(page, "#tip").is_displayed()


def test_the_keyboard_alone_searches_and_goes_from_token_to_token(page, made):
    press(page, "/")
    press(page, "F", "r", "a", "n", "c", "e")
    assert len(all_of(page, ".sample")) == 1
    press(page, "TAB", "TAB", "TAB")
    ids = made.samples["val"][0][0]
    for i in (0, 1, 2):
        press(page, "ARROW_RIGHT")
        assert one(page, "#tip").text.startswith(f"id {ids[i]}"), "every token here is a piece"
    press(page, "ARROW_LEFT")
    assert one(page, "#tip").text.startswith(f"id {ids[1]}")
    assert len(all_of(page, ".current")) == 1
    press(page, "ESCAPE")
    assert not one(page, "#tip").is_displayed()
    assert all_of(page, ".current") == []


def test_the_facts_are_there(page):
    assert one(page, "#audit").text == "audit passed"
    bars = [found.get_property("textContent") for found in all_of(page, "#histogram .bar:not(.of-trained) title")]
    assert sum(int(bar.split()[0]) for bar in bars) == 28
    tallest = max(float(found.get_attribute("height")) for found in all_of(page, "#histogram .bar"))
    assert tallest > 100
    titles = [title.lower() for title in texts(page, "aside h2, aside summary")]
    expected = ["lengths in tokens", "samples", "records", "conversations", "tokens", "tokens per sample"]
    assert titles == [*expected, "sources", "noticed", "bad records", "settings"]
    cells = texts(page, "aside td")
    assert {"total", "masked user", "100.0%", "spells control", "configs/mine.py:3", SOURCES[2]} <= set(cells)


def test_hostile_content_is_shown_as_text_and_nothing_is_fetched_or_complained_about(browser, url):
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests have left
    browser.get(url)
    one(browser, "#more").click()
    choose(browser, "source", SOURCES[2])
    (sample,) = all_of(browser, ".sample")
    shown = sample.find_element("css selector", ".tokens").get_property("textContent")
    assert shown.count('</script><img src=x onerror="alert(1)"><!-- ') == 2
    assert "<0x1B>[31mred" in shown
    assert all_of(browser, "img, b, iframe, object, link") == []
    assert browser.find_elements("css selector", "script:not([type])") == all_of(browser, "script:last-of-type")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [told["params"]["request"]["url"] for told in messages if told["method"] == "Network.requestWillBeSent"]
    assert requests == [url]


def test_the_policy_of_the_page_would_stop_a_script_that_broke_out(page):
    page.execute_script("document.body.setAttribute('onclick', 'window.broken = 1'); document.body.click()")
    assert page.execute_script("return window.broken") is None


def test_a_page_without_samples_works(browser, made, tmp_path: Path):
    inspect_data.main([str(made.folder), "--n=0", f"--html={tmp_path / 'page.html'}"])
    browser.get_log("browser")
    browser.get((tmp_path / "page.html").as_uri())
    assert one(browser, "#count").text.startswith("No sample matches; 0 of the 0")
    assert all_of(browser, "#histogram")
    assert browser.get_log("browser") == []
