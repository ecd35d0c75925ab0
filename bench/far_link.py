"""Machines far apart on one machine: network namespaces, each with one interface, joined by a slow link.

A namespace has a TUN interface of its own, whose packets this process carries to the others. Each machine has an
uplink and a downlink of so many bits a second, a queue that drops what does not fit it, and every packet is on its way
for half of a round trip. Programs in the namespaces speak TCP through the kernel and know nothing of it. (tc's netem
does the same inside the kernel, where the kernel has it.) Needs root, as namespaces do.

Packets are 9000 bytes, so that Python keeps up: 20 Mbit/s are some 280 of them a second and direction.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from types import TracebackType

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_MTU = 9000
_QUEUE_SECONDS = 0.2
INTERFACE = "far0"


class FarLink:
    """So many namespaces and what joins them; a context that takes them away again.

    Args:
        machines: How many.
        mbit: Rate of each machine's link, each way.
        round_trip: Milliseconds.

    Attributes:
        sent: Bytes that each machine has sent, headers of IP and TCP included.
    """

    def __init__(self, machines: int, mbit: float, round_trip: float) -> None:
        self.names = [f"qrosa{os.getpid()}-{index}" for index in range(machines)]
        self.rate = mbit * 1e6 / 8
        self.delay = round_trip / 2e3
        self.sent = [0] * machines
        self._tunnels: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def address(self, machine: int) -> str:
        """A machine's address, the same in every namespace."""
        return f"10.77.0.{machine + 1}"

    def command(self, machine: int, command: list[str]) -> list[str]:
        """The command that runs another one on a machine."""
        return ["ip", "netns", "exec", self.names[machine], *command]

    def __enter__(self) -> FarLink:
        try:
            for machine, name in enumerate(self.names):
                _run("ip", "netns", "add", name)
                self._tunnels.append(_open_tunnel(name))
                for words in (
                    f"addr add {self.address(machine)}/24 dev {INTERFACE}",
                    f"link set {INTERFACE} mtu {_MTU} up",
                    "link set lo up",
                ):
                    _run("ip", "-n", name, *words.split())
        except BaseException:
            self._take_away()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._take_away()

    def _take_away(self) -> None:
        for tunnel in self._tunnels:
            os.close(tunnel)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _carry(self) -> None:
        """Carry packets until told to stop: (time of arrival, number, machine, packet) wait in a heap."""
        poll = select.epoll()
        for tunnel in self._tunnels:
            poll.register(tunnel, select.EPOLLIN)
        machine_of = {tunnel: machine for machine, tunnel in enumerate(self._tunnels)}
        up, down = [0.0] * len(self._tunnels), [0.0] * len(self._tunnels)
        waiting: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._stop.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, machine, packet = heapq.heappop(waiting)
                try:
                    os.write(self._tunnels[machine], packet)
                except BlockingIOError:
                    pass  # its interface is full: lost, as on any network
            pause = min(0.05, waiting[0][0] - now) if waiting else 0.05
            for tunnel, _ in poll.poll(max(0.0, pause)):
                source, packet = machine_of[tunnel], os.read(tunnel, 1 << 16)
                target = packet[19] - 1 if packet[0] >> 4 == 4 else -1  # last byte of the address; IPv6 goes nowhere
                if not 0 <= target < len(self._tunnels):
                    continue
                now = time.monotonic()
                if up[source] - now > _QUEUE_SECONDS:
                    continue
                self.sent[source] += len(packet)
                up[source] = max(now, up[source]) + len(packet) / self.rate
                down[target] = max(up[source] + self.delay, down[target] + len(packet) / self.rate)
                number += 1
                heapq.heappush(waiting, (down[target], number, target, packet))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}; network namespaces need root")


def _open_tunnel(name: str) -> int:
    """A TUN interface in a namespace; what is written to the descriptor arrives there, and the other way round."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{name}") as there:
        if libc.setns(there.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"namespace {name} cannot be entered")
        try:
            tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tunnel, _TUNSETIFF, struct.pack("16sH", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
        finally:
            libc.setns(home.fileno(), _NEW_NETWORK)
    return tunnel
