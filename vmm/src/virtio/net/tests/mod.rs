//! The whole device, with sockets in place of taps, and with real ones where they can be had.

mod control;
mod device;
mod hostile;
mod machine;
mod receive;
mod tap;
mod transmit;
