//! Patterns of paths.

use std::{os::unix::ffi::OsStrExt, path::Path};

/// An absolute path in which `*` stands for any characters, `/` among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// The pattern of this text. `None`: no absolute path matches it.
    pub fn of(text: &str) -> Option<Self> {
        text.starts_with(['/', '*']).then(|| Self(text.to_owned()))
    }

    /// Whether `path` matches, whole.
    pub fn matches(&self, path: &Path) -> bool {
        let mut rest = path.as_os_str().as_bytes();
        let mut parts = self.0.as_bytes().split(|byte| *byte == b'*');
        let first = parts.next().unwrap_or_default();
        let Some(behind) = rest.strip_prefix(first) else {
            return false;
        };
        rest = behind;
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        // The first place for each part leaves most for those behind it.
        for part in parts {
            let found = (0..=rest.len()).find_map(|start| rest.get(start..)?.strip_prefix(part));
            match found {
                Some(behind) => rest = behind,
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, path, matches) in [
            ("/a", "/a", true),
            ("/a", "/a/b", false),
            ("/a/*", "/a/b/c", true),
            ("/a/*", "/ab", false),
            (
                "*/volumes/kubernetes.io~secret/*",
                "/var/lib/kubelet/pods/1/volumes/kubernetes.io~secret/s",
                true,
            ),
            (
                "*/volumes/kubernetes.io~secret/*",
                "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/s",
                false,
            ),
            ("/*a*a", "/a", false),
            ("/*a*a", "/aa", true),
            ("/*ab*b", "/abab", true),
            ("*", "/anything", true),
        ] {
            assert_eq!(
                Pattern::of(pattern).unwrap().matches(Path::new(path)),
                matches,
                "{pattern} {path}"
            );
        }
        assert_eq!(Pattern::of("relative"), None);
        assert_eq!(Pattern::of(""), None);
    }
}
