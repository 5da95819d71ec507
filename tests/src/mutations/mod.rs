//! Mutations: small patches that each break one promise of Fanlight, and the test that must fail with it.
//!
//! Tests that pass say little by themselves. `cargo mutations` applies each patch of `tests/mutations/` to a copy of the
//! checkout and runs the test that the patch names. A mutation that the test does not see has survived.

mod checkout_copy;
mod patch;
mod run;

pub use checkout_copy::CheckoutCopy;
pub use patch::{CatchingTest, Mutation, Suite, mutations};
pub use run::{Outcome, Runner};
