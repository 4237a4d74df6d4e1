"""HTTP and HTTPS in both families, and the digest of what comes on port 7010."""

import hashlib, http.server, random, socket, ssl, threading

BLOCK = random.Random(1).randbytes(1 << 20)


def blocks(mib):
    for number in range(mib):
        yield number.to_bytes(8, "big") + BLOCK[8:]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        kind, _, mib = self.path[1:].partition("/")
        if kind == "mib":
            body = blocks(int(mib))
            length = int(mib) << 20
        elif kind == "sha256":
            digest = hashlib.sha256()
            for block in blocks(int(mib)):
                digest.update(block)
            body = [digest.hexdigest().encode()]
            length = 64
        else:
            body = [b"hello " + self.path.encode()]
            length = len(body[0])
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        for block in body:
            self.wfile.write(block)
    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256


class Server6(Server):
    address_family = socket.AF_INET6


def digest(conn):
    digest = hashlib.sha256()
    while data := conn.recv(1 << 18):
        digest.update(data)
    conn.sendall(digest.hexdigest().encode())
    conn.close()


def digests(server):
    while True:
        threading.Thread(target=digest, args=(server.accept()[0],)).start()


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("cert.pem", "key.pem")
for make, address in ((Server, "198.51.100.1"), (Server6, "2001:db8::1")):
    threading.Thread(target=make((address, 80), Handler).serve_forever).start()
    secure = make((address, 443), Handler)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    threading.Thread(target=secure.serve_forever).start()
threading.Thread(target=digests, args=(socket.create_server(("198.51.100.1", 7010)),)).start()
print("ready")
