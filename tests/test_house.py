"""The functions that measure the code's shape, on a tiny tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import house

FILES = {
    "pipeline/__init__.py": '"""Only a docstring."""\n',
    "pipeline/config.py": "import json\nfrom stages.base import Config\n",
    "stages/__init__.py": '"""Only a docstring."""\n',
    "stages/base.py": "class Config:\n    pass\n",
    "stages/train.py": (
        "from typing import TYPE_CHECKING\n"
        "from stages import images\n"
        "from stages.models.step import step\n"
        "import ray.train\n"
        "from ray.train import RunConfig\n"
        "if TYPE_CHECKING:\n"
        "    from stages.unseen import Unseen\n"
        "else:\n"
        "    import numpy\n"
        "def late():\n"
        "    from ray.data._internal import plan\n"
        "class Watch(ray.train.UserCallback):\n"
        "    def _poll(self):\n"
        "        self._mine = RunConfig(name='public')._other\n"
    ),
    "stages/unseen.py": "class Unseen:\n    pass\n",
    "stages/images/__init__.py": '"""Code."""\nfrom stages.images.png import encode\n',
    "stages/images/png.py": "class Config:\n    pass\n\n\ndef encode():\n    pass\n",
    "stages/models/__init__.py": "",
    "stages/models/step.py": "import torch\n\n\nstep = 1\n",
}


@pytest.fixture
def modules(tmp_path: Path) -> dict[str, house.Module]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house.read_modules(tmp_path)


def test_a_closure_has_what_is_imported_at_run_time_and_no_empty_packages(
    modules: dict[str, house.Module],
) -> None:
    found = house.closure(modules, "stages.train")
    assert set(found) == {"stages.train", "stages.images", "stages.images.png", "stages.models.step"}
    assert house.lines_of(found) == 14 + 2 + 6 + 4


def test_packages_are_those_that_the_modules_import(modules: dict[str, house.Module]) -> None:
    assert house.packages_of(house.closure(modules, "pipeline.config")) == {"json", "stages"}
    assert {"torch", "numpy", "ray"} <= house.packages_of(house.closure(modules, "stages.train"))


def test_a_class_name_that_exists_twice_is_named_with_its_modules(modules: dict[str, house.Module]) -> None:
    assert house.repeated_classes(modules) == {"Config": ["stages.base", "stages.images.png"]}


@pytest.mark.usefixtures("modules")
def test_private_names_of_ray_are_found_wherever_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "log.py").write_text("silence('ray.data._internal.progress')\n")
    assert house.private_names_of_ray(tmp_path) == [
        "cluster/log.py:1: ray.data._internal.progress",
        "stages/train.py:11: ray.data._internal.plan",
        "stages/train.py:13: Watch._poll",
        "stages/train.py:14: RunConfig(name='public')._other",
    ]


def test_our_code_uses_no_private_name_of_ray() -> None:
    assert house.private_names_of_ray(house.ROOT) == []


@pytest.mark.usefixtures("modules")
def test_work_on_the_cluster_is_found_wherever_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "stages" / "parallel").mkdir()
    (tmp_path / "stages" / "parallel" / "cluster.py").write_text("import ray.data\nray.remote(print)\n")
    (tmp_path / "pipeline" / "run.py").write_text(
        "import ray\n\n\n@ray.remote\ndef work():\n    ray.get(1)\n"
    )
    assert house.ray_work_elsewhere(tmp_path) == [
        "pipeline/run.py:4: ray.remote",
        "stages/train.py:11: ray.data._internal.plan",
    ]


def test_a_limit_holds_up_to_its_value() -> None:
    assert house.Figure("lines", 10, 10).holds
    assert not house.Figure("lines", 11, 10).holds


def test_the_figures_are_measured_on_the_given_tree(tmp_path: Path, modules: dict[str, house.Module]) -> None:
    values = {one.name: one.value for one in house.figures(tmp_path)}
    assert values["loose modules in stages/"] == 3
    assert values["modules imported to read a YAML"] == 2
    assert values["class names that exist twice"] == 1
    assert values["lines of pipeline/ and stages/"] == house.lines_of(modules)
