//! The device as its guest and its engine see it.

mod device;
mod hostile;
mod machine;
mod offers;
mod stream;
