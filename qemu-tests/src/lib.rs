//! The harness of the emulator tests: boot a manifest, look at what the machine said.
//!
//! Each file in tests/ is one subject. What is expected of the console:
//!
//! ```text
//! [NAME] a line of guest NAME
//! umbra: a line of the hypervisor
//! umbra: guest NAME ended: power-off          (or: exit CODE, reset, crash)
//! umbra: exit N                               the verdict: 0 if every guest ended as expected
//! ```

pub mod boot;
pub mod skip;
pub mod verdict;

pub use boot::{Boot, SMALL_TIMEOUT};
pub use verdict::Verdict;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// Emulators that run at once: a machine of two cores has no use for more.
const EMULATORS_AT_ONCE: usize = 2;

/// A test. It may end early with [`skip::Skip`] as its error, which is no failure.
pub fn test(name: impl Into<String>, run: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, || match run() {
        Ok(()) => Ok(Completion::Completed),
        Err(error) => match error.downcast_ref::<skip::Skip>() {
            Some(skip) => Ok(Completion::ignored_with(&skip.0)),
            None => Err(Failed::from(format!("{error:#}"))),
        },
    })
}

/// Runs the tests of a file; its `main`.
pub fn main(tests: Vec<Trial>) -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(EMULATORS_AT_ONCE).min(EMULATORS_AT_ONCE));
    libtest_mimic::run(&arguments, tests).exit_code()
}
