//! "How many shadow pages live?", asked while two threads allocate and free: four ways to count, and what each costs.
//!
//! `cargo xtask bench --size-query` runs all three modes and makes one table of them:
//!
//! - without arguments: criterion's times, groups `query` and `update`;
//! - `errors`: how far each way's answers are from the truth, a line each;
//! - `instructions WAY query|update TIMES`: so many operations by one thread, for an instruction counter around it.

mod errors;
mod instructions;
mod load;
mod times;
mod ways;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["errors"] => errors::print(),
        ["instructions", way, operation, times] => instructions::execute(way, operation, times),
        _ => times::measure(),
    }
}
