//! The spec's `user` (contract §1.5), resolved against the guest's own `/etc/passwd` and
//! `/etc/group`: `uid`, `uid:gid`, `name` or `name:group`.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups: those that list the user as a member.
    pub groups: Vec<u32>,
    /// Home directory, where the user has an account.
    pub home: Option<String>,
}

impl Identity {
    /// What runs when no user is named.
    pub const ROOT: Identity = Identity { uid: 0, gid: 0, groups: Vec::new(), home: None };
}

/// Resolves `user` with the files of the running system. `None` and `""` are root.
///
/// # Errors
/// If the user or the group is not in the guest's files, or these cannot be read.
pub fn resolve(user: Option<&str>) -> Result<Identity, String> {
    match user {
        None | Some("") => Ok(Identity::ROOT),
        Some(user) => resolve_in(user, &read("/etc/passwd")?, &read("/etc/group")?),
    }
}

/// Most bytes of an account file that are looked at.
const MAX_FILE: u64 = 16 << 20;

/// A file's text; one that is not there is empty, and bytes that are no text matter only to the lines
/// they are in. What an image has there instead of a file keeps nobody waiting.
fn read(path: &str) -> Result<String, String> {
    let mut bytes = Vec::new();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    match file.and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes)) {
        Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(format!("read the guest's {path}: {error}")),
    }
}

/// The names that the guest's files have for users and groups.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Reads them; where that cannot be done, there are none.
    pub fn read() -> Self {
        let [passwd, group] =
            ["/etc/passwd", "/etc/group"].map(|path| read(path).unwrap_or_default());
        Self::of(&passwd, &group)
    }

    fn of(passwd: &str, group: &str) -> Self {
        let mut names = Names::default();
        for Account { name, uid, .. } in passwd.lines().filter_map(Account::parse) {
            names.users.entry(uid).or_insert_with(|| name.into());
        }
        for Group { name, gid, .. } in group.lines().filter_map(Group::parse) {
            names.groups.entry(gid).or_insert_with(|| name.into());
        }
        names
    }

    /// A user's name, or the number.
    pub fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// A group's name, or the number.
    pub fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

fn resolve_in(user: &str, passwd: &str, group: &str) -> Result<Identity, String> {
    // What follows a second colon is ignored (contract §1.5).
    let mut parts = user.split(':');
    let user = parts.next().unwrap_or("");
    let wanted_group = parts.next().filter(|group| !group.is_empty());
    let accounts = || passwd.lines().filter_map(Account::parse);
    let numeric: Option<u32> = user.parse().ok();
    let account = match numeric {
        Some(uid) => accounts().find(|account| account.uid == uid),
        None => Some(accounts().find(|account| account.name == user).ok_or_else(|| {
            format!("user '{user}' is not in the guest's /etc/passwd; name one that is, or use its numeric id")
        })?),
    };
    let uid = account.as_ref().map(|a| a.uid).or(numeric).unwrap_or(0);
    let entries = || group.lines().filter_map(Group::parse);
    let gid = match wanted_group {
        None => account.as_ref().map_or(0, |account| account.gid),
        Some(name) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => entries().find(|entry| entry.name == name).map(|entry| entry.gid).ok_or_else(
                || format!("group '{name}' is not in the guest's /etc/group; name one that is, or use its numeric id"),
            )?,
        },
    };
    let groups = match &account {
        Some(account) => entries()
            .filter(|entry| entry.gid != gid && entry.members.split(',').any(|m| m == account.name))
            .map(|entry| entry.gid)
            .collect(),
        None => Vec::new(),
    };
    let home = account.map(|account| account.home).filter(|home| !home.is_empty());
    Ok(Identity { uid, gid, groups, home: home.map(str::to_owned) })
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    /// `name:password:uid:gid:comment:home:shell` (passwd(5)).
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or("") })
    }
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    /// `name:password:gid:member,…` (group(5)).
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or("") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1001::/home/app:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:app,other\napp:x:1001:\nwheel:x:10:app\n";

    #[test]
    fn numbers_have_names_or_stay_numbers() {
        let names = Names::of(&format!("{PASSWD}toor:x:0:0::/:/bin/sh\n"), GROUP);
        assert_eq!([0, 1000, 7].map(|uid| names.user(uid)), ["root", "app", "7"]);
        assert_eq!([0, 50, 7].map(|gid| names.group(gid)), ["root", "staff", "7"]);
    }

    #[test]
    fn names_and_numbers_resolve() {
        let id = |uid, gid, groups: &[u32], home: &str| {
            let home = Some(home.to_owned()).filter(|home| !home.is_empty());
            Ok(Identity { uid, gid, groups: groups.to_vec(), home })
        };
        let app = |gid, groups| id(1000, gid, groups, "/home/app");
        for (user, expected) in [
            ("app", app(1001, &[50, 10])),
            ("1000", app(1001, &[50, 10])),
            ("app:wheel", app(10, &[50])),
            ("app:7", app(7, &[50, 10])),
            ("app:", app(1001, &[50, 10])),
            ("app:7:x", app(7, &[50, 10])),
            ("4242", id(4242, 0, &[], "")),
            ("4242:4343", id(4242, 4343, &[], "")),
            ("root", id(0, 0, &[], "/root")),
        ] {
            assert_eq!(resolve_in(user, PASSWD, GROUP), expected, "{user}");
        }
    }

    #[test]
    fn unknown_names_are_named() {
        for (user, named) in [("ghost", "'ghost'"), ("app:ghosts", "'ghosts'"), ("-1", "'-1'")] {
            let error = resolve_in(user, PASSWD, GROUP).expect_err(user);
            assert!(error.contains(named), "{error}");
        }
    }
}
