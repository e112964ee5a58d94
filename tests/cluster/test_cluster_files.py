"""What starts a cluster agrees with itself, with the tools that read it, and with the project.

No Ray is started: the files are held against Ray's own schema and command lines (as text), EC2's request
model, KubeRay's field names, Kubernetes' rules for quantities and names, requirements.lock and the config.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import stat
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
from botocore.credentials import EnvProvider
from botocore.validate import ParamValidator
from ray.core.generated import autoscaler_pb2

from cluster import local
from stages.base import Resources
from stages.training.loop import ORDERS_S, WARNINGS_S

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = ("aws.yaml", "gcp.yaml")
MANIFESTS = ("rayjob.yaml", "raycluster.yaml")
DASHBOARD = 8265
GCS = 6379

# As in the API reference of KubeRay 1.6.
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "jobId"),
    *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "managedBy", "metadata", "suspend"),
    *("rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig"),
    *("submitterPodTemplate", "ttlSecondsAfterFinished"),
}
CLUSTER_FIELDS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions"),
    *("headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "workerGroupSpecs"),
}
AUTOSCALER_FIELDS = {
    *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext"),
    *("upscalingMode", "version", "volumeMounts"),
}
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
GROUP_FIELDS = {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams"),
    *("replicas", "scaleStrategy", "suspend", "template"),
}
POD_FIELDS = {
    *("affinity", "containers", "nodeSelector", "priorityClassName", "securityContext"),
    *("serviceAccountName", "terminationGracePeriodSeconds", "tolerations", "volumes"),
}
CONTAINER_FIELDS = {
    *("env", "envFrom", "image", "imagePullPolicy", "lifecycle", "name", "ports", "resources"),
    *("securityContext", "volumeMounts"),
}
VOLUME_KINDS = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "m": 1e-3, "": 1.0}

# vCPUs and GPUs as the clouds' pages list them.
MACHINES = {
    "m7i.xlarge": (4, 0),
    "c7i.4xlarge": (16, 0),
    "g6.12xlarge": (48, 4),
    "n2-standard-4": (4, 0),
    "n2-standard-16": (16, 0),
    "g2-standard-48": (48, 4),
}


# -- reading ---------------------------------------------------------------------------------------


def documents(name: str) -> dict[str, dict[str, Any]]:
    """A Kubernetes file's objects by kind."""
    text = (CLUSTER / "kubernetes" / name).read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return documents("rayjob.yaml")["RayJob"]


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    """The cluster's spec, the same in both manifests."""
    found: dict[str, Any] = documents("raycluster.yaml")["RayCluster"]["spec"]
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")


@pytest.fixture(scope="module")
def steps() -> str:
    """What the image's script does."""
    return (CLUSTER / "install.sh").read_text()


def launcher(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return values


def project() -> dict[str, Any]:
    values: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return values


def locked() -> dict[str, str]:
    """requirements.lock: package -> version."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def groups(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Head and worker groups by name, each with its pod."""
    workers = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"], **workers}


def pods(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: group["template"]["spec"] for name, group in groups(spec).items()}


def containers(spec: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods(spec).items():
        for container in pod["containers"]:
            yield name, container


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number. Raises ValueError, as the API server would refuse it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|m|)", str(text))
    if found is None:
        raise ValueError(f"{text!r} is not a quantity")
    return float(found[1]) * UNITS[found[2]]


def ray_source(*parts: str) -> str:
    """A file of the installed Ray, as text: importing Ray takes seconds."""
    origin = importlib.util.find_spec("ray").origin  # type: ignore[union-attr]
    return Path(str(origin)).parent.joinpath(*parts).read_text()


def instruction(dockerfile: str, word: str) -> list[str]:
    return [line.split(None, 1)[1] for line in dockerfile.splitlines() if line.startswith(f"{word} ")]


def image(container: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name, version and device of `REGISTRY/pixloom:0.1.0-gpu`."""
    name, _, tag = str(container["image"]).rpartition(":")
    version, _, device = tag.rpartition("-")
    return name, version, device


# -- Kubernetes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_objects_with_names_kubernetes_accepts(name: str) -> None:
    for kind, document in documents(name).items():
        assert document["apiVersion"] == ("v1" if kind == "ConfigMap" else "ray.io/v1")
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", document["metadata"]["name"])


def test_the_job_runs_on_the_same_cluster_that_stands(job: dict[str, Any], spec: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"] == spec


def test_fields_are_those_kuberay_knows(job: dict[str, Any], spec: dict[str, Any]) -> None:
    assert job["spec"].keys() <= JOB_FIELDS
    assert spec.keys() <= CLUSTER_FIELDS
    assert spec["autoscalerOptions"].keys() <= AUTOSCALER_FIELDS
    assert spec["headGroupSpec"].keys() <= HEAD_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= GROUP_FIELDS
    for pod in pods(spec).values():
        assert pod.keys() <= POD_FIELDS
        for volume in pod["volumes"]:
            assert len(volume.keys() & VOLUME_KINDS) == 1
            assert len(volume) == 2
    for _, container in containers(spec):
        assert container.keys() <= CONTAINER_FIELDS


def test_ray_is_the_locked_version(spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == locked()["ray"]


def test_quantities_parse_and_pods_get_what_they_ask_for(spec: dict[str, Any]) -> None:
    asked = [container["resources"] for _, container in containers(spec)]
    for resources in [*asked, spec["autoscalerOptions"]["resources"]]:
        assert resources["requests"] == resources["limits"]
        assert all(quantity(value) > 0 for value in resources["limits"].values())


def test_the_object_store_fits_into_the_memory(spec: dict[str, Any]) -> None:
    for pod in pods(spec).values():
        (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
        memory = quantity(pod["containers"][0]["resources"]["limits"]["memory"])
        assert shm["medium"] == "Memory"
        # Ray's object store takes 30 % of the memory if /dev/shm has it, and complains where it has not.
        assert 0.2 * memory <= quantity(shm["sizeLimit"]) <= 0.5 * memory


def test_mounts_name_volumes_of_their_pod(spec: dict[str, Any]) -> None:
    for pod in pods(spec).values():
        there = {volume["name"] for volume in pod["volumes"]}
        mounts = pod["containers"][0]["volumeMounts"]
        assert {mount["name"] for mount in mounts} == there
        assert "/dev/shm" in {mount["mountPath"] for mount in mounts}  # noqa: S108


def test_groups_scale_between_bounds_and_only_one_has_gpus(spec: dict[str, Any]) -> None:
    assert spec["enableInTreeAutoscaling"] is True
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    with_gpu = [name for name, c in containers(spec) if "nvidia.com/gpu" in c["resources"]["limits"]]
    assert with_gpu == ["gpu"]
    assert groups(spec)["cpu"]["minReplicas"] >= 1, "Ray Data plans by the CPUs it sees"
    tolerated = [toleration["key"] for toleration in pods(spec)["gpu"]["tolerations"]]
    assert tolerated == ["nvidia.com/gpu"]


def test_start_parameters_are_flags_of_ray_start_and_text(spec: dict[str, Any]) -> None:
    flags = ray_source("scripts", "scripts.py")
    for group in groups(spec).values():
        for name, value in group["rayStartParams"].items():
            assert f'"--{name}"' in flags
            assert isinstance(value, str)


def test_a_pod_that_ends_gives_notice_before_it_does(spec: dict[str, Any]) -> None:
    pod = pods(spec)["gpu"]
    shell, flag, command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("sh", "-c")
    notice, sleep = command.split("; ")
    words = shlex.split(notice)
    assert words[:2] == ["ray", "drain-node"]
    source = ray_source("scripts", "scripts.py")
    assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    assert autoscaler_pb2.DrainNodeReason.Value(words[3])
    saving = 2 * ORDERS_S + WARNINGS_S
    assert saving < int(sleep.split()[1]) < int(words[-1]) < pod["terminationGracePeriodSeconds"]


def plain_variables(container: Mapping[str, Any]) -> dict[str, str]:
    """A container's variables that are no secrets."""
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


def test_nodes_have_time_to_drain_after_sigterm(spec: dict[str, Any]) -> None:
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert f'"{name}"' in ray_source("_private", "ray_constants.py")
    ending = 5  # seconds that Ray's processes took to end after a drain
    saving = 2 * ORDERS_S + WARNINGS_S
    for group, container in containers(spec):
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep 0"])
        waits = int(hook[-1].rpartition("sleep ")[2])
        grace = pods(spec)[group].get("terminationGracePeriodSeconds", 30)  # Kubernetes' default
        drain = int(plain_variables(container)[name])
        assert saving < drain < grace - waits - ending
    for launched, notice in {"aws.yaml": 120, "gcp.yaml": 30}.items():
        (option,) = [one for one in launcher(launched)["docker"]["run_options"] if name in one]
        assert saving < int(option.partition("=")[2]) < notice - ending


def test_hung_collectives_are_detected_before_they_time_out(spec: dict[str, Any]) -> None:
    source = ray_source("train", "v2", "_internal", "constants.py")
    timeout = Resources().collective_timeout_s
    places = [plain_variables(container) for _, container in containers(spec)]
    for name in LAUNCHERS:
        options = [one.removeprefix("--env ") for one in launcher(name)["docker"]["run_options"]]
        places.append(dict(one.split("=", 1) for one in options))
    for variables in places:
        detector = {name: value for name, value in variables.items() if "NCCL" in name}
        assert all(f'"{name}"' in source for name in detector)
        assert detector["RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR"] == "1"
        assert f'"{detector["RAY_TRAIN_NCCL_RAS_ACTION"]}"' in source
        assert int(detector["RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S"]) < timeout


def test_the_option_of_a_kueue_queue_is_a_label_of_the_job() -> None:
    text = (CLUSTER / "kubernetes" / "rayjob.yaml").read_text()
    _, job = yaml.safe_load_all(text.replace("# labels:", "labels:"))
    assert job["metadata"] == {"name": "pixloom", "labels": {"kueue.x-k8s.io/queue-name": "QUEUE"}}
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue takes no other


def test_ports_are_those_the_readme_forwards(spec: dict[str, Any]) -> None:
    ports = {port["name"]: port["containerPort"] for port in pods(spec)["head"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": GCS, "dashboard": DASHBOARD, "client": 10001}
    assert all(len(name) <= 15 for name in ports)
    forward = "kubectl port-forward service/pixloom-head-svc 8265:8265"
    assert forward in (CLUSTER / "README.md").read_text()
    assert forward in (CLUSTER / "kubernetes" / "raycluster.yaml").read_text()
    assert documents("raycluster.yaml")["RayCluster"]["metadata"]["name"] == "pixloom"


def test_secrets_come_by_reference_under_the_names_the_aws_chain_reads(spec: dict[str, Any]) -> None:
    read = {EnvProvider.ACCESS_KEY, EnvProvider.SECRET_KEY, *EnvProvider.TOKENS}
    for _, container in containers(spec):
        secret = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e}
        assert {EnvProvider.ACCESS_KEY, EnvProvider.SECRET_KEY} <= secret.keys() <= read
        for name, reference in secret.items():
            assert reference["name"] == "pixloom-s3"
            assert reference["key"] == name
        plain = plain_variables(container)
        assert {name for name in plain if not name.startswith("RAY_")} == {
            BOTOCORE_DEFAUT_SESSION_VARIABLES["region"][1]
        }
        assert all(isinstance(value, str) for value in plain.values())


@pytest.mark.parametrize("name", ["README.md", "kubernetes/rayjob.yaml", "kubernetes/raycluster.yaml"])
def test_the_command_that_makes_the_secret_gives_the_keys_the_pods_need(
    name: str, spec: dict[str, Any]
) -> None:
    (command,) = re.findall(r"kubectl create secret generic (\S+) (.*)", (CLUSTER / name).read_text())
    needed = {
        e["valueFrom"]["secretKeyRef"]["key"]
        for _, container in containers(spec)
        for e in container["env"]
        if "valueFrom" in e and not e["valueFrom"]["secretKeyRef"].get("optional")
    }
    assert command[0] == "pixloom-s3"
    assert set(re.findall(r"--from-literal=(\w+)=", command[1])) == needed


def test_the_variables_set_for_ray_are_read_by_it(spec: dict[str, Any], dockerfile: str) -> None:
    supervisor = ray_source("dashboard", "modules", "job", "job_supervisor.py")
    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in supervisor
    for name in LAUNCHERS:
        assert "--env RAY_JOB_STOP_WAIT_TIME_S=30" in launcher(name)["docker"]["run_options"]
        assert "--env RAY_AUTH_MODE=token" in launcher(name)["docker"]["run_options"]
    assert "RAY_AUTH_MODE=token" in dockerfile


def test_the_entrypoint_runs_the_pipeline_with_flags_it_has(job: dict[str, Any]) -> None:
    from pipeline.run import parser

    python, dash, module, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash, module) == ("python", "-m", "pipeline.run")
    assert importlib.util.find_spec(module) is not None
    options = parser().parse_args(words)
    mounts = pods(job["spec"]["rayClusterSpec"])["head"]["containers"][0]["volumeMounts"]
    (folder,) = [mount["mountPath"] for mount in mounts if mount["name"] == "run"]
    volumes = pods(job["spec"]["rayClusterSpec"])["head"]["volumes"]
    (source,) = [volume["configMap"]["name"] for volume in volumes if volume["name"] == "run"]
    configmap = documents("rayjob.yaml")["ConfigMap"]
    assert source == configmap["metadata"]["name"]
    assert options.config == f"{folder}/{next(iter(configmap['data']))}"


def test_the_run_in_the_manifest_is_a_config_that_fits_the_cluster(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    from pipeline import config as configuration

    (text,) = documents("rayjob.yaml")["ConfigMap"]["data"].values()
    assert "extends: /opt/pixloom/" in text
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("/opt/pixloom/", f"{ROOT}/"))
    config = configuration.load(str(path))
    assert config.workspace.startswith("s3://"), "pods share no disk"
    assert all(location.uri.startswith("s3://") for location in config.ingest.locations)
    assert str(config.tracking.uri).startswith("http"), "pods share no SQLite file"
    assert config.resources.gpu is True, "the autoscaler starts without GPUs"
    group = groups(spec)["gpu"]
    gpus = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert config.resources.train_workers <= gpus * group["maxReplicas"]
    assert config.resources.train_workers % gpus == 0
    assert all(phase.batch == config.resources.train_workers for phase in config.train.phases)


# -- the image -------------------------------------------------------------------------------------


def test_images_agree_in_name_and_version_with_each_other_and_the_project(spec: dict[str, Any]) -> None:
    used = {name: image(container) for name, container in containers(spec)}
    used |= {name: image(launcher(name)["docker"]) for name in LAUNCHERS}
    assert {(name, version) for name, version, _ in used.values()} == {
        ("REGISTRY/pixloom", project()["version"])
    }
    devices = {name: device for name, (_, _, device) in used.items()}
    assert devices == {"head": "cpu", "gpu": "gpu", "cpu": "cpu", "aws.yaml": "gpu", "gcp.yaml": "gpu"}
    for text in ((CLUSTER / "README.md").read_text(), (CLUSTER / "Dockerfile").read_text()):
        assert set(re.findall(r"-t (REGISTRY/\S+)", text)) == {
            f"REGISTRY/pixloom:{project()['version']}-{device}" for device in ("gpu", "cpu")
        }


def test_the_image_has_a_python_the_project_supports(dockerfile: str) -> None:
    (base,) = instruction(dockerfile, "FROM")
    assert base == "python:${PYTHON}-slim-bookworm"
    (version,) = [a.partition("=")[2] for a in instruction(dockerfile, "ARG") if a.startswith("PYTHON=")]
    least = project()["requires-python"].removeprefix(">=")
    assert [int(part) for part in version.split(".")] >= [int(part) for part in least.split(".")]


def test_the_image_is_built_from_the_lock_and_nothing_else(dockerfile: str, steps: str) -> None:
    assert instruction(dockerfile, "RUN") == ["sh /opt/pixloom/install.sh /opt/pixloom/requirements.lock"]
    torch, rest = re.findall("pip install (.*)", steps)
    assert '"${torch}"' in torch
    assert '--constraint "${lock}" --requirement "${lock}"' in rest
    assert {a.partition("=")[0] for a in instruction(dockerfile, "ARG")} == {"PYTHON", "DEVICE", "EXTRA"}


def test_what_the_image_copies_is_there_and_passes_the_ignore_file(dockerfile: str) -> None:
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = {line.split()[0] for line in instruction(dockerfile, "COPY")}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_runs_as_the_user_the_pods_name(dockerfile: str, steps: str, spec: dict[str, Any]) -> None:
    (user,) = instruction(dockerfile, "USER")
    uid, gid = (int(part) for part in user.split(":"))
    assert uid > 0
    assert f"--uid {uid}" in steps
    for pod in pods(spec).values():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"]) == (uid, gid)
    for _, container in containers(spec):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_image_holds_what_its_starters_call(dockerfile: str, steps: str) -> None:
    (packages,) = re.findall("apt-get install (.*)", steps)
    assert {"wget", "rsync"} <= set(packages.split())
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(instruction(dockerfile, "ENV"))))
    assert environment["HOME"] == "/home/ray"  # `ray up` reads it there
    assert environment["PYTHONPATH"] == instruction(dockerfile, "WORKDIR")[0] == "/opt/pixloom"


# -- virtual machines --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_follow_rays_schema(name: str) -> None:
    config = launcher(name)
    jsonschema.validate(config, json.loads(ray_source("autoscaler", "ray-schema.json")))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert sum(node.get("min_workers", 0) for node in types.values()) <= config["max_workers"]
    assert sum(node.get("max_workers", 0) for node in types.values()) <= config["max_workers"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_mount_nothing_but_the_token(name: str) -> None:
    config = launcher(name)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not config.get("cluster_synced_files")
    assert [config[f"{who}setup_commands"] for who in ("", "head_", "worker_")] == [[], [], []]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_are_spot_machines_and_the_head_is_not(name: str) -> None:
    config = launcher(name)
    for kind, node in config["available_node_types"].items():
        machine = node["node_config"]
        spot = (
            "InstanceMarketOptions" in machine
            or machine.get("scheduling", {}).get("provisioningModel") == "SPOT"
        )
        assert spot is (kind != config["head_node_type"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_resources_are_those_of_the_machine_type(name: str) -> None:
    config = launcher(name)
    for kind, node in config["available_node_types"].items():
        machine = node["node_config"]
        cpus, gpus = MACHINES[machine.get("InstanceType") or machine["machineType"]]
        if kind == config["head_node_type"]:
            assert node["resources"] == {"CPU": 0}
            continue
        assert (node["resources"]["CPU"], node["resources"].get("GPU", 0)) == (cpus, gpus)
        accelerators = machine.get("guestAccelerators", [])
        assert sum(a["acceleratorCount"] for a in accelerators) == (gpus if "machineType" in machine else 0)
        if accelerators:
            assert machine["scheduling"]["onHostMaintenance"] == "TERMINATE"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_machine_may_reach_the_bucket(name: str) -> None:
    config = launcher(name)
    for kind, node in config["available_node_types"].items():
        made_by_ray = name == "gcp.yaml" and kind == config["head_node_type"]
        assert made_by_ray or node["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}


def test_aws_machines_are_requests_ec2_takes() -> None:
    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for node in launcher("aws.yaml")["available_node_types"].values():
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()
        assert request["InstanceType"] in shape.members["InstanceType"].enum


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nodes_start_and_find_each_other_on_the_same_ports(name: str) -> None:
    config = launcher(name)
    flags = ray_source("scripts", "scripts.py")
    started = {}
    for who in ("head", "worker"):
        stop, command = config[f"{who}_start_ray_commands"]
        assert stop == "ray stop"
        words = shlex.split(command.partition("; ")[2].removesuffix(" > ~/ray-start.log 2>&1 < /dev/null &"))
        assert words[:5] == ["setsid", "nohup", "ray", "start", "--block"]
        started[who] = dict(word.removeprefix("--").partition("=")[::2] for word in words[5:])
        assert all(f'"--{flag}"' in flags for flag in started[who])
    head, worker = started["head"], started["worker"]
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert head["port"] == str(GCS)
    assert worker["object-manager-port"] == head["object-manager-port"]
    assert (head["dashboard-host"], head["dashboard-port"]) == (local.HOST, str(DASHBOARD))
    assert head["autoscaling-config"] == "~/ray_bootstrap_config.yaml"


# -- submitting --------------------------------------------------------------------------------------


@pytest.fixture
def submit(tmp_path: Path) -> Any:
    """Run submit.sh with a `ray` that writes down its arguments and answers as the real one does."""
    ray = tmp_path / "ray"
    ray.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$RAY_AUTH_MODE" >> {tmp_path}/mode
if [ "$2" = status ]; then cat {tmp_path}/status; exit 0; fi
printf '%s\\n' "$@" > {tmp_path}/words
exit "$(cat {tmp_path}/code)"
"""
    )
    ray.chmod(ray.stat().st_mode | stat.S_IXUSR)

    def run(*words: str, code: int = 0, status: str = "", address: str = "http://127.0.0.1:8265") -> Any:
        (tmp_path / "code").write_text(str(code))
        (tmp_path / "status").write_text(status)
        done = subprocess.run(
            ["bash", str(CLUSTER / "submit.sh"), *words],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_API_SERVER_ADDRESS": address},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        messages = (tmp_path / "words").read_text().splitlines() if (tmp_path / "words").exists() else []
        return done, messages

    run.mode = tmp_path / "mode"  # type: ignore[attr-defined]
    return run


def test_the_folder_is_uploaded_and_the_rest_goes_to_the_run(submit: Any) -> None:
    done, words = submit("-c", "recipes/pix2pix/facades.yaml", "--set", "a.b={x: 'y z'}")
    assert done.returncode == 0, done.stderr
    assert words[:3] == ["job", "submit", "--submission-id"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert json.loads(words[5]) == {"env_vars": {"PIXLOOM_COMMIT": commit.stdout.strip()}}
    assert [*words[4:5], *words[6:]] == [
        *("--runtime-env-json", "--working-dir", ".", "--", "python", "-m", "pipeline.run"),
        *("-c", "recipes/pix2pix/facades.yaml", "--set", "a.b={x: 'y z'}"),
    ]
    assert set(submit.mode.read_text().split()) == {"token"}


def test_flags_of_the_script_become_flags_of_ray_job_submit(submit: Any) -> None:
    _, words = submit("--here", "--no-wait", "--id", "mine", "--plan")
    assert words[:5] == ["job", "submit", "--submission-id", "mine", "--no-wait"]
    assert words[7:] == ["--", "python", "-m", "pipeline.run", "--plan"]
    _, words = submit("--pip", "--", "--plan")
    assert json.loads(words[words.index("--runtime-env-json") + 1])["pip"] == "requirements.lock"
    assert (ROOT / "requirements.lock").is_file()
    flags = ray_source("dashboard", "modules", "job", "cli.py")
    for flag in ("--submission-id", "--no-wait", "--working-dir", "--runtime-env-json"):
        assert f'"{flag}"' in flags


@pytest.mark.parametrize(
    ("code", "status", "wanted"),
    [
        (1, "Status message: Job entrypoint command failed with exit code 2, last available logs", 2),
        (1, "Status message: Job entrypoint command failed with exit code 1, last ... exit code 7", 1),
        (0, "WARN -- Job 'x' was stopped", 130),
        (1, "no such job", 1),
        (0, "Job 'x' succeeded", 0),
    ],
)
def test_the_exit_code_is_the_runs_own(submit: Any, code: int, status: str, wanted: int) -> None:
    done, _ = submit(code=code, status=status)
    assert done.returncode == wanted


def test_a_missing_address_is_named(submit: Any) -> None:
    done, words = submit(address="")
    assert done.returncode == 2
    assert "RAY_API_SERVER_ADDRESS is not set" in done.stderr
    assert words == []


def test_what_stays_behind_is_never_code() -> None:
    ignored = [
        line for line in (ROOT / ".rayignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    kept = {"pipeline", "stages", "recipes", "pipeline.yaml", "requirements.lock"}
    for pattern in ignored:
        if pattern.startswith("/"):
            assert pattern.strip("/") not in kept
        else:
            matching = list(ROOT.glob(f"stages/**/{pattern}"))
            assert not matching, f"{pattern} would leave {matching} behind"


# -- on one machine ----------------------------------------------------------------------------------


def test_cores_are_shared_and_no_node_has_fewer_than_two() -> None:
    assert local.share_of_cores(16, 4) == 4
    assert local.share_of_cores(2, 3) == 2
    assert local.share_of_cores(10, 4) == 3


def test_each_gpu_belongs_to_one_node() -> None:
    assert local.share_of_gpus(["0", "1", "2"], 1) == [["0", "1", "2"]]
    assert local.share_of_gpus(["0", "1", "2"], 3) == [[], ["0", "2"], ["1"]]
    assert local.share_of_gpus([], 3) == [[], [], []]


def test_object_stores_share_the_memory_within_bounds() -> None:
    assert local.share_of_memory(8 << 30, 4) == int(0.3 * (8 << 30)) // 4
    assert local.share_of_memory(1 << 28, 4) == 80_000_000
    assert local.share_of_memory(1 << 40, 2) == 2 << 30


def test_nodes_inherit_credentials_but_no_other_cluster() -> None:
    cluster = local.Cluster("/tmp/x", 7000, 7001)  # noqa: S108
    shell = {"AWS_ACCESS_KEY_ID": "id", "RAY_ADDRESS": "other:1", "RAY_AUTH_TOKEN": "other", "PATH": "/bin"}
    environment = local.node_environment(shell, cluster, ["2"])
    assert environment["AWS_ACCESS_KEY_ID"] == "id"
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/tmp/x/token"  # noqa: S105, S108
    assert environment["PATH"].endswith(":/bin")
    assert not environment.keys() & {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}


def test_a_process_that_took_over_a_nodes_number_is_left_alone(tmp_path: Path) -> None:
    import os

    stranger = local.Node("head", os.getpid(), created=1.0)
    assert stranger.process() is None
    local.stop(local.Cluster(str(tmp_path), 1, 2, [stranger]))


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["--folder", str(tmp_path / ("x" * 60)), "start"]) == 2
    assert "at most 28 characters" in capsys.readouterr().err


def test_a_folder_with_files_of_others_is_refused_and_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise local.LocalClusterError("does not start here")

    monkeypatch.setattr(local, "_bring_up", fails)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short)
        folder.chmod(0o755)
        (folder / "photos").mkdir()
        assert local.main(["--folder", short, "start"]) == 2
        assert "holds files that are no cluster's" in capsys.readouterr().err
        assert folder.stat().st_mode & 0o777 == 0o755
        for name in ("head", "worker-1", "token"):  # a cluster was here
            (folder / name).mkdir() if name != "token" else (folder / name).write_text("")
        assert local.main(["--folder", short, "start"]) == 2
        assert "does not start here" in capsys.readouterr().err
        assert sorted(path.name for path in folder.iterdir()) == ["photos", "token"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"nodes": [{}]}', '{"nodes": []}'])
def test_a_damaged_file_is_no_cluster(text: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text(text)
    assert local.load(tmp_path) is None
    assert local.main(["--folder", str(tmp_path), "stop"]) == 2


def test_a_folder_that_cannot_be_made_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("/proc/x", "/dev/null", "/dev/null/x"):
        assert local.main(["--folder", folder, "start"]) == 2
        assert f"--folder {folder}: cannot be used" in capsys.readouterr().err
        assert local.main(["--folder", folder, "stop"]) == 2


def test_without_a_cluster_stop_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["--folder", str(tmp_path), "stop"]) == 2
    assert "no cluster is running" in capsys.readouterr().err
    assert local.main(["--folder", str(tmp_path), "status"]) == 1


# -- the guide ---------------------------------------------------------------------------------------


def test_the_readme_names_only_what_exists() -> None:
    text = (CLUSTER / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (CLUSTER / target).exists(), target
    for path in re.findall(r"(?:cluster|recipes|tests)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for flag in re.findall(r"submit\.sh (--[\w-]+)", text):
        assert f"{flag})" in (CLUSTER / "submit.sh").read_text()
    options = local.parser().format_help() + "--workers --port --dashboard-port --folder"
    for command in re.findall(r"cluster/local\.py (\w+)", text):
        assert command in options
