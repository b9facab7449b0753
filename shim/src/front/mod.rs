//! What engines and users say, turned into calls of the engine; nothing else.
//!
//! The shim: [`bootstrap`] reads how containerd calls it; [`start`], [`delete`] and [`info`] are its short-lived
//! commands and [`serve`] the server that `start` leaves behind. In the server, [`task`] is containerd's service
//! and [`pod`] the tasks behind it; [`order`] and [`publish`] carry their events, [`metrics`] what they used.
//!
//! The command: [`cli`] is its grammar; [`run`], [`report`], [`facts`], [`ps`], [`peek`] and [`spec`] do what it says.
//!
//! For both: [`options`] and [`settings`] find the configuration and what a sandbox is started with, [`log`] is the
//! process's log.

pub mod bootstrap;
pub mod bundle;
pub mod cli;
pub mod delete;
pub mod facts;
pub mod info;
pub mod io;
pub mod log;
pub mod logger;
pub mod metrics;
pub mod options;
pub mod order;
pub mod peek;
pub mod pod;
pub mod ps;
pub mod publish;
pub mod report;
pub mod run;
pub mod serve;
pub mod settings;
pub mod sizing;
pub mod socket;
pub mod spec;
pub mod start;
pub mod status;
pub mod task;
pub mod terminal;
