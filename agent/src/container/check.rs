//! Refuses, by name, each field of a spec that husk does not apply in the guest, so that none is dropped silently.
//!
//! Not refused here, since the host side applies or refuses them: `hooks` that run on the host, `linux.cgroupsPath`,
//! and the network namespace.
//! `annotations` have no effect by definition. `process` is checked in [`crate::process::plan`], `mounts` in
//! [`super::mounts`], `linux.resources` in [`super::resources`].

use std::collections::HashMap;

use oci_spec::runtime::{Linux, Spec};

use crate::fault::Fault;

/// Goes over the whole of `spec`.
///
/// # Errors
///
/// The first field that would be dropped.
pub fn check(spec: &Spec) -> Result<(), Fault> {
    let refuse = |field: &str, why: &str| Err(Fault::spec(field, why));
    if spec.solaris().is_some() {
        return refuse("solaris", "this is Linux");
    }
    if spec.windows().is_some() {
        return refuse("windows", "this is Linux");
    }
    if spec.zos().is_some() {
        return refuse("zos", "this is Linux");
    }
    if spec.vm().is_some() {
        return refuse(
            "vm",
            "is not supported: the operator's configuration describes the machine",
        );
    }
    spec.linux().as_ref().map_or(Ok(()), check_linux)
}

fn check_linux(linux: &Linux) -> Result<(), Fault> {
    let refuse = |field: &str, why: &str| Err(Fault::spec(format_args!("linux.{field}"), why));
    fn some<T>(list: &Option<Vec<T>>) -> bool {
        list.as_ref().is_some_and(|list| !list.is_empty())
    }
    fn any<T>(map: &Option<HashMap<String, T>>) -> bool {
        map.as_ref().is_some_and(|map| !map.is_empty())
    }
    if any(linux.net_devices()) {
        return refuse(
            "netDevices",
            "is not supported: the sandbox's network is the host's to wire",
        );
    }
    if linux.intel_rdt().is_some() {
        return refuse(
            "intelRdt",
            "is not supported: a guest cannot divide the processor's caches",
        );
    }
    if linux.memory_policy().is_some() {
        return refuse("memoryPolicy", "the guest has no NUMA");
    }
    if linux
        .mount_label()
        .as_deref()
        .is_some_and(|label| !label.is_empty())
    {
        return refuse("mountLabel", "the guest's kernel has no SELinux");
    }
    if let Some(personality) = linux.personality() {
        if some(personality.flags()) {
            return refuse("personality.flags", "the spec defines none");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_dropped_is_refused_by_name() {
        for (field, json) in [
            (
                "linux.netDevices",
                r#"{"linux":{"netDevices":{"eth0":{"name":"eth1"}}}}"#,
            ),
            ("linux.intelRdt", r#"{"linux":{"intelRdt":{"closID":"x"}}}"#),
            ("linux.mountLabel", r#"{"linux":{"mountLabel":"x"}}"#),
            (
                "linux.memoryPolicy",
                r#"{"linux":{"memoryPolicy":{"mode":"MPOL_BIND","nodes":"0"}}}"#,
            ),
            ("vm", r#"{"vm":{"kernel":{"path":"/k"}}}"#),
        ] {
            let spec: Spec = serde_json::from_str(json).unwrap();
            let fault = check(&spec).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
    }

    #[test]
    fn what_the_host_applies_is_not() {
        let spec: Spec = serde_json::from_str(
            r#"{"hooks":{"prestart":[{"path":"/x"}]},"linux":{"cgroupsPath":"/a","seccomp":null},"annotations":{"a":"b"}}"#,
        )
        .unwrap();
        assert_eq!(check(&spec), Ok(()));
    }
}
