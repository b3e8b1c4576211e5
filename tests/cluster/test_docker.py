"""docker/: the Dockerfile passes hadolint, the manifests fit KubeRay's schemas, and all name the versions that are pinned."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
MANIFESTS = {"RayCluster": "kuberay/raycluster.yaml", "RayJob": "kuberay/rayjob.yaml"}
KUBERAY = Path(os.environ.get("KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")  # published CRDs
CRDS = {"RayCluster": "rayclusters.yaml", "RayJob": "rayjobs.yaml"}


def manifest(kind: str) -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / MANIFESTS[kind]).read_text()))


def cluster_of(kind: str) -> dict[str, Any]:
    spec = manifest(kind)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, package
    return found[1]


def instructions() -> list[str]:
    """The Dockerfile's instructions, continued lines joined, comments left out."""
    text = "\n".join(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_image_has_no_root_no_secrets_and_heavy_layers_first() -> None:
    lines = instructions()
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000:1000"]
    assert lines.index(users[0]) > max(index for index, line in enumerate(lines) if line.startswith("RUN"))
    defaults = [line for line in lines if line.startswith("ARG") and "=" in line]
    assert len(defaults) == 1
    assert defaults[0].startswith("ARG BASE_IMAGE=")
    assert not [line for line in lines if re.search(r"TOKEN|PASSWORD|SECRET|_KEY", line)]
    order = [next(i for i, line in enumerate(lines) if part in line) for part in
             ("install --no-cache-dir --constraint constraints.txt torch", "COPY pyproject", "COPY autolrs_ray")]  # fmt: skip
    assert order == sorted(order)
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    (label,) = [line for line in lines if line.startswith("LABEL")]
    assert f"Ray {pinned('ray')}, torch {pinned('torch')} " in label
    assert f"torch {pinned('torch')}" in (ROOT / "docs" / "cluster.md").read_text()


def test_the_page_says_what_rays_ports_open_how_to_close_them_and_which_driver_fits() -> None:
    text = " ".join((ROOT / "docs" / "cluster.md").read_text().split())
    driver = re.search(r"driver (\d+) or newer", " ".join(line for line in instructions() if line.startswith("LABEL")))
    assert driver
    for said in ("8265", "6379", "--dashboard-host=127.0.0.1", "RAY_AUTH_MODE=token", "`workers` above 1", "rendezvous",
                 f"torch {pinned('torch')}", "CUDA 13.0", f"NVIDIA driver of the {driver[1]} series or newer"):  # fmt: skip
        assert said in text, said


def test_the_build_context_holds_what_is_copied_and_no_more() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        path.removeprefix("./") for line in instructions() if line.startswith("COPY") for path in line.split()[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


def test_the_health_check_is_the_one_that_is_checked_inside() -> None:
    (check,) = [line for line in instructions() if line.startswith("HEALTHCHECK")]
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    assert command[2] in (DOCKER / "check_inside.sh").read_text()


@pytest.mark.parametrize("script", ["image_check.sh", "check_inside.sh"])
def test_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", DOCKER / script], check=False).returncode == 0


def test_image_check_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "id"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    ran = subprocess.run(
        [DOCKER / "image_check.sh"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert ran.returncode != 0
    assert "buildah is not installed" in ran.stderr


def test_compose_has_a_head_workers_with_gpus_and_no_published_port() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    for service in (head, worker):
        assert "ports" not in service
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        assert service["volumes"] == ["runs:/runs"]
    assert "--dashboard-host=127.0.0.1" in head["command"]
    assert "--address=head:6379" in worker["command"]
    assert worker["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_ask_for_tokens_gpus_and_the_pinned_ray(kind: str) -> None:
    cluster = cluster_of(kind)
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"]["mode"] == "token"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            names = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups
    ] == [None, "1"]


def closed(schema: Any) -> Any:
    """An openAPIV3Schema as JSON Schema that admits no unknown key, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_ended:
        out["additionalProperties"] = False
    return out


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_fit_kuberays_schema(kind: str) -> None:
    file = KUBERAY / CRDS[kind]
    if not file.exists():
        pytest.skip(f"{file} is not there: KUBERAY_CRDS names the folder with KubeRay's published CRDs")
    crd = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C: 1 s instead of 10
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    given = manifest(kind)
    jsonschema.validate(given, schema)
    pod = (given["spec"].get("rayClusterSpec") or given["spec"])["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["imagee"] = "x"  # the check looks into the pods
    with pytest.raises(jsonschema.ValidationError, match="imagee"):
        jsonschema.validate(given, schema)
