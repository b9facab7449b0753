//! The kernel's command line.

use crate::layout;

/// What every guest is told. The console is the virtio one, which costs no exit per byte; a reset is asked for by
/// the keyboard controller's reset line; a panic resets at once; the CPU's random numbers are trusted (KVM's host
/// provides them), so that boot waits for no entropy. Warnings and worse are written to the console, all else stays
/// in the kernel's log: each line is a round trip to this process, and a whole boot's took a fifth of its time. No
/// dummy interface is made that nobody asked for.
const BASE: &str = "console=hvc0 loglevel=5 reboot=k panic=-1 random.trust_cpu=on dummy.numdummies=0";

/// The command line does not fit.
#[derive(Debug, thiserror::Error)]
#[error("the kernel's command line has {0} bytes, at most {max} fit; shorten kernel_params", max = layout::COMMAND_LINE_MAX - 1)]
pub struct TooLong(usize);

/// The command line of a guest with `devices` virtio-mmio devices, `params` at its end.
///
/// # Errors
/// When it is longer than what the kernel takes.
pub fn build(devices: usize, params: &str) -> Result<String, TooLong> {
    let mut line = String::from(BASE);
    for slot in 0..devices {
        line.push_str(&format!(
            " virtio_mmio.device={}K@{:#x}:{}",
            layout::VIRTIO_SIZE / 1024,
            layout::virtio_base(slot),
            layout::virtio_irq(slot)
        ));
    }
    if !params.is_empty() {
        line.push(' ');
        line.push_str(params);
    }
    if line.len() >= layout::COMMAND_LINE_MAX {
        return Err(TooLong(line.len()));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::build;

    #[test]
    fn devices_and_parameters_follow_the_base() {
        let line = build(2, "loglevel=3").unwrap();
        assert!(
            line.ends_with(
                " virtio_mmio.device=4K@0xc0000000:5 virtio_mmio.device=4K@0xc0001000:6 loglevel=3"
            ),
            "{line}"
        );
    }

    #[test]
    fn too_long_a_line_is_refused() {
        assert!(build(19, &"x".repeat(1024)).is_ok());
        assert!(build(0, &"x".repeat(2047)).is_err());
    }
}
