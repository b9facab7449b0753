//! Annotations `io.husk.*` of config.json: what a pod's author may wish, where the operator allows it by name.

use std::collections::HashMap;

use husk_vmm_protocol::config::{MAX_VCPUS, MEMORY_MIB};

use super::{Config, GuestLogLevel, options::kernel_params};

/// What the names of husk's annotations begin with.
pub const PREFIX: &str = "io.husk.";

/// An annotation that husk knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Annotation {
    /// The machine's number of vCPUs.
    Vcpus,
    /// The machine's memory in MiB, all of it.
    MemoryMib,
    /// Added to the guest kernel's command line.
    KernelParams,
    /// What of the guest's kernel log reaches the console.
    GuestLogLevel,
}

impl Annotation {
    const ALL: [(&str, Self); 4] = [
        ("io.husk.vcpus", Self::Vcpus),
        ("io.husk.memory_mib", Self::MemoryMib),
        ("io.husk.kernel_params", Self::KernelParams),
        ("io.husk.guest_log_level", Self::GuestLogLevel),
    ];

    /// The annotation of a name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, annotation)| *annotation)
    }

    /// All names, for a message.
    pub fn names() -> String {
        Self::ALL.map(|(name, _)| name).join(", ")
    }
}

/// What the annotations of a container wish for its sandbox. `None`: nothing.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Wishes {
    /// Number of vCPUs.
    pub vcpus: Option<u8>,
    /// Memory in MiB.
    pub memory_mib: Option<u32>,
    /// Added to the guest kernel's command line.
    pub kernel_params: Option<String>,
    /// What of the guest's kernel log reaches the console.
    pub guest_log_level: Option<GuestLogLevel>,
}

/// Why an annotation is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// None of husk's has this name.
    #[error("annotation {0}: husk has no such annotation; it has {names}", names = Annotation::names())]
    Unknown(String),
    /// The operator did not allow it.
    #[error(
        "annotation {0}: not allowed; an operator allows it by the option `allowed` in [annotations] of husk.toml"
    )]
    NotAllowed(String),
    /// Its value is wrong.
    #[error("annotation {name}: {value:?} is not possible: it {problem}")]
    Value {
        /// Its name.
        name: String,
        /// Its value, as it was written.
        value: String,
        /// What it must be.
        problem: String,
    },
    /// The sandbox runs already and is different.
    #[error("annotation {0}: the sandbox was started with another value, and cannot be changed")]
    TooLate(String),
}

impl Wishes {
    /// Reads the annotations of a container. Whatever does not begin with [`PREFIX`] is none of husk's business.
    ///
    /// # Errors
    /// For one that is unknown, not allowed or wrong.
    pub fn read(
        annotations: Option<&HashMap<String, String>>,
        config: &Config,
        most: Most,
    ) -> Result<Self, AnnotationError> {
        let mut own: Vec<(&String, &String)> = annotations
            .into_iter()
            .flatten()
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        // The same error every time.
        own.sort();
        let mut wishes = Self::default();
        for (name, value) in own {
            let annotation = Annotation::of(name).ok_or_else(|| AnnotationError::Unknown(name.clone()))?;
            if !config.allowed_annotations.contains(&annotation) {
                return Err(AnnotationError::NotAllowed(name.clone()));
            }
            wishes
                .set(annotation, value, most)
                .map_err(|problem| AnnotationError::Value {
                    name: name.clone(),
                    value: value.clone(),
                    problem,
                })?;
        }
        Ok(wishes)
    }

    fn set(&mut self, annotation: Annotation, value: &str, most: Most) -> Result<(), String> {
        let number = |least: u32, most: u32| {
            let wanted = || format!("must be a whole number from {least} to {most}");
            let number: u32 = value.parse().map_err(|_| wanted())?;
            if (least..=most).contains(&number) {
                Ok(number)
            } else {
                Err(wanted())
            }
        };
        match annotation {
            Annotation::Vcpus => {
                let number = number(1, most.vcpus.min(MAX_VCPUS).into())?;
                self.vcpus = u8::try_from(number).ok();
            }
            Annotation::MemoryMib => {
                self.memory_mib = Some(number(*MEMORY_MIB.start(), most.memory_mib)?);
            }
            Annotation::KernelParams => self.kernel_params = Some(kernel_params(value)?),
            Annotation::GuestLogLevel => {
                let level = GuestLogLevel::of(value);
                self.guest_log_level =
                    Some(level.ok_or_else(|| format!("must be one of {}", GuestLogLevel::NAMES.join(", ")))?);
            }
        }
        Ok(())
    }

    /// Whether a sandbox that was started for `self` can take a container that wishes `later`. What the later one
    /// does not mention is as it is.
    ///
    /// # Errors
    /// `TooLate`.
    pub fn admit(&self, later: &Self) -> Result<(), AnnotationError> {
        let differs = [
            (
                "io.husk.vcpus",
                later.vcpus.is_some() && later.vcpus != self.vcpus,
            ),
            (
                "io.husk.memory_mib",
                later.memory_mib.is_some() && later.memory_mib != self.memory_mib,
            ),
            (
                "io.husk.kernel_params",
                later.kernel_params.is_some() && later.kernel_params != self.kernel_params,
            ),
            (
                "io.husk.guest_log_level",
                later.guest_log_level.is_some() && later.guest_log_level != self.guest_log_level,
            ),
        ];
        match differs.into_iter().find(|(_, differs)| *differs) {
            Some((name, _)) => Err(AnnotationError::TooLate(name.to_owned())),
            None => Ok(()),
        }
    }

    /// The guest kernel's parameters: the operator's, and what was wished.
    pub fn kernel_params(&self, config: &Config) -> String {
        let level = self.guest_log_level.map(GuestLogLevel::parameter);
        let more: Vec<&str> = [level.as_deref(), self.kernel_params.as_deref()]
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect();
        config.kernel_params(Some(&more.join(" ")))
    }
}

/// The largest machine that may be wished for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}
