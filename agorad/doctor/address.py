"""Where the node listens and what it announces: can others have a chance to reach it. Nothing is sent."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Final

from agorad.doctor.patient import Patient
from agorad.join.findings import Finding
from agorad.ports import holder
from p2p.errors import P2PError
from p2p.multiaddr import Multiaddr
from p2p.reach import kind

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
    if not port:
        return Finding(name="port", verdict="ok", found="the system chooses one at each start")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Finding(
                    name="port", verdict="fail", found=f"TCP {port} is taken by {holder(port)}",
                    remedy="stop that program, or set another port in node.listen",
                )  # fmt: skip
            return Finding(
                name="port", verdict="fail", found=f"cannot listen at {addr}: {error.strerror}",
                remedy="set node.listen to an address of this machine: /ip4/0.0.0.0/tcp/49200 means all",
            )  # fmt: skip
    return Finding(name="port", verdict="ok", found=f"TCP {port} is free")


def _kind(addr: Multiaddr) -> str | None:
    """As ``p2p.reach`` sees it; None for a name and for "everywhere"."""
    try:
        ip = ipaddress.ip_address(addr.host or "")
    except ValueError:
        return None
    return None if ip.is_unspecified else kind(ip)


def _scope(patient: Patient, listen: list[Multiaddr], announce: list[Multiaddr]) -> Iterator[Finding]:
    """Addresses that only this machine or this house can reach, in a run whose nodes are elsewhere."""
    manifest = patient.manifest
    nodes = [] if manifest is None else [*manifest.seeds, *manifest.authorities, *manifest.trainers]
    places = {_kind(addr) for ref in nodes for addr in ref.multiaddrs()}
    for name, addrs in (("announced", announce), ("listened on", [] if announce else listen)):
        for addr in addrs:
            where = _kind(addr)
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
