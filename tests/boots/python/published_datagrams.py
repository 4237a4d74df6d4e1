"""Answers datagrams on every kind of address: whom it sees, and what came, in capitals.
  9001 0.0.0.0    9002 :: (and IPv4)    9003 127.0.0.1    9004 ::1
  9005 0.0.0.0, by a socket of the client's own, connected to it, as some servers do"""

import select, socket

servers = {}
for port, family, address, dual in (
    (9001, socket.AF_INET, "0.0.0.0", False), (9002, socket.AF_INET6, "::", True),
    (9003, socket.AF_INET, "127.0.0.1", False), (9004, socket.AF_INET6, "::1", False),
    (9005, socket.AF_INET, "0.0.0.0", False),
):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
    s.bind((address, port))
    servers[s] = port
by_9005 = s
print("ready", flush=True)
while True:
    for s in select.select(list(servers), [], [])[0]:
        data, client = s.recvfrom(65536)
        answer = f"{client[0]} {data[:8].decode().strip().upper()} {len(data)}".encode()
        if servers[s] != 9005:
            s.sendto(answer.ljust(len(data)), client)
            continue
        if s is not by_9005:
            s.send(answer + f" {s.getpeername() == client}".encode())
            continue
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(("0.0.0.0", 9005))
        own.connect(client)
        own.send(answer + f" {own.getpeername() == client}".encode())
        servers[own] = 9005
