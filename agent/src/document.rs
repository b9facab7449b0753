//! Reads an OCI document, so that what does not fit its schema is named by its field.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::fault::Fault;

/// Reads `json` as `T`. `prefix` is where the document stands in config.json: empty, or `process`.
///
/// # Errors
///
/// What is no JSON, or not what the runtime spec says: the message begins with the field, `process.rlimits[1].type`.
pub fn read<T: DeserializeOwned>(json: &[u8], prefix: &str) -> Result<T, Fault> {
    let whole = if prefix.is_empty() { "config.json" } else { prefix };
    let mut document: Value = serde_json::from_slice(json).map_err(|error| Fault::spec(whole, error))?;
    let process = if prefix.is_empty() { "/process" } else { "" };
    if let Some(Value::Array(flags)) = document.pointer_mut(&format!("{process}/scheduler/flags")) {
        flags.iter_mut().for_each(rename_scheduler_flag);
    }
    serde_path_to_error::deserialize(document).map_err(|error| {
        let path = error.path().to_string();
        let field = match (prefix, path.as_str()) {
            // `.` is the document itself, `?` what is not even a key in it.
            (_, "." | "?") => whole.to_owned(),
            ("", path) => path.to_owned(),
            (prefix, path) => format!("{prefix}.{path}"),
        };
        let problem = error.inner().to_string();
        // Of an unknown word the message goes on with all that are known: dozens of lines.
        let problem = match problem.split_once(", expected one of ") {
            Some((unknown, _)) if unknown.starts_with("unknown variant") => unknown,
            _ => &problem,
        };
        Fault::spec(field, problem)
    })
}

/// The library that knows the schema has two of the runtime spec's names wrong.
fn rename_scheduler_flag(flag: &mut Value) {
    let known = match flag.as_str() {
        Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
        Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
        _ => return,
    };
    *flag = Value::from(known);
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Process, Spec};

    use super::*;

    fn message<T: DeserializeOwned>(json: &str, prefix: &str) -> String {
        read::<T>(json.as_bytes(), prefix).map(drop).unwrap_err().message
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (field, json) in [
            (
                "process.rlimits[0].type: ",
                r#"{"process":{"rlimits":[{"type":"RLIMIT_FUN","soft":1,"hard":1}]}}"#,
            ),
            (
                "linux.seccomp.syscalls[0].args[0].op: ",
                r#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],
                    "action":"SCMP_ACT_LOG","args":[{"index":0,"value":1,"op":"SCMP_CMP_LIKE"}]}]}}}"#,
            ),
            (
                "linux.namespaces[0].type: ",
                r#"{"linux":{"namespaces":[{"type":"weather"}]}}"#,
            ),
            (
                "process.capabilities.bounding[1]: no variant for CAP_FLY",
                r#"{"process":{"user":{},"cwd":"/","capabilities":{"bounding":["CAP_KILL","CAP_FLY"]}}}"#,
            ),
            (
                "linux.seccomp: missing field `defaultAction`",
                r#"{"linux":{"seccomp":{"syscalls":[]}}}"#,
            ),
            (
                "linux.seccomp.architectures[1]: unknown variant `SCMP_ARCH_PDP11`",
                r#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_LOG","architectures":["SCMP_ARCH_X86","SCMP_ARCH_PDP11"]}}}"#,
            ),
            (
                "linux.seccomp.flags[0]: unknown variant `SECCOMP_FILTER_FLAG_X`",
                r#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_LOG","flags":["SECCOMP_FILTER_FLAG_X"]}}}"#,
            ),
            ("config.json: ", "{ this is no json"),
            ("config.json: ", "[]{}"),
            ("config.json: ", "{\"ociVersion\":\"1.2.0\"} and more"),
        ] {
            let message = message::<Spec>(json, "");
            assert!(message.starts_with(field), "{message}");
        }
    }

    #[test]
    fn an_exec_is_a_process() {
        let message = message::<Process>(r#"{"cwd":"/","scheduler":{"policy":"SCHED_MAGIC"}}"#, "process");
        assert!(message.starts_with("process.scheduler.policy: "), "{message}");
        let message = self::message::<Process>("7", "process");
        assert!(message.starts_with("process: "), "{message}");
    }

    #[test]
    fn the_flags_of_a_scheduler_have_the_runtime_specs_names() {
        let json = br#"{"user":{},"cwd":"/","scheduler":{"policy":"SCHED_OTHER",
            "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN","SCHED_FLAG_RECLAIM"]}}"#;
        let process: Process = read(json, "process").unwrap();
        let flags = process
            .scheduler()
            .as_ref()
            .and_then(|scheduler| scheduler.flags().clone());
        assert_eq!(flags.map(|flags| flags.len()), Some(3));
    }
}
