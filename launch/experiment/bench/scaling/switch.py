"""Ethernet switches in user space that delay every frame: ``python switch.py NUM_HOSTS DELAY [DELAY …]``.

There is one network for each DELAY, in seconds one way, and on network n a TAP device ``tap<n>.<host>`` for each
host, in the namespace that this runs in. It says ``ready``, and ends when its standard input does. Needs nothing but
Python, so that it starts at once.
"""

import contextlib
import fcntl
import heapq
import os
import select
import signal
import struct
import sys
import time

TUNSETIFF = 0x400454CA  # linux/if_tun.h
TAP_WITHOUT_HEADER = 0x0002 | 0x1000  # IFF_TAP | IFF_NO_PI
MAX_FRAME = 65536


def open_tap(name: str) -> int:
    """Make a TAP device and return the file that its frames come from and go to."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return tap


def forward(networks: list[tuple[float, list[int]]], until: int) -> None:
    """Pass frames on until the file `until` can be read: on each network so many seconds after they came.

    A frame goes to the port its address was last seen at; to all others of its network, if to none yet.
    """
    delay_of = {tap: delay for delay, taps in networks for tap in taps}
    others = {tap: [other for other in taps if other != tap] for _, taps in networks for tap in taps}
    seen: dict[bytes, int] = {}  # devices have addresses of their own: no address is on two networks
    waiting: list[tuple[float, int, int, bytes]] = []
    num_frames = 0  # keeps frames of the same time in their order
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([until, *delay_of], [], [], timeout)
        if until in ready:
            return
        for tap in ready:
            for frame in frames_of(tap):
                seen[frame[6:12]] = tap
                port = seen.get(frame[:6])
                for to in others[tap] if port is None else [port]:
                    num_frames += 1
                    heapq.heappush(waiting, (time.monotonic() + delay_of[tap], num_frames, to, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # that host's queue is full, or it is gone: the frame is lost
                os.write(to, frame)


def frames_of(tap: int) -> list[bytes]:
    """Read what has come in; a host that is going down gives nothing."""
    frames: list[bytes] = []
    with contextlib.suppress(OSError):  # BlockingIOError: that was all
        while len(frames) < 64:  # then serve the other hosts
            frames.append(os.read(tap, MAX_FRAME))
    return frames


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this closes its standard input
    hosts, delays = range(int(sys.argv[1])), [float(delay) for delay in sys.argv[2:]]
    networks = [(delay, [open_tap(f"tap{n}.{host}") for host in hosts]) for n, delay in enumerate(delays)]
    print("ready", flush=True)
    forward(networks, sys.stdin.fileno())
