"""The report's page: what is in it, and that nothing a user named gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
from dataclasses import replace

import numpy as np
import pytest

from stages.config.report import ReportConfig
from stages.report import budget
from stages.reporting.page import (
    Curve,
    PictureCard,
    RejectCount,
    ReportData,
    StepTime,
    data_uri,
    number,
    page,
    text,
    thinned,
)

HOSTILE = '"><img src=x onerror=alert(1)><script>window.pwned=1</script>\u202e\x00\udc80&amp;'


class Reader(html.parser.HTMLParser):
    """Tags with attributes, and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(index: int = 0, key: str = "", **values: object) -> PictureCard:
    image = np.full((8, 8, 3), index % 256, np.uint8)
    uri = data_uri(image, max_side=8, max_bytes=4000)
    given: dict[str, object] = {
        "key": key or f"test/{index}",
        "split": "test",
        "group": "even" if index % 2 == 0 else "odd",
        "scores": {"l1": index / 10, "ssim": 1 - index / 10},
        "images": {"source": uri, "generated": uri, "target": uri},
        "width": 8,
        "height": 8,
        "picks": ("worst",) if index > 2 else ("best", "sample"),
    }
    return PictureCard(**(given | values))  # type: ignore[arg-type]


def data(**values: object) -> ReportData:
    given: dict[str, object] = {
        "title": "Streets",
        "scores": {"l1": 0.1, "psnr": 20.0},
        "intervals": {"l1": (0.08, 0.12)},
        "baselines": {
            "mean_target": {"l1": 0.2, "psnr": 15.0},
            "nearest": {
                "l1": 0.15,
                "psnr": 22.0,
                "intervals": {"l1": (0.13, 0.17)},
                "differences": {"l1": (-0.05, -0.07, -0.03), "psnr": (-2.0, -3.0, -1.0)},
            },
        },
        "num_images": 5,
        "pictures": [picture(i) for i in range(5)],
        "curves": [Curve(phase="global", name="loss", steps=[1, 2, 3], values=[3.0, 2.0, float("nan")])],
        "card": [("size", "8 x 8")],
        "rejects": [RejectCount(stage="shard", reason="empty", count=3, examples=["a", "b"])],
        "steps": [StepTime(name="train", seconds=90, counts={"steps": 100}, notes={"precision": "bf16"})],
        "config_text": "a: 1\n",
        "command": "python -m pipeline.run",
    }
    return ReportData(**(given | values))  # type: ignore[arg-type]


def test_the_page_shows_metrics_beside_baselines_with_a_verdict() -> None:
    messages = "".join(Reader(page(data())).texts)
    assert "33 % better than the best baseline (nearest target)" in messages
    assert "9 % worse than the best baseline (nearest target)" in messages
    for word in (
        "Streets",
        "empty",
        "1 min 30 s",
        "python -m pipeline.run",
        "8 x 8",
        "loss",
        "steps 100, precision bf16",
    ):
        assert word in messages


def test_better_is_said_only_where_the_interval_of_the_difference_excludes_zero() -> None:
    rival = {"l1": 0.15, "differences": {"l1": (-0.05, -0.11, 0.01)}}
    messages = "".join(Reader(page(data(baselines={"nearest": rival}))).texts)
    assert "no clear difference from the best baseline (nearest target)" in messages
    assert "0.100 (0.080 to 0.120)" in messages or "0.1 (0.08 to 0.12)" in messages
    assert "better than the" not in messages


def test_other_systems_are_beside_this_one_in_pictures_numbers_and_differences() -> None:
    theirs = {"l1": 0.3, "intervals": {"l1": (0.2, 0.4)}, "differences": {"l1": (-0.2, -0.3, -0.1)}}
    pictures = [picture(0), picture(1)]
    pictures = [replace(one, images={**one.images, "theirs": one.images["target"]}) for one in pictures]
    made = page(data(others={"theirs": theirs}, pictures=pictures))
    read = Reader(made)
    messages = "".join(read.texts)
    assert [image.get("data-role") for image in read.named("img")][:4] == [
        "source",
        "generated",
        "theirs",
        "target",
    ]
    assert "0.300 (0.200 to 0.400)" in messages or "0.3 (0.2 to 0.4)" in messages
    assert "-0.2 (-0.3 to -0.1) better" in messages or "-0.200 (-0.300 to -0.100) better" in messages
    assert "1 to 4 source, generated, theirs, target" in messages


def test_no_text_of_a_user_becomes_markup() -> None:
    everywhere = data(
        title=HOSTILE,
        lede=HOSTILE,
        groups={HOSTILE: {"l1": 1.0}},
        pictures=[picture(0, key=HOSTILE, group=HOSTILE, split=HOSTILE, note=HOSTILE)],
        curves=[Curve(phase=HOSTILE, name=HOSTILE, steps=[1], values=[1.0])],
        card=[(HOSTILE, HOSTILE)],
        suspects={HOSTILE: [picture(0, key=HOSTILE, split=HOSTILE, note=HOSTILE)]},
        rejects=[RejectCount(stage=HOSTILE, reason=HOSTILE, count=1, examples=[HOSTILE])],
        steps=[StepTime(name=HOSTILE, seconds=1, counts={HOSTILE: 1}, notes={HOSTILE: HOSTILE})],
        config_text=HOSTILE,
        command=HOSTILE,
        baselines={HOSTILE: {"l1": 1.0}},
        scores={"l1": 0.1, HOSTILE: 2.0},
    )
    made, plain = page(everywhere), page(data(pictures=[picture(0)]))
    read = Reader(made)
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert len(read.named("script")) == len(Reader(plain).named("script")) == 1
    assert all((image.get("src") or "data:").startswith("data:") for image in read.named("img"))
    assert "\u202e" not in made
    assert "\x00" not in made
    made.encode()  # no lone surrogate is left


def test_the_policy_allows_the_pages_own_script_and_style_only() -> None:
    made = page(data())
    policy = next(m["content"] for m in Reader(made).named("meta") if m.get("http-equiv"))
    assert policy is not None
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", made, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r'(?:src|href)="(?!data:|#)', made)
    assert " style=" not in re.sub(r"<(script|style)>.*?</\1>", "", made, flags=re.DOTALL)


def test_an_empty_run_still_has_a_page() -> None:
    made = page(ReportData(title="Nothing"))
    assert "No pictures." in made
    assert "Nothing was refused." in made


@pytest.mark.parametrize(("channels", "side", "limit"), [(3, 300, 4000), (1, 64, 900), (3, 1, 100)])
def test_pictures_are_made_to_fit(channels: int, side: int, limit: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, channels), np.uint8)
    uri = data_uri(noise, max_side=256, max_bytes=limit)
    assert uri.startswith("data:image/webp;base64,")
    assert len(base64.b64decode(uri.partition(",")[2])) <= max(limit, 2000)


def test_a_long_curve_is_thinned_to_means() -> None:
    steps, values = thinned(Curve(phase="p", name="n", steps=list(range(10_000)), values=[1.0] * 10_000))
    assert len(steps) <= 240
    assert set(values) == {1.0}
    assert thinned(Curve(phase="p", name="n", steps=[1], values=[float("inf")])) == ([], [])


@pytest.mark.parametrize(
    ("value", "messages"),
    [(None, "\u2013"), (float("nan"), "\u2013"), (0.12345, "0.123"), (12.345, "12.35"), (1234.5, "1,234")],
)
def test_numbers_have_a_sensible_length(value: float | None, messages: str) -> None:
    assert number(value) == messages


def test_text_shows_what_cannot_be_seen() -> None:
    assert text("a\u202eb\x07<") == "a\\u202eb\\u0007&lt;"
    assert text("gr\u00fc\u00df \u6f22 \U0001f3e0") == "gr\u00fc\u00df \u6f22 \U0001f3e0"


def test_five_hundred_pictures_of_any_content_fit_the_pages_budget() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)  # nothing is larger
    most = budget(ReportConfig(), 500)
    uri = data_uri(noise, max_side=1024, max_bytes=most)
    assert most * 0.5 < len(uri) * 3 / 4 <= most + 100
    shown = [picture(i, images=dict.fromkeys(("source", "generated", "target"), uri)) for i in range(500)]
    made = page(ReportData(title="x", num_images=500, pictures=shown)).encode()
    assert 8e6 < len(made) < 20e6
    assert made.count(b'loading="lazy"') == 1500
