//! What the tests are made of: the machine they run on ([`testhost`]), and what they send ([`traffic`]).

pub mod testhost;
pub mod traffic;
