//! Freezing a container: its processes stand still wherever they are, and only SIGKILL reaches them.

use std::io;

use super::{
    cgroup::Cgroup,
    changes::{Changes, counter},
};

impl Cgroup {
    /// Freezes all processes in it and below; answers when they stand still. One that waits for a device or the share
    /// without heeding signals keeps it waiting: the caller bounds the time, and thaws.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub async fn freeze(&self) -> io::Result<()> {
        let mut events = Changes::new(&self.path().join("cgroup.events"))?;
        self.write("cgroup.freeze", "1")?;
        while counter(&events.read()?, "frozen") != 1 {
            events.changed().await?;
        }
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    ///
    /// The cgroup is gone.
    pub fn thaw(&self) -> io::Result<()> {
        self.write("cgroup.freeze", "0")
    }
}
