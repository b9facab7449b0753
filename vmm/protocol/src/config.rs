//! The one message that configures a machine: JSON, the first packet on the VMM's control socket.

use serde::{Deserialize, Serialize};

/// Largest configuration message, in bytes.
pub const MAX_CONFIG_LEN: usize = 16 * 1024;

/// Version of this message; the VMM refuses another.
pub const CONFIG_VERSION: u32 = 1;

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 64;

/// Guest memory: smallest and largest size in MiB. The largest stays below the MMIO gap's upper neighbour's
/// limit of the layout (512 GiB).
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 64..=524_288;

/// Longest addition to the kernel's command line, in bytes.
pub const MAX_KERNEL_PARAMS_LEN: usize = 1024;

/// Most NICs of a machine.
pub const MAX_NICS: usize = 8;

/// Most queue pairs of a NIC. Each has a tap's descriptor and a thread in the VMM.
pub const MAX_QUEUE_PAIRS: u8 = 8;

/// A NIC of the machine: a virtio-net device in front of a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// The guest's MAC address: unicast and not all zeroes.
    pub mac: [u8; 6],
    /// Pairs of a receive and a transmit queue, 1 to [`MAX_QUEUE_PAIRS`]; as many descriptors of the tap are in
    /// the table (see [`crate::fds::vmm::TAPS`]).
    pub queue_pairs: u8,
}

impl NicConfig {
    fn check(&self, index: usize) -> Result<(), ConfigError> {
        if self.mac == [0; 6] || self.mac.first().is_some_and(|byte| byte & 1 == 1) {
            return Err(ConfigError::NicMac { index });
        }
        if self.queue_pairs == 0 || self.queue_pairs > MAX_QUEUE_PAIRS {
            return Err(ConfigError::NicQueuePairs {
                index,
                queue_pairs: self.queue_pairs,
            });
        }
        Ok(())
    }
}

/// A machine to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// [`CONFIG_VERSION`].
    pub version: u32,
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest memory in MiB, within [`MEMORY_MIB`]; the size of the memfd.
    pub memory_mib: u32,
    /// Added to the kernel's command line: printable ASCII, at most [`MAX_KERNEL_PARAMS_LEN`] bytes. From the
    /// operator's configuration only.
    #[serde(default)]
    pub kernel_params: String,
    /// The machine's NICs in the order in which the guest finds them, at most [`MAX_NICS`].
    #[serde(default)]
    pub nics: Vec<NicConfig>,
}

/// Why a configuration message is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Longer than [`MAX_CONFIG_LEN`].
    #[error("the configuration message has {0} bytes; at most {MAX_CONFIG_LEN} are allowed")]
    TooLong(usize),
    /// Not the JSON of a [`MachineConfig`].
    #[error("the configuration message is not valid")]
    Json(#[from] serde_json::Error),
    /// Another version of husk sent it.
    #[error(
        "the configuration message has version {0}, this VMM speaks {CONFIG_VERSION}; install shim and VMM of one version"
    )]
    Version(u32),
    /// Number of vCPUs out of range.
    #[error("{0} vCPUs asked for; 1 to {MAX_VCPUS} are possible")]
    Vcpus(u8),
    /// Memory size out of range.
    #[error("{0} MiB of memory asked for; {start} to {end} are possible", start = MEMORY_MIB.start(), end = MEMORY_MIB.end())]
    Memory(u32),
    /// Kernel parameters too long or not printable ASCII.
    #[error("the kernel parameters are longer than {MAX_KERNEL_PARAMS_LEN} bytes or not printable ASCII")]
    KernelParams,
    /// Too many NICs.
    #[error("{0} NICs asked for; at most {MAX_NICS} are possible")]
    Nics(usize),
    /// A NIC's MAC address is none that a NIC can have.
    #[error("nics[{index}].mac is not a unicast address")]
    NicMac {
        /// Which NIC.
        index: usize,
    },
    /// Number of queue pairs out of range.
    #[error("nics[{index}].queue_pairs is {queue_pairs}; 1 to {MAX_QUEUE_PAIRS} are possible")]
    NicQueuePairs {
        /// Which NIC.
        index: usize,
        /// Asked for.
        queue_pairs: u8,
    },
}

impl MachineConfig {
    /// The message as it travels.
    ///
    /// # Errors
    /// When this is not a configuration that [`MachineConfig::decode`] would take.
    pub fn encode(&self) -> Result<Vec<u8>, ConfigError> {
        self.check()?;
        let bytes = serde_json::to_vec(self)?;
        if bytes.len() > MAX_CONFIG_LEN {
            return Err(ConfigError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads and checks a message.
    ///
    /// # Errors
    /// For anything but the whole, valid message of this version.
    pub fn decode(message: &[u8]) -> Result<Self, ConfigError> {
        if message.len() > MAX_CONFIG_LEN {
            return Err(ConfigError::TooLong(message.len()));
        }
        let config: Self = serde_json::from_slice(message)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.version != CONFIG_VERSION {
            return Err(ConfigError::Version(self.version));
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if !MEMORY_MIB.contains(&self.memory_mib) {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        let params = self.kernel_params.as_bytes();
        if params.len() > MAX_KERNEL_PARAMS_LEN || !params.iter().all(|b| (b' '..=b'~').contains(b)) {
            return Err(ConfigError::KernelParams);
        }
        if self.nics.len() > MAX_NICS {
            return Err(ConfigError::Nics(self.nics.len()));
        }
        for (index, nic) in self.nics.iter().enumerate() {
            nic.check(index)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn machine() -> MachineConfig {
        MachineConfig {
            version: CONFIG_VERSION,
            vcpus: 2,
            memory_mib: 256,
            kernel_params: "quiet".into(),
            nics: vec![
                NIC,
                NicConfig {
                    queue_pairs: 8,
                    ..NIC
                },
            ],
        }
    }

    const NIC: NicConfig = NicConfig {
        mac: [2, 0x42, 0, 0, 0, 1],
        queue_pairs: 1,
    };

    #[test]
    fn round_trip() {
        assert_eq!(
            MachineConfig::decode(&machine().encode().unwrap()).unwrap(),
            machine()
        );
    }

    #[test]
    fn out_of_range_values_are_refused() {
        for bad in [
            MachineConfig {
                version: 2,
                ..machine()
            },
            MachineConfig {
                vcpus: 0,
                ..machine()
            },
            MachineConfig {
                vcpus: 65,
                ..machine()
            },
            MachineConfig {
                memory_mib: 0,
                ..machine()
            },
            MachineConfig {
                memory_mib: u32::MAX,
                ..machine()
            },
            MachineConfig {
                kernel_params: "a\nb".into(),
                ..machine()
            },
            MachineConfig {
                kernel_params: "x".repeat(1025),
                ..machine()
            },
            MachineConfig {
                nics: vec![NIC; 9],
                ..machine()
            },
            MachineConfig {
                nics: vec![NIC, NicConfig { mac: [0; 6], ..NIC }],
                ..machine()
            },
            MachineConfig {
                nics: vec![NicConfig {
                    mac: [0xff; 6],
                    ..NIC
                }],
                ..machine()
            },
            MachineConfig {
                nics: vec![NicConfig {
                    queue_pairs: 0,
                    ..NIC
                }],
                ..machine()
            },
            MachineConfig {
                nics: vec![NicConfig {
                    queue_pairs: 9,
                    ..NIC
                }],
                ..machine()
            },
        ] {
            let bytes = serde_json::to_vec(&bad).unwrap();
            assert!(MachineConfig::decode(&bytes).is_err(), "{bad:?}");
            assert!(bad.encode().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        let message = br#"{"version":1,"vcpus":1,"memory_mib":128,"path":"/etc/shadow"}"#;
        assert!(MachineConfig::decode(message).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let _ = MachineConfig::decode(&bytes);
        }

        #[test]
        fn damaged_messages_are_read_without_panic(at in 0usize..60, byte in any::<u8>()) {
            let mut bytes = machine().encode().unwrap();
            if let Some(b) = bytes.get_mut(at) { *b = byte; }
            if let Ok(config) = MachineConfig::decode(&bytes) { prop_assert!(config.check().is_ok()); }
        }
    }
}
