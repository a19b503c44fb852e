//! vireod as its clients and its machine's owner see it.

mod common;
mod definitions;
mod lifecycle;
