"""Serves on these addresses, by TCP and UDP at port 7777, and says so when somebody comes.

    witness.py ADDRESS..."""

import socket, sys, threading


def serve(server):
    while True:
        conn, client = server.accept()
        print("reached", server.getsockname(), flush=True)
        conn.sendall(b"hello")
        conn.close()


for address in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
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
