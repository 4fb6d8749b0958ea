"""The files in docker/ agree with the docs; `docker/root` and `docker/check` build and run them."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from tests import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_watched_limited_and_not_reachable_from_outside(name):
    service = COMPOSE["services"][name]
    assert service["healthcheck"]["test"]
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert "ports" not in service
    assert "network_mode" not in service
    assert service["networks"] == ["cluster"]


def test_no_password_stands_in_a_file():
    assert COMPOSE["secrets"] == {"postgres-password": {"environment": "POSTGRES_PASSWORD"}}
    assert not re.search(r"postgresql://[^@]*:", (ROOT / "docker" / "compose.yaml").read_text())
    assert "PASSWORD" not in DOCKERFILE


def test_there_are_two_workers_and_one_image_for_all_of_ray():
    services = COMPOSE["services"]
    assert services["worker"]["deploy"]["replicas"] == 2
    assert {services[name]["image"] for name in ("head", "worker", "driver")} == {"ranksearch"}


def test_the_base_is_pinned_and_the_image_runs_as_no_root():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (base,) = re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE)
    version = re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", base)
    assert version
    assert project["requires-python"] == f">={version[1]}"
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["ranksearch"]


def test_a_login_shell_finds_the_commands_too():
    """`ray up` runs its commands in a login shell, where Debian's /etc/profile sets its own PATH."""
    (path,) = re.findall(r"^ENV PATH=(\S+)", DOCKERFILE, re.MULTILINE)
    assert f"echo 'PATH={path}' > /etc/profile.d/" in DOCKERFILE


def test_dockerignore_names_the_files_that_the_image_copies():
    """`.dockerignore` excludes all files except those it names."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?:--\S+ )?(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert {path for line in copied for path in line.split()} == kept
    assert all((ROOT / path).exists() for path in kept)


def test_rays_own_schema_takes_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "docker" / "cluster.yaml").read_text())))
