//! Programs of the host that are run to their end.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    thread,
};

use crate::{Context, Failure, Result};

/// Lines of a program's complaint that go into an error.
const LINES: usize = 4;

/// Runs a command to its end. Returns its standard output, or an error with the last lines of its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let mut text = String::new();
    run_lines(command, |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    Ok(text)
}

/// Runs a command to its end and passes on each line of its standard output as it comes.
pub fn run_lines(command: &mut Command, mut line: impl FnMut(&str)) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let what = format!("cannot run {name}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(&what)?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let errors = thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = errors.map(|mut errors| errors.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    });
    for bytes in output
        .map(BufReader::new)
        .into_iter()
        .flat_map(|output| output.split(b'\n'))
    {
        line(&String::from_utf8_lossy(&bytes.context(&what)?));
    }
    let status = child.wait().context(&what)?;
    if status.success() {
        return Ok(());
    }
    let errors = errors.join().unwrap_or_default();
    let lines: Vec<_> = errors.lines().filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LINES)..].join(" / ");
    Err(Failure::new(format!("{name} failed ({status})"), last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_tells_its_last_lines() {
        let script = |text: &str| run(Command::new("sh").args(["-c", text]));
        assert_eq!(script("echo a; echo b").unwrap(), "a\nb\n");
        let error = script("for n in 1 2 3 4 5; do echo $n >&2; done; exit 7").unwrap_err();
        assert_eq!(
            error.to_string(),
            "sh failed (exit status: 7): 2 / 3 / 4 / 5"
        );
        assert!(run(&mut Command::new("/nonexistent")).is_err());
    }
}
