use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use husk_agent_protocol::{
    limits::MAX_MIRRORED_FILE,
    messages::{MirrorChange, mirror_change::Kind},
};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{MAX_BYTES, MAX_ENTRIES, Refusal, Trees};

/// A directory and what its mirror has: content by path, with the mode.
struct Stage {
    dir: TempDir,
    trees: Trees,
    mirror: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Stage {
    fn new(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let mut stage = Self {
            trees: Trees::new().unwrap(),
            mirror: BTreeMap::new(),
            dir,
        };
        let changes = stage.trees.begin(1, stage.dir.path()).unwrap();
        stage.apply(&changes);
        stage.assert_equal();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes changes as the agent does, but strictly: what is not there cannot be changed.
    fn apply(&mut self, changes: &[MirrorChange]) {
        for change in changes {
            let path = String::from_utf8(change.path.clone()).unwrap();
            let to = String::from_utf8(change.to.clone()).unwrap();
            let file = change.file.as_ref().map(|file| (file.mode, file.content.clone()));
            let below = format!("{path}/");
            match change.kind.enum_value().unwrap() {
                Kind::CREATE => {
                    assert!(
                        self.mirror.insert(path.clone(), file.unwrap()).is_none(),
                        "{path}"
                    );
                }
                Kind::PLACE => {
                    self.mirror.retain(|name, _| !name.starts_with(&below));
                    self.mirror.insert(path, file.unwrap());
                }
                Kind::WRITE => *self.mirror.get_mut(&path).unwrap() = file.unwrap(),
                Kind::ATTRIBUTES if path.is_empty() => {}
                Kind::ATTRIBUTES => self.mirror.get_mut(&path).unwrap().0 = file.unwrap().0,
                Kind::RENAME => {
                    let end = format!("{to}/");
                    self.mirror
                        .retain(|name, _| !name.starts_with(&end) && *name != to);
                    let names: Vec<String> = self.mirror.keys().cloned().collect();
                    for name in names {
                        if name == path || name.starts_with(&below) {
                            let moved = self.mirror.remove(&name).unwrap();
                            self.mirror.insert(format!("{to}{}", &name[path.len()..]), moved);
                        }
                    }
                }
                Kind::TAKE_OUT => self
                    .mirror
                    .retain(|name, _| !name.starts_with(&below) && *name != path),
                Kind::REMOVE => {
                    assert!(!self.mirror.keys().any(|name| name.starts_with(&below)), "{path}");
                    self.mirror.remove(&path).unwrap();
                }
            }
        }
    }

    /// What is told now: kind and path (and the new path).
    fn told(&mut self) -> Vec<String> {
        let changes = self.read().unwrap();
        let shown = changes.iter().map(|change| {
            let path = String::from_utf8_lossy(&change.path);
            let to = String::from_utf8_lossy(&change.to);
            format!("{:?} {path} {to}", change.kind.enum_value().unwrap())
                .trim_end()
                .to_owned()
        });
        shown.collect()
    }

    fn read(&mut self) -> Result<Vec<MirrorChange>, Refusal> {
        let mut all = Vec::new();
        for (number, changes) in self.trees.read().unwrap().0 {
            assert_eq!(number, 1);
            let changes = changes?;
            self.apply(&changes);
            all.extend(changes);
        }
        Ok(all)
    }

    fn assert_equal(&self) {
        let mut there = BTreeMap::new();
        list(self.dir.path(), "", &mut there);
        let short = |files: &BTreeMap<String, (u32, Vec<u8>)>| {
            let short = files.iter().map(|(name, (mode, content))| {
                format!("{name} {mode:o} {}", String::from_utf8_lossy(content))
            });
            short.collect::<Vec<_>>()
        };
        assert_eq!(short(&self.mirror), short(&there));
    }
}

fn list(path: &Path, name: &str, all: &mut BTreeMap<String, (u32, Vec<u8>)>) {
    for entry in fs::read_dir(path).unwrap().flatten() {
        let below = format!("{name}{}", entry.file_name().to_str().unwrap());
        let found = entry.path().symlink_metadata().unwrap();
        let content = if found.is_dir() {
            list(&entry.path(), &format!("{below}/"), all);
            Vec::new()
        } else if found.is_symlink() {
            fs::read_link(entry.path())
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        } else {
            fs::read(entry.path()).unwrap()
        };
        all.insert(below, (found.mode(), content));
    }
}

/// As a kubelet lays out a volume.
fn kubelet(path: &Path) {
    fs::create_dir(path.join("..1")).unwrap();
    fs::write(path.join("..1/key"), "one").unwrap();
    symlink("..1", path.join("..data")).unwrap();
    symlink("..data/key", path.join("key")).unwrap();
}

fn exchange(path: &Path, old: &str, new: &str) {
    fs::create_dir(path.join(new)).unwrap();
    fs::set_permissions(path.join(new), PermissionsExt::from_mode(0o755)).unwrap();
    fs::write(path.join(new).join("key"), new).unwrap();
    symlink(new, path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    fs::remove_dir_all(path.join(old)).unwrap();
}

#[test]
fn an_exchange_is_told_as_it_happened() {
    let mut stage = Stage::new(kubelet);
    exchange(stage.dir.path(), "..1", "..2");
    let told = stage.told();
    assert_eq!(
        told,
        [
            "CREATE ..2",
            "CREATE ..2/key",
            "ATTRIBUTES ..2",
            "CREATE ..data_tmp",
            "RENAME ..data_tmp ..data",
            "REMOVE ..1/key",
            "REMOVE ..1",
        ]
    );
    stage.assert_equal();
    assert_eq!(stage.told(), [""; 0]);
    // What is new is watched, too.
    fs::write(stage.path("..2/key"), "new").unwrap();
    assert_eq!(stage.told(), ["WRITE ..2/key"]);
    stage.assert_equal();
}

/// Whenever it is read: a name may have gone on before its event is looked at.
#[test]
fn exchanges_are_told_as_they_happen() {
    let mut stage = Stage::new(kubelet);
    let mut others = Vec::new();
    for number in 1..=100 {
        let path = stage.dir.path().to_owned();
        let (old, new) = (format!("..{number}"), format!("..{}", number + 1));
        let names = (old.clone(), new.clone());
        let host = std::thread::spawn(move || exchange(&path, &names.0, &names.1));
        let mut told = Vec::new();
        while !host.is_finished() {
            told.extend(stage.told());
        }
        host.join().unwrap();
        told.extend(stage.told());
        stage.assert_equal();
        // When the files in the new directory are met, and how often, is a matter of time.
        told.retain(|told| !told.ends_with("/key") && !told.starts_with("ATTRIBUTES"));
        let expected = [
            format!("CREATE {new}"),
            "CREATE ..data_tmp".to_owned(),
            "RENAME ..data_tmp ..data".to_owned(),
            format!("REMOVE {old}"),
        ];
        if told != expected {
            others.push(told);
        }
    }
    // Another process may get the processor between a change and its event, and keep it for longer than the event is waited
    // for. Then it is told what has become of the name.
    assert!(others.len() <= 5, "{others:?}");
}

#[test]
fn a_file_is_changed_where_it_is() {
    let mut stage = Stage::new(|path| fs::write(path.join("file"), "one").unwrap());
    fs::write(stage.path("file"), "two").unwrap();
    assert_eq!(stage.told(), ["WRITE file"]);
    fs::set_permissions(stage.path("file"), PermissionsExt::from_mode(0o400)).unwrap();
    assert_eq!(stage.told(), ["ATTRIBUTES file"]);
    // As most editors do, within the directory and from outside.
    fs::write(stage.path("new"), "three").unwrap();
    fs::rename(stage.path("new"), stage.path("file")).unwrap();
    assert_eq!(stage.told(), ["CREATE new", "WRITE new", "RENAME new file"]);
    let outside = tempfile::NamedTempFile::new_in(stage.dir.path().parent().unwrap()).unwrap();
    fs::write(&outside, "four").unwrap();
    fs::rename(outside.path(), stage.path("file")).unwrap();
    assert_eq!(stage.told(), ["PLACE file"]);
    stage.assert_equal();
    fs::rename(stage.path("file"), outside.path()).unwrap();
    assert_eq!(stage.told(), ["TAKE_OUT file"]);
    stage.assert_equal();
}

#[test]
fn a_new_file_is_told_to_be_complete_once() {
    let mut stage = Stage::new(|_| ());
    let mut file = fs::File::create(stage.path("file")).unwrap();
    assert_eq!(stage.told(), ["CREATE file"]);
    file.write_all(b"one").unwrap();
    assert_eq!(stage.told(), ["WRITE file"]);
    drop(file);
    assert_eq!(stage.told(), [""; 0]);
    drop(fs::File::create(stage.path("empty")).unwrap());
    assert_eq!(stage.told(), ["CREATE empty", "WRITE empty"]);
    fs::write(stage.path("full"), "x").unwrap();
    assert_eq!(stage.told(), ["CREATE full", "WRITE full"]);
    stage.assert_equal();
}

#[test]
fn directories_are_followed_wherever_they_go() {
    let mut stage = Stage::new(|path| {
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::write(path.join("a/b/file"), "x").unwrap();
    });
    fs::rename(stage.path("a"), stage.path("c")).unwrap();
    assert_eq!(stage.told(), ["RENAME a c"]);
    fs::write(stage.path("c/b/file"), "y").unwrap();
    assert_eq!(stage.told(), ["WRITE c/b/file"]);
    let outside = tempfile::tempdir().unwrap();
    fs::rename(stage.path("c/b"), outside.path().join("b")).unwrap();
    assert_eq!(stage.told(), ["TAKE_OUT c/b"]);
    fs::write(outside.path().join("b/file"), "z").unwrap();
    assert_eq!(stage.told(), [""; 0]);
    fs::rename(outside.path().join("b"), stage.path("d")).unwrap();
    stage.told();
    stage.assert_equal();
    fs::write(stage.path("d/file"), "last").unwrap();
    assert_eq!(stage.told(), ["WRITE d/file"]);
    stage.assert_equal();
}

#[test]
fn links_lead_nowhere() {
    let secret = tempfile::tempdir().unwrap();
    fs::write(secret.path().join("file"), "secret").unwrap();
    let mut stage = Stage::new(|path| symlink(secret.path(), path.join("link")).unwrap());
    assert_eq!(stage.mirror.len(), 1);
    fs::create_dir(stage.path("dir")).unwrap();
    fs::write(stage.path("dir/file"), "x").unwrap();
    stage.told();
    // What was a directory is a link by the time it is looked at.
    fs::write(stage.path("dir/file"), "y").unwrap();
    fs::remove_dir_all(stage.path("dir")).unwrap();
    symlink(secret.path(), stage.path("dir")).unwrap();
    stage.told();
    stage.assert_equal();
    let contents = stage.mirror.values();
    assert!(contents.into_iter().all(|(_, content)| content != b"secret"));
}

#[test]
fn what_cannot_be_mirrored_is_refused() {
    let begin = |prepare: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let mut trees = Trees::new().unwrap();
        let refusal = trees.begin(1, dir.path()).unwrap_err().to_string();
        assert!(!trees.has(1));
        // And not watched.
        fs::write(dir.path().join("more"), "").unwrap();
        assert!(trees.read().unwrap().0.is_empty());
        refusal
    };
    let refusal =
        begin(&|path| nix::unistd::mkfifo(&path.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap());
    assert_eq!(refusal, "fifo is a FIFO");
    let refusal = begin(&|path| fs::write(path.join("large"), vec![0; MAX_MIRRORED_FILE + 1]).unwrap());
    assert!(refusal.starts_with("large has more than"), "{refusal}");
    let refusal = begin(&|path| {
        for number in 0..3 {
            fs::write(path.join(number.to_string()), vec![0; MAX_MIRRORED_FILE]).unwrap();
        }
    });
    assert!(
        refusal.contains(&format!("more than {MAX_BYTES} bytes")),
        "{refusal}"
    );
    let refusal = begin(&|path| {
        for number in 0..MAX_ENTRIES {
            fs::write(path.join(number.to_string()), "").unwrap();
        }
    });
    assert!(refusal.contains("more than 1024 files"), "{refusal}");
}

#[test]
fn what_grows_too_large_keeps_its_last_state_until_it_shrinks() {
    let mut stage = Stage::new(kubelet);
    fs::write(stage.path("large"), vec![0; MAX_MIRRORED_FILE + 1]).unwrap();
    fs::write(stage.path("..1/key"), "two").unwrap();
    assert!(matches!(stage.read(), Err(Refusal::File(path)) if path == b"large"));
    fs::create_dir(stage.path("new")).unwrap();
    fs::write(stage.path("..1/key"), "three").unwrap();
    assert!(stage.read().is_err());
    assert_eq!(stage.mirror["..1/key"].1, b"one");
    fs::remove_file(stage.path("large")).unwrap();
    let told = stage.told();
    assert!(
        told.contains(&"WRITE ..1/key".to_owned()) && told.contains(&"CREATE new".to_owned()),
        "{told:?}"
    );
    stage.assert_equal();
    fs::write(stage.path("new/file"), "x").unwrap();
    assert_eq!(stage.told(), ["CREATE new/file", "WRITE new/file"]);
    stage.assert_equal();
}

#[test]
fn what_was_renamed_unseen_is_still_watched() {
    let mut stage = Stage::new(|path| {
        fs::create_dir_all(path.join("z/b")).unwrap();
        fs::write(path.join("z/b/file"), "x").unwrap();
    });
    fs::write(stage.path("large"), vec![0; MAX_MIRRORED_FILE + 1]).unwrap();
    stage.read().unwrap_err();
    fs::rename(stage.path("z"), stage.path("a")).unwrap();
    fs::remove_file(stage.path("large")).unwrap();
    stage.told();
    stage.assert_equal();
    fs::write(stage.path("a/b/file"), "y").unwrap();
    assert_eq!(stage.told(), ["WRITE a/b/file"]);
    stage.assert_equal();
}

#[test]
fn a_flood_of_changes_ends_in_the_right_state() {
    let mut stage = Stage::new(kubelet);
    for round in 0..3000 {
        fs::write(stage.path("a"), round.to_string()).unwrap();
        fs::rename(stage.path("a"), stage.path("b")).unwrap();
    }
    while !stage.told().is_empty() {}
    stage.assert_equal();
    // Large ones, too: what is told is bounded.
    for _ in 0..20 {
        fs::write(stage.path("a"), vec![b'x'; 1 << 20]).unwrap();
        fs::remove_file(stage.path("a")).unwrap();
    }
    fs::write(stage.path("a"), vec![b'x'; 1 << 20]).unwrap();
    let changes = stage.read().unwrap();
    let length: usize = changes
        .iter()
        .filter_map(|change| change.file.as_ref())
        .map(|file| file.content.len())
        .sum();
    assert!(length <= 16 << 20, "{length}");
    stage.assert_equal();
}

#[test]
fn after_a_failure_all_is_told_again() {
    let mut stage = Stage::new(kubelet);
    stage.trees.mistrust(1);
    fs::write(stage.path("new"), "x").unwrap();
    let told = stage.told();
    for change in ["WRITE ..1/key", "PLACE ..data", "PLACE key", "CREATE new"] {
        assert!(told.contains(&change.to_owned()), "{told:?}");
    }
    stage.assert_equal();
    fs::write(stage.path("new"), "y").unwrap();
    assert_eq!(stage.told(), ["WRITE new"]);
}

#[test]
fn one_directory_can_have_two_mirrors() {
    let mut stage = Stage::new(kubelet);
    stage.trees.begin(2, stage.dir.path()).unwrap();
    fs::write(stage.path("..1/key"), "two").unwrap();
    let told = stage.trees.read().unwrap().0;
    let numbers: Vec<u32> = told.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, [1, 2]);
    stage.apply(told[0].1.as_ref().unwrap());
    stage.trees.end(2);
    fs::write(stage.path("..1/key"), "three").unwrap();
    assert_eq!(stage.told(), ["WRITE ..1/key"]);
    stage.trees.end(1);
    fs::write(stage.path("..1/key"), "four").unwrap();
    assert!(stage.trees.read().unwrap().0.is_empty());
}

/// Something that happens to a directory.
#[derive(Clone, Debug)]
enum Step {
    Write(String, u8),
    Link(String),
    Directory(String),
    Rename(String, String),
    Remove(String),
    Mode(String, u32),
    Read,
    Fail,
}

fn step() -> impl Strategy<Value = Step> {
    let name = || {
        let names = ["a", "b", "c", "d/a", "d/b", "d", "e/f", "e", "d/g"];
        prop::sample::select(names.to_vec()).prop_map(str::to_owned)
    };
    prop_oneof![
        3 => (name(), any::<u8>()).prop_map(|(name, byte)| Step::Write(name, byte)),
        1 => name().prop_map(Step::Link),
        2 => name().prop_map(Step::Directory),
        3 => (name(), name()).prop_map(|(from, to)| Step::Rename(from, to)),
        2 => name().prop_map(Step::Remove),
        1 => (name(), prop::sample::select(vec![0o600, 0o644, 0o755])).prop_map(|(name, mode)| Step::Mode(name, mode)),
        2 => Just(Step::Read),
        1 => Just(Step::Fail),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_mirror_is_the_directory_in_the_end(steps in prop::collection::vec(step(), 0..60)) {
        let mut stage = Stage::new(kubelet);
        for step in steps {
            // What cannot be done is not.
            match step {
                Step::Write(name, byte) => drop(fs::write(stage.path(&name), [byte])),
                Step::Link(name) => drop(symlink("a", stage.path(&name))),
                Step::Directory(name) => drop(fs::create_dir(stage.path(&name))),
                Step::Rename(from, to) => drop(fs::rename(stage.path(&from), stage.path(&to))),
                Step::Remove(name) => {
                    let path = stage.path(&name);
                    let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
                }
                Step::Mode(name, mode) => drop(fs::set_permissions(stage.path(&name), PermissionsExt::from_mode(mode))),
                Step::Fail => stage.trees.mistrust(1),
                Step::Read => drop(stage.read().unwrap()),
            }
        }
        stage.read().unwrap();
        stage.assert_equal();
        assert_eq!(stage.told(), [""; 0]);
    }
}
