"""What a server may do with a connection, by port and in both families.
  7001 sends back what comes, in capitals, and `tail` after its end
  7002 reports how the client ends
  7003 sends `bye`, ends its own direction, then as 7002
  7004 resets at the first byte
  7005 resets at the end
  7006 reads nothing until somebody connects to 7007, then as 7002
  7008 sends without end until it cannot, and reports how far it came when 7007 is called"""

import errno, socket, struct, sys, threading

called = threading.Event()


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def echo(conn):
    while data := conn.recv(65536):
        conn.sendall(data.upper())
    conn.sendall(b"tail")
    conn.close()


def report(conn):
    count = 0
    try:
        while data := conn.recv(65536):
            count += len(data)
        say("end", count)
    except OSError as e:
        say(errno.errorcode[e.errno])
    conn.close()


def bye(conn):
    conn.sendall(b"bye")
    try:
        conn.shutdown(socket.SHUT_WR)
    except OSError:  # the client is gone, which is reported below
        pass
    report(conn)


def reset(conn):
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def reset_at_once(conn):
    conn.recv(1)
    reset(conn)


def reset_at_end(conn):
    while conn.recv(65536):
        pass
    reset(conn)


def stall(conn):
    called.wait()
    report(conn)


def call(conn):
    called.set()
    conn.close()


def flood(conn):
    sent = 0
    conn.settimeout(3)
    try:
        while True:
            sent += conn.send(bytes(65536))
    except TimeoutError:
        pass
    called.wait()
    conn.settimeout(60)
    say("sent", sent)
    conn.close()


def serve(server, behaviour):
    while True:
        threading.Thread(target=behaviour, args=(server.accept()[0],), daemon=True).start()


for port, behaviour in enumerate((echo, report, bye, reset_at_once, reset_at_end, stall, call, flood), 7001):
    for family, address in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
        server = socket.create_server((address, port), family=family, backlog=1024)
        threading.Thread(target=serve, args=(server, behaviour), daemon=True).start()
say("ready")
threading.Event().wait()
