//! The table of mount options: what each word of `mounts[].options` means to the mount API.

use std::ffi::CString;

use crate::fault::Fault;

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
const NOSYMFOLLOW: u64 = libc::MOUNT_ATTR_NOSYMFOLLOW;

/// Attributes of a mount to set and to clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
}

impl Attributes {
    /// A later word wins over an earlier one.
    fn add(&mut self, set: u64, clear: u64) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
        // The kernel takes a change of the atime mode only with the whole mode cleared.
        if (set | clear) & ATIME != 0 {
            self.clear |= ATIME;
        }
    }
}

/// What the options of one mount say.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// `Some(recursive)` for a bind mount.
    pub bind: Option<bool>,
    /// Of this mount alone.
    pub attributes: Attributes,
    /// Of this mount and all below it.
    pub recursive: Attributes,
    /// (`MS_…`, recursive), in order.
    pub propagation: Vec<(u64, bool)>,
    /// `Some(recursive)` for a mount whose owners are mapped.
    pub id_mapped: Option<bool>,
    /// A new tmpfs begins with what is in the directory that it covers.
    pub copy_up: bool,
    /// Options of the file system: key and, with `=`, value.
    pub data: Vec<(CString, Option<CString>)>,
}

impl Options {
    /// Parses `words`; `field` names the mount in messages.
    ///
    /// # Errors
    ///
    /// A word that husk does not apply.
    pub fn parse(words: &[String], field: &str) -> Result<Self, Fault> {
        let mut options = Self::default();
        // As mount(2) has them: two flags of which strictatime wins, and relatime is what is so without either.
        let (mut named, mut noatime, mut strictatime) = (false, false, false);
        for word in words {
            match word.as_str() {
                "noatime" => noatime = true,
                "atime" => noatime = false,
                "strictatime" => strictatime = true,
                "nostrictatime" => strictatime = false,
                "relatime" | "norelatime" => {}
                _ if options.word(word) => continue,
                _ => {
                    let problem = match word.as_str() {
                        "remount" | "iversion" => "is not supported",
                        _ => "contains a NUL character",
                    };
                    return Err(Fault::spec(
                        format_args!("{field}.options"),
                        format_args!("{word:?} {problem}"),
                    ));
                }
            }
            named = true;
        }
        let mode = match (strictatime, noatime) {
            (true, _) => "strictatime",
            (false, true) => "noatime",
            (false, false) => "relatime",
        };
        if let Some((set, clear)) = attribute(mode).filter(|_| named) {
            options.attributes.add(set, clear);
        }
        Ok(options)
    }

    fn word(&mut self, word: &str) -> bool {
        if let Some((set, clear)) = attribute(word) {
            self.attributes.add(set, clear);
            return true;
        }
        if let Some((set, clear)) = word.strip_prefix('r').and_then(attribute) {
            self.recursive.add(set, clear);
            return true;
        }
        if let Some(propagation) = propagation(word) {
            self.propagation.push(propagation);
            return true;
        }
        match word {
            "bind" => {
                self.bind.get_or_insert(false);
            }
            "rbind" => self.bind = Some(true),
            // These say what is so anyway, or speak about messages only.
            "" | "defaults" | "noiversion" | "silent" | "loud" => {}
            // The kernel has had no mandatory locks since 5.15 and takes the word all the same.
            "mand" | "nomand" => {}
            "idmap" => {
                self.id_mapped.get_or_insert(false);
            }
            "ridmap" => self.id_mapped = Some(true),
            "tmpcopyup" => self.copy_up = true,
            "remount" | "iversion" => return false,
            data => {
                let (key, value) = match data.split_once('=') {
                    Some((key, value)) => (key, Some(value)),
                    None => (data, None),
                };
                let (Ok(key), Ok(value)) = (CString::new(key), value.map(CString::new).transpose()) else {
                    return false;
                };
                self.data.push((key, value));
            }
        }
        true
    }
}

/// (set, clear) of the words that have a recursive form with `r` before them.
fn attribute(word: &str) -> Option<(u64, u64)> {
    Some(match word {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" => (0, NODEV),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        "nosymfollow" => (NOSYMFOLLOW, 0),
        "symfollow" => (0, NOSYMFOLLOW),
        // One of three modes, of which relatime is the one without a bit.
        "noatime" => (NOATIME, ATIME & !NOATIME),
        "strictatime" => (STRICTATIME, ATIME & !STRICTATIME),
        "relatime" | "atime" | "nostrictatime" | "norelatime" => (0, ATIME),
        _ => return None,
    })
}

fn propagation(word: &str) -> Option<(u64, bool)> {
    Some(match word {
        "private" => (libc::MS_PRIVATE, false),
        "rprivate" => (libc::MS_PRIVATE, true),
        "shared" => (libc::MS_SHARED, false),
        "rshared" => (libc::MS_SHARED, true),
        "slave" => (libc::MS_SLAVE, false),
        "rslave" => (libc::MS_SLAVE, true),
        "unbindable" => (libc::MS_UNBINDABLE, false),
        "runbindable" => (libc::MS_UNBINDABLE, true),
        _ => return None,
    })
}

/// The propagation that a spec's `linux.rootfsPropagation` names.
pub fn root_propagation(word: &str) -> Option<(u64, bool)> {
    propagation(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(words: &[&str]) -> Result<Options, Fault> {
        Options::parse(
            &words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(),
            "mounts[0]",
        )
    }

    #[test]
    fn words_of_engines_are_understood() {
        let options = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]).unwrap();
        assert_eq!(
            options.attributes,
            Attributes {
                set: NOSUID | STRICTATIME,
                clear: ATIME
            } // clear holds the whole mode, set the new one
        );
        assert_eq!(
            options.data,
            [
                (c"mode".to_owned(), Some(c"755".to_owned())),
                (c"size".to_owned(), Some(c"65536k".to_owned()))
            ]
        );
        let options = parse(&["rbind", "rprivate", "ro"]).unwrap();
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.propagation, [(libc::MS_PRIVATE, true)]);
        assert_eq!(options.attributes.set, RDONLY);
        assert_eq!(parse(&["rbind", "rro"]).unwrap().recursive.set, RDONLY);
        assert!(options.data.is_empty());
    }

    #[test]
    fn the_last_word_wins() {
        assert_eq!(
            parse(&["ro", "rw"]).unwrap().attributes,
            Attributes {
                set: 0,
                clear: RDONLY
            }
        );
        assert_eq!(
            parse(&["noatime", "atime"]).unwrap().attributes,
            Attributes { set: 0, clear: ATIME }
        );
        assert_eq!(
            parse(&["rnoatime", "rrelatime"]).unwrap().recursive,
            Attributes { set: 0, clear: ATIME }
        );
        // But those that are flags of mount(2) do not undo each other.
        for (words, mode) in [
            (["noatime", "relatime"], NOATIME),
            (["strictatime", "noatime"], STRICTATIME),
            (["strictatime", "norelatime"], STRICTATIME),
        ] {
            let meant = Attributes {
                set: mode,
                clear: ATIME,
            };
            assert_eq!(parse(&words).unwrap().attributes, meant, "{words:?}");
        }
        assert_eq!(parse(&["rbind", "bind"]).unwrap().bind, Some(true));
    }

    /// Each word of the runtime spec's list, and what it means: of this mount (set, clear), and with its `r` form.
    #[test]
    fn the_words_of_the_spec_have_their_meaning() {
        let plain = |set, clear| Attributes { set, clear };
        for (word, meant) in [
            ("ro", plain(RDONLY, 0)),
            ("rw", plain(0, RDONLY)),
            ("nosuid", plain(NOSUID, 0)),
            ("suid", plain(0, NOSUID)),
            ("nodev", plain(NODEV, 0)),
            ("dev", plain(0, NODEV)),
            ("noexec", plain(NOEXEC, 0)),
            ("exec", plain(0, NOEXEC)),
            ("nodiratime", plain(NODIRATIME, 0)),
            ("diratime", plain(0, NODIRATIME)),
            ("nosymfollow", plain(NOSYMFOLLOW, 0)),
            ("symfollow", plain(0, NOSYMFOLLOW)),
            ("noatime", plain(NOATIME, ATIME)),
            ("atime", plain(0, ATIME)),
            ("relatime", plain(0, ATIME)),
            ("norelatime", plain(0, ATIME)),
            ("strictatime", plain(STRICTATIME, ATIME)),
            ("nostrictatime", plain(0, ATIME)),
        ] {
            assert_eq!(parse(&[word]).unwrap().attributes, meant, "{word}");
            let recursive = parse(&[&format!("r{word}")]).unwrap();
            assert_eq!(recursive.recursive, meant, "r{word}");
            assert_eq!(recursive.attributes, Attributes::default(), "r{word}");
            assert!(recursive.data.is_empty());
        }
        for (word, meant) in [
            ("private", (libc::MS_PRIVATE, false)),
            ("rprivate", (libc::MS_PRIVATE, true)),
            ("shared", (libc::MS_SHARED, false)),
            ("rshared", (libc::MS_SHARED, true)),
            ("slave", (libc::MS_SLAVE, false)),
            ("rslave", (libc::MS_SLAVE, true)),
            ("unbindable", (libc::MS_UNBINDABLE, false)),
            ("runbindable", (libc::MS_UNBINDABLE, true)),
        ] {
            assert_eq!(parse(&[word]).unwrap().propagation, [meant], "{word}");
        }
        for word in ["defaults", "silent", "loud", "mand", "nomand", "noiversion"] {
            assert_eq!(parse(&[word]).unwrap(), Options::default(), "{word}");
        }
        for word in ["sync", "async", "dirsync", "lazytime", "nolazytime", "acl"] {
            let word_alone = CString::new(word).unwrap();
            assert_eq!(parse(&[word]).unwrap().data, [(word_alone, None)]);
        }
        assert_eq!(parse(&["idmap"]).unwrap().id_mapped, Some(false));
        assert_eq!(parse(&["ridmap", "idmap"]).unwrap().id_mapped, Some(true));
        assert!(parse(&["tmpcopyup"]).unwrap().copy_up);
    }

    #[test]
    fn the_words_that_engines_are_told_of_are_known() {
        // The kernel's file systems take these themselves.
        let of_file_systems = [
            "acl",
            "async",
            "dirsync",
            "lazytime",
            "noacl",
            "nolazytime",
            "sync",
        ];
        for word in husk_agent_protocol::features::MOUNT_OPTIONS {
            let options = parse(&[word]).unwrap();
            assert_eq!(
                options.data.is_empty(),
                !of_file_systems.contains(&word),
                "{word}"
            );
        }
    }

    #[test]
    fn unsupported_words_are_named() {
        for word in ["iversion", "remount", "a\0b"] {
            let fault = parse(&[word]).unwrap_err();
            assert!(
                fault.message.starts_with(&format!("mounts[0].options: {word:?}")),
                "{}",
                fault.message
            );
        }
    }

    proptest! {
        #[test]
        fn any_words_parse_or_not(words in proptest::collection::vec(".{0,12}", 0..8)) {
            let _ = Options::parse(&words, "mounts[0]");
        }
    }
}
