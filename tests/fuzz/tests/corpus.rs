//! The corpus, replayed without libFuzzer: what was found once stays mended. It needs root, as the file server's tests
//! do.

use husk_fuzz::{TARGETS, allocations, find};
use std::fs;
use std::path::{Path, PathBuf};

/// Most bytes of one input, and of all.
const MAX_INPUT: u64 = 4 << 10;
const MAX_CORPUS: u64 = 300 << 10;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("it can be read").path())
        .collect();
    paths.sort();
    paths
}

#[test]
fn every_input_of_the_corpus_is_taken() {
    for target in &TARGETS {
        let inputs = entries(&corpus().join(target.name));
        assert!(
            !inputs.is_empty(),
            "there is nothing to replay for {}",
            target.name
        );
        for input in inputs {
            let bytes = fs::read(&input).expect("it can be read");
            allocations::limit(target.allocation);
            let taken = std::panic::catch_unwind(|| (target.run)(&bytes));
            allocations::limit(usize::MAX);
            assert!(taken.is_ok(), "{} fails for {}", target.name, input.display());
        }
    }
}

#[test]
fn the_corpus_is_small_and_each_of_its_directories_a_targets() {
    let mut whole = 0;
    for directory in entries(&corpus()) {
        let name = directory
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        assert!(find(name).is_some(), "no target is called {name}");
        for input in entries(&directory) {
            let length = fs::metadata(&input).expect("it can be read").len();
            assert!(length <= MAX_INPUT, "{} has {length} bytes", input.display());
            whole += length;
        }
    }
    assert!(whole <= MAX_CORPUS, "the corpus has {whole} bytes");
}
