//! Mirrored volumes in the real agent without a VM (see `common`).

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::PathBuf,
};

use common::{Host, deadline, script};
use husk_agent_protocol::messages::{
    MirrorChange, MirrorFile, RemoveMirrorRequest, UpdateMirrorRequest, mirror_change::Kind,
};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::json;

const DIRECTORY: u32 = libc::S_IFDIR;
const FILE: u32 = libc::S_IFREG;
const LINK: u32 = libc::S_IFLNK;

fn file(mode: u32, content: &str) -> MirrorFile {
    MirrorFile {
        mode,
        mtime_seconds: 1_234_567_890,
        mtime_nanoseconds: 123,
        content: content.into(),
        ..Default::default()
    }
}

fn change(kind: Kind, path: &str, file: Option<MirrorFile>) -> MirrorChange {
    MirrorChange {
        kind: kind.into(),
        path: path.into(),
        file: file.into(),
        ..Default::default()
    }
}

fn rename(path: &str, to: &str) -> MirrorChange {
    MirrorChange {
        to: to.into(),
        ..change(Kind::RENAME, path, None)
    }
}

async fn update(host: &Host, changes: &[MirrorChange]) -> Result<(), String> {
    let request = UpdateMirrorRequest {
        volume: 3,
        changes: changes.to_vec(),
        ..Default::default()
    };
    let updated = host.client.update_mirror(deadline(), &request).await;
    updated.map(drop).map_err(|error| error.to_string())
}

async fn remove(host: &Host) {
    let request = RemoveMirrorRequest {
        volume: 3,
        ..Default::default()
    };
    host.client.remove_mirror(deadline(), &request).await.unwrap();
}

/// As a kubelet lays out a volume.
fn configuration() -> Vec<MirrorChange> {
    vec![
        change(Kind::CREATE, "..1", Some(file(DIRECTORY | 0o775, ""))),
        change(Kind::CREATE, "..1/key", Some(file(FILE | 0o640, "one\n"))),
        change(Kind::ATTRIBUTES, "..1", Some(file(DIRECTORY | 0o775, ""))),
        change(Kind::CREATE, "..data", Some(file(LINK | 0o777, "..1"))),
        change(Kind::CREATE, "key", Some(file(LINK | 0o777, "..data/key"))),
        change(Kind::ATTRIBUTES, "", Some(file(DIRECTORY | 0o1777, ""))),
    ]
}

/// How it is exchanged.
fn exchange() -> Vec<MirrorChange> {
    vec![
        change(Kind::CREATE, "..2", Some(file(DIRECTORY | 0o755, ""))),
        change(Kind::CREATE, "..2/key", Some(file(FILE | 0o644, "two\n"))),
        change(Kind::CREATE, "..data_tmp", Some(file(LINK | 0o777, "..2"))),
        rename("..data_tmp", "..data"),
        change(Kind::REMOVE, "..1/key", None),
        change(Kind::REMOVE, "..1", None),
    ]
}

/// The mirror as the agent has it.
fn tree(host: &Host) -> PathBuf {
    let mirrors = host.directory.path().join("mirrors/3/tree");
    let root = format!("/proc/{}/root", host.agent_pid());
    PathBuf::from(root).join(mirrors.strip_prefix("/").unwrap())
}

fn watch(path: &PathBuf) -> Inotify {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    let all = AddWatchFlags::IN_ALL_EVENTS - AddWatchFlags::IN_ACCESS - AddWatchFlags::IN_CLOSE_NOWRITE;
    inotify.add_watch(path, all - AddWatchFlags::IN_OPEN).unwrap();
    inotify
}

fn events(inotify: &Inotify) -> Vec<String> {
    let Ok(events) = inotify.read_events() else {
        return Vec::new();
    };
    let events = events.into_iter().map(|event| {
        let mask = event.mask - AddWatchFlags::IN_ISDIR;
        let name = event.name.unwrap_or_default();
        let words: Vec<_> = mask.iter_names().map(|(word, _)| word).collect();
        format!("{} {}", words.join("+"), name.to_string_lossy())
    });
    events.collect()
}

#[tokio::test]
async fn changes_are_made_with_the_events_that_the_host_had() {
    let host = Host::new().await;
    update(&host, &configuration()).await.unwrap();
    let tree = tree(&host);
    let found = fs::metadata(tree.join("..1/key")).unwrap();
    assert_eq!(
        (found.mode(), found.mtime(), found.mtime_nsec()),
        (FILE | 0o640, 1_234_567_890, 123)
    );
    assert_eq!(fs::metadata(&tree).unwrap().mode(), DIRECTORY | 0o1777);
    assert_eq!(fs::metadata(tree.join("..1")).unwrap().mode(), DIRECTORY | 0o775);
    assert_eq!(
        fs::symlink_metadata(tree.join("key")).unwrap().mtime(),
        1_234_567_890
    );

    let watched = watch(&tree);
    update(&host, &exchange()).await.unwrap();
    assert_eq!(
        events(&watched),
        [
            "IN_CREATE ..2",
            "IN_CREATE ..data_tmp",
            "IN_MOVED_FROM ..data_tmp",
            "IN_MOVED_TO ..data",
            "IN_DELETE ..1",
        ]
    );
    assert_eq!(fs::read_to_string(tree.join("key")).unwrap(), "two\n");

    // In place: who has the file open sees it.
    let old = fs::metadata(tree.join("..2/key")).unwrap().ino();
    let inner = watch(&tree.join("..2"));
    let mut written = file(FILE | 0o644, "3\n");
    written.uid = 7;
    update(&host, &[change(Kind::WRITE, "..2/key", Some(written))])
        .await
        .unwrap();
    let found = fs::metadata(tree.join("..2/key")).unwrap();
    assert_eq!(
        (found.ino(), found.uid(), found.len(), found.mtime()),
        (old, 7, 2, 1_234_567_890)
    );
    let told = events(&inner);
    assert!(told.contains(&"IN_MODIFY key".to_owned()), "{told:?}");
    assert_eq!(told.last().unwrap(), "IN_CLOSE_WRITE key");

    assert_eq!(fs::metadata(tree.join("key")).unwrap().nlink(), 1);
    update(
        &host,
        &[change(Kind::CREATE, "..2/new", Some(file(FILE | 0o604, "x")))],
    )
    .await
    .unwrap();
    assert_eq!(events(&inner), ["IN_CREATE new"]);
    assert_eq!(fs::metadata(tree.join("..2/new")).unwrap().mode(), FILE | 0o604);
    assert_eq!(fs::read(tree.join("..2/new")).unwrap(), b"x");

    // What comes from elsewhere, and what goes there.
    update(
        &host,
        &[change(Kind::PLACE, "..2/key", Some(file(FILE | 0o600, "four\n")))],
    )
    .await
    .unwrap();
    assert_eq!(events(&inner), ["IN_MOVED_TO key"]);
    assert_ne!(fs::metadata(tree.join("..2/key")).unwrap().ino(), old);
    update(&host, &[change(Kind::TAKE_OUT, "..2", None)])
        .await
        .unwrap();
    assert_eq!(events(&watched), ["IN_MOVED_FROM ..2"]);
    assert!(!tree.join("..2").exists());
    let stage = tree.with_file_name("stage");
    assert_eq!(fs::read_dir(stage).unwrap().count(), 0);
    remove(&host).await;
}

#[tokio::test]
async fn containers_have_it_as_any_volume_and_keep_it() {
    let host = Host::new().await;
    host.rootfs("c");
    update(&host, &configuration()).await.unwrap();
    let mut spec = script(
        "read x; cat /v/key; grep ' /v ' /proc/self/mountinfo | cut -d' ' -f6; touch /v/new 2>/dev/null || echo refused; read x; cat /v/key",
    );
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let index = u32::try_from(mounts.len()).unwrap();
    mounts.push(json!({"destination": "/v", "type": "bind", "source": "/x", "options": ["rbind", "ro", "nosuid", "rslave"]}));
    let unknown = host
        .try_create_mirrored("d", &spec, HashMap::from([(index, 4)]), vec![index])
        .await;
    let message = unwrap_failure(unknown);
    assert!(message.contains(&format!("mounts[{index}].source")), "{message}");
    let created = host
        .try_create_mirrored("c", &spec, HashMap::from([(index, 3)]), vec![index])
        .await;
    let mut streams = created.unwrap_or_else(|failure| panic!("{}", failure.message));
    host.try_start("c").await.unwrap();
    update(&host, &exchange()).await.unwrap();
    let place = tree(&host).parent().unwrap().to_owned();
    use tokio::io::AsyncWriteExt;
    let stdin = streams.stdin.as_mut().unwrap();
    stdin.write_all(b"go\n").await.unwrap();
    remove(&host).await;
    assert!(!place.exists());
    stdin.write_all(b"go\n").await.unwrap();
    let (stdout, stderr) = streams.read().await;
    assert_eq!(
        (stdout.as_str(), stderr.as_str()),
        ("two\nro,nosuid,relatime\nrefused\ntwo\n", "")
    );
    assert_eq!(host.next_exit().await.2, 0);
    host.delete("c").await.unwrap();
    // One that is not there is fine.
    remove(&host).await;
}

fn unwrap_failure<T>(result: Result<T, husk_agent_protocol::messages::Failure>) -> String {
    result.err().unwrap().message
}

#[tokio::test]
async fn nothing_leads_out_of_it() {
    let host = Host::new().await;
    update(&host, &configuration()).await.unwrap();
    let outside = host.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "safe").unwrap();
    let target = outside.to_str().unwrap();
    update(&host, &[change(Kind::CREATE, "out", Some(file(LINK, target)))])
        .await
        .unwrap();
    let new = || Some(file(FILE | 0o644, "lost"));
    for path in [
        "out/file",
        "../x",
        "/x",
        "..",
        ".",
        "a/..",
        "..1/../x",
        "..data/key",
        "x\0y",
        "no/file",
    ] {
        for kind in [Kind::CREATE, Kind::PLACE, Kind::WRITE, Kind::ATTRIBUTES] {
            update(&host, &[change(kind, path, new())]).await.unwrap_err();
        }
        update(&host, &[rename("..1/key", path)]).await.unwrap_err();
    }
    for change in [
        change(Kind::CREATE, "", new()),
        change(Kind::CREATE, "device", Some(file(libc::S_IFBLK | 0o600, ""))),
        change(Kind::CREATE, "nothing", None),
        change(Kind::CREATE, &"x/".repeat(2000), new()),
        rename("missing", "x"),
    ] {
        update(&host, &[change]).await.unwrap_err();
    }
    // What is in the way of a link is not what it leads to.
    update(&host, &[change(Kind::WRITE, "out", new())]).await.unwrap();
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"safe");
    assert!(fs::symlink_metadata(tree(&host).join("out")).unwrap().is_file());
    // The rest is done, whatever fails.
    let changes = [rename("missing", "x"), change(Kind::CREATE, "new", new())];
    let error = update(&host, &changes).await.unwrap_err();
    assert!(error.contains("missing") && error.contains("volume 3"), "{error}");
    assert_eq!(fs::read(tree(&host).join("new")).unwrap(), b"lost");
}

#[tokio::test]
async fn what_is_told_again_does_no_harm_and_too_much_is_refused() {
    let host = Host::new().await;
    update(&host, &configuration()).await.unwrap();
    update(&host, &configuration()).await.unwrap();
    let tree = tree(&host);
    assert_eq!(fs::read_to_string(tree.join("key")).unwrap(), "one\n");
    let over = [
        change(Kind::CREATE, "dir", Some(file(DIRECTORY | 0o755, ""))),
        change(Kind::CREATE, "dir/file", Some(file(FILE | 0o644, "x"))),
        rename("..1", "dir"),
        change(Kind::REMOVE, "missing", None),
        change(Kind::REMOVE, "dir", None),
        change(Kind::TAKE_OUT, "missing", None),
    ];
    update(&host, &over).await.unwrap();
    assert!(!tree.join("dir").exists() && !tree.join("..1").exists());
    symlink("nowhere", tree.join("by a container")).unwrap();
    let large = |name: &str| change(Kind::CREATE, name, Some(file(FILE | 0o644, &"x".repeat(2 << 20))));
    for name in 0..9 {
        update(&host, &[large(&name.to_string())]).await.unwrap();
    }
    let error = update(&host, &[large("10")]).await.unwrap_err();
    assert!(error.contains("no space left on device"), "{error}");
    remove(&host).await;
}
