"""A box of the network, as others see it: a socket in the directory that is the first argument.

Prints "ready", then what it gets, one line a frame: the sender and the kind, or of UDP the text. Answers ARP for
its address, and each UDP datagram with the text in capitals. With "stuck" as the second argument it ends to read
after it has answered ARP; with "posing" it sends the frames that nobody may send, first.
"""

import os
import socket
import struct
import sys

directory, how = sys.argv[1:3]
OWN, MAC = bytes([10, 88, 0, 9]), bytes([2, 66, 10, 88, 0, 9])
BOX, BOXS_MAC = bytes([10, 88, 0, 2]), bytes([2, 66, 10, 88, 0, 2])
GATEWAY = bytes([10, 88, 0, 1])


def name(mac):
    return os.path.join(directory, "-".join(f"{byte:02x}" for byte in mac) + ".sock")


def arp(operation, sender, target_mac, target):
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + MAC + sender + target_mac + target


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def udp(to, from_port, to_port, text, source=OWN):
    length = 28 + len(text)
    header = struct.pack("!BBHHHBBH", 0x45, 0, length, 0, 0x4000, 64, 17, 0) + source + to
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return header + struct.pack("!HHHH", from_port, to_port, length - 20, 0) + text


s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind(name(MAC))


def send(kind, data, source=MAC, to=BOXS_MAC):
    s.sendto(to + source + struct.pack("!H", kind) + data, name(BOXS_MAC))


if how == "posing":
    # The gateway is here; so is the box's own address.
    for stolen in GATEWAY, BOX:
        send(0x0806, arp(2, stolen, BOXS_MAC, BOX))
        send(0x0806, arp(1, stolen, bytes(6), BOX), to=b"\xff" * 6)
    # In the box's own name, from everybody, for somebody else, too short, too long.
    good = udp(BOX, 7, 9, b"not this one")
    send(0x0800, good, source=BOXS_MAC)
    send(0x0800, good, source=b"\xff" * 6)
    send(0x0800, good, to=bytes([2, 66, 10, 88, 0, 7]))
    s.sendto(b"short", name(BOXS_MAC))
    send(0x0800, bytes(65_600))
    # Behind a tag, which Linux would take off.
    s.sendto(BOXS_MAC + MAC + b"\x81\0\0\0\x08\x06" + arp(2, GATEWAY, BOXS_MAC, BOX), name(BOXS_MAC))
    # From the gateway's address.
    send(0x0800, udp(BOX, 53, 9, b"not this one", source=GATEWAY))
    # As a server of DHCP.
    send(0x0800, udp(BOX, 67, 9, b"not this one"))
    send(0x0800, udp(BOX, 7, 9, b"this one"))
print("ready", flush=True)
while True:
    frame = s.recv(70_000)
    sender, kind, data = frame[6:12].hex(), struct.unpack("!H", frame[12:14])[0], frame[14:]
    if kind == 0x0806 and data[24:28] == OWN:
        send(kind, arp(2, OWN, frame[6:12], data[14:18]))
        if how == "stuck":
            break
    elif kind == 0x0800 and data[9] == 17 and data[16:20] == OWN:
        from_port, to_port = struct.unpack("!HH", data[20:24])
        print(sender, data[28:].decode(), flush=True)
        send(kind, udp(data[12:16], to_port, from_port, data[28:].upper()))
print("stuck", flush=True)
sys.stdin.read()
