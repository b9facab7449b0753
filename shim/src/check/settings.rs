//! Settings of the host that husk cannot make up for: side channels of the processor between guests, and ways by which
//! a guest's memory or the host's kernel are more exposed than they have to be. What is advised is no condition.

use std::{fs, path::Path};

use super::{Fault, Found, fault};

/// Something that husk runs with, but that had better be otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// What it is about, e.g. `SMT`.
    pub name: &'static str,
    /// What is, and what to do.
    pub fault: Fault,
}

/// Looks at the settings below `root` (`/`, or a test's tree). What a kernel does not have is passed over.
pub fn advice(root: &Path) -> Vec<Advice> {
    let found = [
        ("side channels", vulnerabilities(root)),
        ("SMT", smt(root)),
        ("KSM", ksm(root)),
        ("huge pages", huge_pages(root)),
        ("swap", swap(root)),
        ("BPF", bpf(root)),
        ("Landlock", landlock(root)),
    ];
    let mut advice = Vec::new();
    for (name, found) in found {
        if let Some(Err(fault)) = found {
            advice.push(Advice { name, fault });
        }
    }
    advice
}

/// Whether user namespaces can be made: each VMM has one.
pub fn user_namespaces(root: &Path) -> Found {
    const SETTING: &str = "proc/sys/user/max_user_namespaces";
    match read(root, SETTING).and_then(|text| text.parse::<u64>().ok()) {
        Some(0) => fault(
            "the host allows no user namespace (user.max_user_namespaces is 0), and each VMM needs one",
            "sysctl -w user.max_user_namespaces=10000, and see /etc/sysctl.d for who sets it to 0",
        ),
        Some(most) => Ok(format!("at most {most}")),
        None => fault(
            "the host's kernel has no user namespaces, and each VMM needs one",
            "use a kernel with CONFIG_USER_NS",
        ),
    }
}

fn read(root: &Path, path: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(path)).ok()?;
    Some(text.trim().to_owned())
}

/// What the kernel says that the processor leaks. It writes the word in small letters where a mitigation has a gap.
fn vulnerabilities(root: &Path) -> Option<Found> {
    let entries = fs::read_dir(root.join("sys/devices/system/cpu/vulnerabilities")).ok()?;
    let mut open: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            let name = entry.file_name().into_string().ok()?;
            let open = text.to_lowercase().contains("vulnerable");
            open.then(|| format!("{name}: {}", text.trim()))
        })
        .collect();
    open.sort();
    if open.is_empty() {
        return None;
    }
    Some(fault(
        open.join("\n"),
        "update the firmware (microcode) and the kernel, and boot without mitigations=off; what only SMT leaves open \
         goes with it",
    ))
}

fn smt(root: &Path) -> Option<Found> {
    let on = read(root, "sys/devices/system/cpu/smt/active")? == "1";
    on.then(|| {
        fault(
            "two guests may run on one core at the same time, and learn of each other by its caches and units",
            "for tenants that are hostile to one another: boot with nosmt, or give each sandbox cores of its own \
             (core scheduling, cpusets of whole cores)",
        )
    })
}

fn ksm(root: &Path) -> Option<Found> {
    let runs = read(root, "sys/kernel/mm/ksm/run")? == "1";
    runs.then(|| {
        fault(
            "the kernel merges equal pages, by the timing of which programs learn what is in those of others",
            "echo 2 > /sys/kernel/mm/ksm/run (husk's guests do not offer theirs, but other programs do)",
        )
    })
}

/// A guest could stop a processor with the erratum behind "iTLB multihit".
fn huge_pages(root: &Path) -> Option<Found> {
    let erratum = read(root, "sys/devices/system/cpu/vulnerabilities/itlb_multihit")?;
    let setting = read(root, "sys/module/kvm/parameters/nx_huge_pages")?;
    let open =
        !erratum.starts_with("Not affected") && matches!(setting.as_str(), "N" | "0" | "off" | "never");
    open.then(|| {
        fault(
            "a guest can stop this processor for good (iTLB multihit): kvm.nx_huge_pages is off",
            "echo auto > /sys/module/kvm/parameters/nx_huge_pages, and take the setting off the kernel's command line",
        )
    })
}

fn swap(root: &Path) -> Option<Found> {
    let table = read(root, "proc/swaps")?;
    let places: Vec<&str> = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_ascii_whitespace().next())
        .filter(|place| !place.starts_with("/dev/zram"))
        .collect();
    if places.is_empty() {
        return None;
    }
    Some(fault(
        format!("guests' memory may be written to {}", places.join(", ")),
        "swapoff, or have it encrypted with a key that is new at each boot (memory.swap.max=0 of the sandboxes' cgroup \
         keeps theirs in memory)",
    ))
}

fn bpf(root: &Path) -> Option<Found> {
    let open = read(root, "proc/sys/kernel/unprivileged_bpf_disabled")? == "0";
    open.then(|| {
        fault(
            "each user may load programs into the kernel, with which speculation is steered",
            "sysctl -w kernel.unprivileged_bpf_disabled=1",
        )
    })
}

fn landlock(root: &Path) -> Option<Found> {
    let modules = read(root, "sys/kernel/security/lsm")?;
    if modules.split(',').any(|module| module == "landlock") {
        return None;
    }
    Some(fault(
        format!("not among the kernel's security modules ({modules}): VMMs are locked in without it"),
        format!("boot with lsm=landlock,{modules} (Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK)"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with these files.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    const CPU: &str = "sys/devices/system/cpu/";

    fn host(changes: &[(&str, &str)]) -> Vec<(&'static str, String)> {
        let cpu = |file: &str| format!("{CPU}{file}");
        let (l1tf, itlb, smt) = (
            cpu("vulnerabilities/l1tf"),
            cpu("vulnerabilities/itlb_multihit"),
            cpu("smt/active"),
        );
        let mut files = vec![
            (l1tf.as_str(), "Not affected\n"),
            (&itlb, "KVM: Mitigation: Split huge pages\n"),
            (&smt, "0\n"),
            ("sys/kernel/mm/ksm/run", "0\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
            (
                "proc/swaps",
                "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 1\n",
            ),
            ("proc/sys/kernel/unprivileged_bpf_disabled", "2\n"),
            ("sys/kernel/security/lsm", "lockdown,capability,landlock,yama"),
        ];
        files.extend(changes);
        let dir = tree(&files);
        let advice = advice(dir.path()).into_iter();
        advice
            .map(|advice| {
                assert!(!advice.fault.remedy.is_empty());
                (advice.name, advice.fault.problem)
            })
            .collect()
    }

    #[test]
    fn a_host_as_it_should_be_gets_no_advice() {
        assert_eq!(host(&[]), []);
    }

    #[test]
    fn a_kernel_that_says_nothing_gets_no_advice() {
        assert_eq!(advice(tree(&[]).path()), []);
    }

    #[test]
    fn each_setting_gets_its_advice() {
        let cases = [
            (
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Mitigation: Clear CPU buffers; SMT vulnerable\n",
                "side channels",
                "mds: Mitigation: Clear CPU buffers; SMT vulnerable",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/l1tf",
                "Vulnerable\n",
                "side channels",
                "l1tf: Vulnerable",
            ),
            ("sys/devices/system/cpu/smt/active", "1\n", "SMT", "one core"),
            ("sys/kernel/mm/ksm/run", "1\n", "KSM", "merges"),
            (
                "sys/module/kvm/parameters/nx_huge_pages",
                "never\n",
                "huge pages",
                "multihit",
            ),
            (
                "proc/swaps",
                "Filename Type\n/dev/sda2 partition 1 0 1\n/swapfile file 1 0 1\n",
                "swap",
                "/dev/sda2, /swapfile",
            ),
            (
                "proc/sys/kernel/unprivileged_bpf_disabled",
                "0\n",
                "BPF",
                "each user",
            ),
            (
                "sys/kernel/security/lsm",
                "capability,yama",
                "Landlock",
                "(capability,yama)",
            ),
        ];
        for (path, content, name, problem) in cases {
            let told = host(&[(path, content)]);
            assert_eq!(told.len(), 1, "{path}: {told:?}");
            assert_eq!(told[0].0, name);
            assert!(told[0].1.contains(problem), "{told:?}");
        }
    }

    #[test]
    fn a_processor_without_the_erratum_may_have_huge_pages() {
        let told = host(&[
            (
                "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
                "Not affected\n",
            ),
            ("sys/module/kvm/parameters/nx_huge_pages", "never\n"),
        ]);
        assert_eq!(told, []);
    }

    #[test]
    fn user_namespaces_are_a_condition() {
        const SETTING: &str = "proc/sys/user/max_user_namespaces";
        assert!(user_namespaces(tree(&[(SETTING, "96365\n")]).path()).is_ok());
        let refused = user_namespaces(tree(&[(SETTING, "0\n")]).path()).unwrap_err();
        assert!(refused.remedy.contains("user.max_user_namespaces"), "{refused:?}");
        assert!(user_namespaces(tree(&[]).path()).is_err());
    }
}
