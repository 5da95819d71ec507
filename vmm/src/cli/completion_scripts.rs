//! `fanlight completions`: scripts that make a shell ask the program itself for completions.

use std::io;

use clap_complete::{
    Shell,
    env::{CompleteEnv, Shells},
};

use crate::command;

/// Environment variable in which a shell's script names the shell.
const VARIABLE: &str = "FANLIGHT_COMPLETE";
const PROGRAM: &str = "fanlight";

/// Bash splits words at `=` and `:`. The script joins them for the program, and removes from each answer what
/// stands before the word that bash replaces.
const BASH: &str = r#"_fanlight() {
    local rest=${COMP_LINE:0:COMP_POINT} words=() word i IFS=$'\n'
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if [[ $i == 0 || $rest == [[:space:]]* ]]; then
            words+=("")
            rest=${rest#"${rest%%[![:space:]]*}"}
        fi
        word=${COMP_WORDS[i]}
        if [[ $i == "$COMP_CWORD" ]]; then
            word=$rest
        fi
        words[${#words[@]} - 1]+=$word
        rest=${rest#"$word"}
    done
    local current=${words[${#words[@]} - 1]}
    local before=${current%"${current##*[=:]}"}
    COMPREPLY=($(_CLAP_IFS=$'\n' _CLAP_COMPLETE_INDEX=$((${#words[@]} - 1)) \
        VARIABLE=bash fanlight -- "${words[@]}" 2> /dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/] ]]; then
        compopt -o nospace
    fi
}
complete -o nosort -F _fanlight fanlight
"#;

/// Zsh with a script that adds no space behind `key=`.
const ZSH: &str = r#"#compdef fanlight
_fanlight() {
    local -a answers open closed
    answers=("${(@f)$(_CLAP_IFS=$'\n' _CLAP_COMPLETE_INDEX=$((CURRENT - 1)) \
        VARIABLE=zsh fanlight -- "${words[@]}" 2> /dev/null)}")
    local answer
    for answer in $answers; do
        # A colon of the value is written "\:"; the text follows behind a plain one.
        if [[ ${answer%%[^\\]:*} == *[=/] || $answer == *[=/] || $answer == *=:* ]]; then
            open+=("$answer")
        else
            closed+=("$answer")
        fi
    done
    [[ -n $open ]] && _describe -V values open -S ''
    [[ -n $closed ]] && _describe -V values closed
}
compdef _fanlight fanlight
"#;

/// Answers a shell's script, if one started this process.
pub fn answer() -> Result<bool, clap::Error> {
    let environment = CompleteEnv::with_factory(command::command)
        .var(VARIABLE)
        .bin(PROGRAM)
        .completer(PROGRAM);
    environment.try_complete(std::env::args_os(), std::env::current_dir().ok().as_deref())
}

/// The script for a shell.
pub fn script(shell: Shell) -> io::Result<String> {
    match shell {
        Shell::Bash => return Ok(BASH.replace("VARIABLE", VARIABLE)),
        Shell::Zsh => return Ok(ZSH.replace("VARIABLE", VARIABLE)),
        _ => {}
    }
    let mut text = Vec::new();
    let shells = Shells::builtins();
    let completer = shells
        .completer(&shell.to_string())
        .ok_or_else(|| io::Error::other(format!("no completions for {shell}")))?;
    completer.write_registration(VARIABLE, PROGRAM, PROGRAM, PROGRAM, &mut text)?;
    String::from_utf8(text).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::ValueEnum;

    use super::*;

    /// The engine's answer when the last of `arguments` is completed.
    fn completions(arguments: &[&str]) -> Vec<String> {
        let arguments: Vec<OsString> = ["fanlight"]
            .iter()
            .chain(arguments)
            .map(Into::into)
            .collect();
        let last = arguments.len() - 1;
        let found = clap_complete::engine::complete(&mut command::command(), arguments, last, None);
        let found = found.unwrap().into_iter();
        found
            .map(|one| one.get_value().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn every_shell_has_a_script() {
        for shell in Shell::value_variants() {
            let script = script(*shell).unwrap();
            assert!(script.contains(VARIABLE), "{shell}");
        }
    }

    #[test]
    fn values_are_completed() {
        let last = |value: &str| completions(&["run", "--disk", value]);
        assert_eq!(last("path=x,form"), ["path=x,format="]);
        assert_eq!(
            last("path=x,format="),
            ["path=x,format=raw", "path=x,format=qcow2"]
        );
        assert_eq!(last("path=x,format=q"), ["path=x,format=qcow2"]);
        assert_eq!(
            last("a,,b,readonly=o"),
            ["a,,b,readonly=on", "a,,b,readonly=off"]
        );
        // path was given without its key.
        assert_eq!(
            last("x,"),
            ["readonly", "format", "serial", "id", "port"].map(|key| format!("x,{key}="))
        );
        assert!(last("path=x,port=").contains(&"path=x,port=2".into()));
        assert!(last("nonsense=").is_empty());
        assert_eq!(completions(&["run", "--disk=x,form"]), ["--disk=x,format="]);
        let gpu = |value| completions(&["run", "--gpu", value]);
        assert_eq!(
            gpu("1920x1080,renderer=ve"),
            ["1920x1080,renderer=venus", "1920x1080,renderer=venus+virgl"]
        );
        assert_eq!(
            gpu("outputs=800x600+1920x1"),
            ["outputs=800x600+1920x1080", "outputs=800x600+1920x1200"]
        );
        let serial = |value| completions(&["run", "--serial", value]);
        assert_eq!(serial("s"), ["stdio", "socket="]);
        assert_eq!(
            completions(&["run", "--on-panic", ""]),
            ["exit", "restart", "continue"]
        );
        assert_eq!(completions(&["run", "--log", "d"]), ["debug"]);
        assert!(completions(&["ctl", "s", "vm."]).contains(&"vm.info".into()));
        assert!(completions(&["help", "di"]).contains(&"disk".into()));
        assert!(completions(&["run", "--hot"]).contains(&"--hotplug-ports".into()));
    }

    #[test]
    fn files_are_completed_behind_a_key() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk.img"), "").unwrap();
        let prefix = dir.path().join("di").display().to_string();
        let file = dir.path().join("disk.img").display().to_string();
        assert_eq!(
            completions(&["run", "--disk", &format!("path={prefix}")]),
            [format!("path={file}")]
        );
        assert_eq!(completions(&["run", "--kernel", &prefix]), [file]);
    }

    #[test]
    fn addresses_are_those_of_this_host() {
        for address in completions(&["vfio", "bind", ""])
            .iter()
            .filter(|word| !word.starts_with('-'))
        {
            assert!(address.contains(':'), "{address}");
        }
    }
}
