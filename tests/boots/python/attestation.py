"""A client of a box's attestation socket, written from the description of the protocol.

    attestation.py SOCKET ask ROUTE PAYLOAD...       one request after another; what each was answered
    attestation.py SOCKET files DIRECTORY            the same with a request in each file
    attestation.py SOCKET verify                     what openssl finds in the certificate is what it should be
    attestation.py SOCKET hostile                    clients that keep to nothing
    attestation.py SOCKET stuck                      200 clients in the middle of their handshakes, and one more
    attestation.py SOCKET closed                     whether a connection is closed without a byte
"""

import hashlib, json, os, re, socket, ssl, struct, subprocess, sys, threading

SOCKET, COMMAND, *WORDS = sys.argv[1:]
DATA, ERROR = 1, 4


def connect():
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(300)
    client.connect(SOCKET)
    return client


def tls(version=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version:
        context.minimum_version = context.maximum_version = version
    return context.wrap_socket(connect(), server_hostname="localhost", suppress_ragged_eofs=False)


def receive(client):
    """The answer: its kind and its payload, up to the server's close."""
    answer = b""
    while more := client.recv(65536):
        answer += more
    if not answer:
        return None
    kind, length = struct.unpack(">BI", answer[:5])
    assert length == len(answer) - 5, (length, len(answer))
    return kind, answer[5:]


def send(payload, kind=DATA, version=None):
    client = tls(version)
    client.sendall(struct.pack(">BI", kind, len(payload)) + payload)
    return receive(client)


def ask(route, payload=None, version=None):
    kind, answer = send(json.dumps({"route": route, "payload": payload}).encode(), version=version)
    return ("DATA", json.loads(answer)) if kind == DATA else ("ERROR", answer.decode())


def run(*command, stdin=b""):
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


def verify():
    for version in ["-tls1_3", "-tls1_2"]:
        said = run("openssl", "s_client", "-unix", SOCKET, "-servername", "localhost", version)
        pem = re.search(b"-----BEGIN CERT.*?-----END CERTIFICATE-----\n", said, re.S)[0]
        text = run("openssl", "x509", "-noout", "-subject", "-issuer", "-text", stdin=pem).decode()
        for name in ["subject", "issuer"]:
            assert re.search(f"^{name}=CN ?= ?A3S Box RA-TLS, O ?= ?A3S Lab$", text, re.M), text
        assert "ASN1 OID: secp384r1" in text and "ecdsa-with-SHA384" in text, text
        assert "1.3.6.1.4.1.58270.1.1: critical" not in text, text
        key = run("openssl", "x509", "-noout", "-pubkey", stdin=pem)
        key = run("openssl", "pkey", "-pubin", "-outform", "DER", stdin=key)

        parsed = run("openssl", "asn1parse", stdin=pem).decode()
        report = re.search(r":1\.3\.6\.1\.4\.1\.58270\.1\.1\n.*OCTET STRING +\[HEX DUMP\]:(\w+)", parsed)
        report = bytes.fromhex(report[1])
        chain = re.search(r":1\.3\.6\.1\.4\.1\.58270\.1\.2\n.*OCTET STRING +:(.*)", parsed)[1]
        assert (len(report), chain) == (1184, "{}"), (len(report), chain)

        expected = bytearray(1184)
        struct.pack_into("<IIQ", expected, 0, 0xA3, 1, 0)
        expected[0x38], expected[0x3E], expected[0x3F] = 3, 8, 115
        expected[0x50:0x70] = hashlib.sha256(key).digest()
        expected[0x90:0xC0] = bytes(i * 0xA3 % 256 for i in range(48))
        expected[0x1A0:0x1E0] = b"\xa3" * 64
        assert report == expected, report.hex()
        # By default a verifier looks at bit 19 of the policy (debug), some at bit 16 (SMT).
        policy = struct.unpack_from("<Q", report, 8)[0]
        assert policy & (1 << 19 | 1 << 16) == 0
    print("verified")


def hostile():
    for name, start in [
        ("garbage", os.urandom(4096)),
        ("plain text", b"GET /attest HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("a frame without TLS", struct.pack(">BI", 1, 18) + b'{"route":"status"}'),
        ("a handshake that is too long", b"\x16\x03\x01\xff\xff" + bytes(70000)),
    ]:
        client = connect()
        try:
            client.sendall(start)
            while client.recv(65536):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        print(name, "is closed")
    client = tls()
    client.sendall(struct.pack(">BI", DATA, 0xFFFFFFFF))
    print(receive(client))
    client = tls()
    client.sendall(struct.pack(">BI", DATA, (16 << 20) + 1))
    print(receive(client))
    print(send(b"", kind=3), send(b"xyz", kind=9))
    # Half of a header, half of a request, and none.
    for part in [b"", b"\x01\x00", struct.pack(">BI", DATA, 9) + b"half"]:
        client = tls()
        client.sendall(part)
        print(receive(client.unwrap()) if part == b"" else client.close())
    # Several that are as long as can be.
    request = json.dumps({"route": "seal", "payload": {"context": "c", "data": "A" * (10 << 20)}})
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(send(request.encode()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("long", [(kind, len(answer) > 10 << 20) for kind, answer in answers])
    print(ask("status", version=ssl.TLSVersion.TLSv1_2))


def stuck():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    clients = []
    for number in range(200):
        outgoing = ssl.MemoryBIO()
        session = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        try:
            session.do_handshake()
        except ssl.SSLWantReadError:
            pass
        hello = outgoing.read()
        client = connect()
        # All of the first message, half of it, or nothing.
        client.sendall(hello[: [len(hello), len(hello) // 2, 0][number % 3]])
        clients.append(client)
    print(len(clients), *ask("status"))
    for client in clients:
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass
    print("all are closed in time")


if COMMAND == "ask":
    for route, payload in zip(WORDS[::2], WORDS[1::2]):
        kind, answer = ask(route, json.loads(payload))
        print(kind, answer if kind == "ERROR" else json.dumps(answer))
elif COMMAND == "files":
    for name in sorted(os.listdir(WORDS[0])):
        kind, answer = send(open(os.path.join(WORDS[0], name), "rb").read())
        print({DATA: "DATA", ERROR: "ERROR"}[kind], answer.decode())
elif COMMAND == "closed":
    assert connect().recv(1) == b""
    print("closed")
else:
    {"verify": verify, "hostile": hostile, "stuck": stuck}[COMMAND]()
