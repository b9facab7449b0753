//! The order in which a task's events may be published.
//!
//! The engine reports an exit as soon as it happens, which may be before the call that started the process has
//! returned here. Whoever listens must see a start before its exit, and a container's own exit after the exits of
//! its execs. This holds what comes too early until it may go. It has no clock, no lock and no wire.

use std::collections::HashMap;

use crate::engine::Exit;

/// Something to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// `TaskStart`, or `TaskExecStarted` for an exec.
    Started {
        /// The container.
        container: String,
        /// The exec; `None`: the init process.
        exec: Option<String>,
    },
    /// `TaskOOM`.
    Oom {
        /// The container.
        container: String,
    },
    /// `TaskExit`.
    Exited {
        /// The container.
        container: String,
        /// The exec; `None`: the init process.
        exec: Option<String>,
        /// How it ended.
        exit: Exit,
    },
}

/// Where the listener believes a process to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Announced as created or added.
    Created,
    /// Its creation or its start is under way; an exit that came meanwhile waits.
    Busy(Option<Exit>),
    /// Announced as started.
    Started,
    /// Announced as exited, or never to be announced.
    Over,
}

#[derive(Debug)]
struct Container {
    init: Phase,
    execs: HashMap<String, Phase>,
    /// The init process's exit, waiting for execs whose start is under way.
    withheld: Option<Exit>,
    /// A kill for want of memory that came while the init process's creation or start was under way.
    oom: bool,
}

/// What has been announced of each process.
#[derive(Debug, Default)]
pub struct Order {
    containers: HashMap<String, Container>,
}

impl Order {
    /// A container is about to be created. Its exit is held until [`created`](Self::created).
    pub fn creating(&mut self, container: &str) {
        self.containers.insert(
            container.to_owned(),
            Container {
                init: Phase::Busy(None),
                execs: HashMap::new(),
                withheld: None,
                oom: false,
            },
        );
    }

    /// The container has been announced as created.
    pub fn created(&mut self, container: &str) -> Vec<Announcement> {
        let Some(phase) = self.phase(container, None) else {
            return Vec::new();
        };
        let Phase::Busy(exit) = *phase else {
            return Vec::new();
        };
        *phase = Phase::Created;
        let mut out = self.release_oom(container);
        if let Some(exit) = exit {
            out.extend(self.exited(container, None, exit));
        }
        out
    }

    /// An exec was added to a container.
    pub fn added(&mut self, container: &str, exec: &str) {
        if let Some(container) = self.containers.get_mut(container) {
            container.execs.insert(exec.to_owned(), Phase::Created);
        }
    }

    /// A start is about to be asked for. False when the process is unknown or was started before.
    pub fn starting(&mut self, container: &str, exec: Option<&str>) -> bool {
        match self.phase(container, exec) {
            Some(phase @ Phase::Created) => {
                *phase = Phase::Busy(None);
                true
            }
            _ => false,
        }
    }

    /// The start that [`starting`](Self::starting) announced has succeeded.
    pub fn started(&mut self, container: &str, exec: Option<&str>) -> Vec<Announcement> {
        let Some(phase) = self.phase(container, exec) else {
            return Vec::new();
        };
        let Phase::Busy(exit) = *phase else {
            return Vec::new();
        };
        *phase = Phase::Started;
        let mut out = vec![Announcement::Started {
            container: container.to_owned(),
            exec: exec.map(str::to_owned),
        }];
        out.extend(self.release_oom(container));
        match exit {
            Some(exit) => out.extend(self.exited(container, exec, exit)),
            None => out.extend(self.release(container)),
        }
        out
    }

    /// The start that [`starting`](Self::starting) announced has failed. An exec that never ran has no exit; a
    /// container that was created has one.
    pub fn start_failed(&mut self, container: &str, exec: Option<&str>) -> Vec<Announcement> {
        let Some(phase) = self.phase(container, exec) else {
            return Vec::new();
        };
        let Phase::Busy(exit) = *phase else {
            return Vec::new();
        };
        if exec.is_some() {
            *phase = Phase::Over;
            return self.release(container);
        }
        *phase = Phase::Created;
        let mut out = self.release_oom(container);
        if let Some(exit) = exit {
            out.extend(self.exited(container, None, exit));
        }
        out
    }

    /// The start that [`starting`](Self::starting) announced was not tried: the process is as it was.
    pub fn start_refused(&mut self, container: &str, exec: Option<&str>) -> Vec<Announcement> {
        let Some(phase) = self.phase(container, exec) else {
            return Vec::new();
        };
        let Phase::Busy(exit) = *phase else {
            return Vec::new();
        };
        if exec.is_none() || exit.is_some() {
            return self.start_failed(container, exec);
        }
        *phase = Phase::Created;
        self.release(container)
    }

    /// The kernel killed a process of the container for want of memory.
    pub fn oom(&mut self, container: &str) -> Vec<Announcement> {
        if let Some(container) = self.containers.get_mut(container) {
            container.oom = container.init != Phase::Over;
        }
        self.release_oom(container)
    }

    /// A process ended.
    pub fn exited(&mut self, container: &str, exec: Option<&str>, exit: Exit) -> Vec<Announcement> {
        let Some(phase) = self.phase(container, exec) else {
            return Vec::new();
        };
        match phase {
            Phase::Over => return Vec::new(),
            Phase::Busy(slot) => {
                *slot = Some(exit);
                return Vec::new();
            }
            // An exec that was never started has no exit to tell of.
            Phase::Created if exec.is_some() => {
                *phase = Phase::Over;
                return self.release(container);
            }
            Phase::Created | Phase::Started => {}
        }
        if exec.is_some() {
            *phase = Phase::Over;
            let mut out = vec![Announcement::Exited {
                container: container.to_owned(),
                exec: exec.map(str::to_owned),
                exit,
            }];
            out.extend(self.release(container));
            out
        } else {
            if let Some(container) = self.containers.get_mut(container) {
                container.withheld.get_or_insert(exit);
            }
            self.release(container)
        }
    }

    /// Whether nothing more is to be told of the process: the listener knows of its end, it is an exec that never
    /// ran, or there is no such process.
    pub fn is_over(&self, container: &str, exec: Option<&str>) -> bool {
        let Some(container) = self.containers.get(container) else {
            return true;
        };
        match exec {
            None => container.init == Phase::Over,
            Some(exec) => container
                .execs
                .get(exec)
                .is_none_or(|phase| matches!(phase, Phase::Over | Phase::Created)),
        }
    }

    /// A container or an exec was deleted: nothing more is told of it.
    pub fn forget(&mut self, container: &str, exec: Option<&str>) -> Vec<Announcement> {
        match exec {
            None => {
                self.containers.remove(container);
                Vec::new()
            }
            Some(exec) => {
                if let Some(container) = self.containers.get_mut(container) {
                    container.execs.remove(exec);
                }
                self.release(container)
            }
        }
    }

    fn phase(&mut self, container: &str, exec: Option<&str>) -> Option<&mut Phase> {
        let container = self.containers.get_mut(container)?;
        match exec {
            None => Some(&mut container.init),
            Some(exec) => container.execs.get_mut(exec),
        }
    }

    fn release_oom(&mut self, id: &str) -> Vec<Announcement> {
        match self.containers.get_mut(id) {
            Some(container) if container.oom && !matches!(container.init, Phase::Busy(_)) => {
                container.oom = false;
                vec![Announcement::Oom {
                    container: id.to_owned(),
                }]
            }
            _ => Vec::new(),
        }
    }

    /// The init process's exit, if it waits and no exec's start is under way.
    fn release(&mut self, id: &str) -> Vec<Announcement> {
        let Some(container) = self.containers.get_mut(id) else {
            return Vec::new();
        };
        let busy = |phase: &Phase| matches!(phase, Phase::Busy(_));
        if busy(&container.init) || container.execs.values().any(busy) {
            return Vec::new();
        }
        let Some(exit) = container.withheld.take() else {
            return Vec::new();
        };
        container.init = Phase::Over;
        vec![Announcement::Exited {
            container: id.to_owned(),
            exec: None,
            exit,
        }]
    }
}

#[cfg(test)]
#[path = "order_test.rs"]
mod tests;
