//! Where the volumes of the sandbox are in the guest: in the share, or in a mirror.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use husk_agent_protocol::messages::MirrorChange;

use super::{Error, Sandbox};
use crate::fault::Fault;

/// The directory of volumes in the share.
const SHARED: &str = ".volumes";

/// The directory of mirrors, beside the share.
const MIRRORS: &str = "mirrors";

/// Where the mirrors are if the share is at `share`.
fn mirrors(share: &Path) -> PathBuf {
    share.with_file_name(MIRRORS)
}

impl Sandbox {
    /// Changes the mirror of a volume, or makes it.
    pub fn update_mirror(&self, volume: u32, changes: &[MirrorChange]) -> Result<(), Error> {
        let directory = mirrors(&self.config.share);
        Ok(self.state().mirrors.update(&directory, volume, changes)?)
    }

    /// Forgets the mirror of a volume.
    pub fn remove_mirror(&self, volume: u32) {
        self.state().mirrors.remove(volume);
    }

    /// The sources of bind mounts in the guest: `volumes` gives the number of each, by its place in the spec's mounts;
    /// those at `mirrored` are in mirrors.
    pub(super) fn sources(
        &self,
        volumes: &HashMap<u32, u32>,
        mirrored: &[u32],
    ) -> Result<HashMap<u32, PathBuf>, Error> {
        let shared = self.config.share.join(SHARED);
        let mut sources: HashMap<u32, PathBuf> = volumes
            .iter()
            .map(|(index, number)| (*index, shared.join(number.to_string())))
            .collect();
        let state = self.state();
        for index in mirrored {
            let source = volumes
                .get(index)
                .and_then(|number| state.mirrors.source(*number));
            let missing = || Fault::spec(format_args!("mounts[{index}].source"), "the volume has no mirror");
            sources.insert(*index, source.ok_or_else(missing)?);
        }
        Ok(sources)
    }
}
