"""Echoes datagrams on two ports of both families, each with the port's last digit in front."""

import socket, threading


def echo(server, digit):
    while True:
        data, client = server.recvfrom(70000)
        server.sendto((digit + data)[:len(data)] if data else b"", client)


for port in (9001, 9002):
    for family, address in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
        server = socket.socket(family, socket.SOCK_DGRAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind((address, port))
        threading.Thread(target=echo, args=(server, str(port)[-1].encode())).start()
print("ready")
