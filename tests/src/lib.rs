//! End-to-end tests and benchmarks: real guests, real clients.
