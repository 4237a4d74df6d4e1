"""Poses as whom a socket has sent to: sends it datagrams from the addresses that stand for flows, by every way
that an ordinary user has to choose a source. Prints the sources that the socket then sees."""

import socket, struct

IP_FREEBIND, IPV6_FREEBIND, IP_PKTINFO = 15, 78, 8
# The first flows of sockets that are not connected.
FLOWS = [(f"127.144.0.{n}", f"fd54:5349::10:{n:x}") for n in range(1, 9)]


def sockets(family, freebind):
    attacker = socket.socket(family, socket.SOCK_DGRAM)
    attacker.setsockopt(*freebind, 1)
    return attacker


def attack(port):
    for ip4, ip6 in FLOWS:
        for family, ip, target, freebind in (
            (socket.AF_INET, ip4, "127.0.0.1", (socket.SOL_IP, IP_FREEBIND)),
            (socket.AF_INET6, ip6, "::1", (socket.IPPROTO_IPV6, IPV6_FREEBIND)),
        ):
            try:
                with sockets(family, freebind) as bound:
                    bound.bind((ip, 0))
                    print("bound", ip)
                    bound.sendto(b"forged", (target, port))
            except OSError:
                pass
            try:
                with sockets(family, freebind) as chosen:
                    raw = socket.inet_pton(family, ip)
                    if family == socket.AF_INET:
                        info = (socket.SOL_IP, IP_PKTINFO, struct.pack("=I4s4x", 0, raw))
                    else:
                        info = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16sI", raw, 0))
                    chosen.sendmsg([b"forged"], [info], 0, (target, port))
            except OSError:
                pass


victim = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
victim.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
victim.settimeout(2)
for address in "::ffff:198.51.100.1", "2001:db8::1":
    victim.sendto(b"question", (address, 9))
attack(victim.getsockname()[1])
try:
    while True:
        source = victim.recvfrom(99)[1][0]
        if not source.startswith(("::ffff:127.", "fd54:")):
            print("believed", source)
except TimeoutError:
    pass
# Nor does anybody get at a flow of another's.
for ip4, ip6 in FLOWS:
    for family, ip in (socket.AF_INET, ip4), (socket.AF_INET6, ip6):
        for kind, name in (socket.SOCK_STREAM, "connected"), (socket.SOCK_DGRAM, "sent"):
            with socket.socket(family, kind) as s:
                if s.connect_ex((ip.replace("127.144", "127.128").replace("::10:", "::"), 1)) == 0:
                    print(name, ip)
print("over")
