//! The line behind which guests run: vCPUs pass it together, once the system calls of all threads have been limited, or
//! not at all.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

/// See the module.
#[derive(Debug)]
pub struct StartLine {
    barrier: Barrier,
    refused: AtomicBool,
}

impl StartLine {
    /// For as many threads, each of which comes to it once.
    pub fn new(threads: usize) -> Self {
        Self {
            barrier: Barrier::new(threads),
            refused: AtomicBool::new(false),
        }
    }

    /// Waits for all others. Whether every one of them came here `limited`: if not, nobody may go on.
    #[must_use]
    pub fn pass(&self, limited: bool) -> bool {
        if !limited {
            self.refused.store(true, Ordering::SeqCst);
        }
        self.barrier.wait();
        !self.refused.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    /// How many of these threads go on.
    fn that_go_on(limited: &[bool]) -> usize {
        let line = Arc::new(StartLine::new(limited.len()));
        let threads: Vec<_> = limited
            .iter()
            .map(|limited| {
                let (line, limited) = (Arc::clone(&line), *limited);
                thread::spawn(move || line.pass(limited))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| usize::from(thread.join().unwrap()))
            .sum()
    }

    #[test]
    fn one_that_is_not_limited_holds_all() {
        for _ in 0..100 {
            assert_eq!(that_go_on(&[true, true, false, true]), 0);
            assert_eq!(that_go_on(&[true, true, true, true]), 4);
        }
    }

    #[test]
    fn nobody_goes_on_before_the_last() {
        let line = Arc::new(StartLine::new(2));
        let gone_on = Arc::new(AtomicBool::new(false));
        let (lines, goes_on) = (Arc::clone(&line), Arc::clone(&gone_on));
        let first = thread::spawn(move || goes_on.store(lines.pass(true), Ordering::SeqCst));
        thread::sleep(std::time::Duration::from_millis(50));
        assert!(!gone_on.load(Ordering::SeqCst));
        assert!(line.pass(true));
        first.join().unwrap();
        assert!(gone_on.load(Ordering::SeqCst));
    }
}
