"""Which cloud a machine is of, and the ports that have other numbers outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from agorad.join import cloud, findings, layout
from agorad.join.answers import Answers
from agorad.join.cloud import Place
from tests.unit.joining import planned

AZURE = "7783-7084-3265-9085-8269-3286-77"


def detect(environment: dict[str, str], files: tuple[str, ...] = (), **firmware: str) -> Place:
    return cloud.detect(environment, files.__contains__, lambda field: firmware.get(field, ""))


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ("RUNPOD_POD_ID", "runpod"), ("VAST_CONTAINERLABEL", "vastai"), ("VAST_TCP_PORT_49200", "vastai"),
        ("MODAL_TASK_ID", "modal"), ("REPLICATE_MODEL", "replicate"), ("COLAB_RELEASE_TAG", "colab"),
        ("KAGGLE_KERNEL_RUN_TYPE", "kaggle"), ("PAPERSPACE_FQDN", "paperspace"),
        ("LAMBDA_LABS_ID", "lambda_labs"), ("COREWEAVE_CLUSTER", "coreweave"),
        ("TENSORDOCK_INSTANCE_ID", "tensordock"), ("HYPERSTACK_ID", "hyperstack"),
        ("JARVISLABS_ID", "jarvislabs"), ("TNR_INSTANCE", "thunder_compute"), ("NEBIUS_ID", "nebius"),
        ("CUDO_VM", "cudo"), ("AKASH_DEPLOYMENT_SEQUENCE", "akash"),
        ("AWS_LAMBDA_FUNCTION_NAME", "aws_lambda"), ("K_SERVICE", "gcp_cloudrun"),
        ("FUNCTIONS_WORKER_RUNTIME", "azure_functions"), ("KUBERNETES_SERVICE_HOST", "container"),
        ("HOME", ""),
    ],
)  # fmt: skip
def test_clouds_by_their_variables(sign: str, name: str) -> None:
    assert detect({sign: "x"}).cloud == name


@pytest.mark.parametrize(
    ("firmware", "name"),
    [
        ({"sys_vendor": "Amazon EC2"}, "aws"),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, "gcp"),
        ({"sys_vendor": "Google", "product_name": "Eve"}, "home"),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE}, "azure"),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Surface Pro"}, "home"),
        ({"chassis_asset_tag": "OracleCloud.com"}, "oci"),
        ({"sys_vendor": "DigitalOcean"}, "digitalocean"),
        ({"sys_vendor": "Alibaba Cloud"}, "alibaba"),
        ({"sys_vendor": "Hetzner"}, "hetzner"),
        ({"sys_vendor": "OVHcloud"}, "ovh"),
        ({"sys_vendor": "Scaleway"}, "scaleway"),
        ({"sys_vendor": "QEMU"}, "virtual"),
        ({"sys_vendor": "LENOVO", "chassis_type": "10"}, "home"),
        ({"chassis_type": "10"}, "home"),
        ({}, ""),
    ],
)  # fmt: skip
def test_clouds_by_their_firmware(firmware: dict[str, str], name: str) -> None:
    place = detect({}, **firmware)
    assert place.cloud == name
    assert place.provider == ("" if name in ("home", "virtual") else name)


def test_the_first_sign_counts() -> None:
    assert (
        detect({"KAGGLE_URL_BASE": "x"}, ("/etc/ppci", "/.dockerenv"), sys_vendor="Amazon EC2").cloud
        == "kaggle"
    )
    assert detect({}, ("/etc/ppci", "/.dockerenv"), sys_vendor="Amazon EC2").cloud == "paperspace"
    assert detect({}, ("/.dockerenv",), sys_vendor="Amazon EC2").cloud == "aws"
    assert detect({}, ("/.dockerenv",), sys_vendor="LENOVO").cloud == "container"


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RUNPOD_PUBLIC_IP": "192.0.2.7", "RUNPOD_TCP_PORT_49200": "17311"}, "runpod"),
        ({"PUBLIC_IPADDR": "192.0.2.7", "VAST_TCP_PORT_49200": "17311"}, "vastai"),
    ],
)
def test_ports_that_have_other_numbers_outside(variables: dict[str, str], name: str, tmp_path: Path) -> None:
    prefix = "RUNPOD_TCP_PORT_" if name == "runpod" else "VAST_TCP_PORT_"
    place = detect({**variables, f"{prefix}22": "99999", f"{prefix}x": "5"})
    assert place == Place(name, "192.0.2.7", {49200: 17311})
    assert (place.outside(49200), place.outside(49201), place.remaps) == (17311, None, True)
    assert detect({}, sys_vendor="Amazon EC2").outside(49201) == 49201
    node = planned(tmp_path, port=49200)
    assert layout.announced(Answers(), node, place) == ["/ip4/192.0.2.7/tcp/17311"]
    assert layout.announced(Answers(announce_ip="host.example"), node, place) == [
        "/dns4/host.example/tcp/17311"
    ]
    finding = findings.of_node(planned(tmp_path, port=49201), place)
    assert finding.verdict == "warn"
    assert "lets TCP 49201 not through (it does: 49200)" in finding.found
