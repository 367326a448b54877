"""A real network of this machine's own: a namespace for workers behind a router, which can stop to forward packets."""

import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

# Of the range that is reserved for tests of networks (RFC 2544).
_HERE, _ROUTER_HERE = "198.18.91.1", "198.18.91.2"
_ROUTER_THERE, _THERE = "198.18.91.5", "198.18.91.6"
_NETWORK_THERE = "198.18.91.4/30"


class RoutedNetwork:
    """Two network namespaces, linked to that of this process. Needs root and iproute2.

    Attributes:
        address: the host's address that the namespace behind the router reaches.
        command: what a command begins with that is to run behind the router.
    """

    def __init__(self) -> None:
        mark = f"kedge{os.getpid()}"
        self._router, self._there = f"{mark}r", f"{mark}w"
        self._link = f"kg{os.getpid()}"
        self.address = _HERE
        self.command = ("ip", "netns", "exec", self._there)

    @staticmethod
    def obstacle() -> str:
        """Why there can be none here; empty if nothing is in the way."""
        if os.geteuid() != 0:
            return "needs root for network namespaces"
        try:
            with RoutedNetwork():
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            return f"network namespaces cannot be made here: {error}"

    def cut(self) -> None:
        """From now on packets are dropped, both ways, and nobody is told."""
        self._forward(0)

    def heal(self) -> None:
        """Packets are forwarded again."""
        self._forward(1)

    def _forward(self, number: int) -> None:
        _ip("netns", "exec", self._router, "sh", "-c", f"echo {number} > /proc/sys/net/ipv4/ip_forward")

    def _make(self) -> None:
        for namespace in (self._router, self._there):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "here", "netns", self._router)
        _ip("-n", self._router, "link", "add", "there", "type", "veth", "peer", "name", "out", "netns", self._there)
        _ip("addr", "add", f"{_HERE}/30", "dev", self._link)
        _ip("link", "set", self._link, "up")
        for namespace, device, address in (
            (self._router, "here", _ROUTER_HERE),
            (self._router, "there", _ROUTER_THERE),
            (self._there, "out", _THERE),
        ):
            _ip("-n", namespace, "addr", "add", f"{address}/30", "dev", device)
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("route", "add", _NETWORK_THERE, "via", _ROUTER_HERE)
        _ip("-n", self._there, "route", "add", "default", "via", _ROUTER_THERE)
        self.heal()

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        # A namespace takes its links along, but only after a while; the route goes with its link at once.
        if Path("/sys/class/net", self._link).exists():
            _ip("link", "del", self._link)
        for namespace in (self._router, self._there):
            if Path("/run/netns", namespace).exists():
                _ip("netns", "del", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
