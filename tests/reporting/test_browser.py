"""The report in a real browser: keyboard, filter, order, themes, and a hostile key that does nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.reporting.page import Curve, PictureCard, ReportData, StepTime, data_uri, page

HOSTILE = '"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script><svg onload=window.pwned=1>'
pytestmark = pytest.mark.browser


def picture(index: int, key: str = "") -> PictureCard:
    def shade(value: int) -> str:
        return data_uri(np.full((64, 96, 3), value, np.uint8), max_side=96, max_bytes=9000)

    return PictureCard(
        key=key or f"test/street {index:03d}",
        split="test" if index % 3 else "val",
        group="even" if index % 2 == 0 else "odd",
        scores={"l1": (index * 7 % 10) / 10, "ms_ssim": index / 10},
        images={"source": shade(index * 9), "generated": shade(80), "target": shade(200)},
        width=96,
        height=64,
        picks=("worst",) if index < 4 else ("sample",),
    )


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    made = page(
        ReportData(
            title="Streets",
            scores={"l1": 0.2},
            baselines={"mean_target": {"l1": 0.3}},
            num_images=10,
            pictures=[*(picture(i) for i in range(10)), picture(10, key=HOSTILE)],
            curves=[
                Curve(phase="global", name="loss", steps=range(50), values=[1 / (i + 1) for i in range(50)])
            ],
            steps=[StepTime(name="train", seconds=9)],
            config_text=HOSTILE,
            command="python -m pipeline.run",
        )
    )
    (tmp_path / "report.html").write_text(made, encoding="utf-8")
    tab = browser.new_page()
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.emulate_media(color_scheme="light")
    tab.problems = []
    tab.on("console", lambda m: tab.problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on(
        "request", lambda r: tab.problems.append(r.url) if not r.url.startswith(("data:", "file:")) else None
    )
    tab.goto((tmp_path / "report.html").as_uri())
    yield tab
    assert tab.problems == []
    assert tab.evaluate("window.pwned") is None
    tab.close()


def keys(tab: Any) -> list[str]:
    return [e.get_attribute("data-key") for e in tab.query_selector_all(".card") if e.is_visible()]


def test_the_worst_pictures_come_first_and_the_best_when_asked(opened: Any) -> None:
    def scores() -> list[float]:
        return [float(e.get_attribute("data-s0")) for e in opened.query_selector_all(".card")]

    assert scores() == sorted(scores(), reverse=True)
    opened.select_option("#order", label="best L1 first")
    assert scores() == sorted(scores())


def test_pictures_are_found_by_key_split_group_and_choice(opened: Any) -> None:
    opened.keyboard.press("/")
    opened.keyboard.type("STREET 003")
    assert keys(opened) == ["test/street 003"]
    assert opened.inner_text("#count") == "1 of 11 pictures"
    opened.fill("#find", "")
    opened.select_option("#split", "val")
    opened.select_option("#group", "odd")
    assert set(keys(opened)) == {"test/street 003", "test/street 009"}
    opened.select_option("#pick", "worst")
    assert keys(opened) == ["test/street 003"]


def test_a_picture_opens_slides_and_closes_by_keyboard_alone(opened: Any) -> None:
    opened.keyboard.press("/")
    opened.keyboard.type("street")
    for _ in range(5):
        opened.keyboard.press("Tab")
    first = opened.evaluate("document.activeElement.closest('.card').dataset.key")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    second = opened.inner_text("#viewer-key")
    assert second != first
    assert opened.evaluate("document.getElementById('viewer').open")
    opened.keyboard.press("ArrowRight")
    assert opened.input_value("#slider") == "51"
    assert "49%" in opened.evaluate("document.getElementById('over').style.clipPath")
    opened.keyboard.press("n")
    assert opened.inner_text("#viewer-key") != second
    opened.keyboard.press("p")
    assert opened.inner_text("#viewer-key") == second
    opened.keyboard.press("3")
    assert opened.input_value("#left") == "target"
    opened.keyboard.press("Escape")
    assert not opened.evaluate("document.getElementById('viewer').open")
    assert opened.evaluate("document.activeElement.closest('.card').dataset.key") == second


def test_light_and_dark_follow_the_system_until_chosen(opened: Any) -> None:
    def background() -> str:
        return str(opened.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    opened.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    opened.click("#theme")
    assert background() == light
    opened.click("#theme")
    opened.emulate_media(color_scheme="light")
    assert background() == dark


def test_a_hostile_key_is_text_and_nothing_else(opened: Any) -> None:
    opened.fill("#find", "onerror")
    assert keys(opened) == [HOSTILE]
    opened.click(".card:visible button")
    assert opened.inner_text("#viewer-key") == HOSTILE
    assert opened.query_selector("#viewer-key img") is None


def test_nothing_overflows_on_a_phone(opened: Any) -> None:
    opened.set_viewport_size({"width": 375, "height": 700})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_slider_shows_the_left_picture_left_and_the_right_one_right(opened: Any) -> None:
    opened.click(".card:visible button")
    box = opened.locator("#under").bounding_box()
    shot = opened.locator(".stack").screenshot()
    with Image.open(io.BytesIO(shot)) as image:
        grey = np.asarray(image.convert("L"))
    assert box["width"] > 50
    middle = grey.shape[0] // 2
    assert abs(int(grey[middle, grey.shape[1] // 4]) - 80) < 6
    assert abs(int(grey[middle, 3 * grey.shape[1] // 4]) - 200) < 6
