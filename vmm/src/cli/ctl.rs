//! `fanlight ctl`: calls one method and prints its result.

mod attach;
mod params;

use std::{
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    path::Path,
    process::ExitCode,
};

use fanlight_api::client::{Client, ClientError};
use fanlight_devices::error_line;
use serde_json::{Map, Value};

use crate::{help, options::CtlOptions};
use params::Params;

/// Exit status for a wrong command line, like that of clap.
const USAGE: u8 = 2;

/// Runs the command.
pub fn run(options: &CtlOptions) -> ExitCode {
    let Some(socket) = &options.socket else {
        if options.help {
            print!("{}", help::on(&["ctl".into()]).unwrap_or_default());
            return ExitCode::SUCCESS;
        }
        eprintln!("fanlight: ctl: <SOCKET> is missing; see 'fanlight help ctl'");
        return USAGE.into();
    };
    let result = match &options.method {
        _ if options.help => help(socket, options.method.as_deref()),
        None => {
            eprintln!(
                "fanlight: ctl: <METHOD> is missing; 'fanlight ctl {} --help' lists the methods",
                socket.display()
            );
            return USAGE.into();
        }
        Some(method) => match Params::read(&options.params) {
            Ok(params) => call(socket, method, &params, options.json),
            Err(error) => {
                eprintln!("fanlight: {error}");
                return USAGE.into();
            }
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe.
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let line = match &error {
                Error::Client(error @ ClientError::Io { .. }) => {
                    format!("{}: {}", socket.display(), error_line(error))
                }
                Error::Client(error) => error_line(error),
                Error::Io(error) => error_line(error),
                Error::Text(text) => text.clone(),
            };
            eprintln!("fanlight: {line}");
            ExitCode::FAILURE
        }
    }
}

enum Error {
    Client(ClientError),
    Io(io::Error),
    Text(String),
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn call(socket: &Path, method: &str, params: &Params, json: bool) -> Result<(), Error> {
    let mut client = Client::connect(socket)?;
    let fds: Vec<_> = params.fds.iter().map(AsFd::as_fd).collect();
    let (result, fds) = client.call_json(method, &params.value, &fds)?;
    if let Some(fd) = fds.into_iter().next() {
        if method == "console.attach" {
            return Ok(attach::connect(fd.into())?);
        }
        return Err(Error::Text(format!(
            "{method}: the result is a descriptor, which a command line cannot use; see its --help for \
             another way, or call it from a program"
        )));
    }
    let table = io::stdout().is_terminal() && !json;
    print(&result, table)?;
    if method == "events.subscribe" {
        loop {
            let event = match client.next_event() {
                Err(ClientError::Closed) => return Ok(()),
                event => event?,
            };
            let event = serde_json::to_value(event).map_err(ClientError::from)?;
            writeln!(io::stdout(), "{event}")?;
        }
    }
    Ok(())
}

fn print(result: &Value, table: bool) -> io::Result<()> {
    let text = if table {
        self::table(result)
    } else {
        let mut text = serde_json::to_string_pretty(result)?;
        text.push('\n');
        text
    };
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// A value in one cell of a table.
fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Rows as columns of the least width.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|at| {
            let cells = rows.iter().filter_map(|row| row.get(at));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// An object as names and values. A list of objects in it becomes a table of its own.
fn table(value: &Value) -> String {
    let Value::Object(object) = value else {
        return cell(value) + "\n";
    };
    let is_list = |value: &&Value| {
        value
            .as_array()
            .is_some_and(|list| !list.is_empty() && list.iter().all(Value::is_object))
    };
    let plain: Vec<_> = object
        .iter()
        .filter(|(_, value)| !is_list(value))
        .map(|(name, value)| vec![name.clone(), cell(value)])
        .collect();
    let mut text = columns(&plain);
    for (name, list) in object.iter().filter(|(_, value)| is_list(value)) {
        let list: Vec<&Map<String, Value>> = list
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_object)
            .collect();
        let mut keys: Vec<&String> = Vec::new();
        for key in list.iter().flat_map(|row| row.keys()) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let mut rows = vec![keys.iter().map(|key| key.to_uppercase()).collect()];
        for row in list {
            let cells = keys
                .iter()
                .map(|key| row.get(*key).map_or(String::new(), cell));
            rows.push(cells.collect());
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text += &format!("{name}:\n{}", columns(&rows));
    }
    text
}

/// Lists the server's methods, or describes one.
fn help(socket: &Path, method: Option<&str>) -> Result<(), Error> {
    let mut client = Client::connect(socket)?;
    let (schema, _) = client.call_json("api.schema", &Value::Object(Map::new()), &[])?;
    let methods = schema["methods"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let Some(name) = method else {
        let rows: Vec<_> = methods
            .iter()
            .map(|method| vec![text(&method["name"]), text(&method["description"])])
            .collect();
        print!("Methods:\n{}", columns(&rows));
        println!(
            "\n'fanlight ctl {} METHOD --help' describes a method.",
            socket.display()
        );
        return Ok(());
    };
    let found = methods.iter().find(|method| method["name"] == name);
    let Some(found) = found else {
        let names = methods.iter().filter_map(|method| method["name"].as_str());
        let nearest = fanlight_api::error::nearest(name, names);
        let hint = nearest.map(|nearest| format!("; did you mean {nearest}?"));
        return Err(Error::Text(format!(
            "{name}: no such method{}",
            hint.unwrap_or_default()
        )));
    };
    println!("{name}: {}", text(&found["description"]));
    let params = found["params"].as_array().cloned().unwrap_or_default();
    if !params.is_empty() {
        let rows: Vec<_> = params
            .iter()
            .map(|param| {
                let required = if param["required"] == true {
                    "required"
                } else {
                    ""
                };
                vec![
                    text(&param["name"]),
                    required.into(),
                    text(&param["description"]).replace('\n', " "),
                ]
            })
            .collect();
        print!("\nParameters:\n{}", columns(&rows));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_line_up() {
        let value =
            json!({"state": "running", "devices": [{"id": "disk0"}, {"id": "a", "port": 1}]});
        assert_eq!(
            table(&value),
            "state  running\n\ndevices:\nID     PORT\ndisk0\na      1\n"
        );
    }
}
