//! `linux.cgroupsPath`: a path in the hierarchies, or a unit of systemd's.

use std::path::{Path, PathBuf};

/// Who makes cgroups: the operator's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// systemd for what is named as a unit of its (`slice:prefix:name`), otherwise the file system.
    #[default]
    Auto,
    /// systemd.
    Systemd,
    /// The file system.
    Cgroupfs,
    /// Nobody: all processes stay in the engine's cgroup.
    None,
}

impl Driver {
    /// The names in husk.toml.
    pub const NAMES: [&str; 4] = ["auto", "systemd", "cgroupfs", "none"];

    /// The driver of a name.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "systemd" => Some(Self::Systemd),
            "cgroupfs" => Some(Self::Cgroupfs),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

/// The cgroup of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Absolute, or relative to where runc takes it from.
    Path(PathBuf),
    /// A unit.
    Unit(Unit),
}

/// A unit of systemd's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// The slice that it is in.
    pub slice: String,
    /// Its own name: a scope's or a slice's.
    pub name: String,
}

impl Unit {
    /// Its path in the hierarchies.
    pub fn path(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        path.push(slice_path(&self.slice).unwrap_or_default());
        path.push(&self.name);
        path
    }
}

/// Why a cgroupsPath cannot be had. Each text is the end of a sentence that begins with the field's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// systemd was asked for, with a path of the file system.
    #[error("must be of the form slice:prefix:name where systemd makes the cgroups, which {0:?} is not")]
    NotAUnit(String),
    /// A unit was named, where there is no systemd.
    #[error(
        "{0:?} names a unit of systemd, which does not run on this host; set the engine's cgroup driver to cgroupfs"
    )]
    NoSystemd(String),
    /// The slice has no such name.
    #[error("{0:?} is no name of a slice")]
    Slice(String),
    /// The unit has no such name.
    #[error("{0:?} is no name of a unit")]
    Name(String),
    /// No name for a directory.
    #[error("{0:?} names no cgroup")]
    Root(String),
}

impl Wanted {
    /// The cgroup of container `id` by its spec. `by_systemd`: the engine says that systemd makes it; `systemd_runs`:
    /// it does. `None`: no cgroup is to be made.
    ///
    /// # Errors
    /// For a path that the driver cannot make.
    pub fn read(
        cgroups_path: Option<&str>,
        id: &str,
        driver: Driver,
        by_systemd: bool,
        systemd_runs: bool,
    ) -> Result<Option<Self>, PathError> {
        let path = cgroups_path.filter(|path| !path.is_empty());
        let unit_like = |path: &str| {
            let mut parts = path.split(':');
            parts.next().is_some_and(|slice| slice.ends_with(".slice")) && parts.count() == 2
        };
        let by_systemd = match driver {
            Driver::None => return Ok(None),
            Driver::Cgroupfs => false,
            Driver::Systemd => true,
            Driver::Auto => by_systemd || path.is_some_and(unit_like),
        };
        if !by_systemd {
            let path = Path::new(path.unwrap_or(id));
            if !path
                .components()
                .any(|part| matches!(part, std::path::Component::Normal(_)))
            {
                return Err(PathError::Root(path.display().to_string()));
            }
            return Ok(Some(Self::Path(path.to_owned())));
        }
        let parts: Vec<&str> = match path {
            None => vec!["system.slice", "husk", id],
            Some(path) => path.split(':').collect(),
        };
        let [slice, prefix, name] = parts.as_slice() else {
            return Err(PathError::NotAUnit(path.unwrap_or_default().to_owned()));
        };
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        slice_path(slice).ok_or_else(|| PathError::Slice(slice.to_owned()))?;
        let name = if name.ends_with(".slice") {
            (*name).to_owned()
        } else {
            format!("{prefix}-{name}.scope")
        };
        // As systemd has it: at most 255 of these.
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
        if name.len() > 255 || name.starts_with('.') || !name.bytes().all(valid) {
            return Err(PathError::Name(name));
        }
        if !systemd_runs {
            return Err(PathError::NoSystemd(
                path.map_or_else(|| name.clone(), str::to_owned),
            ));
        }
        Ok(Some(Self::Unit(Unit {
            slice: slice.to_owned(),
            name,
        })))
    }
}

/// Where a slice is: `a-b.slice` is `a.slice/a-b.slice`. `None` for what is no name of one.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    if name.is_empty() || name.starts_with('.') || !name.bytes().all(valid) {
        return None;
    }
    let (mut path, mut prefix) = (PathBuf::new(), String::new());
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str, driver: Driver, by_systemd: bool) -> Result<String, String> {
        let wanted = Wanted::read(Some(path), "c", driver, by_systemd, true);
        match wanted.map_err(|error| error.to_string())? {
            None => Ok("none".into()),
            Some(Wanted::Path(path)) => Ok(format!("path {}", path.display())),
            Some(Wanted::Unit(unit)) => Ok(format!("unit {}", unit.path().display())),
        }
    }

    #[test]
    fn paths_and_units_are_told_apart() {
        for (path, expected) in [
            ("/a/b", "path /a/b"),
            ("a/b", "path a/b"),
            ("", "path c"),
            ("/a:b", "path /a:b"),
            ("system.slice:docker:x", "unit /system.slice/docker-x.scope"),
            (
                "kubepods-burstable-podA_B.slice:cri-containerd:x",
                "unit /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podA_B.slice/cri-containerd-x.scope",
            ),
            ("-.slice:a:b", "unit /a-b.scope"),
            ("a.slice::x-y.slice", "unit /a.slice/x-y.slice"),
        ] {
            assert_eq!(read(path, Driver::Auto, false).unwrap(), expected, "{path}");
        }
        assert_eq!(
            read("", Driver::Auto, true).unwrap(),
            "unit /system.slice/husk-c.scope"
        );
        assert_eq!(
            read("a.slice:b:c", Driver::Cgroupfs, true).unwrap(),
            "path a.slice:b:c"
        );
        assert_eq!(
            read(":b:c", Driver::Systemd, false).unwrap(),
            "unit /system.slice/b-c.scope"
        );
        assert_eq!(read("/a", Driver::None, true).unwrap(), "none");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (path, by_systemd, expected) in [
            ("/a/b", true, "slice:prefix:name"),
            ("a:b:c:d", true, "slice:prefix:name"),
            ("a--b.slice:p:n", false, "no name of a slice"),
            ("../a.slice:p:n", false, "no name of a slice"),
            ("a:p:n", true, "no name of a slice"),
            ("a.slice:p:../n", false, "no name of a unit"),
            ("/", false, "names no cgroup"),
            ("..", false, "names no cgroup"),
        ] {
            let error = read(path, Driver::Auto, by_systemd).unwrap_err();
            assert!(error.contains(expected), "{path}: {error}");
        }
        let error = Wanted::read(Some("a.slice:b:c"), "c", Driver::Auto, false, false).unwrap_err();
        assert!(error.to_string().contains("does not run on this host"), "{error}");
    }
}
