//! Reads an OCI document, so that what does not fit its schema is named by its field.

use serde::de::DeserializeOwned;

use crate::fault::Fault;

/// Reads `json` as `T`. `prefix` is where the document stands in config.json: empty, or `process`.
///
/// # Errors
///
/// What is no JSON, or not what the runtime spec says: the message begins with the field, `process.rlimits[1].type`.
pub fn read<T: DeserializeOwned>(json: &[u8], prefix: &str) -> Result<T, Fault> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let document = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let field = match (prefix, path.as_str()) {
            // `.` is the document itself, `?` what is not even a key in it.
            ("", "." | "?") => "config.json".to_owned(),
            (prefix, "." | "?") => prefix.to_owned(),
            ("", path) => path.to_owned(),
            (prefix, path) => format!("{prefix}.{path}"),
        };
        Fault::spec(field, error.inner())
    })?;
    reader
        .end()
        .map_err(|error| Fault::spec(if prefix.is_empty() { "config.json" } else { prefix }, error))?;
    Ok(document)
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
}
