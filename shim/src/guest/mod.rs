//! The two things on the other side: the machine (launched and controlled), and the agent in it (called).

pub mod agent;
pub mod console;
pub mod log;
mod paced;
pub mod proof;
pub mod vm;
