//! What takes back the steps that were done, last one first.

use std::io;

type Step = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A stack of undos. One that is dropped runs, so that an early return leaves nothing behind.
#[derive(Default)]
pub struct Undo(Vec<(&'static str, Step)>);

impl std::fmt::Debug for Undo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

impl Undo {
    /// Adds what takes back the step just done (or about to be done, if it bears that). `name` is for the log: what
    /// the undo does.
    pub fn push(&mut self, name: &'static str, undo: impl FnOnce() -> io::Result<()> + Send + 'static) {
        self.0.push((name, Box::new(undo)));
    }

    /// Runs all undos, whatever fails, and forgets them.
    pub fn run(&mut self) {
        while let Some((name, undo)) = self.0.pop() {
            if let Err(error) = undo() {
                tracing::error!(%error, "undo failed: {name}");
            }
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        self.run();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn undos_run_once_in_reverse_and_a_failure_stops_none() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let step = |number: i32, result: io::Result<()>| {
            let order = Arc::clone(&order);
            move || {
                order.lock().unwrap().push(number);
                result
            }
        };
        let mut undo = Undo::default();
        undo.push("first", step(1, Ok(())));
        undo.push("second", step(2, Err(io::ErrorKind::Other.into())));
        undo.push("third", step(3, Ok(())));
        undo.run();
        drop(undo);
        assert_eq!(*order.lock().unwrap(), [3, 2, 1]);
    }

    #[test]
    fn a_dropped_stack_runs() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut undo = Undo::default();
        undo.push("step", move || sender.send(()).map_err(io::Error::other));
        drop(undo);
        receiver.try_recv().unwrap();
    }
}
