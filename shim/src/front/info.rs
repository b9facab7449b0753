//! What this runtime is and can do, in containerd's words.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use husk_agent_protocol::features as agent;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::{Value, json};

use super::cli::REVISION;

/// The runtime's name, as a user gives it to containerd.
pub const RUNTIME: &str = "io.containerd.husk.v2";

/// The type of the features in [`runtime_info`].
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The hooks that are run.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// The newest version of the runtime specification whose fields are known.
const OCI_VERSION: &str = "1.3.0";

/// The answer to `-info`: a `RuntimeInfo` in protobuf. `stdin` is what containerd wrote there: the runtime's options as
/// an `Any`, which it gets back, or nothing.
///
/// # Errors
/// When stdin is something else.
pub fn runtime_info(stdin: &[u8]) -> Result<Vec<u8>, protobuf::Error> {
    let options = Any::parse_from_bytes(stdin)?;
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: REVISION.unwrap_or_default().to_owned(),
            ..RuntimeVersion::default()
        }),
        options: Some(options).filter(|any| !any.type_url.is_empty()).into(),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
}

/// The features of an OCI runtime (runtime-spec, features.md): what husk applies. It must not claim more.
fn features() -> Value {
    let enabled = |enabled: bool| json!({ "enabled": enabled });
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": HOOKS,
        // An array past 32 entries has no `Serialize`.
        "mountOptions": agent::MOUNT_OPTIONS.as_slice(),
        "linux": {
            "namespaces": agent::NAMESPACES,
            "capabilities": agent::CAPABILITIES.as_slice(),
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": agent::SECCOMP_ACTIONS,
                "operators": agent::SECCOMP_OPERATORS,
                "archs": agent::SECCOMP_ARCHITECTURES,
                "knownFlags": agent::SECCOMP_KNOWN_FLAGS,
                "supportedFlags": agent::SECCOMP_FLAGS
            },
            "apparmor": enabled(false),
            "selinux": enabled(false),
            "intelRdt": enabled(false),
            "mountExtensions": { "idmap": enabled(true) },
            "netDevices": enabled(false)
        },
        "annotations": { "io.husk.version": env!("CARGO_PKG_VERSION") }
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Features;

    use super::*;

    fn info(stdin: &[u8]) -> RuntimeInfo {
        RuntimeInfo::parse_from_bytes(&runtime_info(stdin).unwrap()).unwrap()
    }

    #[test]
    fn containerd_can_decode_it() {
        let info = info(b"");
        assert_eq!(info.name, "io.containerd.husk.v2");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert!(info.options.is_none());
        assert_eq!(
            info.features.type_url,
            "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
        );
        let features: Features = serde_json::from_slice(&info.features.value).unwrap();
        let linux = features.linux().as_ref().unwrap();
        assert_eq!(linux.cgroup().as_ref().unwrap().v2(), &Some(true));
        // By these CRI knows that it may ask for recursive read-only mounts and for user namespaces.
        let options = features.mount_options().as_ref().unwrap();
        assert!(options.iter().any(|option| option == "rro"));
        let extensions = linux.mount_extensions().as_ref().unwrap();
        assert_eq!(extensions.idmap().as_ref().unwrap().enabled(), &Some(true));
        assert_eq!(linux.capabilities().as_ref().unwrap().len(), 41);
        let seccomp = linux.seccomp().as_ref().unwrap();
        assert_eq!(seccomp.actions().as_ref().unwrap().len(), 8);
    }

    #[test]
    fn options_are_given_back() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x0a\x01x".to_vec(),
            ..Any::default()
        };
        assert_eq!(info(&options.write_to_bytes().unwrap()).options.unwrap(), options);
        runtime_info(b"not protobuf").unwrap_err();
    }
}
