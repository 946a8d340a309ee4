"""Where this machine stands: at home, or at a provider, which may give its ports other numbers outside.

Looks at the environment, at a few files and at what the firmware says, in this order, and at whether it is a
container or a laptop when no provider shows. No request leaves the machine. Pure: everything is handed in,
so that tests can play every provider. What a provider sets in a machine is its own choice and may change; a
machine that is not recognised loses a default, nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs

_PREFIXES: Final = (
    ("runpod", ("RUNPOD_POD_ID", "RUNPOD_PUBLIC_IP", "RUNPOD_TCP_PORT_")),
    ("vastai", ("VAST_CONTAINERLABEL", "VAST_TCP_PORT_", "VAST_UDP_PORT_")),
    ("modal", ("MODAL_TASK_ID", "MODAL_IS_REMOTE")),
    ("replicate", ("REPLICATE_",)),
    ("colab", ("COLAB_",)),
    ("kaggle", ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE")),
    ("paperspace", ("PAPERSPACE_",)),
    ("lambda_labs", ("LAMBDA_INSTANCE_ID", "LAMBDA_LABS_")),
    ("coreweave", ("COREWEAVE_",)),
    ("tensordock", ("TENSORDOCK_",)),
    ("hyperstack", ("HYPERSTACK_",)),
    ("jarvislabs", ("JARVISLABS_", "JARVIS_")),
    ("thunder_compute", ("THUNDER_COMPUTE_", "TNR_")),
    ("nebius", ("NEBIUS_",)),
    ("cudo", ("CUDO_",)),
    ("akash", ("AKASH_",)),
    ("aws_lambda", ("AWS_LAMBDA_FUNCTION_NAME",)),
    ("gcp_cloudrun", ("K_SERVICE", "CLOUD_RUN_JOB")),
    ("azure_functions", ("FUNCTIONS_WORKER_RUNTIME",)),
)
"""Beginnings of variables' names, most telling providers first."""
_FILES: Final = (
    ("runpod", "/etc/runpod.txt"),
    ("vastai", "/root/.vast_containerlabel"),
    ("paperspace", "/etc/ppci"),
    ("lambda_labs", "/etc/lambda-stack"),
)
_FIRMWARE: Final = (
    ("aws", "sys_vendor", "amazon ec2"),
    ("gcp", "product_name", "google compute engine"),  # the vendor alone may be a laptop's
    ("azure", "chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),  # the vendor alone: any Hyper-V
    ("digitalocean", "sys_vendor", "digitalocean"),
    ("oci", "chassis_asset_tag", "oraclecloud"),
    ("alibaba", "sys_vendor", "alibaba cloud"),
    ("hetzner", "sys_vendor", "hetzner"),
    ("ovh", "sys_vendor", "ovh"),
    ("scaleway", "sys_vendor", "scaleway"),
)
"""Provider, field of ``/sys/class/dmi/id`` and what it contains, in lower case."""
_VIRTUAL: Final = ("qemu", "kvm", "vmware", "virtualbox", "xen", "bochs", "innotek", "parallels", "hyper-v")
_PORTABLE: Final = ("8", "9", "10", "11", "14", "30", "31", "32")
"""``chassis_type`` of laptops, tablets and the like."""
_OUTSIDE: Final = {"runpod": "RUNPOD_TCP_PORT_", "vastai": "VAST_TCP_PORT_"}
_ADDRESS: Final = {"runpod": "RUNPOD_PUBLIC_IP", "vastai": "PUBLIC_IPADDR"}
_CONTAINER: Final = ("/.dockerenv", "/run/.containerenv")


@attrs.frozen
class Place:
    """``cloud``: a provider's name, ``container``, ``virtual``, ``home``, or empty where nothing shows."""

    cloud: str = ""
    address: str = ""
    """The provider's word for how this machine is reached from outside."""
    ports: Mapping[int, int] = attrs.field(factory=dict)
    """Ports that the provider lets through, with their numbers outside."""

    @property
    def remaps(self) -> bool:
        """Whether only some ports are let through, under other numbers."""
        return self.cloud in _OUTSIDE

    @property
    def provider(self) -> str:
        """The provider, empty for a machine that shows none."""
        return "" if self.cloud in ("container", "virtual", "home") else self.cloud

    def outside(self, port: int) -> int | None:
        """The number under which ``port`` is reached from outside; None if the provider keeps it closed."""
        return self.ports.get(port) if self.remaps else port


def _firmware(field: str) -> str:
    try:
        return (Path("/sys/class/dmi/id") / field).read_text()[:200].strip()
    except (OSError, UnicodeDecodeError):
        return ""


def detect(
    environment: Mapping[str, str] = os.environ,
    exists: Callable[[str], bool] = os.path.exists,
    firmware: Callable[[str], str] = _firmware,
) -> Place:
    """Which provider this is, by the first sign that fits; else what kind of machine."""
    cloud = next((name for name, signs in _PREFIXES if _any_begins(environment, signs)), "")
    cloud = cloud or next((name for name, path in _FILES if exists(path)), "")
    cloud = cloud or next((name for name, field, text in _FIRMWARE if text in firmware(field).lower()), "")
    cloud = cloud or _kind(environment, exists, firmware)
    return Place(cloud, environment.get(_ADDRESS.get(cloud, ""), ""), _ports(environment, cloud))


def _any_begins(environment: Mapping[str, str], signs: tuple[str, ...]) -> bool:
    return any(name.startswith(signs) for name in environment)


def _kind(
    environment: Mapping[str, str], exists: Callable[[str], bool], firmware: Callable[[str], str]
) -> str:
    if any(map(exists, _CONTAINER)) or "KUBERNETES_SERVICE_HOST" in environment:
        return "container"  # at home or elsewhere: nothing says
    said = f"{firmware('sys_vendor')} {firmware('product_name')}".strip().lower()
    if any(name in said for name in _VIRTUAL):
        return "virtual"
    portable = firmware("chassis_type") in _PORTABLE or exists("/sys/class/power_supply/BAT0")
    return "home" if said or portable else ""


def _ports(environment: Mapping[str, str], cloud: str) -> dict[int, int]:
    prefix = _OUTSIDE.get(cloud)
    if prefix is None:
        return {}
    said = (
        (name.removeprefix(prefix), value) for name, value in environment.items() if name.startswith(prefix)
    )
    return {int(inside): int(outside) for inside, outside in said if _is_port(inside) and _is_port(outside)}


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16
