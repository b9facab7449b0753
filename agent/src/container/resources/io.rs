//! `linux.resources.blockIO`.

use std::path::Path;

use oci_spec::runtime::LinuxBlockIo;

use super::{Plan, refuse};
use crate::fault::Fault;

impl Plan {
    pub(super) fn block_io(&mut self, io: &LinuxBlockIo) -> Result<(), Fault> {
        // A scheduler that the guest's kernel does not have.
        const NO_LEAF: &str = "cgroup v2 has no weights of leaves";
        if io.leaf_weight().is_some_and(|weight| weight != 0) {
            return refuse("blockIO.leafWeight", NO_LEAF);
        }
        if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
            self.set(
                "blockIO.weight",
                "io.weight",
                io_weight("blockIO.weight", weight)?,
            );
        }
        for (index, device) in io.weight_device().iter().flatten().enumerate() {
            let field = format!("blockIO.weightDevice[{index}]");
            if device.leaf_weight().is_some_and(|weight| weight != 0) {
                return refuse(&format!("{field}.leafWeight"), NO_LEAF);
            }
            let number = block_device(&field, device.major(), device.minor())?;
            if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
                let weight = io_weight(&format!("{field}.weight"), weight)?;
                self.set(&field, "io.weight", format!("{number} {weight}"));
            }
        }
        for (name, key, devices) in [
            ("throttleReadBpsDevice", "rbps", io.throttle_read_bps_device()),
            ("throttleWriteBpsDevice", "wbps", io.throttle_write_bps_device()),
            ("throttleReadIOPSDevice", "riops", io.throttle_read_iops_device()),
            (
                "throttleWriteIOPSDevice",
                "wiops",
                io.throttle_write_iops_device(),
            ),
        ] {
            for (index, device) in devices.iter().flatten().enumerate() {
                let field = format!("blockIO.{name}[{index}]");
                let number = block_device(&field, device.major(), device.minor())?;
                self.set(&field, "io.max", format!("{number} {key}={}", device.rate()));
            }
        }
        Ok(())
    }
}

/// `io.weight` (1 to 10000) for v1's weight (10 to 1000).
fn io_weight(field: &str, weight: u16) -> Result<String, Fault> {
    if !(10..=1000).contains(&weight) {
        return refuse(field, "is not within 10 to 1000");
    }
    Ok((1 + (u32::from(weight) - 10) * 9999 / 990).to_string())
}

/// The name that the kernel gives the device in its files.
fn block_device(field: &str, major: i64, minor: i64) -> Result<String, Fault> {
    let number = format!("{major}:{minor}");
    if Path::new("/sys/dev/block").join(&number).exists() {
        Ok(number)
    } else {
        refuse(field, format_args!("the guest has no block device {number}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_refused, pairs, settings};

    #[test]
    fn weights_are_converted_as_runc_does() {
        for (weight, expected) in [(10, "1"), (100, "910"), (500, "4950"), (1000, "10000")] {
            assert_eq!(
                settings(&format!(r#"{{"blockIO":{{"weight":{weight}}}}}"#)).unwrap(),
                pairs(&[("io.weight", expected)])
            );
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_refused(&[
            ("blockIO.weight", r#"{"blockIO":{"weight":9}}"#),
            ("blockIO.weight", r#"{"blockIO":{"weight":1001}}"#),
            ("blockIO.leafWeight", r#"{"blockIO":{"leafWeight":100}}"#),
            (
                "blockIO.weightDevice[0]",
                r#"{"blockIO":{"weightDevice":[{"major":4000,"minor":1,"weight":100}]}}"#,
            ),
            (
                "blockIO.weightDevice[0].leafWeight",
                r#"{"blockIO":{"weightDevice":[{"major":4000,"minor":1,"leafWeight":100}]}}"#,
            ),
            (
                "blockIO.throttleReadBpsDevice[0]",
                r#"{"blockIO":{"throttleReadBpsDevice":[{"major":4000,"minor":1,"rate":100}]}}"#,
            ),
            (
                "blockIO.throttleWriteIOPSDevice[0]",
                r#"{"blockIO":{"throttleWriteIOPSDevice":[{"major":-1,"minor":1,"rate":100}]}}"#,
            ),
        ]);
    }
}
