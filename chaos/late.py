"""Holds back what a machine sends to another one, for kernels without netem.

    python -m chaos.late eth0 10.0.0.12 0.1

A device of ours (TUN) takes the packets for that address and this process sends each `seconds` later through
the real one, unchanged and in order. Ends with the process: the device and its route go with it.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


def main(device: str, address: str, seconds: float) -> None:
    """Hold packets back until killed. Prints a line when it has begun."""
    taken = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(taken, TUNSETIFF, struct.pack("16sH14x", b"late", IFF_TUN | IFF_NO_PI))
    sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)  # takes whole IP packets
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    own = subprocess.run(
        ["ip", "-4", "-br", "addr", "show", device], check=True, capture_output=True, text=True
    )
    source = own.stdout.split()[2].partition("/")[0]
    for words in ("link set late up", f"route add {address} dev late src {source}"):
        subprocess.run(["ip", *words.split()], check=True)
    print(f"what goes to {address} arrives {seconds} s later", flush=True)
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([taken], [], [], pause)[0]:
            packet = os.read(taken, 65536)
            if packet[0] >> 4 == 4:  # not what IPv6 looks for on every new device
                waiting.append((time.monotonic() + seconds, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            sender.sendto(waiting.popleft()[1], (address, 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
