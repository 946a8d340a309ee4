"""Where the node listens and what it announces: can others have a chance to reach it. Nothing is sent."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Final

from agorad.doctor.patient import Patient
from agorad.join.findings import Finding
from agorad.metrics.address import read_address
from agorad.ports import holder
from p2p.errors import P2PError
from p2p.multiaddr import Multiaddr
from p2p.reach import scope

_WORDS: Final = {"loopback": "loopback", "link-local": "link-local", "private": "private"}


def look(patient: Patient) -> Iterator[Finding]:
    """All of it."""
    settings = patient.settings
    if settings is None:
        return
    listen, wrong = _parse(settings.node.listen)
    announce, also_wrong = _parse(settings.node.announce)
    for name, faults in (("node.listen", wrong), ("node.announce", also_wrong)):
        for fault in faults:
            yield Finding(
                name="address", verdict="fail", found=f"{name}: {fault}",
                remedy=f"write {name} like /ip4/0.0.0.0/tcp/49200",
            )  # fmt: skip
    for addr in listen:
        yield _port(patient, addr)
    yield from _pages(patient)
    yield from _dialable(announce, patient)
    yield from _scope(patient, listen, announce)
    yield from _families(patient, listen, announce)


def _parse(texts: tuple[str, ...]) -> tuple[list[Multiaddr], list[str]]:
    found, wrong = [], []
    for text in texts:
        try:
            found.append(Multiaddr.parse(text))
        except P2PError as error:
            wrong.append(str(error))
    return found, wrong


def _port(patient: Patient, addr: Multiaddr) -> Finding:
    host, port = addr.host or "", addr.port or 0
    if patient.status is not None:
        return Finding(name="port", verdict="ok", found=f"the daemon has TCP {port or 'of its choice'}")
    if addr.host is None or addr.port is None:
        return Finding(
            name="port", verdict="fail", found=f"{addr} is no TCP address, and agorad listens at no others",
            remedy="write node.listen like /ip4/0.0.0.0/tcp/49200",
        )  # fmt: skip
    if not port:
        return Finding(name="port", verdict="ok", found="the system chooses one at each start")
    error = _refusal(host, port)
    if error is None:
        return Finding(name="port", verdict="ok", found=f"TCP {port} is free")
    if error.errno == errno.EADDRINUSE:
        return Finding(
            name="port", verdict="fail", found=f"TCP {port} is taken by {holder(port)}",
            remedy="stop that program, or set another port in node.listen",
        )  # fmt: skip
    return Finding(
        name="port", verdict="fail", found=f"cannot listen at {addr}: {error.strerror}",
        remedy="ports below 1024 are root's: set one from 1024 on in node.listen, like 49200"
        if error.errno == errno.EACCES
        else "set node.listen to an address of this machine: /ip4/0.0.0.0/tcp/49200 means all",
    )  # fmt: skip


def _refusal(host: str, port: int) -> OSError | None:
    """What the system says to a listener there; None where it would have it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        return error
    return None


def _pages(patient: Patient) -> Iterator[Finding]:
    """What is served beside the peers' port: figures, and an authority's page."""
    settings = patient.settings
    assert settings is not None
    wanted = {"metrics.listen": settings.metrics.listen}
    if patient.role == "authority":
        wanted["authority.page_listen"] = settings.authority.page_listen
    for setting, text in wanted.items():
        if not text:
            continue
        host, port = read_address(text, setting)
        error = _refusal(host, port) if patient.status is None and port else None
        if setting == "metrics.listen" and error is None and not ipaddress.ip_address(host).is_loopback:
            yield Finding(
                name="metrics", verdict="warn",
                found=f"{setting} = {text}: others can read this node's figures",
                remedy="set metrics.listen = '127.0.0.1:49190', or let only Prometheus through the firewall",
            )  # fmt: skip
        if error is not None:
            taken = error.errno == errno.EADDRINUSE
            yield Finding(
                name="metrics" if setting == "metrics.listen" else "page",
                verdict="warn" if setting == "metrics.listen" else "fail",
                found=f"{setting} = {text}: "
                + (f"the port is taken by {holder(port)}" if taken else str(error.strerror)),
                remedy=f"stop that program, or set another port in {setting}"
                if taken
                else f"set {setting} to an address of this machine, like 127.0.0.1:{port}",
            )  # fmt: skip


def _dialable(announce: list[Multiaddr], patient: Patient) -> Iterator[Finding]:
    """What is announced has to be an address that others can dial, of this node."""
    own = patient.identity.peer_id if patient.identity is not None else None
    for addr in announce:
        if addr.host is None or not addr.port:
            wrong = "no TCP address with a port"
        elif addr.peer_id not in (None, own) and own is not None:
            wrong = f"another peer's address: this node is {own}"
        elif addr.parts[0][0].startswith("dns") and (said := _unknown(addr.host)):
            wrong = f"a name that cannot be resolved: {said}"
        else:
            continue
        yield Finding(
            name="announce", verdict="fail", found=f"{addr} is announced, {wrong}",
            remedy="write node.announce like /ip4/198.51.100.7/tcp/49200: this machine as others see it",
        )  # fmt: skip


def _unknown(name: str) -> str:
    """What the resolver says to a name that it does not know; empty if it knows it."""
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _everywhere(addr: Multiaddr) -> bool:
    try:
        return ipaddress.ip_address(addr.host or "").is_unspecified
    except ValueError:
        return False


def _scope(patient: Patient, listen: list[Multiaddr], announce: list[Multiaddr]) -> Iterator[Finding]:
    """Addresses that only this machine or this house can reach, in a run whose nodes are elsewhere."""
    manifest = patient.manifest
    nodes = [] if manifest is None else [*manifest.seeds, *manifest.authorities, *manifest.trainers]
    places = {scope(addr) for ref in nodes for addr in ref.multiaddrs()}
    for name, addrs in (("announced", announce), ("listened on", [] if announce else listen)):
        for addr in addrs:
            where = None if name != "announced" and _everywhere(addr) else scope(addr)
            if where in _WORDS and where not in places:
                yield Finding(
                    name="address", verdict="fail" if name == "announced" else "warn",
                    found=f"{addr} is {name}, a {where} address: the run's other nodes cannot reach it",
                    remedy="announce the address that your router has outside (node.announce), with the port "
                    "forwarded, or leave node.announce empty and listen on /ip4/0.0.0.0: it is found out"
                    if name == "announced"
                    else "listen on /ip4/0.0.0.0, or set node.announce to the outside address",
                )  # fmt: skip
            elif where == "":
                yield Finding(
                    name="address", verdict="fail",
                    found=f"{addr} is {name}, which is no address of one machine",
                    remedy="name the machine's own outside address",
                )  # fmt: skip


def _families(patient: Patient, listen: list[Multiaddr], announce: list[Multiaddr]) -> Iterator[Finding]:
    """Nodes with IPv4 alone cannot reach one with IPv6 alone."""
    told = announce or listen
    if not told or not all(addr.parts[0][0] in ("ip6", "dns6") for addr in told):
        return
    manifest = patient.manifest
    nodes = [] if manifest is None else [*manifest.seeds, *manifest.authorities, *manifest.trainers]
    addrs = [addr for ref in nodes for addr in ref.multiaddrs()]
    if addrs and all(addr.parts[0][0] in ("ip6", "dns6") for addr in addrs):
        return
    yield Finding(
        name="address family", verdict="warn",
        found="this node has IPv6 addresses only; the run's nodes with IPv4 alone cannot reach it",
        remedy="listen on /ip4/0.0.0.0/tcp/… as well, or announce an IPv4 address",
    )  # fmt: skip
