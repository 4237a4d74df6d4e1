//! A box that runs out of memory: what its kernel kills, and that it can still be worked with.

use std::io::Read;
use std::net::TcpStream;

use serde_json::json;

use crate::client::{self, Client, run_with, shell};
use crate::common::{Started, TestBox, eventually};

/// The processes of the agent's own, with what is added to their scores: `NAME PID ADDED`.
const AGENTS: &str = "for p in /proc/[0-9]*; do
    read name <$p/comm && case $name in mote-*) echo $name ${p#/proc/} $(cat $p/oom_score_adj);; esac
done 2>/dev/null";

/// The process id of the one that carries connections, which is there from the first socket on.
fn network(test: &TestBox) -> String {
    let agents = shell(test, &format!("nc 127.0.0.1 9 </dev/null 2>/dev/null; {AGENTS}"));
    let line = agents.lines().find(|line| line.starts_with("mote-network ")).expect("there");
    line.split(' ').nth(1).expect("three words").to_owned()
}

#[test]
fn the_agents_processes_are_the_last_to_be_killed_and_no_others() {
    // A program that could lower its score would be spared like the agent's processes.
    const TRY: &str = "cat /proc/self/oom_score_adj; (echo -1 >/proc/self/oom_score_adj) 2>/dev/null && [ $(id -u) != 0 ] && echo lowered; true";
    for user in ["root", "app"] {
        let test = TestBox::busybox()
            .with("user", json!(user))
            .without_console_file()
            // A box's first socket is what it has the process for.
            .shell(&format!(
                "{TRY}; nc 127.0.0.1 9 </dev/null 2>/dev/null; echo ready; exec sleep 10000"
            ));
        let pty = test.path("sock/pty.sock");
        let test = test.with("pty_socket_path", json!(pty));
        let mut started = test.start();
        assert_eq!(started.line().as_deref(), Some("0"), "the entrypoint of {user}");
        assert_eq!(started.line().as_deref(), Some("ready"), "the entrypoint of {user}");
        let done = run_with(&test, &["sh", "-c", TRY], json!({ "user": user }));
        assert_eq!((done.code, done.stdout.as_str()), (0, "0\n"), "a command of {user}");
        let mut terminal = Client::connect(&test, "pty");
        let request = json!({"cmd": ["sh", "-c", TRY], "env": [], "working_dir": "/", "user": user, "cols": 80, "rows": 24});
        terminal.send_json(1, &request);
        let shown: Vec<u8> =
            terminal.rest().into_iter().filter(|(kind, _)| *kind == 2).flat_map(|f| f.1).collect();
        assert_eq!(String::from_utf8_lossy(&shown), "0\r\n", "a terminal of {user}");
        let agents = shell(&test, AGENTS);
        for name in ["mote-network", "mote-session"] {
            let line = agents.lines().find(|line| line.starts_with(name)).expect(name);
            assert!(line.ends_with(" -999"), "{agents}");
        }
        started.stop();
    }
}

/// Lets programs ask for more memory than there is.
const ALLOW: &str = "echo 1 >/proc/sys/vm/overcommit_memory";

/// Connects to the box's published port, behind which a server starts for that.
fn assert_port_works(test: &TestBox, port: u16) {
    let mut server = Client::connect(test, "exec");
    let cmd = ["nc", "-l", "-p", "8001", "-e", "echo", "published"];
    server.send_json(client::DATA, &json!({"cmd": cmd, "timeout_ns": 60_000_000_000u64}));
    eventually("the port works", || {
        let mut said = String::new();
        TcpStream::connect(("127.0.0.1", port))
            .is_ok_and(|mut to| to.read_to_string(&mut said).is_ok())
            && said == "published\n"
    });
}

/// Starts a box with a published port whose entrypoint runs this, and waits until it has said `ready`.
fn hungry(user: &str, port: u16, script: &str) -> (TestBox, Started) {
    let test = TestBox::busybox()
        .with("memory_mib", json!(128))
        .with("user", json!(user))
        .with("port_map", json!([format!("{port}:8001")]))
        .without_console_file()
        .shell(script);
    let started = test.ready();
    (test, started)
}

#[test]
fn commands_are_answered_while_and_after_memory_runs_out() {
    // Each of them asks for more memory than there is, over and over.
    const EAT: &str = "echo ready
        for i in 1 2 3 4; do
            while [ ! -e /stop ]; do dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null; done &
        done
        wait; echo over; exec sleep 10000";
    for (user, port) in [("root", 18091), ("app", 18092)] {
        let (test, mut started) = hungry(user, port, EAT);
        let before = network(&test);
        shell(&test, ALLOW);
        eventually("the kernel has killed some", || {
            let killed = shell(&test, "grep -w oom_kill /proc/vmstat");
            killed
                .trim()
                .rsplit(' ')
                .next()
                .and_then(|n| n.parse().ok())
                .is_some_and(|n: u32| n >= 5)
        });
        assert_eq!(shell(&test, "echo served"), "served\n", "{user}");
        shell(&test, "touch /stop");
        started.wait_for_line("over");
        assert_eq!(network(&test), before, "{user}: connections are carried by the same process");
        assert_port_works(&test, port);
        started.stop();
    }
}

#[test]
fn programs_that_root_has_spared_are_killed_before_the_agents() {
    const EAT: &str = "busybox mkfifo /go; echo ready; read go </go
        echo -900 >/proc/self/oom_score_adj
        dd if=/dev/zero of=/dev/null bs=200M count=1
        echo over; exec sleep 10000";
    let (test, mut started) = hungry("root", 18093, EAT);
    shell(&test, ALLOW);
    let before = network(&test);
    shell(&test, "echo >/go");
    started.wait_for_line("over");
    let killed = shell(&test, "grep -w oom_kill /proc/vmstat");
    assert_ne!(killed, "oom_kill 0\n", "memory has run out");
    assert_eq!(network(&test), before, "connections are carried by the same process");
    assert_port_works(&test, 18093);
    started.stop();
}
