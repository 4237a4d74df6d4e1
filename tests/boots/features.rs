//! What the guest's kernel can do for programs beyond what every box uses: file systems of disk images,
//! tunnels and virtual interfaces, packet filters, and the kernel's cryptography.

use crate::common::TestBox;

fn run(script: &str) -> String {
    let ran = TestBox::containers().shell(&format!("set -e\n{script}")).run();
    assert_eq!(ran.code, 0, "{} {}", ran.console, ran.stderr);
    ran.console
}

#[test]
fn disk_images_mount() {
    let output = run("
cd /dev/shm
mkdir tree mnt
echo content >tree/file
mkfs.erofs -zlz4 erofs.img tree >/dev/null
mkfs.erofs plain.img tree >/dev/null
for comp in gzip lz4 lzo xz zstd; do mksquashfs tree $comp.img -comp $comp -quiet -no-progress; done
truncate -s 4M vfat.img
mkfs.vfat vfat.img >/dev/null
for image in *.img; do
    mount -o loop $image mnt
    [ $image != vfat.img ] || cp tree/file mnt/Gr\u{fc}\u{df}e
    cat mnt/*
    umount mnt
done
losetup --all
");
    assert_eq!(output, "content\n".repeat(8));
}

#[test]
fn a_wireguard_tunnel_joins_two_network_namespaces() {
    let output = run("
cd /dev/shm
ip netns add n1
ip netns add n2
ip link add cable netns n1 type veth peer name cable netns n2
for n in 1 2; do
    (umask 77; wg genkey >private$n)
    wg pubkey <private$n >public$n
    ip -n n$n address add 192.0.2.$n/24 dev cable
    ip -n n$n link set cable up
    ip -n n$n link add wg0 type wireguard
    ip -n n$n address add 10.9.0.$n/24 dev wg0
    ip -n n$n link set wg0 up
done
for pair in '1 2' '2 1'; do
    set -- $pair
    ip netns exec n$1 wg set wg0 listen-port 51820 private-key private$1 \\
        peer $(cat public$2) allowed-ips 10.9.0.$2/32 endpoint 192.0.2.$2:51820
done
ip netns exec n1 ping -q -c 1 -W 20 10.9.0.2 | grep received
");
    assert!(output.contains("1 packets transmitted, 1 received, 0% packet loss"), "{output}");
}

#[test]
fn packet_filters_and_virtual_interfaces_can_be_made() {
    let output = run("
iptables-nft -t nat -A POSTROUTING -s 10.1.0.0/16 ! -o eth9 -m comment --comment why -j MASQUERADE
iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables-legacy -t nat -A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 80 -j DNAT --to-destination 10.1.0.2:80
iptables-legacy -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
ip6tables-legacy -t filter -A INPUT -m multiport -p udp --dports 1,2 -j REJECT
ip6tables-nft -t raw -A PREROUTING -m rpfilter --invert -j DROP
ipset create nets hash:net
iptables-nft -A FORWARD -m set --match-set nets dst -j ACCEPT
nft -f - <<'end'
table inet filter {
    flowtable fast { hook ingress priority 0; devices = { lo }; }
    chain input {
        type filter hook input priority 0
        ct state established accept
        fib daddr type local ct mark set 1 limit rate 5/second log prefix \"seen \" accept
        reject with icmpx type admin-prohibited
    }
    chain to { type nat hook output priority -100; tcp dport 1 redirect to :2; }
    chain from { type nat hook postrouting priority 100; ip daddr 10.2.0.0/16 masquerade; }
}
table bridge filter {
    chain forward { type filter hook forward priority 0; ct state invalid drop; }
}
end
for table in inet bridge; do nft list table $table filter | head -n 1; done
ip link add base type dummy
ip link add base.5 link base type vlan id 5
ip link add vx0 type vxlan id 7 dev base dstport 4789
ip link add mac0 link base type macvlan mode bridge
ip link add base2 type dummy
ip link add ipv0 link base2 type ipvlan mode l2
ip link add br0 type bridge vlan_filtering 1
cat /proc/sys/net/bridge/bridge-nf-call-iptables
ip -o link | grep -c -E ' (base\\.5@base|vx0|mac0@base|ipv0@base2|br0):'
");
    assert!(output.ends_with("table inet filter {\ntable bridge filter {\n1\n5\n"), "{output}");
}

#[test]
fn programs_hash_and_encrypt_by_the_kernel() {
    let script = r#"
import hashlib, socket
def operation(kind, name):
    algorithm = socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
    algorithm.bind((kind, name))
    return algorithm
for name in ["sha1", "sha256", "sha512"]:
    hashing, _ = operation("hash", name).accept()
    hashing.sendall(b"text")
    print(name, hashing.recv(64) == getattr(hashlib, name)(b"text").digest())
for name in ["cbc(aes)", "ctr(aes)", "xts(aes)"]:
    algorithm = operation("skcipher", name)
    algorithm.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, bytes(range(32)))
    texts = [b"sixteen letters."]
    for direction in [socket.ALG_OP_ENCRYPT, socket.ALG_OP_DECRYPT]:
        cipher, _ = algorithm.accept()
        cipher.sendmsg_afalg([texts[-1]], op=direction, iv=bytes(16))
        texts.append(cipher.recv(16))
    print(name, texts[0] != texts[1] and texts[0] == texts[2])
operation("aead", "gcm(aes)")
"#;
    let ran = TestBox::debian().python(script, &[]).run();
    let expected =
        "sha1 True\nsha256 True\nsha512 True\ncbc(aes) True\nctr(aes) True\nxts(aes) True\n";
    assert_eq!((ran.code, ran.console.as_str()), (0, expected), "{}", ran.stderr);
}

#[test]
fn a_hundred_thousand_watches_are_kept() {
    let script = r#"
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.chdir("/dev/shm")
files = [str(number).encode() for number in range(1000)]
for name in files:
    os.close(os.open(name, os.O_CREAT))
watchers = [libc.inotify_init1(os.O_NONBLOCK) for _ in range(100)]
for watcher in watchers:
    for name in files:
        if libc.inotify_add_watch(watcher, name, 2) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")
with open("999", "w") as last:
    last.write("changed")
print(all(os.read(watcher, 4096) for watcher in watchers))
"#;
    let ran =
        TestBox::debian().with("memory_mib", serde_json::json!(512)).python(script, &[]).run();
    assert_eq!((ran.code, ran.console.as_str()), (0, "True\n"), "{}", ran.stderr);
}
