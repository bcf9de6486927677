"""Which network interface reaches the other nodes.

Gloo gives its peers the address that this node's own name has. Debian maps that name to
``127.0.1.1``, which no other node reaches.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping, Sequence

_SIOCGIFADDR = 0x8915


def own_name_is_local() -> bool:
    """Return whether this node's own name means a loopback address, or nothing."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return True


def interface_towards(hosts: Sequence[str]) -> str | None:
    """Return the interface that reaches the first of ``hosts`` that is not this node.

    Nothing is sent. Without such a host, the only interface with an address is returned.

    Returns:
        Its name, e.g. ``ib0``; None where several are possible or none is.
    """
    addresses = interfaces()
    for host in hosts:
        address = _address_towards(host)
        for name, own in addresses.items():
            if own == address:
                return name
    return next(iter(addresses)) if len(addresses) == 1 else None


def interfaces() -> Mapping[str, str]:
    """Return the IPv4 address of each interface but loopback, by name."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                addresses[name] = address
    return addresses


def _address_towards(host: str) -> str | None:
    """Return the own address from which a host would be reached."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sets the route, sends nothing
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return None
