//! Errors of the command line in the form of all other errors: one line with the argument, the reason and the
//! next step.

use std::num::ParseIntError;

use clap::{
    Error,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{command, option_table};

/// Prints help, a version or an error, and returns the exit status.
pub fn report(error: &Error, arguments: &[String]) -> u8 {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        // A reader that closed the pipe wants no more.
        let _ = error.print();
    } else {
        eprintln!("fanlight: {}", line(error, arguments));
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

/// The error as one line. `arguments` are those of the program, without its name.
pub fn line(error: &Error, arguments: &[String]) -> String {
    let command = Typed::of(arguments);
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        Some(ContextValue::StyledStr(text)) => Some(text.to_string()),
        Some(ContextValue::StyledStrs(texts)) => texts.first().map(ToString::to_string),
        _ => None,
    };
    let get = |kind| text(kind).unwrap_or_default();
    let argument = get(ContextKind::InvalidArg);
    // clap writes "--disk <DISK>"; the user wrote "--disk".
    let name = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let value = get(ContextKind::InvalidValue);
    let suggested =
        |kind| text(kind).map_or(String::new(), |text| format!("; did you mean {text}?"));
    let see = command.see(name);
    match error.kind() {
        ErrorKind::ValueValidation => {
            let source = std::error::Error::source(error);
            let why = match source.and_then(|source| source.downcast_ref::<ParseIntError>()) {
                Some(_) => "not a whole number".into(),
                None => source.map_or(String::new(), ToString::to_string),
            };
            let value = if value.is_empty() { "\"\"" } else { &value };
            format!("{} {value}: {why}; {see}", command.named(name))
        }
        ErrorKind::InvalidValue if value.is_empty() => {
            let valid = get(ContextKind::ValidValue);
            let values = if valid.is_empty() {
                valid
            } else {
                format!(": {valid}")
            };
            format!("{}: needs a value{values}; {see}", command.named(name))
        }
        ErrorKind::InvalidValue => format!(
            "{} {value}: not one of {}{}; {see}",
            command.named(name),
            get(ContextKind::ValidValue),
            suggested(ContextKind::SuggestedValue),
        ),
        ErrorKind::UnknownArgument => format!(
            "{}{}: unknown {}{}; {see}",
            command.prefix(),
            argument,
            if argument.starts_with('-') {
                "option"
            } else {
                "argument"
            },
            suggested(ContextKind::SuggestedArg),
        ),
        ErrorKind::InvalidSubcommand => format!(
            "{}{}: unknown command{}; {see}",
            command.prefix(),
            get(ContextKind::InvalidSubcommand),
            suggested_command(error),
        ),
        ErrorKind::ArgumentConflict if get(ContextKind::PriorArg) == argument => {
            format!("{}: given twice; give it once; {see}", command.named(name))
        }
        ErrorKind::ArgumentConflict => format!(
            "{}: cannot be combined with {}; {see}",
            command.named(name),
            get(ContextKind::PriorArg),
        ),
        ErrorKind::MissingRequiredArgument => {
            format!("{}{argument} is missing; {see}", command.prefix())
        }
        ErrorKind::MissingSubcommand => format!("{}a command is missing; {see}", command.prefix()),
        ErrorKind::InvalidUtf8 => format!("{}an argument is not UTF-8; {see}", command.prefix()),
        _ => {
            let text = error.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            let first = first.trim_start_matches("error: ");
            format!("{}{first}; {see}", command.prefix())
        }
    }
}

/// The command that the user typed: "vfio bind".
struct Typed(String);

impl Typed {
    fn of(arguments: &[String]) -> Self {
        let root = command::plain();
        let mut command = &root;
        let mut words: Vec<&str> = Vec::new();
        for argument in arguments {
            let found = command.find_subcommand(argument);
            let Some(found) = found.filter(|found| !found.is_hide_set()) else {
                break;
            };
            words.push(argument);
            command = found;
        }
        Self(words.join(" "))
    }

    /// What stands before a part of the command line: nothing for the options of run.
    fn prefix(&self) -> String {
        match self.0.as_str() {
            "" | "run" => String::new(),
            command => format!("{command}: "),
        }
    }

    /// An argument as users know it: an option by its name, another behind its command.
    fn named(&self, argument: &str) -> String {
        match argument.starts_with('-') {
            true => argument.to_owned(),
            false if self.0.is_empty() => argument.to_owned(),
            false => self.0.clone(),
        }
    }

    /// Where to read on.
    fn see(&self, argument: &str) -> String {
        match (self.0.as_str(), option_table::find(argument)) {
            ("", _) => "see 'fanlight help'".into(),
            ("run", Some(option)) if argument.starts_with('-') => {
                // A command may have the name of the option.
                let dashes = if option.name == "vfio" { "--" } else { "" };
                format!("see 'fanlight help {dashes}{}'", option.name)
            }
            (command, _) => format!("see 'fanlight help {command}'"),
        }
    }
}

/// The nearest commands that clap found, without those that only Fanlight itself runs.
fn suggested_command(error: &Error) -> String {
    let Some(ContextValue::Strings(names)) = error.get(ContextKind::SuggestedSubcommand) else {
        return String::new();
    };
    let root = command::command();
    let is_hidden = |name: &&String| {
        root.find_subcommand(name)
            .is_some_and(clap::Command::is_hide_set)
    };
    let names: Vec<_> = names.iter().filter(|name| !is_hidden(name)).collect();
    match names[..] {
        [] => String::new(),
        [ref first, ..] => format!("; did you mean {first}?"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(arguments: &[&str]) -> String {
        let all = ["fanlight"].iter().chain(arguments).map(Into::into);
        let error = command::parse(all).expect_err("an error");
        assert_eq!(error.exit_code(), 2);
        let arguments: Vec<_> = arguments.iter().map(|text| (*text).to_owned()).collect();
        let line = line(&error, &arguments);
        assert!(!line.contains('\n'), "{line}");
        line
    }

    #[test]
    fn errors_are_one_line_that_says_what_to_do() {
        for (arguments, expected) in [
            (
                &["run", "--disk", "pth=x"][..],
                "--disk pth=x: unknown key \"pth\"; did you mean path?; keys are path, id, readonly, format, serial, \
                 port; see 'fanlight help disk'",
            ),
            (
                &["run", "--memory", "lots"],
                "--memory lots: size: \"lots\" is not a size: give a number of bytes, or one with K, M, G or T, such \
                 as 512M; see 'fanlight help memory'",
            ),
            (
                &["run", "--on-reset", "shrug"],
                "--on-reset shrug: not one of restart, exit; see 'fanlight help on-reset'",
            ),
            (
                &["run", "--on-reset", "exti"],
                "--on-reset exti: not one of restart, exit; did you mean exit?; see 'fanlight help on-reset'",
            ),
            (
                &["run", "--cpus", "many"],
                "--cpus many: not a whole number; see 'fanlight help cpus'",
            ),
            (
                &["run", "--cpus"],
                "--cpus: needs a value; see 'fanlight help cpus'",
            ),
            (
                &["run", "--cpus", "1", "--cpus", "2"],
                "--cpus: given twice; give it once; see 'fanlight help cpus'",
            ),
            (
                &["run", "--kernle", "x"],
                "--kernle: unknown option; did you mean --kernel?; see 'fanlight help run'",
            ),
            (
                &["run", "kernel"],
                "kernel: unknown argument; see 'fanlight help run'",
            ),
            (
                &["serv"],
                "serv: unknown command; did you mean serve?; see 'fanlight help'",
            ),
            (
                &["vfio", "bidn"],
                "vfio: bidn: unknown command; did you mean bind?; see 'fanlight help vfio'",
            ),
            (
                &["vfio", "bind"],
                "vfio bind: <ADDRESS> is missing; see 'fanlight help vfio bind'",
            ),
            (
                &["vfio", "bind", "a", "--vfs", "x"],
                "--vfs x: not a whole number; see 'fanlight help vfio bind'",
            ),
            (
                &["serve"],
                "serve: --api-socket <SOCKET> is missing; see 'fanlight help serve'",
            ),
            (
                &["completions", "tcsh"],
                "completions tcsh: not one of bash, elvish, fish, powershell, zsh; did you mean zsh?; see 'fanlight help completions'",
            ),
            (
                &["run", "--vfio", "here,iomufd=on"],
                "--vfio here,iomufd=on: unknown key \"iomufd\"; did you mean iommufd?; keys are device, iommufd, \
                 iommu, group, id, port; see 'fanlight help --vfio'",
            ),
        ] {
            assert_eq!(error(arguments), expected);
        }
    }

    #[test]
    fn help_is_no_error() {
        for arguments in [&["--help"][..], &["run", "-h"], &["--version"]] {
            let all = ["fanlight"].iter().chain(arguments).map(Into::into);
            assert_eq!(command::parse(all).unwrap_err().exit_code(), 0);
        }
    }
}
