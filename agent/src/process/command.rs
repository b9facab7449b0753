//! Finding the command in the container, as its user, with runc's words for what is wrong.

use std::{
    ffi::CString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    unistd::{AccessFlags, faccessat},
};

use crate::fault::{Fault, Kind, describe};

/// Where a command is looked for if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The file that `command` names: itself if it has a slash, else the first of that name in `path`.
///
/// # Errors
///
/// It is not there, or this process may not execute it.
pub fn find(command: &str, path: Option<&str>) -> Result<CString, Fault> {
    let fault = |kind, problem: &str| Fault {
        kind,
        message: format!("exec: {command:?}: {problem}"),
    };
    if command.contains('/') {
        return match executable(Path::new(command)) {
            Ok(()) => into_c(PathBuf::from(command)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Err(fault(
                Kind::CommandNotFound,
                &format!("stat {command}: no such file or directory"),
            )),
            Err(error) => Err(fault(Kind::CommandNotExecutable, &describe(&error.into()))),
        };
    }
    let path = path.unwrap_or(DEFAULT_PATH);
    let found = path.split(':').map(|directory| {
        // An empty element is the current directory.
        Path::new(if directory.is_empty() { "." } else { directory }).join(command)
    });
    let mut denied = false;
    for candidate in found.filter(|_| !command.is_empty()) {
        match executable(&candidate) {
            Ok(()) => return into_c(candidate),
            Err(Errno::EACCES) if candidate.is_file() => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return Err(fault(Kind::CommandNotExecutable, "permission denied"));
    }
    Err(fault(Kind::CommandNotFound, "executable file not found in $PATH"))
}

/// Why execve(2) of `path` failed.
pub fn exec_fault(path: &str, error: Errno) -> Fault {
    let kind = match error {
        Errno::ENOENT => Kind::CommandNotFound,
        Errno::EACCES
        | Errno::ENOEXEC
        | Errno::EISDIR
        | Errno::ENOTDIR
        | Errno::ELOOP
        | Errno::EPERM
        | Errno::ELIBBAD => Kind::CommandNotExecutable,
        _ => Kind::System,
    };
    Fault {
        kind,
        message: format!("exec {path}: {}", describe(&error.into())),
    }
}

fn into_c(path: PathBuf) -> Result<CString, Fault> {
    CString::new(path.into_os_string().into_vec())
        .map_err(|_| Fault::spec("process.args", "contains a NUL character"))
}

fn executable(path: &Path) -> Result<(), Errno> {
    let metadata =
        std::fs::metadata(path).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if !metadata.is_file() {
        return Err(Errno::EACCES);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn commands_are_found_or_refused_in_runcs_words() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("plain"), "").unwrap();
        std::fs::write(at("tool"), "").unwrap();
        std::fs::set_permissions(at("tool"), PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::create_dir(at("sub")).unwrap();
        let path = format!("/nonexistent:{}", directory.path().display());

        assert_eq!(find("tool", Some(&path)).unwrap().to_str().unwrap(), at("tool"));
        assert_eq!(find(&at("tool"), None).unwrap().to_str().unwrap(), at("tool"));

        let fault = find("nope", Some(&path)).unwrap_err();
        assert_eq!(fault.kind, Kind::CommandNotFound);
        assert_eq!(
            fault.message,
            r#"exec: "nope": executable file not found in $PATH"#
        );
        assert_eq!(find("", Some(&path)).unwrap_err().kind, Kind::CommandNotFound);
        assert_eq!(find("sub", Some(&path)).unwrap_err().kind, Kind::CommandNotFound);

        let fault = find("./x", None).unwrap_err();
        assert_eq!(fault.kind, Kind::CommandNotFound);
        assert_eq!(
            fault.message,
            r#"exec: "./x": stat ./x: no such file or directory"#
        );

        for name in [at("plain"), at("sub")] {
            let fault = find(&name, None).unwrap_err();
            assert_eq!(fault.kind, Kind::CommandNotExecutable);
            assert_eq!(fault.message, format!("exec: {name:?}: permission denied"));
        }
        assert_eq!(
            find("plain", Some(&path)).unwrap_err().kind,
            Kind::CommandNotExecutable
        );
    }

    #[test]
    fn failures_of_exec_keep_their_cause() {
        let fault = exec_fault("/x", Errno::ENOEXEC);
        assert_eq!(
            (fault.kind, fault.message.as_str()),
            (Kind::CommandNotExecutable, "exec /x: exec format error")
        );
        assert_eq!(exec_fault("/x", Errno::ENOENT).kind, Kind::CommandNotFound);
    }
}
