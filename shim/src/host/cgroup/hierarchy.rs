//! The host's cgroup hierarchies: one of version 2, or several of version 1, or both (systemd's hybrid).

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Of version 1: its controllers, `name=systemd` among them. `None`: version 2.
    pub controllers: Option<Vec<String>>,
    /// This process's cgroup when it was looked at, beneath the mount.
    pub own: PathBuf,
}

impl Hierarchy {
    /// Whether it is of version 1 and has that controller.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().flatten().any(|known| known == controller)
    }
}

/// Those of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies(pub Vec<Hierarchy>);

impl Hierarchies {
    /// This host's, as this process sees them.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn of_this_host() -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        Ok(Self::parse(&mounts, &own))
    }

    /// From the texts of /proc/self/mountinfo and /proc/self/cgroup.
    pub fn parse(mounts: &str, own: &str) -> Self {
        let mut found: Vec<Hierarchy> = Vec::new();
        for line in mounts.lines() {
            let Some((hierarchy, root)) = mounted(line) else {
                continue;
            };
            // The same one may be mounted several times.
            if found
                .iter()
                .any(|known| known.controllers == hierarchy.controllers)
            {
                continue;
            }
            let Some(own) = own_of(&hierarchy, &root, own) else {
                continue;
            };
            found.push(Hierarchy { own, ..hierarchy });
        }
        Self(found)
    }

    /// Whether there is version 2 and nothing else.
    pub fn unified(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|hierarchy| hierarchy.controllers.is_none())
    }

    /// Where a path leads in each hierarchy: an absolute one beneath its root, a relative one as with runc.
    pub fn resolve(&self, path: &Path) -> Vec<PathBuf> {
        let unified = self.unified();
        let resolve = |hierarchy: &Hierarchy| {
            let base = if path.is_absolute() {
                Path::new("")
            } else if unified {
                // Beside our own: one that has processes cannot have cgroups beneath it that have controllers.
                hierarchy.own.parent().unwrap_or(Path::new(""))
            } else {
                &hierarchy.own
            };
            clean(&hierarchy.mount.join(base).join(inner(path)))
        };
        self.0.iter().map(resolve).collect()
    }
}

/// A path without what makes it absolute, and without steps upwards that would leave its root.
fn inner(path: &Path) -> PathBuf {
    let mut inner = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => inner.push(name),
            Component::ParentDir => {
                inner.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    inner
}

fn clean(path: &Path) -> PathBuf {
    path.components()
        .filter(|part| !matches!(part, Component::CurDir))
        .collect()
}

/// A line of mountinfo, if it is a cgroup hierarchy's, with the root of the mount.
fn mounted(line: &str) -> Option<(Hierarchy, PathBuf)> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(3);
    let (root, mount) = (unescape(head.next()?), unescape(head.next()?));
    let mut tail = tail.split(' ');
    let (kind, options) = (tail.next()?, tail.nth(1).unwrap_or_default());
    let controllers = match kind {
        "cgroup2" => None,
        "cgroup" => {
            const NOT_CONTROLLERS: [&str; 6] =
                ["rw", "ro", "xattr", "noprefix", "clone_children", "favordynmods"];
            let names = options
                .split(',')
                .filter(|name| !NOT_CONTROLLERS.contains(name) && !name.starts_with("release_agent="));
            let mut names: Vec<String> = names.map(str::to_owned).collect();
            names.sort();
            Some(names)
        }
        _ => return None,
    };
    let hierarchy = Hierarchy {
        mount: mount.into(),
        controllers,
        own: PathBuf::new(),
    };
    Some((hierarchy, root.into()))
}

/// The process's cgroup by /proc/self/cgroup, beneath the mount whose root is `root`. What is not beneath it is as good
/// as the mount itself. `None`: the hierarchy is not listed.
fn own_of(hierarchy: &Hierarchy, root: &Path, own: &str) -> Option<PathBuf> {
    let path = own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let mut names: Vec<&str> = controllers.split(',').filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        let same = match &hierarchy.controllers {
            None => names.is_empty(),
            Some(known) => known.iter().map(String::as_str).eq(names),
        };
        same.then_some(path)
    })?;
    let path = path.trim_end_matches(" (deleted)");
    Some(Path::new(path).strip_prefix(root).map(inner).unwrap_or_default())
}

/// mountinfo's octal escapes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "\
        22 1 0:21 / / rw - ext4 /dev/vda rw\n\
        30 22 0:26 / /sys/fs/cgroup rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate\n\
        31 22 0:26 / /mnt/a\\040copy rw - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "\
        30 22 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
        31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        34 30 0:30 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";

    fn resolved(mounts: &str, own: &str, path: &str) -> Vec<String> {
        let paths = Hierarchies::parse(mounts, own).resolve(Path::new(path));
        paths
            .iter()
            .map(|path| path.to_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn paths_lead_where_runc_puts_them() {
        let own = "0::/system.slice/containerd.service\n";
        assert!(Hierarchies::parse(UNIFIED, own).unified());
        assert_eq!(resolved(UNIFIED, own, "/a/b"), ["/sys/fs/cgroup/a/b"]);
        assert_eq!(resolved(UNIFIED, own, "b"), ["/sys/fs/cgroup/system.slice/b"]);
        assert_eq!(resolved(UNIFIED, "0::/\n", "b"), ["/sys/fs/cgroup/b"]);
        assert_eq!(
            resolved(UNIFIED, own, "../../../etc/./x"),
            ["/sys/fs/cgroup/system.slice/etc/x"]
        );
        let own = "9:name=systemd:/s\n5:memory:/docker/x/m\n3:cpuacct,cpu:/c\n0::/u\n";
        assert!(!Hierarchies::parse(HYBRID, own).unified());
        assert_eq!(
            resolved(HYBRID, own, "b"),
            [
                "/sys/fs/cgroup/unified/u/b",
                "/sys/fs/cgroup/systemd/s/b",
                "/sys/fs/cgroup/cpu,cpuacct/c/b",
                "/sys/fs/cgroup/memory/m/b"
            ]
        );
        assert_eq!(resolved(HYBRID, own, "/a/b")[3], "/sys/fs/cgroup/memory/a/b");
    }

    #[test]
    fn what_is_no_hierarchy_is_none() {
        assert_eq!(Hierarchies::parse("", ""), Hierarchies::default());
        assert!(!Hierarchies::default().unified());
        assert_eq!(
            Hierarchies::parse("x - cgroup2\n1 - -\n", "0::/"),
            Hierarchies::default()
        );
        Hierarchies::of_this_host().unwrap();
    }
}
