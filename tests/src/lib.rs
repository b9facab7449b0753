//! What the tests are made of: the machine they run on ([`testhost`]).

pub mod testhost;
