"""The Grafana dashboard asks for metrics that exist: ours by name, Ray's as its own dashboards name them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from stages.parallel import monitoring

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "cluster" / "grafana" / "pixloom.json"


def panels() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return shown


def queried() -> set[str]:
    """The metrics in the dashboard's queries; labels have no `ray_` name that is not a metric's too."""
    queries = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    return set(re.findall(r"\bray_\w+", re.sub(r"by \([^)]*\)", "", queries)))


def ours() -> set[str]:
    """Our metrics, as Ray exports them."""
    declared = [one for one in vars(monitoring).values() if isinstance(one, Counter | Gauge)]
    return {f"ray_{one.info['name']}{'_total' * isinstance(one, Counter)}" for one in declared}


def test_the_dashboard_shows_every_metric_of_ours_and_no_other() -> None:
    assert {name for name in queried() if "pixloom" in name} == ours()


def test_rays_metrics_are_named_as_rays_own_dashboards_name_them() -> None:
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = " ".join(path.read_text() for path in folder.glob("*_panels.py"))
    known = set(re.findall(r"\bray_\w+", text))
    assert queried() - ours() <= known


def test_every_panel_has_a_unit_and_says_what_it_shows() -> None:
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    assert len({panel["title"] for panel in panels()}) == len(panels())


def test_the_guide_explains_every_metric_of_ours() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    assert [name for name in sorted(ours()) if f"`{name}`" not in guide] == []
