use std::collections::HashMap;

use super::{annotations::Most, options::KEYS, *};

const SHIPPED: &str = include_str!("../../../configs/husk.toml");

fn faults(text: &str) -> Vec<String> {
    match Config::parse(text, "husk.toml") {
        Err(ConfigError::Faults(faults)) => faults.iter().map(ToString::to_string).collect(),
        other => panic!("{other:?}"),
    }
}

fn fault(text: &str) -> String {
    let mut all = faults(text);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

/// The shipped file with its commented options in effect.
fn uncommented() -> String {
    let option = |line: &str| {
        let name = line.strip_prefix("# ")?.split_once(" = ")?.0.to_owned();
        KEYS.iter().any(|key| key.name == name).then_some(())
    };
    SHIPPED
        .lines()
        .map(|line| {
            if option(line).is_some() {
                line.trim_start_matches("# ")
            } else {
                line
            }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_shipped_file_says_what_holds_without_it() {
    assert_eq!(Config::parse(SHIPPED, "husk.toml").unwrap(), Config::default());
    assert_eq!(Config::parse("", "husk.toml").unwrap(), Config::default());
}

#[test]
fn the_shipped_file_has_every_option_and_no_other() {
    let text = uncommented();
    Config::parse(&text, "husk.toml").unwrap();
    let document = toml::de::DeTable::parse(&text).unwrap();
    let mut there = Vec::new();
    for (table, options) in document.get_ref() {
        let toml::de::DeValue::Table(options) = options.get_ref() else {
            panic!()
        };
        for (name, _) in options {
            there.push(format!("{}.{}", table.get_ref(), name.get_ref()));
        }
    }
    let mut known: Vec<String> = KEYS
        .iter()
        .map(|key| format!("{}.{}", key.table, key.name))
        .collect();
    there.sort();
    known.sort();
    assert_eq!(there, known);
    assert!(known.len() <= 30);
}

#[test]
fn each_option_changes_something_of_its_own() {
    let values = [
        ("machine.vcpus", "3"),
        ("machine.memory_mib", "512"),
        ("machine.memory_overhead_mib", "128"),
        ("machine.max_vcpus", "4"),
        ("machine.max_memory_mib", "1024"),
        ("guest.kernel", "\"/k\""),
        ("guest.initramfs", "\"/i\""),
        ("guest.kernel_params", "\"quiet\""),
        ("guest.log_level", "\"debug\""),
        ("programs.vmm", "\"/v\""),
        ("programs.fsd", "\"/f\""),
        ("programs.standin", "\"/s\""),
        ("cgroup.driver", "\"systemd\""),
        ("cgroup.limits", "false"),
        ("security.ignored_apparmor_profiles", "[]"),
        ("volumes.watched", "[\"/srv/*\"]"),
        ("network.spare_nics", "3"),
        ("network.queue_pairs", "2"),
        ("network.vhost", "true"),
        ("timeouts.boot_seconds", "1"),
        ("timeouts.call_seconds", "1"),
        ("timeouts.shutdown_seconds", "1"),
        ("log.level", "\"debug\""),
        ("log.journald", "false"),
        ("log.kept_kib", "4"),
        ("log.console_kept_kib", "4"),
        ("annotations.allowed", "[\"io.husk.vcpus\"]"),
    ];
    assert_eq!(values.len(), KEYS.len());
    let mut seen = vec![Config::default()];
    for (key, value) in values {
        let config = Config::parse(&format!("{key} = {value}"), "husk.toml").unwrap();
        assert!(!seen.contains(&config), "{key}");
        seen.push(config);
    }
}

#[test]
fn whole_numbers_may_be_written_as_json_has_them() {
    let config = Config::parse("[machine]\nvcpus = 8.0\nmemory_mib = 0x200", "f").unwrap();
    assert_eq!((config.machine.vcpus, config.machine.memory_mib), (Some(8), 512));
    for bad in ["8.5", "8e0", "inf", "-8.0", "true"] {
        fault(&format!("machine.vcpus = {bad}"));
    }
}

#[test]
fn an_unknown_option_is_named_with_its_line() {
    let text = "[machine]\nvcpus = 2\nmemory = 12\n";
    let told = fault(text);
    assert!(
        told.starts_with(
            "husk.toml:3: machine.memory: there is no such option; [machine] has vcpus, memory_mib"
        ),
        "{told}"
    );
    let told = fault("\n\n[hypervisor.qemu]\npath = 1\n");
    assert!(
        told.starts_with("husk.toml:3: hypervisor: there is no such table"),
        "{told}"
    );
    let told = fault("SystemdCgroup = true");
    assert!(
        told.starts_with("husk.toml:1: SystemdCgroup: there is no such table or option"),
        "{told}"
    );
    assert_eq!(
        fault("machine = 3"),
        "husk.toml:1: machine: must be a table: [machine]"
    );
}

#[test]
fn what_is_wrong_is_told_all_at_once() {
    let text = "[machine]\nvcpus = 0\nmemory_mib = \"much\"\n[guest]\nkernel = \"vmlinux\"\nlog_level = \"loud\"\n\
                [timeouts]\nboot_seconds = 1.5\n[log]\nlevel = \"INFO\"\njournald = 1\nkept_kib = -1\n\
                [annotations]\nallowed = [\"io.husk.path\"]\n";
    let told = faults(text);
    let beginnings = [
        "husk.toml:2: machine.vcpus: must be a whole number from 1 to 64",
        "husk.toml:3: machine.memory_mib: must be a whole number from 64 to",
        "husk.toml:5: guest.kernel: must be an absolute path",
        "husk.toml:6: guest.log_level: must be one of \"emerg\", ",
        "husk.toml:8: timeouts.boot_seconds: must be a whole number from 1 to 3600",
        "husk.toml:10: log.level: must be one of \"off\", ",
        "husk.toml:11: log.journald: must be true or false",
        "husk.toml:12: log.kept_kib: must be a whole number",
        "husk.toml:14: annotations.allowed: \"io.husk.path\" is not an annotation of husk's; there are io.husk.vcpus",
    ];
    assert_eq!(told.len(), beginnings.len(), "{told:#?}");
    for (told, beginning) in told.iter().zip(beginnings) {
        assert!(told.starts_with(beginning), "{told}");
    }
}

#[test]
fn what_is_no_toml_has_a_line_too() {
    for (text, line) in [
        ("[machine]\nvcpus = = 2", 2),
        ("[machine", 1),
        ("a = 1\na = 2", 2),
    ] {
        let told = faults(text);
        assert!(told[0].starts_with(&format!("husk.toml:{line}: ")), "{told:?}");
        assert_eq!(told[0].lines().count(), 1);
    }
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let told = fault("[machine]\nmax_vcpus = 2\nvcpus = 4");
    assert_eq!(told, "husk.toml:3: machine.vcpus: is more than max_vcpus, 2");
    let told = fault("[network]\nqueue_pairs = 2\nvhost = true");
    assert_eq!(
        told,
        "husk.toml:3: network.vhost: is for NICs of one pair of queues; leave queue_pairs out"
    );
    let told = fault("[machine]\nmax_memory_mib = 128");
    assert_eq!(
        told,
        "husk.toml:2: machine.max_memory_mib: memory_mib, 256, is more than max_memory_mib, 128"
    );
}

#[test]
fn files_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("husk.toml");
    let error = Source::File(path.clone()).load().unwrap_err();
    assert!(matches!(error, ConfigError::Unreadable { .. }), "{error}");
    assert_eq!(load_or_default(&path).unwrap(), Config::default());
    std::fs::write(&path, "[machine]\nvcpus = 1\nx = 1").unwrap();
    for error in [
        Source::File(path.clone()).load().unwrap_err(),
        load_or_default(&path).unwrap_err(),
    ] {
        assert!(error.to_string().contains("husk.toml:3: machine.x"), "{error}");
    }
    std::fs::write(&path, " ".repeat(2 << 20)).unwrap();
    let error = Source::File(path).load().unwrap_err();
    assert!(matches!(error, ConfigError::TooLong(_)), "{error}");
    let error = Source::File("husk.toml".into()).load().unwrap_err();
    assert!(matches!(error, ConfigError::Relative(_)), "{error}");
    let error = Source::Text("x = 1".into()).load().unwrap_err();
    assert!(
        error.to_string().starts_with("the runtime's options:1: x: "),
        "{error}"
    );
}

const MOST: Most = Most {
    vcpus: 8,
    memory_mib: 4096,
};

fn wishes(allowed: &str, annotations: &[(&str, &str)]) -> Result<Wishes, AnnotationError> {
    let config = Config::parse(&format!("annotations.allowed = [{allowed}]"), "husk.toml").unwrap();
    let annotations: HashMap<String, String> = annotations
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    Wishes::read(Some(&annotations), &config, MOST)
}

#[test]
fn annotations_have_effect_where_they_are_allowed_by_name() {
    let all = r#""io.husk.vcpus", "io.husk.memory_mib", "io.husk.kernel_params", "io.husk.guest_log_level""#;
    let wished = wishes(
        all,
        &[
            ("io.husk.vcpus", "3"),
            ("io.husk.memory_mib", "512"),
            ("io.husk.kernel_params", "debug"),
            ("io.husk.guest_log_level", "info"),
            ("io.kubernetes.cri.sandbox-id", "x"),
        ],
    )
    .unwrap();
    assert_eq!((wished.vcpus, wished.memory_mib), (Some(3), Some(512)));
    let config = Config::parse("guest = { kernel_params = \"a\", log_level = \"err\" }", "f").unwrap();
    assert_eq!(wished.kernel_params(&config), "loglevel=4 a loglevel=7 debug");
    assert_eq!(Wishes::default().kernel_params(&Config::default()), "");

    let error = wishes(r#""io.husk.memory_mib""#, &[("io.husk.vcpus", "3")]).unwrap_err();
    assert_eq!(error, AnnotationError::NotAllowed("io.husk.vcpus".into()));
    let told = error.to_string();
    assert!(
        told.contains("io.husk.vcpus") && told.contains("`allowed`") && told.contains("husk.toml"),
        "{told}"
    );
    let error = wishes(all, &[("io.husk.vmm", "/bin/sh")]).unwrap_err();
    assert_eq!(error, AnnotationError::Unknown("io.husk.vmm".into()));
    for (name, value) in [
        ("io.husk.vcpus", "9"),
        ("io.husk.vcpus", "0"),
        ("io.husk.vcpus", "-1"),
        ("io.husk.memory_mib", "4097"),
        ("io.husk.memory_mib", "1G"),
        ("io.husk.kernel_params", "a\nb"),
        ("io.husk.guest_log_level", "9"),
    ] {
        let error = wishes(all, &[(name, value)]).unwrap_err();
        assert!(matches!(error, AnnotationError::Value { .. }), "{error}");
    }
}

#[test]
fn a_running_sandbox_is_not_changed_by_a_later_container() {
    let all = r#""io.husk.vcpus", "io.husk.memory_mib""#;
    let first = wishes(all, &[("io.husk.vcpus", "3")]).unwrap();
    first.admit(&Wishes::default()).unwrap();
    first.admit(&first.clone()).unwrap();
    for later in [("io.husk.vcpus", "2"), ("io.husk.memory_mib", "512")] {
        let later = wishes(all, &[later]).unwrap();
        assert!(matches!(first.admit(&later), Err(AnnotationError::TooLate(_))));
    }
}

#[test]
fn sizes_are_bounded_by_the_operator_and_the_host() {
    let machine = |text: &str| Config::parse(text, "f").unwrap().machine;
    let default = Machine::default();
    assert_eq!((default.default_vcpus(1), default.default_vcpus(16)), (1, 2));
    assert_eq!((default.most_vcpus(16), default.most_vcpus(1000)), (16, 64));
    assert_eq!(machine("machine.max_vcpus = 1").default_vcpus(16), 1);
    assert_eq!(machine("machine.vcpus = 8").default_vcpus(4), 4);
    assert_eq!(default.most_memory_mib(u64::MAX), *MEMORY_MIB.end());
    assert_eq!(
        machine("machine.max_memory_mib = 512").most_memory_mib(1 << 20),
        512
    );
}

#[test]
fn the_engines_own_apparmor_profiles_may_be_without_effect_and_no_others() {
    let security = Config::default().security;
    for profile in ["", "unconfined", "docker-default", "containers-default-0.57.4"] {
        assert!(security.ignores_apparmor(profile), "{profile}");
    }
    for profile in ["docker-default-2", "my-nginx", "containers-default", "*"] {
        assert!(!security.ignores_apparmor(profile), "{profile}");
    }
}
