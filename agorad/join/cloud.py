"""Where this machine stands: at home, or at a provider, which may give its ports other numbers outside.

Looks at the environment, at a few files and at the firmware's maker, in that order; no request leaves the
machine. Pure: all of it is handed in, so that tests can play every provider.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs

_VARIABLES: Final = (
    ("runpod", ("RUNPOD_POD_ID", "RUNPOD_PUBLIC_IP")),
    ("vastai", ("VAST_CONTAINERLABEL", "VAST_TCP_PORT_22", "CONTAINER_API_KEY")),
    ("modal", ("MODAL_TASK_ID", "MODAL_IS_REMOTE")),
    ("replicate", ("REPLICATE_MODEL_ID",)),
    ("colab", ("COLAB_RELEASE_TAG", "COLAB_GPU")),
    ("kaggle", ("KAGGLE_KERNEL_RUN_TYPE",)),
    ("paperspace", ("PAPERSPACE_CLUSTER_ID", "PAPERSPACE_METRIC_URL")),
    ("lambda_labs", ("LAMBDA_INSTANCE_ID",)),
    ("coreweave", ("COREWEAVE_CLUSTER",)),
    ("tensordock", ("TENSORDOCK_INSTANCE_ID",)),
    ("akash", ("AKASH_DEPLOYMENT_SEQUENCE",)),
    ("nebius", ("NEBIUS_INSTANCE_ID",)),
)
_FILES: Final = (
    ("runpod", "/etc/runpod.txt"),
    ("vastai", "/root/.vast_containerlabel"),
    ("paperspace", "/etc/ppci"),
    ("lambda_labs", "/etc/lambda-stack"),
)
_MAKERS: Final = (
    ("amazon", "aws"), ("google", "gcp"), ("microsoft corporation", "azure"), ("oracle", "oci"),
    ("digitalocean", "digitalocean"), ("alibaba", "alibaba"), ("hetzner", "hetzner"), ("ovh", "ovh"),
    ("scaleway", "scaleway"),
)  # fmt: skip
_MAKER_FILE: Final = "/sys/class/dmi/id/sys_vendor"
_ANNOUNCED: Final = {"runpod": "RUNPOD_TCP_PORT_{}", "vastai": "VAST_TCP_PORT_{}"}
_ADDRESS: Final = {"runpod": "RUNPOD_PUBLIC_IP", "vastai": "PUBLIC_IPADDR"}


@attrs.frozen
class Place:
    """``cloud`` is empty where no provider was recognised."""

    cloud: str = ""
    address: str = ""
    """The provider's word for how this machine is reached from outside."""


def detect(
    environment: Mapping[str, str] = os.environ,
    exists: Callable[[str], bool] = os.path.exists,
    maker: Callable[[], str] | None = None,
) -> Place:
    """Which provider this is, by the first sign that fits."""
    found = next((name for name, signs in _VARIABLES if any(sign in environment for sign in signs)), "")
    found = found or next((name for name, path in _FILES if exists(path)), "")
    if not found:
        said = (maker or _maker)().lower()
        found = next((name for sign, name in _MAKERS if sign in said), "")
    return Place(found, environment.get(_ADDRESS.get(found, ""), ""))


def announced_port(place: Place, port: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number under which ``port`` is reached from outside: the provider's, where it has its own."""
    said = environment.get(_ANNOUNCED.get(place.cloud, "").format(port), "")
    return int(said) if said.isdigit() and 0 < int(said) < 1 << 16 else port


def remaps(place: Place) -> bool:
    """Whether ports have other numbers outside at this provider."""
    return place.cloud in _ANNOUNCED


def _maker() -> str:
    try:
        return Path(_MAKER_FILE).read_text()[:200].strip()
    except (OSError, UnicodeDecodeError):
        return ""
