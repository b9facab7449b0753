//! Whether this machine can run husk, and what to do if not.

use std::time::Duration;

/// What to look at.
#[derive(Clone, Debug)]
pub struct Options {
    /// Boot a guest to the agent's hello, within this time. `None`: look only at what can be seen without.
    pub boot: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            boot: Some(Duration::from_secs(30)),
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What, e.g. `/dev/kvm`.
    pub name: &'static str,
    /// What was found.
    pub found: Result<String, Fault>,
}

/// What is wrong and how to put it right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

/// All that was looked at, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The items in the order they were looked at.
    pub items: Vec<Item>,
}

impl Report {
    /// Whether husk can run here.
    pub fn ok(&self) -> bool {
        self.items.iter().all(|item| item.found.is_ok())
    }
}

/// Looks at this machine. What is made for it is gone when this returns.
pub async fn check(_options: Options) -> Report {
    Report {
        items: vec![Item {
            name: "husk check",
            found: Err(Fault {
                problem: "not written yet".into(),
                remedy: "wait".into(),
            }),
        }],
    }
}
