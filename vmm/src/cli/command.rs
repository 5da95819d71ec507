//! The command line as clap knows it: the types of `options`, with grammars and completions of the option table.

use std::ffi::{OsStr, OsString};

use clap::{
    Arg, Command, CommandFactory, Error, Parser,
    builder::{PossibleValue, PossibleValuesParser},
};
use clap_complete::{ArgValueCandidates, ArgValueCompleter, CompletionCandidate};

use crate::{
    complete,
    option_page::Page,
    option_table::{self, Form, OptionSpec},
    options::Options,
};

/// Widest grammar in the help, which clap indents by 10. It fits terminals of 60 columns.
const GRAMMAR_WIDTH: usize = 50;

/// The command line with the grammars, completions and words of the tables, for help and errors.
pub fn command() -> Command {
    plain()
        .mut_subcommand("help", |help| {
            let topics = topics(&plain());
            help.mut_arg("topic", |arg| {
                arg.add(ArgValueCandidates::new(move || {
                    topics.iter().map(CompletionCandidate::new).collect()
                }))
            })
        })
        .mut_subcommand("run", |run| {
            run.mut_args(|arg| match arg.get_long().and_then(option_table::find) {
                Some(option) => complete_arg(option, arg),
                None => arg,
            })
        })
}

/// The command line without the tables.
pub fn plain() -> Command {
    Options::command()
}

/// Reads the arguments of the program, the first of which is its name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, Error> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // A machine starts faster without the tables; only help and errors need them.
    Options::try_parse_from(&arguments).map_err(|error| {
        let full = command().try_get_matches_from(arguments);
        full.err().unwrap_or(error)
    })
}

/// All topics of one word.
pub fn topics(root: &Command) -> Vec<String> {
    let commands = root
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut topics: Vec<_> = commands
        .map(|command| command.get_name().to_owned())
        .collect();
    let options = root
        .find_subcommand("run")
        .into_iter()
        .flat_map(Command::get_arguments);
    topics.extend(options.filter_map(|arg| Some(arg.get_long()?.to_owned())));
    topics.sort();
    topics.dedup();
    topics
}

/// The text of an argument: its long help, or its short one as a sentence.
pub fn about(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help());
    help.map_or(String::new(), |help| help.to_string())
}

/// An argument of `fanlight run` with its grammar and completions.
fn complete_arg(option: &'static OptionSpec, mut arg: Arg) -> Arg {
    let page = Page::new(option);
    let mut help = about(&arg);
    if !matches!(option.form, Form::One(_)) {
        let grammar = page.grammar_lines(GRAMMAR_WIDTH).join("\n");
        help += &format!(
            "\n\n{grammar}\n'fanlight help {}' has the details.",
            option.name
        );
    } else if !page.entries.is_empty() {
        let words = page
            .entries
            .iter()
            .map(|entry| PossibleValue::new(entry.term.clone()));
        arg = arg
            .value_parser(PossibleValuesParser::new(words))
            .hide_possible_values(true);
        help += "\n";
        for entry in &page.entries {
            help += &format!("\n{}: {}", entry.term, entry.text);
        }
    }
    let completer = move |current: &OsStr| complete::option_value(option, current);
    arg.long_help(help).add(ArgValueCompleter::new(completer))
}
