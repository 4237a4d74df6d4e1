"""How connections to the servers of servers.py may end, seen from the client.

    ends.py HOST FUNCTION [SIZE]"""

import os, signal, socket, struct, sys

HOST = sys.argv[1]


def connect(port):
    return socket.create_connection((HOST, port), timeout=60)


def rest(conn):
    data = b""
    while part := conn.recv(65536):
        data += part
    return data


def the_guest_ends_first():
    conn = connect(7001)
    conn.sendall(b"abc" * 100000)
    conn.shutdown(socket.SHUT_WR)
    assert rest(conn) == b"ABC" * 100000 + b"tail"


def the_server_ends_first():
    conn = connect(7003)
    assert rest(conn) == b"bye"
    conn.sendall(bytes(1 << 20))
    conn.close()


def expect_reset(conn):
    try:
        assert False, rest(conn)
    except ConnectionResetError:
        pass


def the_server_resets():
    conn = connect(7004)
    conn.sendall(b"x")
    expect_reset(conn)
    conn = connect(7005)
    conn.sendall(b"x")
    conn.shutdown(socket.SHUT_WR)
    expect_reset(conn)


def sends(size="1000"):
    connect(7002).sendall(bytes(int(size)))


def resets():
    conn = connect(7002)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def is_killed():
    conn = connect(7002)
    conn.sendall(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)


def leaves_something_unread():
    conn = connect(7003)
    conn.recv(3, socket.MSG_PEEK | socket.MSG_WAITALL)
    conn.close()


globals()[sys.argv[2]](*sys.argv[3:])
