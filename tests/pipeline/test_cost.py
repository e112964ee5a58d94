"""What is left, how long it takes and what it costs, from markers and listings alone: no Ray, no training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import config as configuration, cost
from pipeline.dag import steps
from pipeline.run import main
from pipeline.runner import MARKER, PREDICTED, PlannedStep, plan
from stages import storage
from stages.errors import UserError
from stages.training.operations import step_operations

YAML = str(Path(__file__).resolve().parents[2] / "pipeline.yaml")
SMALL = [
    "shard.size=[64, 32]",
    "train.model={kind: pix2pix, levels: 4, width: 4, discriminator_width: 4, discriminator_layers: 1}",
    "train.phases=[{name: whole, kind: whole, epochs: 10, batch: 4}]",
    "train.losses={}",
    "resources.gpu=false",
    "resources.threads_per_worker=1",
]
LISTED = {
    "objects": 3000,
    "role_source": 1000,
    "role_target": 1000,
    "role_instance": 1000,
    "bytes": 3 * 10**8,
}
PRICES = cost.read_prices(cost.PRICES)
NOISE = cost.noise


@pytest.fixture
def run(tmp_path: Path) -> cost.PlannedRun:
    """A run of 1,000 listed pairs in an empty workspace, on a machine of 10^9 operations per second."""
    return planned(tmp_path)


def planned(workspace: Path | str, *settings: str, seen: dict[str, int] = LISTED) -> cost.PlannedRun:
    config = configuration.load(YAML, [f"workspace={workspace}", *SMALL, *settings])
    chosen = [
        PlannedStep(
            step=step,
            fingerprint="0" * 12,
            folder=f"{config.workspace}/{step.name}-{'0' * 12}",
            inputs={name: f"{config.workspace}/{source}-{'0' * 12}" for name, source in step.needs.items()},
            seen=seen if step.name == "ingest" else {},
        )
        for step in steps(config)
    ]
    return cost.PlannedRun(config=config, planned=chosen, probes={"float32": 1e9})


def finished(run: cost.PlannedRun, name: str, seconds: float, counts: dict[str, int], **more: Any) -> None:
    """A step that an earlier run finished. A plan that has looked at the workspace does not see it."""
    (p,) = [p for p in run.planned if p.step.name == name]
    marker = {
        "config": p.step.config.model_dump(mode="json"),
        "version": p.step.version,
        "inputs": {},
        "counts": counts,
        "metrics": {},
        "seconds": seconds,
    }
    folder = storage.join(run.config.workspace, f"{name}-{'1' * 12}")
    storage.write_json(storage.join(folder, MARKER), marker | more)


def estimates(run: cost.PlannedRun) -> dict[str, cost.Estimate]:
    return {one.step.step.name: one for one in cost.estimate(replace(run), run.planned)}


def test_a_first_run_is_estimated_from_its_listing_and_the_probed_rate(run: cost.PlannedRun) -> None:
    found = estimates(run)
    assert set(found) == {"ingest", "pair", "shard", "train-whole", "infer", "evaluate", "report"}
    train, each = found["train-whole"], step_operations(run.jobs[0], run.spec)
    assert train.work.units == 750 * 10 * each  # pair.split keeps a quarter for val and test
    assert train.seconds == pytest.approx(cost.ASSUMED["train"][0] + 7500 * each / 1e9)
    assert (train.rate.source, found["pair"].rate.source) == ("probe", "assumed")
    assert found["infer"].work.units == 150 * cost.generating(run.jobs[0], run.spec, None)


def test_an_earlier_run_gives_the_rate_of_the_next(run: cost.PlannedRun) -> None:
    finished(run, "shard", 11.0, {"pairs": 100})
    shard = estimates(run)["shard"]
    start = cost.ASSUMED["shard"][0]
    assert shard.seconds == pytest.approx(start + 10 * (11.0 - start))  # ten times the pairs
    assert shard.rate.source == "shard-111111111111"
    finished(run, "shard", 2.0, {"pairs": 100}, resumed=True)
    assert estimates(run)["shard"].rate.source == "assumed", "whose time is of a part of the work"


def test_a_phases_curves_give_its_rate_and_its_start(run: cost.PlannedRun) -> None:
    counts, notes = {"images": 400, "steps": 100}, {"precision": "float32", "workers": "1 on cpu"}
    finished(run, "train-whole", 50.0, counts, notes=notes)
    table = pa.table(
        {"name": ["throughput/images_per_second"] * 2, "images": [200, 400], "value": [10.0, 20.0]}
    )
    storage.write_parquet(f"{run.config.workspace}/train-whole-{'1' * 12}/metrics.parquet", table)
    assert estimates(run)["train-whole"].seconds == pytest.approx(20 + 7500 * 30 / 400)
    finished(run, "train-whole", 50.0, counts, notes=notes | {"workers": "2 on cpu"})
    assert estimates(run)["train-whole"].rate.source == "probe", "of other workers, the rate is another"


def test_a_resumed_workspace_counts_only_what_is_left(run: cost.PlannedRun) -> None:
    half = 10 * 188 // 2  # of 750 pairs, a step takes 4
    whole = estimates(run)["train-whole"].work.units
    train = next(p for p in run.planned if p.step.stage == "train")
    storage.write_bytes(f"{train.folder}/checkpoints/step-{half:08d}/x", b"")
    resumed = replace(run, planned=[replace(p, resumes=p is train) for p in run.planned])
    assert estimates(resumed)["train-whole"].work.units == pytest.approx(whole / 2)


def test_finished_steps_take_nothing_and_count_the_pairs(run: cost.PlannedRun) -> None:
    marker = {"counts": {"pairs": 90, "train": 60, "val": 10, "test": 20}}
    done = [replace(p, marker=marker if p.step.name == "pair" else None) for p in run.planned]
    found = estimates(replace(run, planned=done))
    assert "pair" not in found
    assert found["report"].work.units == 20


def test_pairs_of_a_table_are_unknown_until_it_is_read(tmp_path: Path) -> None:
    text = cost.report((run := planned(tmp_path, seen={"unread": 1})), run.planned, PRICES, "")
    assert "train-whole          unknown" in text


def test_requests_and_machines_cost_what_the_price_list_says(tmp_path: Path) -> None:
    run = planned(
        tmp_path, *(f"ingest.locations.{n}.uri=s3://b/{role}" for n, role in enumerate(("l", "p", "i")))
    )
    found = cost.estimate(run, run.planned)
    reads = sum(one.work.reads for one in found)
    writes = sum(one.work.writes for one in found)
    assert (reads, writes) == (3000, 3)  # an object each, and three pages of names
    assert cost.of_requests(run, found, PRICES) == pytest.approx(3000 * 0.4e-6 + 3 * 5e-6)
    text = cost.report(run, run.planned, PRICES, "g5.xlarge")
    assert "hours of g5.xlarge at $1.01" in text
    assert PRICES.date in text


def test_a_network_that_is_slower_than_the_cores_is_the_limit(
    run: cost.PlannedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "NETWORK_BYTES", 1e3)
    monkeypatch.setattr(storage, "is_local", lambda _: False)
    assert estimates(run)["train-whole"].limit == "network"
    assert estimates(run)["train-whole"].work.reads == 7500 * cost.pair_bytes(run.spec) / cost.ROW_GROUP_BYTES


def test_the_cheapest_number_of_workers_that_fits_is_named(
    run: cost.PlannedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cost.estimate(run, run.planned)
    lines = cost.choices(run, found)
    assert [line.split()[:3] for line in lines] == [[n, "x", "float32"] for n in "124"]
    assert ["the cheapest" in line for line in lines] == [True, False, False]
    monkeypatch.setattr(cost.PlannedRun, "gpu_memory", 1000)
    assert all("does not fit" in line for line in cost.choices(run, found))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("machines: {}", "date: "),
        ("{date: x, machines: {a: -1}, stores: {}}", "machines.a: "),
        ("[", "cannot be read: "),
        ("[" * 5000, "cannot be read: "),
        (None, "cannot be read: "),
    ],
)
def test_a_wrong_price_list_is_named_in_one_line(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        cost.read_prices(str(path))
    assert f"--prices {path}: {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_without_a_price_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(UserError, match=r"--machine x1: no price is known; there are c7i.xlarge, "):
        PRICES.hourly("x1")


def test_the_probe_measures_steps_of_the_phase_where_its_batch_is_small_enough(run: cost.PlannedRun) -> None:
    assert 1e6 < cost.probe(run, "float32") < 1e15


def test_a_step_that_does_not_fit_in_memory_is_not_probed(
    run: cost.PlannedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "estimate_memory", lambda *_, **__: 1 << 60)
    run.probes.clear()
    assert {"train-whole", "infer"}.isdisjoint(estimates(run))
    assert "too large for this memory" in cost.report(run, run.planned, PRICES, "")


def test_a_probe_of_a_large_step_takes_smaller_images(
    run: cost.PlannedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setitem(cost.PROBE_OPERATIONS, "cpu", 1.0)
    monkeypatch.setattr(cost, "noise", lambda *given: sizes.append(given[1:]) or NOISE(*given))
    assert cost.probe(run, "float32") > 0
    assert sizes == [(1, (32, 16))]  # of 4 pairs of 64x32; its networks take no less than 16


def test_the_plan_keeps_what_it_expects_for_the_markers(run: cost.PlannedRun) -> None:
    cost.report(run, run.planned, PRICES, "")
    place = storage.join(run.config.workspace, PREDICTED)
    assert storage.read_json(place)[f"train-whole-{'0' * 12}"] > cost.ASSUMED["train"][0]
    pair = [replace(step, needs={}) for step in steps(run.config) if step.name == "pair"]
    (p,) = plan(pair, run.config.workspace)
    storage.write_json(place, {p.folder.rpartition("/")[2]: 12.5})
    (p,) = plan(pair, run.config.workspace)
    assert p.predicted == 12.5


def test_the_plan_says_how_far_off_earlier_ones_were(run: cost.PlannedRun) -> None:
    assert "no step here was estimated" in cost.report(run, run.planned, PRICES, "")
    finished(run, "pair", 15.0, {}, predicted=10.0)
    finished(run, "ingest", 11.0, {}, predicted=10.0)
    text = cost.report(replace(run), run.planned, PRICES, "")
    assert "error                    30%  median of 2 earlier estimates of steps here, at most 50%" in text


def test_prices_without_a_plan_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--machine", "some"])
    assert stopped.value.code == 2
    assert "--machine and --prices are for --plan" in capsys.readouterr().err
