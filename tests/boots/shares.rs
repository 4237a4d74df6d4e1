//! Virtio-fs shares beside the root.

use std::fs;

use serde_json::json;

use crate::common::TestBox;

#[test]
fn shares_can_be_mounted_by_their_tags() {
    let test = TestBox::busybox();
    let long_tag = "t".repeat(36);
    let mut shares = Vec::new();
    for (tag, read_only) in [("data", false), (long_tag.as_str(), true)] {
        let host = test.path(&format!("out/{tag}"));
        fs::create_dir(&host).expect("directory");
        fs::write(host.join("file"), tag).expect("file");
        shares.push(json!({"tag": tag, "host_path": host, "read_only": read_only}));
    }
    let script = format!(
        "mkdir /a /b; mount -t virtiofs data /a && mount -t virtiofs {long_tag} /b; cat /a/file /b/file; \
         echo new >/a/new; mount -o remount,rw /b; echo x >/b/new || echo refused"
    );
    let test = test.shell(&script).with("fs_mounts", json!(shares));
    let ran = test.run();
    assert!(ran.console.starts_with(&format!("data{long_tag}")), "{} {}", ran.console, ran.stderr);
    assert!(ran.console.ends_with("refused\n"), "{}", ran.console);
    assert_eq!(fs::read_to_string(test.path("out/data/new")).expect("written"), "new\n");
    assert!(!test.path(&format!("out/{long_tag}/new")).exists());
}

#[test]
fn twenty_devices_share_the_interrupt_pins() {
    let test = TestBox::busybox();
    let shares: Vec<_> = (0..20)
        .map(|i| {
            let host = test.path(&format!("out/s{i}"));
            fs::create_dir(&host).expect("directory");
            fs::write(host.join("file"), format!("{i} ")).expect("file");
            json!({"tag": format!("vol{i}"), "host_path": host, "read_only": false})
        })
        .collect();
    let script =
        "for i in $(seq 0 19); do mkdir /m$i; mount -t virtiofs vol$i /m$i; cat /m$i/file; done";
    let ran = test.shell(script).with("fs_mounts", json!(shares)).run();
    let expected: String = (0..20).map(|i| format!("{i} ")).collect();
    assert_eq!(ran.console, expected, "{}", ran.stderr);
}
