//! `cargo mutations`: breaks the program in each way that `tests/mutations/` has, and looks whether the tests notice.
//! Arguments are parts of the names of mutations; without any, all run. Prints a table of the book.

use std::{process::ExitCode, time::Instant};

use fanlight_tests::{
    Failure, Result,
    mutations::{Mutation, Outcome, Runner, mutations},
};

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    match run(&wanted) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fanlight: the mutations cannot run: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all were caught.
fn run(wanted: &[String]) -> Result<bool> {
    let is_wanted = |mutation: &Mutation| {
        let mut parts = wanted.iter();
        wanted.is_empty() || parts.any(|part| mutation.name.contains(part))
    };
    let mut mutations = mutations()?;
    mutations.retain(is_wanted);
    if mutations.is_empty() {
        return Err(Failure(format!(
            "no mutation has a name with one of {wanted:?}: see tests/mutations"
        )));
    }
    let start = Instant::now();
    let mut runner = Runner::new()?;
    eprintln!("fanlight: running the tests without a mutation");
    runner.run_unchanged(&mutations)?;
    let mut rows = Vec::new();
    let mut caught = 0;
    for (number, mutation) in (1..).zip(&mutations) {
        let name = &mutation.name;
        let verdict = match runner.run(mutation) {
            Ok(Outcome::Failed) => "caught".to_owned(),
            Ok(Outcome::Passed) => "**survived**".to_owned(),
            Err(error) => format!("**invalid**: {error}"),
        };
        caught += usize::from(verdict == "caught");
        eprintln!(
            "fanlight: {number} of {}, {:.0} s: {name}: {verdict}",
            mutations.len(),
            start.elapsed().as_secs_f64()
        );
        let verdict = verdict.lines().next().unwrap_or_default();
        rows.push(mutation.row(verdict));
    }
    println!("| mutation | breaks | test | |");
    println!("|---|---|---|---|");
    for row in rows {
        println!("{row}");
    }
    println!("\n{caught} of {} caught", mutations.len());
    Ok(caught == mutations.len())
}
