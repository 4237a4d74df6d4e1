//! Boxes as the runtime of 3.2 and 3.3 describes them (contract §1.8, §7.2).

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::client;
use crate::common::TestBox;

/// In the place of the runtime's guest init: mounts a share of its own, and listens late.
const INIT: &str = include_str!("python/late_init.py");

fn ask(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
    // A connection that is closed at once may be so before this.
    let _ = stream.write_all(b"abc").and_then(|()| stream.shutdown(Shutdown::Write));
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    reply
}

#[test]
fn the_images_init_is_known_and_nobody_answers_in_its_place() {
    for variable in ["BOX_EXEC_CONFIG_FILE", "BOX_BOOT_CONFIG_FILE"] {
        let test = TestBox::debian().without_console_file().python(INIT, &[]);
        let (root, forward) = (test.path("root"), test.path("sock/forward.sock"));
        let share = json!([{"tag": "vol0", "host_path": test.path("out"), "read_only": false}]);
        let env = json!([
            [variable, "/run/config.json"],
            ["BOX_VOL_0", "vol0:/data:ro:file"],
            ["BOX_READONLY", "1"],
        ]);
        let test = test
            .without("rootfs_path")
            .with("rootfs", json!({"kind": "directory", "path": root}))
            .with("fs_mounts", share)
            .with("port_forward_socket_path", json!(forward))
            .with("log_config", json!({"driver": "json-file", "options": {}}))
            .with("ksm", json!(true))
            .with("disable_tsi", json!(false))
            .with_entrypoint("env", env);
        let mut started = test.start();
        started.wait_for_line("mounted");
        let exec = test.path("sock/exec.sock");
        assert_eq!(ask(&exec), "", "mote's agent would have an answer");
        fs::write(test.path("out/go"), "").expect("file");
        started.wait_for_line("listening");
        assert_eq!(ask(&exec), "4089 ABC");
        assert_eq!(ask(&forward), "4093 ABC");
        started.stop();
    }
}

#[test]
fn a_box_without_any_network_has_loopback_alone() {
    let (test, started) = TestBox::debian().with("disable_tsi", json!(true)).idle();
    let script = r#"
import errno, os, socket
print(os.listdir("/sys/class/net"))
def told(kind, ip):
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind) as s:
        try: s.connect((ip, 80)); return "connected"
        except OSError as e: return errno.errorcode[e.errno]
for ip in "192.0.2.1", "2001:db8::1", "127.0.0.1":
    print(ip, told(socket.SOCK_STREAM, ip), told(socket.SOCK_DGRAM, ip))
"#;
    let said = client::run(&test, &["python3", "-c", script]);
    assert_eq!(
        said.stdout,
        "['lo']\n192.0.2.1 ENETUNREACH ENETUNREACH\n2001:db8::1 ENETUNREACH ENETUNREACH\n\
            127.0.0.1 ECONNREFUSED connected\n",
        "{}",
        said.stderr
    );
    started.stop();
}
