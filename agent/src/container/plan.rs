//! A whole OCI spec, checked and turned into what the child does.

use std::{collections::HashMap, ffi::CString, path::Path, path::PathBuf, sync::Arc};

use oci_spec::runtime::{LinuxPersonalityDomain, Spec};

use super::{
    check, devices,
    hooks::StartHooks,
    mount_options, mounts,
    namespaces::{Namespaces, Origin},
    resources,
    seccomp::Filter,
    sysctl::Sysctl,
    time::TimeOffsets,
    user::Mappings,
};
use crate::{fault::Fault, process::plan::ProcessPlan};

/// A container to be.
#[derive(Debug)]
pub struct ContainerPlan {
    pub process: ProcessPlan,
    pub namespaces: Namespaces,
    /// Of a user namespace, if the spec has them: always with a new one.
    pub mappings: Option<Mappings>,
    pub time_offsets: TimeOffsets,
    /// The root file system, a path of the guest.
    pub rootfs: PathBuf,
    pub read_only: bool,
    /// (`MS_…`, recursive) of the root, once all is mounted.
    pub propagation: Option<(u64, bool)>,
    pub mounts: Vec<mounts::MountPlan>,
    pub devices: Vec<devices::DevicePlan>,
    pub masked_paths: Vec<CString>,
    pub read_only_paths: Vec<CString>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    pub sysctls: Vec<Sysctl>,
    pub resources: resources::Plan,
    pub start_hooks: StartHooks,
}

impl ContainerPlan {
    /// Reads `spec` of the container `id`, which has its directory in `share`; `volumes` as in [`mounts::plan`],
    /// `joined` as in [`Namespaces::new`].
    ///
    /// # Errors
    ///
    /// A field is wrong, or is one that husk does not apply.
    pub fn new(
        spec: &Spec,
        (share, id): (&Path, &str),
        volumes: &HashMap<u32, PathBuf>,
        joined: &HashMap<String, String>,
    ) -> Result<Self, Fault> {
        check::check(spec)?;
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| Fault::spec("process", "is required"))?;
        let mut process = ProcessPlan::new(process, "process")?;
        let linux = spec.linux().clone().unwrap_or_default();
        if let Some(profile) = linux.seccomp() {
            process.shared.seccomp = Some(Arc::new(Filter::new(profile)?));
        }
        process.shared.personality =
            linux
                .personality()
                .as_ref()
                .map(|personality| match personality.domain() {
                    LinuxPersonalityDomain::PerLinux => 0,
                    LinuxPersonalityDomain::PerLinux32 => 8,
                });
        let namespaces = Namespaces::new(linux.namespaces().as_deref().unwrap_or_default(), joined)?;
        let mappings = Mappings::new(&linux)?;
        match (&namespaces.user, &mappings) {
            (Origin::New, None) => {
                return Err(Fault::spec(
                    "linux.uidMappings",
                    "user namespaces enabled, but no user mapping found",
                ));
            }
            (Origin::Sandbox, Some(_)) => {
                return Err(Fault::spec(
                    "linux.uidMappings",
                    "user namespace mappings specified, but user namespace isn't enabled in the config",
                ));
            }
            _ => {}
        }
        let name = |field: &str, name: &Option<String>| match name.as_deref() {
            None | Some("") => Ok(None),
            Some(_) if !namespaces.uts.is_separate() => {
                Err(Fault::spec(field, "needs a UTS namespace of its own"))
            }
            // The kernel's __NEW_UTS_LEN.
            Some(name) if name.len() > 64 => Err(Fault::spec(field, "is longer than 64 bytes")),
            Some(name) => Ok(Some(name.to_owned())),
        };
        let propagation = match linux.rootfs_propagation().as_deref() {
            None | Some("") => None,
            Some(word) => Some(mount_options::root_propagation(word).ok_or_else(|| {
                Fault::spec(
                    "linux.rootfsPropagation",
                    format_args!("{word:?} is no propagation"),
                )
            })?),
        };
        let mut sysctls = Vec::new();
        for (key, value) in linux.sysctl().iter().flatten() {
            sysctls.push(Sysctl::new(key, value, &namespaces)?);
        }
        let mounts = mounts::plan(spec.mounts().as_deref().unwrap_or_default(), volumes)?;
        Ok(Self {
            process,
            time_offsets: TimeOffsets::new(linux.time_offsets(), namespaces.time.is_new())?,
            mappings,
            rootfs: share.join(id).join("rootfs"),
            read_only: spec
                .root()
                .as_ref()
                .and_then(|root| root.readonly())
                .unwrap_or(false),
            propagation,
            mounts,
            devices: devices::plan(linux.devices().as_deref().unwrap_or_default())?,
            masked_paths: paths("linux.maskedPaths", linux.masked_paths())?,
            read_only_paths: paths("linux.readonlyPaths", linux.readonly_paths())?,
            hostname: name("hostname", spec.hostname())?,
            domainname: name("domainname", spec.domainname())?,
            namespaces,
            sysctls,
            resources: resources::plan_new(&linux)?,
            start_hooks: StartHooks::new(spec)?,
        })
    }
}

fn paths(field: &str, paths: &Option<Vec<String>>) -> Result<Vec<CString>, Fault> {
    let paths = paths.iter().flatten().map(|path| {
        if !path.starts_with('/') {
            return Err(Fault::spec(field, format_args!("{path:?} is not absolute")));
        }
        CString::new(path.as_str()).map_err(|_| Fault::spec(field, "contains a NUL character"))
    });
    paths.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(json: &str) -> Result<ContainerPlan, Fault> {
        let spec = serde_json::from_str(json).unwrap();
        ContainerPlan::new(
            &spec,
            (Path::new("/share"), "c"),
            &HashMap::new(),
            &HashMap::new(),
        )
    }

    const PROCESS: &str = r#""process":{"user":{},"cwd":"/","args":["sh"]}"#;

    #[test]
    fn a_small_spec_is_a_plan() {
        let plan = plan(&format!(
            r#"{{{PROCESS},"hostname":"h","root":{{"path":"x","readonly":true}},
                "linux":{{"namespaces":[{{"type":"mount"}},{{"type":"uts"}}],"rootfsPropagation":"rslave"}}}}"#
        ))
        .unwrap();
        assert_eq!(plan.rootfs, Path::new("/share/c/rootfs"));
        assert!(plan.read_only);
        assert_eq!(plan.hostname.as_deref(), Some("h"));
        assert_eq!(plan.propagation, Some((libc::MS_SLAVE, true)));
    }

    #[test]
    fn faults_name_the_field() {
        for (field, json) in [
            (
                "process",
                r#"{"linux":{"namespaces":[{"type":"mount"}]}}"#.to_owned(),
            ),
            (
                "hostname",
                format!(r#"{{{PROCESS},"hostname":"h","linux":{{"namespaces":[{{"type":"mount"}}]}}}}"#),
            ),
            (
                "linux.maskedPaths",
                format!(r#"{{{PROCESS},"linux":{{"namespaces":[{{"type":"mount"}}],"maskedPaths":["x"]}}}}"#),
            ),
        ] {
            let fault = plan(&json).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("{field}: ")),
                "{}",
                fault.message
            );
        }
    }

    /// A JSON value of a few levels whose object keys are those of the spec.
    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            ".{0,8}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            let key = prop::sample::select(vec![
                "process",
                "user",
                "uid",
                "cwd",
                "args",
                "env",
                "linux",
                "namespaces",
                "type",
                "uidMappings",
                "hostID",
                "timeOffsets",
                "mounts",
                "destination",
                "options",
                "resources",
                "memory",
                "limit",
                "cpu",
                "shares",
                "root",
                "path",
                "hostname",
                "rlimits",
                "devices",
                "sysctl",
            ]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::vec((key, inner), 0..6).prop_map(|pairs| {
                    serde_json::Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_document_is_a_plan_or_a_fault(value in json()) {
            if let Ok(spec) = serde_json::from_value::<Spec>(value) {
                let _ = ContainerPlan::new(&spec, (Path::new("/share"), "c"), &HashMap::new(), &HashMap::new());
            }
        }

        #[test]
        fn any_bytes_are_a_plan_or_a_fault(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(spec) = serde_json::from_slice::<Spec>(&bytes) {
                let _ = ContainerPlan::new(&spec, (Path::new("/share"), "c"), &HashMap::new(), &HashMap::new());
            }
        }
    }
}
