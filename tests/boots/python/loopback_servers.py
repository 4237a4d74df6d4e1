"""Serves on the host's loopback and on its outside address, and says so when somebody comes."""

import socket, threading


def serve(server):
    while True:
        conn, client = server.accept()
        print("reached", server.getsockname(), flush=True)
        conn.sendall(b"host")
        conn.close()


for family, address in (
    (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "127.1.2.3"),
    (socket.AF_INET, "198.51.100.1"),
):
    server = socket.create_server((address, 7777), family=family)
    threading.Thread(target=serve, args=(server,)).start()
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.bind((address, 7777))
    def receive(udp=udp):
        while True:
            data, client = udp.recvfrom(100)
            print("received", udp.getsockname(), flush=True)
            udp.sendto(data, client)
    threading.Thread(target=receive).start()
print("ready")
