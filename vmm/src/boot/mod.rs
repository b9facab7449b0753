//! What a guest finds in its memory when it starts.

pub mod cmdline;
pub mod mptable;
pub mod pvh;
